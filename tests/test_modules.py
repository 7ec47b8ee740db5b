"""Whatever people do to a network's modules, ours then computes and shows what torchvision's does.

Each treatment is applied to both networks after a first forward pass; maps, gradients and what was observed must agree.
"""

import copy
import pickle
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.ao.quantization import MinMaxObserver, QConfig, default_weight_observer, prepare
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.nn.utils.parametrize import register_parametrization
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.feature_extraction import create_feature_extractor

from resbackbone import build_resnet_backbone
from resbackbone.folding import FrozenBatchNorm2d

KINDS = ("conv1", "bn1", "maxpool", "layer1", "layer2.0", "layer2.0.conv2", "layer2.0.downsample", "layer3.1.bn2")
LEVELS = {f"layer{i}": f"c{i + 1}" for i in range(1, 5)}


class Reference(torchvision.models.ResNet):
    """torchvision's ResNet with maps as ours."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        maps = {}
        for layer, level in LEVELS.items():
            maps[level] = x = getattr(self, layer)(x)
        return maps


def networks(depth: int, norm: str, randomised) -> tuple[nn.Module, nn.Module]:
    block = torchvision.models.resnet.BasicBlock if depth == 18 else torchvision.models.resnet.Bottleneck
    layers = [2, 2, 2, 2] if depth == 18 else [3, 4, 6, 3]
    kind = torchvision.ops.FrozenBatchNorm2d if norm == "FrozenBN" else nn.BatchNorm2d
    theirs = randomised(Reference(block, layers, norm_layer=kind))
    ours = build_resnet_backbone(depth, norm=norm, weights=theirs.state_dict(), frozen_through=None)
    del theirs.avgpool, theirs.fc
    return ours.double().eval(), theirs.double().eval()


def measured(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Maps, and the gradients of all parameters and of the images."""
    images = images.clone().requires_grad_()
    generator = torch.Generator().manual_seed(1)
    maps = network(images)
    sum((x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in maps.values()).backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return {**maps, **gradients, "images": images.grad}


def each(network: nn.Module, kind: type) -> list[tuple[nn.Module, str, nn.Module]]:
    """(parent, name, module) of every module of a kind."""
    parents = list(network.modules())
    return [(p, name, child) for p in parents for name, child in p.named_children() if isinstance(child, kind)]


class Scaled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0.5


class LowRank(nn.Module):
    """As LoRA wraps a convolution: without its attributes."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.base = conv
        self.down = nn.Conv2d(conv.in_channels, 2, conv.kernel_size, conv.stride, conv.padding, bias=False)
        self.up = nn.Conv2d(2, conv.out_channels, 1, bias=False)
        for i, adapter in enumerate((self.down, self.up)):
            values = torch.linspace(-0.1, 0.1 + i, adapter.weight.numel()).view_as(adapter.weight)
            adapter.weight = nn.Parameter(values.to(conv.weight))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


class Recomputed(nn.Module):
    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.module, x, use_reentrant=False)


def forward_hooks(network, seen):
    for name in KINDS:
        network.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: seen.__setitem__(name, output.detach().clone())
        )


def relu_hooks(network, seen):
    calls = []
    for _, name, relu in each(network, nn.ReLU):
        relu.register_forward_hook(lambda *_, name=name: calls.append(name))
    network(torch.zeros(1, 3, 33, 33).double())
    seen["calls of relu"] = torch.tensor(float(len(calls)))


def hooks_that_change_what_goes_in_and_out(network, seen):
    for name in KINDS:
        module = network.get_submodule(name)
        module.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 1.1,))
        module.register_forward_hook(lambda module, inputs, output: output + 0.1)


def backward_hooks(network, seen):
    for name in ("conv1", "layer1", "layer2.0.conv2", "layer2.0.downsample", "layer3.1.conv1"):
        module = network.get_submodule(name)
        module.register_full_backward_pre_hook(lambda module, grad: (grad[0] * 0.9,))
        module.register_full_backward_hook(
            lambda module, given, grad, name=name: seen.__setitem__(f"{name}: gradient", grad[0].clone())
        )


def hooks_on_all_modules(network, seen):
    count = []
    handle = register_module_forward_hook(lambda module, inputs, output: count.append(type(module).__name__))
    network(torch.zeros(1, 3, 33, 33).double())
    handle.remove()
    for kind in ("Conv2d", "ReLU", "MaxPool2d"):
        seen[kind] = torch.tensor(float(count.count(kind)))


def grad_cam(network, seen):
    network.layer4.register_forward_hook(lambda module, inputs, output: kept.append(output))
    kept: list[Tensor] = []
    score = network(torch.ones(1, 3, 65, 49).double())["c5"].mean()
    (gradient,) = torch.autograd.grad(score, kept)
    seen["cam"] = F.relu((gradient.mean((2, 3), keepdim=True) * kept[0]).sum(1)).detach()


def flop_counter(network, seen):
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, 65, 49).double())
    counts = counter.get_flop_counts()
    for name in ("layer1", "layer2.0.conv1", "layer4"):
        of_module = next(value for key, value in counts.items() if key.endswith(f".{name}"))
        seen[name] = torch.tensor(float(sum(of_module.values())))


def patched_functions(network, seen):
    for name in ("conv2d", "relu"):
        with mock.patch.object(F, name, side_effect=getattr(F, name)) as patched:
            network(torch.zeros(1, 3, 65, 49).double())
        seen[f"calls of {name}"] = torch.tensor(float(patched.call_count))


def own_forward(network, seen):
    conv, other = network.layer2[0].conv2, network.layer2[1].conv2
    forward, convolve = conv.forward, other._conv_forward
    conv.forward = lambda x: forward(x) * 2
    other._conv_forward = lambda x, weight, bias: convolve(x, weight, bias) * 3


def order_of_calls(network, seen):
    order = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda module, inputs, output, name=name: order.append(name))
    network(torch.zeros(1, 3, 65, 49).double())
    names = [name for name, _ in network.named_modules()]
    seen["order"] = torch.tensor([float(names.index(name)) for name in order])


def other_strides(network, seen):
    network.layer2[1].conv1.stride, network.layer2[1].conv2.dilation = 1, 1


def spectral(network, seen):
    conv = network.layer4[0].conv1
    torch.manual_seed(3)
    spectral_norm(conv)


def weight_normed(network, seen):
    weight_norm(network.layer2[0].conv1)
    parametrizations.weight_norm(network.layer2[0].conv2)


def parametrized(network, seen):
    register_parametrization(network.layer1[0].conv1, "weight", Halved())


def pruned(network, seen):
    prune.l1_unstructured(network.layer3[0].conv1, "weight", 0.5)
    measured(network, torch.ones(1, 3, 33, 33).double())  # the mask is applied anew in every forward pass
    network.zero_grad()


def lora(network, seen):
    for parent, name, conv in each(network, nn.Conv2d):
        if name == "conv1":
            setattr(parent, name, LowRank(conv))


def observers(network, seen):
    network.qconfig = QConfig(activation=MinMaxObserver, weight=default_weight_observer)
    prepare(network, inplace=True)
    network(torch.ones(1, 3, 33, 33).double())
    for name in ("conv1", "layer2.0.conv2", "layer4.1.conv1"):
        seen[f"{name}: largest"] = network.get_submodule(name).activation_post_process.max_val


def circular(network, seen):
    for _, _, conv in each(network, nn.Conv2d):
        conv.padding_mode = "circular"


def padded_by_a_word(network, seen):
    network.layer2[1].conv1.padding = "same"


def subclassed(network, seen):
    for parent, name, conv in each(network, nn.Conv2d):
        scaled = Scaled(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, bias=False)
        scaled.weight = conv.weight
        setattr(parent, name, scaled)


def replaced_norms(make):
    def replace(network, seen):
        for parent, name, norm in each(network, (nn.BatchNorm2d, torchvision.ops.FrozenBatchNorm2d, FrozenBatchNorm2d)):
            setattr(parent, name, make(len(norm.weight)).double())

    return replace


def replaced_activations(network, seen):
    for parent, name, _ in each(network, nn.ReLU):
        setattr(parent, name, nn.SiLU())


def compiled_stage(network, seen):
    network.layer4 = torch.compile(network.layer4, backend="eager")
    network.layer3[0].conv1.compile(backend="eager")


def recomputed_stage(network, seen):
    network.layer3 = Recomputed(network.layer3)


def written_through_data(network, seen):
    network.layer2[0].conv1.weight.data[:, :, 1:, 1:].mul_(2)
    network.bn1.weight.data[3] = 4


def another_eps(network, seen):
    network.bn1.eps = 1.0
    network.layer4[0].bn1.eps = 0.5


def norms_that_train(network, seen):
    for _, _, norm in each(network, (torchvision.ops.FrozenBatchNorm2d, FrozenBatchNorm2d)):
        weight = norm.weight
        del norm.weight
        norm.weight = nn.Parameter(weight.clone())


TREATMENTS = [
    forward_hooks,
    relu_hooks,
    hooks_that_change_what_goes_in_and_out,
    backward_hooks,
    hooks_on_all_modules,
    grad_cam,
    flop_counter,
    patched_functions,
    own_forward,
    order_of_calls,
    other_strides,
    spectral,
    weight_normed,
    parametrized,
    pruned,
    lora,
    observers,
    circular,
    padded_by_a_word,
    subclassed,
    replaced_norms(lambda channels: nn.GroupNorm(4, channels)),
    replaced_norms(lambda channels: nn.Identity()),
    replaced_norms(lambda channels: nn.InstanceNorm2d(channels)),
    replaced_activations,
    compiled_stage,
    recomputed_stage,
    written_through_data,
    another_eps,
    norms_that_train,
]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
@pytest.mark.parametrize("treat", TREATMENTS, ids=lambda treat: treat.__qualname__.split(".")[0])
def test_after_a_treatment_the_network_is_torchvisions_after_the_same(treat, norm, randomised):
    images, found = torch.randn(2, 3, 33, 41).double(), []
    for network in networks(18, norm, randomised):
        network(images)
        seen: dict[str, Tensor] = {}
        treat(network, seen)
        found.append({**measured(network, images), **seen})
    ours, theirs = found
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], x) or distance(ours[name], x) < 1e-9 for name, x in theirs.items())


def distance(x: Tensor, expected: Tensor) -> float:
    return ((x - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("depth", [18, 50])
def test_the_children_in_turn_are_the_network(depth, randomised):
    images = torch.randn(1, 3, 65, 49).double()
    ours, theirs = networks(depth, "FrozenBN", randomised)
    expected = theirs(images)
    assert [name for name, _ in ours.named_children()] == [name for name, _ in theirs.named_children()]
    for network in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):  # noqa: S301
        got = IntermediateLayerGetter(network, LEVELS)(images)
        assert all(distance(got[level], x) < 1e-9 for level, x in expected.items())
        assert distance(nn.Sequential(*network.children())(images), expected["c5"]) < 1e-9


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
def test_a_traced_graph_gives_the_features_and_follows_the_weights(norm, randomised):
    images = torch.randn(1, 3, 65, 49).double()
    nodes = {"layer2.0.bn1": "norm", "layer3.1.conv2": "convolution", "layer4": "c5"}
    extracted = [create_feature_extractor(network, nodes) for network in networks(18, norm, randomised)]
    for _ in range(2):
        ours, theirs = (extractor(images) for extractor in extracted)
        assert all(distance(ours[name], x) < 1e-9 for name, x in theirs.items())
        for extractor in extracted:
            extractor.load_state_dict({name: value * 1.1 for name, value in extractor.state_dict().items()})


def test_an_average_of_weights_and_weights_passed_in_are_used(randomised):
    images = torch.randn(1, 3, 65, 49).double()
    found = []
    for network in networks(18, "FrozenBN", randomised):
        average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        doubled = {name: value * 1.2 for name, value in network.state_dict().items()}
        called = torch.func.functional_call(network, doubled, (images,))
        network.load_state_dict(doubled)
        average(images)
        average.update_parameters(network)
        average.update_parameters(network)
        stacked = {name: torch.stack((value, value * 0.9)) for name, value in network.state_dict().items()}
        mapped = torch.func.vmap(lambda state, net=network: torch.func.functional_call(net, state, (images,))["c5"])
        found.append({"called": called["c5"], "average": average(images)["c5"], "mapped": mapped(stacked)})
    ours, theirs = found
    assert all(distance(ours[name], x) < 1e-9 for name, x in theirs.items())


def test_a_sharded_stage_computes_and_trains_as_torchvisions(randomised, tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    images, found = torch.randn(2, 3, 65, 49).double(), []
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for network in networks(18, "FrozenBN", randomised):
            fully_shard(network.layer4, mesh=init_device_mesh("cpu", (1,)))
            maps = network(images)
            sum(x.sum() for x in maps.values()).backward()
            found.append({**maps, "gradient": network.layer4[0].conv1.weight.grad.to_local()})
    finally:
        dist.destroy_process_group()
    ours, theirs = found
    assert all(distance(ours[name], x) < 1e-9 for name, x in theirs.items())


def fused_pairs(network, seen):
    """Treatments after which a pair of convolution and norm no longer folds into weights and a bias."""
    parametrizations.weight_norm(network.layer3[0].conv1)
    prune.l1_unstructured(network.layer3[0].conv2, "weight", 0.5)
    network.layer2[0].conv2.register_forward_hook(lambda module, inputs, output: output * 2)
    network.layer2[1].bn2.register_forward_hook(lambda module, inputs, output: output * 2)
    scaled = Scaled(64, 64, 3, padding=1, bias=False).double()
    network.layer1[0].conv1 = scaled


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
def test_fusing_leaves_what_is_not_plain(norm, randomised):
    images = torch.randn(1, 3, 65, 49).double()
    network, _ = networks(18, norm, randomised)
    fused_pairs(network, {})
    expected = network(images)
    network.fuse()
    assert sum(isinstance(module, nn.Identity) for module in network.modules()) == 15
    assert all(distance(x, expected[level]) < 1e-9 for level, x in network(images).items())


def tied_weights(network):
    network.layer1[1].conv1.weight = network.layer1[0].conv1.weight
    network.layer3[1].conv2 = network.layer3[1].conv1


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
def test_fusing_leaves_alone_what_others_share(norm, randomised):
    images = torch.randn(1, 3, 65, 49).double()
    network, _ = networks(18, norm, randomised)
    tied_weights(network)
    trunk, state = network.with_levels(["c3"]), network.state_dict()
    before = {name: x.clone() for name, x in state.items()}
    expected = network(images)
    assert distance(trunk.fuse()(images)["c3"], expected["c3"]) < 1e-9
    assert all(distance(x, expected[level]) < 1e-9 for level, x in network(images).items())
    assert all(distance(x, expected[level]) < 1e-9 for level, x in network.fuse()(images).items())
    assert all(torch.equal(x, before[name]) for name, x in state.items())


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
def test_a_deep_stem_is_seen_by_hooks_and_fused_only_where_it_is_asked_for(norm, randomised):
    network = randomised(build_resnet_backbone(18, stem="deep", shortcut="D", levels=["c2", "c3"])).double()
    if norm == "FrozenBN":
        network.freeze("c3")
    images, seen = torch.randn(1, 3, 33, 49).double(), []
    expected, stem = network(images), network.conv1(images)
    handle = network.conv1.register_forward_hook(lambda module, inputs, output: seen.append(output.clone()))
    assert all(distance(x, expected[level]) < 1e-9 for level, x in network(images).items())
    assert len(seen) == 1 and distance(seen[0], stem) < 1e-9  # in front of the last norm
    handle.remove()
    trunk = network.with_levels(["c3"])  # on the same layers
    assert distance(trunk.fuse()(images)["c3"], expected["c3"]) < 1e-9
    assert type(trunk.bn1) is nn.Identity
    assert all(distance(x, expected[level]) < 1e-9 for level, x in network(images).items())


def test_a_patched_frozen_norm_and_a_logger_of_all_calls_are_followed(randomised, monkeypatch):
    images, called = torch.randn(1, 3, 65, 49).double(), []
    network, _ = networks(18, "FrozenBN", randomised)
    plain, forward = network(images), FrozenBatchNorm2d.forward
    with monkeypatch.context() as patch:
        patch.setattr(FrozenBatchNorm2d, "forward", lambda norm, x: forward(norm, x) * 1.5)
        assert distance(network(images)["c2"], plain["c2"]) > 0.1
    call = nn.Module._call_impl
    monkeypatch.setattr(nn.Module, "_call_impl", lambda self, *x, **k: called.append(type(self)) or call(self, *x, **k))
    assert distance(network(images)["c2"], plain["c2"]) < 1e-9
    assert {nn.Conv2d, FrozenBatchNorm2d, nn.ReLU} <= set(called)


def test_a_part_of_a_projection_is_a_sequential():
    projection = build_resnet_backbone(18).layer2[0].downsample
    assert [type(projection[:1]), type(projection[0]), len(projection[1:])] == [nn.Sequential, nn.Conv2d, 1]


@pytest.mark.parametrize("change", ["hook", "forward"])
def test_a_trunk_does_not_drop_hooks_of_the_whole(change):
    network = build_resnet_backbone(18)
    if change == "hook":
        network.register_forward_hook(lambda module, inputs, output: None)
    else:
        network.forward = lambda x: {"c2": x}
    with pytest.raises(ValueError, match="hooks or a forward of its own, .*remove them before with_levels"):
        network.with_levels(["c4"])


def test_a_norm_that_is_not_plain_is_not_frozen_in_silence(randomised):
    network, _ = networks(18, "BN", randomised)
    network.layer1[0].bn1.register_forward_hook(lambda module, inputs, output: output * 2)
    with pytest.raises(ValueError, match="BatchNorm2d cannot be frozen: .* hooks"):
        network.freeze("c2")
    network, _ = networks(18, "BN", randomised)
    network.bn1 = nn.BatchNorm2d(64, affine=False).double()
    expected = network.eval()(torch.ones(1, 3, 33, 33).double())["c2"]
    network.freeze("stem")
    assert network.config.frozen_through == "stem"
    assert distance(network(torch.ones(1, 3, 33, 33).double())["c2"], expected) < 1e-9


def test_a_traced_module_is_the_network_and_another_dtype_is_refused_as_torch_does(randomised):
    images = torch.randn(1, 3, 65, 49).double()
    network, _ = networks(18, "FrozenBN", randomised)
    traced = torch.jit.trace(network, images, strict=False)
    assert all(distance(traced(images)[level], x) < 1e-9 for level, x in network(images).items())
    with pytest.raises(RuntimeError, match="type"):
        network(images.float())


def test_a_replaced_stage_recomputes_nothing_and_trains(randomised):
    images = torch.randn(2, 3, 65, 49).double()
    network, _ = networks(18, "FrozenBN", randomised)
    expected = measured(network, images)
    network.zero_grad()
    network.checkpoint_activations = True
    network.layer4 = nn.Sequential(*network.layer4)
    assert all(distance(x, expected[name]) < 1e-9 for name, x in measured(network.train(), images).items())

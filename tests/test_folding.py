"""A frozen norm folded into its convolution: the same numbers and gradients, less kept for backward, never stale."""

import copy
import pickle
from functools import partial

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from resbackbone import BackboneConfig, ResNetBackbone, build_resnet_backbone, folding, winograd
from resbackbone.compat import onednn_convolutions, watched
from resbackbone.folding import FrozenBatchNorm2d, conv_norm, conv_norm_relu
from resbackbone.layers import Projection, checkpointed, fuse
from resbackbone.resnet import BasicBlock, Bottleneck, Layout


class Unfolded(nn.Module):
    """A frozen norm as a layer of its own: as torchvision has it, or with the constants cast as detectron2 does."""

    def __init__(self, norm: FrozenBatchNorm2d, cast: bool = True):
        super().__init__()
        self.norm, self.cast = norm, cast

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = (t.view(1, -1, 1, 1) for t in self.norm.scale_and_shift())
        return x * scale.to(x.dtype) + shift.to(x.dtype) if self.cast else x * scale + shift


def resnet(depth: int, **settings) -> ResNetBackbone:
    return ResNetBackbone(BackboneConfig(depth=depth, **settings))


def unfolded(network: nn.Module, cast: bool = True) -> nn.Module:
    """A copy whose frozen norms are layers of their own."""
    network = copy.deepcopy(network)
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, FrozenBatchNorm2d):
                setattr(parent, name, Unfolded(child, cast))
    return network


def gradients(network: nn.Module, images: Tensor, **autocast) -> dict[str, Tensor]:
    """Of every parameter and of the images, for a loss that weighs each output value differently."""
    images = images.detach().clone().requires_grad_()
    with torch.autocast("cpu", **autocast) if autocast else torch.enable_grad():
        maps = network(images)
    generator = torch.Generator().manual_seed(1)
    maps = list(maps.values()) if isinstance(maps, dict) else [maps]
    sum((x.float() * torch.randn(x.shape, generator=generator)).mean() for x in maps).backward()
    found = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return {name.replace("norm.", ""): grad for name, grad in found.items()} | {"images": images.grad}


def relative_error(x: Tensor, expected: Tensor) -> float:
    return ((x - expected).norm() / expected.norm()).item()


def saved_bytes(network: nn.Module, images: Tensor, autocast: bool = False) -> int:
    """What a forward pass keeps for backward, each piece of memory once and parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept = {}

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = network(images)
    assert outputs is not None  # alive until here, so that no memory is counted twice
    return sum(kept.values())


@pytest.mark.parametrize(
    "depth, options",
    [
        (18, {}),
        (18, {"shortcut": "A", "dilate_c5": True}),
        (50, {"dilate_c5": True, "stride_in_1x1": True}),
        (50, {"levels": ["c3"], "groups": 32, "width_per_group": 4}),
    ],
    ids=["18", "18, A, dilated", "50, dilated", "ResNeXt"],
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "last"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
def test_the_gradients_are_those_of_norms_that_are_layers(depth, options, memory_format, dtype, tolerance, randomised):
    folded = randomised(resnet(depth, norm="FrozenBN", **options)).train().to(dtype, memory_format=memory_format)
    if dtype == torch.float32:
        # A value within rounding of 0 would fall on either side of its ReLU, and gradients differ by what it passes.
        for norm in folded.modules():
            if isinstance(norm, FrozenBatchNorm2d):
                norm.weight.mul_(0.01)
                norm.bias.fill_(3)
    images = torch.randn(2, 3, 65, 49, dtype=dtype).to(memory_format=memory_format)
    assert_equal_gradients(gradients(folded, images), gradients(unfolded(folded), images), tolerance)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    "block", [partial(BasicBlock, 16, 16), partial(Bottleneck, 16, 4)], ids=["basic", "bottleneck"]
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "last"])
def test_a_block_whose_relus_cut_has_those_gradients_too(block, stride, memory_format, randomised):
    folded = randomised(block(Layout(FrozenBatchNorm2d), stride=stride)).to(memory_format=memory_format)
    images = torch.randn(2, 16, 7, 5).to(memory_format=memory_format)
    assert_equal_gradients(gradients(folded, images), gradients(unfolded(folded), images), 1e-5)


def assert_equal_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        assert grad.dtype == expected[name].dtype
        assert relative_error(grad, expected[name]) < tolerance, name


def test_in_bfloat16_outputs_and_gradients_are_no_further_from_the_truth_than_the_peers(randomised):
    network = randomised(resnet(50, norm="FrozenBN", levels=["c3"]))
    images = torch.randn(2, 3, 97, 65)
    truth_of = copy.deepcopy(network).double()
    with torch.no_grad():
        truth_map = unfolded(truth_of)(images.double())["c3"]
    truth = gradients(unfolded(truth_of), images.double())

    def errors(candidate: nn.Module) -> tuple[float, float]:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            output = relative_error(candidate(images)["c3"].double(), truth_map)
        found = gradients(candidate, images, dtype=torch.bfloat16)
        return output, sum(relative_error(found[name].double(), grad) for name, grad in truth.items()) / len(truth)

    ours = errors(network)
    for peer in (unfolded(network, cast=False), unfolded(network)):  # torchvision's way and detectron2's
        assert all(mine <= 1.02 * theirs for mine, theirs in zip(ours, errors(peer), strict=True))


@pytest.mark.parametrize(
    "trained, relu",
    [("x", False), ("weight", False), ("x weight", False)]
    + [(names, True) for names in ("x", "weight", "shortcut", "x weight", "x weight shortcut")],
)
def test_every_choice_of_what_trains_has_exact_first_and_second_derivatives(trained, relu, randomised):
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2, bias=False).double()
    norm = randomised(FrozenBatchNorm2d(6)).double()
    x, shortcut = torch.randn(2, 4, 5, 7).double(), torch.randn(2, 6, 3, 4).double()
    leaves = {"x": x, "weight": conv.weight.detach(), "shortcut": shortcut}
    leaves = [leaf.requires_grad_(name in trained.split()) for name, leaf in leaves.items()]

    def block(x: Tensor, weight: Tensor, shortcut: Tensor) -> Tensor:
        conv.weight = weight
        return conv_norm_relu(conv, norm, nn.ReLU(inplace=True) if relu else None, x, lambda: shortcut)

    del conv.weight  # the parameter; a plain attribute takes its place
    assert torch.autograd.gradcheck(block, leaves)
    assert torch.autograd.gradgradcheck(block, leaves)


def test_no_more_is_kept_for_backward_than_by_torchvision(randomised):
    images = torch.randn(1, 3, 97, 65)
    peer = torchvision.models.resnet50(norm_layer=torchvision.ops.FrozenBatchNorm2d)
    peer.avgpool = peer.fc = nn.Identity()
    peer.conv1.requires_grad_(False)
    peer.layer1.requires_grad_(False)
    peer_weights = torchvision.models.resnet50().state_dict()
    ours = build_resnet_backbone(50, weights=peer_weights)  # frozen through c2
    assert 0 < saved_bytes(ours, images) <= saved_bytes(peer, images)
    for separate in (unfolded(ours), unfolded(ours, cast=False)):
        assert saved_bytes(ours, images, autocast=True) < saved_bytes(separate, images, autocast=True)
    # Half the bytes in half the precision; what is not halved are scales.
    assert saved_bytes(ours, images, autocast=True) < 0.55 * saved_bytes(ours, images)


def test_of_frozen_layers_no_activation_is_kept(randomised):
    block = randomised(Bottleneck(8, 2, Layout(FrozenBatchNorm2d))).requires_grad_(False)
    x = torch.randn(2, 8, 9, 7)
    assert saved_bytes(block, x) == 0
    projection = randomised(Projection(8, 16, 2, FrozenBatchNorm2d)).requires_grad_(False)
    assert saved_bytes(projection, x.requires_grad_()) == 16 * 4  # its scale
    assert projection(x).sum().backward() is None and x.grad.abs().sum() > 0


def pair() -> tuple[nn.Conv2d, FrozenBatchNorm2d, Tensor]:
    """A convolution and its norm that have been used, and an input."""
    conv, norm = nn.Conv2d(4, 6, 3, padding=1, bias=False), FrozenBatchNorm2d(6)
    conv.weight = nn.Parameter(conv.weight.data)  # a tensor never written to
    norm.running_var.uniform_(0.5, 1.5)
    x = torch.randn(1, 4, 8, 12)
    with torch.no_grad():
        conv_norm(conv, norm, x)
    return conv, norm, x


def replaced(conv: nn.Conv2d, norm: FrozenBatchNorm2d) -> None:
    conv.weight = nn.Parameter(conv.weight.detach() * 2)


def replaced_by_one_in_the_same_memory(conv: nn.Conv2d, norm: FrozenBatchNorm2d) -> None:
    before = conv.weight
    conv.weight = nn.Parameter(before.data)
    with torch.no_grad():
        before[2, 2, 1, 1] += 1  # counted as a write to that tensor alone


def points_elsewhere(conv: nn.Conv2d, norm: FrozenBatchNorm2d) -> None:
    changed = conv.weight.data.clone()
    changed[2, 2, 1, 1] += 1
    conv.weight.data = changed


def points_elsewhere_twice(conv: nn.Conv2d, norm: FrozenBatchNorm2d) -> None:
    for _ in range(2):  # the second time the first memory may be free, and be taken again
        points_elsewhere(conv, norm)


def written_in_place(conv: nn.Conv2d, norm: FrozenBatchNorm2d) -> None:
    with torch.no_grad():
        conv.weight[2, 2, 1, 1] += 1  # no value that is compared


def averaged_through_data(conv: nn.Conv2d, norm: FrozenBatchNorm2d) -> None:
    conv.weight.data.mul_(0.999).add_(torch.randn_like(conv.weight), alpha=0.001)


def a_filter_pruned_through_data(conv: nn.Conv2d, norm: FrozenBatchNorm2d) -> None:
    conv.weight.data[3] = 0


def a_channel_pruned_through_data(conv: nn.Conv2d, norm: FrozenBatchNorm2d) -> None:
    conv.weight.data[:, 2] = 0


def one_value_written_through_data(conv: nn.Conv2d, norm: FrozenBatchNorm2d) -> None:
    conv.weight.data[2, 2, 1, 1] += 1


def loaded_in_place(conv: nn.Conv2d, norm: FrozenBatchNorm2d) -> None:
    conv.load_state_dict({"weight": torch.ones_like(conv.weight)})


def loaded_by_assignment(conv: nn.Conv2d, norm: FrozenBatchNorm2d) -> None:
    conv.load_state_dict({"weight": torch.ones_like(conv.weight)}, assign=True)


def cast_and_back(conv: nn.Conv2d, norm: FrozenBatchNorm2d) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        nn.Sequential(conv, norm).to(dtype)


def another_eps(conv: nn.Conv2d, norm: FrozenBatchNorm2d) -> None:
    norm.eps = 0.5


def norm_written(conv: nn.Conv2d, norm: FrozenBatchNorm2d) -> None:
    norm.running_mean.add_(1)


def norm_written_through_data(conv: nn.Conv2d, norm: FrozenBatchNorm2d) -> None:
    norm.weight.data.fill_(3)


def norm_loaded(conv: nn.Conv2d, norm: FrozenBatchNorm2d) -> None:
    norm.load_state_dict(nn.BatchNorm2d(6).state_dict(), assign=True)


def norm_buffer_replaced(conv: nn.Conv2d, norm: FrozenBatchNorm2d) -> None:
    norm.bias = norm.bias + 1


def stepped(conv: nn.Conv2d, norm: FrozenBatchNorm2d) -> None:
    optimizer = torch.optim.SGD(conv.parameters(), lr=0.1)
    conv_norm(conv, norm, torch.randn(1, 4, 5, 7)).sum().backward()
    optimizer.step()


def stepped_without_a_trace(conv: nn.Conv2d, norm: FrozenBatchNorm2d) -> None:
    conv_norm(conv, norm, torch.randn(1, 4, 5, 7)).sum().backward()
    conv.weight.data[2, 2, 1, 1] -= 1


def rearranged(conv: nn.Conv2d, norm: FrozenBatchNorm2d) -> None:
    # The same address, version, dtype and samples, but read in another order.
    conv.weight.data = conv.weight.data.as_strided(conv.weight.shape, (36, 9, 1, 3))


CHANGES = [
    replaced,
    replaced_by_one_in_the_same_memory,
    points_elsewhere,
    points_elsewhere_twice,
    written_in_place,
    averaged_through_data,
    a_filter_pruned_through_data,
    a_channel_pruned_through_data,
    one_value_written_through_data,
    loaded_in_place,
    loaded_by_assignment,
    cast_and_back,
    another_eps,
    norm_written,
    norm_written_through_data,
    norm_loaded,
    norm_buffer_replaced,
    rearranged,
]
STEPS = [stepped, stepped_without_a_trace]


@pytest.mark.parametrize(
    "change, frozen", [(change, frozen) for frozen in (False, True) for change in CHANGES] + [(s, False) for s in STEPS]
)
def test_whichever_way_the_weights_change_the_next_call_computes_with_the_new_ones(change, frozen):
    conv, norm, x = pair()
    conv.requires_grad_(not frozen)
    with torch.no_grad():
        before = conv_norm(conv, norm, x)
    change(conv, norm)
    with torch.no_grad():
        after, expected = conv_norm(conv, norm, x), norm(conv(x))
    assert relative_error(before, expected) > 1e-6  # it did change something
    assert relative_error(after, expected) < 1e-6


def written_through_numpy(conv: nn.Conv2d, norm: nn.Module) -> None:
    conv.weight.numpy()[2, 2, 1, 1] += 1


def written_through_numpy_between_calls(conv: nn.Conv2d, norm: nn.Module) -> None:
    array = conv.weight.numpy()
    with torch.no_grad():
        conv_norm(conv, norm, torch.randn(1, 4, 5, 7))
    array[2, 2, 1, 1] += 1


def written_through_its_storage(conv: nn.Conv2d, norm: nn.Module) -> None:
    conv.weight.untyped_storage().copy_(torch.randn_like(conv.weight).untyped_storage())


def written_in_inference_mode(conv: nn.Conv2d, norm: nn.Module) -> None:
    with torch.inference_mode():
        conv.weight[2, 2, 1, 1] += 1


def written_in_a_view(conv: nn.Conv2d, norm: nn.Module) -> None:
    conv.weight.detach()[3].zero_()


def trained(conv: nn.Conv2d, norm: nn.Module) -> None:
    conv.requires_grad_()
    stepped(conv, norm)
    conv.requires_grad_(False)


def swapped_for_another(conv: nn.Conv2d, norm: nn.Module) -> None:
    conv.weight = nn.Parameter(watched(torch.randn_like(conv.weight)), requires_grad=False)  # marked in the same way


TO_FUSED = [change for change in CHANGES if change.__name__ not in ("loaded_in_place", "loaded_by_assignment")]
TO_FUSED = [change for change in TO_FUSED if "norm" not in change.__name__ and change is not another_eps]
WRITES = [
    written_through_numpy,
    written_through_numpy_between_calls,
    written_through_its_storage,
    written_in_inference_mode,
    written_in_a_view,
    trained,
    swapped_for_another,
]


@pytest.fixture(params=["oneDNN", "Winograd"])
def algorithm(request, monkeypatch) -> str:
    """Which algorithm the kept weights are for."""
    if request.param == "Winograd":
        monkeypatch.setattr(winograd, "FEWEST_CHANNELS", 1)
        monkeypatch.setattr(winograd, "FEWEST_TILES", 1)
    return request.param


def fused_pair(algorithm: str) -> tuple[nn.Conv2d, nn.Module, Tensor]:
    """The same pair, fused and used: its weights are kept as the algorithm wants them."""
    conv, norm, x = pair()
    conv, norm = fuse(nn.Sequential(conv, norm))
    with torch.no_grad():
        conv_norm(conv, norm, x)
    assert_kept(conv, algorithm)
    return conv, norm, x


def assert_kept(conv: nn.Conv2d, algorithm: str) -> None:
    layouts = list(conv.kept_weights.layouts)
    if algorithm == "Winograd":
        assert layouts == ["winograd"]
    else:
        assert len(layouts) == (onednn_convolutions(torch.float32) is not None) and layouts != ["winograd"]


@pytest.mark.parametrize("change", TO_FUSED + WRITES)
def test_whichever_way_fused_weights_change_the_next_call_computes_with_the_new_ones(change, algorithm):
    conv, norm, x = fused_pair(algorithm)
    with torch.no_grad():
        before = conv_norm(conv, norm, x)
    change(conv, norm)
    with torch.no_grad():
        after, expected = conv_norm(conv, norm, x), conv(x)
        assert relative_error(before, expected) > (0 if change is cast_and_back else 1e-6)
        assert relative_error(after, expected) < 1e-6
        conv, norm = fuse(nn.Sequential(conv, norm))  # keeps them again
        assert relative_error(conv_norm(conv, norm, x), expected) < 1e-6
    assert_kept(conv, algorithm)


def test_fused_weights_are_kept_while_they_are_only_read(algorithm):
    conv, norm, x = fused_pair(algorithm)
    kept = dict(conv.kept_weights.layouts)
    conv.state_dict(), [p.norm() for p in conv.parameters()], copy.deepcopy(conv), conv.to(torch.float32), conv(x)
    with torch.no_grad():
        larger = torch.randn(3, 4, 32, 9)
        assert relative_error(conv_norm(conv, norm, larger), conv(larger)) < 1e-6
        assert all(conv.kept_weights.layouts[name] is weights for name, weights in kept.items())
        with torch.autocast("cpu", torch.bfloat16):
            assert relative_error(conv_norm(conv, norm, x).float(), conv(x).float()) < 0.02
        conv.stride = (2, 1)
        assert relative_error(conv_norm(conv, norm, x), conv(x)) < 1e-6
    assert len(conv.kept_weights.layouts) <= 2


def test_copies_and_pickles_of_fused_layers_keep_nothing_and_share_nothing(algorithm):
    conv, norm, x = fused_pair(algorithm)
    layers = nn.Sequential(conv, norm)
    with torch.no_grad():
        expected = conv(x)
        for copied in (copy.deepcopy(layers), pickle.loads(pickle.dumps(layers))):  # noqa: S301
            assert not copied[0].kept_weights.layouts and list(copied.state_dict()) == ["0.weight", "0.bias"]
            copied[0].weight.mul_(2)
            assert relative_error(conv_norm(conv, norm, x), expected) < 1e-6
            assert relative_error(conv_norm(*copied, x), copied[0](x)) < 1e-6


def test_without_copy_on_write_nothing_is_kept(monkeypatch, algorithm):
    monkeypatch.delattr(torch, "_lazy_clone")
    conv, norm, x = pair()
    conv, norm = fuse(nn.Sequential(conv, norm))
    with torch.no_grad():
        assert relative_error(conv_norm(conv, norm, x), conv(x)) < 1e-6
    assert not conv.kept_weights.layouts


def test_fusing_a_norm_into_a_convolution_that_was_fused_before_leaves_that_one():
    block, x = fuse(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())), torch.randn(1, 4, 8, 12)
    norm = FrozenBatchNorm2d(4)
    norm.running_var.uniform_(0.5, 0.9)
    with torch.no_grad():
        expected = block(x)
        fuse(nn.Sequential(block[0], norm))
        assert torch.equal(block(x), expected)


def test_fusing_leaves_a_convolution_without_a_norm_to_whoever_shares_it():
    shared = nn.Conv2d(4, 4, 3, padding=1)
    pointer, x = shared.weight.detach().numpy(), torch.randn(1, 4, 8, 12)
    block = fuse(nn.Sequential(shared))
    with torch.no_grad():
        expected = shared(x)
        assert relative_error(folding.conv_block(block, x), expected) < 1e-6
        pointer[:] = 0  # by a pointer from before, which nothing could notice
        assert relative_error(folding.conv_block(block, x), expected) < 1e-6 and not shared.weight.any()
        block[0].weight.mul_(2)
        assert relative_error(folding.conv_block(block, x), block[0](x)) < 1e-6


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("autocast", [False, True])
def test_sums_written_over_what_nobody_holds_are_the_same(depth, fused, autocast, randomised, monkeypatch):
    network = randomised(resnet(depth, norm="FrozenBN", fpn=True, fpn_norm="FrozenBN"))
    network = network.fuse() if fused else network
    images = torch.randn(2, 3, 65, 49)
    kept, maps = images.clone(), {}
    for limit in (2**60, 0):
        monkeypatch.setattr(folding, "WORTH_LOOKING", limit)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            trunk = network.with_levels(["c2", "c5"])(images)
            maps[limit] = [*trunk.values(), *network(images).values()]
    assert torch.equal(images, kept)
    tolerance = 0.01 if autocast else 1e-6
    assert all(relative_error(x.float(), y.float()) < tolerance for x, y in zip(*maps.values(), strict=True))


def keep_outputs(block: nn.Module, keep, monkeypatch) -> None:
    block.register_forward_hook(lambda module, inputs, output: keep(output))


def keep_one_output(block: nn.Module, keep, monkeypatch) -> None:
    hook = block.register_forward_hook(lambda module, inputs, output: (keep(output), hook.remove())[0])


def keep_inputs(block: nn.Module, keep, monkeypatch) -> None:
    block.register_forward_pre_hook(lambda module, inputs: keep(inputs[0]))


def keep_inputs_of_a_layer(block: nn.Module, keep, monkeypatch) -> None:
    block.conv1.register_forward_pre_hook(lambda module, inputs: keep(inputs[0]))


def keep_outputs_of_relus(block: nn.Module, keep, monkeypatch) -> None:
    seen = []  # the last ReLU's input is changed in place, by all packages
    block.relu.register_forward_hook(
        lambda module, inputs, output: seen.append(1) or (keep(output) if len(seen) == 3 else None)
    )


def keep_in_a_patched_forward(block: nn.Module, keep, monkeypatch) -> None:
    forward = type(block).forward
    monkeypatch.setattr(type(block), "forward", lambda self, x, **given: (keep(x), forward(self, x, **given))[1])


def keep_in_a_layer(block: nn.Module, keep, monkeypatch) -> None:
    class Keeps(nn.Conv2d):
        def forward(self, x):
            keep(x)
            return super().forward(x)

    block.conv1.__class__ = Keeps


def keep_shortcuts(block: nn.Module, keep, monkeypatch) -> None:
    if block.downsample is not None:
        block.downsample.register_forward_hook(lambda module, inputs, output: keep(output))
    else:
        keep_outputs(block, keep, monkeypatch)


@pytest.mark.parametrize(
    "how",
    [
        keep_outputs,
        keep_one_output,
        keep_inputs,
        keep_inputs_of_a_layer,
        keep_outputs_of_relus,
        keep_in_a_patched_forward,
        keep_in_a_layer,
        keep_shortcuts,
    ],
)
@pytest.mark.parametrize("fused", [False, True])
def test_what_somebody_keeps_is_not_written_over(how, fused, randomised, monkeypatch):
    monkeypatch.setattr(folding, "WORTH_LOOKING", 0)
    network = randomised(resnet(50, norm="FrozenBN", levels=["c3"]))
    network = network.fuse() if fused else network
    images, kept = torch.randn(1, 3, 65, 49), []
    for block in (network.layer1[0], network.layer1[1], network.layer2[1]):
        how(block, lambda x: kept.append((x, x.clone())) and None, monkeypatch)
    with torch.no_grad():
        x = network.maxpool(network.stem(images))
        for block in (*network.layer1, *network.layer2):  # called one by one, they get tensors of the caller's
            kept.append((x, x.clone()))
            x = block(x)
        network(images)
    assert len(kept) > 9
    for x, then in kept:
        assert torch.equal(x, then)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("onednn", [False, True])
def test_without_gradients_a_block_computes_the_same_with_and_without_onednn(dtype, fused, onednn, randomised):
    block = randomised(BasicBlock(4, 8, Layout(FrozenBatchNorm2d), stride=2))
    x = torch.randn(2, 4, 17, 15)
    expected = unfolded(block)(x).detach()
    block = (fuse(block) if fused else block).to(dtype)
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=onednn):
        with torch.autograd.profiler.profile() as profile:
            y = block(x.to(dtype))
        assert block(x[:0].to(dtype)).shape == (0, 8, 9, 8)
    if dtype == torch.float32:  # in bfloat16 it depends on the processor
        assert any("pointwise" in event.name for event in profile.function_events) == onednn
    assert y.dtype == dtype
    assert relative_error(y.float(), expected) < (0.02 if dtype == torch.bfloat16 else 1e-5)


def test_a_fused_block_passes_gradients_to_its_input(randomised):
    block = randomised(BasicBlock(4, 4, Layout(FrozenBatchNorm2d)))
    x = torch.randn(2, 4, 7, 5)
    expected = gradients(unfolded(block).requires_grad_(False), x)["images"]
    assert relative_error(gradients(fuse(block), x)["images"], expected) < 1e-5


def test_the_shortcut_of_an_autocast_block_may_have_another_precision(randomised):
    block = randomised(Bottleneck(16, 4, Layout(FrozenBatchNorm2d)))
    x = torch.randn(2, 16, 5, 7)
    expected = gradients(unfolded(block), x)
    found = gradients(block, x, dtype=torch.bfloat16)
    assert all(relative_error(found[name], grad) < 0.05 for name, grad in expected.items())
    assert all(grad.dtype == torch.float32 for grad in found.values())


def test_a_block_checkpoints_and_compiles_to_the_same_gradients(randomised):
    block = randomised(Bottleneck(16, 4, Layout(FrozenBatchNorm2d)))
    x = torch.randn(2, 16, 5, 7)
    expected = gradients(block, x)
    for call in (
        lambda images: checkpointed(block, images),
        torch.compile(block, backend="aot_eager", fullgraph=True),
    ):
        block.zero_grad()
        images = x.clone().requires_grad_()
        generator = torch.Generator().manual_seed(1)
        y = call(images)
        (y * torch.randn(y.shape, generator=generator)).mean().backward()
        found = {name: p.grad for name, p in block.named_parameters()} | {"images": images.grad}
        assert all(relative_error(found[name], grad) < 1e-5 for name, grad in expected.items())


def test_transforms_and_counters_see_ordinary_operations(randomised):
    block = randomised(BasicBlock(4, 4, Layout(FrozenBatchNorm2d)))
    x = torch.randn(3, 4, 7, 5)
    with torch.no_grad():
        expected = block(x)
        with FlopCounterMode(display=False) as counter:
            block(x)
        assert counter.get_total_flops() == 2 * 2 * 3 * 7 * 5 * 4 * 4 * 9
        gradient = torch.func.grad(lambda images: block(images).sum())(x)
        assert relative_error(gradient, torch.func.vjp(unfolded(block), x)[1](torch.ones_like(x))[0]) < 1e-5
        mapped = torch.func.vmap(lambda image: block(image[None])[0])(x)
        assert relative_error(mapped, expected) < 1e-6
        assert relative_error(torch.jit.trace(block, x)(x), expected) < 1e-6
        _, tangent = torch.func.jvp(block, (x,), (torch.ones_like(x),))
        assert tangent.abs().sum() > 0
        with torch.autograd.forward_ad.dual_level():
            dual = block(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
            assert relative_error(torch.autograd.forward_ad.unpack_dual(dual).tangent, tangent) < 1e-6

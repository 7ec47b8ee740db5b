"""The same ResNet, with the same weights, of every package: backbones that detect, and classifiers that are pretrained.

Every norm of a backbone is frozen, as are its stem and c2; its maps are c2..c5. All get one input, normalized RGB.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.contest import MODES, OWN, Contender, Mode
from resbackbone import build_resnet_backbone, build_resnet_classifier
from resbackbone.resnet import STAGES
from resbackbone.weights.translate import from_ours

COMPILED, GRAPH, FUSED = "compiled", "CUDA graph", "fused"  # how a contender is run, after its name and a comma
DETECTRON2_STAGES = {"res2": "c2", "res3": "c3", "res4": "c4", "res5": "c5"}


@dataclass(frozen=True)
class Setting:
    """What a network job is run with. Height and width in pixels."""

    mode: str
    device: str
    depth: int
    height: int
    width: int
    batch_size: int

    @property
    def settings(self) -> Mode:
        return MODES[self.mode]

    def place(self, module: nn.Module) -> nn.Module:
        return module.to(device=self.device, memory_format=self.settings.layout)

    def autocast(self) -> torch.autocast:
        return self.settings.autocast(self.device)


def make_lively(model: nn.Module) -> nn.Module:
    """Numbers in every norm, such that one left out shows and activations stay finite without training."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(getattr(module, "running_var", None), Tensor):
                module.weight.uniform_(0.2, 0.6)
                module.bias.normal_(0, 0.1)
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
    return model


@lru_cache(maxsize=1)
def backbone_weights(depth: int) -> dict[str, Tensor]:
    """A state dict under our names, the same in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make_lively(build_resnet_backbone(depth)).state_dict()


class Maps(nn.Module):
    """Another package's backbone that gives its maps as ours do, {"c2": map, ..}."""

    def __init__(self, body: nn.Module, name: Callable[[object], dict[str, Tensor]]):
        super().__init__()
        self.body, self.name = body, name

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.name(self.body(images))


def ours(depth: int, state: Mapping[str, Tensor]) -> nn.Module:
    return build_resnet_backbone(depth, weights=dict(state))  # FrozenBN, frozen through c2


def torchvisions(depth: int, state: Mapping[str, Tensor]) -> nn.Module:
    """As its own detectors make it."""
    import torchvision
    from torchvision.models._utils import IntermediateLayerGetter
    from torchvision.ops import FrozenBatchNorm2d

    network = getattr(torchvision.models, f"resnet{depth}")(weights=None, norm_layer=FrozenBatchNorm2d)
    body = IntermediateLayerGetter(network, {stage: level for level, stage in STAGES.items()})
    body.load_state_dict(from_ours(state, "torchvision"))
    return freeze_through_c2(body)


def timms(depth: int, state: Mapping[str, Tensor]) -> nn.Module:
    import timm
    from timm.layers import freeze_batch_norm_2d

    body = timm.create_model(f"resnet{depth}", features_only=True, out_indices=(1, 2, 3, 4))
    body.load_state_dict(from_ours(state, "timm"))
    frozen = freeze_through_c2(freeze_batch_norm_2d(body))
    return Maps(frozen, lambda maps: dict(zip(STAGES, maps, strict=True)))


def detectron2_config(depth: int, settings: Mapping[str, object]):
    """detectron2's own defaults, torchvision's ResNet (stride in the 3x3, frozen through c2), and these settings."""
    from detectron2.config import get_cfg

    settings = {
        "MODEL.BACKBONE.FREEZE_AT": 2,
        "MODEL.RESNETS.DEPTH": depth,
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 64 if depth < 50 else 256,
        "MODEL.RESNETS.OUT_FEATURES": list(DETECTRON2_STAGES),
        **settings,
    }
    config = get_cfg()
    config.merge_from_list([part for item in settings.items() for part in item])
    return config


def detectron2s(depth: int, state: Mapping[str, Tensor]) -> nn.Module:
    """The weights are those for our input, so it takes that."""
    from detectron2.modeling import build_backbone

    body = build_backbone(detectron2_config(depth, {"MODEL.BACKBONE.NAME": "build_resnet_backbone"}))
    body.load_state_dict(from_ours(state, "detectron2"))
    return Maps(body, lambda maps: {DETECTRON2_STAGES[name]: x for name, x in maps.items()})


BACKBONES = {OWN: ours, "torchvision": torchvisions, "timm": timms, "detectron2": detectron2s}


def freeze_through_c2(body: nn.Module) -> nn.Module:
    for name, parameter in body.named_parameters():
        if name.startswith(("conv1.", "bn1.", "layer1.")):
            parameter.requires_grad_(False)
    return body


def backbone(setting: Setting, training: bool, name: str) -> Contender:
    """The contender `name`, such as "timm" or "resbackbone, fused", for inference or a training step."""
    package, _, way = name.partition(", ")
    network = setting.place(BACKBONES[package](setting.depth, backbone_weights(setting.depth)))
    network.train(training)
    if way == FUSED:
        network.fuse()
    called = torch.compile(network) if way == COMPILED else network
    contender = training_step(called, network, setting) if training else inference(called, setting)
    if way == GRAPH:
        contender = as_graph(contender)
    return contender._replace(module=network, counted=way in ("", FUSED))


def images(setting: Setting) -> Tensor:
    """[batch_size, 3, height, width], normalized noise, the same in every process."""
    pixels = torch.randn(
        setting.batch_size, 3, setting.height, setting.width, generator=torch.Generator().manual_seed(1)
    )
    return pixels.to(setting.device).contiguous(memory_format=setting.settings.layout)


def inference(network: Callable[[Tensor], dict[str, Tensor]], setting: Setting) -> Contender:
    pixels = images(setting)

    @torch.inference_mode()
    def run() -> dict[str, Tensor]:
        with setting.autocast():
            return network(pixels)

    return Contender(run)


def training_step(
    network: Callable[[Tensor], dict[str, Tensor]], module: nn.Module, setting: Setting, prefix: str = ""
) -> Contender:
    """Forward, and backward from given gradients of c3..c5, which stand for a detector's; no optimizer.

    What has to agree is the maps and the gradient of c3's first convolution, which comes through all that trains.
    """
    pixels, gradients = images(setting), {}
    parameters = list(module.parameters())
    first = first_trained(module)

    def run() -> dict[str, Tensor]:
        for parameter in parameters:
            parameter.grad = None
        with setting.autocast():
            maps = network(pixels)
        trained = {level: x for level, x in maps.items() if x.requires_grad}
        if not gradients:
            generator = torch.Generator().manual_seed(2)
            for level, x in trained.items():
                # Positive, so that they add up: in sums of noise a ReLU that rounding turns off would stand out.
                given = torch.rand(x.shape, generator=generator).to(x.device, x.dtype)
                gradients[level] = given.contiguous(memory_format=setting.settings.layout)
        torch.autograd.backward(list(trained.values()), [gradients[level] for level in trained])
        return {**{level: x.detach() for level, x in maps.items()}, "gradient": first.grad}

    return Contender(run)


def first_trained(module: nn.Module) -> Tensor:
    """c3's first convolution, whatever the package calls it."""
    ends = ("layer2.0.conv1.weight", "res3.0.conv1.weight")
    return next(parameter for name, parameter in module.named_parameters() if name.endswith(ends))


def as_graph(contender: Contender) -> Contender:
    """The run as one CUDA graph: recorded once, then only replayed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # libraries choose their algorithms and make their workspaces before the recording
            contender.run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        returned = contender.run()

    def run() -> dict[str, Tensor]:
        graph.replay()
        return returned

    return contender._replace(run=run)


def classifier(setting: Setting, name: str) -> Contender:
    """A whole step of ImageNet training, norms training too: forward, cross-entropy, backward, SGD; random images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        own = build_resnet_classifier(setting.depth)
    if name == OWN:
        network = own
    elif name == "torchvision":
        import torchvision

        network = getattr(torchvision.models, f"resnet{setting.depth}")(weights=None)
        network.load_state_dict(from_ours(own.state_dict(), "torchvision"))
    else:
        import timm

        network = timm.create_model(f"resnet{setting.depth}")
        network.load_state_dict(from_ours(own.state_dict(), "timm"))
    network = setting.place(network).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
    pixels = images(setting)
    labels = torch.randint(0, 1000, (setting.batch_size,), generator=torch.Generator().manual_seed(3))
    labels = labels.to(setting.device)

    def run() -> dict[str, Tensor]:
        optimizer.zero_grad(set_to_none=True)
        with setting.autocast():
            loss = F.cross_entropy(network(pixels), labels)
        loss.backward()
        optimizer.step()
        return {"loss": loss.detach()}

    return Contender(run, network)


def imagenet(setting: Setting) -> Setting:
    """The same setting on ImageNet's crops."""
    return replace(setting, height=224, width=224)

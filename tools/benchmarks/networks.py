"""Every package's ResNet with the same weights and input: backbones of detectors, and classifiers to pretrain.

A backbone returns c2..c5, or with a pyramid p2..p6; its norms, its stem and c2 are frozen. The input is normalized RGB.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from resbackbone import build_resnet_backbone, build_resnet_classifier
from resbackbone.tools.benchmarks.contest import FUSED, OWN, Contender, Workload, package_of
from resbackbone.tools.benchmarks.runtimes import RUNTIMES, exported, runner
from resbackbone.weights.translate import from_ours


def randomize_norms(model: nn.Module) -> nn.Module:
    """Fill every norm with numbers that show if it is left out, and that keep activations finite without training."""
    with torch.no_grad():
        module: Any
        for module in model.modules():
            if isinstance(getattr(module, "running_var", None), Tensor):
                module.weight.uniform_(0.2, 0.6)
                module.bias.normal_(0, 0.1)
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
    return model


@lru_cache(maxsize=2)
def backbone_weights(depth: int, fpn: bool = False) -> dict[str, Tensor]:
    """A state dict under our names, the same in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return randomize_norms(build_resnet_backbone(depth, fpn=fpn)).state_dict()


class NamedMaps(nn.Module):
    """Another package's backbone that returns its maps under our names."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.body(images)
        found = list(maps.values() if isinstance(maps, dict) else maps)
        return {f"{'p' if len(found) == 5 else 'c'}{2 + i}": x for i, x in enumerate(found)}


def build_own(depth: int, state: Mapping[str, Tensor]) -> nn.Module:
    return build_resnet_backbone(depth, fpn=has_pyramid(state), weights=dict(state))  # FrozenBN, frozen through c2


def has_pyramid(state: Mapping[str, Tensor]) -> bool:
    return any(key.startswith("fpn.") for key in state)


def build_torchvision(depth: int, state: Mapping[str, Tensor]) -> nn.Module:
    """The trunk, or the whole, as torchvision's detectors build it: FrozenBN, frozen through c2."""
    whole = resnet_fpn_backbone(backbone_name=f"resnet{depth}", weights=None)
    body = whole if has_pyramid(state) else whole.body
    body.load_state_dict(from_ours(state, "torchvision"))
    return NamedMaps(body)


def build_timm(depth: int, state: Mapping[str, Tensor]) -> nn.Module:
    import timm
    from timm.layers import freeze_batch_norm_2d
    from timm.utils import freeze

    body = timm.create_model(f"resnet{depth}", features_only=True, out_indices=(1, 2, 3, 4))
    body.load_state_dict(from_ours(state, "timm"))
    body = freeze_batch_norm_2d(body)
    freeze(body, ["conv1", "layer1"], include_bn_running_stats=False)
    return NamedMaps(body)


def detectron2_config(depth: int, settings: str):
    """detectron2's defaults, torchvision's ResNet frozen through c2, and `settings` as its command line takes them."""
    from detectron2.config import get_cfg

    resnet = f"""
        MODEL.BACKBONE.FREEZE_AT 2   MODEL.RESNETS.DEPTH {depth}   MODEL.RESNETS.STRIDE_IN_1X1 False
        MODEL.RESNETS.RES2_OUT_CHANNELS {64 if depth in (18, 34) else 256}
        MODEL.RESNETS.OUT_FEATURES ['res2','res3','res4','res5']
    """
    config = get_cfg()
    config.merge_from_list((resnet + settings).split())
    return config


def build_detectron2(depth: int, state: Mapping[str, Tensor]) -> nn.Module:
    """Only the backbone of the network: the weights are made for our normalized input."""
    from detectron2.modeling import build_backbone

    kind = "build_resnet_fpn_backbone" if has_pyramid(state) else "build_resnet_backbone"
    settings = f"MODEL.BACKBONE.NAME {kind} MODEL.FPN.IN_FEATURES ['res2','res3','res4','res5']"
    body = build_backbone(detectron2_config(depth, settings))
    theirs = from_ours(state, "detectron2")
    body.load_state_dict({key.removeprefix("backbone."): tensor for key, tensor in theirs.items()})
    return NamedMaps(body)


BACKBONES = {OWN: build_own, "torchvision": build_torchvision, "timm": build_timm, "detectron2": build_detectron2}


def images(work: Workload) -> Tensor:
    """[batch_size, 3, height, width], normalized noise, the same in every process."""
    size = (work.batch_size, 3, work.height, work.width)
    return work.place(torch.randn(size, generator=torch.Generator().manual_seed(1)))


@lru_cache(maxsize=1)
def exported_backbone(depth: int, fpn: bool) -> bytes:
    backbone = build_own(depth, backbone_weights(depth, fpn))
    return exported(backbone.export)


def backbone(training: bool, work: Workload, name: str, *, fpn: bool = False) -> Contender:
    """The contender `name`, such as "timm" or "resbackbone, fused", for inference or a training step."""
    if name in RUNTIMES:
        return Contender(runner(name, exported_backbone(work.depth, fpn), images(work), work))
    network = work.place(BACKBONES[package_of(name)](work.depth, backbone_weights(work.depth, fpn))).train(training)
    if name == FUSED:
        network.fuse()
    called, counted = work.compiled(network)
    pixels = images(work)

    @torch.inference_mode()
    def inference() -> dict[str, Tensor]:
        with work.autocast():
            return called(pixels)

    run = training_step(called, network, pixels, bf16=work.bf16) if training else inference
    return Contender(run, counted, keeps_memory=name == FUSED and not work.on_gpu)


def training_step(
    network: Callable, module: nn.Module, pixels: Tensor, *, bf16: bool = False
) -> Callable[[], dict[str, Tensor]]:
    """Forward, and backward from given gradients of c3..c5, which stand for a detector's; no optimizer.

    `network` is `module`, possibly compiled. The outputs are the maps and the gradient of c3's first convolution, to
    which everything that trains contributes.
    """
    gradients: dict[str, Tensor] = {}
    parameters, first = list(module.parameters()), first_trained(module)

    def run() -> dict[str, Tensor]:
        for parameter in parameters:
            parameter.grad = None
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=bf16):
            maps = network(pixels)
        trained = {level: x for level, x in maps.items() if x.requires_grad}
        if not gradients:
            generator = torch.Generator().manual_seed(2)
            for level, x in trained.items():
                # Positive, so that they add up: in a sum of noise, one ReLU that rounding turns off would stand out.
                gradients[level] = torch.empty_like(x).copy_(torch.rand(x.shape, generator=generator))
        torch.autograd.backward(list(trained.values()), [gradients[level] for level in trained])
        return {**{level: x.detach() for level, x in maps.items()}, "gradient": first.grad}

    return run


def first_trained(module: nn.Module) -> Tensor:
    """c3's first convolution, whatever the package calls it."""
    ends = ("layer2.0.conv1.weight", "res3.0.conv1.weight")
    return next(parameter for name, parameter in module.named_parameters() if name.endswith(ends))


def classifier(work: Workload, name: str) -> Contender:
    """A whole step of ImageNet training on random images: forward, cross-entropy, backward, SGD. Norms train too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network: nn.Module = build_resnet_classifier(work.depth)
    if name != OWN:
        create, state = get_model, from_ours(network.state_dict(), name)
        if name == "timm":
            from timm import create_model as create
        network = create(f"resnet{work.depth}")
        network.load_state_dict(state)
    network = work.place(network).train()
    called, counted = work.compiled(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
    pixels = images(replace(work, height=224, width=224))
    labels = torch.randint(0, 1000, (work.batch_size,), generator=torch.Generator().manual_seed(3)).to(work.device)

    def run() -> dict[str, Tensor]:
        optimizer.zero_grad(set_to_none=True)
        with work.autocast():
            loss = F.cross_entropy(called(pixels), labels)
        loss.backward()
        optimizer.step()
        return {"loss": loss.detach()}

    return Contender(run, counted)

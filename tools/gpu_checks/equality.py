"""Compares computations on the device, in fp64, fp32 and bf16, with the same ones on the CPU in fp64."""

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from detection import build_faster_rcnn
from detection.cells import rows_of, sum_cells
from detection.faster_rcnn import FasterRCNN
from detection.roi_align import PyramidRoIAlign
from resbackbone import Feature, build_resnet_backbone
from resbackbone.engine.distributed import Rank
from resbackbone.engine.optimizers import build_optimizer
from resbackbone.engine.state import TrainState
from resbackbone.layers import FrozenBatchNorm2d, conv_norm_relu
from resbackbone.tools.benchmarks.contest import OWN, relative_difference, tf32
from resbackbone.tools.benchmarks.detectors import SHARPNESS, comparable, detector_weights, drawn, load
from resbackbone.tools.benchmarks.detectors import difference as detections_difference
from resbackbone.tools.benchmarks.networks import (
    BACKBONES,
    Workload,
    as_graph,
    backbone_weights,
    first_trained,
    images,
    training_step,
)
from resbackbone.tools.gpu_checks.record import Record, Setting

Outputs = Mapping[str, Tensor]
LIMITS = {torch.float64: 1e-9, torch.float32: 1e-4}  # of ||got - wanted|| / ||wanted||, fp32 without TF32
CLASSES = 80
DEPTH = 18
HEIGHT, WIDTH = 128, 192  # of the detector's images
CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "1x1": {"kernel_size": 1},
    "3x3, stride 2": {"kernel_size": 3, "stride": 2, "padding": 1},
    "3x3, dilated, grouped": {"kernel_size": 3, "padding": 2, "dilation": 2, "groups": 4},
}


class Maker:
    """Makes the same inputs on every device and in every dtype."""

    def __init__(self, device: str, dtype: torch.dtype):
        self.device, self.dtype, self.random = device, dtype, torch.Generator().manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random, dtype=torch.float64).to(self.device, self.dtype)

    def map(self, *shape: int) -> Tensor:
        """A feature map [B, C, H, W] that takes a gradient."""
        return self.normal(*shape).contiguous(memory_format=torch.channels_last).requires_grad_()

    def boxes(self, count: int) -> Tensor:
        """Boxes [count, 4] of all sizes; some cross the border of the detector's images."""
        centres = torch.rand(count, 2, generator=self.random, dtype=torch.float64) * torch.tensor([WIDTH, HEIGHT])
        sides = 4 * 2 ** (6 * torch.rand(count, 2, generator=self.random, dtype=torch.float64))
        return torch.cat((centres - sides / 2, centres + sides / 2), 1).to(self.device, self.dtype)

    def place(self, module: Any) -> Any:
        return module.to(self.device, self.dtype, memory_format=torch.channels_last)

    def detector(self, *, smooth: bool = False) -> FasterRCNN:
        """A detector of few proposals, with scores so far apart that rounding in fp32 chooses the same ones.

        `smooth` is for gradients: see `lift`.
        """
        trunk = build_resnet_backbone(DEPTH, fpn=True, weights=dict(backbone_weights(DEPTH)))
        few: dict[str, Any] = {f"rpn_pre_nms_top_n_{mode}": 60 for mode in ("train", "test")}
        few["rpn_batch_size_per_image"] = 64
        detector = build_faster_rcnn(trunk, CLASSES, min_size=HEIGHT, resize_in_training=False, **few)
        load(detector, detector_weights(DEPTH))
        if smooth:
            lift(detector.backbone)
            box_head = detector.roi_heads.box_head
            for layer in (detector.rpn.head.conv[0][0], box_head.fc6, box_head.fc7):
                nn.init.constant_(layer.bias, 30)
            detector.roi_heads.box_predictor.cls_score.weight.data /= SHARPNESS
        return self.place(detector)

    def scenes(self) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        """Two images with ten objects each, for the detector."""
        return drawn(2, HEIGHT, WIDTH, self.device, self.dtype)


def lift(backbone: nn.Module) -> nn.Module:
    """Give frozen norms outputs that no ReLU cuts: near 0, rounding decides whether it passes the gradient.

    That alone makes fp32 gradients of any two implementations differ by up to 1e-3.
    """
    for norm in (module for module in backbone.modules() if isinstance(module, FrozenBatchNorm2d)):
        norm.weight.mul_(0.1)
        norm.bias.fill_(1)
    return backbone


def folded_convolutions(make: Maker) -> Outputs:
    """Fused convolution, frozen norm, sum and ReLU, with the gradients of input, weight and shortcut."""
    outputs: dict[str, Tensor] = {}
    for name, options in CONVOLUTIONS.items():
        torch.manual_seed(0)
        conv, norm = nn.Conv2d(16, 24, bias=False, **options), FrozenBatchNorm2d(24)
        for buffer in norm.buffers():
            buffer.uniform_(0.5, 1.5)
        conv, norm, x = make.place(conv), make.place(norm), make.map(2, 16, 19, 23)
        shortcut = make.map(*conv(x).shape)
        y = conv_norm_relu(conv, norm, x, shortcut)
        y.backward(make.normal(*y.shape))
        outputs |= {name: y, f"{name}: x": x.grad, f"{name}: weight": conv.weight.grad}
        outputs[f"{name}: shortcut"] = shortcut.grad
    return outputs


def pyramid(make: Maker) -> Outputs:
    """p2..p6 of images of odd size, with the gradients of the first and the last weight that trains."""
    torch.manual_seed(0)
    backbone = build_resnet_backbone(DEPTH, fpn=True, weights=dict(backbone_weights(DEPTH)))
    maps = make.place(lift(backbone)).train()(make.normal(2, 3, 97, 130))
    sum((x * make.normal(*x.shape)).sum() for x in maps.values()).backward()
    weights = {"c3": first_trained(backbone), "p2": backbone.fpn.layer_blocks["0"][0].weight}  # type: ignore[index]
    return {**maps, **{f"{name}: weight": weight.grad for name, weight in weights.items()}}


def sums_of_cells(make: Maker) -> Outputs:
    """`sum_cells` and its gradient, for cells that are used many times, once and never."""
    feature = make.map(2, 32, 13, 17)
    cells = torch.randint(0, 300, (500, 9), generator=make.random).to(make.device)
    sums = sum_cells(rows_of(feature), cells, make.normal(500, 9))
    sums.backward(make.normal(*sums.shape))
    return {"sums": sums, "map": feature.grad}


def roi_align(make: Maker, *, aligned: bool = False) -> Outputs:
    """Regions of all levels, with the gradient of each map; `aligned` as detectron2 computes it."""
    features = {f"p{k}": Feature(16, 2**k) for k in range(2, 6)}
    pool = PyramidRoIAlign(features, 7, 2, 224, aligned=aligned)
    maps = {name: make.map(2, 16, HEIGHT // f.stride, WIDTH // f.stride) for name, f in features.items()}
    pooled = pool(maps, [make.boxes(60), make.boxes(40)], [(HEIGHT, WIDTH)] * 2)
    pooled.backward(make.normal(*pooled.shape))
    return {"regions": pooled, **{name: feature.grad for name, feature in maps.items()}}


def proposals(make: Maker) -> Outputs:
    """The RPN's proposals, losses and gradient for given maps."""
    detector = make.detector().train()
    features = detector.backbone.features.items()
    maps = {name: make.map(2, 256, HEIGHT // f.stride, WIDTH // f.stride) for name, f in features}
    images = ImageList(make.normal(2, 3, HEIGHT, WIDTH), [(HEIGHT, WIDTH), (HEIGHT - 9, WIDTH - 13)])
    with comparable():
        found, losses = detector.rpn(images, maps, make.scenes()[1])
    sum(losses.values()).backward()
    counts = torch.tensor([float(len(of_image)) for of_image in found])
    return {"proposals": torch.cat(found), "counts": counts, "p3": maps["p3"].grad, **losses}


def training_update(make: Maker) -> Outputs:
    """A detector's losses and gradients, and the change of its weights by one update of SGD."""
    detector = make.detector(smooth=True).train()
    heads = {"RPN": detector.rpn.head.conv[0][0].weight, "fc6": detector.roi_heads.box_head.fc6.weight}
    watched = {"c3": first_trained(detector), **heads}
    before = {name: weight.detach().clone() for name, weight in watched.items()}
    optimizer = build_optimizer(detector, "sgd", rate=1.0, weight_decay=1e-4, decay_norms=True)
    state = TrainState(detector, optimizer, Rank(0, 1, torch.device(make.device)))
    terms = {}

    def losses(part: tuple) -> Outputs:
        terms.update(detector(*part))
        return terms

    with comparable():
        state.update(losses, [make.scenes()], learning_rate=1.0)
    outputs = dict(terms)
    for name, weight in watched.items():
        outputs |= {f"{name}: gradient": weight.grad, f"{name}: change": weight.detach() - before[name]}
    return outputs


def detections(make: Maker) -> list[Outputs]:
    """Boxes, scores and labels of two images, from fused weights."""
    detector = make.detector().eval()
    detector.backbone.fuse()
    with torch.no_grad():
        return detector(make.scenes()[0])


SUBJECTS: dict[str, Callable[[Maker], Outputs | list[Outputs]]] = {
    "folded convolutions": folded_convolutions,
    "FPN maps": pyramid,
    "sum_cells": sums_of_cells,
    "RPN": proposals,
    "RoIAlign": roi_align,
    "RoIAlign, aligned": partial(roi_align, aligned=True),
    "losses, gradients, update": training_update,
    "detections": detections,
}


def error_of(subject: str, device: str, dtype: torch.dtype) -> float:
    """How far a subject computed on the device is from fp64 on the CPU; infinite if they cannot be compared."""
    with tf32(False):
        got: Any = SUBJECTS[subject](Maker(device, dtype))
    wanted: Any = _reference(subject)
    if isinstance(wanted, Mapping):
        return relative_difference(got, wanted)
    return detections_difference(
        [{name: x.cpu().to(w[name]) for name, x in g.items()} for g, w in zip(got, wanted, strict=True)], wanted
    )


@lru_cache
def _reference(subject: str) -> Outputs | list[Outputs]:
    return SUBJECTS[subject](Maker("cpu", torch.float64))


def step_of(
    device: str, *, package=OWN, depth=DEPTH, dtype=torch.float32, bf16=False, backend: str | None = None
) -> tuple[Callable[[], dict[str, Tensor]], nn.Module]:
    """(run, backbone): a training step of a package's backbone on two images of odd size."""
    network = BACKBONES[package](depth, backbone_weights(depth)).train()
    network = network.to(device, dtype, memory_format=torch.channels_last)
    pixels = images(Workload("fp32-channels-last", device, depth, 97, 130, 2)).to(dtype)
    called = torch.compile(network, backend=backend) if backend else network
    return training_step(called, network, pixels, bf16=bf16), network


def bf16_errors(device: str, depth: int) -> dict[str, dict[str, float]]:
    """{who: {map or "gradient": its difference from fp64 on the CPU}} of a backbone, c2..c5, in bf16.

    Ours under autocast keeps activations in bf16, as detectron2 does. torchvision's frozen norms make them fp32 under
    autocast, which takes twice the memory; what compares with ours is torchvision's network in bf16 throughout.
    """
    wanted = step_of("cpu", depth=depth, dtype=torch.float64)[0]()
    runs = {
        OWN: step_of(device, depth=depth, bf16=True),
        "torchvision": step_of(device, package="torchvision", depth=depth, dtype=torch.bfloat16),
        "torchvision, autocast": step_of(device, package="torchvision", depth=depth, bf16=True),
    }
    return {
        who: {name: relative_difference({name: x}, {name: wanted[name]}) for name, x in run().items()}
        for who, (run, _) in runs.items()
    }


def compiled_error(device: str, *, backend: str = "inductor") -> float:
    """The difference of a compiled backbone's step from the eager one, in fp32 without TF32."""
    with tf32(False):
        eager = {name: x.clone() for name, x in step_of(device)[0]().items()}
        return relative_difference(step_of(device, backend=backend)[0](), eager)


def graph_errors(device: str) -> dict[str, float]:
    """The difference of a CUDA graph's replays from eager steps: at once, after other work, with other weights."""
    with tf32(False):
        run, network = step_of(device)
        eager = {name: x.clone() for name, x in run().items()}
        replay, found = as_graph(run, network), {}
        found["at once"] = relative_difference(replay(), eager)
        network.eval().train()  # drops what frozen layers have cached: the graph must not read that memory
        step_of(device)[0]()
        found["after other work"] = relative_difference(replay(), eager)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.mul_(1.01)
        changed = {name: x.clone() for name, x in replay().items()}
        found["with other weights"] = relative_difference(changed, run())
    return found


def check(setting: Setting, record: Record) -> None:
    """Every subject in fp64 and fp32; bf16 beside torchvision's; CUDA graphs and torch.compile beside eager."""
    for dtype, limit in LIMITS.items():
        for subject in SUBJECTS:
            name = str(dtype).removeprefix("torch.")
            record.at_most(f"{subject}, {name}", error_of(subject, setting.device, dtype), limit)
    errors = bf16_errors(setting.device, DEPTH if setting.quick else 50)
    for name, own in errors[OWN].items():
        record.at_most(f"{name}, bf16: error beside torchvision's", own, errors["torchvision"][name])
        record.row(f"{name}, bf16: torchvision's error with activations in fp32", errors["torchvision, autocast"][name])
    if setting.on_gpu:
        for name, difference in graph_errors(setting.device).items():
            record.at_most(f"CUDA graph, {name}", difference, 1e-4)
    if setting.on_gpu or not setting.quick:
        record.at_most("torch.compile, float32", compiled_error(setting.device), 1e-4)

"""Compares computations on the device, in fp64, fp32 and bf16, with the same ones on the CPU in fp64."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from detection import build_faster_rcnn
from detection.faster_rcnn import FasterRCNN
from detection.roi_align import PyramidRoIAlign
from resbackbone import Feature, build_resnet_backbone
from resbackbone.engine.distributed import Rank
from resbackbone.engine.optimizers import build_optimizer
from resbackbone.engine.state import TrainState
from resbackbone.layers import FrozenBatchNorm2d
from resbackbone.tools.benchmarks import detectors, networks
from resbackbone.tools.benchmarks.contest import OWN, Workload, relative_difference, tf32
from resbackbone.tools.benchmarks.detectors import Outputs
from resbackbone.tools.benchmarks.networks import backbone_weights, first_trained
from resbackbone.tools.gpu_checks.record import Record, Setting

LIMITS = {torch.float64: 1e-9, torch.float32: 1e-4}  # of ||got - wanted|| / ||wanted||, fp32 without TF32
CLASSES = 80
DEPTH = 18
HEIGHT, WIDTH = 128, 192  # of the detector's images


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
        detectors.load(detector, detectors.detector_weights(DEPTH))
        if smooth:
            lift(detector.backbone)
            box_head = detector.roi_heads.box_head
            for layer in (detector.rpn.head.conv[0][0], box_head.fc6, box_head.fc7):
                nn.init.constant_(layer.bias, 30)
            detector.roi_heads.box_predictor.cls_score.weight.data /= detectors.SHARPNESS
        return self.place(detector)

    def scenes(self) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        """Two images with ten objects each, for the detector."""
        return detectors.drawn(2, HEIGHT, WIDTH, self.device, self.dtype)


def lift(backbone: nn.Module) -> nn.Module:
    """Give frozen norms outputs that no ReLU cuts: near 0, rounding decides whether it passes the gradient.

    That alone makes fp32 gradients of any two implementations differ by up to 1e-3.
    """
    for norm in (module for module in backbone.modules() if isinstance(module, FrozenBatchNorm2d)):
        norm.weight.mul_(0.1)
        norm.bias.fill_(1)
    return backbone


def pyramid(make: Maker) -> Outputs:
    """p2..p6 of images of odd size, with the gradients of the first and the last weight that trains."""
    torch.manual_seed(0)
    backbone = build_resnet_backbone(DEPTH, fpn=True, weights=dict(backbone_weights(DEPTH)))
    maps = make.place(lift(backbone)).train()(make.normal(2, 3, 97, 130))
    sum((x * make.normal(*x.shape)).sum() for x in maps.values()).backward()
    weights = {"c3": first_trained(backbone), "p2": backbone.fpn.layer_blocks["0"][0].weight}  # type: ignore[index]
    return {**maps, **{f"{name}: weight": weight.grad for name, weight in weights.items()}}


def roi_align(make: Maker, *, aligned: bool = False) -> Outputs:
    """Regions of all levels, with the gradient of each map; `aligned` as detectron2 computes it."""
    features = {f"p{k}": Feature(16, 2**k) for k in range(2, 6)}
    pool = PyramidRoIAlign(features, 7, 2, 224, aligned=aligned)
    maps = {name: make.map(2, 16, HEIGHT // f.stride, WIDTH // f.stride) for name, f in features.items()}
    pooled = pool(maps, [make.boxes(60), make.boxes(40)], [(HEIGHT, WIDTH)] * 2)
    pooled.backward(make.normal(*pooled.shape))
    return {"regions": pooled, **{name: feature.grad for name, feature in maps.items()}}


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

    with detectors.comparable():
        state.update(losses, [make.scenes()], learning_rate=1.0)
    outputs = dict(terms)
    for name, weight in watched.items():
        outputs |= {f"{name}: gradient": weight.grad, f"{name}: change": weight.detach() - before[name]}
    return outputs


def detections(make: Maker) -> Outputs:
    """Boxes, scores and labels of two images, from fused weights, on the CPU in fp64."""
    detector = make.detector().eval()
    detector.backbone.fuse()
    with torch.no_grad():
        found = detector(make.scenes()[0])
    return [{name: values.double().cpu() for name, values in of_image.items()} for of_image in found]


SUBJECTS: dict[str, Callable[[Maker], Any]] = {  # to outputs by name, or detections
    "FPN maps": pyramid,
    "RoIAlign": roi_align,
    "RoIAlign, aligned": partial(roi_align, aligned=True),
    "losses, gradients, update": training_update,
    "detections": detections,
}


def error_of(subject: str, device: str, dtype: torch.dtype) -> float:
    """How far a subject computed on the device is from fp64 on the CPU; infinite if they cannot be compared."""
    with tf32(False):
        got, wanted = SUBJECTS[subject](Maker(device, dtype)), _reference(subject)
    if isinstance(wanted, list):
        return detectors.difference(got, wanted)
    return relative_difference(got, wanted)


@lru_cache
def _reference(subject: str) -> Any:
    return SUBJECTS[subject](Maker("cpu", torch.float64))


def step_of(
    device: str, *, package=OWN, depth=DEPTH, dtype=torch.float32, bf16=False, backend: str | None = None
) -> tuple[Callable[[], dict[str, Tensor]], nn.Module]:
    """(run, backbone): a training step of a package's backbone on two images of odd size."""
    network = networks.BACKBONES[package](depth, backbone_weights(depth)).train()
    network = network.to(device, dtype, memory_format=torch.channels_last)
    pixels = networks.images(Workload("fp32-channels-last", device, depth, 97, 130, 2)).to(dtype)
    called = torch.compile(network, backend=backend) if backend else network
    return networks.training_step(called, network, pixels, bf16=bf16), network


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


def graph_error(device: str) -> float:
    """The difference of a CUDA graph's replay from an eager step, both with weights that changed after the recording.

    As PyTorch's notes on CUDA graphs require, the first runs are on another stream, and gradients are cleared before
    the recording, so that backward allocates them in the graph's memory.
    """
    with tf32(False):
        run, network = step_of(device)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # libraries choose their algorithms and allocate their workspaces
                run()
        torch.cuda.current_stream().wait_stream(stream)
        network.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = run()
        step_of(device)[0]()  # may take memory that was freed, which the graph must not read
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.mul_(1.01)
        graph.replay()
        replayed = {name: x.clone() for name, x in outputs.items()}
        return relative_difference(replayed, run())


def check(setting: Setting, record: Record) -> None:
    """Every subject in fp64 and fp32; bf16 beside torchvision's; CUDA graphs and torch.compile beside eager."""
    for dtype, limit in LIMITS.items():
        for subject in SUBJECTS:
            name = str(dtype).removeprefix("torch.")
            record.at_most(f"{subject}, {name}", error_of(subject, setting.device, dtype), limit)
    errors = bf16_errors(setting.device, 50)
    for name, own in errors[OWN].items():
        record.at_most(f"{name}, bf16: error beside torchvision's", own, errors["torchvision"][name])
        record.row(f"{name}, bf16: torchvision's error with activations in fp32", errors["torchvision, autocast"][name])
    if setting.on_gpu:
        record.at_most("CUDA graph, float32", graph_error(setting.device), 1e-4)
    record.at_most("torch.compile, float32", compiled_error(setting.device), 1e-4)

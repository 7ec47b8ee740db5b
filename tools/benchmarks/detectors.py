"""Every package's Faster R-CNN with a pyramid, with the same weights and settings.

The settings are torchvision's, and detectron2 is set to them: anchors on whole pixels, 2 x 2 samples a bin of RoIAlign,
2000 proposals in training and 1000 in inference, smooth L1 from 1/9.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d, box_iou, boxes

from detection import build_faster_rcnn
from detection.faster_rcnn import prepare_for_detection
from resbackbone import build_resnet_backbone
from resbackbone.checks import UserError
from resbackbone.tools.benchmarks.contest import FUSED, MODES, OWN, Contender, package_of, relative_difference
from resbackbone.tools.benchmarks.networks import (
    Workload,
    backbone_weights,
    detectron2_config,
    first_trained,
    randomize_norms,
)
from resbackbone.weights import MEAN, STD
from resbackbone.weights.translate import from_ours

CLASSES = 80
LONGEST = 1333  # pixels of the longer side, at a shorter side of 800
SHARPNESS = 60.0  # makes class scores differ as trained ones do
LOSSES = {  # detectron2's names: torchvision's, which are ours too
    "loss_cls": "loss_classifier",
    "loss_box_reg": "loss_box_reg",
    "loss_rpn_cls": "loss_objectness",
    "loss_rpn_loc": "loss_rpn_box_reg",
}
# A Faster R-CNN with a pyramid. detectron2 has this in a YAML file, which its source tree keeps outside of the package.
DETECTRON2 = """
    MODEL.DEVICE cpu   MODEL.BACKBONE.NAME build_resnet_fpn_backbone
    MODEL.FPN.IN_FEATURES ['res2','res3','res4','res5']
    MODEL.ANCHOR_GENERATOR.SIZES [[32],[64],[128],[256],[512]]
    MODEL.RPN.IN_FEATURES ['p2','p3','p4','p5','p6']
    MODEL.RPN.PRE_NMS_TOPK_TRAIN 2000   MODEL.RPN.POST_NMS_TOPK_TRAIN 2000
    MODEL.RPN.PRE_NMS_TOPK_TEST 1000    MODEL.RPN.POST_NMS_TOPK_TEST 1000
    MODEL.ROI_HEADS.NAME StandardROIHeads   MODEL.ROI_HEADS.IN_FEATURES ['p2','p3','p4','p5']
    MODEL.ROI_BOX_HEAD.NAME FastRCNNConvFCHead   MODEL.ROI_BOX_HEAD.NUM_FC 2
    MODEL.ROI_BOX_HEAD.POOLER_TYPE ROIAlign   MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION 7
    MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO 2
"""
Outputs = dict[str, Tensor] | list[dict[str, Tensor]]  # losses and a gradient, or detections image by image


class Scene(NamedTuple):
    """An image with its objects: RGB floats in 0..1 [3, H, W], boxes x1 y1 x2 y2 in pixels [n, 4], labels 1.. [n]."""

    pixels: Tensor
    boxes: Tensor
    labels: Tensor

    def resized(self, height: int, width: int) -> "Scene":
        old = self.pixels.shape[1:]
        pixels = F.interpolate(self.pixels[None], (height, width), mode="bilinear", antialias=True)[0]
        scale = torch.tensor([width / old[1], height / old[0]] * 2)
        return Scene(pixels.clamp(0, 1), self.boxes * scale, self.labels)

    def flipped(self) -> "Scene":
        x1, y1, x2, y2 = self.boxes.unbind(1)
        width = self.pixels.shape[2]
        return Scene(self.pixels.flip(2), torch.stack([width - x2, y1, width - x1, y2], 1), self.labels)

    def batch(self, size: int, device: str, dtype: torch.dtype = torch.float32) -> list["Scene"]:
        """`size` images on the device, every second one flipped, so that neighbours have different boxes."""
        pair = [
            Scene(scene.pixels.to(device, dtype), scene.boxes.to(device, dtype), scene.labels.to(device))
            for scene in (self, self.flipped())
        ]
        return [pair[i % 2] for i in range(size)]


def read_scene(data: Path) -> Scene:
    """The first image of a COCO data set's val2017 with three objects or more."""
    from detection.data import open_split  # needs msgspec, which a machine that only times networks may lack

    dataset = open_split(data, "val", keep_empty=False)
    samples = map(dataset.__getitem__, range(len(dataset)))
    image, target = next((sample for sample in samples if len(sample[1]["boxes"]) > 2), dataset[0])
    return Scene(image / 255, target["boxes"], target["labels"].clamp(max=CLASSES))


def drawn_scene() -> Scene:
    """Ten blocks of random colours on grey noise."""
    generator = torch.Generator().manual_seed(0)
    pixels = 0.4 + 0.2 * torch.rand(3, 480, 640, generator=generator)
    sides = torch.randint(30, 200, (10, 2), generator=generator)
    corners = (torch.rand(10, 2, generator=generator) * (torch.tensor([640, 480]) - sides)).int()
    boxes = torch.cat([corners, corners + sides], 1)
    for x1, y1, x2, y2 in boxes.tolist():
        pixels[:, y1:y2, x1:x2] = torch.rand(3, 1, 1, generator=generator)
    return Scene(pixels, boxes.float(), torch.randint(1, CLASSES + 1, (10,), generator=generator))


class Detector(nn.Module):
    """A package's Faster R-CNN: images of one size to losses in training mode, otherwise to detections by image."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network: Any = network

    def forward(self, scenes: list[Scene]) -> Outputs:
        height, width = scenes[0].pixels.shape[1:]
        self.network.transform.min_size = (min(height, width),)  # the scenes are resized already
        self.network.transform.max_size = max(height, width)
        targets = [{"boxes": scene.boxes, "labels": scene.labels} for scene in scenes] if self.training else None
        return self.network([scene.pixels for scene in scenes], targets)


class Detectron2Detector(Detector):
    def forward(self, scenes: list[Scene]) -> Outputs:
        from detectron2.structures import Boxes, Instances
        from detectron2.utils.events import EventStorage

        entries = [{"image": scene.pixels * 255} for scene in scenes]
        if not self.training:
            found = [output["instances"] for output in self.network(entries)]
            return [{"boxes": f.pred_boxes.tensor, "scores": f.scores, "labels": f.pred_classes + 1} for f in found]
        for entry, scene in zip(entries, scenes, strict=True):
            size, boxes = scene.pixels.shape[1:], Boxes(scene.boxes)
            entry["instances"] = Instances(size, gt_boxes=boxes, gt_classes=scene.labels - 1)
        with EventStorage():  # its losses log to it
            losses = self.network(entries)
        return {LOSSES[name]: loss for name, loss in losses.items()}


@lru_cache(maxsize=1)
def detector_weights(depth: int) -> dict[str, Tensor]:
    """A detector's state dict under our names, the same in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        detector = randomize_norms(build_faster_rcnn(build_resnet_backbone(depth, fpn=True), CLASSES))
        state = detector.state_dict()
        state |= {f"backbone.{name}": tensor for name, tensor in backbone_weights(depth).items()}
        state["roi_heads.box_predictor.cls_score.weight"] *= SHARPNESS
        return state


def build_own(depth: int, state: Mapping[str, Tensor]) -> Detector:
    trunk = {name.removeprefix("backbone."): x for name, x in state.items() if name.startswith("backbone.")}
    detector = build_faster_rcnn(build_resnet_backbone(depth, weights=trunk, fpn=True), CLASSES)
    load(detector, state)
    return Detector(detector)


def build_torchvision(depth: int, state: Mapping[str, Tensor]) -> Detector:
    backbone = resnet_fpn_backbone(
        backbone_name=f"resnet{depth}", weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=3
    )
    detector = torchvision.models.detection.FasterRCNN(backbone, CLASSES + 1)
    load(detector, from_ours(state, "torchvision"))
    return Detector(detector)


def build_detectron2(depth: int, state: Mapping[str, Tensor]) -> Detector:
    """Built on the CPU and then moved: every tensor that it holds is a parameter or a buffer."""
    from detectron2.modeling import build_model

    config = detectron2_config(depth, DETECTRON2)
    config.MODEL.PIXEL_MEAN, config.MODEL.PIXEL_STD = [255 * x for x in MEAN], [255 * x for x in STD]
    config.MODEL.RPN.SMOOTH_L1_BETA = config.MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA = 1 / 9
    config.MODEL.ROI_HEADS.NUM_CLASSES = CLASSES
    detector = build_model(config)
    load(detector, from_ours(state, "detectron2"))
    for anchors in detector.proposal_generator.anchor_generator.cell_anchors:
        anchors.round_()
    return Detectron2Detector(detector)


DETECTORS = {OWN: build_own, "torchvision": build_torchvision, "detectron2": build_detectron2}


def load(detector: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load all of the state, except counters of batches, which frozen norms do not keep."""
    missing, unexpected = detector.load_state_dict(state, strict=False)
    left = [key for key in (*missing, *unexpected) if not key.endswith("num_batches_tracked")]
    assert not left, f"weights that do not fit: {', '.join(left)}"


def contender(training: bool, scene: Scene, work: Workload, name: str) -> Contender:
    """The detector of `name` on a batch of the scene, resized to the work's height on its shorter side.

    Outputs are compared in fp64 whatever the mode (rounding changes which proposals are kept), on at most two images of
    about half that size in multiples of 64 pixels (where torchvision infers the strides that detectron2 states). In
    training all packages sample the same anchors and proposals for it: the first ones.
    """
    if MODES[work.mode].compiled:
        raise UserError("detectors are not compiled; leave this mode to the jobs of networks")
    detector = work.place(DETECTORS[package_of(name)](work.depth, detector_weights(work.depth))).train(training)
    timed = detector
    if name.endswith(FUSED):  # as our commands detect; in bf16 its weights are rounded, so the check has its own copy
        timed = prepare_for_detection(copy.deepcopy(detector), bf16=work.bf16)
        prepare_for_detection(detector)
    sides = scene.pixels.shape[1:]
    scale = min(work.height / min(sides), LONGEST * work.height / 800 / max(sides))
    scene = scene.resized(*(round(side * scale) for side in sides))
    given = scene.batch(work.batch_size, work.device)
    height, width = (max(64, side // 128 * 64) for side in scene.pixels.shape[1:])
    checked = scene.resized(height, width).batch(min(2, work.batch_size), work.device, torch.float64)
    parameters, first = list(detector.parameters()), first_trained(detector)

    def outputs_of(detector: nn.Module, scenes: list[Scene]) -> Outputs:
        with torch.inference_mode(not training), work.autocast() if scenes is given else nullcontext():
            outputs = detector(scenes)
        if not training:
            return outputs
        for parameter in parameters:
            parameter.grad = None
        sum(outputs.values()).backward()
        return {**{name: loss.detach() for name, loss in outputs.items()}, "gradient": first.grad}

    def check() -> Outputs:
        detector.double()
        with comparable():
            outputs: Any = outputs_of(detector, checked)
        if training:
            outputs["gradient"] = outputs["gradient"].clone()
        detector.float()  # nothing is lost: it was in fp32 before
        return outputs

    return Contender(lambda: outputs_of(timed, given), timed, check)


@contextmanager
def comparable() -> Iterator[None]:
    """In the block, detectors that draw a random permutation get 0, 1, 2, .., and all of them compute in fp64."""
    suppress: Callable = boxes.batched_nms

    def first(n: int, *, device: Any = None, **_: Any) -> Tensor:
        return torch.arange(n, device=device)

    def in_fp64(found: Tensor, scores: Tensor, *rest: Any) -> Tensor:  # detectron2 makes its boxes fp32, not the scores
        return suppress(found.to(scores.dtype), scores, *rest)

    with mock.patch.object(torch, "randperm", first), mock.patch.object(boxes, "batched_nms", in_fp64):
        yield


def difference(got: Outputs, wanted: Outputs) -> float:
    """How far outputs differ: losses and gradient by their norms, detections by scores and the IoU of the best 20.

    Equal scores may come in another order, so a box may match any of its class.
    """
    if isinstance(wanted, Mapping):
        return relative_difference(got, wanted)
    worst = 0.0
    found: Any
    expected: Any
    for found, expected in zip(got, wanted, strict=True):
        if len(found["scores"]) != len(expected["scores"]):
            return float("inf")
        if len(expected["scores"]):
            overlaps = box_iou(expected["boxes"][:20], found["boxes"])
            overlaps[expected["labels"][:20, None] != found["labels"]] = 0
            scores = (found["scores"] - expected["scores"]).abs().max().item()
            worst = max(worst, scores, 1 - overlaps.max(1).values.min().item())
    return worst

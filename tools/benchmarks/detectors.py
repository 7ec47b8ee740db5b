"""Every package's Faster R-CNN with a pyramid, with the same weights and settings.

The settings are torchvision's, and detectron2 is set to them: anchors on whole pixels, 2 x 2 samples a bin of RoIAlign,
2000 proposals in training and 1000 in inference, smooth L1 from 1/9.
"""

import copy
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import box_iou, boxes

from detection import build_faster_rcnn, sampling
from detection.export import OUTPUTS
from detection.faster_rcnn import prepare_for_detection
from detection.roi_heads import Detections
from resbackbone import build_resnet_backbone
from resbackbone.tools.benchmarks.contest import FUSED, OWN, Contender, Workload, package_of
from resbackbone.tools.benchmarks.networks import backbone_weights, detectron2_config, first_trained, randomize_norms
from resbackbone.tools.benchmarks.runtimes import RUNTIMES, Run, exported, runner
from resbackbone.weights import MEAN, STD
from resbackbone.weights.translate import from_ours

CLASSES = 80
SHARPNESS = 60.0  # makes class scores differ as trained ones do
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
Targets = list[dict[str, Tensor]]
Outputs = dict[str, Tensor] | Targets  # losses and a gradient, or detections image by image


def drawn(count: int, height: int, width: int, device: str, dtype=torch.float32) -> tuple[list[Tensor], Targets]:
    """`count` RGB images of floats in 0..1, each of ten blocks on grey noise, and the blocks as boxes and labels 1.."""
    random = torch.Generator().manual_seed(0)
    images, targets = [], []
    for _ in range(count):
        pixels = 0.4 + 0.2 * torch.rand(3, height, width, generator=random)
        sides = torch.randint(1 + min(height, width) // 16, min(height, width) // 2, (10, 2), generator=random)
        corners = (torch.rand(10, 2, generator=random) * (torch.tensor([width, height]) - sides)).int()
        boxes = torch.cat([corners, corners + sides], 1)
        for x1, y1, x2, y2 in boxes.tolist():
            pixels[:, y1:y2, x1:x2] = torch.rand(3, 1, 1, generator=random)
        labels = torch.randint(1, CLASSES + 1, (10,), generator=random)
        images.append(pixels.to(device, dtype))
        targets.append({"boxes": boxes.to(device, dtype), "labels": labels.to(device)})
    return images, targets


@lru_cache(maxsize=1)
def detector_weights(depth: int) -> dict[str, Tensor]:
    """A detector's state dict under our names, the same in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        detector = randomize_norms(build_faster_rcnn(build_resnet_backbone(depth, fpn=True), CLASSES))
        state = detector.state_dict()
        state["roi_heads.box_predictor.cls_score.weight"] *= SHARPNESS
        return state


def build_own(depth: int, state: Mapping[str, Tensor]) -> nn.Module:
    trunk = build_resnet_backbone(depth, fpn=True, weights=dict(backbone_weights(depth)))  # FrozenBN, frozen through c2
    return load(build_faster_rcnn(trunk, CLASSES), state)


def build_torchvision(depth: int, state: Mapping[str, Tensor]) -> nn.Module:
    backbone = resnet_fpn_backbone(backbone_name=f"resnet{depth}", weights=None)  # FrozenBN, frozen through c2
    return load(torchvision.models.detection.FasterRCNN(backbone, CLASSES + 1), from_ours(state, "torchvision"))


def build_detectron2(depth: int, state: Mapping[str, Tensor]) -> nn.Module:
    """Built on the CPU and then moved: every tensor that it holds is a parameter or a buffer."""
    from detection.detectron2_engine import Detectron2Detector

    class Unresized(Detectron2Detector):
        def _entry(self, image: Tensor) -> dict:
            return {"image": image * 255}

    config = detectron2_config(depth, DETECTRON2)
    config.MODEL.PIXEL_MEAN, config.MODEL.PIXEL_STD = [255 * x for x in MEAN], [255 * x for x in STD]
    config.MODEL.RPN.SMOOTH_L1_BETA = config.MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA = 1 / 9
    config.MODEL.ROI_HEADS.NUM_CLASSES = CLASSES
    detector = Unresized(config, categories={})
    load(detector.model, from_ours(state, "detectron2"))
    for anchors in detector.model.proposal_generator.anchor_generator.cell_anchors:
        anchors.round_()
    return detector


DETECTORS = {OWN: build_own, "torchvision": build_torchvision, "detectron2": build_detectron2}


def load(detector: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Load all of the state, except counters of batches, which frozen norms do not keep."""
    missing, unexpected = detector.load_state_dict(state, strict=False)
    left = [key for key in (*missing, *unexpected) if not key.endswith("num_batches_tracked")]
    assert not left, f"weights that do not fit: {', '.join(left)}"
    return detector


def unresized(image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
    """Stands for the resizing of an input transform: the images have their size already."""
    return image, target


@lru_cache(maxsize=2)
def exported_detector(depth: int, height: int, width: int) -> bytes:
    """This package's detector, whose resizing keeps images of this size as they are."""
    detector: Any = build_own(depth, detector_weights(depth))
    detector.transform.min_size, detector.transform.max_size = (min(height, width),), max(height, width)
    return exported(partial(detector.export, input_type="float32"))


def runtime(name: str, work: Workload) -> Contender:
    """The exported detector in the runtime `name`. Its outputs are checked in fp32, which is the most that it has."""

    def on(batch: list[Tensor], work: Workload) -> Run:
        images = torch.stack(batch).float()
        return runner(name, exported_detector(work.depth, *images.shape[-2:]), images, work)

    def check() -> Outputs:
        outputs = on(checked_images(work)[0], replace(work, mode="fp32"))()
        return Detections(*(outputs[key] for key in OUTPUTS)).as_list()

    return Contender(on(drawn(work.batch_size, work.height, work.width, work.device)[0], work), check=check)


def checked_images(work: Workload) -> tuple[list[Tensor], Targets]:
    """At most two images of about half the size in multiples of 64 pixels, fp64."""
    height, width = (max(64, side // 128 * 64) for side in (work.height, work.width))
    return drawn(min(2, work.batch_size), height, width, work.device, torch.float64)


def contender(training: bool, work: Workload, name: str) -> Contender:
    """The detector of `name` on a batch of drawn images.

    Outputs are compared in fp64 whatever the mode (rounding changes which proposals are kept), on `checked_images`
    (where torchvision infers the strides that detectron2 states). In training all packages sample the same anchors and
    proposals for it: the first ones.
    """
    if name in RUNTIMES:
        return runtime(name, work)
    detector: Any = work.place(DETECTORS[package_of(name)](work.depth, detector_weights(work.depth))).train(training)
    if hasattr(detector, "transform"):
        detector.transform.resize = unresized
    timed = detector
    if name == FUSED:  # as our commands detect; in bf16 its weights are rounded, so the check has its own copy
        timed = prepare_for_detection(copy.deepcopy(detector), bf16=work.bf16)
        prepare_for_detection(detector)
    batch = drawn(work.batch_size, work.height, work.width, work.device)
    checked = checked_images(work)
    parameters, first = list(detector.parameters()), first_trained(detector)

    def outputs_of(detector: nn.Module, images: list[Tensor], targets: Targets) -> Outputs:
        with torch.inference_mode(not training), work.autocast() if images is batch[0] else nullcontext():
            outputs = detector(images, targets if training else None)
        if not training:
            return outputs
        for parameter in parameters:
            parameter.grad = None
        sum(outputs.values()).backward()
        return {**{name: loss.detach() for name, loss in outputs.items()}, "gradient": first.grad}

    def check() -> Outputs:
        detector.double()
        with comparable():
            outputs: Any = outputs_of(detector, *checked)
        if training:
            outputs["gradient"] = outputs["gradient"].clone()
        detector.float()  # nothing is lost: it was in fp32 before
        return outputs

    return Contender(lambda: outputs_of(timed, *batch), timed, check, keeps_memory=name == FUSED and not work.on_gpu)


@contextmanager
def comparable() -> Iterator[None]:
    """In the block, detectors draw the first of the anchors and regions they may draw, and all compute in fp64."""

    def first(n: int, *, device: Any = None, **_: Any) -> Tensor:
        return torch.arange(n, device=device)

    def falling(labels: Tensor) -> Tensor:
        return torch.arange(labels.shape[1], 0, -1, device=labels.device).expand_as(labels).double()

    def in_fp64(found: Tensor, scores: Tensor, *rest: Any) -> Tensor:  # detectron2 makes its boxes fp32, not the scores
        return boxes.batched_nms(found.to(scores.dtype), scores, *rest)

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(torch, "randperm", first))
        patches.enter_context(mock.patch.object(sampling, "random_keys", falling))
        if (of_detectron2 := sys.modules.get("detectron2.layers.nms")) is not None:
            patches.enter_context(mock.patch.object(of_detectron2, "box_ops", SimpleNamespace(batched_nms=in_fp64)))
        yield


def difference(got: Targets, wanted: Targets) -> float:
    """How far detections differ: by their number, their scores, and the IoU of the best 20.

    Equal scores may come in another order, so a box may match any of its class.
    """
    worst = 0.0
    for found, expected in zip(got, wanted, strict=True):
        if len(found["scores"]) != len(expected["scores"]):
            return float("inf")
        if len(expected["scores"]):
            overlaps = box_iou(expected["boxes"][:20], found["boxes"])
            overlaps[expected["labels"][:20, None] != found["labels"]] = 0
            scores = (found["scores"] - expected["scores"]).abs().max().item()
            worst = max(worst, scores, 1 - overlaps.max(1).values.min().item())
    return worst

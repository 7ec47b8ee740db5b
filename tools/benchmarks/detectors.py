"""The same Faster R-CNN R-FPN, with the same weights and settings, of every package that has one.

The settings are torchvision's: anchors on whole pixels, 2 x 2 samples a bin of RoIAlign, 2000 proposals in training and
1000 in inference, smooth L1 from 1/9 on. detectron2 is set to them.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d, box_iou, boxes

from benchmarks.contest import OWN, Contender, relative_difference
from benchmarks.networks import (
    DETECTRON2_STAGES,
    Setting,
    backbone_weights,
    detectron2_config,
    first_trained,
    make_lively,
)
from detection import build_faster_rcnn
from resbackbone import build_resnet_backbone
from resbackbone.weights import MEAN, STD
from resbackbone.weights.translate import from_ours

CLASSES = 80
LONGEST = 1333  # pixels
LOSSES = {  # detectron2's names, and torchvision's, which are ours
    "loss_cls": "loss_classifier",
    "loss_box_reg": "loss_box_reg",
    "loss_rpn_cls": "loss_objectness",
    "loss_rpn_loc": "loss_rpn_box_reg",
}


@dataclass(frozen=True)
class Scene:
    """An image with its objects: RGB floats in 0..1 [3, H, W], boxes x1 y1 x2 y2 in pixels [n, 4], labels 1.. [n]."""

    pixels: Tensor
    boxes: Tensor
    labels: Tensor

    def resized(self, height: int, width: int) -> "Scene":
        """The scene at another size in pixels."""
        old = self.pixels.shape[1:]
        pixels = F.interpolate(self.pixels[None], (height, width), mode="bilinear", antialias=True)[0]
        scale = torch.tensor([width / old[1], height / old[0]] * 2)
        return Scene(pixels.clamp(0, 1), self.boxes * scale, self.labels)

    def at(self, shorter: int) -> "Scene":
        """With this shorter side, as detectors are trained and tested: the longer is 1333 pixels at most."""
        height, width = self.pixels.shape[1:]
        scale = min(shorter / min(height, width), LONGEST * shorter / 800 / max(height, width))
        return self.resized(round(height * scale), round(width * scale))

    def to(self, device: str) -> "Scene":
        return Scene(self.pixels.to(device), self.boxes.to(device), self.labels.to(device))

    def double(self) -> "Scene":
        return Scene(self.pixels.double(), self.boxes.double(), self.labels)


class Detector(nn.Module):
    """A package's Faster R-CNN: a scene to its losses in training mode, else to its detections."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, scene: Scene) -> dict[str, Tensor]:
        size = scene.pixels.shape[1:]
        self.network.transform.min_size, self.network.transform.max_size = (min(size),), max(size)  # it comes resized
        targets = [{"boxes": scene.boxes, "labels": scene.labels}] if self.training else None
        outputs = self.network([scene.pixels], targets)
        return outputs if self.training else outputs[0]


class Detectron2Detector(Detector):
    def forward(self, scene: Scene) -> dict[str, Tensor]:
        from detectron2.structures import Boxes, Instances
        from detectron2.utils.events import EventStorage

        entry = {"image": scene.pixels * 255}
        if not self.training:
            found = self.network([entry])[0]["instances"]
            return {"boxes": found.pred_boxes.tensor, "scores": found.scores, "labels": found.pred_classes + 1}
        entry["instances"] = Instances(scene.pixels.shape[1:], gt_boxes=Boxes(scene.boxes), gt_classes=scene.labels - 1)
        with EventStorage():  # its losses want to log
            losses = self.network([entry])
        return {LOSSES[name]: loss for name, loss in losses.items()}


@lru_cache(maxsize=1)
def detector_weights(depth: int) -> dict[str, Tensor]:
    """A detector's state dict under our names, the same in every process; scores differ as trained ones do."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        detector = make_lively(build_faster_rcnn(build_resnet_backbone(depth, fpn=True), CLASSES))
        state = detector.state_dict()
        state |= {f"backbone.{name}": tensor for name, tensor in backbone_weights(depth).items()}
        state["roi_heads.box_predictor.cls_score.weight"] *= SHARPNESS
        return state


SHARPNESS = 60.0


def ours(depth: int, state: Mapping[str, Tensor]) -> Detector:
    trunk = {name.removeprefix("backbone."): x for name, x in state.items() if name.startswith("backbone.")}
    detector = build_faster_rcnn(build_resnet_backbone(depth, weights=trunk, fpn=True), CLASSES)
    load(detector, state)
    return Detector(detector)


def torchvisions(depth: int, state: Mapping[str, Tensor]) -> Detector:
    backbone = resnet_fpn_backbone(
        backbone_name=f"resnet{depth}", weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=3
    )
    detector = torchvision.models.detection.FasterRCNN(backbone, CLASSES + 1)
    load(detector, from_ours(state, "torchvision"))
    return Detector(detector)


def detectron2s(depth: int, state: Mapping[str, Tensor]) -> Detector:
    """Every setting is made here, as detectron2's source tree does not hold its YAML files where a package does."""
    from detectron2.modeling import build_model

    config = detectron2_config(
        depth,
        {
            "MODEL.DEVICE": "cpu",  # where it is built; every tensor of it is a parameter or a buffer, and moves
            "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
            "MODEL.FPN.IN_FEATURES": list(DETECTRON2_STAGES),
            "MODEL.PIXEL_MEAN": [255 * x for x in MEAN],
            "MODEL.PIXEL_STD": [255 * x for x in STD],
            "MODEL.ANCHOR_GENERATOR.SIZES": [[32], [64], [128], [256], [512]],
            "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[0.5, 1.0, 2.0]],
            "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
            "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 2000,
            "MODEL.RPN.PRE_NMS_TOPK_TEST": 1000,
            "MODEL.RPN.POST_NMS_TOPK_TRAIN": 2000,
            "MODEL.RPN.POST_NMS_TOPK_TEST": 1000,
            "MODEL.RPN.SMOOTH_L1_BETA": 1 / 9,
            "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
            "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4", "p5"],
            "MODEL.ROI_HEADS.NUM_CLASSES": CLASSES,
            "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
            "MODEL.ROI_BOX_HEAD.NUM_FC": 2,
            "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7,
            "MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIAlign",
            "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": 2,
            "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": 1 / 9,
        },
    )
    detector = build_model(config)
    load(detector, from_ours(state, "detectron2"))
    for anchors in detector.proposal_generator.anchor_generator.cell_anchors:
        anchors.round_()
    return Detectron2Detector(detector)


DETECTORS = {OWN: ours, "torchvision": torchvisions, "detectron2": detectron2s}


def load(detector: nn.Module, state: Mapping[str, Tensor]) -> None:
    """All of the state, save counters of batches that a frozen norm has not."""
    missing, unexpected = detector.load_state_dict(state, strict=False)
    left = [key for key in (*missing, *unexpected) if not key.endswith("num_batches_tracked")]
    assert not left, f"weights that do not fit: {', '.join(left)}"


def contender(setting: Setting, training: bool, scene: Scene, name: str) -> Contender:
    """The detector of `name` on `scene`, which is resized to the setting's height on its shorter side.

    Outputs are compared in fp64 whatever the mode (rounding changes which proposals are kept), on the scene at about
    half that size in multiples of 64 pixels (where torchvision infers the strides that detectron2 states), and in
    training with the same anchors and proposals sampled: the first ones.
    """
    detector = setting.place(DETECTORS[name](setting.depth, detector_weights(setting.depth))).train(training)
    given = scene.at(setting.height).to(setting.device)
    height, width = (max(64, side // 128 * 64) for side in given.pixels.shape[1:])
    checked = scene.resized(height, width).to(setting.device)
    parameters, first = list(detector.parameters()), first_trained(detector)

    def step(scene: Scene) -> dict[str, Tensor]:
        for parameter in parameters:
            parameter.grad = None
        losses = detector(scene)
        sum(losses.values()).backward()
        return {**{name: loss.detach() for name, loss in losses.items()}, "gradient": first.grad}

    def run() -> dict[str, Tensor]:
        with setting.autocast(), torch.inference_mode(not training):
            return step(given) if training else detector(given)

    def check() -> dict[str, Tensor]:
        detector.double()
        with torch.inference_mode(not training), comparable():
            outputs = step(checked.double()) if training else detector(checked.double())
        outputs = {name: tensor.clone() for name, tensor in outputs.items()}
        detector.float()  # nothing is lost: it was in fp32 before
        return outputs

    return Contender(run, detector, check)


@contextmanager
def comparable() -> Iterator[None]:
    """Where detectors draw a random permutation to sample by, they get 0, 1, 2, ..; and all of them compute in fp64."""
    drawn: Callable = torch.randperm
    suppress: Callable = boxes.batched_nms
    torch.randperm = lambda n, **kwargs: torch.arange(n, **{k: v for k, v in kwargs.items() if k == "device"})
    # detectron2 makes its boxes fp32 here, but not the scores.
    boxes.batched_nms = lambda found, scores, *rest: suppress(found.to(scores.dtype), scores, *rest)
    try:
        yield
    finally:
        torch.randperm, boxes.batched_nms = drawn, suppress


def difference(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """Of losses and gradient the relative one; of detections the largest of a score, and of 1 - IoU of the best 20.

    Equal scores may come in another order, so a box is looked for among all of its class.
    """
    if "scores" not in wanted:
        return relative_difference(got, wanted)
    if len(got["scores"]) != len(wanted["scores"]):
        return float("inf")
    if not len(wanted["scores"]):
        return 0.0
    worst = (got["scores"] - wanted["scores"]).abs().max().item()
    overlaps = box_iou(wanted["boxes"][:20], got["boxes"])
    overlaps[wanted["labels"][:20, None] != got["labels"]] = 0
    return max(worst, 1 - overlaps.max(1).values.min().item())

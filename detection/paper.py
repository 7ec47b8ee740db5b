"""The ResNet paper's VGG-16 baseline and its improvements of detection (He et al. 2015, appendices A and B)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image, remove_small_boxes

from detection.batch import sizes_of
from detection.cascade import CascadeRoIHeads
from detection.roi_align import PyramidRoIAlign, image_of_each
from detection.roi_heads import SMALLEST_BOX, is_real
from detection.transforms import InputTransform, check_images
from resbackbone import Backbone
from resbackbone.checks import UserError
from resbackbone.weights import read_weights
from resbackbone.weights.fit import fit
from resbackbone.weights.inputs import INPUT, describe_input

REFINEMENT_NMS = 0.3  # IoU, of the union of first and refined predictions
VOTING_IOU = 0.5  # between a box and those that vote on it

# VGG-16, the baseline (Ren et al. 2015)

VGG16_DEPTH = 16
FULLY_CONNECTED = {  # timm's and torchvision's names -> Fast R-CNN's; the last layer, of the classes, is left out
    "pre_logits.fc1": "fc6",
    "pre_logits.fc2": "fc7",
    "classifier.0": "fc6",
    "classifier.3": "fc7",
}


class VGGHead(TwoMLPHead):
    """fc6 and fc7 of VGG-16 on every region, each followed by dropout of one half, as in Fast R-CNN."""

    def forward(self, regions: Tensor) -> Tensor:  # [N, 512, 7, 7] -> [N, 4096]
        x = F.dropout(F.relu(self.fc6(regions.flatten(1))), 0.5, self.training)
        return F.dropout(F.relu(self.fc7(x)), 0.5, self.training)


def build_vgg16_backbone(*, frozen_through: str | None = None) -> Backbone:
    """The 13 convolutions of VGG-16 up to conv5_3, before its last pooling, as level c4 [B, 512, H/16, W/16].

    The weights are random; `load_vgg16` reads trained ones. `frozen_through` is None, "stem" (conv1 and conv2, as in
    Ren et al. 2015), "c2" (conv3 too) .. "c4".
    """
    from resbackbone.adapters.from_timm import TimmBackbone, TimmConfig  # only here: ResNets need no timm

    small = {"mlp_ratio": 0.01}  # of the fully connected layers, which timm makes and drops
    return TimmBackbone(TimmConfig(timm="vgg16", levels=("c4",), frozen_through=frozen_through, options=small))


def load_vgg16(detector: GeneralizedRCNN, source: str) -> None:
    """Load the convolutions, fc6 and fc7 of an ImageNet classifier into a detector of the variant "vgg16".

    `source` is a file with timm's or torchvision's names, torchvision:VGG16_Weights.IMAGENET1K_V1 or
    hf:timm/vgg16.tv_in1k. Raises ValueError if the weights do not fit, expect another input than ours, or are not
    finite, as in torchvision's IMAGENET1K_FEATURES, which has no classifier.
    """
    if source.startswith("timm:"):  # `read_weights` accepts only ResNets under timm's names
        raise UserError(f"weights {source!r}: give torchvision:VGG16_Weights.IMAGENET1K_V1 or hf:timm/vgg16.tv_in1k")
    weights = read_weights(source)
    if weights.metadata.get("input", INPUT) != INPUT:
        raise UserError(f"weights from {source} are made for {describe_input(weights.metadata['input'])}")
    state: dict[str, Tensor] = {}
    for key, tensor in weights.state.items():
        layer, _, leaf = key.rpartition(".")
        if layer in FULLY_CONNECTED:
            name = f"head.{FULLY_CONNECTED[layer]}.{leaf}"
            state[name] = tensor.flatten(1) if leaf == "weight" else tensor  # timm has them as convolutions
        elif layer.startswith("features."):
            state[f"trunk.{layer.replace('.', '_')}.{leaf}"] = tensor
    box_head = detector.roi_heads.box_head
    box_head = box_head.head if isinstance(box_head, ContextHead) else box_head
    network = nn.ModuleDict({"trunk": detector.backbone.network, "head": box_head})
    fit(network, replace(weights, state=state, source=source))
    detector.backbone.weights_source = source


# Global context


class ContextRoIAlign(PyramidRoIAlign):
    """RoIAlign of the regions and of each whole image."""

    def forward(  # type: ignore[override]  # ContextHead takes all three
        self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The regions' features [N, channels, size, size], the images' [B, ..], and the image of each region [N]."""
        whole = list(F.pad(sizes_of(image_shapes, boxes[0]).flip(1), (2, 0))[:, None])  # [1, 4] each, from 0, 0
        regions, images = (super(ContextRoIAlign, self).forward(x, of, image_shapes) for of in (boxes, whole))
        return regions, images, image_of_each(boxes)


class ContextHead(nn.Module):
    """A box head that appends its feature of the whole image to that of each region (He et al. 2015, B)."""

    def __init__(self, head: nn.Module):
        super().__init__()
        self.head = head

    def forward(self, pooled: tuple[Tensor, Tensor, Tensor]) -> Tensor:  # of ContextRoIAlign -> [N, 2 * channels]
        regions, images, image_of_region = pooled
        features, context = self.head(torch.cat((regions, images))).split((regions.shape[0], images.shape[0]))
        return torch.cat((features, context[image_of_region]), 1)


# Testing


class PyramidLevel(NamedTuple):
    """The feature maps of an image at one size."""

    maps: dict[str, Tensor]
    size: tuple[int, int]  # height and width of the image in pixels, without padding
    scale: Tensor  # [4], turns boxes on the image at the detector's own size into boxes at this size


class ImprovedTesting(nn.Module):
    """A detector with the paper's improvements of testing (appendix B), to use in place of the detector.

    scales: shorter sides in pixels of an image pyramid (the paper's: 200, 400, 600, 800, 1000; the longer side is
        limited in proportion). Each region goes through the box head on the two scales where its area is nearest to
        224 x 224 (times the anchors' scale), and its feature is the elementwise maximum (maxout, Ren et al. 2015, NoC).
        Proposals come from the detector's own size; without scales, features do too.
    box_refinement: score and regress again from each proposal's regressed box; the new predictions join the old ones
        before NMS at an IoU of 0.3 and box voting.

    Without either, the detections are bit-identical to the detector's. Global context needs training, so it is part of
    the detector. Raises ValueError if a scale is repeated or not positive, and with either for a cascade.
    """

    def __init__(self, detector: GeneralizedRCNN, *, box_refinement: bool = False, scales: Sequence[int] = ()):
        super().__init__()
        if any(scale < 1 for scale in scales) or len(set(scales)) < len(scales):
            raise UserError(f"scales {', '.join(map(str, scales))}: must be distinct sizes in pixels")
        if (box_refinement or scales) and isinstance(detector.roi_heads, CascadeRoIHeads):
            raise UserError("box_refinement and scales are for one box head; a cascade refines boxes by itself")
        self.detector, self.box_refinement = detector, box_refinement
        own = detector.transform
        self.resizes = nn.ModuleList(
            InputTransform(
                scale,
                own.max_size * scale / own.min_size[-1],
                own.image_mean,
                own.image_std,
                size_divisible=own.size_divisible,
            )
            for scale in scales
        )
        self.eval()

    @property
    def categories(self) -> dict[int, str]:
        return self.detector.categories

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """[3, H, W] RGB floats in 0..1 -> boxes, labels and scores an image."""
        if not (self.box_refinement or self.resizes):
            return self.detector(images)
        check_images(images, self.detector.transform)
        return [self._detect(image) for image in images]

    def _detect(self, image: Tensor) -> dict[str, Tensor]:
        detector = self.detector
        resized, _ = detector.transform([image])
        maps = detector.backbone(resized.tensors)
        (of_image,), _ = detector.rpn(resized, maps)
        proposals = of_image[is_real(of_image)]
        [size] = resized.image_sizes
        own = PyramidLevel(maps, size, proposals.new_ones(4))
        levels = [
            own
            if resize.min_size == detector.transform.min_size
            else self._level(image, cast(InputTransform, resize), size)
            for resize in self.resizes
        ] or [own]
        if self.box_refinement:
            found = self._refined(levels, proposals, size)
        else:
            logits, deltas = self._predict(levels, proposals)
            heads, sizes = detector.roi_heads, sizes_of([size], proposals)
            boxes = heads.decoded(heads.box_coder, deltas, proposals[None], sizes)
            [found] = heads.detections(logits.softmax(-1), boxes, proposals[None]).as_list()
        return detector.transform.postprocess([found], [size], [tuple(image.shape[-2:])])[0]

    def _level(self, image: Tensor, resize: InputTransform, own_size: tuple[int, int]) -> PyramidLevel:
        resized, _ = resize([image])
        [size] = resized.image_sizes
        y, x = (there / here for there, here in zip(size, own_size, strict=True))
        return PyramidLevel(self.detector.backbone(resized.tensors), size, resized.tensors.new_tensor([x, y, x, y]))

    def _predict(self, levels: list[PyramidLevel], boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes [n, 4] at the detector's own size -> class scores before softmax [n, K], box deltas [n, 4 * K]."""
        heads = self.detector.roi_heads
        chosen = _two_scales(boxes, levels, heads.box_roi_pool.canonical_scale)
        features = None
        for i, level in enumerate(levels):
            here = (chosen == i).any(1).nonzero().squeeze(1)
            part = heads.box_head(heads.box_roi_pool(level.maps, [boxes[here] * level.scale], [level.size]))
            if features is None:
                features = part.new_full((len(boxes), part.shape[1]), -torch.inf)
            features[here] = features[here].maximum(part)
        return heads.box_predictor(features)

    def _refined(self, levels: list[PyramidLevel], proposals: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
        heads = self.detector.roi_heads

        def predictions(rois: Tensor) -> tuple[Tensor, Tensor]:  # boxes [n, K, 4], scores [n, K], background left out
            logits, deltas = self._predict(levels, rois)
            boxes = clip_boxes_to_image(heads.box_coder.decode(deltas, [rois]), size)
            return boxes[:, 1:], logits.softmax(1)[:, 1:]

        first = predictions(proposals)
        best = first[1].argmax(1)  # the likeliest class, whose box is refined
        second = predictions(first[0][torch.arange(len(best), device=best.device), best])
        boxes, scores = (torch.cat(pair) for pair in zip(first, second, strict=True))
        return select_and_vote(boxes, scores, score_thresh=heads.score_thresh, count=heads.detections_per_img)


def _two_scales(boxes: Tensor, levels: list[PyramidLevel], side: int) -> Tensor:
    """The two levels, [n, 2], on which each box's area is nearest to side x side; [n, 1] if there is one level."""
    factors = torch.stack([level.scale[0] * level.scale[1] for level in levels])
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)[:, None] * factors
    return (areas - side**2).abs().topk(min(2, len(levels)), dim=1, largest=False).indices


def select_and_vote(boxes: Tensor, scores: Tensor, *, score_thresh: float, count: int) -> dict[str, Tensor]:
    """The `count` best of the boxes [n, K, 4] with scores [n, K] of K classes, labelled 1..K, sorted by score.

    NMS is by class at an IoU of 0.3. The boxes above `score_thresh` then vote on the place of those that remain, from
    an IoU of 0.5 on.
    """
    kept = (scores > score_thresh).nonzero()
    boxes, scores, labels = boxes[kept[:, 0], kept[:, 1]], scores[kept[:, 0], kept[:, 1]], kept[:, 1] + 1
    return nms_and_vote(boxes, scores, labels, nms_iou=REFINEMENT_NMS, voting_iou=VOTING_IOU, count=count)


def nms_and_vote(
    boxes: Tensor, scores: Tensor, labels: Tensor, *, nms_iou: float, voting_iou: float, count: int
) -> dict[str, Tensor]:
    """The `count` best of the boxes [n, 4] after NMS by class, sorted by score, each moved to a weighted mean.

    The mean is of the boxes of its class that overlap it at an IoU of `voting_iou` or more, itself included, weighted
    by their scores (Gidaris & Komodakis 2015). Boxes with a side under `SMALLEST_BOX` pixels are dropped.
    """
    large = remove_small_boxes(boxes, SMALLEST_BOX)
    boxes, scores, labels = boxes[large], scores[large], labels[large]
    best = batched_nms(boxes, scores, labels, nms_iou)[:count]
    voting = (box_iou(boxes[best], boxes) >= voting_iou) & (labels[best, None] == labels)
    weights = (voting * scores.clamp(min=torch.finfo(scores.dtype).eps))[..., None]  # a score may be 0
    voted = (weights * boxes).sum(1) / weights.sum(1)  # no matrix product: autocast would round it to bf16
    return {"boxes": voted, "labels": labels[best], "scores": scores[best]}

"""The second stage of Faster R-CNN (Ren et al. 2015; Girshick 2015, Fast R-CNN, Sec. 2) over a batch of regions."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads

from detection.batch import Targets, needed, pad_boxes, sizes_of
from detection.boxes import BoxCoder, best_of, box_loss, clip, gather_boxes, is_large, matched_offsets
from detection.cells import at_least_fp32
from detection.matching import BACKGROUND, match_with
from detection.nms import nms_sorted
from detection.patches import is_as_built
from detection.sampling import sample

SMALLEST_BOX = 0.01  # pixels; smaller ones are dropped, as torchvision does
NO_LOSS = -100  # the label of a place without a region


class Detections(NamedTuple):
    """Detections of B images by falling score; from `counts` on boxes, scores and labels are 0."""

    boxes: Tensor  # [B, N, 4], x1 y1 x2 y2 in pixels of the resized images
    scores: Tensor  # [B, N]
    labels: Tensor  # int64 [B, N], 1 and above
    counts: Tensor  # int64 [B]

    def as_list(self) -> list[dict[str, Tensor]]:
        """Each image's, as torchvision returns them. It waits for the GPU, once."""
        ends = zip(*self[:3], self.counts.tolist(), strict=True)
        return [{"boxes": boxes[:n], "labels": labels[:n], "scores": scores[:n]} for boxes, scores, labels, n in ends]


class BatchedRoIHeads(RoIHeads):
    """torchvision's RoIHeads with the same losses and detections, without loops over images.

    In training each image has `fg_bg_sampler.batch_size_per_image` regions. Where it has too few candidates, regions
    that were drawn are repeated, so that a norm's statistics are those of real regions, and the losses leave them out.

    Where a part has been exchanged or patched, so that this would compute something else, and with mask or keypoint
    heads, torchvision's own forward runs.
    """

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        theirs: Any = self.box_coder  # type: ignore[has-type]
        self.box_coder = BoxCoder(theirs.weights)

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: Tensor | list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: Targets | list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Maps, proposals [B, K, 4] in pixels (those without a size are none), images' (H, W) and targets -> detections
        and losses, one of them empty."""
        proposals, targets = pad_boxes(proposals), None if targets is None else Targets.of(targets)
        if not self.is_as_built():
            of_images = [boxes[real] for boxes, real in zip(proposals, is_real(proposals), strict=True)]
            return super().forward(features, of_images, image_shapes, None if targets is None else targets.as_list())
        if self.training and targets is not None:
            return [], self.losses(features, proposals, image_shapes, targets)
        return self.detect(features, proposals, image_shapes).as_list(), {}

    @torch.compiler.assume_constant_result
    def is_as_built(self) -> bool:
        return is_as_built(self, RoIHeads) and not self.has_mask() and not self.has_keypoint()

    def losses(self, features, proposals: Tensor, image_shapes, targets: Targets) -> dict[str, Tensor]:
        """The losses of the box head (Girshick 2015, eq. 1), as means over the sampled regions."""
        regions, labels, offsets = self._sampled(proposals, targets)
        logits, deltas = self.predict(features, regions, image_shapes)
        number = (labels != NO_LOSS).sum().clamp(min=1)
        error = F.cross_entropy(logits, labels.flatten(), ignore_index=NO_LOSS, reduction="sum")
        most = offsets.shape[1]  # positives have the first places
        classes = labels[:, :most].clamp(min=0)
        of_class = deltas.view(*labels.shape, -1, 4)[:, :most].gather(2, classes[..., None, None].expand(-1, -1, -1, 4))
        deviation = box_loss(of_class.squeeze(2), offsets, labels[:, :most] > 0)
        return {"loss_classifier": error / number, "loss_box_reg": deviation / number}

    def predict(self, features, regions: Tensor, image_shapes) -> tuple[Tensor, Tensor]:
        """Regions [B, R, 4] -> class scores before softmax [B * R, K + 1] and box deltas [B * R, 4 * (K + 1)]."""
        return self.box_predictor(self.box_head(self.box_roi_pool(features, list(regions), image_shapes)))

    def detect(self, features, proposals: Tensor, image_shapes) -> Detections:
        """Maps and proposals -> the detections of every image, in as many places for each."""
        logits, deltas = self.predict(features, proposals, image_shapes)
        return self.detections(logits, deltas, proposals, sizes_of(image_shapes, proposals))

    @torch.no_grad()
    def _sampled(self, proposals: Tensor, targets: Targets) -> tuple[Tensor, Tensor, Tensor]:
        """Regions [B, R, 4], their labels [B, R], and the offsets to the boxes of those with a positive's place."""
        boxes = targets.boxes.to(proposals.dtype)
        candidates = torch.cat((proposals, boxes), 1)
        matches = match_with(self.proposal_matcher, targets, candidates)
        labels = targets.labels.gather(1, matches.clamp(min=0))
        labels = labels.masked_fill(matches == BACKGROUND, 0).masked_fill_(matches < BACKGROUND, -1)
        labels = labels.masked_fill_(~is_real(candidates), -1)
        sampler = self.fg_bg_sampler
        index, drawn, most = sample(labels, sampler.batch_size_per_image, sampler.positive_fraction)
        places = needed(drawn.sum(1), drawn.shape[1])
        index, drawn, most = index[:, :places], drawn[:, :places], min(most, places)
        place = torch.arange(places, device=index.device)
        index = index.gather(1, place % drawn.sum(1, keepdim=True).clamp(min=1))  # drawn ones again
        regions, labels = gather_boxes(candidates, index), labels.gather(1, index).masked_fill(~drawn, NO_LOSS)
        of_places = matches.gather(1, index[:, :most])
        offsets = matched_offsets(self.box_coder, boxes, of_places, regions[:, :most], labels[:, :most] > 0)
        return regions, labels, offsets

    def detections(self, logits: Tensor, deltas: Tensor, proposals: Tensor, sizes: Tensor) -> Detections:
        """The best `detections_per_img` boxes of each image: those that score enough and survive NMS in their class.

        logits [B * R, K + 1] and deltas [B * R, 4 * (K + 1)] of proposals [B, R, 4]; heights and widths [B, 2].
        """
        images, regions = proposals.shape[:2]
        scores = logits.softmax(-1).view(images, regions, -1)[..., 1:]  # without background
        boxes = self.box_coder.decode_single(deltas, proposals.flatten(0, 1))
        boxes = clip(boxes.view(images, regions, -1, 4)[:, :, 1:], sizes[:, None, None])
        good = (scores > self.score_thresh) & is_large(boxes, SMALLEST_BOX) & is_real(proposals)[..., None]
        scores = scores.masked_fill(~good, -1)
        falling, order = scores.transpose(1, 2).sort(dim=2, descending=True, stable=True)  # each class's regions
        lists = gather_boxes(boxes.transpose(1, 2).flatten(0, 1), order.flatten(0, 1))  # [B * K, R, 4]
        kept = nms_sorted(lists, falling.flatten(0, 1) >= 0, self.nms_thresh).view_as(falling)
        kept = torch.zeros_like(kept).scatter(2, order, kept).transpose(1, 2)  # [B, R, K]
        best, index = best_of(scores.masked_fill(~kept, -1).flatten(1), self.detections_per_img, in_order=True)
        found = best >= 0
        index = index.where(found, 0)
        return Detections(
            gather_boxes(boxes.flatten(1, 2), index).where(found[..., None], 0),
            best.where(found, 0),
            (index % boxes.shape[2] + 1).where(found, 0),
            found.sum(1),
        )


def is_real(proposals: Tensor) -> Tensor:
    """Whether each of the proposals [.., 4] has a size; those that fill up the tensor of a batch have none."""
    return (proposals[..., 2:] > proposals[..., :2]).all(-1)


class FP32Predictor(FastRCNNPredictor):
    """Class scores and box deltas in fp32 or better, since bf16 resolves 1000 pixels to 4 only."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores, deltas = super().forward(x)
        return at_least_fp32(scores), at_least_fp32(deltas)

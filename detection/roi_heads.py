"""The second stage of Faster R-CNN (Ren et al. 2015; Girshick 2015, Fast R-CNN, Sec. 2) over a batch of regions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads

from detection.batch import Targets, needed, pad_boxes, sizes_of
from detection.boxes import BoxCoder, best_of, box_loss, clip, gather_boxes, is_large
from detection.cells import at_least_fp32
from detection.matching import BACKGROUND, match_with
from detection.nms import nms_sorted
from detection.patches import is_as_built
from detection.sampling import sample
from resbackbone.checks import UserError

Pool = Callable[[Tensor], Any]  # regions [B, R, 4] in pixels -> what a box head takes of them, [B * R, ..]
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

    box_loss, box_loss_weight: of `DetectorConfig`.

    Where a part has been exchanged or patched, so that this would compute something else, and with mask or keypoint
    heads, torchvision's own forward runs. Raises UserError if that does not know the loss.
    """

    def __init__(self, *arguments, box_loss: str = "smooth_l1", box_loss_weight: float = 1.0, **options):
        super().__init__(*arguments, **options)
        theirs: Any = self.box_coder  # type: ignore[has-type]
        self.box_coder = BoxCoder(theirs.weights)
        self.box_loss, self.box_loss_weight = box_loss, box_loss_weight

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
            self._check_torchvisions()
            of_images = [boxes[real] for boxes, real in zip(proposals, is_real(proposals), strict=True)]
            return super().forward(features, of_images, image_shapes, None if targets is None else targets.as_list())

        def pool(regions: Tensor) -> Any:
            return self.box_roi_pool(features, list(regions), image_shapes)

        sizes = sizes_of(image_shapes, proposals)
        if self.training and targets is not None:
            return [], self.losses(pool, proposals, sizes, targets)
        return self.detect(pool, proposals, sizes).as_list(), {}

    @torch.compiler.assume_constant_result
    def is_as_built(self) -> bool:
        return is_as_built(self, RoIHeads) and not self.has_mask() and not self.has_keypoint()

    def _check_torchvisions(self) -> None:
        """Raise UserError if torchvision's own forward would compute something else than was asked for."""
        if self.training and (self.box_loss, self.box_loss_weight) != ("smooth_l1", 1.0):
            raise UserError(
                f"the box heads were changed or patched, so torchvision's own code runs, which has no box_loss="
                f"{self.box_loss!r} and box_loss_weight={self.box_loss_weight}: undo the change, or build without these"
            )

    def losses(self, pool: Pool, proposals: Tensor, sizes: Tensor, targets: Targets) -> dict[str, Tensor]:
        """The losses of the box head on proposals [B, K, 4] of images of heights and widths [B, 2]."""
        regions, labels, truth = self._sampled(proposals, targets)
        logits, deltas = self.box_predictor(self.box_head(pool(regions)))
        classifier, box = self._losses_of(self.box_coder, logits, deltas, regions, labels, truth)
        return {"loss_classifier": classifier, "loss_box_reg": box}

    def _losses_of(
        self, coder: BoxCoder, logits: Tensor, deltas: Tensor, regions: Tensor, labels: Tensor, truth: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The losses of class and box (Girshick 2015, eq. 1), as means over the regions [B, R, 4] with labels [B, R].

        logits [B * R, K + 1], deltas [B * R, 4 * (K + 1)], or [B * R, 4] for all classes; truth [B, n, 4] of the first
        n regions of each image, among which are all that have an object.
        """
        number = (labels != NO_LOSS).sum().clamp(min=1)
        error = F.cross_entropy(logits, labels.flatten(), ignore_index=NO_LOSS, reduction="sum")
        regions, deltas = regions[:, : truth.shape[1]], deltas.view(*labels.shape, -1, 4)[:, : truth.shape[1]]
        labels = labels[:, : truth.shape[1]]
        if deltas.shape[2] > 1:
            deltas = deltas.gather(2, labels.clamp(min=0)[..., None, None].expand(-1, -1, -1, 4))
        deviation = box_loss(coder, deltas.squeeze(2), regions, truth, labels > 0, self.box_loss)
        return error / number, self.box_loss_weight * deviation / number

    def detect(self, pool: Pool, proposals: Tensor, sizes: Tensor) -> Detections:
        """The detections of every image on its proposals, in as many places for each."""
        logits, deltas = self.box_predictor(self.box_head(pool(proposals)))
        boxes = self.decoded(self.box_coder, deltas, proposals, sizes)
        return self.detections(logits.softmax(-1), boxes, proposals)

    def decoded(self, coder: BoxCoder, deltas: Tensor, regions: Tensor, sizes: Tensor) -> Tensor:
        """Deltas [B * R, 4 * k] from regions [B, R, 4] -> boxes in the images [B, R, k, 4]."""
        boxes = coder.decode_single(deltas, regions.flatten(0, 1))
        return clip(boxes.view(*regions.shape[:2], -1, 4), sizes[:, None, None])

    @torch.no_grad()
    def _sampled(self, proposals: Tensor, targets: Targets) -> tuple[Tensor, Tensor, Tensor]:
        """Regions [B, R, 4], their labels [B, R], and the ground truth of those with a positive's place [B, n, 4]."""
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
        return regions, labels, gather_boxes(boxes, matches.gather(1, index[:, :most]).clamp(min=0))

    def detections(self, scores: Tensor, boxes: Tensor, proposals: Tensor) -> Detections:
        """The best `detections_per_img` boxes of each image: those that score enough and survive NMS in their class.

        scores [B * R, K + 1] after softmax and boxes [B, R, K + 1, 4], or [B, R, 1, 4] for all classes, of proposals
        [B, R, 4].
        """
        scores = scores.view(*proposals.shape[:2], -1)[..., 1:]  # without background
        boxes = boxes[:, :, 1:] if boxes.shape[2] > 1 else boxes.expand(-1, -1, scores.shape[2], -1)
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

    def __init__(self, in_channels: int, num_classes: int, *, boxes: int | None = None):
        """num_classes: with background. boxes: of each region, 1 for all classes; by default one a class."""
        super().__init__(in_channels, num_classes)
        if boxes is not None:
            self.bbox_pred = nn.Linear(in_channels, 4 * boxes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores, deltas = super().forward(x)
        return at_least_fp32(scores), at_least_fp32(deltas)

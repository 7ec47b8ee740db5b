"""Cascade R-CNN (Cai and Vasconcelos 2018): box heads one after the other, each on the boxes of the one before."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from detection.batch import Targets
from detection.boxes import BoxCoder, gather_boxes
from detection.matching import match
from detection.roi_heads import NO_LOSS, BatchedRoIHeads, Detections, Pool, is_real
from resbackbone.checks import UserError


class CascadeRoIHeads(BatchedRoIHeads):
    """The stages of a Cascade R-CNN over one RoI pool, as in detectron2's CascadeROIHeads, over a batch.

    `box_head` and `box_predictor` are lists with a module for each of `ious`. Regions are sampled for the first stage
    only; later ones have its boxes, matched again at their own IoU. Predictors give one box for all classes.

    torchvision has no cascade: where a part has been exchanged or patched, `forward` raises UserError.
    """

    def __init__(self, *arguments, ious: tuple[float, ...], **options):
        super().__init__(*arguments, **options)
        self.ious = ious

    def _check_torchvisions(self) -> None:
        raise UserError(
            "the box heads of a cascade were changed or patched, and torchvision's own code, which runs then, has no "
            "cascade: undo the change, or build the detector without cascade_ious"
        )

    def stages(self) -> Iterator[tuple[Any, Any, BoxCoder]]:
        """Box head, predictor and box coder of each stage; later ones have finer deltas (Sec. 4.2 of the paper).

        Raises UserError if modules that are no stages have taken the place of the built ones.
        """
        number = len(self.ious)
        lists = all(isinstance(x, nn.ModuleList) and len(x) == number for x in (self.box_head, self.box_predictor))
        layers = [getattr(predictor, "bbox_pred", None) for predictor in self.box_predictor] if lists else []
        if not lists or any(getattr(layer, "out_features", 4) != 4 for layer in layers):
            raise UserError(
                f"a cascade of {number} stages has lists of {number} modules as roi_heads.box_head and "
                "roi_heads.box_predictor, and predictors with one box for all classes (bbox_pred of 4 outputs); "
                "detection.saved.retarget_detector builds those for other classes"
            )
        for i, (head, predictor) in enumerate(zip(self.box_head, self.box_predictor, strict=True), 1):
            yield head, predictor, BoxCoder(tuple(i * weight for weight in self.box_coder.weights))

    def losses(self, pool: Pool, proposals: Tensor, sizes: Tensor, targets: Targets) -> dict[str, Tensor]:
        """The losses of all stages: `loss_classifier_0`, `loss_box_reg_0`, .."""
        regions, labels, truth = self._sampled(proposals, targets)
        share = 1 / len(self.ious)
        losses: dict[str, Tensor] = {}
        for i, (head, predictor, coder) in enumerate(self.stages()):
            pooled = pool(regions)
            # The values stay. The gradient falls, since as many stages as there are add theirs to the features.
            logits, deltas = predictor(head(torch.lerp(pooled.detach(), pooled, share)))
            classifier, box = self._losses_of(coder, logits, deltas, regions, labels, truth)
            losses |= {f"loss_classifier_{i}": classifier, f"loss_box_reg_{i}": box}
            if i + 1 < len(self.ious):
                boxes = self.decoded(coder, deltas.detach(), regions, sizes).squeeze(2)
                real = is_real(boxes)
                regions = boxes.where(real[..., None], regions)  # a norm's statistics are those of real regions
                labels, truth = self._matched(self.ious[i + 1], regions, real & (labels != NO_LOSS), targets)
        return losses

    @torch.no_grad()
    def _matched(self, iou: float, regions: Tensor, used: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
        """Labels [B, R] and ground truth [B, R, 4] of a later stage's regions [B, R, 4]; labels of those `used`."""
        matches = match(targets.boxes, targets.real, regions, iou, iou, every_box=False)
        index = matches.clamp(min=0)
        labels = targets.labels.gather(1, index).masked_fill(matches < 0, 0).masked_fill(~used, NO_LOSS)
        return labels, gather_boxes(targets.boxes.to(regions.dtype), index)

    def detect(self, pool: Pool, proposals: Tensor, sizes: Tensor) -> Detections:
        """Detections with the boxes of the last stage and the mean of all stages' scores."""
        regions, scores = proposals, []
        for head, predictor, coder in self.stages():
            logits, deltas = predictor(head(pool(regions)))
            scores.append(logits.softmax(-1))
            regions = self.decoded(coder, deltas, regions, sizes).squeeze(2)
        return self.detections(torch.stack(scores).mean(0), regions[:, :, None], proposals)

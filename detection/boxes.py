"""torchvision's box arithmetic with the same results, but without sending constants to the GPU."""

from typing import Any

import torch
from torch import Tensor
from torchvision.ops import boxes as box_ops

from detection.patches import is_patched, utils

TorchvisionBoxCoder: Any = utils.BoxCoder
TorchvisionMatcher: Any = utils.Matcher

MOST_AT_ONCE = 25_000  # boxes; with more, torchvision goes through the groups one by one


class BoxCoder(TorchvisionBoxCoder):
    """Boxes to offsets from reference boxes and back (Ren et al. 2015, eq. 2)."""

    def encode_single(self, reference_boxes: Tensor, proposals: Tensor) -> Tensor:
        """Ground truth and proposals, [n, 4] x1 y1 x2 y2 each -> offsets [n, 4]."""
        if is_patched():
            return super().encode_single(reference_boxes, proposals)
        return utils.encode_boxes(reference_boxes, proposals, self.weights)

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        """Offsets [n, 4 k] from boxes [n, 4] -> boxes [n, 4 k]."""
        if is_patched():
            return super().decode_single(rel_codes, boxes)
        boxes = boxes.to(rel_codes.dtype)
        sizes = boxes[:, 2:] - boxes[:, :2]
        centres, sizes = (boxes[:, :2] + 0.5 * sizes)[:, None], sizes[:, None]  # [n, 1, 2]
        x, y, w, h = (rel_codes[:, i::4] / weight for i, weight in enumerate(self.weights))
        centres = torch.stack((x, y), 2) * sizes + centres  # [n, k, 2]
        halves = 0.5 * (torch.stack((w, h), 2).clamp(max=self.bbox_xform_clip).exp() * sizes)
        return torch.cat((centres - halves, centres + halves), 2).flatten(1)


class Matcher(TorchvisionMatcher):
    """Matches each anchor with a ground truth box (Ren et al. 2015, Sec. 3.1.2)."""

    def set_low_quality_matches_(self, matches: Tensor, all_matches: Tensor, match_quality_matrix: Tensor) -> None:
        """Keep, in `matches` [m], each ground truth box's best anchors, whatever their IoU (matrix [n, m])."""
        if is_patched():
            super().set_low_quality_matches_(matches, all_matches, match_quality_matrix)
            return
        best = match_quality_matrix == match_quality_matrix.amax(1, keepdim=True)
        matches.copy_(torch.where(best.any(0), all_matches, matches))


def nms_in_groups(boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float) -> Tensor:
    """torchvision's batched_nms: boxes [n, 4] suppress only those of their group [n]; indices by falling score."""
    if _on_cpu(boxes) or is_patched() or not 0 < len(boxes) <= MOST_AT_ONCE:
        return box_ops.batched_nms(boxes, scores, groups, iou_threshold)
    apart = groups.to(boxes) * (boxes.max() + 1)
    return box_ops.nms(boxes + apart[:, None], scores, iou_threshold)


def _on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"

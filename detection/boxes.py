"""torchvision's box arithmetic with the same results, but without sending constants to the GPU."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from detection.patches import is_patched, utils

MIN_BOX_SIDE = 1.0  # pixels; smaller boxes teach a detector nothing and vanish when the image is resized
TorchvisionBoxCoder: Any = utils.BoxCoder


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


def matched_offsets(coder: BoxCoder, truth: Tensor, matches: Tensor, around: Tensor, positive: Tensor) -> Tensor:
    """Offsets from `around` [B, n, 4] to the boxes of `truth` [B, G, 4] at `matches` [B, n]; 0 where not `positive`.

    There they may be those to a padding box, which are not finite.
    """
    boxes = gather_boxes(truth, matches.clamp(min=0))
    offsets = coder.encode_single(boxes.flatten(0, 1), around.flatten(0, 1)).view_as(boxes)
    return offsets.where(positive[..., None], 0)


def box_loss(found: Tensor, offsets: Tensor, positive: Tensor) -> Tensor:
    """The sum of smooth L1 (Girshick 2015, eq. 3, from 1/9) over the `positive` [B, n] of two offsets [B, n, 4]."""
    deviation = F.smooth_l1_loss(found, offsets, beta=1 / 9, reduction="none")
    return deviation.where(positive[..., None], 0).sum()


def best_of(scores: Tensor, count: int, *, in_order: bool = False) -> tuple[Tensor, Tensor]:
    """The `count` highest scores of each row [B, N], falling, and their indices, [B, count] each.

    Where N is less than `count`, the places left over have a score of -inf and the indices from N on. in_order: of
    equal scores the first one comes first, as in torchvision's NMS; a compiled or exported graph leaves it open.
    """
    compiled = torch.compiler.is_compiling()
    if compiled or count > scores.shape[1]:  # in a graph for any N, without a case of its own
        scores = F.pad(scores, (0, count), value=-torch.inf)
    if in_order and not compiled:
        falling, index = scores.sort(dim=1, descending=True, stable=True)
        return falling[:, :count], index[:, :count]
    return scores.topk(count, 1)


def gather_boxes(boxes: Tensor, index: Tensor) -> Tensor:
    """boxes [B, N, 4] at index [B, n] -> [B, n, 4]."""
    return boxes.gather(1, index[..., None].expand(-1, -1, 4))


def clip(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Boxes [.., 4], x1 y1 x2 y2, cut at the borders of their images, whose heights and widths are `sizes` [.., 2]."""
    width_height = sizes.flip(-1)
    return boxes.clamp(min=0).minimum(torch.cat((width_height, width_height), -1))


def is_large(boxes: Tensor, side: float) -> Tensor:
    """Whether both sides of boxes [.., 4] have at least `side` pixels."""
    return (boxes[..., 2:] - boxes[..., :2] >= side).all(-1)

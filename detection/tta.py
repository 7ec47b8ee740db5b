"""Test-time augmentation: detect at several sizes and mirrored, and merge what was found."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import clip_boxes_to_image

from detection.paper import VOTING_IOU, nms_and_vote
from detection.transforms import check_images
from resbackbone.checks import UserError

SMALLEST = 32  # pixels; on fewer, nothing can be seen, and images may be left without a pixel
EIGHTHS = range(4, 13)  # of the detector's own size; for 800 pixels detectron2's 400, 500, .. 1200


class TestTimeAugmentation(nn.Module):
    """A detector on every image at each of `sizes` and, with `flip`, mirrored too; to use in place of the detector.

    sizes: shorter sides in pixels, at least 32 or the detector's own size if that is smaller; the longer side is
        limited in proportion. Default: 4/8, 5/8, .. 12/8 of the detector's own size, which costs ten times as much as
        detecting once, twenty with flip.

    The detections of all versions go through NMS at the detector's threshold, and those of a class that overlap a
    remaining one at an IoU of 0.5 (or at that threshold if it is larger) vote on its place (`nms_and_vote`). At the
    detector's own size without flip, the detections are bit-identical to the detector's.

    `detector` is any of this package or torchvision: [3, H, W] RGB floats in 0..1 -> boxes, labels and scores an image;
    masks and keypoints are left out, and so are gradients. Raises UserError if `sizes` are not whole numbers, repeated
    or too small, or if the detector resizes every image to one fixed size (SSD) and sizes are given.
    """

    __test__ = False  # pytest takes a class of this name for tests

    def __init__(self, detector: Any, sizes: Sequence[int] = (), flip: bool = True):
        super().__init__()
        own = detector.transform.min_size[-1]
        least = min(SMALLEST, own)
        whole = isinstance(sizes, Sequence) and all(isinstance(size, Integral) and size >= least for size in sizes)
        if not whole or len(set(sizes)) < len(sizes):
            given = str(sizes).strip("()[],")
            raise UserError(f"{given}: sizes must be a list of distinct whole numbers of at least {least} pixels")
        if detector.transform.fixed_size is not None:
            if sizes:
                raise UserError(f"{', '.join(map(str, sizes))}: this detector has one fixed size; leave sizes out")
            sizes = (own,)
        self.detector, self.flip = detector, flip
        self.sizes = tuple(sizes) or tuple(dict.fromkeys(max(least, own * part // 8) for part in EIGHTHS))
        self.eval()

    @property
    def categories(self) -> dict[int, str] | None:
        """The detector's; torchvision's have none."""
        return getattr(self.detector, "categories", None)

    @torch.no_grad()
    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """[3, H, W] RGB floats in 0..1 -> boxes, labels and scores an image, sorted by score."""
        check_images(images, self.detector.transform)
        versions = [found for size in self.sizes for found in self._detect(images, size)]
        if len(versions) == 1:
            return versions[0]
        heads = getattr(self.detector, "roi_heads", self.detector)
        iou, count = heads.nms_thresh, heads.detections_per_img
        merged = [
            nms_and_vote(
                *(torch.cat([found[name] for found in of_image]) for name in ("boxes", "scores", "labels")),
                nms_iou=iou,
                voting_iou=max(VOTING_IOU, iou),
                count=count,
            )
            for of_image in zip(*versions, strict=True)
        ]
        for found, image in zip(merged, images, strict=True):  # rounding puts boxes at the border outside
            found["boxes"] = clip_boxes_to_image(found["boxes"], image.shape[-2:])
        return merged

    def _detect(self, images: list[Tensor], size: int) -> list[list[dict[str, Tensor]]]:
        """The detections on the images at this size and, with flip, those on the mirrored ones, mirrored back."""
        with resizing_to(size, self.detector.transform):
            found = self.detector(images)
            if not self.flip:
                return [found]
            mirrored = self.detector([image.flip(-1) for image in images])
        for of_image, image in zip(mirrored, images, strict=True):
            of_image["boxes"] = mirror(of_image["boxes"], image.shape[-1])
        return [found, mirrored]


def mirror(boxes: Tensor, width: int) -> Tensor:
    """Boxes [n, 4] x1 y1 x2 y2 on an image of this width -> on its mirror image."""
    x1, y1, x2, y2 = boxes.unbind(1)
    return torch.stack((width - x2, y1, width - x1, y2), 1)


@contextmanager
def resizing_to(size: int, transform: GeneralizedRCNNTransform) -> Iterator[None]:
    """The detector's transform resizes images to this shorter side in pixels, and limits the longer in proportion."""
    own = transform.min_size, transform.max_size
    if size != own[0][-1]:
        transform.min_size, transform.max_size = (size,), own[1] * size / own[0][-1]
    try:
        yield
    finally:
        transform.min_size, transform.max_size = own

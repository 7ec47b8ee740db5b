"""Detection over the backbones: `build_faster_rcnn` turns one into a Faster R-CNN."""

from resbackbone.checks import require
from resbackbone.compat import check_torchvision

check_torchvision()
require("detection", "hotcoco", "msgspec", "pycocotools", "simplejpeg", "yaml", user="detection")

from detection.faster_rcnn import build_faster_rcnn  # noqa: E402 - after the check
from detection.saved import load_detector, save_detector  # noqa: E402 - after the check

__all__ = ["build_faster_rcnn", "load_detector", "save_detector"]

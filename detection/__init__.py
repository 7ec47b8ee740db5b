"""Detection over the backbones: `build_faster_rcnn` turns one into a Faster R-CNN."""

from detection.faster_rcnn import build_faster_rcnn, load_detector, save_detector

__all__ = ["build_faster_rcnn", "load_detector", "save_detector"]

"""ResNet backbones for detection: `build_resnet_backbone` gives an image's feature maps at several scales."""

from resbackbone.backbone import Backbone, ResNetBackbone, build_resnet_backbone
from resbackbone.classifier import build_resnet_classifier
from resbackbone.config import BackboneConfig
from resbackbone.resnet import Feature

__all__ = [
    "Backbone",
    "BackboneConfig",
    "Feature",
    "ResNetBackbone",
    "build_resnet_backbone",
    "build_resnet_classifier",
]
__version__ = "0.1.0"

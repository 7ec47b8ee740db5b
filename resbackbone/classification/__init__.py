"""Labelled images: ImageNet and CIFAR-10, their augmentation, the training recipes, and testing."""

from resbackbone.checks import require
from resbackbone.compat import check_torchvision

check_torchvision()
require("train", "simplejpeg", "timm", user="resbackbone.classification")

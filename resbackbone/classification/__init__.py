"""Labelled images: ImageNet and CIFAR-10, their augmentation, the training recipes, and testing."""

from resbackbone.checks import require

require("train", "simplejpeg", "timm", user="resbackbone.classification")

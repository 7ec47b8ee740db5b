"""Labelled images: ImageNet and CIFAR-10, their augmentation, the training recipes, and testing."""

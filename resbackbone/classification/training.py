"""The loss of a classifier on mixed images."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy
from torch import Tensor, nn

from resbackbone.classification.recipes import Recipe


def build_loss(recipe: Recipe, num_classes: int) -> Callable[[nn.Module, Tensor, Tensor], Mapping[str, Tensor]]:
    """(model, images [B, 3, H, W], labels [B]) -> {"loss_class": scalar}, with the recipe's mixing and smoothing.

    Mixup and CutMix are timm's: one draw a batch, from torch's random state. They need an even number of images and
    write into `images`.
    """
    mixes = recipe.mixup > 0 or recipe.cutmix > 0
    mix = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.smoothing, num_classes=num_classes)
    smoothing = 0.0 if mixes else recipe.smoothing  # Mixup smooths the labels itself
    criterion: nn.Module
    if recipe.bce:
        criterion = BinaryCrossEntropy(smoothing=smoothing, target_threshold=recipe.bce_threshold)
    else:
        criterion = nn.CrossEntropyLoss(label_smoothing=smoothing)

    def losses(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        if mixes:
            np.random.seed(int(torch.randint(2**31, ())))  # timm's Mixup draws from numpy
            images, labels = mix(images, labels)
        return {"loss_class": criterion(model(images).float(), labels)}

    return losses

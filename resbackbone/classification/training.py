"""What a training update of a classifier is made of: mixed images, the loss, the average of the weights."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from resbackbone.classification.recipes import Recipe

EMA_WINDOW = 0.039  # of the run: torchvision's v2, a decay of 0.99998 adjusted to its 600 epochs of 1024 images


def build_loss(model: nn.Module, recipe: Recipe, num_classes: int) -> Callable[[Tensor, Tensor], Mapping[str, Tensor]]:
    """(images [B, 3, H, W], labels [B]) -> {"loss_class": scalar} of `model`, as the recipe mixes and counts.

    Mixup and CutMix are timm's, one draw a batch, and take an even number of images. What they draw follows from
    torch's random state, as everything in a step does; they write into `images`.
    """
    mixes = recipe.mixup > 0 or recipe.cutmix > 0
    mix = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.smoothing, num_classes=num_classes)
    smoothing = 0.0 if mixes else recipe.smoothing  # mixed labels are smooth already
    criterion: nn.Module
    if recipe.bce:
        criterion = BinaryCrossEntropy(smoothing=smoothing, target_threshold=recipe.bce_threshold)
    else:
        criterion = nn.CrossEntropyLoss(label_smoothing=smoothing)

    def losses(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        if mixes:
            np.random.seed(int(torch.randint(2**31, ())))  # which is what timm's Mixup draws from
            images, labels = mix(images, labels)
        return {"loss_class": criterion(model(images).float(), labels)}

    return losses


def build_average(model: nn.Module, steps: int, warmup_steps: int) -> ModelEmaV3:
    """The exponential moving average of a network's weights and statistics, as timm keeps it; `.module` is a network.

    Its window is a fixed share of a run of `steps`, so that it follows the length of the training, and it starts when
    the rate has warmed up. To be told `update(model, step=state.step)` after every update.
    """
    decay = max(0.0, 1 - 1 / (EMA_WINDOW * steps))
    return ModelEmaV3(model, decay=decay, update_after_step=warmup_steps)

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from resbackbone.classification.recipes import RECIPES
from resbackbone.classification.training import build_loss

HARD = replace(RECIPES["a3"], mixup=0, cutmix=0, bce=False)


class Fixed(nn.Module):
    """Gives the logits it was given, and keeps what it saw."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, images):
        self.saw = images.clone()
        return self.logits


@pytest.fixture
def batch():
    return torch.randn(4, 3, 9, 7), torch.tensor([0, 2, 1, 2])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_without_mixing_it_is_the_cross_entropy_with_smoothed_labels(batch, smoothing):
    images, labels = batch
    model = Fixed(torch.randn(4, 3))
    loss = build_loss(replace(HARD, smoothing=smoothing), 3)(model, images, labels)["loss_class"]
    target = (1 - smoothing) * F.one_hot(labels, 3) + smoothing / 3
    torch.testing.assert_close(loss, -(target * model.logits.log_softmax(1)).sum(1).mean())
    assert torch.equal(model.saw, images)


def test_the_binary_cross_entropy_counts_each_class_for_itself(batch):
    model = Fixed(torch.randn(4, 3))
    loss = build_loss(replace(HARD, bce=True), 3)(model, *batch)["loss_class"]
    right, wrong = F.logsigmoid(model.logits), F.logsigmoid(-model.logits)
    torch.testing.assert_close(loss, -torch.where(F.one_hot(batch[1], 3) > 0, right, wrong).mean())


def test_mixup_blends_images_and_labels_in_one_proportion(batch):
    images, labels = batch
    model = Fixed(torch.randn(4, 3))
    loss = build_loss(replace(HARD, mixup=1.0), 3)(model, images.clone(), labels)["loss_class"]
    share = ((model.saw - images.flip(0)) / (images - images.flip(0))).median()  # the same at every pixel
    torch.testing.assert_close(model.saw, share * images + (1 - share) * images.flip(0), atol=1e-4, rtol=1e-3)
    assert 0.01 < share < 0.99
    target = share * F.one_hot(labels, 3) + (1 - share) * F.one_hot(labels.flip(0), 3)
    torch.testing.assert_close(loss, -(target * model.logits.log_softmax(1)).sum(1).mean(), atol=1e-4, rtol=1e-3)


def test_over_the_threshold_both_classes_of_a_mixed_image_count_fully(batch):
    images, labels = batch[0], torch.tensor([0, 1, 2, 0])
    model = Fixed(torch.randn(4, 3))
    recipe = replace(HARD, cutmix=1.0, bce=True, bce_threshold=0.2)
    for seed in range(20):
        torch.manual_seed(seed)
        loss = build_loss(recipe, 3)(model, images.clone(), labels)["loss_class"]
        share = (model.saw == images).float().mean()
        if 0.25 < share < 0.75:
            break
    target = torch.maximum(F.one_hot(labels, 3), F.one_hot(labels.flip(0), 3))
    torch.testing.assert_close(
        loss, -torch.where(target > 0, F.logsigmoid(model.logits), F.logsigmoid(-model.logits)).mean()
    )


def test_what_is_mixed_follows_from_the_random_state_of_torch(batch):
    images, labels = batch
    model = Fixed(torch.zeros(4, 3))
    losses = build_loss(replace(HARD, mixup=0.5, cutmix=1.0), 3)
    seen = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        losses(model, images.clone(), labels)
        seen.append(model.saw)
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])

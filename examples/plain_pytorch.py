"""The backbone in your own network, trained by a plain PyTorch loop to locate a square in an image.

python examples/plain_pytorch.py                                                     seconds on a CPU, random weights
python examples/plain_pytorch.py --depth 50 --weights torchvision:ResNet50_Weights.IMAGENET1K_V2

Prints the channels and stride of each map, and what is trained: with weights, all but batch norms and the first layers.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2.functional import normalize

from resbackbone import build_resnet_backbone
from resbackbone.weights import MEAN, STD


class Segmenter(nn.Module):
    """[B, 3, H, W] -> a score for each cell of 4 x 4 pixels, [B, ceil(H / 4), ceil(W / 4)]."""

    def __init__(self, depth: int, weights: str | None):
        super().__init__()
        self.backbone = build_resnet_backbone(depth, fpn=True, levels=["p2"], fpn_channels=32, weights=weights)
        self.head = nn.Conv2d(self.backbone.features["p2"].channels, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images)["p2"])[:, 0]


def draw(count: int, size: int = 64) -> tuple[Tensor, Tensor]:
    """Images of noise [count, 3, size, size], normalized, with a bright square each, and its share of every cell."""
    masks = torch.zeros(count, size, size)
    for mask, (top, left) in zip(masks, torch.randint(0, size // 2, (count, 2)).tolist(), strict=True):
        mask[top : top + 24, left : left + 24] = 1
    return normalize((torch.rand(count, 3, size, size) + masks[:, None]) / 2, MEAN, STD), F.avg_pool2d(masks, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=18)
    parser.add_argument("--weights", help="a weight file, or a named source as above; default: random")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = Segmenter(options.depth, options.weights).train()
    print(model.backbone.features, model.backbone.summary(), sep="\n")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)  # skips frozen parameters, which get no gradient
    for step in range(1, 11):
        images, masks = draw(4)
        loss = F.binary_cross_entropy_with_logits(model(images), masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()

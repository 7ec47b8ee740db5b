"""The backbone under torchvision's own RetinaNet: one training step, then detections.

python examples/torchvision_retinanet.py                                             seconds on a CPU, random weights
python examples/torchvision_retinanet.py --depth 50 --weights torchvision:ResNet50_Weights.IMAGENET1K_V2

`as_torchvision(backbone)` also works in FasterRCNN, MaskRCNN, KeypointRCNN and FCOS. RetinaNet and FCOS take p3..p7;
FasterRCNN and MaskRCNN take p2..p6, the default of `fpn=True`.
"""

import argparse

import torch
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.retinanet import AnchorGenerator

from resbackbone import build_resnet_backbone
from resbackbone.adapters.torchvision import as_torchvision


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=18)
    parser.add_argument("--weights", help="a weight file, or a named source as above; default: random")
    options = parser.parse_args()
    torch.manual_seed(0)

    levels = ["p3", "p4", "p5", "p6", "p7"]
    backbone = build_resnet_backbone(options.depth, fpn=True, levels=levels, weights=options.weights)
    sizes = tuple((4 * backbone.features[level].stride,) for level in levels)
    detector = RetinaNet(
        as_torchvision(backbone),
        num_classes=3,  # torchvision counts the background: labels are 1 and 2
        anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(levels)),
        min_size=128,
        max_size=256,
    )

    # Images are RGB in 0..1, of any size; torchvision normalizes and batches them.
    images = [torch.rand(3, 97, 130), torch.rand(3, 120, 90)]
    targets = [
        {"boxes": torch.tensor([[10.0, 20, 60, 80]]), "labels": torch.tensor([1])},
        {"boxes": torch.empty(0, 4), "labels": torch.empty(0, dtype=torch.int64)},  # an image without objects
    ]
    optimizer = torch.optim.SGD([p for p in detector.parameters() if p.requires_grad], lr=0.01, momentum=0.9)
    losses = detector.train()(images, targets)
    optimizer.zero_grad()
    sum(losses.values()).backward()
    optimizer.step()
    print({name: round(loss.item(), 3) for name, loss in losses.items()})

    with torch.no_grad():
        found = detector.eval()(images)
    print([tuple(detections["boxes"].shape) for detections in found], "boxes x1 y1 x2 y2 in pixels of each image")


if __name__ == "__main__":
    main()

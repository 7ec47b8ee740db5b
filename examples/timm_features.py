"""timm in both directions: our ResNets through `timm.create_model`, and a timm network as a Backbone with an FPN.

python examples/timm_features.py                              seconds on a CPU, random weights
python examples/timm_features.py --pretrained                 with timm's weights for its own networks
python examples/timm_features.py --pretrained --network vgg16_bn
"""

import argparse

import timm
import torch

import resbackbone.adapters.timm  # noqa: F401 - registers resbackbone_18 .. resbackbone_152
from detection import build_faster_rcnn
from resbackbone.adapters.timm import from_timm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="convnext_atto", help="a timm network with feature maps")
    parser.add_argument("--pretrained", action="store_true", help="download weights; without it they are random")
    options = parser.parse_args()
    torch.manual_seed(0)
    images = torch.rand(2, 3, 97, 130)

    # Our ResNet in timm: create_model's arguments, feature_info, and the parameter names of timm's resnet18.
    trunk = timm.create_model(
        "resbackbone_18", features_only=True, out_indices=(1, 2, 3, 4), pretrained=options.pretrained
    ).eval()
    with torch.no_grad():
        maps = trunk(images)
    for channels, stride, x in zip(trunk.feature_info.channels(), trunk.feature_info.reduction(), maps, strict=True):
        print(f"stride {stride:2}: {channels} channels, {tuple(x.shape)}")

    # Our ResNet as a classifier to fine-tune.
    classifier = timm.create_model("resbackbone_18", num_classes=10, pretrained=options.pretrained)
    print("classifier:", tuple(classifier(images).shape))

    # A timm network in our Faster R-CNN, with our FPN.
    backbone = from_timm(options.network, fpn=True, fpn_channels=64, pretrained=options.pretrained)
    print(options.network, backbone.features)
    detector = build_faster_rcnn(backbone, num_classes=3, min_size=128, max_size=256).eval()
    target = {"boxes": torch.tensor([[10.0, 20, 60, 80]]), "labels": torch.tensor([1])}
    losses = detector.losses([images[0]], [target])
    print({name: round(loss.item(), 3) for name, loss in losses.items()})


if __name__ == "__main__":
    main()

"""The named weights to start from, with depth, licence and the figures that torchvision and detectron2 publish."""

import re
from collections.abc import Iterator
from typing import NamedTuple

from resbackbone.resnet import DEPTHS

# torchvision's and timm's names of the trunks that this package builds, and in them the depth
TRUNK = re.compile(rf"(?:wide_)?resnex?t({'|'.join(map(str, DEPTHS))})[cd]?(?:_2|_\d+x\d+d)?")

TORCHVISION_LICENCE = "BSD-3-Clause"
TIMM_RESULTS = "https://github.com/huggingface/pytorch-image-models/tree/main/results"
DETECTRON2_LICENCE = "CC-BY-SA-3.0"
DETECTRON2_ZOO = "detectron2 MODEL_ZOO.md, commit 8b0953c of 2021-07-20"
MSRA_RESULTS = "github.com/KaimingHe/deep-residual-networks README.md, 1-crop error of the original"
# Path below detectron2's download folder: (ImageNet top-1, where that is published).
DETECTRON2_IMAGENET = {
    "ImageNetPretrained/MSRA/R-50.pkl": (75.3, MSRA_RESULTS),
    "ImageNetPretrained/MSRA/R-101.pkl": (76.4, MSRA_RESULTS),
    "ImageNetPretrained/torchvision/R-50.pkl": (None, DETECTRON2_ZOO),
    "ImageNetPretrained/FAIR/X-101-32x8d.pkl": (None, DETECTRON2_ZOO),
}
# Config: (file below the config's folder, box AP on COCO val2017).
DETECTRON2_FASTER_RCNN = {
    "COCO-Detection/faster_rcnn_R_50_C4_1x": ("137257644/model_final_721ade.pkl", 35.7),
    "COCO-Detection/faster_rcnn_R_50_DC5_1x": ("137847829/model_final_51d356.pkl", 37.3),
    "COCO-Detection/faster_rcnn_R_50_FPN_1x": ("137257794/model_final_b275ba.pkl", 37.9),
    "COCO-Detection/faster_rcnn_R_50_C4_3x": ("137849393/model_final_f97cb7.pkl", 38.4),
    "COCO-Detection/faster_rcnn_R_50_DC5_3x": ("137849425/model_final_68d202.pkl", 39.0),
    "COCO-Detection/faster_rcnn_R_50_FPN_3x": ("137849458/model_final_280758.pkl", 40.2),
    "COCO-Detection/faster_rcnn_R_101_C4_3x": ("138204752/model_final_298dad.pkl", 41.1),
    "COCO-Detection/faster_rcnn_R_101_DC5_3x": ("138204841/model_final_3e0943.pkl", 40.6),
    "COCO-Detection/faster_rcnn_R_101_FPN_3x": ("137851257/model_final_f6e8b1.pkl", 42.0),
    "COCO-Detection/faster_rcnn_X_101_32x8d_FPN_3x": ("139173657/model_final_68b088.pkl", 43.0),
}


class NamedWeights(NamedTuple):
    """Published weights that `weights=` takes by their name."""

    name: str
    depth: int
    kind: str  # "classifier" or "detector"
    accuracy: float | None  # percent: top-1 on ImageNet-1k val or box AP on COCO val2017; None where none is stated
    published: str  # where the accuracy stands
    licence: str


def list_sources() -> list[NamedWeights]:
    """All named weights whose trunk this package builds, in the order torchvision, timm, hf, detectron2.

    torchvision's and timm's are those of the installed versions. Nothing is downloaded.
    """
    page = "https://huggingface.co/microsoft/resnet"
    hugging_face = [
        NamedWeights(f"hf:microsoft/resnet-{depth}", depth, "classifier", None, f"{page}-{depth}", "apache-2.0")
        for depth in (18, 34, 50, 101, 152)
    ]
    return [*_torchvision(), *_timm(), *hugging_face, *_detectron2()]


def _torchvision() -> Iterator[NamedWeights]:
    import torchvision
    from torchvision.models import get_model_weights, list_models

    published = f"torchvision {torchvision.__version__.split('+')[0]}"
    for model in list_models():
        if "_resnet50_fpn" in model:
            kind, depth, data, metric = "detector", 50, "COCO-val2017", "box_map"
        elif trunk := TRUNK.fullmatch(model):
            kind, depth, data, metric = "classifier", int(trunk[1]), "ImageNet-1K", "acc@1"
        else:
            continue
        for weights in get_model_weights(model):
            accuracy = weights.meta["_metrics"][data][metric]
            yield NamedWeights(f"torchvision:{weights}", depth, kind, accuracy, published, TORCHVISION_LICENCE)


def _timm() -> Iterator[NamedWeights]:
    from timm.models import get_pretrained_cfg, list_models

    for name in list_models(module="resnet", pretrained=True):
        config, trunk = get_pretrained_cfg(name), TRUNK.fullmatch(name.split(".")[0])
        if trunk and config and config.license:  # nobody may use weights without a licence
            yield NamedWeights(f"timm:{name}", int(trunk[1]), "classifier", None, TIMM_RESULTS, config.license)


def _detectron2() -> Iterator[NamedWeights]:
    for path, (value, published) in DETECTRON2_IMAGENET.items():
        depth = 101 if "-101" in path else 50
        yield NamedWeights(f"detectron2:{path}", depth, "classifier", value, published, DETECTRON2_LICENCE)
    for config, (_, value) in DETECTRON2_FASTER_RCNN.items():
        name, depth = f"detectron2:{config}.yaml", 101 if "_101_" in config else 50
        yield NamedWeights(name, depth, "detector", value, DETECTRON2_ZOO, DETECTRON2_LICENCE)

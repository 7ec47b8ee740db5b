"""The named weights to start from, with depth and licence, and the figures that torchvision and detectron2 publish."""

from collections.abc import Iterator
from typing import Any, NamedTuple

# The trunks this package builds, by torchvision's and timm's name, and their depths.
ARCHITECTURES = {
    **{f"resnet{depth}": depth for depth in (18, 34, 50, 101, 152)},
    "resnext50_32x4d": 50,
    **{f"resnext101_{width}": 101 for width in ("32x4d", "32x8d", "32x16d", "32x32d", "64x4d")},
    "wide_resnet50_2": 50,
    "wide_resnet101_2": 101,
}

TORCHVISION_LICENCE = "BSD-3-Clause"
TORCHVISION_METRICS = {"acc@1": "top-1", "acc@5": "top-5", "box_map": "box AP"}
TORCHVISION_DATA = {"ImageNet-1K": "ImageNet-1k val", "COCO-val2017": "COCO val2017"}

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
    names = {depth: f"microsoft/resnet-{depth}" for depth in (18, 34, 50, 101, 152)}
    hugging_face = (
        NamedWeights(f"hf:{name}", depth, "classifier", None, f"https://huggingface.co/{name}", "apache-2.0")
        for depth, name in names.items()
    )
    return [*_torchvision(), *_timm(), *hugging_face, *_detectron2()]


def torchvision_accuracy(weights) -> list[dict[str, Any]]:
    """The figures in the metadata of `weights`, a member of one of torchvision's enums."""
    import torchvision

    published = f"torchvision {torchvision.__version__.split('+')[0]}, {weights}"
    if "Keypoint" in str(weights):
        published += ", of persons only"
    return [
        _figure(TORCHVISION_DATA.get(data, data), TORCHVISION_METRICS[metric], value, published)
        for data, figures in weights.meta.get("_metrics", {}).items()
        for metric, value in figures.items()
        if metric in TORCHVISION_METRICS
    ]


def detectron2_accuracy(path: str) -> list[dict[str, Any]]:
    """The figure for `path`, a file below detectron2's download folder; empty if the tables above have none."""
    value, published = DETECTRON2_IMAGENET.get(path, (None, ""))
    if value is not None:
        return [_figure("ImageNet-1k val", "top-1", value, published)]
    for config, (file, value) in DETECTRON2_FASTER_RCNN.items():
        if path == f"{config}/{file}":
            return [_figure("COCO val2017", "box AP", value, DETECTRON2_ZOO)]
    return []


def torchvision_names() -> list[str]:
    """All weights that torchvision publishes, as ENUM.MEMBER, including those this package cannot read."""
    from torchvision.models import get_model_weights, list_models

    return list(dict.fromkeys(str(weights) for name in list_models() for weights in get_model_weights(name)))


def _torchvision() -> Iterator[NamedWeights]:
    from torchvision.models import get_model_weights, list_models

    for model in list_models():
        detector = "_resnet50_fpn" in model
        if not detector and model not in ARCHITECTURES:
            continue
        kind, metric, depth = ("detector", "box AP", 50) if detector else ("classifier", "top-1", ARCHITECTURES[model])
        for weights in get_model_weights(model):
            [figure] = [figure for figure in torchvision_accuracy(weights) if figure["metric"] == metric]
            value, published = figure["value"], figure["published"]
            yield NamedWeights(f"torchvision:{weights}", depth, kind, value, published, TORCHVISION_LICENCE)


def _timm() -> Iterator[NamedWeights]:
    from timm.models import get_pretrained_cfg, list_models

    for name in list_models(module="resnet", pretrained=True):
        config, depth = get_pretrained_cfg(name), ARCHITECTURES.get(name.split(".")[0])
        if depth and config and config.license:  # nobody may use weights without a licence
            yield NamedWeights(f"timm:{name}", depth, "classifier", None, TIMM_RESULTS, config.license)


def _detectron2() -> Iterator[NamedWeights]:
    for path, (value, published) in DETECTRON2_IMAGENET.items():
        depth = 101 if "-101" in path else 50
        yield NamedWeights(f"detectron2:{path}", depth, "classifier", value, published, DETECTRON2_LICENCE)
    for config, (_, value) in DETECTRON2_FASTER_RCNN.items():
        name, depth = f"detectron2:{config}.yaml", 101 if "_101_" in config else 50
        yield NamedWeights(name, depth, "detector", value, DETECTRON2_ZOO, DETECTRON2_LICENCE)


def _figure(data: str, metric: str, value: float, published: str) -> dict[str, Any]:
    return {"data": data, "metric": metric, "value": value, "published": published}

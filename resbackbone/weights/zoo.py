"""What there is to start from: every named source with depth, published accuracy and licence."""

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
TORCHVISION_METRICS = {
    "acc@1": "top-1",
    "acc@5": "top-5",
    "box_map": "box AP",
    "mask_map": "mask AP",
    "kp_map": "keypoint AP",
}
TORCHVISION_DATA = {"ImageNet-1K": "ImageNet-1k val", "COCO-val2017": "COCO val2017"}

# timm publishes accuracy in its repository only. Measured at 224 x 224 pixels, whatever the training size was.
TIMM_RESULTS = "timm results/results-imagenet.csv, 224 px, commit 4e5207c of 2025-10-30"
TIMM_TOP1 = {
    "resnet18.a1_in1k": 71.504,
    "resnet18.a2_in1k": 70.634,
    "resnet18.a3_in1k": 68.25,
    "resnet18.fb_ssl_yfcc100m_ft_in1k": 72.636,
    "resnet18.fb_swsl_ig1b_ft_in1k": 73.286,
    "resnet18.gluon_in1k": 70.844,
    "resnet18.tv_in1k": 69.752,
    "resnet34.a1_in1k": 76.42,
    "resnet34.a2_in1k": 75.52,
    "resnet34.a3_in1k": 72.996,
    "resnet34.bt_in1k": 75.176,
    "resnet34.gluon_in1k": 74.574,
    "resnet34.ra4_e3600_r224_in1k": 77.492,
    "resnet34.tv_in1k": 73.298,
    "resnet50.a1_in1k": 80.382,
    "resnet50.a1h_in1k": 80.654,
    "resnet50.a2_in1k": 79.828,
    "resnet50.a3_in1k": 78.052,
    "resnet50.am_in1k": 79.004,
    "resnet50.b1k_in1k": 79.564,
    "resnet50.b2k_in1k": 79.388,
    "resnet50.bt_in1k": 78.444,
    "resnet50.c1_in1k": 79.766,
    "resnet50.c2_in1k": 79.868,
    "resnet50.d_in1k": 79.904,
    "resnet50.fb_ssl_yfcc100m_ft_in1k": 79.252,
    "resnet50.fb_swsl_ig1b_ft_in1k": 81.146,
    "resnet50.gluon_in1k": 77.58,
    "resnet50.ra_in1k": 78.82,
    "resnet50.ram_in1k": 79.034,
    "resnet50.tv2_in1k": 80.846,
    "resnet50.tv_in1k": 76.156,
    "resnet101.a1_in1k": 81.494,
    "resnet101.a1h_in1k": 81.95,
    "resnet101.a2_in1k": 81.344,
    "resnet101.a3_in1k": 79.836,
    "resnet101.gluon_in1k": 79.306,
    "resnet101.tv2_in1k": 81.906,
    "resnet101.tv_in1k": 77.404,
    "resnet152.a1_in1k": 81.998,
    "resnet152.a1h_in1k": 82.818,
    "resnet152.a2_in1k": 81.764,
    "resnet152.a3_in1k": 80.548,
    "resnet152.gluon_in1k": 79.712,
    "resnet152.tv2_in1k": 82.294,
    "resnet152.tv_in1k": 78.33,
    "resnext50_32x4d.a1_in1k": 80.526,
    "resnext50_32x4d.a1h_in1k": 81.14,
    "resnext50_32x4d.a2_in1k": 80.444,
    "resnext50_32x4d.a3_in1k": 79.258,
    "resnext50_32x4d.fb_ssl_yfcc100m_ft_in1k": 80.316,
    "resnext50_32x4d.fb_swsl_ig1b_ft_in1k": 82.162,
    "resnext50_32x4d.gluon_in1k": 79.354,
    "resnext50_32x4d.ra_in1k": 79.8,
    "resnext50_32x4d.tv2_in1k": 81.19,
    "resnext50_32x4d.tv_in1k": 77.632,
    "resnext101_32x4d.fb_ssl_yfcc100m_ft_in1k": 80.936,
    "resnext101_32x4d.fb_swsl_ig1b_ft_in1k": 83.268,
    "resnext101_32x4d.gluon_in1k": 80.336,
    "resnext101_32x8d.fb_ssl_yfcc100m_ft_in1k": 81.62,
    "resnext101_32x8d.fb_swsl_ig1b_ft_in1k": 84.276,
    "resnext101_32x8d.fb_wsl_ig1b_ft_in1k": 82.72,
    "resnext101_32x8d.tv2_in1k": 82.832,
    "resnext101_32x8d.tv_in1k": 79.308,
    "resnext101_32x16d.fb_ssl_yfcc100m_ft_in1k": 81.856,
    "resnext101_32x16d.fb_swsl_ig1b_ft_in1k": 83.34,
    "resnext101_32x16d.fb_wsl_ig1b_ft_in1k": 84.166,
    "resnext101_32x32d.fb_wsl_ig1b_ft_in1k": 85.09,
    "resnext101_64x4d.c1_in1k": 82.446,
    "resnext101_64x4d.gluon_in1k": 80.64,
    "resnext101_64x4d.tv_in1k": 82.978,
    "wide_resnet50_2.racm_in1k": 81.466,
    "wide_resnet50_2.tv2_in1k": 81.612,
    "wide_resnet50_2.tv_in1k": 78.486,
    "wide_resnet101_2.tv2_in1k": 82.514,
    "wide_resnet101_2.tv_in1k": 78.862,
}

DETECTRON2_LICENCE = "CC-BY-SA-3.0"
DETECTRON2_ZOO = "detectron2 MODEL_ZOO.md, commit 8b0953c of 2021-07-20"
MSRA_RESULTS = "github.com/KaimingHe/deep-residual-networks README.md, 1-crop error of the original"
# Path below detectron2's download folder: (architecture, ImageNet top-1 or None, where that is published).
DETECTRON2_IMAGENET = {
    "ImageNetPretrained/MSRA/R-50.pkl": ("resnet50", 75.3, MSRA_RESULTS),
    "ImageNetPretrained/MSRA/R-101.pkl": ("resnet101", 76.4, MSRA_RESULTS),
    "ImageNetPretrained/torchvision/R-50.pkl": ("resnet50", None, DETECTRON2_ZOO),
    "ImageNetPretrained/FAIR/X-101-32x8d.pkl": ("resnext101_32x8d", None, DETECTRON2_ZOO),
}
# Config: (architecture, file below the config's folder, box AP on COCO val2017).
DETECTRON2_FASTER_RCNN = {
    "COCO-Detection/faster_rcnn_R_50_C4_1x": ("resnet50", "137257644/model_final_721ade.pkl", 35.7),
    "COCO-Detection/faster_rcnn_R_50_DC5_1x": ("resnet50", "137847829/model_final_51d356.pkl", 37.3),
    "COCO-Detection/faster_rcnn_R_50_FPN_1x": ("resnet50", "137257794/model_final_b275ba.pkl", 37.9),
    "COCO-Detection/faster_rcnn_R_50_C4_3x": ("resnet50", "137849393/model_final_f97cb7.pkl", 38.4),
    "COCO-Detection/faster_rcnn_R_50_DC5_3x": ("resnet50", "137849425/model_final_68d202.pkl", 39.0),
    "COCO-Detection/faster_rcnn_R_50_FPN_3x": ("resnet50", "137849458/model_final_280758.pkl", 40.2),
    "COCO-Detection/faster_rcnn_R_101_C4_3x": ("resnet101", "138204752/model_final_298dad.pkl", 41.1),
    "COCO-Detection/faster_rcnn_R_101_DC5_3x": ("resnet101", "138204841/model_final_3e0943.pkl", 40.6),
    "COCO-Detection/faster_rcnn_R_101_FPN_3x": ("resnet101", "137851257/model_final_f6e8b1.pkl", 42.0),
    "COCO-Detection/faster_rcnn_X_101_32x8d_FPN_3x": (
        "resnext101_32x8d",
        "139173657/model_final_68b088.pkl",
        43.0,
    ),
}


class Source(NamedTuple):
    """One line of the list; `value` is in percent, or None where its publisher gives no figure."""

    name: str  # what `weights=` takes
    depth: int
    architecture: str  # of the trunk: resnet50, resnext50_32x4d, ...
    kind: str  # "classifier" or "detector"
    metric: str  # "top-1" on ImageNet-1k val, or "box AP" on COCO val2017
    value: float | None
    published: str  # the document or page that gives the value
    licence: str


def list_sources() -> list[Source]:
    """Every named source whose trunk this package builds, in the order torchvision, timm, hf, detectron2.

    torchvision's and timm's are those of the installed versions. Nothing is downloaded.
    """
    return [*_torchvision(), *_timm(), *_hugging_face(), *_detectron2()]


def torchvision_accuracy(weights) -> list[dict[str, Any]]:
    """What torchvision states in the metadata of `weights`, a member of one of its enums."""
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


def timm_accuracy(name: str) -> list[dict[str, Any]]:
    """timm's figure for `name`, an architecture with its tag (resnet50.a1_in1k); empty if it publishes none."""
    return [_figure("ImageNet-1k val", "top-1", TIMM_TOP1[name], TIMM_RESULTS)] if name in TIMM_TOP1 else []


def detectron2_accuracy(path: str) -> list[dict[str, Any]]:
    """The figure for `path`, a file below detectron2's download folder; empty if this table has none."""
    if path in DETECTRON2_IMAGENET:
        _, value, published = DETECTRON2_IMAGENET[path]
        return [] if value is None else [_figure("ImageNet-1k val", "top-1", value, published)]
    for config, (_, file, value) in DETECTRON2_FASTER_RCNN.items():
        if path == f"{config}/{file}":
            return [_figure("COCO val2017", "box AP", value, DETECTRON2_ZOO)]
    return []


def torchvision_names() -> list[str]:
    """All weights torchvision publishes, ENUM.MEMBER, those this package cannot hold included."""
    from torchvision.models import get_model_weights, list_models

    return list(dict.fromkeys(str(weights) for name in list_models() for weights in get_model_weights(name)))


def _torchvision() -> Iterator[Source]:
    from torchvision.models import get_model_weights, list_models

    for model in list_models():
        is_detector = "_resnet50_fpn" in model
        if not is_detector and model not in ARCHITECTURES:
            continue
        architecture = "resnet50" if is_detector else model
        kind, metric = ("detector", "box AP") if is_detector else ("classifier", "top-1")
        for weights in get_model_weights(model):
            figure = next(figure for figure in torchvision_accuracy(weights) if figure["metric"] == metric)
            yield Source(
                f"torchvision:{weights}",
                ARCHITECTURES[architecture],
                architecture,
                kind,
                metric,
                figure["value"],
                figure["published"],
                TORCHVISION_LICENCE,
            )


def _timm() -> Iterator[Source]:
    from timm.models import get_pretrained_cfg, list_models

    for name in list_models(module="resnet", pretrained=True):
        architecture = name.split(".")[0]
        config = get_pretrained_cfg(name)
        licence = config.license if config else None
        if architecture in ARCHITECTURES and licence:  # what may not be used is no source
            depth, value = ARCHITECTURES[architecture], TIMM_TOP1.get(name)
            yield Source(f"timm:{name}", depth, architecture, "classifier", "top-1", value, TIMM_RESULTS, licence)


def _hugging_face() -> Iterator[Source]:
    for depth in (18, 34, 50, 101, 152):
        page = f"https://huggingface.co/microsoft/resnet-{depth}"
        yield Source(
            f"hf:microsoft/resnet-{depth}", depth, f"resnet{depth}", "classifier", "top-1", None, page, "apache-2.0"
        )


def _detectron2() -> Iterator[Source]:
    for path, (architecture, value, published) in DETECTRON2_IMAGENET.items():
        depth = ARCHITECTURES[architecture]
        yield Source(
            f"detectron2:{path}", depth, architecture, "classifier", "top-1", value, published, DETECTRON2_LICENCE
        )
    for config, (architecture, _, value) in DETECTRON2_FASTER_RCNN.items():
        depth = ARCHITECTURES[architecture]
        yield Source(
            f"detectron2:{config}.yaml",
            depth,
            architecture,
            "detector",
            "box AP",
            value,
            DETECTRON2_ZOO,
            DETECTRON2_LICENCE,
        )


def _figure(data: str, metric: str, value: float, published: str) -> dict[str, Any]:
    return {"data": data, "metric": metric, "value": value, "published": published}

"""One table of tensor names for each foreign format; `translate.py` reads them in both directions.

To add a format, add a `Format` and its entry in `FORMATS`. `convert_weights.py` and the round trips in
`tests/weights/test_translate.py` then include it; add a row to `test_write.py` for the files it is written to.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from resbackbone.weights.inputs import BGR_255, INPUT

# Our names, which are torchvision's and timm's. Each table below lists its format's names in the same order.
TRUNK = (
    "conv1.weight",
    "bn1.{leaf}",
    "layer{i}.{j}.conv{k}.weight",
    "layer{i}.{j}.bn{k}.{leaf}",
    "layer{i}.{j}.downsample.0.weight",
    "layer{i}.{j}.downsample.1.{leaf}",
)
CLASSIFIER = "fc.{leaf}"
PYRAMID = (
    "fpn.inner_blocks.{level}.0.{leaf}",
    "fpn.inner_blocks.{level}.1.{leaf}",
    "fpn.layer_blocks.{level}.0.{leaf}",
    "fpn.layer_blocks.{level}.1.{leaf}",
    "fpn.extra_blocks.p6.{leaf}",
    "fpn.extra_blocks.p7.{leaf}",
)
HEADS = (  # of Faster R-CNN
    "rpn.head.conv.0.0.{leaf}",
    "rpn.head.cls_logits.{leaf}",
    "rpn.head.bbox_pred.{leaf}",
    "roi_heads.box_head.fc{n}.{leaf}",
    "roi_heads.box_predictor.cls_score.{leaf}",
    "roi_heads.box_predictor.bbox_pred.{leaf}",
)
STAGE5 = "roi_heads.box_head."  # where a C4 detector has its layer4
ANCHOR_RATIOS = 3
EPS = 1e-5  # of the norms of every format


class Place(NamedTuple):
    """Prefixes of the trunk and of the pyramid in one kind of file."""

    trunk: str
    pyramid: str = ""


@dataclass(frozen=True)
class Format:
    """One format. A field stays empty if the format has no such names.

    `bare`, `pyramidal`, `detecting` (with a pyramid) and `single` (a detector on one map) are the prefixes of the trunk
    and the pyramid in files that hold these; `elsewhere` lists further prefixes of files that are read. `aliases` are
    pairs (ours, theirs) that are read, and written only if `trunk` is empty. `constants` are tensors in files that
    follow from the network. `assumed` is the input and stride of networks with these names.
    """

    title: str
    trunk: tuple[str, ...]
    classifier: str
    pyramid: tuple[str, ...] = ()  # "{level+first}": levels counted from the image; "{count}": behind the last
    heads: tuple[str, ...] = ()
    stage5: str = ""
    bare: Place = Place("")
    pyramidal: Place = Place("")
    detecting: Place = Place("")
    single: Place = Place("")
    elsewhere: tuple[Place, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    constants: tuple[str, ...] = ()
    background_last: bool = False  # among the classes; ours is first
    sizes_first: bool = False  # anchors of several sizes: all ratios of the first size, then of the next
    counts_batches: bool = True  # its batch norms have num_batches_tracked
    only_3x3_stride: bool = False  # its bottlenecks cannot stride in the 1x1
    relu_before_p7: bool = False  # its pyramids always have one
    geometry: str = "detectron2"  # whose RoIAlign and anchors its detectors have
    assumed: Mapping[str, Any] = field(default_factory=lambda: {"input": INPUT, "stride_in_1x1": False})


TORCHVISION = Format(
    title="torchvision / timm names",
    trunk=TRUNK,
    classifier=CLASSIFIER,
    pyramid=PYRAMID,
    heads=HEADS,
    stage5=STAGE5,
    pyramidal=Place("body."),
    detecting=Place("backbone.body.", "backbone."),
    single=Place("backbone."),
    elsewhere=(Place("backbone.", "backbone."),),  # ours
    only_3x3_stride=True,
    relu_before_p7=True,
    geometry="torchvision",
    aliases=(
        ("fc.{leaf}", "linear.{leaf}"),  # CIFAR repositories
        ("fc.{leaf}", "backbone.fc.{leaf}"),  # a classifier that is a `backbone` of its owner, in Lightning modules
        ("fpn.inner_blocks.{level}.0.{leaf}", "fpn.inner_blocks.{level}.{leaf}"),  # torchvision before 0.13
        ("fpn.layer_blocks.{level}.0.{leaf}", "fpn.layer_blocks.{level}.{leaf}"),
        ("rpn.head.conv.0.0.{leaf}", "rpn.head.conv.{leaf}"),
    ),
)

DETECTRON2 = Format(
    title="detectron2 names",
    trunk=(
        "stem.conv1.weight",
        "stem.conv1.norm.{leaf}",
        "res{i+1}.{j}.conv{k}.weight",
        "res{i+1}.{j}.conv{k}.norm.{leaf}",
        "res{i+1}.{j}.shortcut.weight",
        "res{i+1}.{j}.shortcut.norm.{leaf}",
    ),
    classifier="linear.{leaf}",
    pyramid=(
        "fpn_lateral{level+first}.{leaf}",
        "fpn_lateral{level+first}.norm.{leaf}",
        "fpn_output{level+first}.{leaf}",
        "fpn_output{level+first}.norm.{leaf}",
        "top_block.p6.{leaf}",
        "top_block.p7.{leaf}",
    ),
    heads=(
        "proposal_generator.rpn_head.conv.{leaf}",
        "proposal_generator.rpn_head.objectness_logits.{leaf}",
        "proposal_generator.rpn_head.anchor_deltas.{leaf}",
        "roi_heads.box_head.fc{n-5}.{leaf}",
        "roi_heads.box_predictor.cls_score.{leaf}",
        "roi_heads.box_predictor.bbox_pred.{leaf}",
    ),
    stage5="roi_heads.",
    pyramidal=Place("backbone.bottom_up.", "backbone."),
    detecting=Place("backbone.bottom_up.", "backbone."),
    single=Place("backbone."),
    elsewhere=(Place("bottom_up."),),
    constants=("pixel_mean", "pixel_std", "proposal_generator.anchor_generator.cell_anchors.{i}"),
    background_last=True,
    sizes_first=True,
    counts_batches=False,
    relu_before_p7=True,
    assumed={"input": BGR_255, "stride_in_1x1": True},
)

_CAFFE2_LEAVES = (("weight", "s"), ("bias", "b"), ("running_mean", "rm"), ("running_var", "riv"))


def _caffe2_norm(ours: str, theirs: str) -> list[tuple[str, str]]:
    return [(ours.replace("{leaf}", leaf), f"{theirs}_{word}") for leaf, word in _CAFFE2_LEAVES]


# MSRA's files merge the statistics of a norm into its scale and shift.
_MSRA = (
    ("conv1.weight", "conv1_w"),
    *_caffe2_norm("bn1.{leaf}", "res_conv1_bn"),
    ("layer{i}.{j}.conv{k}.weight", "res{i+1}_{j}_branch2{k:abc}_w"),
    *_caffe2_norm("layer{i}.{j}.bn{k}.{leaf}", "res{i+1}_{j}_branch2{k:abc}_bn"),
    ("layer{i}.{j}.downsample.0.weight", "res{i+1}_{j}_branch1_w"),
    *_caffe2_norm("layer{i}.{j}.downsample.1.{leaf}", "res{i+1}_{j}_branch1_bn"),
    ("fc.weight", "fc1000_w"),
    ("fc.bias", "fc1000_b"),
)
MSRA = Format(
    title="Caffe2 names, as MSRA's",
    trunk=(),  # its words for weight, bias, .. differ, so the whole table consists of pairs
    classifier="",
    aliases=(
        *_MSRA,
        *((ours, theirs.replace("_bn_", "_gn_")) for ours, theirs in _MSRA if "_bn_" in theirs),
        *_caffe2_norm("bn1.{leaf}", "conv1_gn"),
        ("fc.weight", "pred_w"),
        ("fc.bias", "pred_b"),
    ),
    counts_batches=False,
    assumed={"input": BGR_255, "stride_in_1x1": True},
)

MMDETECTION = Format(
    title="mmdetection names",
    trunk=TRUNK,
    classifier="head.fc.{leaf}",
    pyramid=(
        "neck.lateral_convs.{level}.conv.{leaf}",
        "neck.lateral_convs.{level}.bn.{leaf}",
        "neck.fpn_convs.{level}.conv.{leaf}",
        "neck.fpn_convs.{level}.bn.{leaf}",
        "neck.fpn_convs.{count}.conv.{leaf}",
        "neck.fpn_convs.{count+1}.conv.{leaf}",
    ),
    heads=(
        "rpn_head.rpn_conv.{leaf}",
        "rpn_head.rpn_cls.{leaf}",
        "rpn_head.rpn_reg.{leaf}",
        "roi_head.bbox_head.shared_fcs.{n-6}.{leaf}",
        "roi_head.bbox_head.fc_cls.{leaf}",
        "roi_head.bbox_head.fc_reg.{leaf}",
    ),
    stage5="roi_head.shared_head.",
    bare=Place("backbone."),
    pyramidal=Place("backbone."),
    detecting=Place("backbone."),
    single=Place("backbone."),
    background_last=True,
)

TRANSFORMERS = Format(
    title="transformers names",
    trunk=(
        "embedder.embedder.convolution.weight",
        "embedder.embedder.normalization.{leaf}",
        "encoder.stages.{i-1}.layers.{j}.layer.{k-1}.convolution.weight",
        "encoder.stages.{i-1}.layers.{j}.layer.{k-1}.normalization.{leaf}",
        "encoder.stages.{i-1}.layers.{j}.shortcut.convolution.weight",
        "encoder.stages.{i-1}.layers.{j}.shortcut.normalization.{leaf}",
    ),
    classifier="classifier.1.{leaf}",
    bare=Place("resnet."),
    elsewhere=(Place(""),),
)

FORMATS: dict[str, Format] = {
    "torchvision": TORCHVISION,
    "timm": replace(TORCHVISION, pyramid=(), heads=(), stage5=""),
    "detectron2": DETECTRON2,
    "msra": MSRA,
    "mmdetection": MMDETECTION,
    "transformers": TRANSFORMERS,
}

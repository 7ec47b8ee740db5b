"""One table of tensor names for each foreign format; `translate.py` reads them in both directions.

To add a format, add a `Format` and its entry in `FORMATS`. `convert_weights.py` and the round trips in
`tests/weights/test_translate.py` then include it; add a row to `test_write.py` for the files it is written to. What its
networks cannot be (`_check_network`) and the containers of its files (`_write_file`) are in `write.py`.
"""

from collections.abc import Mapping
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
CLASSIFIER = (*TRUNK, "fc.{leaf}")
# Of a deep stem, and of shortcuts with a pool; torchvision has neither.
RESNET_D = ("conv1.{k}.{leaf}", "layer{i}.{j}.downsample.2.{leaf}")
NAMES = (
    *CLASSIFIER,
    "fpn.extra_blocks.p6.{leaf}",
    "fpn.extra_blocks.p7.{leaf}",
    "fpn.inner_blocks.{level}.0.{leaf}",
    "fpn.inner_blocks.{level}.1.{leaf}",
    "fpn.layer_blocks.{level}.0.{leaf}",
    "fpn.layer_blocks.{level}.1.{leaf}",
    # The heads of Faster R-CNN
    "rpn.head.conv.0.0.{leaf}",
    "rpn.head.cls_logits.{leaf}",
    "rpn.head.bbox_pred.{leaf}",
    "roi_heads.box_head.fc{n}.{leaf}",
    "roi_heads.box_predictor.cls_score.{leaf}",
    "roi_heads.box_predictor.bbox_pred.{leaf}",
    # The box heads of Cascade R-CNN
    "roi_heads.box_head.{i}.fc{n}.{leaf}",
    "roi_heads.box_predictor.{i}.cls_score.{leaf}",
    "roi_heads.box_predictor.{i}.bbox_pred.{leaf}",
    # The deeper heads of torchvision's V2 detectors: two convolutions in the RPN, four and one fully connected layer
    "rpn.head.conv.{j}.0.{leaf}",
    "roi_heads.box_head.{j}.{k}.{leaf}",  # or a cascade's {n}, below
    "roi_heads.box_head.{i}.{j}.{k}.{leaf}",
    "roi_heads.box_head.{n}.{leaf}",
)
STAGE5 = "roi_heads.box_head."  # where a C4 detector has its layer4
ANCHOR_RATIOS = 3
EPS = 1e-5  # of the norms of every format


class Format(NamedTuple):
    """One format.

    `names` are in the order of NAMES; a format without names for pyramids, heads or deeper heads ends early.
    `names.rename` says how placeholders change (`{i+1}`, `{k-1:a,b,c}`); the first name that matches is taken. In them
    `{level+first}` counts a pyramid's levels from the image, and `{count}` is the number behind its last level.
    `resnet_d` are in the order of RESNET_D. `places` are the prefixes of trunk and pyramid in the files of a trunk, of
    one with a pyramid, of a detector on one map and of one with a pyramid; further ones are read only. `aliases` are
    pairs (ours, theirs) that are read only.
    `constants` are tensors in files that follow from the network. `input` and `stride_in_1x1` are usual for networks
    with these names; where the names are `ambiguous`, they are assumed only of files whose publisher is known.
    """

    title: str
    names: tuple[str, ...]
    places: tuple[tuple[str, str], ...]
    resnet_d: tuple[str, ...] = ()
    stage5: str = ""
    aliases: tuple[tuple[str, str], ...] = ()
    constants: tuple[str, ...] = ()
    background_last: bool = False  # among the classes; ours is first
    sizes_first: bool = False  # anchors of several sizes: all ratios of the first size, then of the next
    counts_batches: bool = True  # its batch norms have num_batches_tracked
    only_3x3_stride: bool = False  # its bottlenecks cannot stride in the 1x1
    relu_before_p7: bool = False  # its pyramids always have one
    geometry: str = "detectron2"  # whose RoIAlign and anchors its detectors have
    ambiguous: bool = False  # its networks have several inputs and strides: its names alone do not tell them
    input: Mapping[str, Any] = INPUT
    stride_in_1x1: bool = False


TORCHVISION = Format(
    title="torchvision / timm names",
    names=NAMES,
    places=(
        ("", ""),
        ("body.", ""),
        ("backbone.", ""),
        ("backbone.body.", "backbone."),
        ("backbone.", "backbone."),  # ours
    ),
    resnet_d=RESNET_D,
    stage5=STAGE5,
    only_3x3_stride=True,
    relu_before_p7=True,
    geometry="torchvision",
    aliases=(
        ("fc.{leaf}", "linear.{leaf}"),  # CIFAR repositories
        ("fc.{leaf}", "backbone.linear.{leaf}"),
        ("fc.{leaf}", "backbone.fc.{leaf}"),  # a classifier that is a `backbone` of its owner, in Lightning modules
        ("fpn.inner_blocks.{level}.0.{leaf}", "fpn.inner_blocks.{level}.{leaf}"),  # torchvision before 0.13
        ("fpn.layer_blocks.{level}.0.{leaf}", "fpn.layer_blocks.{level}.{leaf}"),
        ("rpn.head.conv.0.0.{leaf}", "rpn.head.conv.{leaf}"),
    ),
)

DETECTRON2 = Format(
    title="detectron2 names",
    names=(
        "stem.conv1.weight",
        "stem.conv1.norm.{leaf}",
        "res{i+1}.{j}.conv{k}.weight",
        "res{i+1}.{j}.conv{k}.norm.{leaf}",
        "res{i+1}.{j}.shortcut.weight",
        "res{i+1}.{j}.shortcut.norm.{leaf}",
        "linear.{leaf}",
        "top_block.p6.{leaf}",
        "top_block.p7.{leaf}",
        "fpn_lateral{level+first}.{leaf}",
        "fpn_lateral{level+first}.norm.{leaf}",
        "fpn_output{level+first}.{leaf}",
        "fpn_output{level+first}.norm.{leaf}",
        "proposal_generator.rpn_head.conv.{leaf}",
        "proposal_generator.rpn_head.objectness_logits.{leaf}",
        "proposal_generator.rpn_head.anchor_deltas.{leaf}",
        "roi_heads.box_head.fc{n-5}.{leaf}",
        "roi_heads.box_predictor.cls_score.{leaf}",
        "roi_heads.box_predictor.bbox_pred.{leaf}",
        "roi_heads.box_head.{i}.fc{n-5}.{leaf}",
        "roi_heads.box_predictor.{i}.cls_score.{leaf}",
        "roi_heads.box_predictor.{i}.bbox_pred.{leaf}",
    ),
    places=(
        ("", ""),
        ("backbone.bottom_up.", "backbone."),
        ("backbone.", ""),
        ("backbone.bottom_up.", "backbone."),
        ("bottom_up.", ""),
    ),
    stage5="roi_heads.",
    constants=("pixel_mean", "pixel_std", "proposal_generator.anchor_generator.cell_anchors.{i}"),
    background_last=True,
    sizes_first=True,
    counts_batches=False,
    relu_before_p7=True,
    ambiguous=True,
    input=BGR_255,
    stride_in_1x1=True,
)

# A norm's weight, bias, running_mean and running_var. MSRA's files merge the statistics into scale and shift.
_NORM = "{leaf:s,b,rm,riv}"
MSRA = Format(
    title="MSRA's Caffe2 names",
    names=(
        "conv1_w",
        f"res_conv1_bn_{_NORM}",
        "res{i+1}_{j}_branch2{k-1:a,b,c}_w",
        f"res{{i+1}}_{{j}}_branch2{{k-1:a,b,c}}_bn_{_NORM}",
        "res{i+1}_{j}_branch1_w",
        f"res{{i+1}}_{{j}}_branch1_bn_{_NORM}",
        "fc1000_{leaf:w,b}",
    ),
    places=(("", ""),) * 4,
    aliases=(
        ("bn1.{leaf}", f"conv1_gn_{_NORM}"),
        ("bn1.{leaf}", f"res_conv1_gn_{_NORM}"),
        ("layer{i}.{j}.bn{k}.{leaf}", f"res{{i+1}}_{{j}}_branch2{{k-1:a,b,c}}_gn_{_NORM}"),
        ("layer{i}.{j}.downsample.1.{leaf}", f"res{{i+1}}_{{j}}_branch1_gn_{_NORM}"),
        ("fc.{leaf}", "pred_{leaf:w,b}"),
    ),
    counts_batches=False,
    ambiguous=True,
    input=BGR_255,
    stride_in_1x1=True,
)

MMDETECTION = Format(
    title="mmdetection names",
    names=(
        *TRUNK,
        "head.fc.{leaf}",
        "neck.fpn_convs.{count}.conv.{leaf}",
        "neck.fpn_convs.{count+1}.conv.{leaf}",
        "neck.lateral_convs.{level}.conv.{leaf}",
        "neck.lateral_convs.{level}.bn.{leaf}",
        "neck.fpn_convs.{level}.conv.{leaf}",
        "neck.fpn_convs.{level}.bn.{leaf}",
        "rpn_head.rpn_conv.{leaf}",
        "rpn_head.rpn_cls.{leaf}",
        "rpn_head.rpn_reg.{leaf}",
        "roi_head.bbox_head.shared_fcs.{n-6}.{leaf}",
        "roi_head.bbox_head.fc_cls.{leaf}",
        "roi_head.bbox_head.fc_reg.{leaf}",
    ),
    places=(("backbone.", ""),) * 4 + (("", ""),),
    resnet_d=("stem.{k:0,1,2,3,4,5,6}.{leaf}", RESNET_D[1]),
    aliases=(
        ("bn1.{leaf}", "stem.7.{leaf}"),
        ("bn1.{leaf}", "stem.2.bn.{leaf}"),  # mmpretrain's
        ("conv1.{k:0,3,6}.weight", "stem.{k}.conv.weight"),
        ("conv1.{k:1,4}.{leaf}", "stem.{k}.bn.{leaf}"),
    ),
    stage5="roi_head.shared_head.",
    background_last=True,
    ambiguous=True,
)

TRANSFORMERS = Format(
    title="transformers names",
    names=(
        "embedder.embedder.convolution.weight",
        "embedder.embedder.normalization.{leaf}",
        "encoder.stages.{i-1}.layers.{j}.layer.{k-1}.convolution.weight",
        "encoder.stages.{i-1}.layers.{j}.layer.{k-1}.normalization.{leaf}",
        "encoder.stages.{i-1}.layers.{j}.shortcut.convolution.weight",
        "encoder.stages.{i-1}.layers.{j}.shortcut.normalization.{leaf}",
        "classifier.1.{leaf}",
    ),
    places=(("resnet.", ""),) * 4 + (("", ""),),
    ambiguous=True,
)

FORMATS: dict[str, Format] = {
    "torchvision": TORCHVISION,
    "timm": TORCHVISION._replace(names=CLASSIFIER, stage5=""),
    "detectron2": DETECTRON2,
    "msra": MSRA,
    "mmdetection": MMDETECTION,
    "transformers": TRANSFORMERS,
}

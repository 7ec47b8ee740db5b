"""Every table both ways. The names are held against the packages that own them in test_foreign_networks.py."""

import pytest
import torch

from detection import build_faster_rcnn
from resbackbone import build_resnet_backbone, build_resnet_classifier
from resbackbone.weights.formats import CLASSIFIER, FORMATS
from resbackbone.weights.translate import from_ours, merged_norms, to_ours


def numbered(module):
    """Its state dict with a value of its own at every place; variances stay near one."""
    state = {}
    for i, (name, tensor) in enumerate(module.state_dict().items()):
        noise = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(i))
        state[name] = tensor if name.endswith("num_batches_tracked") else (noise + 0.5).to(tensor.dtype)
    return state


def detector(variant, *, fpn_norm=None, trunk=None, **heads):
    backbones = {"fpn": {"fpn": True, "fpn_channels": 8, "fpn_norm": fpn_norm}, "c4": {"levels": ["c4", "c5"]}}
    backbones["dc5"] = {"levels": ["c5"], "dilate_c5": True}
    backbone = build_resnet_backbone(18, **backbones[variant], **(trunk or {}))
    return build_faster_rcnn(backbone, 3, variant=variant, representation_size=4, **heads)


def v2_detector():
    return detector("fpn", fpn_norm="BN", rpn_conv_depth=2, box_conv_layers=(8, 4, 8), box_norm="BN")


NETWORKS = {
    "classifier": lambda: build_resnet_classifier(18, 5),
    "bottlenecks": lambda: build_resnet_classifier(50, 5),
    "trunk": lambda: build_resnet_backbone(18, levels=["c4"]),
    "pyramid": lambda: build_resnet_backbone(18, fpn=True, fpn_channels=8),
    "pyramid with norms": lambda: build_resnet_backbone(18, fpn=True, fpn_channels=8, fpn_norm="BN"),
    "p3 to p7": lambda: build_resnet_backbone(18, fpn=True, fpn_channels=8, levels=["p3", "p4", "p5", "p6", "p7"]),
    "fpn detector": lambda: detector("fpn"),
    "c4 detector": lambda: detector("c4"),
    "dc5 detector": lambda: detector("dc5"),
}
# without names for pyramids and heads
NAMELESS = [name for name, known in FORMATS.items() if len(known.names) <= len(CLASSIFIER)]
PAIRS = [
    (format, network)
    for format in FORMATS
    for network in NETWORKS
    if format not in NAMELESS or network in ("classifier", "bottlenecks", "trunk")
]
NETWORKS["ResNet-D detector"] = lambda: detector("c4", trunk={"stem": "deep", "shortcut": "D"})
PAIRS.append(("torchvision", "ResNet-D detector"))
NETWORKS["V2 detector"] = v2_detector
PAIRS.append(("torchvision", "V2 detector"))


def without_counters(state):
    return {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}


@pytest.mark.parametrize("format, network", PAIRS)
def test_a_round_trip_gives_back_every_tensor(format, network):
    ours = numbered(NETWORKS[network]())
    theirs = from_ours(ours, format)
    back = to_ours(theirs)
    assert back.unknown == [] and back.constants == {}
    same = format == "timm" or (format, network) == ("mmdetection", "trunk")  # as torchvision's names
    assert back.format == ("torchvision" if same else format)
    expected, got = without_counters(ours), without_counters(back.state)
    assert got.keys() == expected.keys()
    if FORMATS[format].counts_batches:
        assert back.state.keys() == ours.keys()
    if format == "msra":  # which merges statistics into scale and shift
        expected, got = merged_norms(expected), merged_norms(got)
    for name, tensor in expected.items():
        if FORMATS[format].background_last and ".box_predictor.bbox_pred." in name:
            assert not got[name][:4].any()  # the background has no box there
            assert torch.equal(got[name][4:], tensor[4:])
        elif format == "msra":
            assert torch.allclose(got[name], tensor, rtol=1e-6)
        else:
            assert torch.equal(got[name], tensor), name
    again = from_ours(back.state, format)
    assert again.keys() == theirs.keys()
    assert all(torch.allclose(again[name], tensor, rtol=1e-6) for name, tensor in theirs.items())


@pytest.mark.parametrize("format", NAMELESS)
def test_what_a_format_has_no_names_for_is_refused_by_name(format):
    with pytest.raises(
        ValueError, match=rf"the format {format} has no name for \d+ tensors, .*: fpn\.inner_blocks\.0\.0\.weight"
    ):
        from_ours(build_resnet_backbone(18, fpn=True).state_dict(), format)
    with pytest.raises(ValueError, match="unknown format 'caffe'; choose from torchvision"):
        from_ours({}, "caffe")


def test_classes_move_as_the_background_does():
    ours = numbered(detector("fpn"))
    key, theirs = "roi_heads.box_predictor.cls_score.weight", from_ours(ours, "detectron2")
    assert torch.equal(theirs[key][-1], ours[key][0])
    assert torch.equal(theirs[key][:-1], ours[key][1:])
    assert torch.equal(
        theirs["roi_heads.box_predictor.bbox_pred.weight"], ours["roi_heads.box_predictor.bbox_pred.weight"][4:]
    )
    moved = from_ours(ours, "mmdetection")["roi_head.bbox_head.fc_cls.weight"]
    assert torch.equal(moved, theirs[key])


def test_anchors_of_several_sizes_are_ordered_by_ratio_here_and_by_size_in_detectron2():
    ours = detector("c4").state_dict()
    names = [(size, ratio) for ratio in range(3) for size in range(5)]  # our order
    ours["rpn.head.cls_logits.bias"] = torch.tensor([10.0 * size + ratio for size, ratio in names])
    ours["rpn.head.bbox_pred.bias"] = torch.tensor([100.0 * s + 10 * r + n for s, r in names for n in range(4)])
    theirs = from_ours(ours, "detectron2")
    expected = [(size, ratio) for size in range(5) for ratio in range(3)]
    scores, deltas = (
        theirs[f"proposal_generator.rpn_head.{name}.bias"] for name in ("objectness_logits", "anchor_deltas")
    )
    assert scores.tolist() == [10.0 * size + ratio for size, ratio in expected]
    assert deltas.tolist() == [100.0 * s + 10 * r + n for s, r in expected for n in range(4)]


@pytest.mark.parametrize("format", ["detectron2", "mmdetection"])
def test_deeper_heads_are_written_with_torchvisions_names_only(format):
    with pytest.raises(
        ValueError, match=rf"{format} has no name for \d+ tensors, .*: rpn.head.conv.1.0.weight, .*roi_"
    ):
        from_ours(v2_detector().state_dict(), format)


def test_names_of_torchvision_before_version_0_13_and_of_cifar_repositories_are_read():
    state = detector("fpn").state_dict()
    old = {}
    for name, tensor in from_ours(state, "torchvision").items():
        name = name.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
        for blocks in ("inner_blocks", "layer_blocks"):
            for i in range(4):
                name = name.replace(f"{blocks}.{i}.0.", f"{blocks}.{i}.")
        old[name] = tensor
    assert "backbone.fpn.inner_blocks.3.weight" in old
    assert to_ours(old).state.keys() == state.keys()
    cifar = {"conv1.weight": torch.zeros(1), "linear.weight": torch.ones(1)}
    assert to_ours(cifar).state.keys() == {"conv1.weight", "fc.weight"}


@pytest.mark.parametrize("head", ["fc.", "linear."])
def test_a_classifier_inside_another_module_is_read_whole(head):
    state = build_resnet_classifier(18, 5).state_dict()
    translated = to_ours({f"backbone.{name.replace('fc.', head)}": tensor for name, tensor in state.items()})
    assert translated.state.keys() == state.keys() and not translated.unknown


@pytest.mark.parametrize(
    "keys, told",
    [
        (["conv1.weight", "fc.weight", "linear.weight"], "fc.weight and linear.weight both mean fc.weight"),
        (["conv1.weight", "stem.conv1.weight", "res2.0.conv1.weight"], "conv1.weight and stem.conv1.weight both mean"),
    ],
)
def test_two_names_for_one_tensor_are_refused(keys, told):
    with pytest.raises(ValueError, match=told):
        to_ours({key: torch.full((1,), float(i)) for i, key in enumerate(keys)})


def test_whole_names_of_torchvision_are_not_mmdetections_with_its_head():
    state = build_resnet_classifier(18, 5).state_dict()
    found = to_ours({key.replace("fc.", "head.fc."): tensor for key, tensor in state.items()})
    assert found.format == "torchvision" and found.unknown == ["head.fc.weight", "head.fc.bias"]


def test_a_tensor_with_two_names_is_one():
    for other in ("linear.weight", "backbone.fc.weight"):
        read = to_ours({"conv1.weight": torch.zeros(1), "fc.weight": torch.ones(1), other: torch.ones(1)})
        assert read.state == {"conv1.weight": 0, "fc.weight": 1} and not read.unknown


@pytest.mark.parametrize("key", ["backbone.bottom_up.res2.0.conv1.gamma", "backbone.top_block.p9.weight"])
def test_an_unknown_tensor_inside_a_detectors_backbone_stays_inside(key):
    state = from_ours(detector("fpn").state_dict(), "detectron2") | {key: torch.zeros(1)}
    read = to_ours(state)
    assert read.unknown == [key] and key in read.state


def test_an_unknown_tensor_of_mmdetections_neck_counts_as_the_backbones():
    state = from_ours(detector("fpn").state_dict(), "mmdetection") | {"neck.downsample_convs.0.weight": torch.zeros(1)}
    assert "backbone.neck.downsample_convs.0.weight" in to_ours(state).state


def test_names_of_no_network_are_of_no_format():
    read = to_ours({"encoder.0.weight": torch.zeros(1)})
    assert read.format is None and list(read.state) == ["encoder.0.weight"]


def test_constants_are_set_apart():
    constants = {
        "pixel_mean": torch.zeros(3, 1, 1),
        "proposal_generator.anchor_generator.cell_anchors.0": torch.zeros(3, 4),
    }
    read = to_ours(from_ours(detector("fpn").state_dict(), "detectron2") | constants)
    assert read.constants.keys() == constants.keys() and not constants.keys() & read.state.keys()
    assert read.unknown == []


@pytest.mark.parametrize("format", ["torchvision", "detectron2", "msra"])
def test_another_eps_goes_into_the_scales(format):
    state = numbered(build_resnet_classifier(18, 5))
    state["bn1.running_var"][0] = 1e-9
    theirs = to_ours(from_ours(state, format, eps=1e-3)).state
    for name, tensor in merged_norms(state, eps=1e-3).items():
        got = merged_norms(theirs).get(name, tensor)
        assert (got - tensor).abs().max() <= 2e-6 * tensor.abs().max(), name


def test_msras_merged_norms_get_the_statistics_zero_and_one():
    read = to_ours(from_ours(numbered(build_resnet_classifier(18, 5)), "msra")).state
    assert not read["bn1.running_mean"].any()
    assert torch.equal(read["bn1.running_var"], torch.ones(64))


def test_a_head_of_other_anchors_does_not_keep_the_trunk_from_being_read():
    state = {key: torch.randn(2, 2) for key in from_ours(build_resnet_backbone(18).state_dict(), "detectron2")}
    state = {f"backbone.{key}": tensor for key, tensor in state.items()}
    logits = "proposal_generator.rpn_head.objectness_logits.weight"
    read = to_ours({**state, logits: torch.randn(2, 4, 1, 1)})
    assert "backbone.layer4.1.conv2.weight" in read.state and read.unknown == [logits]

"""detectron2's config.yaml beside a checkpoint decides input, stride, anchors and thresholds, or is refused by name."""

import pytest
import torch
import yaml
from reading import refusal

from resbackbone import build_resnet_backbone
from resbackbone.weights import read_weights
from resbackbone.weights.inputs import BGR_255, RGB_255, for_canonical_input
from resbackbone.weights.translate import from_ours

CONFIG = {
    "VERSION": 2,
    "INPUT": {"FORMAT": "BGR", "MIN_SIZE_TEST": 640},
    "TEST": {"DETECTIONS_PER_IMAGE": 30},
    "MODEL": {
        "META_ARCHITECTURE": "GeneralizedRCNN",
        "PIXEL_MEAN": BGR_255["mean"],
        "PIXEL_STD": BGR_255["std"],
        "BACKBONE": {"NAME": "build_resnet_fpn_backbone", "FREEZE_AT": 2},
        "RESNETS": {"DEPTH": 50, "NORM": "FrozenBN", "STRIDE_IN_1X1": True, "RES5_DILATION": 1},
        "FPN": {"NORM": "", "FUSE_TYPE": "sum"},
        "RPN": {"IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"], "NMS_THRESH": 0.6},
        "ANCHOR_GENERATOR": {"SIZES": [[16, 20]], "ASPECT_RATIOS": [[0.5, 2]]},
    },
}


def changed(path="", value=None):
    """CONFIG as YAML with another value at `path`."""
    config = yaml.safe_load(yaml.safe_dump(CONFIG))
    *parts, last = f"MODEL.{path or 'X'}".split(".") if not path.startswith("INPUT") else path.split(".")
    part = config
    for name in parts:
        part = part[name]
    part[last] = value
    return yaml.safe_dump(config)


@pytest.fixture(scope="module")
def trunk():
    torch.manual_seed(0)
    return build_resnet_backbone(50).state_dict()


@pytest.fixture
def checkpoint(trunk, tmp_path):
    torch.save({"model": from_ours(trunk, "detectron2"), "iteration": 1}, tmp_path / "model_final.pth")
    return tmp_path / "model_final.pth"


def test_input_stride_anchors_and_thresholds_are_those_of_the_config(checkpoint, trunk, caplog):
    checkpoint.with_name("config.yaml").write_text(changed())
    weights = read_weights(checkpoint)
    assert weights.metadata["backbone"]["stride_in_1x1"] is True and not weights.undecided and not weights.assumed
    assert torch.equal(weights.state["conv1.weight"], for_canonical_input(trunk["conv1.weight"], BGR_255))
    settings = {"min_size": 640, "box_detections_per_img": 30, "rpn_nms_thresh": 0.6}
    assert weights.metadata["settings"] == settings and weights.origins["input"] == "the config.yaml beside it"
    boxes = torch.tensor(weights.metadata["anchors"])
    assert boxes.shape == (5, 4, 4)
    assert boxes[0, :2, 2:].mul(2).flatten().tolist() == pytest.approx(
        [16 * 2**0.5, 8 * 2**0.5, 8 * 2**0.5, 16 * 2**0.5]
    )
    assert "are from detectron2's config.yaml beside it" in caplog.text


@pytest.mark.parametrize(
    "path, value, named",
    [
        ("BACKBONE.NAME", "build_mnasnet_backbone", "MODEL.BACKBONE has NAME 'build_mnasnet_backbone'"),
        ("RESNETS.NORM", "LN", "MODEL.RESNETS has NORM 'LN'"),
        ("RESNETS.DEFORM_ON_PER_STAGE", [False, False, True, True], "has DEFORM_ON_PER_STAGE"),
        ("RESNETS.NEW", 1, "has NEW 1, which this package does not know"),
        ("RESNETS", {"RES5_DILATION": 2, "STRIDE_IN_1X1": False}, "RES5_DILATION 2 and STRIDE_IN_1X1 False"),
        ("RESNETS", None, "has MODEL.RESNETS None, not a table"),
        ("FPN.FUSE_TYPE", "avg", "MODEL.FPN has FUSE_TYPE 'avg'; networks of this package have 'sum'"),
        ("RESNETS.DEPTH", 101, "are said to be for depth=101 by the config.yaml beside it"),
        ("PIXEL_STD", [1, 1, 0], "has std [1, 1, 0], not three numbers above 0"),
        ("PIXEL_MEAN", [100, 110, 120], "cannot be converted exactly"),
        ("INPUT.FORMAT", "L", "INPUT.FORMAT 'L'; this package converts BGR and RGB"),
    ],
)
def test_another_network_is_refused_by_the_name_of_its_setting(checkpoint, path, value, named):
    checkpoint.with_name("config.yaml").write_text(changed(path, value))
    with pytest.raises(ValueError) as caught:
        build_resnet_backbone(weights=checkpoint)
    assert named in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "path, value",
    [
        ("ROI_HEADS", {"NAME": "RROIHeads"}),
        ("ROI_BOX_HEAD", {"POOLER_TYPE": "ROIPool"}),
        ("INPUT.MIN_SIZE_TEST", 0),
        ("RPN.IN_FEATURES", ["p3"]),
    ],
)
def test_a_detector_that_is_not_built_leaves_its_trunk(checkpoint, path, value):
    checkpoint.with_name("config.yaml").write_text(changed(path, value))
    weights = read_weights(checkpoint)
    assert path.split(".")[-1] in weights.metadata["not_built"]
    build_resnet_backbone(weights=weights)


@pytest.mark.parametrize(
    "agnostic, deltas, problem",
    [
        (True, [[10, 10, 5, 5], [20, 20, 10, 10], [30, 30, 15, 15]], None),
        (False, [[10, 10, 5, 5], [20, 20, 10, 10], [30, 30, 15, 15]], "CLS_AGNOSTIC_BBOX_REG False"),
        (True, [[10, 10, 5, 5]] * 3, "BBOX_REG_WEIGHTS"),
    ],
)
def test_the_stages_of_a_cascade_are_those_of_the_config(checkpoint, agnostic, deltas, problem):
    config = yaml.safe_load(changed("ROI_HEADS", {"NAME": "CascadeROIHeads"}))
    config["MODEL"]["ROI_BOX_HEAD"] = {"CLS_AGNOSTIC_BBOX_REG": agnostic, "BBOX_REG_WEIGHTS": [10, 10, 5, 5]}
    config["MODEL"]["ROI_BOX_CASCADE_HEAD"] = {"IOUS": [0.5, 0.6, 0.75], "BBOX_REG_WEIGHTS": deltas}
    checkpoint.with_name("config.yaml").write_text(yaml.safe_dump(config))
    stated = read_weights(checkpoint).metadata
    assert stated["settings"]["cascade_ious"] == [0.5, 0.6, 0.75] and "bbox_reg_weights" not in stated["settings"]
    assert ("not_built" in stated) == (problem is not None) and (problem or "") in stated.get("not_built", "")


def test_it_is_read_beside_detectron2s_names_only_and_only_if_detectron2_wrote_it(checkpoint, trunk):
    torch.save(trunk, checkpoint.with_name("torchvisions.pth"))
    for text in (changed("RESNETS.NORM", "LN"), "a: 1", "{", "- 1", "a: !!python/object:x.Y {}"):
        checkpoint.with_name("config.yaml").write_text(text)
        assert torch.equal(read_weights(checkpoint.with_name("torchvisions.pth")).state["bn1.bias"], trunk["bn1.bias"])
        if "LN" not in text:
            assert "do not state their input" in refusal(checkpoint)


def test_what_the_caller_gives_must_agree_with_it(checkpoint):
    checkpoint.with_name("config.yaml").write_text(changed())
    assert "are for stride_in_1x1=True by the config.yaml beside it" in refusal(checkpoint, stride_in_1x1=False)
    assert "by the config.yaml beside it, but you gave RGB" in refusal(checkpoint, given_input=RGB_255)

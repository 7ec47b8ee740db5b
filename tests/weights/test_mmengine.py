"""The config in a checkpoint of mmengine decides stride, input and pyramid; what cannot be read or built is refused."""

import argparse
import json
import re

import pytest
import torch
import torchvision
from reading import refusal

from detection import load_detector
from resbackbone import build_resnet_backbone
from resbackbone.weights import read_weights
from resbackbone.weights.inputs import BGR_255, INPUT, for_canonical_input
from resbackbone.weights.mmengine import parse_config
from resbackbone.weights.write import only_part

CAFFE = """
data_preprocessor = dict(
    bgr_to_rgb=False,
    mean=[
        103.53,
        116.28,
        123.675,
    ],
    pad_size_divisor=32,
    std=[
        1.0,
        1.0,
        1.0,
    ],
    type='DetDataPreprocessor')
"""
RGB = CAFFE.replace("False", "True").replace("103.53", "x").replace("123.675", "103.53").replace("x", "123.675")
RGB = RGB.replace("1.0,\n        1.0,\n        1.0,", "58.395, 57.12, 57.375")
PLAIN_RGB = "img_norm_cfg = dict(mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375))"
NECK = "neck=dict(type='FPN', in_channels=[64, 128, 256, 512], out_channels=256, num_outs=5)"
MMDET_2 = """/home/u/faster_rcnn_r50_fpn_1x.py
# model settings
norm_cfg = dict(type='BN', requires_grad=False)
model = dict(
    type='FasterRCNN',
    pretrained='open-mmlab://detectron2/resnet18_caffe',
    backbone=dict(type='ResNet', depth=18, num_stages=4, out_indices=(0, 1, 2, 3), frozen_stages=1, norm_cfg=norm_cfg,
                  norm_eval=True, style='caffe'),
    neck=dict(type='FPN', in_channels=[64, 128, 256, 512], out_channels=256, num_outs=5))
img_norm_cfg = dict(mean=[103.530, 116.280, 123.675], std=[1.0, 1.0, 1.0], to_rgb=False)
train_pipeline = [dict(type='LoadImageFromFile'), dict(type='Normalize', **img_norm_cfg)]
data = dict(samples_per_gpu=2, train=dict(pipeline=train_pipeline))
optimizer = dict(type='SGD', lr=0.02 / 8, hooks=make_hooks(1))
"""

FOUR_MAPS = "neck=dict(type='FPN', in_channels=[64, 128, 256, 512], out_channels=256, %s)"


def config(backbone="", neck=NECK, pixels=CAFFE):
    return (
        f"{pixels}\nmodel = dict(\n    backbone=dict(type='ResNet', depth=18{backbone}),\n    {neck},\n    type='X')\n"
    )


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return {k: x for k, x in torchvision.models.resnet18().state_dict().items() if not k.startswith("fc.")}


@pytest.fixture
def saved(tmp_path, state):
    def save(text, key="cfg", **more):
        path = tmp_path / "epoch_12.pth"
        named = {f"backbone.{name}": tensor for name, tensor in state.items()}
        torch.save({"meta": {"mmengine_version": "0.10.4", key: text}, "state_dict": {**named, **more}}, path)
        return path

    return save


@pytest.mark.parametrize(
    "text, key, bgr, style",
    [
        (config(", style='caffe'"), "cfg", True, True),
        (config(pixels=RGB), "cfg", False, False),
        (MMDET_2, "config", True, True),
        (config(neck="neck=None", pixels=PLAIN_RGB + RGB), "config", False, False),
    ],
    ids=["one number a line", "bgr_to_rgb", "mmdetection 2", "both kinds"],
)
def test_stride_and_input_are_the_configs(saved, state, text, key, bgr, style):
    weights = read_weights(saved(text, key))
    assert weights.assumed == {} and weights.origins["input"] == "the mmengine config in the file"
    assert weights.metadata["backbone"]["stride_in_1x1"] is style
    expected = for_canonical_input(state["conv1.weight"], BGR_255) if bgr else state["conv1.weight"]
    assert torch.allclose(weights.state["conv1.weight"], expected, rtol=1e-6)
    assert build_resnet_backbone(weights=weights).config.depth == 18


@pytest.mark.parametrize(
    "backbone, neck, key, value",
    [
        ("", NECK.replace("num_outs=5", "num_outs=5, relu_before_extra_convs=True"), "relu_before_p7", True),
        ("", NECK, "relu_before_p7", False),
        ("", NECK.replace("num_outs=5", "num_outs=5, add_extra_convs='on_output'"), "p6_from", "p5"),
        ("", NECK.replace("num_outs=5", "num_outs=5, add_extra_convs=True"), "p6_from", "c5"),
        (", norm_cfg=dict(type='SyncBN', eps=1e-3)", NECK, "eps", 1e-3),
        ("", FOUR_MAPS % "num_outs=4", "levels", ["p2", "p3", "p4", "p5"]),
        ("", FOUR_MAPS % "num_outs=4, start_level=1", "levels", ["p3", "p4", "p5", "p6"]),
        ("", NECK.replace("num_outs=5", "num_outs=5, norm_cfg=dict(type='GN', num_groups=32)"), "fpn_norm", "GN"),
    ],
)
def test_other_settings_that_change_maps_are_the_configs_too(saved, backbone, neck, key, value):
    assert read_weights(saved(config(backbone, neck))).metadata["backbone"][key] == value


def test_a_dilated_c5_is_that_of_bottlenecks_with_the_stride_in_the_1x1(saved):
    text = config(", style='caffe', strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2)")
    assert "has strides [1, 2, 2, 1] and dilations [1, 1, 1, 2]; no network" in refusal(saved(text))
    assert read_weights(saved(text.replace("depth=18", "depth=50"))).metadata["backbone"]["dilate_c5"] is True


@pytest.mark.parametrize(
    "text, named",
    [
        (config(", dcn=dict(type='DCNv2')"), "model.backbone has dcn {'type': 'DCNv2'}, which this package does not"),
        (config(", plugins=[dict(cfg=dict(type='ContextBlock'))]"), "model.backbone has plugins"),
        (config(", stem_channels=128"), "model.backbone has stem_channels 128; networks of this package have 64"),
        (config(", act_cfg=dict(type='GELU')"), "model.backbone has act_cfg {'type': 'GELU'}"),
        (config(", norm_cfg=dict(type='IN')"), "model.backbone.norm_cfg has type 'IN'"),
        (config(", norm_cfg=dict(type='GN', num_groups=16)"), "model.backbone.norm_cfg has num_groups 16"),
        (config(", style=STYLE"), "model.backbone has style STYLE; networks of this package have 'pytorch' or 'caffe'"),
        (config(", strides=(1, 2, 1, 1)"), "model.backbone has strides [1, 2, 1, 1] and dilations [1, 1, 1, 1]"),
        (
            config(", strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2)"),
            "has strides [1, 2, 2, 1] and dilations [1, 1, 1, 2]",
        ),
        (config().replace("'ResNet'", "'ResNeSt'"), "model.backbone has type 'ResNeSt'"),
        (config(", plugins=dict(a=f(1,\n    lambda: 2))"), "model.backbone has plugins"),
        (config() + "model = None", "has model None, not a dict"),
        (config() + "if debug:\n    model = make()", "has model if debug: model = make(), not a dict"),
        (config(pixels=CAFFE.replace("103.53", "blue")), "DetDataPreprocessor has mean [blue, 116.28, 123.675]"),
        (config(pixels=CAFFE.replace("False", "FLAG")), "DetDataPreprocessor has bgr_to_rgb FLAG"),
        (config(pixels=""), "has no mean and std that can be read"),
        (config(pixels="data_preprocessor = make(mean=[1, 2, 3])"), "has no mean and std that can be read"),
        (config(pixels=CAFFE + "img_norm_cfg = dict(mean=[1, 2, 3], std=[1, 1, 1])"), "describes more than one input"),
        (config(pixels=RGB + "p = [dict(type='LoadImageFromFile', channel_order='rgb')]"), "has channel_order 'rgb'"),
        (config() + "model['backbone'] = make()", "has model model['backbone'] = make(), not a dict that can be read"),
        (config() + "_base_ = ['a.py']", "refers to other files (_base_)"),
        ("model = dict(", "is not readable"),
        (CAFFE, "has model None, not a dict that can be read"),
        (7, "has model None, not a dict"),
    ],
)
def test_what_changes_the_network_or_cannot_be_read_is_refused_by_its_name(saved, text, named):
    path = saved(text)
    with pytest.raises(ValueError) as error:
        read_weights(path)
    assert named in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "neck, names, named",
    [
        ("[dict(type='FPN'), dict(type='BFP')]", ["0.lateral_convs.0.conv"], "is [{'type': 'FPN'}, {'type': 'BFP'}]"),
        ("dict(type='FPN', in_channels=[1] * 4, start_level=1, num_outs=5)", [], "has num_outs 5 and start_level 1"),
        ("dict(type='PAFPN')", ["lateral_convs.0.conv", "downsample_convs.0.conv"], "has type 'PAFPN'"),
        ("dict(type='FPN', add_extra_convs='on_lateral')", ["fpn_convs.4.conv"], "has add_extra_convs 'on_lateral'"),
        ("dict(type='ChannelMapper')", ["convs.0.conv"], "has type 'ChannelMapper'"),
        ("dict(type='MoCoV2Neck')", ["mlp.0"], "has type 'MoCoV2Neck'"),
    ],
)
def test_the_trunk_beside_another_pyramid_is_read_and_the_pyramid_refused_by_name(saved, state, neck, names, named):
    path = saved(config(neck=f"neck={neck}"), **{f"neck.{name}.weight": torch.zeros(1) for name in names})
    built = build_resnet_backbone(weights=path, norm="BN")
    assert torch.equal(built.layer4[1].conv2.weight, state["layer4.1.conv2.weight"])
    only_part(read_weights(path), "trunk")
    for build in (
        lambda: build_resnet_backbone(weights=path, fpn=True),
        lambda: load_detector(path),
        lambda: only_part(read_weights(path), "backbone"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"model.neck {named}") + ".*their trunk can be read alone"):
            build()


@pytest.mark.parametrize("to_rgb, order", [("", "RGB"), (", to_rgb=True", "BGR")])
def test_frames_of_videos_are_read_as_rgb(saved, to_rgb, order):
    pixels = RGB if order == "RGB" else CAFFE
    pixels = pixels.replace("bgr_to_rgb=True,", "").replace("bgr_to_rgb=False,", "").replace("DetData", "ActionData")
    pixels = pixels.replace("pad_size_divisor=32", f"format_shape='NCHW'{to_rgb}")
    weights = read_weights(saved(config(pixels=pixels)))
    assert weights.metadata["converted_from"]["input"]["channel_order"] == order


JSON = {
    "model": {"type": "X", "backbone": {"type": "ResNet", "depth": 18, "style": "caffe"}},
    "img_norm_cfg": {"mean": BGR_255["mean"], "std": BGR_255["std"], "to_rgb": False},
}


@pytest.mark.parametrize(
    "given, bgr",
    [
        ({"lr": 0.1}, False),
        ({"model": "resnet18"}, False),
        ({"model": {"name": "resnet18"}}, False),
        ("configs/r18.yaml", False),
        ("configs/r18.py", False),
        ("lr: 0.1\nmodel: resnet18\n", False),
        ("lr = 0.1\narch = 'resnet18'\n", False),
        ('{"lr": 0.1}', False),
        (argparse.Namespace(lr=0.1), False),
        (JSON, True),
        (json.dumps(JSON), True),
        ("model:\n  backbone: {type: ResNet, depth: 18, style: caffe}\nimg_norm_cfg: %s\n", True),
    ],
)
def test_meta_is_mmengines_only_if_it_shows_so(tmp_path, state, given, bgr):
    given = given % json.dumps(JSON["img_norm_cfg"]) if isinstance(given, str) and "%s" in given else given
    torch.save({"meta": {"config": given, "epoch": 3}, "state_dict": state}, tmp_path / "net.pth")
    weights = read_weights(tmp_path / "net.pth")
    assert weights.metadata["converted_from"]["input"] == (BGR_255 if bgr else INPUT)
    assert weights.metadata.get("backbone", {}).get("stride_in_1x1", False) is bgr


def test_only_plain_values_are_read_and_nothing_runs(tmp_path):
    code = f"open({str(tmp_path / 'trace')!r}, 'w')"
    values = parse_config(f"import os\na = -0.5 * 4\nb = {code}\nc = dict(x=[{code}, 1], **a)\nd = a ** 9\nos.abort()")
    assert parse_config("std = [1.0] * 3\nn = 2 * [1, 2]") == {"std": [1.0] * 3, "n": [1, 2, 1, 2]}
    assert repr(parse_config("a = [0] * 10**9")["a"]) == "[0] * 10 ** 9"
    assert values["a"] == -2.0 and list(tmp_path.iterdir()) == []
    assert repr(values["b"]) == code and repr(values["c"]) == "**-2.0" and repr(values["d"]) == "a ** 9"

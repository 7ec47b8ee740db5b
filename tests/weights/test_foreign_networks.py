"""The networks of other packages and ours give the same outputs from each other's weights, to 1e-5 in fp32."""

import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image

from resbackbone import build_resnet_backbone, build_resnet_classifier
from resbackbone.resnet import DEPTHS
from resbackbone.weights import MEAN, STD, Weights, read_weights
from resbackbone.weights.write import write_as


def assert_equal(got, expected):
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.fixture
def images():
    """[1, 3, 97, 130] of 0..1: a real image where there is one, else noise."""
    folder = os.environ.get("RESBACKBONE_TEST_DATA")
    if not folder:
        return torch.randint(0, 256, (1, 3, 97, 130)) / 255
    path = sorted((Path(folder) / "coco_tiny" / "val2017").glob("*.jpg"))[0]
    pixels = np.array(Image.open(path).convert("RGB").resize((130, 97)))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255


def normalized(images):
    return (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def weights_of(model, **architecture):
    """The weights of one of our models, as its file would give them."""
    return Weights(model.state_dict(), {"backbone": architecture}, "a model", format="resbackbone")


@pytest.mark.parametrize(
    "depth", [pytest.param(depth, marks=[] if depth in (34, 101) else [pytest.mark.slow]) for depth in DEPTHS]
)  # 34 has all names of 18, and 101 those of 50 and 152
@torch.inference_mode()
def test_torchvision_and_timm(depth, images, randomised, tmp_path):
    ours = randomised(build_resnet_classifier(depth, 7))
    expected = ours(normalized(images))
    for format, theirs in (
        ("torchvision", getattr(torchvision.models, f"resnet{depth}")(num_classes=7)),
        ("timm", timm.create_model(f"resnet{depth}", num_classes=7)),
    ):
        write_as(tmp_path / f"{format}.pth", weights_of(ours), format)
        theirs.load_state_dict(torch.load(tmp_path / f"{format}.pth", weights_only=True), strict=True)
        assert_equal(theirs.eval()(normalized(images)), expected)
        randomised(theirs)
        torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
        back = build_resnet_classifier(weights=tmp_path / "theirs.pth").eval()
        assert_equal(back(normalized(images)), theirs(normalized(images)))


@pytest.mark.parametrize("name", ["resnet18d", "resnet50d", "resnet50c"])
@torch.inference_mode()
def test_timms_deep_stems_and_shortcuts_with_a_pool(name, images, randomised, tmp_path):
    theirs = randomised(timm.create_model(name, num_classes=7))
    expected = theirs(normalized(images))
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    ours = build_resnet_classifier(weights=tmp_path / "theirs.pth").eval()
    assert_equal(ours(normalized(images)), expected)
    write_as(tmp_path / "ours.pth", weights_of(ours), "timm")
    again = timm.create_model(name, num_classes=7)
    again.load_state_dict(torch.load(tmp_path / "ours.pth", weights_only=True), strict=True)
    assert_equal(again.eval()(normalized(images)), expected)


@pytest.mark.parametrize("name", ["resnet50t", "resnet50s"])
def test_another_deep_stem_is_refused_with_its_channels(name):
    state = timm.create_model(name).state_dict()
    widths = {"resnet50t": "[24, 32, 64]", "resnet50s": "[64, 64, 128]"}[name]
    with pytest.raises(ValueError, match=re.escape(f"have a deep stem of {widths} channels; networks built here have")):
        build_resnet_backbone(weights=state)


MMDETECTION = {"conv1.": "stem.", "bn1.": "stem.7."}
MMPRETRAIN = {  # where nothing strides, its shortcut has no pool
    **{f"conv1.{3 * i}.": f"stem.{i}.conv." for i in range(3)},
    "conv1.1.": "stem.0.bn.",
    "conv1.4.": "stem.1.bn.",
    "bn1.": "stem.2.bn.",
    **{f"layer1.0.downsample.{i}.": f"layer1.0.downsample.{i - 1}." for i in (1, 2)},
}


@pytest.mark.parametrize("prefix", ["backbone.", ""])
@pytest.mark.parametrize("names", [MMDETECTION, MMPRETRAIN], ids=["mmdetection", "mmpretrain"])
def test_openmmlabs_resnet_d(names, prefix, randomised):
    timms = randomised(timm.create_model("resnet50d", num_classes=0)).state_dict()
    theirs = {}
    for key, tensor in timms.items():
        start = next((start for start in names if key.startswith(start)), "")
        theirs[prefix + names.get(start, "") + key.removeprefix(start)] = tensor
    read = read_weights({"state_dict": theirs}, given_input="rgb", stride_in_1x1=False)
    assert read.format == "mmdetection"
    assert read.state.keys() == timms.keys()
    assert all(torch.equal(read.state[key], tensor) for key, tensor in timms.items())


@pytest.mark.parametrize("name", ["resnext50_32x4d", "wide_resnet50_2"])
@torch.inference_mode()
def test_wider_bottlenecks(name, images, randomised):
    for theirs in (getattr(torchvision.models, name)(num_classes=3), timm.create_model(name, num_classes=3)):
        randomised(theirs)
        ours = build_resnet_classifier(weights=theirs.state_dict()).eval()
        assert_equal(ours(normalized(images)), theirs(normalized(images)))


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("stride_in_1x1", [False, True])
@torch.inference_mode()
def test_transformers(depth, stride_in_1x1, images, randomised, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = randomised(build_resnet_classifier(depth, 7, stride_in_1x1=stride_in_1x1))
    write_as(tmp_path / "folder", weights_of(ours, stride_in_1x1=stride_in_1x1), "transformers")
    theirs, report = transformers.ResNetForImageClassification.from_pretrained(
        tmp_path / "folder", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert_equal(theirs.eval()(normalized(images)).logits, ours(normalized(images)))
    randomised(theirs).save_pretrained(tmp_path / "theirs")
    back = build_resnet_classifier(weights=tmp_path / "theirs").eval()
    assert_equal(back(normalized(images)), theirs(normalized(images)).logits)


@pytest.fixture(scope="module")
def detectron2():
    """Builds detectron2's backbones from config names, with numbers in their norms."""
    pytest.importorskip("detectron2", reason="detectron2 is not installed")
    from detectron2.config import get_cfg
    from detectron2.modeling import build_backbone

    def build(builder, **resnets):
        config = get_cfg()
        config.MODEL.BACKBONE.NAME, config.MODEL.BACKBONE.FREEZE_AT = builder, 0
        for name, value in resnets.items():
            config.MODEL.RESNETS[name] = value
        config.MODEL.FPN.IN_FEATURES = [name for name in resnets["OUT_FEATURES"] if name != "stem"]
        return build_backbone(config)

    return build


def bgr_255(images):
    return images.flip(1) * 255 - torch.tensor([103.53, 116.28, 123.675]).view(3, 1, 1)


LEVELS = {"c2": "res2", "c3": "res3", "c4": "res4", "c5": "res5"}
TRUNKS = [
    (18, {}),
    (34, {}),
    (50, {}),
    (50, {"STRIDE_IN_1X1": False}),
    (101, {}),
    (50, {"NUM_GROUPS": 32, "WIDTH_PER_GROUP": 8, "STRIDE_IN_1X1": False}),
    (50, {"RES5_DILATION": 2}),
]


@pytest.mark.parametrize("depth, resnets", TRUNKS)
@torch.inference_mode()
def test_detectron2s_trunks(detectron2, depth, resnets, images, randomised, tmp_path):
    if depth < 50:
        resnets = {**resnets, "RES2_OUT_CHANNELS": 64}
    outputs = {"OUT_FEATURES": list(LEVELS.values())}
    theirs = randomised(detectron2("build_resnet_backbone", DEPTH=depth, **resnets, **outputs))
    path, state = tmp_path / "theirs.pkl", {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    pixels = {"pixel_mean": np.float32([103.53, 116.28, 123.675]), "pixel_std": np.ones(3, np.float32)}
    path.write_bytes(pickle.dumps({"model": state | pixels}))
    style = {"stride_in_1x1": resnets.get("STRIDE_IN_1X1", True)}
    ours = build_resnet_backbone(weights=path, dilate_c5=resnets.get("RES5_DILATION") == 2, **style).eval()
    expected, got = theirs(bgr_255(images)), ours(normalized(images))
    for level, name in LEVELS.items():
        assert_equal(got[level], expected[name])

    write_as(tmp_path / "ours.pkl", weights_of(randomised(ours), **style), "detectron2")  # with other numbers, back
    back = pickle.loads((tmp_path / "ours.pkl").read_bytes())["model"]  # noqa: S301 - written by this test
    report = theirs.load_state_dict({name: torch.from_numpy(array) for name, array in back.items()}, strict=False)
    assert not report.unexpected_keys and not [key for key in report.missing_keys if "num_batches" not in key]
    expected, got = ours(normalized(images)), theirs(bgr_255(images))
    for level, name in LEVELS.items():
        assert_equal(got[name], expected[level])


@pytest.mark.parametrize(
    "builder, inputs, levels",
    [
        ("build_resnet_fpn_backbone", ["res2", "res3", "res4", "res5"], ["p2", "p3", "p4", "p5", "p6"]),
        ("build_retinanet_resnet_fpn_backbone", ["res3", "res4", "res5"], ["p3", "p4", "p5", "p6", "p7"]),
    ],
)
@torch.inference_mode()
def test_detectron2s_pyramids(detectron2, builder, inputs, levels, images, randomised, tmp_path):
    theirs = randomised(detectron2(builder, DEPTH=50, OUT_FEATURES=inputs))
    torch.save({"model": {f"backbone.{k}": v for k, v in theirs.state_dict().items()}}, tmp_path / "theirs.pth")
    weights = read_weights(tmp_path / "theirs.pth", given_input="bgr-255", stride_in_1x1=True)
    ours = build_resnet_backbone(weights=weights, fpn=True).eval()
    square = torch.nn.functional.pad(images, (0, 30, 0, 31))  # detectron2's pyramids take multiples of 32
    expected, got = theirs(bgr_255(square)), ours(normalized(square))
    assert list(got) == levels
    for level in levels:
        assert_equal(got[level], expected[level])


@torch.inference_mode()
def test_msras_names_as_detectron2_reads_them(detectron2, images, randomised, tmp_path):
    from detectron2.checkpoint import DetectionCheckpointer

    ours = randomised(build_resnet_backbone(50, stride_in_1x1=True))
    write_as(tmp_path / "R-50.pkl", weights_of(ours, stride_in_1x1=True), "msra")
    theirs = detectron2("build_resnet_backbone", DEPTH=50, OUT_FEATURES=list(LEVELS.values())).eval()
    DetectionCheckpointer(theirs).load(str(tmp_path / "R-50.pkl"))
    expected, got = ours(normalized(images)), theirs(bgr_255(images))
    for level, name in LEVELS.items():
        assert_equal(got[name], expected[level])
    back = build_resnet_backbone(weights=tmp_path / "R-50.pkl").eval()(normalized(images))
    for level in LEVELS:
        assert_equal(back[level], expected[level])

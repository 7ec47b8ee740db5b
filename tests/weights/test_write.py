import json
import pickle

import pytest
from safetensors import safe_open

from resbackbone import build_resnet_backbone, build_resnet_classifier
from resbackbone.resnet import DEPTHS, Bottleneck
from resbackbone.weights import INPUT, Weights, read_weights
from resbackbone.weights.write import architecture_name, largest_difference, write_as


def weights_of(model, **metadata):
    return Weights(model.state_dict(), metadata, "a model", format="resbackbone")


@pytest.fixture
def classifier(randomised):
    return randomised(build_resnet_classifier(18, 5))


def test_our_file_says_everything_about_itself(classifier, tmp_path):
    said = {"source": "here", "licence": "MIT", "recipe": "none", "classes": list("abcde")}
    write_as(tmp_path / "own.safetensors", weights_of(classifier, **said, backbone={"stride_in_1x1": True}))
    with safe_open(tmp_path / "own.safetensors", "pt") as file:
        metadata = {key: json.loads(value) for key, value in file.metadata().items()}
    trunk = {
        "depth": 18,
        "stem": "7x7",
        "shortcut": "B",
        "stride_in_1x1": True,
        "groups": 1,
        "width_per_group": 64,
        "in_channels": 3,
    }
    more = {"format": "resbackbone", "architecture": "resnet18", "num_classes": 5, "input": INPUT}
    assert metadata == {**said, **more, "backbone": {**trunk, "eps": 1e-5, "norm": "BN"}}


@pytest.mark.parametrize(
    "format, suffix",
    [
        *(
            (format, suffix)
            for format in ("torchvision", "timm", "mmdetection")
            for suffix in (".pth", ".bin", ".safetensors")
        ),
        *((format, suffix) for format in ("detectron2", "msra") for suffix in (".pkl", ".pth", ".safetensors")),
        ("transformers", ""),
        ("resbackbone", ".safetensors"),
    ],
)
@pytest.mark.parametrize("eps", [1e-5, 1e-3])
def test_a_written_file_reads_back_as_the_same_network(classifier, format, suffix, eps, tmp_path):
    weights = weights_of(classifier, backbone={"eps": eps})
    write_as(tmp_path / f"out{suffix}", weights, format)
    back = read_weights(tmp_path / f"out{suffix}")
    difference, _ = largest_difference(weights, back)
    assert difference < 1e-6
    if suffix != ".pth" and format not in ("torchvision", "timm") or format == "resbackbone":
        assert not back.assumed  # it says for what input and stride it is


def test_the_largest_difference_is_found_and_named(classifier):
    weights = weights_of(classifier)
    other = {name: tensor.clone() for name, tensor in weights.state.items()}
    other["layer3.0.conv1.weight"][0, 0, 0, 0] += other["layer3.0.conv1.weight"].abs().max() / 2
    assert largest_difference(weights, weights) == (0.0, "")
    assert largest_difference(weights, Weights(other, {}, "b")) == (
        pytest.approx(0.5, rel=0.01),
        "layer3.0.conv1.weight",
    )
    assert largest_difference(weights, weights_of(classifier, backbone={"eps": 1e-3}))[0] > 1e-5
    del other["fc.bias"]
    with pytest.raises(ValueError, match="different tensors: fc.bias"):
        largest_difference(weights, Weights(other, {}, "b"))


@pytest.mark.parametrize(
    "format, options, message",
    [
        ("torchvision", {"shortcut": "C"}, "torchvision only has networks with stem 7x7 and shortcut B"),
        *(
            (format, {"stem": "deep", "shortcut": "D"}, f"stem='deep' with shortcut='D': {format} only has networks")
            for format in ("torchvision", "detectron2", "msra", "mmdetection", "transformers")
        ),
        ("timm", {"shortcut": "D"}, r"shortcut B, and with stem='deep' and shortcut B or D \(ResNet-C and -D\)"),
        *(
            (
                "timm",
                {"stride_in_1x1": True, "depth": depth, "levels": ["c3"]},
                "timm's networks have the stride in the 3x3",
            )
            for depth, (block, _) in DEPTHS.items()
            if block is Bottleneck
        ),
        ("transformers", {"groups": 32, "width_per_group": 4}, "neither groups nor other widths"),
        ("transformers", {"norm": "GN"}, "norm='GN': transformers only has networks with batch norms"),
        ("torchvision", {"norm": "GN", "eps": 1e-3}, "norm='GN' with eps=0.001: torchvision's group norms have 1e-05"),
        ("msra", {"norm": "GN"}, "norm='GN': msra only has networks with batch norms"),
        ("detectron2", {"in_channels": 4}, "in_channels=4: detectron2's networks take three colours"),
        ("caffe", {}, "unknown format 'caffe'; choose from resbackbone, torchvision"),
    ],
)
def test_a_network_that_a_format_has_not_got_is_refused(format, options, message, tmp_path):
    weights = weights_of(build_resnet_backbone(**{"depth": 50, **options}), backbone=options)
    with pytest.raises(ValueError, match=message):
        write_as(tmp_path / "out", weights, format)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["torchvision", "detectron2"])
def test_a_pyramid_without_relu_before_p7_goes_only_where_there_is_one(format, tmp_path):
    options = {"fpn": True, "fpn_channels": 8, "levels": ["p3", "p7"], "relu_before_p7": False}
    backbone = build_resnet_backbone(18, **options)
    weights = weights_of(backbone, backbone=backbone.config.to_json())
    with pytest.raises(ValueError, match=f"relu_before_p7=False: {format}'s pyramids have a ReLU"):
        write_as(tmp_path / "out.pth", weights, format)
    for relu in (False, True):
        weights.metadata["backbone"]["relu_before_p7"] = relu
        write_as(tmp_path / "out.pth", weights, "mmdetection")
        assert build_resnet_backbone(weights=tmp_path / "out.pth", fpn=True).config.relu_before_p7 is relu


@pytest.mark.parametrize(
    "format, name, message",
    [
        ("torchvision", "out.pkl", r"unknown suffix '.pkl' for torchvision; choose from .safetensors, .pth, .pt, .bin"),
        ("detectron2", "out.npz", r"choose from .safetensors, .pth, .pt, .bin, .pkl"),
        ("transformers", "out.pth", "transformers reads a folder"),
        ("resbackbone", "out.pth", "unknown suffix '.pth' for resbackbone"),
    ],
)
def test_a_suffix_that_a_format_has_not_got_is_refused(classifier, format, name, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_as(tmp_path / name, weights_of(classifier), format)


def test_detectron2_gets_what_its_checkpointer_looks_for(classifier, tmp_path):
    write_as(tmp_path / "out.pkl", weights_of(classifier), "detectron2")
    content = pickle.loads((tmp_path / "out.pkl").read_bytes())  # noqa: S301 - written by this test
    assert content["matching_heuristics"] is True and content["__author__"] == "resbackbone"
    assert content["model"]["stem.conv1.weight"].shape == (64, 3, 7, 7)


@pytest.mark.parametrize(
    "trunk, name",
    [
        ({"depth": 50}, "resnet50"),
        ({"depth": 101, "groups": 32, "width_per_group": 8}, "resnext101_32x8d"),
        ({"depth": 50, "width_per_group": 128}, "wide_resnet50_2"),
        ({"depth": 34, "shortcut": "none"}, "plain34"),
        ({"depth": 18, "stem": "deep", "shortcut": "D"}, "resnet18d"),
        ({"depth": 50, "stem": "deep", "shortcut": "D", "groups": 32, "width_per_group": 4}, "resnext50d_32x4d"),
    ],
)
def test_trunks_have_torchvisions_names(trunk, name):
    assert architecture_name({"groups": 1, "width_per_group": 64, "shortcut": "B", **trunk}) == name

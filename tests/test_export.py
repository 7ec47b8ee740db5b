"""Exported files, run by onnxruntime and by torch.export's loader, against the backbone they were made from."""

import gc
import json
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from prints import prints_into
from torch import Tensor

from resbackbone import build_resnet_backbone
from resbackbone.weights.inputs import INPUT

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

P3_TO_P7 = ("p3", "p4", "p5", "p6", "p7")
ODD_SIZES = [(1, 97, 130), (2, 224, 160), (3, 65, 33), (1, 1, 40)]  # batch, height, width


def run(path: Path, images: Tensor) -> dict[str, Tensor]:
    """The feature maps that the file at `path` computes."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(images)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, map(torch.from_numpy, session.run(None, {"images": images.numpy()})), strict=True))


def assert_computes_the_same(path: Path, backbone, sizes) -> None:
    for batch, height, width in sizes:
        images = torch.randn(batch, backbone.config.in_channels, height, width)
        with torch.no_grad():
            expected = backbone.eval()(images)
        maps = run(path, images)
        assert list(maps) == list(expected) == list(backbone.features)
        for level, x in expected.items():
            assert maps[level].shape == x.shape
            difference = (maps[level] - x).abs().max()
            assert difference <= 1e-5 * x.abs().max(), f"{level} of {batch} x {height} x {width}"


@pytest.fixture(
    scope="module",
    params=[
        ({"fpn": True}, "onnx"),
        ({"fpn": True}, "pt2"),
        ({"fpn": True, "levels": P3_TO_P7, "p6_from": "c5"}, "onnx"),
    ],
    ids=["p2-p6", "p2-p6 pt2", "p3-p7"],
)
def exported(request, module_path, randomised):
    """A backbone with a pyramid, its file, and what exporting it said."""
    network, suffix = request.param
    torch.manual_seed(0)
    backbone = randomised(build_resnet_backbone(18, fpn_channels=32, **network))
    path = module_path / f"{'-'.join(backbone.features)}.{suffix}"
    gc.collect()  # what other tests left open warns here
    with open(module_path / "said.txt", "w+") as said, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with prints_into(said):
            backbone.export(path)
    said, warned = (module_path / "said.txt").read_text(), [str(warning.message) for warning in warned]
    return SimpleNamespace(backbone=backbone, path=path, said=said, warned=warned)


def test_an_exported_file_computes_what_the_backbone_does_at_any_batch_and_size(exported):
    assert_computes_the_same(exported.path, exported.backbone, ODD_SIZES)


def test_export_prints_nothing_folds_norms_and_writes_nothing_of_this_machine(exported):
    assert exported.said == "" and not exported.warned
    content = exported.path.read_bytes()
    assert b"batch_norm" not in content and b"BatchNorm" not in content
    assert str(Path(__file__).parents[1]).encode() not in content


@pytest.mark.parametrize(
    "depth, network",
    [
        (50, {"levels": ["c3"], "groups": 32, "width_per_group": 4, "stride_in_1x1": True}),
        (18, {"levels": ["c3"], "norm": "SyncBN", "shortcut": "C", "in_channels": 1}),
        (18, {"levels": ["c3"], "shortcut": "none", "checkpoint_activations": True}),
        (18, {"levels": ["c5"], "shortcut": "A", "dilate_c5": True}),
        (18, {"levels": ["c3"], "stem": "deep", "shortcut": "D"}),
        (18, {"levels": ["c3"], "norm": "GN"}),
    ],
    ids=["ResNeXt", "SyncBN, C, grey", "plain", "A, dilated", "ResNet-D", "GN"],
)
def test_every_kind_of_network_exports_to_onnx(tmp_path, randomised, depth, network):
    backbone = randomised(build_resnet_backbone(depth, **network))
    path = tmp_path / "backbone.onnx"
    backbone.train().export(path)
    onnx.checker.check_model(path, full_check=True)
    assert_computes_the_same(path, backbone, [(3, 97, 70)])


def assert_names_and_free_dimensions(graph) -> None:
    images, *maps = (
        (value.name, [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim])
        for value in (*graph.input, *graph.output)
    )
    assert images == ("images", ["batch", 3, "height", "width"])
    assert [name for name, _ in maps] == ["c2", "c3"]
    for _, (batch, channels, height, width) in maps:
        assert batch == "batch" and isinstance(channels, int) and "height" in height and "width" in width


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_an_exported_file_says_what_it_is_and_what_it_takes(tmp_path, suffix):
    weights = build_resnet_backbone(18, levels=["c3"]).state_dict()
    backbone = build_resnet_backbone(18, levels=["c2", "c3"], weights=weights)
    path = tmp_path / f"backbone.{suffix}"
    backbone.export(path)
    if suffix == "onnx":
        model = onnx.load(path)
        assert_names_and_free_dimensions(model.graph)
        metadata = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    else:
        files = {"metadata.json": ""}
        torch.export.load(path, extra_files=files)
        metadata = json.loads(files["metadata.json"])
    assert metadata == {
        "format": "resbackbone",
        "input": INPUT,
        "levels": {"c2": {"channels": 64, "stride": 4}, "c3": {"channels": 128, "stride": 8}},
        "backbone": backbone.config.to_json(),
        "weights_source": "the given state dict",
    }


def test_export_leaves_the_backbone_as_it_is(tmp_path):
    backbone = build_resnet_backbone(18, levels=["c2"]).train()
    backbone.bn1.eval()
    backbone.conv1.requires_grad_(False)
    backbone(torch.randn(2, 3, 33, 34))["c2"].sum().backward()

    def condition() -> dict:
        return {
            "modules": {name: (type(module), module.training) for name, module in backbone.named_modules()},
            "trainable": {name: parameter.requires_grad for name, parameter in backbone.named_parameters()},
            "identities": [id(parameter) for parameter in backbone.parameters()],
        }

    def tensors() -> dict[str, Tensor]:
        gradients = {f"{name}.grad": p.grad for name, p in backbone.named_parameters() if p.grad is not None}
        return {name: tensor.clone() for name, tensor in {**backbone.state_dict(), **gradients}.items()}

    before, tensors_before = condition(), tensors()
    backbone.export(tmp_path / "backbone.pt2")
    assert condition() == before
    torch.testing.assert_close(tensors(), tensors_before, rtol=0, atol=0)


def test_whatever_its_precision_and_memory_format_a_backbone_exports_in_fp32(tmp_path, randomised):
    backbone = randomised(build_resnet_backbone(18, levels=["c2"])).bfloat16().to(memory_format=torch.channels_last)
    path = tmp_path / "backbone.pt2"
    backbone.export(path)
    assert backbone.conv1.weight.dtype == torch.bfloat16
    assert_computes_the_same(path, backbone.float(), [(2, 33, 70)])


@pytest.mark.parametrize(
    "path, message",
    [
        ("net.pth", r"unknown suffix '\.pth'; choose from \.onnx, \.pt2"),
        ("net", r"net: no file name that ends in \.onnx or \.pt2"),
        ("nowhere/net.onnx", "no folder .*nowhere to export to"),
    ],
)
def test_a_path_that_will_not_do_is_refused_in_one_sentence(tmp_path, path, message):
    with pytest.raises(ValueError, match=message) as error:
        build_resnet_backbone(18, levels=["c2"]).export(tmp_path / path)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(ValueError, match=rf"export to ONNX needs {package}: pip install 'resbackbone\[export\]'"):
        build_resnet_backbone(18, levels=["c2"]).export(tmp_path / "backbone.onnx")
    assert not list(tmp_path.iterdir())

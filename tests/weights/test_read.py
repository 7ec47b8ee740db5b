"""Which weights read_weights understands, what it says about them, and what it refuses."""

import os
import pickle
import re

import numpy as np
import pytest
import torch
import torchvision
from reading import assert_same_state, refusal
from safetensors.torch import save_file

from resbackbone import build_resnet_backbone
from resbackbone.weights import read_weights, write_weights
from resbackbone.weights.inputs import BGR_255, INPUT, for_canonical_input
from resbackbone.weights.read import backbone_part, conv1_of
from resbackbone.weights.translate import from_ours

STATE = {
    "conv1.weight": torch.arange(24.0).view(2, 3, 2, 2),
    "bn1.num_batches_tracked": torch.tensor(3),
    "layer1.0.conv1.weight": torch.ones(2, 2, 1, 1),
}


@pytest.mark.parametrize("suffix", [".pth", ".bin", ".tar", ""])
@pytest.mark.parametrize(
    "wrap, entry",
    [
        (lambda state: state, ""),
        (lambda state: {"state_dict": state, "epoch": 3}, "state_dict"),
        (lambda state: {"model": state, "optimizer": {"lr": 0.1}}, "model"),
        (lambda state: {"model": {"state_dict": state}}, "model.state_dict"),
        (lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}}, "state_dict"),
        (lambda state: {f"_orig_mod.module.{key}": value for key, value in state.items()}, ""),
    ],
    ids=["bare", "state_dict", "model", "twice", "DataParallel", "compiled"],
)
def test_a_pytorch_file_is_read_bare_nested_or_wrapped(tmp_path, suffix, wrap, entry):
    path = tmp_path / f"checkpoint{suffix}"
    torch.save(wrap(STATE), path)
    weights = read_weights(path)
    assert_same_state(weights.state, STATE)
    assert weights.source == str(path) and weights.entry == entry and weights.format == "torchvision"
    assert "backbone" not in weights.metadata and weights.assumed == {"input": INPUT, "stride_in_1x1": False}


@pytest.mark.parametrize("entry", [("ema", "shadow"), ("model_ema",)])
def test_an_average_of_parameters_alone_does_not_stand_before_the_whole_network(caplog, entry):
    state = {**STATE, "bn1.running_var": torch.ones(2)}
    average = {key: state[key] + 1 for key in ("conv1.weight", "layer1.0.conv1.weight")}
    for name in reversed(entry):
        average = {name: average}
    assert_same_state(read_weights({"model": state, **average}).state, state)
    assert f"left out the average in {'.'.join(entry)}, which has no running_mean" in caplog.text
    assert len(caplog.messages) == 1


def test_a_state_dict_is_taken_as_it_is():
    weights = read_weights(STATE)
    assert_same_state(weights.state, STATE)
    assert weights.state is not STATE and not weights.is_file


class Malicious:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize(
    "save", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x, protocol=2))], ids=["zip", "pickle"]
)
def test_a_malicious_object_beside_the_tensors_is_named_and_does_not_run(tmp_path, caplog, save):
    path, trace = tmp_path / "malicious.pth", tmp_path / "trace"
    state = STATE if save is torch.save else {key: tensor.numpy() for key, tensor in STATE.items()}
    save({**state, "x": Malicious(trace)}, path)
    assert_same_state(read_weights(path).state, STATE)
    assert caplog.messages == [f"weights from {path}: left out x (posix.system, not run)"]
    save({**state, "bn1.weight": Malicious(trace)}, path)
    assert "1 entries are not tensors: bn1.weight (posix.system, not run)" in refusal(path)
    assert not trace.exists()


@pytest.mark.parametrize("content", [[1, 2], {}, {"a": 1}, {"model": {"a": 1}}, {"model": {}}])
def test_a_file_without_a_state_dict_is_refused(tmp_path, content):
    path = tmp_path / "other.pth"
    torch.save(content, path)
    assert "holds no state dict (tensors by name)" in refusal(path)


@pytest.mark.parametrize(
    "tensor, kind",
    [
        *((torch.zeros(2, dtype=dtype), str(dtype)[6:]) for dtype in (torch.int8, torch.int64, torch.bool)),
        *((tensor, "a sparse or meta tensor") for tensor in (torch.ones(2).to_sparse(), torch.ones(2, device="meta"))),
    ],
)
def test_a_tensor_of_another_kind_or_without_its_numbers_is_refused(tensor, kind):
    assert f"bn1.bias holds {kind}, not floating point numbers" in refusal({**STATE, "bn1.bias": tensor})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floating_point_numbers_of_any_width_become_fp32(dtype):
    state = read_weights({**STATE, "bn1.bias": torch.tensor([0.5, 2.0], dtype=dtype)}).state
    assert state["bn1.bias"].dtype == torch.float32 and state["bn1.bias"].tolist() == [0.5, 2.0]


def test_a_missing_file_is_answered_with_what_there_is(tmp_path):
    assert "no such file; give a weight file (.safetensors, .pth, .pkl, ..), a named source" in refusal(
        tmp_path / "no.pth"
    )
    assert "the folder holds no model.safetensors" in refusal(tmp_path)


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"\x80\x02}q\x00.", b"\x00" * 64, b"garbage " * 50])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pkl", ".onnx"])
def test_a_file_of_something_else_is_refused(tmp_path, content, suffix):
    path = tmp_path / f"download{suffix}"
    path.write_bytes(content)
    refusal(path)


@pytest.fixture(scope="module")
def resnet50():
    return torchvision.models.resnet50().state_dict()


def caffe2_file(path, state, **more):
    arrays = {name: tensor.numpy() for name, tensor in from_ours(state, "msra").items()}
    path.write_bytes(pickle.dumps({"blobs": {**arrays, **more}}, protocol=2))


def test_msras_pickles_are_read_as_bgr_with_the_stride_in_the_1x1(tmp_path, resnet50):
    path = tmp_path / "R-50.pkl"
    caffe2_file(path, resnet50, conv1_w_momentum=np.zeros(3), lr=np.float32(0.1), weight_order=["conv1_w"])
    weights = read_weights(path)
    assert weights.format == "msra" and weights.assumed == {"input": BGR_255, "stride_in_1x1": True}
    assert set(weights.left_out) == {"conv1_w_momentum", "lr", "weight_order"} and not weights.unknown
    assert torch.equal(weights.state["conv1.weight"], for_canonical_input(resnet50["conv1.weight"], BGR_255))
    assert weights.metadata["input"] == INPUT
    assert build_resnet_backbone(weights=path).config.stride_in_1x1 is True
    assert build_resnet_backbone(weights=path, stride_in_1x1=False).config.stride_in_1x1 is False
    given = {**BGR_255, "std": [57.375, 57.12, 58.395]}
    weights = read_weights(path, given_input=given)
    assert torch.equal(weights.state["conv1.weight"], for_canonical_input(resnet50["conv1.weight"], given))
    assert "input" not in weights.assumed


def test_what_is_assumed_is_said_in_one_line(tmp_path, resnet50, caplog):
    caffe2_file(tmp_path / "R-50.pkl", resnet50)
    build_resnet_backbone(50, weights=tmp_path / "R-50.pkl", levels=["c2"])
    assert caplog.messages == [
        f"weights from {tmp_path / 'R-50.pkl'} do not state all settings; assuming an input of BGR 0..255, mean "
        "103.53 116.28 123.675, std 1 1 1, the stride in the 1x1, as usual for MSRA's Caffe2 names; if that "
        "is not so, give given_input= or stride_in_1x1= to read_weights, or --input or --stride-in-1x1 to "
        "convert_weights.py"
    ]


@pytest.mark.parametrize(
    "mean, std, stride_in_1x1",
    [
        ([103.53, 116.28, 123.675], [1.0, 1.0, 1.0], True),
        ([103.53, 116.28, 123.675], [57.375, 57.12, 58.395], False),
        ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375], False),
    ],
    ids=["msra", "resnext", "torchvision"],
)
def test_detectron2s_pixel_statistics_tell_the_input(tmp_path, resnet50, mean, std, stride_in_1x1):
    state = {name: tensor.numpy() for name, tensor in from_ours(resnet50, "detectron2").items()}
    pixels = {"pixel_mean": np.float32(mean).reshape(3, 1, 1), "pixel_std": np.float32(std).reshape(3, 1, 1)}
    path = tmp_path / "model_final.pkl"
    path.write_bytes(pickle.dumps({"model": {**state, **pixels}, "__author__": "Detectron2 Model Zoo"}))
    weights = read_weights(path)
    given = {**BGR_255, "channel_order": "BGR" if mean[0] < mean[2] else "RGB", "mean": mean, "std": std}
    assert weights.metadata["converted_from"] == {"format": "detectron2", "input": given}
    assert torch.equal(weights.state["conv1.weight"], for_canonical_input(resnet50["conv1.weight"], given))
    assert weights.assumed == {"stride_in_1x1": stride_in_1x1}
    assert set(weights.left_out) == pixels.keys()


@pytest.mark.parametrize(
    "format, options, std",
    [
        ("detectron2", {"norm": "GN"}, 1.0),
        ("detectron2", {"groups": 32, "width_per_group": 8}, 57.375),
        ("msra", {"groups": 32, "width_per_group": 8}, 57.375),
        ("msra", {"groups": 64, "width_per_group": 4}, 1.0),
    ],
)
def test_detectrons_networks_with_group_norm_or_groups_stride_in_the_3x3(tmp_path, format, options, std):
    state = build_resnet_backbone(50, levels=["c2"], **options).state_dict()
    path = tmp_path / "X-50-32x8d.pkl"  # as detectron2 names what it publishes
    arrays = {name: tensor.numpy() for name, tensor in from_ours(state, format).items()}
    path.write_bytes(pickle.dumps({"model": arrays}))
    assumed = read_weights(path).assumed
    assert assumed["stride_in_1x1"] is False and assumed["input"]["std"][0] == std


@pytest.mark.parametrize("format", ["detectron2", "msra", "mmdetection", "transformers"])
def test_names_that_fit_several_networks_do_not_tell_input_and_stride(tmp_path, format, resnet50):
    state = {f"backbone.{name}": tensor for name, tensor in resnet50.items() if not name.startswith("fc.")}
    state |= {f"backbone.fpn.inner_blocks.{i}.0.bias": torch.zeros(256) for i in range(4)}
    theirs = from_ours(state if format in ("detectron2", "mmdetection") else backbone_part(resnet50), format)
    path = tmp_path / "model_final.pth"
    torch.save(theirs, path)
    for source in (path, theirs):
        asked = "do not state their input, and networks with .* names have several: read them with read_weights"
        with pytest.raises(ValueError, match=asked):
            read_weights(source)
        weights = read_weights(source, given_input="bgr-255")
        with pytest.raises(
            ValueError, match="do not state whether bottlenecks stride in the first 1x1 .* or in the 3x3"
        ):
            build_resnet_backbone(weights=weights)
        assert build_resnet_backbone(weights=weights, stride_in_1x1=True).config.stride_in_1x1
        weights = read_weights(source, given_input="rgb", stride_in_1x1=False)
        assert not build_resnet_backbone(weights=weights).config.stride_in_1x1
        assert torch.equal(weights.state[conv1_of(weights.state)], resnet50["conv1.weight"]) and not weights.assumed


@pytest.mark.parametrize("mean", [[116.28] * 3, [127.5, 127.5, 127.5], [0.0, 0.0, 0.0], [103.53, 116.28]])
def test_pixel_means_that_do_not_tell_the_order_are_refused(resnet50, mean):
    pixels = {"pixel_mean": torch.tensor(mean), "pixel_std": torch.ones(len(mean))}
    with pytest.raises(ValueError, match="have pixel_mean .*: only ImageNet's mean, in the order RGB or BGR, tells"):
        read_weights({**from_ours(resnet50, "detectron2"), **pixels})


def test_what_is_given_must_not_contradict_what_is_stated(tmp_path, resnet50):
    pixels = {"pixel_mean": torch.tensor([103.53, 116.28, 123.675]), "pixel_std": torch.ones(3)}
    state = {**from_ours(resnet50, "detectron2"), **pixels}
    assert read_weights(state, given_input="bgr-255").metadata["converted_from"]["input"] == BGR_255
    with pytest.raises(ValueError, match="are for an input of BGR 0..255, .* by pixel_mean and pixel_std in the file"):
        read_weights(state, given_input="rgb")
    write_weights(tmp_path / "own.safetensors", STATE, {"backbone": {"stride_in_1x1": True}})
    with pytest.raises(
        ValueError, match="are for stride_in_1x1=True by the file, but you asked for stride_in_1x1=False"
    ):
        read_weights(tmp_path / "own.safetensors", stride_in_1x1=False)


def test_detectron2s_own_conversion_of_torchvision_keeps_torchvisions_input(tmp_path, resnet50):
    state = {name: tensor.numpy() for name, tensor in from_ours(resnet50, "detectron2").items()}
    path = tmp_path / "R-50.pkl"
    path.write_bytes(pickle.dumps({"model": state, "__author__": "torchvision", "matching_heuristics": True}))
    weights = read_weights(path)
    assert weights.assumed == {} and weights.metadata["backbone"] == {"stride_in_1x1": False}
    assert torch.equal(weights.state["conv1.weight"], resnet50["conv1.weight"])
    for name, author in (("R-50.pkl", "SWAV"), ("R-50-moco.pkl", "MOCO")):  # in a file of that name, but not MSRA's
        (tmp_path / name).write_bytes(pickle.dumps({"model": state, "__author__": author, "matching_heuristics": True}))
        with pytest.raises(ValueError, match="do not state their input"):
            read_weights(tmp_path / name)


@pytest.mark.parametrize(
    "name, save, why", [("net.pth", torch.save, "damaged"), ("net.safetensors", save_file, "not a readable safe")]
)
def test_a_cut_off_download_is_fetched_again_the_next_time(tmp_path, monkeypatch, name, save, why):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    save(STATE, tmp_path / name)
    whole, fetched = (tmp_path / name).read_bytes(), []
    expected = read_weights(tmp_path / name).state

    def download(url, path, **_):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            fetched.append(path)
            path.write_bytes(whole if len(fetched) > 1 else whole[:-50])

    monkeypatch.setattr("resbackbone.weights.sources.download", download)
    with pytest.raises(ValueError, match=why):
        read_weights(f"https://host/{name}")
    assert_same_state(read_weights(f"https://host/{name}").state, expected)
    assert_same_state({key: expected[key] for key in STATE}, STATE)  # safetensors orders them differently


def retinanet_of_mmdetection(neck):
    config = f"model = dict(backbone=dict(type='ResNet', depth=18), neck=dict(type='FPN', {neck}))\n"
    config += "img_norm_cfg = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)"
    backbone = build_resnet_backbone(18, fpn=True, fpn_channels=8, levels=["p3", "p4", "p5", "p6", "p7"])
    return {"meta": {"config": config}, "state_dict": from_ours(backbone.state_dict(), "mmdetection")}


@pytest.mark.parametrize("neck, relu", [("num_outs=5", False), ("relu_before_extra_convs=True", True)])
def test_mmdetections_p7_has_no_relu_before_it_unless_its_config_says_so(tmp_path, neck, relu):
    torch.save(retinanet_of_mmdetection(neck), tmp_path / "retinanet.pth")
    backbone = build_resnet_backbone(weights=tmp_path / "retinanet.pth", fpn=True).eval()
    assert backbone.config.relu_before_p7 is relu
    maps = backbone(torch.rand(1, 3, 65, 97))
    p6 = maps["p6"].relu() if relu else maps["p6"]
    assert torch.equal(maps["p7"], backbone.fpn.extra_blocks["p7"](p6)) and (maps["p6"] < 0).any()


@pytest.mark.parametrize("name, eps", [("fasterrcnn_resnet50_fpn_coco-258fb6c6.pth", 0.0), ("mine.pth", 1e-5)])
def test_a_file_with_the_name_of_one_of_torchvisions_without_eps_has_none(tmp_path, resnet50, name, eps):
    torch.save({f"backbone.body.{key}": value for key, value in resnet50.items() if key[:3] != "fc."}, tmp_path / name)
    assert build_resnet_backbone(weights=tmp_path / name, levels=["c2"]).config.eps == eps


@pytest.mark.parametrize(
    "source, meant",
    [
        ("resnet18", "timm:resnet18"),
        ("resnet18.a1_in1k", "timm:resnet18.a1_in1k"),
        ("microsoft/resnet-18", "hf:microsoft/resnet-18"),
        ("IMAGENET1K_V1", "torchvision:ResNet50_Weights.IMAGENET1K_V1"),
        ("ResNet18_Weights.DEFAULT", "torchvision:ResNet18_Weights.DEFAULT"),
    ],
)
def test_a_published_networks_name_without_its_scheme_is_completed_in_the_message(source, meant):
    with pytest.raises(ValueError, match=f"no such file; if a published network is meant: {re.escape(meant)}"):
        read_weights(source)


def test_the_content_of_a_file_tells_safetensors_from_pytorchs_whatever_its_name(tmp_path):
    state = torchvision.models.resnet18().state_dict()
    save_file(state, tmp_path / "a.bin")
    torch.save(state, tmp_path / "b.safetensors")
    for name in ("a.bin", "b.safetensors"):
        assert read_weights(tmp_path / name).state.keys() == state.keys()


def test_blocks_of_no_depth_here_are_counted_in_the_message():
    network = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])
    with pytest.raises(ValueError, match=r"have 1-1-1-1 basic blocks in their stages, .*: 18 \(2-2-2-2\), 34 "):
        build_resnet_backbone(weights=network.state_dict())


def test_an_unknown_shortcut_is_refused_with_the_known_ones_beside_weights_too():
    with pytest.raises(ValueError, match="unknown shortcut 'a'; choose from A, B, C, D, none"):
        build_resnet_backbone(18, shortcut="a", weights=torchvision.models.resnet18().state_dict())

"""Which part of a checkpoint is read, what is said about the rest, and how one of several trunks is chosen."""

import json
import pathlib
import re

import pytest
import torch
import torchvision
from reading import refusal
from safetensors.torch import save_file

from resbackbone import build_resnet_backbone
from resbackbone.weights import INPUT, MEAN, read_weights, write_weights
from resbackbone.weights.inputs import BGR_255
from resbackbone.weights.translate import from_ours

HEADS = {"fc.0.weight": torch.ones(4, 512), "fc.2.bias": torch.ones(4)}  # a projection head in the place of fc
OWNER = {"projector.0.weight": torch.ones(3), "queue": torch.ones(2, 3), "criterion.weight": torch.ones(2)}


@pytest.fixture(scope="module")
def network(randomised):
    torch.manual_seed(0)
    return randomised(torchvision.models.resnet18(num_classes=3)).eval()


@pytest.fixture(scope="module")
def trunk(network):
    return {key: tensor for key, tensor in network.state_dict().items() if not key.startswith("fc.")}


@pytest.fixture
def other(trunk):
    return {key: tensor + 1 for key, tensor in trunk.items()}


def under(prefix, state):
    return {prefix + key: tensor for key, tensor in state.items()}


def assert_same(weights, trunk):
    assert weights.state.keys() == trunk.keys()
    assert all(torch.equal(weights.state[key], tensor) for key, tensor in trunk.items())


def left_out(caplog) -> str:
    (message,) = (text for text in caplog.messages if "left out" in text)
    return message.split("left out ")[1]


@pytest.mark.parametrize("how", ["zip", "given"])
@pytest.mark.parametrize(
    "wrap, beside",
    [
        (lambda s: {"module": s}, ""),
        (lambda s: {"teacher": s, "epoch": 3}, "epoch"),
        (lambda s: {"network": {"params": s}, "lr_scheduler": {"last": 1}}, "lr_scheduler"),
        (lambda s: {"checkpoint": {"model": under("module.", s), "loss": 0.1}}, "checkpoint.loss"),
        (lambda s: {**s, "epoch": 3, "note": "text", 7: torch.ones(1)}, "epoch, note, 7"),
        (lambda s: under("module.encoder_q.", s | HEADS) | under("module.", OWNER), "module.projector, module.queue, "
         "module.criterion, module.encoder_q.fc"),
        (lambda s: {"state_dict": under("encoder.", s | HEADS) | OWNER}, "projector, queue, criterion, encoder.fc"),
        (lambda s: under("net.", s), ""),
        (lambda s: under("online_network.", s) | {"predictor.weight": torch.ones(1)}, "predictor"),
        (lambda s: under("student.backbone.", s) | {"student.head.mlp.0.weight": torch.ones(1)}, "student.head"),
        (lambda s: under("backbone.", s) | OWNER, "projector, queue, criterion"),
        (lambda s: s | HEADS | OWNER, "fc, projector, queue, criterion"),
        (lambda s: under("module.", s) | {"n_averaged": torch.tensor(3)}, ""),
        (lambda s: under("backbone.0.body.", s) | {"transformer.encoder.0.weight": torch.ones(1)}, "transformer"),
        (lambda s: under("model.backbone.", from_ours(s, "detectron2")), ""),
        (lambda s: {"state_dict": under("momentum_encoder.", s), "pytorch-lightning_version": "2.0"},
         "pytorch-lightning_version"),
    ],
)  # fmt: skip
def test_the_one_complete_trunk_is_taken_and_the_rest_is_named_in_one_line(tmp_path, caplog, trunk, wrap, beside, how):
    source = wrap(trunk)
    if how == "zip":
        torch.save(source, tmp_path / "w.pth")
        source = tmp_path / "w.pth"
    weights = read_weights(source, given_input=INPUT)
    trunk = {key: value for key, value in trunk.items() if key in weights.state or "num_batches" not in key}
    assert_same(weights, trunk)
    assert weights.beside == tuple(beside.split(", ") if beside else ())
    assert caplog.messages == ([f"weights from {weights.source}: left out {beside}"] if beside else [])


def test_objects_beside_the_tensors_are_named_and_the_network_is_torchvisions(tmp_path, caplog, network):
    path = tmp_path / "w.pth"
    checkpoint = {
        "state_dict": network.state_dict(),
        "x": pathlib.PurePosixPath("/a"),
        "hyper_parameters": {"deep": [{"path": pathlib.PurePosixPath("/a")}]},
        "optimizer": torch.optim.SGD(network.parameters(), 0.1).state_dict(),
    }
    torch.save(checkpoint, path)
    backbone = build_resnet_backbone(weights=path).eval()
    kind = "pathlib.PurePosixPath, not run"
    assert left_out(caplog) == f"x ({kind}), hyper_parameters ({kind}), optimizer"
    images = torch.randn(1, 3, 65, 97)
    stem = network.maxpool(network.relu(network.bn1(network.conv1(images))))
    expected = network.layer4(network.layer3(network.layer2(network.layer1(stem))))
    assert (backbone(images)["c5"] - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_entries_that_nest_without_end_are_named_and_left_out(caplog, trunk):
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    around: dict = {"trunk": trunk, "deep": deep}
    around["itself"] = around
    assert_same(read_weights(around), trunk)
    assert caplog.messages == ["weights from the given state dict: left out deep, itself"]


def test_a_file_of_this_package_has_no_parts_to_choose(tmp_path, trunk):
    write_weights(tmp_path / "own.safetensors", trunk, {"backbone": {"depth": 18}})
    assert_same(read_weights(tmp_path / "own.safetensors"), dict(sorted(trunk.items())))
    for choice in ({"entry": "model"}, {"prefix": ""}):
        assert "leave out entry and prefix" in refusal(tmp_path / "own.safetensors", **choice)


@pytest.mark.parametrize(
    "wrap, choices",
    [
        (lambda a, b: {"teacher": b, "student": a}, {"entry": ("teacher", "student")}),
        (lambda a, b: {"teacher": under("backbone.", b), "student": under("module.backbone.", a)},
         {"entry": ("teacher", "student")}),
        (lambda a, b: {"best": {"model": b}, "last": {"model": a}}, {"entry": ("best.model", "last.model")}),
        (lambda a, b: under("m.encoder_k.", b) | under("m.encoder_q.", a),
         {"prefix": ("m.encoder_k.", "m.encoder_q.")}),
        (lambda a, b: {"state_dict": b | under("ours.", a)}, {"prefix": ("", "ours.")}),
        (lambda a, b: under("teacher.backbone.", b) | under("student.backbone.", a),
         {"prefix": ("teacher.backbone.", "student.backbone.")}),
    ],
)  # fmt: skip
def test_several_complete_trunks_are_listed_with_how_to_choose(tmp_path, trunk, other, wrap, choices):
    torch.save(wrap(trunk, other), tmp_path / "w.pth")
    message = refusal(tmp_path / "w.pth")
    assert "hold 2 complete trunks: " in message and "choose one: weights=read_weights(FILE, entry=" in message
    ((name, values),) = choices.items()
    assert re.findall(rf"{name}='([^']*)'", message) == list(values)
    for value, expected in zip(values, (other, trunk), strict=True):
        assert_same(read_weights(tmp_path / "w.pth", **{name: value}), expected)
    chosen = read_weights(tmp_path / "w.pth", **{name: values[1].rstrip(".")})
    assert torch.equal(build_resnet_backbone(weights=chosen).conv1.weight, trunk["conv1.weight"])
    assert "no complete trunk" in refusal(tmp_path / "w.pth", prefix="nothing.")
    assert "no part 'nothing' in the file" in refusal(tmp_path / "w.pth", entry="nothing")


def test_an_average_within_an_entry_or_a_prefix_is_preferred_and_that_is_said(tmp_path, caplog, trunk, other):
    torch.save({"model": other, "ema": {"module": trunk, "updates": 3}}, tmp_path / "entry.pth")
    weights = read_weights(tmp_path / "entry.pth")
    assert_same(weights, trunk)
    assert weights.entry == "ema.module" and weights.beside == ("ema.updates",)
    assert "hold ema.module and model: took ema.module" in caplog.messages[0]
    torch.save({"state_dict": under("model.", other) | under("model_ema.module.", trunk)}, tmp_path / "prefix.pth")
    assert_same(read_weights(tmp_path / "prefix.pth"), trunk)
    assert_same(read_weights(tmp_path / "prefix.pth", prefix="model."), other)


def test_a_module_with_two_names_is_one_trunk(trunk):
    weights = read_weights(under("backbone.", trunk) | under("model.", trunk | {"fc.weight": torch.ones(2, 512)}))
    assert_same(weights, trunk)


def test_a_name_that_may_be_a_part_of_the_trunk_is_not_left_out(trunk):
    for key in ("layer1.0.se.fc.weight", "conv2.weight", "attention.weight", "bn1.alpha"):
        with pytest.raises(ValueError, match=f"1 unexpected: {key}"):
            build_resnet_backbone(weights={**trunk, key: torch.ones(1)})


@pytest.mark.parametrize(
    "head",
    ["classifier.4", "aux_classifier.1", "classifier.0.convs.0.0", "decode_head.conv_seg", "decoder.aspp.0.convs.0"]
    + ["decoder.fpa.branch1.1.conv", "ppm.0.1", "head.conv5a.0", "head.fcn", "decoder.conv_last"],
)
def test_the_trunk_of_a_segmentation_network_which_may_be_dilated_is_taken_only_by_its_prefix(trunk, head):
    state = under("backbone.", trunk) | {f"{head}.weight": torch.ones(2, 3, 1, 1)}
    assert "is of a segmentation network, whose trunk may dilate its last stages" in refusal(state)
    assert_same(read_weights(state, prefix="backbone."), trunk)
    assert_same(read_weights(under("backbone.", trunk) | {f"{head}.weight": torch.ones(2, 3)}), trunk)  # a classifier's


@pytest.mark.parametrize("name", ["deeplabv3_resnet50_backbone.pth", "my_fcn-r18.pth"])
def test_a_trunk_in_a_file_named_after_a_segmentation_network_is_taken_only_by_its_prefix(tmp_path, trunk, name):
    torch.save(trunk, tmp_path / name)
    assert "by its name this is of a segmentation network, whose trunk may dilate its" in refusal(tmp_path / name)
    assert_same(read_weights(tmp_path / name, prefix=""), trunk)


@pytest.mark.parametrize("norm", ["bottleneck.weight", "heads.bottleneck.0.running_mean", "bnneck.running_mean"])
def test_the_trunk_of_a_reidentification_network_is_taken_only_by_its_prefix(trunk, norm):
    for prefix in ("base.", ""):
        state = under(prefix, trunk) | {norm: torch.ones(512)}
        assert "re-identification network, whose layer4 may have stride 1" in refusal(state)
    assert_same(read_weights(under("base.", trunk) | {norm: torch.ones(512)}, prefix="base."), trunk)
    assert_same(read_weights(under("base.", trunk) | {norm: torch.ones(2, 512)}), trunk)  # a linear layer's


@pytest.mark.parametrize(
    "neck", ["decoder.blocks.0.conv1.0", "input_proj", "transformer.encoder.0.conv", "decoder.p5", "neck.convs.0.conv"]
)
def test_decoders_and_necks_beside_a_trunk_of_the_usual_strides_are_left_out(trunk, neck):
    assert_same(read_weights(under("encoder.", trunk) | {f"{neck}.weight": torch.ones(2, 3, 1, 1)}), trunk)


@pytest.mark.parametrize(
    "name", ["pixel_mean", "normalize.mean", "mu", "normalizer.new_mean", "rgb_mean", "means", "bn0.running_mean"]
)
def test_statistics_of_an_input_beside_a_trunk_are_asked_about(trunk, name):
    state = under("net.", trunk) | {name: torch.ones(3, 1, 1)}
    assert f"{name} may state an input that the network normalises itself; state it: " in refusal(state)
    assert_same(read_weights(state, given_input=INPUT), trunk)
    assert "in_conv.weight may state an input" in refusal(
        under("net.", trunk) | {"in_conv.weight": torch.ones(3, 1, 3, 3)}
    )
    assert_same(read_weights(under("net.", trunk) | {"head.bias": torch.ones(3), "cam.weight": torch.ones(3)}), trunk)


@pytest.mark.parametrize("prefix", ["net.", ""])
@pytest.mark.parametrize(
    "names", ["mean std", "normalize.mean normalize.std", "pixel_mean pixel_std", "a.new_mean a.new_std"]
)
def test_a_mean_of_imagenet_with_its_std_beside_a_trunk_states_the_input(trunk, names, prefix):
    mean, std = names.split()
    buffers = {mean: torch.tensor(MEAN).view(1, 3, 1, 1), std: torch.full((1, 3, 1, 1), 0.5)}
    weights = read_weights(under(prefix, trunk) | buffers)
    assert weights.metadata["converted_from"]["input"] == {**INPUT, "std": [0.5] * 3}
    assert weights.origins["input"] == f"{mean} and {std} in the file" and weights.state.keys() == trunk.keys()
    assert "may state an input" in refusal(under("net.", trunk) | {**buffers, mean: torch.full((3,), 0.5)})
    bgr = {mean: torch.tensor(MEAN[::-1]) * 255, std: torch.ones(3)}
    assert read_weights(under(prefix, trunk) | bgr).metadata["converted_from"]["input"] == BGR_255


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_has_a_tensors_name_and_is_none_or_has_no_shape_is_refused(tmp_path, trunk):
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    sparse = torch.ones(64).to_sparse()
    for value, kind in ((sparse, r" \(torch._utils._rebuild_sparse_tensor"), (nested, ""), ([1.0], ""), (5, "")):
        torch.save({"model": {**trunk, "bn1.bias": value}}, tmp_path / "w.pth")
        assert re.search(f"1 entries are not tensors: bn1.bias{kind}", refusal(tmp_path / "w.pth"))


def test_a_whole_module_is_refused_with_advice(tmp_path, network):
    for content in (network, {"model": network, "epoch": 3}):
        torch.save(content, tmp_path / "w.pth")
        message = refusal(tmp_path / "w.pth")
        assert "a whole torchvision.models.resnet.ResNet" in message and "state_dict()" in message
    assert "weights of type ResNet; give a file, a named source or a state_dict()" in refusal(network)
    enum = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    assert 'give a file, "torchvision:ResNet18_Weights.IMAGENET1K_V1" or a state_dict()' in refusal(enum)


# shards


def shards(folder, state, suffix, **changes):
    keys = list(state)
    files = {f"model-{i}-of-2.{suffix}": keys[i::2] for i in (0, 1)}
    for file, part in files.items():
        tensors = {key: state[key] for key in part}
        torch.save(tensors, folder / file) if suffix == "bin" else save_file(tensors, folder / file)
    places = {key: file for file, part in files.items() for key in part} | changes
    index = folder / {"bin": "pytorch_model.bin.index.json", "safetensors": "model.safetensors.index.json"}[suffix]
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_are_read_through_their_index_or_their_folder(tmp_path, trunk, suffix):
    index = shards(tmp_path, trunk, suffix)
    for source in (index, tmp_path):
        assert_same(read_weights(source, given_input=INPUT), trunk)


def test_shards_of_transformers_are_its_network_with_the_config_beside_them(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512], layer_type="basic")
    theirs = transformers.ResNetModel(config).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="10MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    images = torch.randn(1, 3, 65, 97)
    for source in (tmp_path, tmp_path / "model.safetensors.index.json"):
        ours = build_resnet_backbone(weights=read_weights(source, given_input=INPUT)).eval()
        with torch.no_grad():
            given, expected = ours(images)["c5"], theirs(images).last_hidden_state
        assert (given - expected).abs().max() <= 1e-5 * expected.abs().max()
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text().replace('"relu"', '"gelu"'))
    for source in (tmp_path, tmp_path / "model.safetensors.index.json"):
        assert "hidden_act" in refusal(source, given_input=INPUT)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_that_are_missing_or_differ_from_their_index_are_named(tmp_path, trunk, suffix):
    index = shards(tmp_path, trunk, suffix, **{"bn1.extra": f"model-1-of-2.{suffix}"})
    assert f"model-1-of-2.{suffix} and it disagree about 1 tensors: bn1.extra" in refusal(index)
    index = shards(tmp_path, trunk, suffix, **{"conv1.weight": f"model-1-of-2.{suffix}"})
    assert f"model-0-of-2.{suffix} and it disagree about 1 tensors: conv1.weight" in refusal(index)
    (tmp_path / f"model-0-of-2.{suffix}").unlink()
    assert f"model-0-of-2.{suffix} missing beside it; download all 2 files" in refusal(tmp_path)


@pytest.mark.parametrize("file", ["../a.bin", "/etc/passwd", "a/b.bin", "..\\a.bin", "a.pth", "", 3, None, ["a.bin"]])
def test_an_index_names_only_files_beside_it(tmp_path, trunk, file):
    index = shards(tmp_path, trunk, "bin", **{"conv1.weight": file})
    assert re.search("names files that are not|not a readable index", refusal(index))
    assert "not a readable index" in refusal(index) or str(file)[:5] in refusal(index)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', "[" * 100_000, '{"weight_map": "a"}'])
def test_an_index_of_something_else_is_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert "not a readable index" in refusal(tmp_path)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda state: {"optim": {"state": {key: {"exp_avg": tensor} for key, tensor in state.items()}}},
        lambda state: {"optimizer": {"exp_avg": state, "exp_avg_sq": state}},
        lambda state: {"optimizer_state_dict": state},
    ],
)
def test_an_optimizers_tensors_are_no_trunk_whatever_their_names(trunk, other, optimizer):
    assert_same(read_weights({"model": trunk, **optimizer(other)}), trunk)
    assert "optimizer's" in refusal(optimizer(other))


@pytest.mark.parametrize("entry", ["optimal_state_dict", "optimized_model"])
def test_what_is_optimal_is_no_optimizer_and_gradients_are_no_trunk(trunk, other, entry):
    assert_same(read_weights({entry: trunk, "grads": other, "momentum": other}), trunk)


@pytest.mark.parametrize("entry", ["params_ema", "swa_state_dict", "ema_state"])
def test_an_average_is_preferred_under_any_of_its_names(trunk, other, entry):
    assert_same(read_weights({"params": other, entry: trunk}), trunk)
    assert_same(read_weights({"state_dict": trunk, "current_model_state": other}), trunk)  # Lightning's


def test_mmengine_has_the_average_in_state_dict_and_others_in_the_entry_of_that_name(trunk, other, caplog):
    mmengine = {"meta": {}, "state_dict": trunk, "ema_state_dict": {"steps": torch.ones(1), **under("module.", other)}}
    assert_same(read_weights(mmengine), trunk)
    assert "took state_dict" in caplog.text
    assert_same(read_weights({"state_dict": other, "ema_state_dict": trunk}), trunk)
    assert_same(read_weights(under("online_model.", other) | under("ema_model.", trunk)), trunk)


def test_weights_that_are_read_already_take_no_other_part(trunk, other):
    weights = read_weights({"student": trunk, "teacher": other}, entry="student")
    assert "read already" in refusal(weights, entry="teacher")
    assert read_weights(weights).state is weights.state
    assert read_weights(weights, norm="BN").metadata["backbone"]["norm"] == "BN"


def test_a_given_dict_of_arrays_is_read(trunk):
    assert_same(read_weights({key: tensor.numpy() for key, tensor in trunk.items()}), trunk)


@pytest.mark.parametrize("name", ["_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod"])
def test_modules_that_wrap_a_stage_leave_no_trace_in_names(trunk, name):
    assert_same(read_weights({key.replace("layer1.", f"layer1.{name}."): x for key, x in trunk.items()}), trunk)
    assert_same(read_weights(under(f"{name}.", trunk)), trunk)


@pytest.mark.parametrize(
    "head", ["last_linear.weight", "fc_yaw.weight", "embedding.weight", "bnneck.bias", "avgpool.p"]
)
def test_heads_of_other_tasks_beside_a_trunk_are_left_out_by_name(trunk, head, caplog):
    assert_same(read_weights({**trunk, head: torch.ones(2)}), trunk)
    assert head.split(".")[0] in left_out(caplog)


@pytest.mark.parametrize("wrap, said", [(lambda s: (s, 3), "a tuple; save its item 0"), (lambda s: "x", "it is a str")])
def test_a_file_of_something_else_says_what_it_is(tmp_path, trunk, wrap, said):
    torch.save(wrap(trunk), tmp_path / "a.pth")
    assert said in refusal(tmp_path / "a.pth")

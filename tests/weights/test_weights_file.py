import json
import os
import pickle

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from resbackbone.weights import MEAN, STD, read_weights, write_weights

STATE = {"conv1.weight": torch.arange(6.0).view(2, 3), "bn1.num_batches_tracked": torch.tensor(3)}


def assert_same_state(state, expected=STATE):
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], value) for name, value in expected.items())


def refusal(source) -> str:
    with pytest.raises(ValueError) as error:
        read_weights(source)
    message = str(error.value)
    assert "\n" not in message and str(source) in message
    return message


def test_our_own_file_keeps_tensors_and_metadata(tmp_path):
    path = tmp_path / "own.safetensors"
    metadata = {"backbone": {"depth": 50, "levels": ["c5"], "norm": None}, "licence": "MIT", "classes": ["ä", "b"]}
    write_weights(path, {**STATE, "strided": torch.arange(6.0).view(2, 3).t()}, metadata)
    weights = read_weights(path)
    assert torch.equal(weights.state.pop("strided"), STATE["conv1.weight"].t())
    assert_same_state(dict(sorted(weights.state.items(), reverse=True)))
    assert {key: weights.metadata[key] for key in metadata} == metadata
    assert weights.metadata["input"] == {"channel_order": "RGB", "range": [0, 1], "mean": list(MEAN), "std": list(STD)}
    assert weights.source == str(path)


def test_a_foreign_safetensors_file_says_nothing_about_itself(tmp_path):
    save_file(STATE, tmp_path / "timm.safetensors", {"format": "pt"})
    weights = read_weights(str(tmp_path / "timm.safetensors"))
    assert weights.metadata == {}
    assert torch.equal(weights.state["conv1.weight"], STATE["conv1.weight"])


def test_a_file_made_for_another_input_is_refused(tmp_path):
    path = tmp_path / "bgr.safetensors"
    other = {"channel_order": "BGR", "range": [0, 255], "mean": [103.5, 116.3, 123.7], "std": [1, 1, 1]}
    save_file(STATE, path, {"input": json.dumps(other)})
    assert "BGR" in refusal(path)


def test_metadata_that_is_not_json_is_refused(tmp_path):
    path = tmp_path / "broken.safetensors"
    save_file(STATE, path, {"input": "{"})
    assert "metadata is not JSON" in refusal(path)


@pytest.mark.parametrize("suffix", [".pth", ".pt"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state, "optimizer": {"lr": 0.1}},
    ],
    ids=["bare", "state_dict", "model"],
)
def test_a_pytorch_file_is_read_bare_or_nested(tmp_path, suffix, wrap):
    path = tmp_path / f"checkpoint{suffix}"
    torch.save(wrap(STATE), path)
    weights = read_weights(path)
    assert_same_state(weights.state)
    assert weights.metadata == {} and weights.source == str(path)


def test_a_state_dict_is_taken_as_it_is():
    weights = read_weights(STATE)
    assert_same_state(weights.state)
    assert weights.state is not STATE


class Malicious:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize(
    "save", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x, protocol=2))], ids=["zip", "pickle"]
)
def test_a_malicious_pickle_is_refused_and_does_not_run(tmp_path, save):
    path, trace = tmp_path / "malicious.pth", tmp_path / "trace"
    save({"conv1.weight": STATE["conv1.weight"], "x": Malicious(trace)}, path)
    assert "not a PyTorch file of plain tensors" in refusal(path)
    assert not trace.exists()


@pytest.mark.parametrize("kept", [0, 5, 0.5, -1])
@pytest.mark.parametrize(
    "suffix, reason", [(".safetensors", "not a readable safetensors"), (".pth", "not a PyTorch file")]
)
def test_a_truncated_file_is_refused(tmp_path, suffix, reason, kept):
    path = tmp_path / f"truncated{suffix}"
    save_file(STATE, path) if suffix == ".safetensors" else torch.save(STATE, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept) if isinstance(kept, float) else kept])
    assert reason in refusal(path)


@pytest.mark.parametrize("content", [b"<html>404</html>", b"\x80\x02}q\x00.", b"\x00" * 64, b"garbage " * 50])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_file_of_something_else_is_refused(tmp_path, content, suffix):
    path = tmp_path / f"download{suffix}"
    path.write_bytes(content)
    refusal(path)


@pytest.mark.parametrize("content", [[1, 2], {}, {"a": 1}, {"a": torch.zeros(1), "b": "text"}, {"model": {"a": 1}}])
def test_a_pytorch_file_without_a_state_dict_is_refused(tmp_path, content):
    path = tmp_path / "other.pth"
    torch.save(content, path)
    assert "holds no state dict (tensors by name)" in refusal(path)


def test_a_missing_file_and_an_unknown_suffix_are_answered_with_what_there_is(tmp_path):
    assert "no such file; give a .safetensors, .pth or .pt file, or torchvision:NAME" in refusal(tmp_path / "no.pth")
    assert "no such file" in refusal(tmp_path)  # a folder is no file
    path = tmp_path / "weights.onnx"
    path.touch()
    assert "unknown suffix '.onnx'; choose from .safetensors, .pth, .pt" in refusal(path)


@pytest.mark.parametrize("name", ["ResNet50_Weights.IMAGENET1K_V9", "ResNet51_Weights.DEFAULT", "resnet50", ""])
def test_an_unknown_torchvision_source_is_answered_with_an_example(name):
    assert "an example is torchvision:ResNet50_Weights.IMAGENET1K_V2" in refusal(f"torchvision:{name}")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Where torchvision keeps what it downloaded; nothing can be downloaded here."""

    def no_network(*_, **__):
        raise OSError("no network in this test")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", no_network)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize("name", ["IMAGENET1K_V1", "DEFAULT"])
def test_a_torchvision_source_is_taken_from_its_cache(cache, name):
    state = torchvision.models.resnet18().state_dict()
    url = torchvision.models.ResNet18_Weights[name].url
    torch.save(state, cache / os.path.basename(url))
    weights = read_weights(f"torchvision:ResNet18_Weights.{name}")
    assert_same_state(weights.state, state)
    assert weights.source == f"torchvision:ResNet18_Weights.{name}"


def test_without_a_network_the_answer_says_where_to_put_the_file(cache):
    url = torchvision.models.ResNet18_Weights.DEFAULT.url
    message = refusal("torchvision:ResNet18_Weights.DEFAULT")
    assert "could not be downloaded" in message
    assert f"put {url} at {cache / os.path.basename(url)}" in message


def test_a_broken_or_malicious_file_in_torchvisions_cache_is_refused(cache, tmp_path):
    path = cache / os.path.basename(torchvision.models.ResNet18_Weights.DEFAULT.url)
    path.write_bytes(b"PK\x03\x04 half a download")
    assert str(path) in refusal("torchvision:ResNet18_Weights.DEFAULT")
    torch.save({"conv1.weight": STATE["conv1.weight"], "x": Malicious(tmp_path / "trace")}, path)
    assert str(path) in refusal("torchvision:ResNet18_Weights.DEFAULT")
    assert not (tmp_path / "trace").exists()

import json

import pytest
import torch
from reading import assert_same_state, refusal
from safetensors.torch import save, save_file

from resbackbone.weights import INPUT, MEAN, STD, read_weights, write_weights
from resbackbone.weights.inputs import BGR_255

STATE = {"conv1.weight": torch.arange(6.0).view(2, 3), "bn1.num_batches_tracked": torch.tensor(3)}


def test_our_own_file_keeps_tensors_and_metadata(tmp_path):
    path = tmp_path / "own.safetensors"
    metadata = {"backbone": {"depth": 50, "levels": ["c5"], "norm": None}, "licence": "MIT", "classes": ["ä", "b"]}
    write_weights(path, {**STATE, "strided": torch.arange(6.0).view(2, 3).t()}, metadata)
    weights = read_weights(path)
    assert torch.equal(weights.state.pop("strided"), STATE["conv1.weight"].t())
    assert_same_state(dict(sorted(weights.state.items(), reverse=True)), STATE)
    assert {key: weights.metadata[key] for key in metadata} == metadata
    assert weights.metadata["input"] == {"channel_order": "RGB", "range": [0, 1], "mean": list(MEAN), "std": list(STD)}
    assert weights.source == str(path) and weights.format == "resbackbone" and weights.assumed == {}


def test_tied_weights_and_views_of_one_tensor_are_written_each_by_its_name(tmp_path):
    whole = torch.arange(12.0).view(4, 3)
    state = {"a": whole, "b": whole, "head": whole[:2], "rest": whole[2:], "void": torch.zeros(0), "x": torch.zeros(0)}
    write_weights(tmp_path / "tied.safetensors", state, {})
    assert_same_state(dict(sorted(read_weights(tmp_path / "tied.safetensors").state.items())), state)


@pytest.mark.parametrize("words", [{}, {"input": "RGB"}, {"input": "224"}, {"input": '{"size": [3, 224, 224]}'}])
def test_another_programs_words_are_no_metadata_of_ours(tmp_path, words):
    save_file(STATE, tmp_path / "timm.safetensors", {"format": "pt", **words})
    weights = read_weights(str(tmp_path / "timm.safetensors"))
    assert weights.metadata.keys() == {"input", "converted_from"}
    assert torch.equal(weights.state["conv1.weight"], STATE["conv1.weight"])


@pytest.mark.parametrize(
    "metadata, why",
    [
        ({"input": json.dumps(BGR_255)}, "made for input {'channel_order': 'BGR'"),
        ({"input": "{"}, "not a readable safetensors file"),
        *(({"backbone": value}, "its metadata 'backbone' is") for value in ("[]", "3", '"resnet50"')),
        ({"detector": "{}"}, "a detector without a backbone"),
    ],
)
def test_metadata_that_describe_no_network_here_are_refused(tmp_path, metadata, why):
    save_file(STATE, tmp_path / "odd.safetensors", {"format": '"resbackbone"', "input": json.dumps(INPUT), **metadata})
    assert why in refusal(tmp_path / "odd.safetensors")


def with_header(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


HUGE = "[9999999999,9999999999]"
TENSOR = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


@pytest.mark.parametrize(
    "content, reason",
    [
        (with_header(f'{{"a":{TENSOR},"a":{TENSOR}}}'.encode(), b"\0" * 4), "'a' appears twice"),
        (with_header(b"[" * 20000), ""),
        (with_header(b"[]"), ""),
        ((2**62).to_bytes(8, "little") + b"{}", ""),
        ((30).to_bytes(8, "little") + b"{}", ""),
        (with_header(f'{{"a":{TENSOR.replace("[1]", HUGE)}}}'.encode(), b"\0" * 4), ""),
        (with_header(f'{{"a":{TENSOR.replace("[0,4]", "[0,400]")}}}'.encode(), b"\0" * 4), ""),
        (with_header(f'{{"a":{TENSOR.replace("F32", "F99")}}}'.encode(), b"\0" * 4), ""),
        (save(STATE)[:-1], ""),
        (save(STATE)[:20], ""),
        (b"", ""),
    ],
    ids=range(11),
)
def test_a_safetensors_file_that_is_not_whole_is_refused(tmp_path, content, reason):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    message = refusal(path)
    assert "not a readable safetensors file" in message and reason in message

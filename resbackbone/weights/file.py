"""Our own weight files: safetensors whose metadata describe the network, its input and where they come from."""

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from resbackbone.atomic import write_atomically
from resbackbone.checks import LFS_POINTER, UserError
from resbackbone.weights.arguments import stated_by_arguments
from resbackbone.weights.inputs import INPUT, describe_input
from resbackbone.weights.pickles import read_pickle

NOTES = "resbackbone"  # the entry of foreign files that holds our metadata, as JSON
OURS = '"resbackbone"'  # the "format" in ours, which is JSON too


def write_weights(path: str | os.PathLike, state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write a safetensors file atomically. Metadata values are stored as JSON; the input is added to them. Of tied
    weights, each name gets a copy.

    Files of this package hold, as far as they are known: "backbone" (the arguments of `build_resnet_backbone`:
    depth, shortcut, stride_in_1x1, groups, width_per_group, eps, norm, in_channels, ..), "detector" (those of
    `detection.build_faster_rcnn`), "cifar" (those of `cifar.build_cifar_resnet`), "num_classes", "classes" (their
    names), "source", "licence" and "recipe"; and always "input" (`inputs.INPUT`, except for "cifar").
    """
    metadata = {"format": "resbackbone", "input": INPUT, **metadata}
    write_atomically(path, save(apart(state), {key: json.dumps(value) for key, value in metadata.items()}))


def apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous, each in memory of its own: safetensors refuses tied weights."""
    tensors, memories = {}, set()
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if memory in memories else tensor
        memories.add(memory)
    return tensors


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a safetensors file, and its metadata if this package wrote them.

    Raises ValueError if the file is damaged, repeats a name, or was made for another input than ours.
    """
    metadata: dict[str, Any] = {}
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            text = file.metadata() or {}
        with open(path, "rb") as raw:  # safetensors accepts a name twice
            json.loads(raw.read(int.from_bytes(raw.read(8), "little")), object_pairs_hook=_refuse_duplicates)
        if NOTES in text:  # of a foreign format, written by us
            return state, read_notes(text[NOTES])
        if text.get("format") == OURS:  # else another program's words
            metadata = {key: json.loads(value) for key, value in text.items()}
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"weights {str(path)!r}: not a readable safetensors file ({error})") from None
    if metadata.get("input", INPUT) != INPUT and "cifar" not in metadata:  # those take their data's mean image
        raise UserError(
            f"weights {str(path)!r}: made for input {metadata['input']}; this library feeds {describe_input(INPUT)}"
        )
    for key in ("backbone", "detector", "cifar"):
        if not isinstance(metadata.get(key, {}), dict):
            raise UserError(f"weights {str(path)!r}: its metadata {key!r} is {metadata[key]!r}, not a table")
    if "detector" in metadata and "backbone" not in metadata:
        raise UserError(f"weights {str(path)!r}: its metadata describe a detector without a backbone")
    return state, metadata or _stated_by_others(path, text)


def _stated_by_others(path: Path, text: Mapping[str, str]) -> dict[str, Any]:
    """What the metadata of another program say."""
    try:
        return stated_by_arguments("metadata", text)
    except UserError as error:
        raise UserError(f"weights {str(path)!r}: {error}") from None


def is_ours(path: Path) -> bool:
    """Whether `write_weights` wrote the file, so that it describes itself."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format") == OURS
    except (SafetensorError, OSError):
        return False


def is_safetensors(path: Path) -> bool:
    """Whether a file's content is of safetensors, or its name says so and its content is of no PyTorch file."""
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError:
        return path.suffix == ".safetensors"
    header = int.from_bytes(start[:8], "little")
    if start[8:] == b"{" and header + 8 <= path.stat().st_size:
        return True
    return path.suffix == ".safetensors" and not start.startswith((b"PK\x03\x04", b"\x80", LFS_POINTER[:9]))


def is_index(path: Path) -> bool:
    return path.name.endswith(".index.json")


def read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors of the files that an index of transformers names (model.safetensors.index.json, pytorch_model.bin's).

    Raises ValueError if a file is missing or not beside the index, or holds other tensors than the index says.
    """
    name = f"weights {str(index)!r}"
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        places = content["weight_map"]
        files = sorted(set(places.values()))
        if not all(re.fullmatch(r"[\w-][\w.-]*\.(safetensors|bin)", file) for file in files):
            raise UserError(
                f"{name}: names files that are not .safetensors or .bin beside it: {', '.join(files)[:200]}"
            )
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f'{name}: not a readable index, which is JSON with a "weight_map" of tensors to files'
        ) from None
    if missing := [file for file in files if not (index.parent / file).is_file()]:
        raise UserError(f"{name}: {', '.join(missing)[:200]} missing beside it; download all {len(files)} files")
    state: dict[str, Tensor] = {}
    for file in files:
        path = index.parent / file
        shard: Any = read_safetensors(path)[0] if is_safetensors(path) else read_pickle(path)
        stated = {key for key in places if places[key] == file}
        if differing := sorted(map(str, stated ^ set(shard if isinstance(shard, dict) else ()))):
            some = ", ".join(differing[:3]) + (", .." if len(differing) > 3 else "")
            raise UserError(
                f"{name}: {file} and it disagree about {len(differing)} tensors: {some}; download both again"
            )
        state |= shard
    return state


def read_notes(text: str) -> dict[str, Any]:
    """Our metadata in a file of a foreign format. Raises ValueError if this package did not write them."""
    try:
        notes = json.loads(text)
    except (ValueError, RecursionError):
        notes = None
    if not isinstance(notes, dict) or not all(isinstance(notes.get(key, {}), dict) for key in ("backbone", "cifar")):
        raise UserError(f"weights: the {NOTES} entry is not a table of metadata in JSON")
    return notes


def _refuse_duplicates(pairs: list[tuple[str, object]]) -> None:
    for name, count in Counter(name for name, _ in pairs).items():
        if count > 1:
            raise UserError(f"{name[:80]!r} appears twice")

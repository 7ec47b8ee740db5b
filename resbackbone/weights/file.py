"""Our own weight files: safetensors whose metadata describe the network, its input and where they come from."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from resbackbone.atomic import write_atomically
from resbackbone.checks import UserError
from resbackbone.weights.inputs import INPUT, describe_input

HEADER_LIMIT = 32 * 2**20  # bytes; the largest networks have about 100 KB
NAME_LIMIT = 1024  # characters
NOTES = "resbackbone"  # the entry of foreign files that holds our metadata, as JSON


def write_weights(path: str | os.PathLike, state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write a safetensors file atomically. Metadata values are stored as JSON; the input is added to them.

    Files of this package hold, as far as they are known: "backbone" (the arguments of `build_resnet_backbone`:
    depth, shortcut, stride_in_1x1, groups, width_per_group, eps, norm, in_channels, ..), "detector" (those of
    `detection.build_faster_rcnn`), "cifar" (those of `cifar.build_cifar_resnet`), "num_classes", "classes" (their
    names), "source", "url", "licence", "recipe" and "accuracy": [{"data", "metric", "value", "published"}]; and always
    "input" (`inputs.INPUT`, except for "cifar").
    """
    metadata = {"format": "resbackbone", "input": INPUT, **metadata}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    write_atomically(path, save(tensors, {key: json.dumps(value) for key, value in metadata.items()}))


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a safetensors file, and its metadata if this package wrote them.

    Raises ValueError if the file is damaged, repeats a name, or was made for another input than ours.
    """
    header = _read_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise UserError(f"weights {str(path)!r}: not a readable safetensors file ({error})") from None
    text = header.get("__metadata__") or {}
    if not isinstance(text, dict) or not {"input", NOTES} & text.keys():
        return state, {}
    if NOTES in text:  # of a foreign format, written by us
        return state, read_notes(text[NOTES])
    try:
        metadata = {key: json.loads(value) for key, value in text.items()}
    except (json.JSONDecodeError, TypeError, RecursionError) as error:
        raise UserError(f"weights {str(path)!r}: metadata is not JSON ({error})") from None
    if metadata["input"] != INPUT and "cifar" not in metadata:  # those take their data's mean image
        raise UserError(
            f"weights {str(path)!r}: made for input {metadata['input']}; this library feeds {describe_input(INPUT)}"
        )
    for key in ("backbone", "detector", "cifar"):
        if not isinstance(metadata.get(key, {}), dict):
            raise UserError(f"weights {str(path)!r}: its metadata {key!r} is {metadata[key]!r}, not a table")
    return state, metadata


def read_notes(text: str) -> dict[str, Any]:
    """Our metadata in a file of a foreign format. Raises ValueError if this package did not write them so."""
    try:
        notes = json.loads(text)
    except (json.JSONDecodeError, TypeError, RecursionError) as error:
        raise UserError(f"weights: the {NOTES} entry is not JSON ({error})") from None
    if not isinstance(notes, dict) or not isinstance(notes.get("backbone", {}), dict):
        raise UserError(f"weights: the {NOTES} entry is no table of metadata")
    return notes


def _read_header(path: Path) -> dict:
    """The JSON at the start of a safetensors file, read here too because its library accepts repeated names."""
    reason = None
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > min(HEADER_LIMIT, path.stat().st_size - 8):
            reason = f"a header of {size} bytes in a file of {path.stat().st_size}"
        else:
            try:
                header = json.loads(file.read(size), object_pairs_hook=_unique)
                if not isinstance(header, dict):
                    reason = "its header is no table of tensors"
            except (ValueError, RecursionError) as error:
                reason = f"header: {error}"
    if reason is not None:
        raise UserError(f"weights {str(path)!r}: not a readable safetensors file ({reason})")
    return header


def _unique(pairs: list[tuple[str, object]]) -> dict:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{repeated[:80]!r} is there twice")
    if too_long := [name for name in table if len(name) > NAME_LIMIT]:
        raise UserError(f"a name of {len(too_long[0])} characters, {NAME_LIMIT} are the most: {too_long[0][:40]!r}..")
    return table

"""Export of a backbone to one file that runs without this library: ONNX, or PyTorch's .pt2."""

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from resbackbone.atomic import write_atomically
from resbackbone.checks import UserError, one_of, require
from resbackbone.compat import any_size_in_exports

SUFFIXES = (".onnx", ".pt2")
METADATA_FILE = "metadata.json"  # inside a .pt2
FREE_DIMENSIONS = {0: "batch", 2: "height", 3: "width"}


def export_maps(
    network: nn.Module, path: str | os.PathLike, *, outputs: Sequence[str], metadata: dict[str, Any]
) -> None:
    """Write `network`, [B, channels, H, W] -> {level: map}, in eval mode on the CPU, with any batch, height and width.

    `outputs` names the maps in order, and `metadata` goes into the file. See `Backbone.export`.
    """
    path = Path(path)
    if one_of("suffix", path.suffix, SUFFIXES) == ".onnx":
        require("export", "onnx", "onnxscript", user="export to ONNX")
    if not path.parent.is_dir():
        raise UserError(f"{path}: no folder {path.parent} to export to")
    program = _capture(network.requires_grad_(False))
    data = _to_onnx(program, outputs, metadata) if path.suffix == ".onnx" else _to_pt2(program, metadata)
    write_atomically(path, data)


def _capture(network: nn.Module) -> ExportedProgram:
    channels = next(module for module in network.modules() if isinstance(module, nn.Conv2d)).in_channels
    example = torch.zeros(2, channels, 64, 96)  # different sizes, so that none is mistaken for another
    # By default a size of 1 is a special case, and the program would refuse images whose coarsest map is one pixel.
    with any_size_in_exports():
        free = dict.fromkeys(FREE_DIMENSIONS, Dim.DYNAMIC)  # any size; an error if the network fixes one
        program = torch.export.export(network, (example,), dynamic_shapes=(free,))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    return program


def _to_onnx(program: ExportedProgram, outputs: Sequence[str], metadata: dict[str, Any]) -> bytes:
    exported = torch.onnx.export(
        program,
        output_names=list(outputs),
        dynamic_shapes={"images": FREE_DIMENSIONS},  # names the program's free dimensions
        dynamo=True,
        verbose=False,
    )
    assert exported is not None  # never with dynamo=True
    exported.model.metadata_props.update({key: json.dumps(value) for key, value in metadata.items()})
    return exported.model_proto.SerializeToString()


def _to_pt2(program: ExportedProgram, metadata: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={METADATA_FILE: json.dumps(metadata)})
    return file.getvalue()

"""A backbone as one file that runs without this library: ONNX, or PyTorch's own .pt2."""

import io
import json
import os
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as shape_options

from resbackbone.atomic import write_atomically
from resbackbone.checks import UserError, one_of
from resbackbone.weights.inputs import INPUT

if TYPE_CHECKING:
    from resbackbone.backbone import Backbone

SUFFIXES = {"onnx": ".onnx", "pt2": ".pt2"}  # by format
METADATA_FILE = "metadata.json"  # inside a .pt2
FREE_DIMENSIONS = {0: "batch", 2: "height", 3: "width"}


def export_backbone(backbone: "Backbone", path: str | os.PathLike, format: str | None = None) -> None:
    """Write images -> feature maps to `path` as "onnx" or "pt2"; without `format`, as the suffix says.

    What is written is a copy of `backbone` in fp32 on the CPU, in eval mode, its batch norms fused; `backbone` itself
    is left as it is. The input is `images` [B, channels, H, W]; the outputs have the levels' names, finest first,
    each [B, channels, ceil(H/stride), ceil(W/stride)]. Batch, height and width are free: with a ResNet, whatever its
    levels, any batch from 1 and any size from 1 x 1 pixel; another trunk may need larger images (VGG-16: 32 x 32) and
    a .pt2 refuses smaller ones. Weights are inside the file, which is there whole or not at all.

    The file describes itself: `input` (channel order, range, mean and std that images are normalized by), `levels`
    ({name: {channels, stride}}), `backbone` (its config) and `weights_source`. In ONNX these are metadata_props, each
    a JSON value; in a .pt2 one JSON object, `torch.export.load(path, extra_files={"metadata.json": ""})`.

    Raises ValueError for an unknown format or suffix, for a folder that is not there, and for ONNX where onnx or
    onnxscript is not installed.
    """
    path = Path(path)
    if format is None:
        one_of("suffix", path.suffix, SUFFIXES.values(), " or give format=")
        format = path.suffix.removeprefix(".")
    one_of("format", format, SUFFIXES)
    if path.suffix in SUFFIXES.values() and path.suffix != SUFFIXES[format]:
        raise UserError(f"format {format!r} and a path that ends in {path.suffix!r} do not agree: {str(path)!r}")
    if not path.parent.is_dir():
        raise UserError(f"cannot export to {str(path)!r}: there is no folder {str(path.parent)!r}")
    if format == "onnx":
        missing = [package for package in ("onnx", "onnxscript") if find_spec(package) is None]
        if missing:
            raise UserError(f"export to ONNX needs {' and '.join(missing)}: pip install 'resbackbone[export]'")

    program = _capture(backbone)
    to_bytes = _to_onnx if format == "onnx" else _to_pt2
    write_atomically(path, to_bytes(program, _metadata(backbone)))


def _capture(backbone: "Backbone") -> ExportedProgram:
    network = deepcopy(backbone).cpu().float().to(memory_format=torch.contiguous_format)
    network.fuse().requires_grad_(False)
    channels = next(module for module in network.modules() if isinstance(module, nn.Conv2d)).in_channels
    example = torch.zeros(2, channels, 64, 96)  # three different sizes, so that none is taken for another
    # By default a size of 1 counts as a case of its own: a map of 1 pixel, so images below the coarsest stride + 1
    # (33 with c5, 129 with p7), would be refused. torch.onnx sets the same switch for its own captures.
    with shape_options.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]  # torch adds it at run time
        free = dict.fromkeys(FREE_DIMENSIONS, Dim.DYNAMIC)  # in the network's own range; an error if it is one size
        program = torch.export.export(network, (example,), dynamic_shapes=(free,))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    return program


def _metadata(backbone: "Backbone") -> dict[str, Any]:
    return {
        "format": "resbackbone",
        "input": INPUT,
        "levels": {level: feature._asdict() for level, feature in backbone.features.items()},
        "backbone": backbone.config,
        "weights_source": backbone.weights_source,
    }


def _to_onnx(program: ExportedProgram, metadata: dict[str, Any]) -> bytes:
    exported = torch.onnx.export(
        program,
        output_names=list(metadata["levels"]),
        dynamic_shapes={"images": FREE_DIMENSIONS},  # the program has its own; this names them
        dynamo=True,
        verbose=False,
    )
    assert exported is not None  # with dynamo=True it never is
    exported.model.metadata_props.update({key: json.dumps(value) for key, value in metadata.items()})
    return exported.model_proto.SerializeToString()


def _to_pt2(program: ExportedProgram, metadata: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={METADATA_FILE: json.dumps(metadata)})
    return file.getvalue()

"""Export of a network to one file that runs without this library: ONNX, or PyTorch's .pt2."""

import io
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from resbackbone.atomic import write_atomically
from resbackbone.checks import UserError, one_of, require
from resbackbone.compat import any_size_in_exports

SUFFIXES = (".onnx", ".pt2")
METADATA_FILE = "metadata.json"  # inside a .pt2
FREE_DIMENSIONS = {0: "batch", 2: "height", 3: "width"}


def export_network(
    network: nn.Module,
    path: str | os.PathLike,
    example: Tensor,
    *,
    outputs: Sequence[str],
    metadata: dict[str, Any],
    operators: Mapping[Any, tuple[Callable, Callable | None]] = MappingProxyType({}),
) -> None:
    """Write `network`, images [B, channels, H, W] -> tensors or {name: tensor}, with any batch, height and width.

    network: in eval mode, on the CPU.
    example: images to capture the network with, of different sizes, so that none is mistaken for another.
    outputs: the tensors' names, in order.
    metadata: goes into the file.
    operators: operators in the network that torch does not translate: each one's translation to ONNX, and for those of
        this package, which nobody else has, the same in operators of torch and torchvision, for a .pt2.
    """
    path = check_destination(path)
    with any_size_in_exports(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's and torchvision's, of each other
        program = _capture(network.requires_grad_(False), example)
        if path.suffix == ".onnx":
            data = _to_onnx(program, outputs, metadata, {operator: onnx for operator, (onnx, _) in operators.items()})
        else:
            data = _to_pt2(program, metadata, {operator: plain for operator, (_, plain) in operators.items() if plain})
    write_atomically(path, data)


def check_destination(path: str | os.PathLike) -> Path:
    """Raise UserError unless `path` ends in .onnx or .pt2, its folder is writable, and what writes it is installed."""
    path = Path(path)
    if not path.suffix:
        raise UserError(f"{path}: no file name that ends in {' or '.join(SUFFIXES)}")
    if one_of("suffix", path.suffix, SUFFIXES) == ".onnx":
        require("export", "onnx", "onnxscript", user="export to ONNX")
    if not path.parent.is_dir():
        raise UserError(f"{path}: no folder {path.parent} to export to")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{path}: no permission to write in {path.parent}; choose another folder")
    return path


def _capture(network: nn.Module, example: Tensor) -> ExportedProgram:
    free = dict.fromkeys(FREE_DIMENSIONS, Dim.DYNAMIC)  # any size; an error if the network fixes one
    return _without_paths(torch.export.export(network, (example,), dynamic_shapes=(free,)))


def _without_paths(program: ExportedProgram) -> ExportedProgram:
    for graph in program.graph_module.modules():
        for node in graph.graph.nodes if isinstance(graph, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # names folders of this machine
    return program


def _to_onnx(
    program: ExportedProgram, outputs: Sequence[str], metadata: dict[str, Any], translations: dict[Any, Callable]
) -> bytes:
    exported = torch.onnx.export(
        program,
        output_names=list(outputs),
        dynamic_shapes={"images": FREE_DIMENSIONS},  # names the program's free dimensions
        custom_translation_table=translations,
        dynamo=True,
        verbose=False,
    )
    assert exported is not None  # never with dynamo=True
    exported.model.metadata_props.update({key: json.dumps(value) for key, value in metadata.items()})
    return exported.model_proto.SerializeToString()


def _to_pt2(program: ExportedProgram, metadata: dict[str, Any], decompositions: dict[Any, Callable]) -> bytes:
    if decompositions:
        program = _without_paths(program.run_decompositions(decompositions))
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={METADATA_FILE: json.dumps(metadata)})
    return file.getvalue()

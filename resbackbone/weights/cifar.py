"""CIFAR-10 networks of others: what their tensors show, and shortcut A's zero channels in another place than ours."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from resbackbone.checks import UserError

PADDINGS = ("end", "both")  # where shortcut A puts the zero channels: behind the others, or half of them on each side
SHAPES = {"conv1.weight": (16, 3, 3, 3), "layer1.0.conv1.weight": (16, 16, 3, 3)}


def is_for_cifar(state: Mapping[str, Tensor]) -> bool:
    """Whether this is a ResNet of three stages behind a 3x3 stem: the paper's for CIFAR-10, or a relative."""
    stages = {key.split(".")[0] for key in state if key.startswith("layer")}
    stem = state.get("conv1.weight")
    return stages == {"layer1", "layer2", "layer3"} and stem is not None and stem.shape[2:] == (3, 3)


def cifar_network_of(state: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """The arguments of `build_cifar_resnet` that names and shapes show: depth, num_classes, and shortcut "B" or "C".

    Shortcuts without parameters (A and none) look the same. Raises ValueError if the network is none of the paper's.
    """
    blocks = [len({key.split(".")[1] for key in state if key.startswith(f"layer{i}.")}) for i in (1, 2, 3, 4)]
    shapes = {key: tuple(state[key].shape) for key in (*SHAPES, "fc.weight") if key in state}
    problem = ""
    if blocks[3]:
        problem = "they have layer4, as torchvision's networks and kuangliu's for CIFAR do"
    elif not blocks[0] or len(set(blocks[:3])) > 1:
        problem = f"layer1, layer2 and layer3 have {', '.join(map(str, blocks[:3]))} blocks"
    elif len(shapes.get("fc.weight", ())) != 2:
        problem = f"fc.weight is {list(shapes['fc.weight']) if 'fc.weight' in shapes else 'missing'}"
    else:
        for key, shape in SHAPES.items():
            if shapes.get(key, shape) != shape:
                problem = f"{key} is {list(shapes[key])}, not {list(shape)}"
                break
    if problem:
        raise UserError(
            f"weights from {source} are of no CIFAR network of the paper's, which have layer1, layer2 and layer3 with "
            f"as many blocks each, 16, 32 and 64 channels, and fc: {problem}"
        )
    shown = {"depth": 6 * blocks[0] + 2, "num_classes": shapes["fc.weight"][0]}
    projections = sum(key.endswith(".downsample.0.weight") for key in state)
    return shown | ({"shortcut": "C" if projections == sum(blocks) else "B"} if projections else {})


def under_our_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` with projections under `downsample`, where kuangliu's and akamaster's code has `shortcut`."""
    return {re.sub(r"^(layer\d\.\d+)\.shortcut\.", r"\1.downsample.", key): state[key] for key in state}


def move_padding(state: Mapping[str, Tensor], *, to: str) -> dict[str, Tensor]:
    """The same network with shortcut A's zero channels at the "end", if they were on "both" sides, or back.

    The channels of stage 2 and 3 are permuted, so nothing is rounded. With zeros on both sides, stage 2 has the 16
    channels of stage 1 in its middle, and stage 3 the 32 of stage 2; at the end of both, they come first.
    """
    stage2 = torch.arange(32).roll(-8)  # 8..23 are the shortcut's
    stage3 = torch.cat((16 + stage2, torch.arange(64).roll(-48)[:32]))  # 16..47
    if to == "both":
        stage2, stage3 = stage2.argsort(), stage3.argsort()
    order = {"layer2": stage2, "layer3": stage3}
    moved = dict(state)
    for key, tensor in state.items():
        stage, block, name, *_ = (*key.split("."), "", "")
        if stage in order and name in ("conv2", "bn2") and tensor.dim():  # what writes into the residual stream
            moved[key] = tensor[order[stage]]
        elif stage in order and name == "conv1":  # what reads it
            before = order[stage] if block != "0" else order.get("layer2" if stage == "layer3" else "")
            moved[key] = tensor if before is None else tensor[:, before]
    moved["fc.weight"] = state["fc.weight"][:, stage3]
    return moved

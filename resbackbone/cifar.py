"""The paper's CIFAR-10 networks, 6n+2 layers deep, residual and plain (He et al. 2015, Sec. 4.2 and Table 6)."""

import json
import logging
import os
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from resbackbone.atomic import open_atomically
from resbackbone.checks import UserError, one_of
from resbackbone.folding import conv_norm_relu
from resbackbone.layers import conv, norm_layer
from resbackbone.resnet import BasicBlock, Layout, Stage
from resbackbone.weights import Weights, WeightSource, read_weights, write_weights
from resbackbone.weights.cifar import PADDINGS, cifar_network_of, move_padding, under_our_names
from resbackbone.weights.file import NOTES
from resbackbone.weights.fit import fit
from resbackbone.weights.inputs import check_input, describe_input

_log = logging.getLogger("resbackbone")
CIFAR_DEPTHS = (20, 32, 44, 56, 110, 1202)  # Table 6
SHORTCUTS = ("A", "B", "C", "none")
STAGES = {"layer1": (16, 1), "layer2": (32, 2), "layer3": (64, 2)}  # channels, stride
CHOICES = (
    "shortcut='A' with shortcut_padding='end' (zero channels behind the others, as here) or 'both' (half on each side, "
    "as in akamaster's code), or shortcut='none' (a plain net); shortcuts that average pixels are not supported"
)
MEAN_IMAGE = "mean_image"  # for a mean: that of each pixel, in the tensor of this name
INPUT = {"channel_order": "RGB", "range": [0.0, 1.0], "mean": MEAN_IMAGE, "std": [1.0, 1.0, 1.0]}


class CifarResNet(nn.Module):
    """[B, 3, 32, 32] -> logits [B, num_classes]: a 3x3 stem, three stages of 2n 3x3 layers, average pool and fc.

    Sizes other than 32 work too. `normalize` makes the input from images in 0..1. `input` describes it in the layout of
    `weights.INPUT`, None where nobody said: the paper's is RGB in 0..1 less the training set's mean image, which is
    `mean_image` [3, 32, 32]; others have a mean and deviation for each channel. `config` makes the network again.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential

    def __init__(self, depth: int, *, shortcut: str = "A", num_classes: int = 10):
        super().__init__()
        one_of("depth", depth, CIFAR_DEPTHS, " (the paper's for CIFAR-10; for ImageNet: build_resnet_classifier)")
        layout = Layout(norm_layer("BN"), one_of("shortcut", shortcut, SHORTCUTS))
        self.config: dict[str, Any] = {"depth": depth, "shortcut": shortcut, "num_classes": num_classes}
        self.input: dict[str, Any] | None = None
        self.mean_image: Tensor | None = None

        self.conv1, self.bn1 = conv(3, 16, kernel=3), layout.norm(16)
        self.relu = nn.ReLU(inplace=True)
        channels = 16
        for name, (width, stride) in STAGES.items():
            stage = Stage(BasicBlock(channels, width, layout, stride=stride))
            for _ in range(1, (depth - 2) // 6):
                stage.append(BasicBlock(width, width, layout))
            setattr(self, name, stage)
            channels = width
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # the paper's reference [13]; fc keeps PyTorch's own
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, H, W]
        x = conv_norm_relu(self.conv1, self.bn1, self.relu, images)  # [B, 16, H, W]
        x = self.layer1(x)  # [B, 16, H, W]
        x = self.layer2(x)  # [B, 32, H/2, W/2], rounded up
        x = self.layer3(x)  # [B, 64, H/4, W/4], rounded up
        return self.fc(self.avgpool(x).flatten(1))

    def normalize(self, images: Tensor) -> Tensor:
        """RGB in 0..1, [B, 3, H, W] (32 x 32 with a mean image), to the input that the weights were trained with.

        Raises ValueError if they do not say which, and for images in 0..255.
        """
        if not images.is_floating_point() or (images.numel() and images.max() > 1):
            raise UserError(f"images are {images.dtype} up to {images.max()}; give floats in 0..1 (divide by 255)")
        if self.input is None:
            raise UserError("the network's input is not known; normalize images as in its training, or set `input`")
        if self.mean_image is not None:
            return images - self.mean_image.to(images)
        images = images.flip(1) if self.input["channel_order"] == "BGR" else images
        mean, std = (images.new_tensor(self.input[name]).view(3, 1, 1) for name in ("mean", "std"))
        return (self.input["range"][1] * images - mean) / std


def build_cifar_resnet(
    depth: int | None = None,
    *,
    shortcut: str | None = None,
    shortcut_padding: str | None = None,
    weights: WeightSource | None = None,
    num_classes: int | None = None,
) -> CifarResNet:
    """Build one of the paper's CIFAR-10 networks. With weights, what is None is what they say.

    depth: 20, 32, 44, 56, 110 or 1202; no other 6n+2, although the rule would give it.
    shortcut: "A" (default without weights, as the paper uses here), "B", "C" (Sec. 4.1), or "none" for the plain net.
    shortcut_padding: where shortcut A of the weights has its zero channels: at the "end", as in networks here, or half
        of them on "both" sides, as in github.com/akamaster/pytorch_resnet_cifar10, which is converted exactly.
    weights: a file or state dict with the names conv1, bn1, layer1..3, fc (or `linear`), bare or under `module.`,
        another source that `weights.read_weights` takes, or what it returned. Tensors show the shortcuts B and C, but
        not A, its padding or "none". Our files state these, and akamaster's published ones are recognised by their
        sha256; for all others, give `shortcut`, and with "A" `shortcut_padding`. The input remains that of the training
        (`CifarResNet.normalize`).
    num_classes: 10.

    Raises ValueError for an unknown depth or shortcut, for weights that need `shortcut` or `shortcut_padding`, and for
    weights of another network than is asked, or that do not fit, naming every missing, unexpected and mis-shaped key.
    """
    asked = {"depth": depth, "shortcut": shortcut, "num_classes": num_classes, "shortcut_padding": shortcut_padding}
    if weights is None:
        if asked.pop("shortcut_padding") is not None:
            raise UserError("shortcut_padding is for weights; without them, leave it out (zero channels at the end)")
        arguments: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
        return CifarResNet(**{"depth": depth, **arguments})

    loaded = read_weights(weights)
    facts = cifar_facts(loaded, **asked)
    config = {name: value for name, (value, _) in facts.items()}
    padding, given = config.pop("shortcut_padding", None), config.pop("input", None)
    if "shortcut" not in config or (config["shortcut"] == "A" and padding is None):
        raise UserError(
            f"weights from {loaded.source} do not show which shortcuts they were trained with; give {CHOICES}"
        )
    one_of("shortcut_padding", padding, (None, *PADDINGS))
    model = CifarResNet(**config)
    state = under_our_names(loaded.state)
    mean_image = state.pop(MEAN_IMAGE, None) if given == INPUT else None
    if given == INPUT and mean_image is None:
        raise UserError(f"weights from {loaded.source} are for images less a mean image, which they do not hold")
    fit(model, replace(loaded, state=state))
    if padding == "both":
        model.load_state_dict(move_padding(model.state_dict(), to="end"))
    model.input, model.mean_image = given, mean_image
    if loaded.is_file and loaded.format != "resbackbone":
        said: dict[str, list[str]] = {}
        for name in ("shortcut", "shortcut_padding", "input"):
            value, origin = facts.get(name, (None, ""))
            if value is not None:
                said.setdefault(origin, []).append(f"{name} {describe_fact(name, value)}")
        phrases = [f"{', '.join(values)} ({origin})" for origin, values in said.items()]
        phrases += [] if given else ["input not stated, so normalize images as in the training"]
        _log.warning("weights from %s: %s", loaded.source, "; ".join(phrases))
    return model


def cifar_facts(weights: Weights, **asked: Any) -> dict[str, tuple[Any, str]]:
    """{name: (value, where it is from)} of the arguments of `build_cifar_resnet` and "input", as far as known.

    `asked` are what a caller gives for these arguments; None asks for nothing.

    Raises ValueError if the weights are of no CIFAR network of the paper's, and if they contradict what is asked.
    """
    stated = weights.metadata.get("cifar", {})
    if weights.format == "resbackbone":
        stated = {"shortcut_padding": "end", **stated}
    by = weights.origins.get("cifar", "the file")
    facts = {name: (stated[name], by) for name in ("shortcut", "shortcut_padding") if name in stated}
    shown = cifar_network_of(under_our_names(weights.state), weights.source)
    facts |= {name: (value, "the tensors") for name, value in shown.items()}
    if facts.get("shortcut", ("A",))[0] != "A":
        facts.pop("shortcut_padding", None)
    for name, value in asked.items():
        if value is None:
            continue
        if name == "shortcut_padding" and (option := facts.get("shortcut", ("A",))[0]) != "A":
            raise UserError(
                f"shortcut_padding={value!r} is for shortcut A; weights from {weights.source} have {option}"
            )
        known = facts.setdefault(name, (value, "the caller"))[0]
        if known != value:
            raise UserError(f"weights from {weights.source} are for {name}={known}, but you asked for {name}={value}")
    if "input" in weights.metadata:
        if weights.metadata["input"] != INPUT:
            check_input(weights.metadata["input"])
        facts["input"] = weights.metadata["input"], weights.origins.get("input", "the file")
    return facts


def describe_fact(name: str, value: Any) -> str:
    """The value of a fact of `cifar_facts` in words."""
    if name == "input":
        return "RGB 0..1 less a mean image" if value == INPUT else describe_input(value)
    return str(value)


def save_cifar_resnet(
    model: CifarResNet, path: str | os.PathLike, *, mean_image: Tensor | None = None, **metadata: Any
) -> None:
    """Write `model` as safetensors that `build_cifar_resnet(weights=path)` makes it from again.

    mean_image: [3, 32, 32], what was subtracted from images in 0..1; None keeps the model's own `input`.
    metadata: what else is known: classes (their names), recipe (a sentence on the training), source, licence.
    """
    given, mean_image = (model.input, model.mean_image) if mean_image is None else (INPUT, mean_image)
    if given is None:
        raise UserError("the network's input is not known: give mean_image, or set `model.input`")
    tensors = model.state_dict() | ({} if mean_image is None else {MEAN_IMAGE: mean_image})
    known = {"cifar": model.config, "num_classes": model.config["num_classes"], "input": given}
    write_weights(path, tensors, {**metadata, **known})


def save_for_akamaster(model: CifarResNet, path: str | os.PathLike, **metadata: Any) -> None:
    """Write `model` for github.com/akamaster/pytorch_resnet_cifar10: its names, zero channels on both sides.

    The file also states shortcut, input and `metadata`, for `build_cifar_resnet`. Raises ValueError for shortcuts that
    its code does not have, and unless the model's input has a mean and deviation for each channel, as its code has.
    """
    shortcut = one_of("shortcut of akamaster's networks", model.config["shortcut"], ("A", "B"))
    if model.input is None or model.input == INPUT:
        raise UserError(
            "akamaster's code normalizes each channel; this network's input is not known or less a mean image"
        )
    state = move_padding(model.state_dict(), to="both") if shortcut == "A" else model.state_dict()
    theirs = {key.replace("fc.", "linear.").replace(".downsample.", ".shortcut."): x for key, x in state.items()}
    config = {**model.config, "shortcut_padding": "both"}
    content = {
        "state_dict": {f"module.{key}": tensor for key, tensor in theirs.items()},
        NOTES: json.dumps({**metadata, "cifar": config, "input": model.input}),
    }
    with open_atomically(path) as file:
        torch.save(content, file)

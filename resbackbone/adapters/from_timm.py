"""Networks of timm as a Backbone: VGG (the paper's baseline), ConvNeXt, Swin, a plain ViT, and whatever gives maps."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, Format, freeze_batch_norm_2d
from timm.models import FeatureDictNet, clean_state_dict
from timm.models.efficientnet import EfficientNetFeatures
from timm.models.mobilenetv3 import MobileNetV3Features
from torch import Tensor, nn

from resbackbone.backbone import Backbone
from resbackbone.checks import UserError, one_of
from resbackbone.config import DEFAULT_PYRAMID, CommonConfig, ordered_levels
from resbackbone.fpn import FPN
from resbackbone.layers import BATCH_NORMS
from resbackbone.logs import silenced
from resbackbone.resnet import TRUNK_LEVELS, Feature
from resbackbone.weights import MEAN, STD, Weights
from resbackbone.weights.file import is_safetensors, read_safetensors
from resbackbone.weights.fit import fitting
from resbackbone.weights.pickles import read_pickle
from resbackbone.weights.sources import is_named

SOURCE_OPTIONS = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")  # where weights are, not what is built
ENTRIES = ("state_dict_ema", "model_ema", "state_dict", "model")  # of a checkpoint, as timm chooses among them
IN_ORDER = (FeatureDictNet, EfficientNetFeatures, MobileNetV3Features)  # register their parts in running order


@dataclass(frozen=True, kw_only=True)
class TimmConfig(CommonConfig):
    """A timm network: its name, the options of timm.create_model, and the mean and std of its normalization."""

    timm: str
    options: dict = field(default_factory=dict)
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD


class TimmBackbone(Backbone):
    """A timm network as a Backbone, with random weights unless `pretrained`; `from_timm` makes it.

    The image is padded at its right and bottom, with zeros, to the coarsest stride, and the maps are cropped. On
    images that are already padded, as in detectors, the maps equal those of timm's network.

    If `config` names no levels, all that the network has maps for are used. `source` goes to timm.create_model only.
    """

    config: TimmConfig
    scale: Tensor | None
    shift: Tensor | None

    def __init__(self, config: TimmConfig, *, pretrained: bool = False, **source):
        super().__init__()
        name = config.timm
        if "out_indices" in config.options:
            raise UserError("say which maps as levels=['c3', 'c4', 'c5']; out_indices is set from them")
        if "checkpoint_path" in config.options:
            raise UserError("give a file as pretrained_cfg_overlay={'file': ..} with pretrained=True")
        probe, options = _features_of(name, config.options)  # to see which maps there are
        taps, features = _levels_of(name, probe.feature_info.info)
        default = [p for p in DEFAULT_PYRAMID if p[1] >= min(features)[1]] if config.fpn else list(features)
        config = replace(config, levels=tuple(config.levels or default), options=options)
        for level in config.trunk_levels:
            one_of("level", level, features, f" ({name} gives these; a pyramid needs all from its finest to c5)")
        self.trunk_features = {level: features[level] for level in config.trunk_levels}

        outputs = sorted({taps[level] for level in self.trunk_features})
        self.outputs = {level: outputs.index(taps[level]) for level in self.trunk_features}
        with silenced("timm.models._builder"):  # that the weights have layers behind the last map is no news
            network, _ = _features_of(name, {**options, "out_indices": tuple(outputs), **source}, pretrained=pretrained)
        _fix_padding(network)
        if config.norm == "FrozenBN":
            network = freeze_batch_norm_2d(network)
        if config.frozen_through is not None:
            _freeze(name, network, config.frozen_through)
        if pretrained:
            given = network.pretrained_cfg
            config = replace(config, mean=given.get("mean", MEAN), std=given.get("std", STD))
            given.pop("state_dict", None)  # of a file, which is in the network now
        self.network, self.config = network, config
        self.channels_last = getattr(network, "output_fmt", Format.NCHW) == Format.NHWC
        self.map_strides = network.feature_info.reduction()
        self.size_divisibility = max(*self.map_strides, *(stride for _, stride in self.trunk_features.values()))
        # From images normalized by our mean and std to ones normalized by the network's own; None where it is the same.
        same = (tuple(config.mean), tuple(config.std)) == (MEAN, STD)
        ours, theirs = (torch.tensor(x).view(2, 1, -1, 1, 1) for x in ((MEAN, STD), (config.mean, config.std)))
        self.register_buffer("scale", None if same else ours[1] / theirs[1], persistent=False)
        self.register_buffer("shift", None if same else (ours[0] - theirs[0]) / theirs[1], persistent=False)
        self.fpn = FPN(self.trunk_features, **config.pyramid()) if config.fpn else None
        self.features = self.trunk_features if self.fpn is None else self.fpn.features
        self.weights_source = f"timm:{name}" if pretrained else None

    def forward(self, images: Tensor) -> dict[str, Tensor]:  # [B, channels, H, W]
        height, width = images.shape[-2:]
        multiple = self.size_divisibility
        # -side % multiple would be shorter, but torch.compile cannot trace it.
        right, bottom = ((multiple - side % multiple) % multiple for side in (width, height))
        x = F.pad(images, (0, right, 0, bottom))
        outputs = self.network(x if self.scale is None or self.shift is None else x * self.scale + self.shift)
        if self.channels_last:
            outputs = [y.permute(0, 3, 1, 2).contiguous() for y in outputs]
        if not torch.compiler.is_compiling():
            for y, stride in zip(outputs, self.map_strides, strict=True):
                if tuple(y.shape[-2:]) != (x.shape[-2] // stride, x.shape[-1] // stride):
                    raise UserError(
                        f"timm states stride {stride} for a map of {list(y.shape)} from an image of {list(x.shape)}"
                    )
        maps = {}
        for level, (_, stride) in self.trunk_features.items():
            y = _at_stride(stride, outputs[self.outputs[level]], self.map_strides[self.outputs[level]])
            maps[level] = y[..., : -(-height // stride), : -(-width // stride)]
        return maps if self.fpn is None else self.fpn(maps)

    def _fuse(self) -> "TimmBackbone":
        return self.eval()  # not every timm network shows which norm follows which convolution


def from_timm(
    name: str,
    *,
    levels: Iterable[str] | None = None,
    fpn: bool = False,
    pretrained: bool = False,
    weights: str | os.PathLike | None = None,
    norm: str | None = None,
    frozen_through: str | None = None,
    fpn_channels: int = 256,
    fpn_norm: str | None = None,
    p6_from: str = "c5",
    **options,
) -> TimmBackbone:
    """Turn any timm network with feature maps into a Backbone: `from_timm("vgg16", fpn=True)`.

    Its last map of stride 4, 8, 16 and 32 is c2, c3, c4 and c5; input and output are those of `build_resnet_backbone`,
    even if the weights were trained with another normalization. A network whose maps all have one stride (a
    plain ViT) gives its last one resampled to c2..c5, bilinearly upwards and by max pooling downwards: ViTDet's simple
    pyramid (Li et al. 2022, Sec. 3) without its deconvolutions.

    levels: which of c2..c5, or with `fpn` of p2..p7, to return. Default: c2..c5, or p2..p6, if the network has maps
        for them.
    pretrained: load the weights that timm has for `name`, which may include a tag ("vgg16.tv_in1k").
    weights: the same by a named source ("timm:vgg16.tv_in1k"), or a file (.safetensors, .pth) of this network with
        timm's names, all of them; its classifier is left out. Files do not state the mean and std that they were
        trained with: those are timm's for `name`, which needs a tag where timm's weights differ in them.
    norm: "BN" or "FrozenBN", for the network's batch norms. Default: FrozenBN with weights, BN without.
    frozen_through: None freezes nothing; "stem", "c2" .. "c5" everything up to that map (for VGG, "stem" is conv1 and
        conv2, as in Ren et al. 2015). Only for networks that timm runs part after part. "auto" is "c2" with weights
        for these, and None for others.
    fpn_channels, fpn_norm, p6_from: settings of the pyramid, as in `build_resnet_backbone`.
    options: those of timm.create_model (output_stride, img_size, patch_size, pretrained_cfg_overlay, ..).

    Raises ValueError for an unknown name, level or option, and for weights that cannot be loaded. A network of fixed
    input size that timm cannot change (Hiera, MaxViT, MLP-Mixer) takes only that size (or `img_size`, if it has that
    option).
    """
    if not isinstance(name, str):
        raise UserError(
            f"from_timm builds a network by its timm name, such as 'vgg16'; it takes no {type(name).__name__}"
        )
    one_of("norm", norm, (None, "BN", "FrozenBN"))
    source = {key: options.pop(key) for key in SOURCE_OPTIONS if key in options}
    if weights is not None:
        name, source = _located(name, os.fspath(weights), options, source)
        pretrained = True
    if frozen_through == "auto":
        frozen_through = "c2" if pretrained and isinstance(_features_of(name, options)[0], IN_ORDER) else None
    config = TimmConfig(
        timm=name,
        levels=() if levels is None else ordered_levels(levels, fpn=fpn),
        fpn=fpn,
        norm=norm or ("FrozenBN" if pretrained else "BN"),
        frozen_through=frozen_through,
        fpn_channels=fpn_channels,
        fpn_norm=fpn_norm,
        p6_from=p6_from,
        options=options,
    )
    if not pretrained and ("FrozenBN" in (config.norm, fpn_norm) or config.frozen_through is not None):
        raise UserError(
            f"from_timm({name!r}) without pretrained=True would freeze random weights; set it, or freeze nothing"
        )
    backbone = TimmBackbone(config, pretrained=pretrained, **source)
    if weights is not None:
        backbone.weights_source = os.fspath(weights)
    return backbone


def _located(name: str, weights: str, options: Mapping, source: Mapping) -> tuple[str, dict]:
    """The network's name, with the weights' tag if they have one, and `source` such that timm finds them."""
    check_name(name)
    (architecture, _, tag), published = name.partition("."), weights.removeprefix("timm:")
    if published != weights:
        theirs, _, other = published.partition(".")
        if theirs != architecture or tag and other not in ("", tag):
            raise UserError(f"weights {weights!r} are of another network than {name!r}; give timm:{name}")
        return (published if other else name), dict(source)
    if is_named(weights):
        raise UserError(f"weights {weights!r}: give a file of {name}, or timm:{name} for those that timm publishes")
    inputs: dict[tuple, list[str]] = {}
    for listed in timm.list_pretrained(f"{architecture}.*"):
        published_as: Any = timm.get_pretrained_cfg(listed)
        inputs.setdefault((published_as.mean, published_as.std), []).append(listed)
    if not tag and len(inputs) > 1:
        said = "; ".join(f"mean {_brief(mean)}, std {_brief(std)}: {names[0]}" for (mean, std), names in inputs.items())
        raise UserError(
            f"weights {weights!r}: networks {name} are trained with several inputs, and the file does not state which; "
            f"name the network with a tag that has the same: {said}"
        )
    overlay = {**source.get("pretrained_cfg_overlay", {}), "state_dict": _state_of(name, Path(weights), options)}
    return name, {**source, "pretrained_cfg_overlay": overlay}


def _brief(numbers: Iterable[float]) -> str:
    return " ".join(f"{number:.3g}" for number in numbers)


def _state_of(name: str, path: Path, options: Mapping) -> dict[str, Tensor]:
    """The tensors in a file, all that timm's network has but its classifier."""
    if not path.is_file():
        raise UserError(f"weights '{path}': no such file; give a .safetensors or .pth of {name}, or timm:{name}")
    content: Any = read_safetensors(path)[0] if is_safetensors(path) else read_pickle(path)
    if isinstance(content, Mapping):
        content = next((content[key] for key in ENTRIES if isinstance(content.get(key), Mapping)), content)
    tensors = (
        {key: x for key, x in dict(content).items() if isinstance(x, Tensor)} if isinstance(content, Mapping) else {}
    )
    if not tensors:
        raise UserError(f"weights '{path}': holds no tensors by name; save the network's state_dict()")
    whole: Any = timm.create_model(name, **options)
    classifiers = whole.pretrained_cfg.get("classifier") or ()
    heads = tuple(f"{head}." for head in ([classifiers] if isinstance(classifiers, str) else classifiers))
    state = {key: x for key, x in clean_state_dict(tensors).items() if not key.startswith(heads)}
    return fitting(whole, Weights(state, {}, str(path)), fresh=heads)


def check_name(name: str) -> None:
    """Raise ValueError with similar names if timm has no network `name`, which may include a tag."""
    if not timm.is_model(name.partition(".")[0]):
        close = get_close_matches(name.partition(".")[0], timm.list_models(), n=3)
        meant = f"; did you mean {' or '.join(close)}?" if close else ""
        raise UserError(f"timm has no network {name!r}{meant or '; timm.list_models() names those it has'}")


def _features_of(name: str, options: Mapping, *, pretrained: bool = False) -> tuple[Any, dict]:
    """timm's network with feature maps, and `options`, with those that let it take any size where it needs them."""
    check_name(name)
    published = timm.get_pretrained_cfg(name.partition(".")[0])
    fixed = published is not None and published.fixed_input_size and "img_size" not in options
    refusal = None
    dynamic = {"dynamic_img_size": True}  # which Swin ignores in silence before timm 1.0.30
    for lifted in ({**dynamic, "strict_img_size": False}, dynamic, {}) if fixed else ({},):
        try:
            arguments = {**lifted, **options}
            return timm.create_model(name, pretrained=pretrained, features_only=True, **arguments), arguments
        except (TypeError, ValueError, RuntimeError, AssertionError, AttributeError, OSError) as error:
            refusal = error
    reason = (str(refusal).strip() or type(refusal).__name__).splitlines()[0]
    raise UserError(f"timm cannot make feature maps of {name!r}{' with its weights' if pretrained else ''}: {reason}")


def _levels_of(name: str, info: list[dict]) -> tuple[dict[str, int], dict[str, Feature]]:
    """The index of each level's map, and the level's channels and stride."""
    last = {entry["reduction"]: index for index, entry in enumerate(info)}  # of each stride
    strides = {level: 2 ** int(level[1]) for level in TRUNK_LEVELS}
    if len(last) == 1:
        ((stride, index),) = last.items()
        if stride not in strides.values():
            raise UserError(f"{name} has maps of stride {stride} alone, not of 4, 8, 16 or 32: give patch_size=16")
        taps = dict.fromkeys(strides, index)
    else:
        taps = {level: last[stride] for level, stride in strides.items() if stride in last}
        if not taps:
            raise UserError(f"{name} has maps of strides {', '.join(map(str, last))}, none of 4, 8, 16 or 32")
    return taps, {level: Feature(info[index]["num_chs"], strides[level]) for level, index in taps.items()}


class SameConv2d(Conv2dSame):
    """timm's Conv2dSame (TensorFlow's padding) on maps whose sides are multiples of its stride."""

    def forward(self, x: Tensor) -> Tensor:
        sides = zip(reversed(self.kernel_size), reversed(self.stride), reversed(self.dilation), strict=True)
        totals = [max(dilation * (kernel - 1) + 1 - stride, 0) for kernel, stride, dilation in sides]
        padding = [part for total in totals for part in (total // 2, total - total // 2)]  # left, right, top, bottom
        return self._conv_forward(F.pad(x, padding), self.weight, self.bias)


def _fix_padding(network: nn.Module) -> None:
    """Let convolutions with TensorFlow's padding have a constant one, in place.

    It follows from each map's size, which torch.export cannot simplify; here it is the same for all sizes, as images
    are padded to the coarsest stride.
    """
    for conv in network.modules():
        if type(conv) is Conv2dSame:
            conv.__class__ = SameConv2d


def _at_stride(stride: int, x: Tensor, given: int) -> Tensor:
    """A map of stride `given`, resampled to `stride`."""
    if given > stride:
        return F.interpolate(x, scale_factor=float(given // stride), mode="bilinear", align_corners=False)
    return x if given == stride else F.max_pool2d(x, stride // given)


def _freeze(name: str, network: nn.Module, through: str) -> None:
    """Freeze, in place, the parts that run up to the map `through`; with "stem", those before stride 4."""
    if not isinstance(network, IN_ORDER):
        raise UserError(f"frozen_through={through!r}: timm does not show the order of {name}'s parts; leave it out")
    modules = list(network.named_modules())
    names = [key.replace("_", ".") + "." for key, _ in modules]  # timm flattens stages.0 to stages_0

    def parts(entry: dict) -> list[int]:
        return [i for i, key in enumerate(names) if key.startswith(entry["module"].replace("_", ".") + ".")]

    stride = 2 if through == "stem" else 2 ** int(through[1])
    finer = [entry for entry in network.feature_info.info if entry["reduction"] <= stride]
    end = max(parts(finer[-1])) + 1 if finer else min(parts(network.feature_info.info[0]))
    for key, module in modules[:end]:
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)
        if isinstance(module, BATCH_NORMS):
            network.set_submodule(key, freeze_batch_norm_2d(module))

"""BackboneConfig: everything that makes a backbone except its weights; defaults, checks and JSON in one place."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from types import UnionType
from typing import Any, ClassVar, TypeVar, get_args, get_origin, get_type_hints

from resbackbone.checks import UserError, brief, one_of
from resbackbone.fpn import PYRAMID_LEVELS, trunk_levels_for
from resbackbone.layers import NORMS, SHORTCUTS, STEMS, same_kind
from resbackbone.resnet import DEPTHS, TRUNK_LEVELS, BasicBlock, Bottleneck, sorted_levels

AnyConfig = TypeVar("AnyConfig", bound="Config")
VERSION = 1  # of what `to_json` writes; files older than the version field are 1 as well
FREEZABLE = (None, "stem", *TRUNK_LEVELS)
DEFAULT_PYRAMID = ("p2", "p3", "p4", "p5", "p6")
ARCHITECTURE = (  # what weights determine, by their shapes or their metadata
    "depth",
    "stem",
    "shortcut",
    "stride_in_1x1",
    "groups",
    "width_per_group",
    "in_channels",
    "eps",
    "norm",
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """A frozen dataclass that checks its fields when it is made, and goes to JSON and back.

    Lists become tuples, so what comes back from JSON compares equal. `kind` names it in messages.
    """

    kind: ClassVar[str]
    version: int = VERSION

    def __post_init__(self):
        hints = get_type_hints(type(self))
        for field in fields(self):
            value = _frozen(getattr(self, field.name))
            object.__setattr__(self, field.name, value)
            if not _has_type(value, hint := hints[field.name]):
                wanted = hint if get_args(hint) else hint.__name__
                raise UserError(f"{self.kind} setting {field.name} must be {wanted}, not {brief(value)}")
        if self.version > VERSION:
            raise UserError(
                f"{self.kind} settings of version {self.version}: this release reads version {VERSION} and older; "
                "update resbackbone"
            )

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values: lists for tuples."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_json(cls: type[AnyConfig], values: Mapping[str, Any], source: str = "") -> AnyConfig:
        """What `to_json` gave, in this version or an older one: fields that are absent take their defaults.

        Raises ValueError that names an unknown or missing field, or one whose value is not accepted, and `source`.
        """
        if source:
            try:
                return cls.from_json(values)
            except UserError as error:
                raise UserError(f"{source} describes a {cls.kind} this version cannot build: {error}") from None
        known = {field.name: field for field in fields(cls)}
        for name in values:
            if name not in known:
                raise UserError(f"unknown {cls.kind} setting {name!r} (written by a newer version?)")
        for name, field in known.items():
            if name not in values and field.default is MISSING and field.default_factory is MISSING:
                raise UserError(f"{cls.kind} setting {name!r} is missing")
        return cls(**values)


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def _has_type(value: Any, hint: Any) -> bool:
    arguments = get_args(hint)
    if get_origin(hint) is UnionType:
        return any(_has_type(value, one) for one in arguments)
    if get_origin(hint) is tuple:
        kinds = arguments[:1] * len(value) if arguments[-1] is ... and isinstance(value, tuple) else arguments
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_has_type, value, kinds))
    if hint is float:
        return type(value) in (int, float)
    return type(value) is hint  # a bool is not an int here


def _at_least_one(config: Config, *names: str) -> None:
    for name in names:
        if (value := getattr(config, name)) < 1:
            raise UserError(f"{config.kind} setting {name} must be at least 1, not {value}")


def ordered_levels(levels: Iterable[str], *, fpn: bool) -> tuple[str, ...]:
    """The levels, finest first, each once. Raises ValueError for an unknown one, and for none."""
    note = " (a pyramid's levels, with fpn=True)" if fpn else " (p2..p7 need fpn=True)"
    return tuple(sorted_levels(levels, PYRAMID_LEVELS if fpn else TRUNK_LEVELS, note))


@dataclass(frozen=True, kw_only=True)
class CommonConfig(Config):
    """What every backbone has, whatever its trunk; `build_resnet_backbone` explains the fields.

    `levels` are c2..c5, or with `fpn` p2..p6, unless others are given. `frozen_through` may be spelled "none" for None,
    as command lines and older files do.
    """

    kind: ClassVar[str] = "backbone"
    levels: tuple[str, ...] = ()
    fpn: bool = False
    norm: str = "BN"
    frozen_through: str | None = None
    fpn_channels: int = 256
    fpn_norm: str | None = None
    p6_from: str = "c5"
    relu_before_p7: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.frozen_through == "none":
            object.__setattr__(self, "frozen_through", None)
        one_of("frozen_through", self.frozen_through, FREEZABLE)
        one_of("norm", self.norm, NORMS)
        one_of("norm of the pyramid", self.fpn_norm, (None, *NORMS))
        one_of("source of p6", self.p6_from, ("c5", "p5"))
        _at_least_one(self, "fpn_channels")
        if self.levels:
            object.__setattr__(self, "levels", ordered_levels(self.levels, fpn=self.fpn))

    @property
    def trunk_levels(self) -> tuple[str, ...]:
        """The levels that the trunk has to give: with a pyramid, those it stands on."""
        return tuple(trunk_levels_for(self.levels)) if self.fpn else self.levels

    def eps_of(self, norm: str | None) -> float:
        """The eps of a norm outside the trunk, in the pyramid or a box head: the trunk's, if it is of that kind."""
        return getattr(self, "eps", 1e-5) if same_kind(norm, self.norm) == self.norm else 1e-5

    def pyramid(self) -> dict[str, Any]:
        """The arguments of FPN."""
        return {
            "levels": self.levels,
            "channels": self.fpn_channels,
            "norm": self.fpn_norm,
            "eps": self.eps_of(self.fpn_norm),
            "p6_from": self.p6_from,
            "relu_before_p7": self.relu_before_p7,
        }


@dataclass(frozen=True, kw_only=True)
class BackboneConfig(CommonConfig):
    """A ResNet's. `ResNetBackbone(config)` builds it with random weights."""

    depth: int
    stride_in_1x1: bool = False
    eps: float = 1e-5
    stem: str = "7x7"
    shortcut: str = "B"
    dilate_c5: bool = False
    groups: int = 1
    width_per_group: int = 64
    in_channels: int = 3
    zero_init_residual: bool = False
    checkpoint_activations: bool = False

    def __post_init__(self):
        if not self.levels:
            object.__setattr__(self, "levels", DEFAULT_PYRAMID if self.fpn else TRUNK_LEVELS)
        super().__post_init__()
        block, _ = DEPTHS[one_of("depth", self.depth, DEPTHS)]
        one_of("stem", self.stem, STEMS)
        one_of("shortcut", self.shortcut, SHORTCUTS)
        _at_least_one(self, "groups", "width_per_group", "in_channels")
        if not 0 <= self.eps < math.inf:
            raise UserError(
                f"eps {self.eps}, which norms add to a variance: must be at least 0 and finite (usual: 1e-5)"
            )
        if block is BasicBlock and (self.groups, self.width_per_group) != (1, 64):
            depths = ", ".join(str(depth) for depth, (block, _) in DEPTHS.items() if block is Bottleneck)
            raise UserError(f"groups and width_per_group are for depths {depths}: a basic block has neither")
        if self.zero_init_residual and self.shortcut == "none":
            raise UserError("zero_init_residual starts a block as its shortcut alone, and a plain net has none")
        if self.dilate_c5 and self.shortcut == "D":
            raise UserError(
                "dilate_c5=True with shortcut='D' (ResNet-D) is not supported, as the shortcut averages pixels only "
                "where c5 has a stride; leave dilate_c5 (timm's output_stride=16) out"
            )

    def trunk(self) -> dict[str, Any]:
        """The arguments of ResNet."""
        names = (*ARCHITECTURE, "dilate_c5", "zero_init_residual", "checkpoint_activations")
        return {"levels": self.trunk_levels, **{name: getattr(self, name) for name in names}}

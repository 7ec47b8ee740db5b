"""Where a checkpoint has the trunk: in which entry, under which prefix of names; and what there is beside it."""

import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from resbackbone.checks import UserError
from resbackbone.weights.formats import FORMATS, NAMES, RESNET_D
from resbackbone.weights.inputs import STATISTICS
from resbackbone.weights.names import rename
from resbackbone.weights.pickles import Foreign, from_array, short

_log = logging.getLogger("resbackbone")

# Taken before others: published figures belong to the average.
AVERAGES = {
    "model_ema", "state_dict_ema", "ema", "ema_model", "ema_state_dict", "ema_state", "params_ema", "averaged_model",
    "swa_model", "swa_state_dict",
}  # fmt: skip
# Parts of a checkpoint that only training needs, whatever names are in them.
OPTIMIZER = re.compile(
    r".*optim(?!al|i[sz]ed).*|(max_)?exp_avg(_sq)?|momentum(_buffers?)?|square_avg|grad_avg|acc_delta|grads?|gradients?",
    re.IGNORECASE,
)
# Modules that wrap a part of a network, in the middle of names.
INNER_WRAPPERS = re.compile(r"(?<=\.)(_checkpoint_wrapped_module|_fsdp_wrapped_module|_orig_mod)\.")
WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "model.")  # DataParallel, torch.compile, Lightning
BOOKKEEPING = re.compile(r"(.*_momentum|n_averaged|lr|model_iter|weight_order)")  # of the training that made a file
REMARKS = {"meta", "__author__", "matching_heuristics", "resbackbone"}  # `read` looks at these
MAX_DEPTH = 8  # of nested entries
MOST_ITEMS = 10_000  # containers in an entry that are looked into for their objects' names
# Heads that others put beside a trunk in one module. Nothing else there is left out: it may be a part of the trunk.
HEADS = re.compile(
    r"(avgpool|bnneck|bottleneck|classifier|criterion|embedding|fc|fc_[a-z]+|gem|global_pool|heads?|last_linear|linear|loss|"
    r"mlp|predictor|prediction_head|proj|projection|projection_head|"
    r"projector|prototypes|queue|queue_ptr)(_?\d+)?"
)
# Weights beside a trunk that may have other strides than usual: their names and dimensions, and what network that is.
SPECIAL_HEADS = (
    (  # torchvision's and mmsegmentation's heads, any ASPP or PPM, PAN, DANet and EncNet, CSAIL's FCN
        r"(.+\.)?((aux_)?classifier\.\d+(\..+)?|(decode_head|auxiliary_head|aspp|ppm|decoder\.fpa)\..+|"
        r"head\.(conv[5-8][a-z]?|fcn)(\..+)?|decoder\.conv_last)\.weight",
        4,
        "a segmentation network, whose trunk may dilate its last stages",
    ),
    (  # a batch norm behind the pooled features
        r"(.+\.)?(bottleneck|bnneck)(\.0)?\.(weight|running_mean)",
        1,
        "a re-identification network, whose layer4 may have stride 1",
    ),
)
# {(name of the first convolution, of one in the first block): the prefixes that they have in files of these formats}
SIGNS: dict[tuple[str, str], set[str]] = {}
for _known in FORMATS.values():
    _block = rename("layer1.0.conv1.weight", NAMES[2], _known.names[2])
    _names = [*zip(RESNET_D, _known.resnet_d, strict=False), *_known.aliases]
    for _stem in filter(None, [_known.names[0], *(rename("conv1.0.weight", *names) for names in _names)]):
        SIGNS.setdefault((_stem, str(_block)), set()).update(trunk for trunk, _ in _known.places)


class Part(NamedTuple):
    """The part of a checkpoint with the trunk.

    `state` holds its tensors; `root` is the prefix of the trunk's names in it, None if there is no complete trunk.
    `entry` and `prefix` lead to it. `training` are keys that only training needs, `beside` names what else there is,
    `outside` are the tensors beside it in its entry.
    """

    state: dict[str, Tensor]
    root: str | None
    entry: str
    prefix: str
    training: list[str]
    beside: list[str]
    outside: dict[str, Tensor]


class _Trunk(NamedTuple):
    at: tuple[str, ...]
    state: dict[Any, Any]
    root: str
    places: set[str]


def find_trunk(content: object, source: str, *, entry: str | None = None, prefix: str | None = None) -> Part:
    """The part of `content`, a checkpoint, that holds its one complete trunk, or the averaged one.

    A trunk is complete if it has a first convolution and a first block under the names of one of FORMATS. If there is
    none, the entry with most tensors is returned. `entry` and `prefix` choose: an entry by its keys ("ema.module"), a
    prefix of names ("module.encoder_q."). `source` names the weights in messages.

    Raises ValueError if there are no tensors by name, if several trunks are complete, if `entry` or `prefix` leads to
    none, or if what has the name of a tensor is none.
    """
    inside = [(at, _plain(state)) for at, state in dicts_in(content) if not any(map(OPTIMIZER.fullmatch, at))]
    dicts = [(at, state) for at, state in inside if entry is None or _leads_to(entry, at)]
    if entry is not None and not dicts:
        there = ", ".join(short(".".join(at)) for at, _ in dicts_in(content) if at)
        raise UserError(f"weights {source!r}: no part {entry!r} in the file; it has {there or 'one part only'}")
    trunks = [_Trunk(at, state, *found) for at, state in dicts for found in _roots(state).items()]
    if prefix:
        prefix = prefix.rstrip(".") + "."
    if prefix is not None:
        under = [t for t in trunks if t.root == prefix] or [t for t in trunks if prefix and t.root.startswith(prefix)]
        if not under:
            there = _listed(trunks) or "there is none"
            raise UserError(f"weights {source!r}: no complete trunk under the prefix {prefix!r}; complete: {there}")
        trunks = under
    announced: set[str] = set()
    averaged = [trunk for trunk in trunks if AVERAGES & {*trunk.at, *trunk.root.split(".")}]
    if _averages_in_place(content):
        averaged = [trunk for trunk in trunks if trunk.at == ("state_dict",)]
    others = [trunk for trunk in trunks if trunk not in averaged]
    if averaged and not any(map(_has_statistics, averaged)) and any(map(_has_statistics, others)):
        some = ", ".join(".".join(t.at) if t.at else f"{t.root}*" for t in averaged)
        _log.warning("weights from %s: left out the average in %s, which has no running_mean", source, some)
        announced = {".".join(trunk.at[:i]) for trunk in averaged for i in range(1, len(trunk.at) + 1)}
        trunks, averaged = others, []
    if averaged and len(averaged) < len(trunks):
        entries = {trunk.at for trunk in trunks}
        names = [".".join(t.at) if len(entries) > 1 else f"{t.root}*" for t in (*averaged, *others)]
        _log.warning("weights from %s hold %s: took %s", source, " and ".join(names), names[0])
        trunks, announced = averaged, {".".join(trunk.at) for trunk in others}
    trunks = [trunk for i, trunk in enumerate(trunks) if not any(_same(trunk, other) for other in trunks[:i])]
    if len(trunks) > 1:
        raise UserError(
            f"weights {source!r}: hold {len(trunks)} complete trunks: {_listed(trunks)}; choose one: "
            "weights=read_weights(FILE, entry=.., prefix=..), or convert_weights.py with --entry and --prefix"
        )
    if trunks:
        at, state, root, places = trunks[0]
        owner = _owner(root, places, prefix or "")
        shapes = {key: x.dim() for key, x in state.items() if isinstance(key, str) and _has_shape(x)}
        special = [
            f"{short(key)} is of {network}"
            for name, dim, network in SPECIAL_HEADS
            for key in shapes
            if shapes[key] == dim and re.fullmatch(name, key) and not (root and key.startswith(root))
        ]
        if prefix is None and special:
            raise UserError(
                f"weights {source!r}: {special[0]}, which no name shows; prefix={root!r} takes it as a trunk of the "
                "usual strides, without dilation"
            )
    else:
        at, state = max(dicts, key=lambda found: sum(map(_has_shape, found[1].values())), default=((), {}))
        root, owner = None, _wrapper(state)
    elsewhere = tuple(other for other in _roots(state) if root is not None and other != root and other.startswith(root))
    part = _part(state, owner, root, elsewhere, ".".join(at), source)
    if not part.state:
        raise UserError(f"weights {source!r}: holds no state dict (tensors by name); {_what_it_is(content)}")
    siblings = [name for name in _siblings(content, at) if name not in announced]
    return part._replace(beside=siblings + part.beside)


def _what_it_is(content: object) -> str:
    """What a checkpoint without tensors by name is instead, and what to do."""
    advice = "save a state_dict() with torch.save"
    if isinstance(content, dict):
        for key, value in content.items():
            if isinstance(value, Foreign):
                return f"its {short(str(key))} is {value.whole}"
        if found := [short(str(key)) for key in content if OPTIMIZER.fullmatch(str(key))]:
            return f"its {', '.join(found)} is an optimizer's; save the network's state_dict() with torch.save"
        return advice
    for i, item in enumerate(content if isinstance(content, list | tuple) else ()):
        if any(_roots(inside) for _, inside in dicts_in(item)):
            advice = f"save its item {i} alone"
    return f"it is a {type(content).__name__}; {advice}"


def dicts_in(content: object, at: tuple[str, ...] = (), seen: set[int] | None = None) -> Iterator[tuple[tuple, dict]]:
    """Every dict in nested ones, once, with the keys that lead to it."""
    seen = set() if seen is None else seen
    if isinstance(content, dict) and id(content) not in seen and len(at) < MAX_DEPTH:
        seen.add(id(content))
        yield at, content
        for key, value in content.items():
            yield from dicts_in(value, (*at, str(key)), seen)


def _plain(state: dict[Any, Any]) -> dict[Any, Any]:
    """The entries with arrays as tensors, and names without the modules that wrap parts of a network."""
    plain = {}
    for key, value in state.items():
        name = INNER_WRAPPERS.sub("", key) if isinstance(key, str) else key
        is_array = isinstance(value, np.ndarray) and value.dtype.kind in "fiub"
        plain[name] = from_array(value) if is_array else value
    return plain if len(plain) == len(state) else state


def _averages_in_place(content: Any) -> bool:
    """Whether `state_dict` has the average: mmengine's EMAHook and Lightning's WeightAveraging swap it on saving."""
    swapped = (("state_dict", "ema_state_dict", "meta"), ("state_dict", "current_model_state"))
    is_dict = isinstance(content, dict)
    return is_dict and any(all(isinstance(content.get(name), dict) for name in names) for names in swapped)


def _leads_to(entry: str, at: tuple[str, ...]) -> bool:
    return entry in at or f"{'.'.join(at)}.".startswith(f"{entry}.")


def _roots(state: Mapping[Any, Any]) -> dict[str, set[str]]:
    """{prefix of a complete trunk's names: the prefixes that formats with such names have}."""
    roots: dict[str, set[str]] = {}
    for (stem, block), places in SIGNS.items():
        for key in state:
            if isinstance(key, str) and key.endswith(stem) and not isinstance(state[key], dict):
                root = key.removesuffix(stem)
                if f"{root}{block}" in state and root[-1:] in ("", "."):
                    roots.setdefault(root, set()).update(places)
    return roots


def _owner(root: str, places: set[str], prefix: str) -> str:
    """The prefix of the network whose trunk is at `root`: in a detector the trunk has one of `places` in it."""
    for place in sorted(places, key=len, reverse=True):
        owner = root.removesuffix(place)
        if root.endswith(place) and owner[-1:] in ("", ".") and owner.startswith(prefix):
            return owner
    return root


def _wrapper(state: Mapping[Any, Any]) -> str:
    """What every tensor's name begins with, if it is of WRAPPERS."""
    keys = [key for key in state if isinstance(key, str) and not BOOKKEEPING.fullmatch(key) and _has_shape(state[key])]
    owner = ""
    while more := next((p for p in WRAPPERS if keys and all(key.startswith(owner + p) for key in keys)), ""):
        owner += more
    return owner


def _has_statistics(trunk: _Trunk) -> bool:
    keys = (key for key in trunk.state if isinstance(key, str) and key.startswith(trunk.root))
    return any(key.endswith("running_var") for key in keys)


def _same(trunk: _Trunk, other: _Trunk) -> bool:
    """Whether two trunks have equal tensors: a module that has two names in its owner."""
    first, second = (
        {k.removeprefix(t.root): x for k, x in t.state.items() if isinstance(k, str) and k.startswith(t.root)}
        for t in (trunk, other)
    )
    one_only = first.keys() ^ second.keys()
    return all(HEADS.fullmatch(key.split(".")[0]) for key in one_only) and all(
        _has_shape(first[key]) and _has_shape(second[key]) and torch.equal(first[key], second[key])
        for key in first.keys() & second.keys()
    )


def _listed(trunks: list[_Trunk]) -> str:
    """How to choose each trunk: by its entry, by its prefix, or by both."""
    entries = len({trunk.at for trunk in trunks})
    return " or ".join(
        ", ".join(
            [f"entry={short('.'.join(trunk.at))!r}"] * (entries > 1)
            + [f"prefix={short(trunk.root)!r}"] * (entries < len(trunks) or entries == 1)
        )
        for trunk in trunks
    )


def _part(
    state: Mapping[Any, Any], owner: str, root: str | None, elsewhere: tuple[str, ...], entry: str, source: str
) -> Part:
    """The tensors of `owner` in `state`, but not those under `elsewhere`, and the names of the rest."""
    tensors: dict[str, Tensor] = {}
    training, wrong = [], []
    beside: dict[str, None] = {}
    for key, value in state.items():
        mine = isinstance(key, str) and key.startswith(owner) and not key.startswith(elsewhere)
        if isinstance(key, str) and BOOKKEEPING.fullmatch(key):
            training.append(key)
        elif mine and _has_shape(value):
            tensors[key.removeprefix(owner)] = value
        elif mine and "." in key.removeprefix(owner):
            wrong.append(described(key, value))
        elif not (entry == "" and isinstance(key, str) and key in REMARKS):
            beside[described(module_of(str(key), owner), value)] = None
    if wrong:
        some = ", ".join(wrong[:4]) + (", .." if len(wrong) > 4 else "")
        raise UserError(f"weights {source!r}: {len(wrong)} entries are not tensors: {some}; save dense tensors there")
    outside = {str(key): x for key, x in state.items() if _has_shape(x) and not str(key).startswith(owner)}
    root = None if root is None else root.removeprefix(owner)
    return Part(tensors, root, entry, owner, training, list(beside), outside)


def _has_shape(value: object) -> bool:
    return isinstance(value, Tensor) and not value.is_nested and not is_lazy(value)


def _siblings(content: Any, at: tuple[str, ...]) -> Iterator[str]:
    """Names of the entries that do not lead to the one at `at`."""
    for i, step in enumerate(at):
        for key, value in content.items():
            if str(key) != step and not (i == 0 and key in REMARKS):
                yield described(".".join([*at[:i], str(key)]), value)
        content = next(value for key, value in content.items() if str(key) == step)


def module_of(key: str, root: str) -> str:
    """The outermost module of a tensor that is not in the one at `root`: "a.queue" for "a.queue.0" and "a.net."."""
    if STATISTICS.fullmatch(key):
        return key
    inside, shared = root.split(".")[:-1], key.split(".")
    depth = next((i for i, word in enumerate(shared) if inside[i : i + 1] != [word]), len(shared))
    return ".".join(shared[: depth + 1])


def described(name: str, value: object) -> str:
    """The name of an entry, with the objects in it that are not read: `args (argparse.Namespace, not run)`."""
    kinds: set[str] = set()
    seen: set[int] = set()
    inside = [value]
    while inside and len(seen) < MOST_ITEMS:  # no recursion: a file may nest lists without end
        item = inside.pop()
        if isinstance(item, Foreign):
            kinds.add(item.name)
        elif isinstance(item, dict | list | tuple) and id(item) not in seen:
            seen.add(id(item))
            inside += item.values() if isinstance(item, dict) else item
    more = ", .." if len(kinds) > 3 else ""
    return short(name) + (f" ({', '.join(sorted(kinds)[:3])}{more}, not run)" if kinds else "")

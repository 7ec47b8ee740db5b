"""Whether weights fit a network: every missing, unexpected or mis-shaped tensor is an error that names it."""

import re
from collections.abc import Mapping

from torch import Tensor, nn

from resbackbone.resnet import DEPTHS, Bottleneck
from resbackbone.weights.file import Weights


def backbone_part(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The backbone's tensors of a detector's state dict (those under `backbone.`), or all of any other."""
    state = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    part = {key.removeprefix("backbone."): tensor for key, tensor in state.items() if key.startswith("backbone.")}
    return part or state


def guess_depth(state: Mapping[str, Tensor]) -> int | None:
    """The depth whose blocks the names in `state` count, or None if they count none that is published."""
    blocks = re.findall(r"(?:^|\s)(?:body\.)?layer([1-4])\.(\d+)\.", " ".join(state))
    counts = tuple(max((int(i) + 1 for stage, i in blocks if stage == str(k)), default=0) for k in (1, 2, 3, 4))
    bottleneck = any(".conv3.weight" in key for key in state)
    known = {(layers, block is Bottleneck): depth for depth, (block, layers) in DEPTHS.items()}
    return known.get((counts, bottleneck))


def fit(module: nn.Module, weights: Weights, *, fresh: tuple[str, ...] = ()) -> None:
    """Load `weights` into `module`, all of them into all of it.

    `fresh` names prefixes that may be absent from the weights as a whole, and keep their initial values then (a
    pyramid on a classifier's trunk). Raises ValueError that names every missing and unexpected key and both shapes
    of every mis-shaped one; `module` is unchanged then.
    """
    given = dict(weights.state)
    if hasattr(module, "adapt_state_dict"):
        module.adapt_state_dict(given)
    wanted = dict(module.state_dict())
    for key in [key for key in {*given, *wanted} if key.endswith("num_batches_tracked")]:
        if key not in given or key not in wanted:  # a counter that nothing reads; frozen norms and many files have none
            given.pop(key, None), wanted.pop(key, None)
    for prefix in fresh:
        if not any(key.startswith(prefix) for key in given):
            wanted = {key: tensor for key, tensor in wanted.items() if not key.startswith(prefix)}

    problems = []
    if missing := [key for key in wanted if key not in given]:
        problems.append(f"{len(missing)} missing: {', '.join(missing)}")
    if unexpected := [key for key in given if key not in wanted]:
        problems.append(f"{len(unexpected)} unexpected: {', '.join(unexpected)}")
    if misshapen := [key for key in wanted if key in given and given[key].shape != wanted[key].shape]:
        shapes = (f"{key} is {list(given[key].shape)}, not {list(wanted[key].shape)}" for key in misshapen)
        problems.append(f"{len(misshapen)} of another shape: {', '.join(shapes)}")
    if problems:
        raise ValueError(f"weights from {weights.source} do not fit: {'; '.join(problems)}")
    module.load_state_dict(given, strict=False)

"""Weights in the layouts that a CPU computes with, kept from one call to the next."""

from collections.abc import Callable, Hashable

from torch import Tensor, nn

from resbackbone.compat import is_untouched, watched

LAYOUTS = 2  # that are kept of a convolution: of more, only the last ones


class KeptWeights:
    """What was computed of a convolution's weights, until somebody may have written to them.

    The weights' memory is marked (`compat.watched`), so whichever way they change, `are_valid` tells. Copies and
    pickles keep nothing.
    """

    def __init__(self, weight: Tensor | None = None):
        self._twin = watched(weight) if weight is not None and weight.device.type == "cpu" else None
        self.layouts: dict[Hashable, Tensor] = {}

    def are_valid(self, weight: Tensor) -> bool:
        """Whether `weight` still is what it was at the start; if not, what was kept is given up for good."""
        twin = self._twin  # other threads may use the same network
        if twin is None or is_untouched(weight, twin):
            return twin is not None
        self._twin = None
        self.layouts.clear()
        return False

    def get(self, layout: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        """The weights in `layout`, computed if they are not kept."""
        found = self.layouts.get(layout)
        if found is None:
            found = compute()
            if len(self.layouts) >= LAYOUTS:
                self.layouts.clear()
            self.layouts[layout] = found
        return found

    def __reduce__(self):
        return KeptWeights, ()


def keep_weights(conv: nn.Conv2d) -> None:
    """Start to keep the weights of `conv`, whatever was written to them before."""
    conv.kept_weights = KeptWeights(conv.weight)  # type: ignore[assignment]


def kept_weights(conv: nn.Module) -> KeptWeights | None:
    """What `keep_weights` has kept of `conv` and what is still valid; None after a write, or without `keep_weights`."""
    kept = conv.__dict__.get("kept_weights")
    return kept if kept is not None and kept.are_valid(conv.weight) else None

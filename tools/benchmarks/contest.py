"""What is compared: contests between contenders, in modes of precision and memory layout."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

OWN = "resbackbone"
FUSED, GRAPH, COMPILED = "fused", "CUDA graph", "compiled"  # a contender's name: its package, a comma, how it runs


def package_of(name: str) -> str:
    return name.split(",")[0]


def is_own(name: str) -> bool:
    return package_of(name) == OWN


class Mode(NamedTuple):
    """Precision and memory layout of a network job."""

    dtype: torch.dtype
    layout: torch.memory_format
    tf32: bool  # on a GPU, in products and convolutions that are computed in fp32


MODES = {
    "fp32": Mode(torch.float32, torch.contiguous_format, tf32=False),
    "fp32-channels-last": Mode(torch.float32, torch.channels_last, tf32=False),
    "tf32-channels-last": Mode(torch.float32, torch.channels_last, tf32=True),
    "bf16-channels-last": Mode(torch.bfloat16, torch.channels_last, tf32=True),  # autocast over fp32 weights
}


class Contender(NamedTuple):
    """One package ready for one job."""

    run: Callable[[], object]  # what is timed
    module: nn.Module | None = None  # whose parameters are not counted as saved for backward
    check: Callable[[], object] | None = None  # returns what has to agree, where a run does not; nothing if empty
    clock: Callable[[], float] | None = None  # makes a run and measures its seconds itself
    counted: bool = False  # whether operations and bytes are counted, which would change what is compiled


def relative_difference(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """The largest ||got - wanted|| / ||wanted|| of the tensors; infinite if shapes differ or a value is not finite."""
    assert got.keys() == wanted.keys(), f"{sorted(got)} against {sorted(wanted)}"
    differences = [0.0]
    for name, expected in wanted.items():
        expected, found = (tensor.detach().double().cpu() for tensor in (expected, got[name]))
        if found.shape != expected.shape:
            return math.inf
        difference, scale = (found - expected).norm().item(), expected.norm().item()
        differences.append(difference / scale if scale else difference)
    return max(differences) if all(map(math.isfinite, differences)) else math.inf


@dataclass(frozen=True)
class Contest:
    """What is compared, and how to read its times.

    `names` are the contenders, this package's first; each is measured against the fastest of the others, or against
    `reference`. `items` counts the images of one run of each contender; empty where a run has none.
    """

    job: str
    heading: str = ""  # of the job's table
    names: tuple[str, ...] = ()
    build: Callable[[str], Contender] | None = None  # picklable, as a fresh process calls it too
    measure: Callable[[int], dict[str, list[float]]] | None = None  # in place of `build`: rounds -> seconds by name
    mode: str = ""
    batch_size: int | None = None  # of networks
    tolerance: float = 0.0
    difference: Callable[..., float] = relative_difference
    reference: str | None = None
    items: tuple[int, ...] = ()
    memory: bool = False
    most_rounds: int | None = None

    @property
    def network(self) -> bool:
        """Whether contenders are networks, so that a matrix product is timed beside them."""
        return self.batch_size is not None

    def empty_result(self) -> dict:
        """The JSON of this contest before anything is measured: settings, then figures by contender, then rounds.

        `difference` is to the outputs of the first contender. Bytes and FLOP are those of one run: saved for backward,
        at the peak above what the process held before, and held by what the run returned. `left_out` and `failed` give
        reasons: the first where nothing is wrong, as a package is missing or the budget spent.
        """
        figures = ("difference", "first", "seconds", "flops", "saved_bytes", "peak_bytes", "held_bytes")
        return {
            "job": self.job,
            "mode": self.mode,
            "batch_size": self.batch_size,
            "names": list(self.names),
            "reference": self.reference,
            "items": dict(zip(self.names, self.items, strict=bool(self.items))),
            "tolerance": self.tolerance,
            **{kind: {} for kind in (*figures, "left_out", "failed", "tracebacks")},
            "others": [],  # share of the machine that other processes had in each round
            "thrown_away": 0,  # rounds in which that was too much
        }

"""The one door for weights: where they come from, what they say about themselves, and whether they fit."""

from resbackbone.weights.file import write_weights
from resbackbone.weights.fit import architecture_of, backbone_part, fit, fitting, pyramid_of, resolve_architecture
from resbackbone.weights.inputs import INPUT, MEAN, STD
from resbackbone.weights.read import Weights, read_weights

__all__ = [
    "INPUT",
    "MEAN",
    "STD",
    "Weights",
    "architecture_of",
    "backbone_part",
    "fit",
    "fitting",
    "pyramid_of",
    "read_weights",
    "resolve_architecture",
    "write_weights",
]

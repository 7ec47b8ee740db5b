"""Weights of any known format in and out, and the named weights to start from."""

from resbackbone.weights.file import write_weights
from resbackbone.weights.inputs import INPUT, MEAN, STD
from resbackbone.weights.read import Weights, WeightSource, read_weights
from resbackbone.weights.write import write_as
from resbackbone.weights.zoo import NamedWeights, list_sources

__all__ = [
    "INPUT",
    "MEAN",
    "STD",
    "NamedWeights",
    "WeightSource",
    "Weights",
    "list_sources",
    "read_weights",
    "write_as",
    "write_weights",
]

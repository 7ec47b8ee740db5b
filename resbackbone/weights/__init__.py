"""The one door for weights: where they come from, what they say about themselves, and whether they fit."""

from resbackbone.weights.file import MEAN, STD, Weights, read_weights, write_weights
from resbackbone.weights.fit import backbone_part, fit, guess_depth

__all__ = ["MEAN", "STD", "Weights", "backbone_part", "fit", "guess_depth", "read_weights", "write_weights"]

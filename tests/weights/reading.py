"""What tests of reading weights share."""

import os

import pytest
import torch

from resbackbone.weights import read_weights


def assert_same_state(state, expected):
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], value) for name, value in expected.items())


def refusal(source, **options) -> str:
    """The one line in which `read_weights` refuses `source`, which it names if that is a path."""
    with pytest.raises(ValueError) as error:
        read_weights(source, **options)
    message = str(error.value)
    assert "\n" not in message and (not isinstance(source, str | os.PathLike) or str(source) in message)
    return message

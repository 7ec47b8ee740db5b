import pytest
import torch
import torch.nn.functional as F

from resbackbone.weights.inputs import (
    BGR_255,
    BGR_255_WITH_STD,
    INPUT,
    RGB_255,
    check_input,
    for_canonical_input,
    for_given_input,
)


def prepared(image, given):
    """[3, H, W] RGB of 0..1 as a network made for `given` wants it, in fp64."""
    pixels = image.double() * given["range"][1]
    pixels = pixels.flip(0) if given["channel_order"] == "BGR" else pixels
    mean, std = (torch.tensor(given[key], dtype=torch.float64).view(3, 1, 1) for key in ("mean", "std"))
    return (pixels - mean) / std


@pytest.mark.parametrize("given", [BGR_255, BGR_255_WITH_STD, RGB_255], ids=["msra", "bgr", "rgb"])
def test_the_converted_convolution_gives_the_same_everywhere_borders_included(given):
    image, conv1 = torch.rand(3, 17, 23), torch.randn(4, 3, 7, 7)
    expected = F.conv2d(prepared(image, given)[None], conv1.double(), stride=2, padding=3)
    converted = for_canonical_input(conv1, given)
    got = F.conv2d(prepared(image, INPUT)[None], converted.double(), stride=2, padding=3)
    assert (got - expected).abs().max() < 1e-6 * expected.abs().max()
    assert torch.allclose(for_given_input(converted, given), conv1, rtol=1e-6, atol=0)


def test_the_canonical_input_changes_nothing():
    conv1 = torch.randn(4, 3, 7, 7)
    assert torch.equal(for_canonical_input(conv1, INPUT), conv1)


def test_another_mean_is_refused_because_padding_would_be_another_colour():
    caffe = {**BGR_255, "mean": [102.9801, 115.9465, 122.7717]}
    with pytest.raises(
        ValueError, match=r"BGR 0\.\.255, mean 102\.98 115\.947 122\.772, std 1 1 1 cannot be converted"
    ):
        for_canonical_input(torch.zeros(1, 3, 1, 1), caffe)
    advice = "cannot be converted exactly.*with given_input='rgb', and images"
    with pytest.raises(ValueError, match=advice):  # the right numbers in the wrong order
        for_canonical_input(torch.zeros(1, 3, 1, 1), {**BGR_255, "channel_order": "RGB"})


@pytest.mark.parametrize(
    "change",
    [
        {"channel_order": "rgb"},
        {"range": [0, 100]},
        {"range": [-1, 1]},
        {"mean": [0.5]},
        {"mean": ["a", "b", "c"]},
        {"std": [0, 1, 1]},
        {"std": [float("nan"), 1, 1]},
        {"std": None},
    ],
)
def test_an_input_that_is_none_is_refused(change):
    with pytest.raises(ValueError, match="unknown input"):
        check_input({**INPUT, **change})
    check_input(INPUT)

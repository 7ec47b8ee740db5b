"""Which file a name means, whatever an exporter made of it; and where it means none or several."""

import pytest

from detection.file_names import match_names, unclear


@pytest.mark.parametrize(
    "name, files, wanted",
    [
        (r"images\1.png", ["1.png", "2.png"], "1.png"),
        ("1.png", ["deep/er/1.png"], "deep/er/1.png"),
        (r"C:\data\b\1.png", ["a/1.png", "b/1.png"], "b/1.png"),
        ("b/1.png", ["a/b/1.png", "1.png"], "a/b/1.png"),  # of two ends, the longer
        ("B/1.PNG", ["b/1.png", "a/b/1.png"], "b/1.png"),  # the whole name before an end of as many parts
        ("../x/../1.png", ["1.png"], "1.png"),
        ("1a2b3c4d-1.png", ["1.png"], "1.png"),
        ("1a2b3c4d-1.png", ["1.png", "1a2b3c4d-1.png"], "1a2b3c4d-1.png"),
        ("100%.png", ["100%.png"], "100%.png"),
        ("a%20b.png", ["a b.png"], "a b.png"),
        ("https://host/a/1.png?key=a/b", ["1.png"], "1.png"),
        ("https://host/local-files/?d=a/1.png", ["1.png"], "1.png"),
    ],
)
def test_the_longest_common_end_decides(name, files, wanted):
    assert match_names([name], files) == ({name: wanted}, {})


@pytest.mark.parametrize("name", ["c/1.png", "c/1.jpg", "11.png", "", ".", "..", "/", "1a2b3c4d-", "1a2b3c4-1.png"])
def test_a_name_that_ends_in_no_file_and_in_which_no_file_ends_means_none(name):
    assert match_names([name], ["a/1.png", "b/1.png"]) == ({}, {})
    assert match_names([name], []) == ({}, {})


def test_what_is_ambiguous_is_no_match():
    assert match_names(["1.png"], ["a/1.png", "b/1.png"]) == ({}, {"1.png": ["a/1.png", "b/1.png"]})
    assert match_names(["a/1.png", "b/1.png", "2.png"], ["1.png", "2.png"]) == (
        {"2.png": "2.png"},
        {"a/1.png": ["1.png"], "b/1.png": ["1.png"]},
    )
    assert match_names(["x/1.png", "x/1.png"], ["1.png"]) == ({"x/1.png": "1.png"}, {})


def test_why_a_name_has_no_file_is_said():
    _, several = match_names(["1.png"], ["b/1.png", "a/1.png"])
    assert unclear("1.png", several) == " may be a/1.png or b/1.png" and unclear("2.png", several) == ""
    _, several = match_names(["x/1.jpg", "2"], ["1.png", "2.png"])
    assert unclear("x/1.jpg", several) == " has another suffix than 1.png: correct the name"
    assert unclear("2", several) == " has another suffix than 2.png: correct the name"
    _, several = match_names(["a/1.png", "b/1.png"], ["1.png"])
    assert unclear("a/1.png", several) == " may be 1.png, and so may b/1.png"

import copy
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made import content

from detection.annotations import Annotations, count_images, read_annotations, select_images
from resbackbone.checks import UserError


def read(folder, what):
    path = folder / "instances.json"
    path.write_text(what if isinstance(what, str) else json.dumps(what))
    return read_annotations(path)


def as_lists(annotations):
    return [field.tolist() if isinstance(field, torch.Tensor) else field for field in annotations]


# What a file says


def test_a_file_is_read_into_arrays_that_refer_to_each_other_by_place(tmp_path):
    what = content(images=2, boxes=[(1, 2, 10.5, 8), (0, 0, 5, 4)])
    what["images"][0]["file_name"], what["images"][1]["file_name"] = "sub/für.png", "8.png"
    what["annotations"][0] |= {"image_id": 8, "area": 7, "iscrowd": 1, "segmentation": [[1, 2, 3, 4.5]]}
    what["images"].reverse()
    found = read(tmp_path, {"info": {"year": 2017}, **what})
    assert found.image_ids.tolist() == [8, 7] and found.widths_heights.tolist() == [[33, 21]] * 2
    assert found.file_names() == [found.file_name(i) for i in range(2)] == ["8.png", "sub/für.png"]
    assert list(found.categories.items()) == [(3, "car"), (13, "stop sign"), (90, "toothbrush")]
    assert (found.image_indices.tolist(), found.labels.tolist()) == ([0, 1], [3, 1])
    assert found.boxes_xywh.tolist() == [[1, 2, 10.5, 8], [0, 0, 5, 4]]
    assert (found.areas.tolist(), found.crowds.tolist()) == ([7, 20], [True, False])


def roboflow(*, boxed=1, own="none", parent="zoo"):
    """A file of Roboflow's: category 0 has the project's name, which is the others' supercategory."""
    categories = [{"id": 0, "name": "zoo", "supercategory": own}]
    categories += [{"id": i, "name": name, "supercategory": parent} for i, name in ((1, "ape"), (2, "bear"))]
    what = content(boxes=[(1, 2, 10, 8), (0, 0, 5, 4)], categories=categories)
    for annotation, category in zip(what["annotations"], (2, boxed), strict=True):
        annotation["category_id"] = category
    return what


@pytest.mark.parametrize("text", [json.dumps, lambda what: json.dumps({**what, "info": math.nan})])
def test_a_category_that_only_groups_the_others_is_left_out_and_labels_start_behind_it(tmp_path, text):
    found = read(tmp_path, text(roboflow()))
    assert (found.categories, found.grouping) == ({1: "ape", 2: "bear"}, {0: "zoo"})
    assert found.labels.tolist() == [2, 1]


@pytest.mark.parametrize("what", [roboflow(boxed=0), roboflow(parent="none"), roboflow(own="zoo", parent="none")])
def test_a_category_0_with_boxes_or_that_groups_no_other_is_one_like_others(tmp_path, what):
    found = read(tmp_path, what)
    assert list(found.categories) == [0, 1, 2] and found.grouping == {}
    assert found.labels.tolist() == [3, 1 + what["annotations"][1]["category_id"]]


def test_some_of_the_images_are_selected_with_their_annotations(tmp_path):
    what = content(images=3, boxes=[(i, 2, 10, 8) for i in range(4)])
    for annotation, image in zip(what["annotations"], (9, 8, 7, 9), strict=True):
        annotation["image_id"] = image
    found = select_images(read(tmp_path, what), np.array([True, False, True]))
    assert (found.image_ids.tolist(), found.file_names()) == ([7, 9], ["7.png", "9.png"])
    assert found.boxes_xywh[:, 0].tolist() == [0, 2, 3] and found.image_indices.tolist() == [1, 0, 1]
    assert found.labels.tolist() == [3, 2, 3] and len(found.categories) == len(found.crowds) == 3
    assert found.areas.tolist() == [80, 80, 80] and found.widths_heights.tolist() == [[33, 21]] * 2


def test_images_are_counted_in_a_file_of_any_kind_that_is_read(tmp_path):
    for text in (json.dumps(content(images=4)), json.dumps({**content(images=4), "info": math.nan})):
        (tmp_path / "instances.json").write_text(text)
        assert count_images(tmp_path / "instances.json") == 4
    (tmp_path / "instances.json").write_text("{")
    with pytest.raises(ValueError, match="instances.json: not JSON"):
        count_images(tmp_path / "instances.json")


def test_iscrowd_area_and_annotation_ids_may_be_absent_or_null_but_for_the_id(tmp_path):
    what = content(boxes=[(0, 0, 5, 4), (1, 1, 3, 3)])
    for annotation in what["annotations"]:
        del annotation["iscrowd"], annotation["id"]
    found = read(tmp_path, what)
    assert (found.areas.tolist(), found.crowds.tolist()) == ([20, 9], [False, False])
    what["annotations"][0] |= {"iscrowd": None, "area": None}
    assert as_lists(read(tmp_path, what)) == as_lists(found)
    what["annotations"][1]["id"] = 1  # the one that the first has by its place
    with pytest.raises(ValueError, match=r"annotations\[1\] repeats the id 1"):
        read(tmp_path, what)
    what["annotations"][1]["id"] = None
    with pytest.raises(ValueError, match=r"Expected `int`, got `null` - at `\$.annotations\[1\].id`"):
        read(tmp_path, what)


def test_ids_may_be_any_64_bits(tmp_path):
    what = content(images=2, boxes=[(0, 0, 5, 4)] * 2)
    first, last = -(2**63), 2**63 - 1
    what["images"][0]["id"] = what["annotations"][0]["image_id"] = last
    what["images"][1]["id"] = what["annotations"][1]["image_id"] = last - 1
    what["categories"][0]["id"] = what["annotations"][0]["category_id"] = last
    what["annotations"][0]["id"], what["annotations"][1]["id"] = first, 0
    found = read(tmp_path, what)
    assert found.image_ids.tolist() == [last, last - 1] and found.image_indices.tolist() == [0, 1]
    assert list(found.categories) == [3, 13, last] and found.labels.tolist() == [3, 1]


SPELLED = [  # another type for the same value
    ("images", "id", "7"),
    ("images", "width", 33.0),
    ("images", "height", "21"),
    ("annotations", "id", "1"),
    ("annotations", "image_id", 7.0),
    ("annotations", "category_id", "90"),
    ("annotations", "category_id", "90.0"),
    ("annotations", "bbox", ["1", "2.0", 10, "8"]),
    ("annotations", "area", "80"),
    ("annotations", "iscrowd", "0"),
    ("annotations", "iscrowd", "false"),
    ("annotations", "iscrowd", False),
    ("annotations", "iscrowd", 0.0),
    ("categories", "id", "13"),
]


@pytest.mark.parametrize("contributor", ["me", math.nan])
@pytest.mark.parametrize("section, key, value", SPELLED)
def test_a_number_that_is_spelled_as_text_or_float_is_that_number(tmp_path, section, key, value, contributor):
    plain = as_lists(read(tmp_path, content()))
    assert as_lists(read(tmp_path, {**with_value(section, key, value), "contributor": contributor})) == plain
    crowd = read(tmp_path, with_value("annotations", "iscrowd", "1"))
    assert crowd.crowds.tolist() == [True]


def test_a_category_named_by_a_number_has_it_as_text(tmp_path):
    assert read(tmp_path, with_value("categories", "name", 7)).categories[13] == "7"


@pytest.mark.parametrize("token", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_are_not_finite_are_read_as_python_does(tmp_path, token):
    what = json.dumps(content(boxes=[(1, 2, 5, 5), (1, 2, "?", 8)])).replace('"?"', token)
    found = read(tmp_path, what).boxes_xywh.numpy()
    assert np.array_equal(found, [[1, 2, 5, 5], [1, 2, float(token), 8]], equal_nan=True)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_file_in_another_unicode_encoding_is_read_too(tmp_path, encoding):
    (tmp_path / "instances.json").write_text(json.dumps(content()), encoding=encoding)
    assert read_annotations(tmp_path / "instances.json").image_ids.tolist() == [7]


@pytest.mark.parametrize("contributor", ["me", math.nan])
@pytest.mark.parametrize("of_images", ["000000000131", 131, "131"])
def test_ids_with_leading_zeros_are_their_numbers_wherever_they_are(tmp_path, of_images, contributor):
    what = {**with_value("annotations", "image_id", "000000000131"), "contributor": contributor}
    what["images"][0]["id"], what["annotations"][0]["category_id"] = of_images, "0090"
    found = read(tmp_path, what)
    assert (found.image_ids.tolist(), found.image_indices.tolist(), found.labels.tolist()) == ([131], [0], [3])
    assert found.boxes_xywh.tolist() == read(tmp_path, content()).boxes_xywh.tolist()


@pytest.mark.parametrize("mode", [1, "1", None])
def test_boxes_that_are_marked_as_cocos_are_read(tmp_path, mode):
    assert as_lists(read(tmp_path, with_value("annotations", "bbox_mode", mode))) == as_lists(read(tmp_path, content()))


VALUES = [None, True, False, 0, 1, 7, 8, -1, 3, 2**31, 2**63, 2**70, 0.0, 1.0, 2.5, math.nan, math.inf, "", "7", "../7"]
VALUES += ["a/b", "a..b", "/a", "\0", "\ud800", [], [1, 2, 3, 4], [1.5, 2, 3, True], [1, 2, 3, "4"], [10**400] * 4, {}]
PLACES = [(section, i, key) for section in ("images", "annotations") for i in (0, 1) for key in (
    "id", "file_name", "width", "height", "image_id", "category_id", "bbox", "iscrowd", "area", "segmentation", None
)]  # fmt: skip
PLACES += [("categories", i, key) for i in (0, 2) for key in ("id", "name", None)]
PLACES += [(section, None, None) for section in ("images", "annotations", "categories", "info")]


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(PLACES), st.sampled_from(["?", *VALUES])), max_size=2))
def test_strict_and_lenient_json_are_read_alike(tmp_path_factory, changes):
    what = content(images=2, boxes=[(0, 0, 5, 4), (1, 2, 3, 4.5)])
    for (section, i, key), value in copy.deepcopy(changes):  # a dict may be drawn twice, and put into itself
        keep = value != "?"
        if i is None:
            what.update({section: value}) if keep else what.pop(section, None)
        elif isinstance(what.get(section), list) and len(what[section]) > i:
            if key is None:
                what[section][i] = value
            elif isinstance(what[section][i], dict):
                what[section][i].update({key: value}) if keep else what[section][i].pop(key, None)
    path = tmp_path_factory.getbasetemp() / "instances.json"

    def outcome(what):
        path.write_text(json.dumps(what))
        try:
            return repr(as_lists(read_annotations(path)))  # as text: NaN equals NaN
        except UserError:
            return "refused"

    assert outcome(what) == outcome({**what, "contributor": math.nan})


# What a file must not say


def without(section, key):
    what = content()
    del what[section][0][key]
    return what


def with_value(section, key, value, **options):
    what = json.loads(json.dumps(content(**options)))
    what[section][-1][key] = value
    return what


REQUIRED = {
    "images": ("id", "file_name", "width", "height"),
    "annotations": ("image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}
BAD_ANNOTATIONS = {
    "no JSON": ("{'images': []}", "not JSON"),
    "an empty file": ("", "not JSON"),
    "half a file": (json.dumps(content())[:-9], "not JSON"),
    "deep nesting": ('{"info": ' + "[" * 200_000, "not JSON"),
    "a number of 5000 digits": ('{"images": ' + "9" * 5000 + "}", "Number out of range"),
    "no images": ({**content(), "images": None}, "Expected `array`, got `null` - at `[$].images`"),
    "no annotations": ({"images": [], "categories": []}, "missing required field `annotations`"),
    "no categories": ({"images": [], "annotations": []}, "missing required field `categories`"),
    "annotations that are a table": ({**content(), "annotations": {}}, "got `object` - at `[$].annotations`"),
    **{
        f"no {key} in {section}": (without(section, key), rf"field `{key}` - at `\$.{section}\[0\]`")
        for section, keys in REQUIRED.items()
        for key in keys
    },
    "an id that is a word": (
        with_value("images", "id", "seven"),
        r"Expected `int`, got `str` - at `\$.images\[0\].id` \(id 'seven'\)",
    ),
    "an image_id that is a word": (
        with_value("annotations", "image_id", "img1"),
        r"image_id 'img1'\); ids are whole numbers: number the images 1, 2, ..",
    ),
    "ids that differ by zeros": (
        {**content(), "images": [{**content()["images"][0], "id": i} for i in ("7", "07")]},
        r"images\[1\] repeats the id 7",
    ),
    "an image without its size": (without("images", "height"), "add each image's width and height in pixels"),
    "boxes of corners": (
        with_value("annotations", "bbox_mode", 0),
        r"annotations\[0\] \(id 1\) has the bbox_mode 0, and COCO's boxes are x, y, width, height: convert",
    ),
    "boxes of corners by name": (with_value("annotations", "bbox_mode", "XYXY_ABS"), "has the bbox_mode 'XYXY_ABS'"),
    "a width that is null": (
        with_value("images", "width", None),
        r"Expected `int`, got `null` - at `\$.images\[0\].width` \(id 7, width None\)",
    ),
    "an id with a fraction": (
        with_value("annotations", "image_id", 7.5),
        r"got `float` - at `\$.annotations\[0\].image_id` \(id 1, image_id 7.5\)",
    ),
    "an id that is true": (with_value("annotations", "category_id", True), r"\(id 1, category_id True\)"),
    "an id that is not a number": (
        json.dumps(with_value("annotations", "category_id", math.nan)),
        r"got `float` - at `\$.annotations\[0\].category_id` \(id 1, category_id nan\)",
    ),
    "no box": (with_value("annotations", "bbox", None), r"got `null` - .* \(id 1, bbox None\)"),
    "a number as file_name": (with_value("images", "file_name", 7), r"got `int` - at `\$.images\[0\].file_name`"),
    "a name of 1001 characters": (with_value("images", "file_name", "7" * 1001), "Expected `str` of length <= 1000"),
    "a width of 0": (with_value("images", "width", 0), "Expected `int` >= 1 - at"),
    "a box of three numbers": (with_value("annotations", "bbox", [1, 2, 3]), r"of length 4.*; a bbox is \[x, y, width"),
    "a box with a word": (
        with_value("annotations", "bbox", [1, 2, 3, "x"]),
        r"`\$.annotations\[0\].bbox\[3\]` \(id 1, bbox \[1, 2, 3, 'x'\]\)",
    ),
    "a repeated image id": (with_value("images", "id", 7, images=2), r"images\[1\] repeats the id 7"),
    "a repeated box id": (
        with_value("annotations", "id", 1, boxes=[(0, 0, 5, 5)] * 2),
        r"\[1\] repeats the id 1",
    ),
    "a repeated category id": (with_value("categories", "id", 3), r"categories\[2\] repeats the id 3"),
    "an id over 64 bits": (with_value("images", "id", 2**70), "Expected `int` <= 9223372036854775807"),
    "a crowd that is a word": (with_value("annotations", "iscrowd", "no"), r"got `str` - .* 'no'\); iscrowd is 0 or"),
    "a crowd of 2": (
        with_value("annotations", "iscrowd", "2"),
        r"annotations\[0\] \(id 1\) has the iscrowd 2, which is 0 or",
    ),
    "a crowd of nan": (
        json.dumps(with_value("annotations", "iscrowd", math.nan)),
        "has the iscrowd nan, which is 0 or 1",
    ),
    "an area of nan": (json.dumps(with_value("annotations", "area", math.nan)), r"\(id 1\) has the area nan; give a"),
    "an area that is a word": (with_value("annotations", "area", ""), "; area is a number, and width . height where"),
    "a number over 1e308": (json.dumps(content()).replace("10", "1e999"), "Number out of range - at"),
    "a number of 400 digits": (json.dumps(content()).replace("10", "9" * 400), "Number out of range - at"),
    "a name that is not Unicode": (with_value("images", "file_name", "\ud800.png"), "which no file can have"),
    "an unknown category": (
        with_value("annotations", "category_id", 91),
        "category_id 91, which is not in categories",
    ),
    "an unknown image": (with_value("annotations", "image_id", 6), r"\[0\] has the image_id 6, which is not in images"),
    "a name with a null": (with_value("images", "file_name", "7.png\0"), "which no file can have"),
    "an empty table of categories": (content(boxes=(), categories=[]), "list of categories is empty"),
}


@pytest.mark.parametrize("what, says", BAD_ANNOTATIONS.values(), ids=list(BAD_ANNOTATIONS))
def test_a_bad_annotation_file_is_an_error_that_names_it_and_what_is_wrong(tmp_path, what, says):
    with pytest.raises(ValueError, match=says) as error:
        read(tmp_path, what)
    assert "instances.json" in str(error.value)


def test_an_annotation_file_that_is_not_text_or_not_there_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "instances.json"
    with pytest.raises(ValueError, match="instances.json: cannot be read"):
        read_annotations(path)
    path.write_bytes(bytes(range(128, 256)))
    with pytest.raises(ValueError, match="instances.json: not JSON"):
        read_annotations(path)


@pytest.mark.parametrize(
    "section, key", [("images", "file_name"), ("categories", "name"), ("annotations", "bbox_mode")]
)
def test_a_file_in_latin_1_is_one_line_that_asks_for_utf_8(tmp_path, section, key):
    path = tmp_path / "instances.json"
    path.write_bytes(json.dumps(with_value(section, key, "für"), ensure_ascii=False).encode("latin-1"))
    with pytest.raises(UserError, match="instances.json: not JSON in UTF-8 .*; save it in UTF-8") as error:
        read_annotations(path)
    assert "\n" not in str(error.value)
    assert count_images(path) == 1


# Memory


def test_an_annotation_costs_its_numbers_and_nothing_more(tmp_path):
    def nbytes(boxes):
        found = read(tmp_path, content(boxes=[(0, 0, 5, 4)] * boxes))
        return sum(field.nbytes for field in found if isinstance(field, torch.Tensor))

    assert nbytes(101) - nbytes(1) == 100 * 49
    others = {name for name, kind in Annotations.__annotations__.items() if kind is not torch.Tensor}
    assert others == {"categories", "grouping", "notes"}

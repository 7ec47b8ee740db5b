"""Pascal VOC's XML becomes COCO's JSON, box by box; what cannot be used is named."""

import json
from functools import partial
from pathlib import Path

import pytest
from commands import error_line
from PIL import Image

from detection.data import open_split
from detection.layouts import find_split
from resbackbone.tools import voc_to_coco

error_of = partial(error_line, voc_to_coco.main)

OBJECT = """<object><name>{}</name><difficult>{}</difficult><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax>
<ymax>{}</ymax></bndbox><part><name>head</name><bndbox><xmin>1</xmin></bndbox></part></object>"""
BOMB = """<!DOCTYPE a [<!ENTITY b "bbbbbbbb"><!ENTITY c "&b;&b;&b;&b;&b;&b;&b;&b;">]>
<annotation><object><name>&c;</name></object></annotation>"""
OUTSIDE = """<!DOCTYPE a SYSTEM "file:///etc/passwd"><annotation/>"""


def put(year, name, objects=(), xml=None):
    """An image of 20 x 12 pixels and its annotation."""
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (year / folder).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 12)).save(year / "JPEGImages" / f"{name}.jpg")
    text = "".join(OBJECT.format(*values) for values in objects)
    (year / "Annotations" / f"{name}.xml").write_text(xml or f"<annotation>{text}</annotation>")


def list_images(year, **lists):
    for name, images in lists.items():
        (year / "ImageSets" / "Main" / f"{name}.txt").write_text("".join(f"{image}\n" for image in images))


@pytest.fixture
def voc():
    """Three images to train on, the last without objects, and one to validate on."""
    year = Path("VOCdevkit/VOC2007")
    put(year, "000005", [("dog", 0, 1, 1, 20, 12), ("cat", 1, 3, 4, 5, 9)])
    put(year, "000007", [("dog", 0, 2.5, 1, 3.5, 2)])
    put(year, "000009")
    put(year, "000012", [("cat", 0, 7, 7, 7, 7)])
    list_images(year, train=["000005", "000007  1", "000009 -1", ""], val=["000012"], trainval=["000012", "000007"])
    return year


def content(split, folder="coco"):
    return json.loads(Path(f"{folder}/annotations/instances_{split}.json").read_text())


def test_corners_that_count_from_1_and_are_inside_become_x_y_width_height(voc, capsys):
    voc_to_coco.main([str(voc), "coco"])
    train, val = content("train"), content("val")
    assert [image["file_name"] for image in train["images"]] == ["000005.jpg", "000007.jpg", "000009.jpg"]
    assert {(image["width"], image["height"]) for image in train["images"]} == {(20, 12)}
    assert (
        [category["name"] for category in train["categories"]]
        == ["cat", "dog"]
        == [category["name"] for category in val["categories"]]
    )
    found = [[a[name] for name in ("image_id", "category_id", "bbox", "area", "iscrowd")] for a in train["annotations"]]
    assert found == [
        [1, 2, [0, 0, 20, 12], 240, 0],  # the whole image
        [1, 1, [2, 3, 3, 6], 18, 1],  # difficult
        [2, 2, [1.5, 0, 2, 2], 4, 0],
    ]
    assert val["images"][0]["id"] == 1 and val["annotations"][0]["bbox"] == [6, 6, 1, 1]  # one pixel
    said = capsys.readouterr().out
    assert "train: 3 images, 3 boxes, 1 of them difficult, now crowds" in said and "2 classes: cat, dog" in said


def test_what_is_written_is_what_train_coco_opens(voc):
    voc_to_coco.main([str(voc), "coco"])
    train = open_split(Path("coco"), "train", keep_empty=False)
    assert len(train) == 2 and train.report["crowds"] == 1 and len(open_split(Path("coco"), "val")) == 1
    linked = Path("coco/train/000005.jpg").stat().st_ino == (voc / "JPEGImages/000005.jpg").stat().st_ino
    assert linked and train[0][0].shape == (3, 12, 20)


def test_other_lists_and_several_years_are_taken_together(voc):
    put(Path("VOCdevkit/VOC2012"), "2012_1", [("bird", 0, 1, 1, 4, 4)])
    list_images(Path("VOCdevkit/VOC2012"), trainval=["2012_1"])
    voc_to_coco.main(["VOCdevkit", "coco", "--train", "trainval", "--val", "nothing"])
    assert [image["file_name"] for image in content("train")["images"]] == ["000012.jpg", "000007.jpg", "2012_1.jpg"]
    assert not Path("coco/val").exists() and not Path("coco/annotations/instances_val.json").exists()
    assert find_split(Path("coco"), "val").part == "val"


def test_without_lists_every_annotated_image_is_for_training(voc):
    for path in (voc / "ImageSets" / "Main").iterdir():
        path.unlink()
    (voc / "ImageSets" / "Main").rmdir()
    voc_to_coco.main([str(voc), "coco"])
    assert len(content("train")["images"]) == 4


@pytest.mark.parametrize(
    "xml, says",
    [
        (BOMB, "it has a DOCTYPE"),
        (OUTSIDE, "it has a DOCTYPE"),
        ("<annotation><object>", "not an annotation"),
        ("<annotation><object><name>cat</name></object></annotation>", "object 1 has the corners [None"),
        (f"<annotation>{OBJECT.format('cat', 0, 5, 1, 4, 2)}</annotation>", "no box of a class"),
        (f"<annotation>{OBJECT.format('cat', 0, 'nan', 1, 4, 2)}</annotation>", "no box of a class"),
        (f"<annotation>{OBJECT.format(' ', 0, 1, 1, 4, 2)}</annotation>", "no box of a class"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_in_a_line_and_ends_it_or_is_skipped(voc, capsys, xml, says):
    put(voc, "000007", xml=xml)
    said = error_of([voc, "coco"])
    assert said == "error: 1 of 3 images of train cannot be used; --skip-bad-files skips them"
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("bad: ")]
    assert line.startswith(f"bad: {voc}/Annotations/000007.xml: ") and says in line
    assert not Path("coco").exists()
    voc_to_coco.main([str(voc), "coco", "--skip-bad-files"])
    assert [image["file_name"] for image in content("train")["images"]] == ["000005.jpg", "000009.jpg"]


def test_missing_files_and_names_that_leave_the_folder_are_bad_too(voc, capsys):
    (voc / "JPEGImages/000005.jpg").unlink()
    (voc / "JPEGImages/000007.jpg").write_text("no image")
    list_images(voc, train=["000005", "000007", "../../000009", "000099"])
    assert "4 of 4 images of train cannot be used" in error_of([voc, "coco"])
    said = capsys.readouterr().out
    for says in ("no image 000005 in", "000007.jpg: not an image", "not the name of an image", "000099.xml: cannot be"):
        assert says in said


@pytest.mark.parametrize(
    "argv, says",
    [
        (["nowhere", "coco"], "nowhere: no folder Annotations in it"),
        (["VOCdevkit", "VOCdevkit"], "VOCdevkit already exists"),
        (["VOCdevkit", "coco", "--train", "no"], "no image in ImageSets/Main/no.txt; --train names another list"),
    ],
)
def test_a_wrong_option_is_one_line_and_nothing_is_written(voc, capsys, argv, says):
    assert says in error_of(argv, capsys)
    assert not Path("coco").exists()

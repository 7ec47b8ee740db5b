"""Pascal VOC's lists of any name become COCO's JSON; the XML itself is tested in tests/detection/test_voc.py."""

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
    assert val["images"][0]["id"] == 1 and val["annotations"][0]["bbox"] == [6, 6, 0, 0]  # of no size, as in BCCD
    said = capsys.readouterr().out
    assert "train: 3 images, 2 boxes, 2 classes in" in said and "2 classes: cat, dog" in said


def test_what_is_written_is_what_train_coco_opens(voc):
    voc_to_coco.main([str(voc), "coco"])
    train = open_split(Path("coco"), "train", keep_empty=False)
    assert len(train) == 2 and train.report["crowds"] == 1 and len(open_split(Path("coco"), "val")) == 1
    linked = Path("coco/train/000005.jpg").stat().st_ino == (voc / "JPEGImages/000005.jpg").stat().st_ino
    assert linked and train[0][0].shape == (3, 12, 20)


def test_other_lists_and_several_years_are_taken_together(voc):
    put(Path("VOCdevkit/VOC2012"), "2012_1", [("bird", 0, 1, 1, 4, 4)])
    list_images(Path("VOCdevkit/VOC2012"), trainval=["2012_1"])
    voc_to_coco.main(["VOCdevkit", "coco", "--train", "trainval"])
    names = [f"VOC20{name}.jpg" for name in ("07/JPEGImages/000007", "07/JPEGImages/000012", "12/JPEGImages/2012_1")]
    assert [image["file_name"] for image in content("train")["images"]] == names
    assert [image["file_name"] for image in content("val")["images"]] == ["000012.jpg"]
    list_images(Path("VOCdevkit/VOC2012"), test=["2012_1"])
    Path("VOCdevkit/VOC2007/ImageSets/Main/val.txt").unlink()
    voc_to_coco.main(["VOCdevkit", "more", "--train", "trainval"])
    assert not Path("more/val").exists() and find_split(Path("more"), "val").part == "val"
    assert [image["file_name"] for image in content("test", "more")["images"]] == ["2012_1.jpg"]


def test_without_lists_every_annotated_image_is_for_training(voc):
    for path in (voc / "ImageSets" / "Main").iterdir():
        path.unlink()
    (voc / "ImageSets" / "Main").rmdir()
    voc_to_coco.main([str(voc), "coco"])
    assert len(content("train")["images"]) == 4


def test_a_file_that_cannot_be_used_is_named_and_ends_it_or_is_left_out_and_named(voc, capsys):
    put(voc, "000007", xml="<annotation><object>")
    (voc / "JPEGImages/000009.jpg").write_text("no image")
    said = error_of([voc, "coco"])
    assert "000007.xml: not an annotation" in said and said.endswith("(and 1 more); --skip-bad-files skips it")
    assert not Path("coco").exists()
    voc_to_coco.main([str(voc), "coco", "--skip-bad-files"])
    said = capsys.readouterr().out
    assert "000007.xml: not an annotation" in said and "000009.jpg: not an image" in said
    assert [image["file_name"] for image in content("train")["images"]] == ["000005.jpg"]


@pytest.mark.parametrize(
    "argv, says",
    [
        (["nowhere", "coco"], "nowhere: no folder Annotations in it"),
        (["VOCdevkit", "VOCdevkit"], "VOCdevkit already exists"),
        (["VOCdevkit", "coco", "--train", "no"], "no image in ImageSets/Main/no.txt; --train names another list"),
        (["VOCdevkit", "coco", "--val", "no"], "no image in ImageSets/Main/no.txt; --val names another list"),
    ],
)
def test_a_wrong_option_is_one_line_and_nothing_is_written(voc, capsys, argv, says):
    assert says in error_of(argv, capsys)
    assert not Path("coco").exists()

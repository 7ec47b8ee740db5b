"""One command converts between the formats, all splits or nothing."""

import json
from functools import partial
from pathlib import Path

import pytest
from commands import error_line

from detection.coco import CocoImages
from detection.data import open_split
from detection.layouts import whole_splits
from detection.shapes import make_shapes
from resbackbone.tools import convert_data

error_of = partial(error_line, convert_data.main)


@pytest.fixture
def shapes():
    return make_shapes(Path("shapes"), train_images=3, val_images=2, size=64)


def test_coco_becomes_yolo_becomes_voc_becomes_coco_with_every_split(shapes, capsys):
    (shapes / "val2017").rename(shapes / "test2017")
    (shapes / "annotations/instances_val2017.json").rename(shapes / "annotations/instances_test2017.json")
    for source, output, form in (("shapes", "b", "yolo"), ("b", "c", "voc"), ("c", "d", "coco")):
        convert_data.main([source, output, "--to", form])
        assert f"written: {output}; train on it with tools/train_coco.py --data {output}" in capsys.readouterr().out
    assert sorted(path.name for path in Path("d").iterdir()) == ["annotations", "test", "train"]  # nothing is held out
    categories = open_split(shapes, "train").categories
    for (split, before), after in zip(whole_splits(shapes).items(), whole_splits("d").values(), strict=True):
        one, other = (CocoImages(of.images, of.annotations, categories=categories) for of in (before, after))
        assert len(one) == {"train": 3, "test": 2}[split] and one.boxes.tolist() == other.boxes.tolist()
        assert one.labels.equal(other.labels)
        assert one.annotations.file_names() == other.annotations.file_names()


@pytest.mark.parametrize("left, says", [(0, "empty file"), (600, "cannot be decoded")])
def test_nothing_is_written_where_an_image_is_broken_and_the_others_if_that_is_asked_for(shapes, capsys, left, says):
    convert_data.main(["shapes", "yolo", "--to", "yolo"])
    image = Path("yolo/images/train/000000000002.jpg")
    content = image.read_bytes()[:left]
    image.unlink()
    image.write_bytes(content)
    assert f"000000000002.jpg: {says}" in error_of(["yolo", "coco", "--to", "coco"])
    assert not Path("coco").exists()
    convert_data.main(["yolo", "coco", "--to", "coco", "--skip-bad-images"])
    assert f"left out: image {image}: {says}" in capsys.readouterr().out
    assert len(open_split(Path("coco"), "train")) == 2


def test_two_classes_of_one_name_are_not_merged_into_one_of_vocs(shapes):
    file = shapes / "annotations/instances_train2017.json"
    content = json.loads(file.read_text())
    content["categories"][1]["name"] = content["categories"][0]["name"]
    file.write_text(json.dumps(content))
    (shapes / "annotations/instances_val2017.json").unlink()
    (shapes / "val2017").rename("elsewhere")
    assert "two classes have the name" in error_of(["shapes", "b", "--to", "voc"])


@pytest.mark.parametrize(
    "argv, says",
    [
        (["nowhere", "b", "--to", "voc"], "nowhere: no such folder"),
        (["shapes", "shapes", "--to", "voc"], "shapes already exists; give a new folder"),
        (["shapes", "b", "--to", "csv"], "unknown format 'csv'; choose from coco, yolo, voc"),
        (["shapes", "b"], "--to"),
    ],
)
def test_a_wrong_option_is_one_line_and_nothing_is_written(shapes, capsys, argv, says):
    assert says in error_of(argv)
    assert not Path("b").exists()

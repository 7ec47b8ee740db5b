"""Data written in one format and read again are the same index, whatever the formats."""

import pytest
import torch
from formats import FORMATS, SIZES, coco, coco_file, images, voc_files
from PIL import Image

from detection.annotations import Annotations
from detection.convert import FORMATS as WRITTEN
from detection.data import open_split


def same(one: Annotations, other: Annotations) -> bool:
    names = [name for name, value in zip(one._fields, one, strict=True) if isinstance(value, torch.Tensor)]
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in names if name != "image_ids")


def written(source, folder, form):
    folder.mkdir()
    WRITTEN[form](folder, {split: open_split(source, split) for split in SIZES})
    return folder


@pytest.mark.parametrize("form", WRITTEN)
@pytest.mark.parametrize("name", ["coco", "ultralytics", "roboflow_voc"])
def test_every_format_is_read_back_as_the_index_it_was_written_from(tmp_path, name, form):
    FORMATS[name](tmp_path / "a")
    again = written(written(tmp_path / "a", tmp_path / "b", form), tmp_path / "c", "coco")
    for split in SIZES:
        wanted = open_split(tmp_path / "a", split)
        for folder in (tmp_path / "b", again):
            found = open_split(folder, split)
            assert same(found.annotations, wanted.annotations)
            assert list(found.categories.values()) == list(wanted.categories.values())
            assert found.path(0).stat().st_ino == wanted.path(0).stat().st_ino  # a hard link


@pytest.mark.parametrize("form", WRITTEN)
def test_boxes_in_parts_of_pixels_crowds_and_boxes_that_are_too_large_survive_as_far_as_the_format_has_them(
    tmp_path, form
):
    coco(tmp_path / "a")
    file = tmp_path / "a/annotations/instances_train2017.json"
    text = file.read_text()
    for old, new in (("[3, 2, 20, 9]", "[3.017, 2.25, 1.9371, 9.5]"), ("[4, 30, 9, 11]", "[-1, 30, 9, 30]")):
        assert old in text
        text = text.replace(old, new)
    file.write_text(text.replace('"bbox": [0, 0, 33, 21]', '"iscrowd": 1, "bbox": [0, 0, 33, 21]'))
    wanted, found = (open_split(of, "train") for of in (tmp_path / "a", written(tmp_path / "a", tmp_path / "b", form)))
    assert torch.equal(wanted.annotations.boxes_xywh[1], torch.tensor([0, 0, 33, 21], dtype=torch.float64))
    assert torch.equal(found.boxes[1:], wanted.boxes[1:]) and torch.equal(found.labels, wanted.labels)
    clipped = [[-1, 30, 9, 30]] if form == "coco" else [[0, 30, 8, 11]]
    assert found.annotations.boxes_xywh[-1:].tolist() == clipped
    assert found.annotations.crowds.sum() == (form != "yolo")
    assert found.annotations.boxes_xywh[found.annotations.boxes_xywh[:, 0] == 3.017][0, :2].tolist() == [3.017, 2.25]


def test_two_images_that_would_have_one_label_file_are_an_error(tmp_path):
    coco(tmp_path / "a")
    file = tmp_path / "a/annotations/instances_train2017.json"
    file.write_text(file.read_text().replace('"b.png"', '"a.jpg"'))
    (tmp_path / "a/train2017/b.png").rename(tmp_path / "a/train2017/a.jpg")
    for form in ("yolo", "voc"):
        with pytest.raises(ValueError, match="a.jpg and a.png would have one label file; rename one of them"):
            written(tmp_path / "a", tmp_path / form, form)


def test_images_of_the_same_name_in_two_splits_stay_apart(tmp_path):
    for split, color in (("train", "red"), ("valid", "blue")):
        images(tmp_path / "a" / split, SIZES["train"])
        voc_files(tmp_path / "a" / split, SIZES["train"])
        Image.new("RGB", (33, 21), color).save(tmp_path / "a" / split / "a.png")
    written(tmp_path / "a", tmp_path / "b", "voc")
    for split, color in (("train", [255, 0, 0]), ("val", [0, 0, 255])):
        assert open_split(tmp_path / "b", split)[0][0][:, 5, 5].tolist() == color


@pytest.mark.parametrize("form", WRITTEN)
def test_names_with_a_folder_called_images_are_read_back(tmp_path, form):
    for split, names in SIZES.items():
        images(tmp_path / "a" / split / "images", names)
        coco_file(tmp_path / f"a/annotations/{split}.json", names, name_of="images/{}.png")
    written(tmp_path / "a", tmp_path / "b", form)
    for split in SIZES:
        wanted, found = (open_split(tmp_path / of, split).annotations for of in "ab")
        assert torch.equal(found.boxes_xywh, wanted.boxes_xywh) and len(found.boxes_xywh)

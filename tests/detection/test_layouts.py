"""Which folders are data, where their splits are, and what becomes of a folder that has only one."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from formats import BOXES, FORMATS, NAMES, SIZES, coco_file, images
from PIL import Image

from detection import layouts
from detection.data import open_split
from detection.layouts import LAYOUT, data_of, describe_layout, find_split, held_out, whole_splits
from detection.shapes import make_shapes
from resbackbone.checks import UserError

LAYOUTS = {  # annotation file and image folder of each split
    "COCO": ("annotations/instances_{}2017.json", "{}2017"),
    "COCO below images": ("annotations/instances_{}2017.json", "images/{}2017"),
    "Roboflow": ("{}/_annotations.coco.json", "{}"),
    "plain": ("annotations/instances_{}.json", "{}"),
    "plain below images": ("annotations/instances_{}.json", "images/{}"),
    "one folder of images": ("annotations/{}.json", "images"),
    "Label Studio": ("{}/result.json", "{}/images"),
    "FiftyOne": ("{}/labels.json", "{}/data"),
}
UNSPLIT = {  # layouts that have one annotation file
    "CVAT": ("annotations/instances_default.json", "images"),
    "CVAT with a subset": ("annotations/instances_default.json", "images/default"),
    "Label Studio": ("result.json", "images"),
    "newer Label Studio": ("result_coco.json", "images"),
    "FiftyOne": ("labels.json", "data"),
}


def put(folder: Path, file: str, images: str, *, first=1, count=2, names="{:03}.png") -> None:
    """Write a split of `count` images of 20 x 12 pixels, image i with a box at x = i."""
    (folder / images).mkdir(parents=True, exist_ok=True)
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    ids = range(first, first + count)
    for i in ids:
        Image.new("RGB", (20, 12)).save(folder / images / names.format(i))
    content = {
        "images": [{"id": i, "file_name": names.format(i), "width": 20, "height": 12} for i in ids],
        "annotations": [{"id": i, "image_id": i, "category_id": 4, "bbox": [i % 10, 0, 5, 5]} for i in ids],
        "categories": [{"id": 4, "name": "cat"}],
    }
    (folder / file).write_text(json.dumps(content))


@pytest.mark.parametrize("val", ["val", "valid", "validation", "Validation"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_splits_are_found_in_every_layout(tmp_path, layout, val):
    file, images = LAYOUTS[layout]
    for number, name in enumerate(("train", val, "test")):
        put(tmp_path, file.format(name), images.format(name), first=1 + 10 * number)
    for split, name, ids in (("train", "train", [1, 2]), ("val", val, [11, 12])):
        found = find_split(tmp_path, split)
        assert (found.annotations, found.images) == (tmp_path / file.format(name), tmp_path / images.format(name))
        assert found.part is None and open_split(tmp_path, split).image_ids.tolist() == ids
    line = describe_layout(tmp_path)
    assert file.format("train") in line and file.format(val) in line and "held out" not in line
    assert line.endswith("; the test split is for evaluate_coco.py --split test")
    assert open_split(tmp_path, "test").image_ids.tolist() == [21, 22]


def test_a_validation_split_alone_is_evaluated_on_and_not_trained_on(tmp_path):
    put(tmp_path, "annotations/instances_val2017.json", "val2017")
    assert find_split(tmp_path, "val").part is None
    with pytest.raises(ValueError, match="no annotations/instances_train2017.json and no train2017; it should contain"):
        find_split(tmp_path, "train")


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_folder_without_a_known_layout_is_one_line_that_lists_them(tmp_path, split):
    (tmp_path / "labels").mkdir()
    with pytest.raises(ValueError) as error:
        find_split(tmp_path, split)
    assert str(error.value) == f"{tmp_path}: no known data layout; it should contain {LAYOUT}"
    with pytest.raises(ValueError, match="labelz: no such folder; did you mean .*labels"):
        find_split(tmp_path / "labelz", split)
    for part in (
        "instances_{train,val}2017.json",
        "{train,valid}/_annotations.coco.json",
        "instances_{train,val}.json",
        *("instances_default.json", "result.json", "labels.json"),
    ):
        assert part in LAYOUT


@pytest.mark.parametrize("layout", ["COCO", "Roboflow", "plain"])
@pytest.mark.parametrize("missing", ["annotations", "images"])
def test_half_a_validation_split_is_an_error_and_not_taken_for_none(tmp_path, layout, missing):
    file, images = LAYOUTS[layout]
    put(tmp_path, file.format("train"), images.format("train"))
    if missing == "annotations":
        (tmp_path / images.format("val")).mkdir()
    elif layout != "Roboflow":
        (tmp_path / file.format("val")).write_text("{}")
    else:
        return  # its file lies in the folder of its images
    wanted = file if missing == "annotations" else images
    with pytest.raises(ValueError, match=f"no {wanted.format('val')}; it should contain"):
        find_split(tmp_path, "val")


# No validation split


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_a_validation_split_a_tenth_is_held_out_of_training(tmp_path, layout):
    file, images = LAYOUTS[layout]
    put(tmp_path, file.format("train"), images.format("train"), count=21)
    train, val = open_split(tmp_path, "train"), open_split(tmp_path, "val")
    assert (len(train), len(val)) == (18, 3) and not set(train.image_ids.tolist()) & set(val.image_ids.tolist())
    for dataset in (train, val):
        assert len(dataset.annotations.image_ids) == len(dataset) and dataset.categories == {4: "cat"}
        for index in range(len(dataset)):
            _, target = dataset[index]
            x = target["image_id"] % 10
            assert torch.equal(target["boxes"], torch.tensor([[x, 0.0, x + 5, 5]]))
    assert "one image in 10 is held out" in describe_layout(tmp_path)


@pytest.mark.parametrize("layout", UNSPLIT)
def test_a_layout_of_one_annotation_file_is_split_by_holding_out_a_tenth(tmp_path, layout):
    file, images = UNSPLIT[layout]
    put(tmp_path, file, images, count=21)
    for split, count in (("train", 18), ("val", 3)):
        found = find_split(tmp_path, split)
        assert (found.annotations, found.images, found.part) == (tmp_path / file, tmp_path / images, split)
        assert len(open_split(tmp_path, split)) == count
    assert file in describe_layout(tmp_path)


def test_annotation_files_that_are_not_read_are_named(tmp_path):
    put(tmp_path, "annotations/instances_train.json", "images", count=21)
    assert "not read" not in describe_layout(tmp_path)
    names = [
        f"annotations/{name}.json" for name in ("instances_dev", "instances_holdout", "person_keypoints_train", "x")
    ]
    for name in names[:1]:
        (tmp_path / name).write_text("{}")
    assert describe_layout(tmp_path).endswith("held out for it; not read: annotations/instances_dev.json")
    for name in names:
        (tmp_path / name).write_text("{}")
    assert describe_layout(tmp_path).endswith(f"; not read: {', '.join(names[:3])} and 1 more")


@pytest.mark.parametrize(
    "layout, unread",
    [("Roboflow", "old/_annotations.coco.json"), ("plain", "instances_train.json"), ("plain", "labels_v2.json")],
)
def test_annotation_files_in_other_places_that_are_not_read_are_named(tmp_path, layout, unread):
    file, images = LAYOUTS[layout]
    put(tmp_path, file.format("train"), images.format("train"), count=21)
    (tmp_path / unread).parent.mkdir(exist_ok=True)
    (tmp_path / unread).write_text("{}")
    assert describe_layout(tmp_path).endswith(f"; not read: {unread}")


def test_which_images_are_held_out_is_settled_by_their_names_and_not_by_their_order():
    names = [f"{i}.jpg" for i in range(100)]
    chosen = {name for name, out in zip(names, held_out(names), strict=True) if out}
    again = {name for name, out in zip(names[::-1], held_out(names[::-1]), strict=True) if out}
    assert chosen == again and len(chosen) == 10 and chosen != set(names[:10])


def test_augmented_copies_of_an_image_are_held_out_together():
    names = [f"photo{i}_jpg.rf.{copy}.jpg" for copy in "abc" for i in range(20)]
    out = {name for name, chosen in zip(names, held_out(names), strict=True) if chosen}
    assert len(out) == 6 and len({name.split(".rf.")[0] for name in out}) == 2


def test_of_one_image_none_can_be_held_out(tmp_path):
    put(tmp_path, "annotations/instances_train.json", "train", count=1)
    for split in ("train", "val"):
        with pytest.raises(ValueError, match="no validation split, and holding one out takes at least 2 images, not 1"):
            open_split(tmp_path, split)


# The same set in every format


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_set_in_every_format_gives_the_same_index(tmp_path, name):
    FORMATS["coco"](tmp_path / "coco")
    FORMATS[name](tmp_path / name)
    for split in SIZES:
        wanted, found = (open_split(tmp_path / of, split) for of in ("coco", name))
        assert list(found.categories.values()) == NAMES
        assert [found.path(i).name for i in range(len(found))] == [wanted.path(i).name for i in range(len(wanted))]
        for one, other in zip(wanted.annotations, found.annotations, strict=True):
            if isinstance(one, torch.Tensor) and one is not wanted.annotations.image_ids:
                assert one.shape[0] == other.shape[0] and (one.dtype == torch.uint8 or torch.equal(one, other))
        boxes = [BOXES.get(found.path(i).stem, []) for i in range(len(found))]
        assert found.boxes.tolist() == [[x, y, x + w, y + h] for of in boxes for _, x, y, w, h in of]
        assert torch.equal(found[0][0], wanted[0][0])
    as_trained = open_split(tmp_path / name, "val", categories=open_split(tmp_path / "coco", "train").categories)
    assert as_trained.categories == {1: "big cat", 2: "dog"} and torch.equal(as_trained.labels, wanted.labels)


def test_what_is_held_out_is_the_same_in_every_format(tmp_path):
    put(tmp_path / "coco", "annotations/instances_train.json", "train", count=21)
    put(tmp_path / "more", "all.json", "below/pictures", count=21)
    val = open_split(tmp_path / "coco", "val")
    assert [val.path(i).name for i in range(3)] == [open_split(tmp_path / "more", "val").path(i).name for i in range(3)]
    for i in range(1, 22):
        (tmp_path / f"yolo/labels/{i:03}.txt").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"yolo/labels/{i:03}.txt").write_text("0 .5 .5 .5 .5")
    (tmp_path / "coco/train").rename(tmp_path / "yolo/images")
    (tmp_path / "yolo/classes.txt").write_text("cat\n")
    assert [val.path(i).name for i in range(3)] == [open_split(tmp_path / "yolo", "val").path(i).name for i in range(3)]


def test_of_two_formats_with_all_splits_cocos_is_read_and_the_other_named(tmp_path):
    for name in ("ultralytics", "voc", "coco"):
        FORMATS[name](tmp_path)
    line = describe_layout(tmp_path)
    assert "in COCO's layout" in line and "; not read: ImageSets/Main/train.txt, ImageSets/Main/val.txt, " in line
    for path in tmp_path.glob("annotations/*.json"):
        path.unlink()
    assert "in YOLO's layout: mine.yaml; not read: ImageSets" in describe_layout(tmp_path)


def test_images_of_the_same_name_in_two_splits_are_those_of_the_splits_folder(tmp_path):
    for split, name in (("train", "train"), ("val", "valid")):
        put(tmp_path, f"{split}_boxes.json", f"images/{name}")
        assert find_split(tmp_path, split).images == tmp_path / "images" / name


@pytest.mark.parametrize("place", [".", "train"])
def test_boxes_in_a_csv_file_are_refused_with_what_to_export(tmp_path, place):
    images(tmp_path / "train", {"a": (33, 21)})
    (tmp_path / place / "boxes.csv").write_text("file,x,y")
    with pytest.raises(ValueError, match="boxes.csv cannot be read: export the boxes as COCO, YOLO or VOC"):
        find_split(tmp_path, "train")


@pytest.mark.parametrize("names", [("training/train", "training/val"), ("my_train_set", "my_train_set_val")])
def test_the_last_word_of_a_coco_files_path_that_names_a_split_counts(tmp_path, names):
    (tmp_path / "training").mkdir()
    for split, name in zip(SIZES, names, strict=True):
        images(tmp_path / "images", SIZES[split])
        coco_file(tmp_path / f"{name}.json", SIZES[split])
    assert [len(open_split(tmp_path, split)) for split in SIZES] == [3, 2]


def test_cvats_own_xml_is_refused_with_what_to_export(tmp_path):
    put(tmp_path, "unused", "images")
    (tmp_path / "annotations.xml").write_text("<annotations><version>1.1</version></annotations>")
    with pytest.raises(ValueError, match="its root is <annotations>, where VOC's is <annotation>; export as COCO"):
        open_split(tmp_path, "train")


def test_two_files_that_may_both_be_the_training_set_are_an_error_that_names_them(tmp_path):
    for name in ("one", "two"):
        put(tmp_path, f"{name}.json", "images")
    with pytest.raises(ValueError, match="one.json and two.json could both be the train split: name yours with"):
        find_split(tmp_path, "train")
    (tmp_path / "two.json").write_text('{"a": 1}')
    assert find_split(tmp_path, "val").annotations == tmp_path / "one.json"


@pytest.mark.parametrize("name", ["coco", "ultralytics", "voc"])
def test_a_split_to_test_on_that_is_not_there_is_an_error_that_says_so(tmp_path, name):
    FORMATS[name](tmp_path)
    with pytest.raises(ValueError, match="there is no folder, list or data.yaml key named test"):
        find_split(tmp_path, "test")


# Files in places of their own


def test_given_files_are_the_splits_and_without_one_to_validate_on_a_tenth_is_held_out(tmp_path):
    put(tmp_path, "a/one.json", "a/below", count=21)
    put(tmp_path, "b/two.json", "pictures", first=31)
    given = {"train_json": tmp_path / "a/one.json"}
    assert [len(open_split(data_of(given), split)) for split in ("train", "val")] == [18, 3]
    assert len(open_split(tmp_path / "a/one.json", "train")) == 18  # as --data
    more = {"data": None, "val_json": str(tmp_path / "b/two.json"), "val_images": str(tmp_path / "pictures")}
    splits = [open_split(data_of(given | more), split) for split in ("train", "val")]
    assert [len(split) for split in splits] == [21, 2]
    line = describe_layout(data_of(given | more))
    assert line.endswith(f"in the layout of a COCO file: {tmp_path}/a/one.json and {tmp_path}/b/two.json")


@pytest.mark.parametrize(
    "given, says",
    [
        ({"val_json": "a.json"}, "--val-json a.json: give --train-json too"),
        (
            {"data": "b", "train_json": "a.json"},
            "--data b and --train-json a.json exclude each other: give one of them",
        ),
    ],
)
def test_files_that_contradict_the_folder_or_lack_that_to_train_on_are_refused(given, says):
    with pytest.raises(ValueError, match=says):
        data_of(given)
    assert data_of({}) is None and data_of({"data": "b"}) == Path("b")


def test_a_given_file_that_is_not_there_is_named():
    for split in ("train", "val"):
        with pytest.raises(ValueError, match="none.json: cannot be read .No such file or directory."):
            open_split(data_of({"train_json": "none.json"}), split)


@pytest.mark.parametrize("part", ["images", "images/train", "labels"])
def test_for_a_part_of_data_the_folder_of_the_whole_is_named(tmp_path, part):
    FORMATS["ultralytics"](tmp_path)
    with pytest.raises(ValueError, match=f"{part}: a part of data in YOLO's layout; give the whole, {tmp_path}$"):
        find_split(tmp_path / part, "train")


def test_a_file_in_cocos_folder_of_annotations_finds_its_images_beside_it(tmp_path):
    FORMATS["coco"](tmp_path)
    file = next((tmp_path / "annotations").glob("*train*.json"))
    assert find_split(file, "train").images == next(tmp_path.glob("train*"))


def test_folders_of_classes_are_told_the_command_that_classifies(tmp_path):
    for name in ("train/cat/a.png", "train/dog/b.png", "val/cat/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((3, 5, 3), np.uint8)).save(tmp_path / name)
    with pytest.raises(ValueError, match="3 images without annotations; .* classify whole images, use tools/pretrain"):
        find_split(tmp_path, "train")


@pytest.mark.parametrize("look", [describe_layout, whole_splits])
def test_data_are_searched_once_for_all_splits(tmp_path, monkeypatch, look):
    FORMATS["yolo_lists"](tmp_path)
    calls, best = [], layouts._best
    monkeypatch.setattr(layouts, "_best", lambda folder: calls.append(folder) or best(folder))
    look(tmp_path)
    assert calls == [tmp_path]


def test_all_images_of_data_without_splits_are_found_and_of_others_none(tmp_path):
    (tmp_path / "images").mkdir()
    images = [{"id": i, "file_name": f"{i}.png", "width": 9, "height": 7} for i in range(1, 6)]
    for image in images:
        Image.new("RGB", (9, 7)).save(tmp_path / "images" / image["file_name"])
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 4, 4]}
    content = {"images": images, "annotations": [box], "categories": [{"id": 1, "name": "cell"}]}
    (tmp_path / "result.json").write_text(json.dumps(content))
    assert [len(open_split(tmp_path, split)) for split in ("train", "val", "all")] == [4, 1, 5]
    shapes = make_shapes(tmp_path / "shapes", train_images=1, val_images=1, size=64)
    with pytest.raises(UserError, match="has splits; name one of them: train, val"):
        find_split(shapes, "all")

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detection import shapes
from detection.shapes import CATEGORY_IDS, CLASSES, FIRST_ID, FORMAT, make_shapes


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def annotations(folder: Path, split: str) -> dict:
    return json.loads((folder / "annotations" / f"instances_{split}.json").read_text())


@pytest.fixture(scope="module")
def drawn(module_path):
    """A set of moderate size, shared by the tests that only read it."""
    return make_shapes(module_path / "set", seed=3, train_images=60, val_images=7, size=97)


def test_the_same_arguments_give_the_same_bytes_and_another_seed_gives_others(tmp_path):
    counts = {"train_images": 3, "val_images": 2, "size": 64}
    one, again, other = (
        contents(make_shapes(tmp_path / name, seed=seed, **counts)) for name, seed in [("a", 5), ("b", 5), ("c", 6)]
    )
    assert one == again
    assert sorted(one) == sorted(other)
    assert all(one[name] != other[name] for name in one)


def test_an_image_is_the_same_however_many_are_drawn(tmp_path):
    three = contents(make_shapes(tmp_path / "three", train_images=3, val_images=1, size=64))
    five = contents(make_shapes(tmp_path / "five", train_images=5, val_images=2, size=64))
    shared = [name for name in three if name.endswith(".jpg")]
    assert len(shared) == 4
    assert all(three[name] == five[name] for name in shared)
    assert three["train2017/000000000001.jpg"] != three["val2017/000001000001.jpg"]


@pytest.mark.parametrize("split, count", [("train2017", 60), ("val2017", 7)])
def test_there_are_as_many_images_as_asked_for_and_of_the_size_asked_for(drawn, split, count):
    listed = annotations(drawn, split)["images"]
    assert [image["id"] for image in listed] == list(range(FIRST_ID[split], FIRST_ID[split] + count))
    assert sorted(image["file_name"] for image in listed) == sorted(os.listdir(drawn / split))
    for image in listed:
        with Image.open(drawn / split / image["file_name"]) as opened:
            assert (opened.size, opened.mode) == ((97, 97), "RGB")
        assert (image["width"], image["height"]) == (97, 97)


@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_every_box_lies_in_its_image_around_an_object_of_a_known_category(drawn, split):
    coco = pytest.importorskip("pycocotools.coco").COCO(drawn / "annotations" / f"instances_{split}.json")
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == list(CLASSES)
    assert coco.getCatIds() == list(CATEGORY_IDS)
    assert split != "train2017" or {found["category_id"] for found in coco.anns.values()} == set(CATEGORY_IDS)
    for found in coco.loadAnns(coco.getAnnIds()):
        x, y, width, height = found["bbox"]
        assert found["image_id"] in coco.imgs and found["category_id"] in coco.cats and found["iscrowd"] == 0
        assert x >= 0 and y >= 0 and x + width <= 97.01 and y + height <= 97.01
        assert min(width, height) > 2
        assert 0 < found["area"] <= width * height + 0.1


def test_a_box_fits_what_is_seen_to_a_pixel(monkeypatch):
    """One plain object on a plain ground, without clutter, blur or noise: the box is that of the changed pixels."""
    for name in ["CLUTTER", "DISTRACTORS", "LIGHT", "BRIGHTNESS", "NOISE", "BLUR"]:
        monkeypatch.setattr(shapes, name, (0, 0))
    monkeypatch.setattr(shapes, "OBJECTS", (1, 1))
    monkeypatch.setattr(shapes, "CONTRAST", (1, 1))
    monkeypatch.setattr(shapes, "background", lambda rng, size: Image.new("RGB", (size, size), (90, 90, 90)))
    for seed in range(20):
        image, [found] = shapes.draw_image(np.random.default_rng(seed), 130)
        rows, columns = np.nonzero(np.any(np.asarray(image) != 90, axis=-1))
        x, y, width, height = found["bbox"]
        assert np.allclose((x, y), (columns.min(), rows.min()), atol=1)
        assert np.allclose((x + width, y + height), (columns.max() + 1, rows.max() + 1), atol=1)


def test_a_finished_folder_is_used_as_it_is(tmp_path):
    arguments = {"seed": 1, "train_images": 2, "val_images": 1, "size": 64}
    (tmp_path / "set").mkdir()  # an empty folder is filled
    folder = make_shapes(tmp_path / "set", **arguments)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    assert make_shapes(str(folder), **arguments) == folder
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def test_a_folder_that_holds_anything_else_is_refused_and_left_as_it_is(tmp_path, monkeypatch):
    arguments = {"train_images": 1, "val_images": 1, "size": 64}
    make_shapes(tmp_path / "set", **arguments)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("ten years of work")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="already holds .*'seed': 0.*remove it or choose another folder"):
        make_shapes(tmp_path / "set", seed=1, **arguments)
    with pytest.raises(ValueError, match="mine already holds other files"):
        make_shapes(tmp_path / "mine", **arguments)
    monkeypatch.setattr(shapes, "FORMAT", FORMAT + 1)
    with pytest.raises(ValueError, match="already holds"):
        make_shapes(tmp_path / "set", **arguments)
    assert contents(tmp_path) == before


def test_what_a_killed_run_left_does_no_harm(tmp_path):
    arguments = {"train_images": 2, "val_images": 2, "size": 64}
    killed = f"""
import os
from detection.shapes import make_shapes
os.rename = lambda source, target: os._exit(9)
make_shapes({str(tmp_path / "set")!r}, **{arguments})"""
    assert subprocess.run([sys.executable, "-c", killed]).returncode == 9
    [left] = tmp_path.iterdir()
    folder = make_shapes(tmp_path / "set", **arguments)
    assert sorted(tmp_path.iterdir()) == sorted([left, folder])
    assert len(os.listdir(folder / "train2017")) == 2


def test_a_run_that_another_overtakes_uses_its_set(tmp_path, monkeypatch):
    arguments = {"train_images": 2, "val_images": 1, "size": 64}
    rename, finished = os.rename, []

    def overtaken(source, target):
        monkeypatch.setattr(os, "rename", rename)
        make_shapes(target, **arguments)
        finished.append(contents(target))
        rename(source, target)

    monkeypatch.setattr(os, "rename", overtaken)
    folder = make_shapes(tmp_path / "set", **arguments)
    assert [contents(folder)] == finished
    assert list(tmp_path.iterdir()) == [folder]


def test_on_a_full_disk_the_error_names_the_folder_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "1.jpg")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(ValueError, match=r"/set: cannot be drawn \(No space left on device\); free space there or use"):
        make_shapes(tmp_path / "set", train_images=1, val_images=1, size=64)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name, value, least", [("size", 63, 64), ("train_images", 0, 1), ("val_images", -1, 1)])
def test_an_argument_that_is_too_small_is_an_error_that_says_what_is_accepted(tmp_path, name, value, least):
    with pytest.raises(ValueError, match=f"{name} is {value}; it must be at least {least}"):
        make_shapes(tmp_path / "set", **{name: value})
    assert not (tmp_path / "set").exists()

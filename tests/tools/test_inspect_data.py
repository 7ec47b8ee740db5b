import json
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
from commands import error_line

from detection.shapes import make_shapes
from resbackbone.tools import inspect_data

error_of = partial(error_line, inspect_data.main)


def spoil(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def spoiled(module_path):
    """Eight images to train on and three to validate on, each with a mistake of its own."""
    folder = make_shapes(module_path / "shapes", train_images=8, val_images=3, size=64)
    images = sorted((folder / "train2017").iterdir())
    shutil.copy(images[0], images[1])  # a duplicate
    shutil.copy(images[2], sorted((folder / "val2017").iterdir())[0])  # a leak
    images[3].write_bytes(b"")
    images[4].unlink()

    def change(content):
        ids = [image["id"] for image in content["images"]]
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != ids[5]]
        box = next(a for a in content["annotations"] if a["image_id"] == ids[6])
        content["annotations"] += [
            {**box, "id": 900, "bbox": [3, 4, 0, 5]},
            {**box, "id": 901, "bbox": [70, 4, 9, 5]},
            {**box, "id": 902},
        ]

    spoil(folder / "annotations" / "instances_train2017.json", change)
    return folder


def test_each_planted_mistake_is_counted_on_the_page_in_the_json_and_in_the_terminal(spoiled, capsys):
    inspect_data.main([str(spoiled), "--output", "about"])
    said = capsys.readouterr().out
    data = json.loads(Path("about/data.json").read_text())
    train = data["splits"]["train"]
    assert (train["images"], train["empty_images"], data["splits"]["val"]["images"]) == (8, 1, 3)
    assert data["copies"] == {"train": 1, "val": 0} and data["leaks"] == {"val in train": 1}
    assert data["equal_images"] == [
        {"train": ["000000000001.jpg", "000000000002.jpg"]},
        {"train": ["000000000003.jpg"], "val": ["000001000001.jpg"]},
    ]
    assert {kind: odd["boxes"] for kind, odd in train["odd_boxes"].items() if odd["boxes"]} == {
        "boxes of zero or negative size": 1,
        "boxes under a pixel or outside their image": 1,
        "boxes equal to another of their class": 1,
    }
    assert [message.rpartition(": ")[2] for message in train["unusable_images"]] == ["no such file", "empty file"]
    page = Path("about/data.html").read_text()
    for line in data["findings"]:
        assert line in said and line.replace("'", "&#39;") in page
    assert "train: 2 images cannot be used" in said and "val: 1 of 3 images is in train too" in said
    assert all(message in page for message in train["unusable_images"])
    assert page.count("data:image/jpeg;base64,") == 5 + 3  # one of the six images of train is empty
    classes = re.search(r'id="classes">(.*?)</section>', page, re.DOTALL)[1]
    listed = [
        re.findall(r'<td class="number"[^>]*>(\d+)</td>', row)
        for row in re.findall("<tr>(.*?)</tr>", classes, re.DOTALL)[1:]
    ]
    counts = [
        [str(c[what][split]) for split in ("train", "val") for what in ("boxes", "images")] for c in data["classes"]
    ]
    assert listed == counts and len(counts) == 10


def test_quiet_leaves_out_what_is_not_to_be_looked_at(spoiled, capsys):
    inspect_data.main([str(spoiled), "--quiet"])
    lines = capsys.readouterr().out.splitlines()
    data = json.loads(Path("runs/data-shapes/data.json").read_text())
    assert lines == [*data["findings"], "written: runs/data-shapes/data.html, runs/data-shapes/data.json"]


def test_a_folder_without_a_data_set_is_one_line(tmp_path):
    assert "no such folder" in error_of(["nowhere"])
    assert "no known data layout" in error_of([tmp_path / "here"])
    assert not Path("runs").exists()


def test_a_test_split_is_compared_with_the_others():
    folder = make_shapes("shapes", train_images=2, val_images=2, size=64)
    shutil.copytree(folder / "val2017", folder / "test2017")
    shutil.copy(*(folder / "annotations" / f"instances_{split}2017.json" for split in ("val", "test")))
    inspect_data.main(["shapes", "--quiet"])
    data = json.loads(Path("runs/data-shapes/data.json").read_text())
    assert list(data["splits"]) == ["train", "val", "test"] and data["splits"]["test"]["images"] == 2
    assert data["leaks"] == {"val in train": 0, "test in train": 0, "test in val": 2}

from itertools import islice
from pathlib import Path

import pytest
import torch

from detection import data as data_module
from detection.coco import BadImage
from detection.data import embedded_data, find_coco, open_split, pack, train_batches, unpack
from detection.sampler import TrainBatches
from detection.shapes import CLASSES, make_shapes
from detection.transforms import TrainTransform


@pytest.fixture(autouse=True)
def empty_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    monkeypatch.delenv("COCO_DIR", raising=False)


def test_coco_is_looked_for_in_the_usual_places_in_their_order(tmp_path, monkeypatch):
    monkeypatch.setenv("COCO_DIR", "")  # as if unset
    assert find_coco() is None
    Path("datasets/coco").mkdir(parents=True)
    assert find_coco() == Path("datasets/coco")
    monkeypatch.setenv("COCO_DIR", str(tmp_path / "mine"))
    (tmp_path / "mine").mkdir()
    assert find_coco() == tmp_path / "mine"
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "sets"))
    with pytest.raises(ValueError, match="DETECTRON2_DATASETS is .*, but there is no folder"):
        find_coco()
    (tmp_path / "sets" / "coco").mkdir(parents=True)
    assert find_coco() == tmp_path / "sets" / "coco"


@pytest.mark.parametrize("variable, looked_for", [("DETECTRON2_DATASETS", "ds/coco"), ("COCO_DIR", "ds")])
def test_a_variable_that_leads_nowhere_is_an_error_that_names_it(tmp_path, monkeypatch, variable, looked_for):
    Path("datasets/coco").mkdir(parents=True)
    monkeypatch.setenv(variable, "ds")
    with pytest.raises(ValueError) as error:
        find_coco()
    says = f"${variable} is 'ds', but there is no folder {tmp_path / looked_for}; correct or unset the variable"
    assert str(error.value) == f"{says}, or give --data"


def test_the_embedded_data_is_drawn_once_and_opens_as_coco(monkeypatch):
    monkeypatch.setattr(data_module, "EMBEDDED_SET", {"train_images": 3, "val_images": 2, "size": 64})
    folder = embedded_data()
    assert folder == Path("datasets/shapes")
    drawn = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert embedded_data() == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == drawn
    train, val = open_split(folder, "train"), open_split(folder, "val")
    assert (len(train), len(val), list(train.categories.values())) == (3, 2, list(CLASSES))


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_endless_floats_of_the_images_with_their_boxes(workers):
    make_shapes("shapes", train_images=3, val_images=1, size=64)
    dataset = open_split(Path("shapes"), "train", transform=TrainTransform((40,), 99))
    batches = TrainBatches(dataset, batch_size=2, seed=0)
    drawn = list(islice(batches, 4))
    loaded = islice(train_batches(dataset, batches, workers=workers, device=torch.device("cpu")), 4)
    for draws, (images, targets) in zip(drawn, loaded, strict=True):
        for draw, image, target in zip(draws, images, targets, strict=True):
            assert image.shape == (3, 40, 40) and image.dtype == torch.float32
            assert image.min() >= 0 and 0.2 < image.max() <= 1
            again, same = dataset[draw]
            assert torch.equal(image, again.float() / 255) and torch.equal(target["boxes"], same["boxes"])
            assert target["image_id"] == same["image_id"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_stops_the_batches_with_its_message_or_is_skipped(workers):
    make_shapes("shapes", train_images=3, val_images=1, size=64)
    Path("shapes/train2017/000000000002.jpg").write_bytes(b"")
    for skip in (False, True):
        dataset = open_split(Path("shapes"), "train", skip_bad_images=skip)
        batches = TrainBatches(dataset, batch_size=3, seed=0)
        loader = train_batches(dataset, batches, workers=workers, device=torch.device("cpu"))
        if not skip:
            with pytest.raises(BadImage, match="000000000002.jpg: empty file"):
                next(loader)
        else:
            images, targets = next(loader)
            assert len(images) == 3 and {target["image_id"] for target in targets} == {1, 3}
            assert sum(len(target["skipped"]) for target in targets) == 1


def test_a_batch_comes_out_of_its_pack_as_it_went_in():
    samples = []
    for boxes in ([(0.1, 2.25, 50, 1e-7 + 60)], [], [(1, 2, 3, 4), (5, 6, 7e5, 8)]):
        image = torch.randint(0, 256, (3, 5 + len(boxes), 7), dtype=torch.uint8)
        labels = torch.arange(len(boxes)) + 80
        target = {"boxes": torch.tensor(boxes).reshape(-1, 4), "labels": labels, "image_id": 2**40, "skipped": ["a"]}
        samples.append((image, target))
    images, targets = unpack(pack(samples), torch.device("cpu"))
    for image, found, (pixels, target) in zip(images, targets, samples, strict=True):
        assert torch.equal(image, pixels / 255)
        assert torch.equal(found["boxes"], target["boxes"]) and found["boxes"].dtype == torch.float32
        assert torch.equal(found["labels"], target["labels"]) and found["labels"].dtype == torch.int64
        assert (found["image_id"], found["skipped"]) == (2**40, ["a"])

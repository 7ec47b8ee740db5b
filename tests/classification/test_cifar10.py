import hashlib
import itertools
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

from resbackbone.classification import cifar10
from resbackbone.classification.cifar10 import (
    Split,
    crop,
    draw_crops,
    mean_image_of,
    open_cifar10,
    to_model_input,
    train_batches,
)

PIXELS = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Six training and three test images of two classes, as PNG."""
    number = 0
    for split, counts in (("train", (4, 2)), ("test", (1, 2))):
        for name, count in zip(("cat", "dog"), counts, strict=True):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(PIXELS[number]).save(tmp_path / "data" / split / name / f"{i}.png")
                number += 1
    return tmp_path / "data"


@pytest.fixture
def batches(tmp_path, monkeypatch):
    """CIFAR-10's own layout with two images a file, and torchvision told their checksums."""
    base = tmp_path / "own" / CIFAR10.base_folder
    base.mkdir(parents=True)

    def write(name, content):
        data = pickle.dumps(content)
        (base / name).write_bytes(data)
        return hashlib.md5(data).hexdigest()

    rows = PIXELS.transpose(0, 3, 1, 2).reshape(9, -1)
    train = [(f"data_batch_{i + 1}", {"data": rows[2 * i : 2 * i + 2], "labels": [i, 9 - i]}) for i in range(4)]
    classes = [f"class-{i}" for i in range(10)]
    monkeypatch.setattr(CIFAR10, "train_list", [(name, write(name, content)) for name, content in train])
    monkeypatch.setattr(CIFAR10, "test_list", [("test_batch", write("test_batch", {"data": rows[8:], "labels": [5]}))])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": write("batches.meta", {"label_names": classes})}
    monkeypatch.setattr(CIFAR10, "meta", meta)
    return tmp_path / "own"


def as_tensor(pixels):
    return torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())


@pytest.mark.parametrize("name", ["test", "val"])
def test_class_folders_become_tensors_in_the_order_of_their_names(folder, name):
    (folder / "test").rename(folder / name)
    data = open_cifar10(folder)
    assert data.classes == ["cat", "dog"]
    assert torch.equal(data.train.images, as_tensor(PIXELS[:6])) and data.train.labels.tolist() == [0, 0, 0, 0, 1, 1]
    assert torch.equal(data.test.images, as_tensor(PIXELS[6:])) and data.test.labels.tolist() == [0, 1, 1]


@pytest.mark.parametrize("below", ["", CIFAR10.base_folder])
def test_cifars_own_batches_become_tensors(batches, below):
    data = open_cifar10(batches / below)
    assert torch.equal(data.train.images, as_tensor(PIXELS[:8]))
    assert data.train.labels.tolist() == [0, 9, 1, 8, 2, 7, 3, 6]
    assert torch.equal(data.test.images, as_tensor(PIXELS[8:])) and data.test.labels.tolist() == [5]
    assert data.classes == [f"class-{i}" for i in range(10)]


def test_damaged_batches_are_refused(batches):
    file = batches / CIFAR10.base_folder / "data_batch_2"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="cifar-10-batches-py is incomplete or not the original"):
        open_cifar10(batches)


def test_a_grey_image_is_read_as_rgb(folder):
    Image.fromarray(PIXELS[0][..., 0]).save(folder / "train" / "cat" / "0.png")
    assert torch.equal(open_cifar10(folder).train.images[0], torch.from_numpy(PIXELS[0][..., 0]).expand(3, 32, 32))


@pytest.mark.parametrize(
    "harm, says",
    [
        (lambda f: os.truncate(f / "train/dog/1.png", 50), "train/dog/1.png: cannot be decoded"),
        (lambda f: (f / "test/cat/0.png").write_text("<html>"), "test/cat/0.png: not an image"),
        (lambda f: Image.new("RGB", (33, 31)).save(f / "train/cat/2.png"), "2.png: 33 x 31 pixels; must be 32 x 32"),
        (lambda f: (f / "test/cat/0.png").unlink(), "test: class folders without images: cat"),
        (lambda f: (f / "test/cat").rename(f / "test/kitten"), "train and test hold different class folders: cat, kit"),
        (lambda f: (f / "test").rename(f / "tset"), "no folder val or test in it; it should hold cifar-10-batches-py/"),
    ],
)
def test_bad_data_is_one_sentence_that_names_it(folder, harm, says):
    harm(folder)
    with pytest.raises(ValueError) as error:
        open_cifar10(folder)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_file_and_a_missing_folder_are_answered_with_what_to_give(tmp_path):
    (tmp_path / "cifar.tar.xz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"cifar.tar.xz: a file, not a folder; it should hold cifar-10-batches-py/"):
        open_cifar10(tmp_path / "cifar.tar.xz")
    with pytest.raises(ValueError, match="nowhere: no such folder; it should hold cifar-10-batches-py/"):
        open_cifar10("nowhere")


def test_synthetic_images_are_the_same_each_time_and_of_ten_classes():
    one, two = open_cifar10("synthetic"), open_cifar10("synthetic")
    assert torch.equal(one.train.images, two.train.images) and one.fingerprint() == two.fingerprint()
    assert one.train.images.dtype == torch.uint8 and one.train.images.shape[1:] == (3, 32, 32)
    assert one.test.labels.bincount().tolist() == [50] * 10
    means = torch.stack([one.train.images[one.train.labels == i].float().mean(0) for i in range(10)])
    nearest = torch.cdist(one.test.images.float().flatten(1), means.flatten(1)).argmin(1)
    assert (nearest == one.test.labels).float().mean() > 0.9  # there is something to learn


def test_a_tenth_of_the_training_images_is_held_out_and_trains_no_more():
    data = cifar10.Cifar10(Split(torch.arange(40).view(40, 1), torch.arange(40) % 4), Split(*torch.zeros(2, 3)), [])
    kept = data.held_out()
    assert len(kept.test.images) == 4 and len(kept.train.images) == 36
    assert sorted(torch.cat((kept.train.images, kept.test.images)).flatten().tolist()) == list(range(40))
    assert torch.equal(kept.test.labels, kept.test.images.flatten() % 4)
    assert torch.equal(data.held_out().test.images, kept.test.images)


def test_the_fingerprint_follows_the_training_images(folder):
    before = open_cifar10(folder).fingerprint()
    Image.fromarray(PIXELS[8]).save(folder / "train/cat/3.png")
    assert open_cifar10(folder).fingerprint() != before


def test_the_networks_input_is_0_to_1_less_the_mean_of_each_pixel():
    split = Split(as_tensor(PIXELS), torch.zeros(9))
    mean = mean_image_of(split)
    torch.testing.assert_close(mean, torch.from_numpy(PIXELS.mean(0).transpose(2, 0, 1) / 255).float())
    torch.testing.assert_close(to_model_input(split.images, mean).mean(0), torch.zeros(3, 32, 32), atol=1e-6, rtol=0)


def test_every_augmented_image_is_a_padded_crop_flipped_or_not():
    images = torch.randn(200, 3, 6, 5)
    found = crop(images, *draw_crops(len(images), torch.Generator().manual_seed(0)))
    assert found.shape == images.shape and found.is_contiguous(memory_format=torch.channels_last)
    seen = set()
    for image, cropped in zip(images, found, strict=True):
        padded = torch.nn.functional.pad(image, (4, 4, 4, 4))
        places = set()
        for top, left, flipped in itertools.product(range(9), range(9), (False, True)):
            there = padded[:, top : top + 6, left : left + 5]
            if torch.equal(cropped, there.flip(2) if flipped else there):
                places.add((top, left, flipped))
        assert len(places) >= 1
        seen |= places if len(places) == 1 else set()
    assert {top for top, _, _ in seen} == {left for _, left, _ in seen} == set(range(9))
    assert {flipped for _, _, flipped in seen} == {False, True}


@pytest.fixture
def numbered(monkeypatch):
    """Eleven training images that are told apart by their values, and are not augmented."""
    monkeypatch.setattr(cifar10, "crop", lambda images, *crops: images)
    return Split(torch.arange(11, dtype=torch.uint8).view(11, 1, 1, 1).expand(11, 3, 32, 32), torch.arange(11))


def labels_of(split, count, **arguments):
    arguments = {"batch_size": 4, "seed": 3, **arguments}
    batches = train_batches(split, torch.zeros(3, 32, 32), **arguments)
    found = []
    for _, (images, labels) in zip(range(count), batches, strict=False):
        assert torch.equal((images[:, 0, 0, 0] * 255).round().long(), labels)
        found.append(labels.tolist())
    return found


def test_every_image_is_drawn_once_an_epoch_and_none_is_lost_between_epochs(numbered):
    stream = sum(labels_of(numbered, 11), [])
    epochs = [stream[i : i + 11] for i in range(0, 44, 11)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_start_later_gives_the_batches_that_would_have_come(numbered):
    assert labels_of(numbered, 5, start=4) == labels_of(numbered, 9)[4:]
    assert labels_of(numbered, 5, seed=4) != labels_of(numbered, 5)


def test_ranks_share_a_batch_out_among_them(numbered):
    parts = [labels_of(numbered, 6, batch_size=2, rank=rank, ranks=2) for rank in (0, 1)]
    for whole, even, odd in zip(labels_of(numbered, 6), *parts, strict=True):
        assert whole[0::2] == even and whole[1::2] == odd


def test_augmentation_follows_from_seed_step_and_rank(numbered, monkeypatch):
    seeds = []

    def draw(count, random):
        seeds.append(random.initial_seed())
        return draw_crops(count, random)

    monkeypatch.setattr(cifar10, "draw_crops", draw)
    for seed, start, rank in [(3, 1, 0), (3, 1, 0), (4, 1, 0), (3, 2, 0), (3, 1, 1)]:
        labels_of(numbered, 1, seed=seed, start=start, rank=rank, ranks=2)
    assert seeds[0] == seeds[1] and len(set(seeds)) == 4

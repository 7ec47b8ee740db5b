"""Folders of labelled images: what is found wrong before training, and batches that any run would see again."""

from itertools import islice

import numpy as np
import pytest
import torch
from pictures import encoded
from PIL import Image
from torchvision.datasets import ImageFolder

from resbackbone.classification.data import open_images, train_batches
from resbackbone.classification.images import shuffled
from resbackbone.classification.transforms import TrainAugment
from resbackbone.image_io import BadImage

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path):
    """Five classes, 23 training images and 5 to test on, of odd sizes."""
    for i in range(23 + 5):
        split, name = ("train", f"c{i % 5}") if i < 23 else ("val", f"c{i - 23}")
        path = tmp_path / split / name / f"{i:02d}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(17 + i, 40 - i, seed=i))
    return tmp_path


def batches(folder, count, **options):
    options = {"batch_size": 4, "transform": TrainAugment(15), "seed": 3, "device": CPU, **options}
    images = options.pop("images", None) or open_images(folder, "train")
    return list(islice(train_batches(images, **options), count))


def same(these, those):
    return [torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(these, those, strict=True)]


def test_a_folder_holds_the_images_labels_and_classes_that_torchvision_finds_in_it(folder):
    images, theirs = open_images(folder, "train"), ImageFolder(str(folder / "train"))
    assert images.classes == theirs.classes and len(images) == len(theirs) == 23
    assert images.labels.tolist() == theirs.targets
    for i in (0, 7, 22):
        assert images.name(i) == theirs.samples[i][0]
        assert np.array_equal(images.read(i), theirs[i][0])


def test_every_image_is_in_an_epoch_once_whatever_the_number_of_processes():
    alone = list(islice(shuffled(23, seed=1, rank=0, ranks=1, start=0), 3 * 23))
    epochs = [[index for index, _ in alone[i : i + 23]] for i in (0, 23, 46)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs) and epochs[0] != epochs[1]
    assert len({seed for _, seed in alone}) == 3 * 23
    for ranks in (2, 3, 5):
        shares = [shuffled(23, seed=1, rank=r, ranks=ranks, start=0) for r in range(ranks)]
        together = [next(shares[i % ranks]) for i in range(3 * 23)]
        assert together == alone


def test_the_batches_of_two_processes_are_those_of_one_shared_out(folder):
    whole = batches(folder, 9, batch_size=6)
    for rank in range(2):
        shares = batches(folder, 9, batch_size=3, rank=rank, ranks=2)
        assert all(same([(x[rank::2], y[rank::2]) for x, y in whole], shares))


@pytest.mark.parametrize("start", [1, 5, 6, 17])  # an epoch is 5.75 batches
def test_batches_from_a_later_start_are_those_of_a_run_that_came_there(folder, start):
    assert all(same(batches(folder, start + 3)[start:], batches(folder, 3, start=start)))


def test_batches_are_the_same_from_any_number_of_workers_and_leave_the_global_generators_alone(folder):
    transform = TrainAugment(15, auto_augment="rand-m7-mstd0.5-inc1", erase=0.5)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    here = batches(folder, 7, transform=transform)
    assert torch.equal(before, torch.get_rng_state())
    assert all(same(here, batches(folder, 7, transform=transform, workers=2)))
    assert not any(same(here, batches(folder, 7, transform=transform, seed=4)))


def test_a_batch_is_uint8_in_channels_last_with_the_labels_of_its_images(folder):
    for i in range(23):  # a grey that tells the class
        path = folder / "train" / f"c{i % 5}" / f"{i:02d}.JPEG"
        Image.new("RGB", (20 + i, 30), (50 * (i % 5),) * 3).save(path)
    for pixels, labels in batches(folder, 6):
        assert pixels.shape == (4, 3, 15, 15) and pixels.dtype == torch.uint8 and labels.dtype == torch.int64
        assert pixels.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal((pixels.float().mean((1, 2, 3)) / 50).round().long(), labels)


def test_repeated_augmentation_gives_each_of_fewer_images_several_times_to_different_ranks():
    shares = [list(islice(shuffled(23, seed=0, rank=r, ranks=3, start=0, repeats=3), 7)) for r in range(3)]
    for one, two, three in zip(*shares, strict=True):
        assert one[0] == two[0] == three[0]
        assert len({one[1], two[1], three[1]}) == 3
    assert len({index for index, _ in shares[0]}) == 7


@pytest.mark.parametrize(
    "damage, says",
    [
        (lambda f: (f / "val" / "c9").mkdir(), "train and val hold different class folders: c9"),
        (lambda f: [p.unlink() for p in (f / "train" / "c1").iterdir()], "class folders without images: c1;"),
        (lambda f: (f / "train" / "c1" / "list.txt").write_text("x"), "files that are not images: c1/list.txt;"),
        (lambda f: (f / "train").rename(f / "training"), "no folder train in it; it should hold train/<class>/"),
    ],
)
def test_what_is_wrong_with_a_folder_is_one_line_before_training_starts(folder, damage, says):
    damage(folder)
    with pytest.raises(ValueError, match=says) as error:
        open_images(folder, "train")
    assert "\n" not in str(error.value)


def test_a_folder_may_have_the_name_of_a_shard_and_its_val_folder_that_of_a_test(folder):
    (folder / "val").rename(folder / "test")
    assert len(open_images(folder.rename(folder.with_name("imagenet.tar.unpacked")), "val")) == 5


def test_a_folder_that_is_not_there_is_named(tmp_path):
    (tmp_path / "list.txt").write_text("x")
    with pytest.raises(ValueError, match="list.txt: a file, not a folder; it should hold train/<class>/"):
        open_images(tmp_path / "list.txt", "train")
    with pytest.raises(ValueError, match="nowhere: no such folder; it should hold train/<class>/"):
        open_images(tmp_path / "nowhere", "train")
    with pytest.raises(ValueError, match="unknown split 'test'; choose from train, val"):
        open_images(tmp_path, "test")


def test_hidden_files_are_no_images_and_do_not_matter(folder):
    (folder / "train" / ".cache").mkdir()
    (folder / "train" / "c1" / ".DS_Store").write_bytes(b"x")
    assert len(open_images(folder, "train")) == 23


def test_files_that_are_no_images_are_left_out_if_that_is_asked_for(folder):
    (folder / "train" / "c3" / "notes.txt").write_text("x")
    assert len(open_images(folder, "train", skip_bad_images=True)) == 23


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named_or_replaced_by_one_of_its_batch(folder, workers):
    (folder / "train" / "c2" / "02.JPEG").write_bytes(b"")
    (folder / "train" / "c3" / "03.JPEG").unlink()
    (folder / "train" / "c3" / "03.JPEG").symlink_to("moved away")
    images = open_images(folder, "train")
    with pytest.raises(BadImage, match=r"^image [^ ]*/0[23].JPEG: (empty file|no such file)$"):
        batches(folder, 6, images=images, workers=workers)
    images.skip_bad_images = True
    for pixels, labels in batches(folder, 6, images=images, workers=workers):
        copies = [(a, b) for a in range(4) for b in range(a) if torch.equal(pixels[a], pixels[b])]
        assert all(labels[a] == labels[b] for a, b in copies)
    said = sorted(message[-30:] for message in images.skipped)
    assert len(said) == 2 and "02.JPEG: empty file" in said[0] + said[1]


def test_a_batch_of_broken_images_alone_is_an_error(folder):
    images = open_images(folder, "train", skip_bad_images=True)
    for path in (folder / "train").rglob("*.JPEG"):
        path.write_bytes(b"")
    with pytest.raises(BadImage, match="none of the 4 images of a batch can be read; the first: image "):
        batches(folder, 1, images=images)


def test_the_fingerprint_is_that_of_the_images_and_labels(folder):
    first = open_images(folder, "train").fingerprint
    assert first == open_images(folder, "train").fingerprint
    (folder / "train" / "c2" / "02.JPEG").rename(folder / "train" / "c3" / "02.JPEG")
    assert first != open_images(folder, "train").fingerprint


def test_synthetic_images_are_imagenet_in_number_and_cost_nothing():
    images = open_images("synthetic", "train")
    assert (len(images), len(images.classes)) == (1_281_167, 1000) and "synthetic" in images.summary()
    (a, labels), (b, _) = batches(None, 2, images=images)
    assert a is b and a.shape == (4, 3, 15, 15) and a.dtype == torch.uint8 and labels.dtype == torch.int64

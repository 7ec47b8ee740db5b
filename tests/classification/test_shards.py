"""Shards: what is in them is what went in, read at random, and every image once an epoch."""

import importlib.util
import io
import json
import tarfile
from itertools import islice

import pytest
import torch
from PIL import Image

from resbackbone.classification.data import open_images, train_batches
from resbackbone.classification.images import shuffled
from resbackbone.classification.shards import ShardImages, expand, index_name, index_shards, write_shard
from resbackbone.classification.transforms import TrainAugment

CPU = torch.device("cpu")
COUNTS = (7, 5, 9, 2)


def jpeg(i):
    """A picture of one colour, of which i can be read."""
    file = io.BytesIO()
    Image.new("RGB", (20 + i % 3, 19), (8 * i, 0, 0)).save(file, "JPEG", quality=100)
    return file.getvalue()


@pytest.fixture
def pattern(tmp_path):
    """Four shards of 23 images in all, of 5 classes, and one to test on, with their indices."""
    at = 0
    for shard, count in enumerate(COUNTS):
        path = tmp_path / f"train-{shard:03d}.tar"
        path.write_bytes(write_shard([(jpeg(i), i % 5) for i in range(at, at + count)]))
        at += count
    (tmp_path / "val-000.tar").write_bytes(write_shard([(jpeg(i), i) for i in range(5)]))
    for split in ("train", "val"):
        index = index_shards(sorted(tmp_path.glob(f"{split}-*.tar")))
        (tmp_path / f"{split}.json").write_text(json.dumps({**index, "classes": list("abcde")}))
    return f"{tmp_path}/train-{{000..003}}.tar"


def batches(images, count, **options):
    options = {"batch_size": 4, "transform": TrainAugment(15), "seed": 3, "device": CPU, **options}
    return list(islice(train_batches(images, **options), count))


def test_what_is_read_from_a_shard_is_what_was_written(pattern):
    images = open_images(pattern, "train")
    assert type(images) is ShardImages and images.classes == list("abcde")
    assert images.labels.tolist() == [i % 5 for i in range(23)]
    assert [images.file(i) for i in range(23)] == [jpeg(i) for i in range(23)]
    assert images.read(22).size == (21, 19) and "23 images of 5 classes in 4 shards" in images.summary()
    assert images.name(12) == f"0 of {pattern.replace('{000..003}', '002')}"


def test_the_shards_for_val_are_found_by_their_name(pattern):
    images = open_images(pattern, "val")
    assert images.labels.tolist() == [0, 1, 2, 3, 4] and images.classes == list("abcde")
    with pytest.raises(ValueError, match="names of shards should contain 'train'"):
        open_images("shards/all-{0..3}.tar", "val")


def test_an_index_may_name_more_shards_than_are_wanted(pattern):
    some = open_images(pattern.replace("{000..003}", "{001..002}"), "train")
    assert [some.file(i) for i in range(len(some))] == [jpeg(i) for i in range(7, 21)]
    assert open_images(pattern, "train").fingerprint != some.fingerprint


def test_training_from_shards_sees_each_image_once_an_epoch_and_goes_on_where_it_stopped(pattern):
    images = open_images(pattern, "train")
    assert sorted(index for index, _ in islice(shuffled(23, seed=0, rank=0, ranks=1, start=0), 23)) == list(range(23))
    run, resumed = batches(images, 9), batches(images, 4, start=5, workers=2)
    for these, those in zip(run[5:], resumed, strict=True):
        assert torch.equal(these[0], those[0]) and torch.equal(these[1], those[1])


def add(path, name, content=b"1"):
    with tarfile.open(path, "a") as tar:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


def test_a_shard_made_elsewhere_may_hold_other_things_beside_image_and_label(pattern, tmp_path):
    path = tmp_path / "train-001.tar"
    for name, content in (("n01/x.json", b"{}"), ("n01/x.JPEG", jpeg(30)), ("n01/x.cls", b" 3\n"), ("._y.jpg", b"")):
        add(path, name, content)
    (tmp_path / "train.json").write_text(json.dumps(index_shards(sorted(tmp_path.glob("train-*.tar")))))
    images = open_images(pattern, "train")
    assert len(images) == 24 and images.file(12) == jpeg(30) and images.labels[12] == 3
    assert images.classes == list("01234")


@pytest.mark.parametrize(
    "damage, says",
    [
        (lambda f: add(f, "n01/x.jpg"), "train-001.tar: n01/x has no label; n01/x.cls should"),
        (lambda f: (add(f, "x.jpg"), add(f, "x.cls", b"cat")), "x has no label"),
        (lambda f: add(f, "x.cls"), "train-001.tar: x has no image; there should be"),
        (lambda f: (add(f, "x.jpg"), add(f, "x.cls", b"1"), add(f, "x.png")), "train-001.tar: x has two images"),
        (lambda f: f.write_bytes(f.read_bytes()[:900]), "not a whole tar"),
        (lambda f: f.write_bytes(write_shard([])), "train-001.tar: no image in it and 0 more shards"),
    ],
)
def test_what_is_wrong_with_a_shard_is_one_line_when_it_is_indexed(pattern, tmp_path, damage, says):
    damage(tmp_path / "train-001.tar")
    with pytest.raises(ValueError, match=says) as error:
        index_shards([tmp_path / "train-001.tar"])
    assert "\n" not in str(error.value)


def replaced(old, new):
    return lambda f: (f / "train.json").write_text((f / "train.json").read_text().replace(old, new, 1))


@pytest.mark.parametrize(
    "damage, says",
    [
        (lambda f: add(f / "train-001.tar", "x", bytes(9999)), r"001.tar: has 30,720 bytes, the index says 20,480"),
        (lambda f: (f / "train-002.tar").unlink(), "train-002.tar: no such file, but the index lists it"),
        (lambda f: (f / "train.json").unlink(), r"train.json: No such file or directory; tools/make_shards.py --index"),
        (lambda f: (f / "train.json").write_text("{"), "train.json: not an index, JSONDecodeError"),
        (lambda f: (f / "train.json").write_text("[]"), "train.json: not an index, TypeError"),
        (replaced("offsets", "places"), "train.json: not an index, KeyError: 'offsets'"),
        (replaced(', "d", "e"', ""), "labels up to 4 of 3 classes"),
    ],
)
def test_shards_that_are_not_those_of_their_index_are_one_line(pattern, tmp_path, damage, says):
    (tmp_path / "train-001.tar").write_bytes(write_shard([(b"abc", 1)] * 5))
    index = index_shards(sorted(tmp_path.glob("train-*.tar")))
    (tmp_path / "train.json").write_text(json.dumps({**index, "classes": list("abcde")}))
    open_images(pattern, "train")
    damage(tmp_path)
    with pytest.raises(ValueError, match=says):
        open_images(pattern, "train")


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda p: p.replace("{000..003}", "{003..000}"), "names no shard, because its numbers go down"),
        (lambda p: p.replace("003", "005"), "train-004.tar is not in the index train.json, which has 4 shards"),
        (lambda p: p + ".gz", "tar.gz: shards must be plain tar files, not compressed"),
    ],
)
def test_a_pattern_that_names_no_shards_is_one_line(pattern, change, says):
    with pytest.raises(ValueError, match=says):
        open_images(change(pattern), "train")


def test_patterns_stand_for_names_and_indices():
    assert expand("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand("a-7.tar") == ["a-7.tar"]
    assert {index_name(name) for name in ("train-{00..11}.tar", "train_007.tar", "train.tar")} == {"train.json"}


@pytest.mark.skipif(importlib.util.find_spec("webdataset") is None, reason="needs webdataset")
def test_webdataset_reads_what_is_written_here(pattern):
    import webdataset

    samples = list(webdataset.WebDataset(pattern, shardshuffle=False).decode("rgb8").to_tuple("jpg", "cls"))
    assert [label for _, label in samples] == [i % 5 for i in range(23)]
    assert samples[3][0].shape == (19, 20, 3)

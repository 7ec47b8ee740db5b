"""Shards: what is in them is what went in, read at random or streamed, and every image once an epoch."""

import importlib.util
import io
import json
import tarfile
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from resbackbone.classification.data import open_images, train_batches
from resbackbone.classification.shards import (
    ShardImages,
    StreamedImages,
    beside,
    expand,
    index_name,
    index_shards,
    open_shards,
    write_shard,
)
from resbackbone.classification.transforms import TrainAugment

CPU = torch.device("cpu")
COUNTS = (7, 5, 9, 2)
needs_webdataset = pytest.mark.skipif(importlib.util.find_spec("webdataset") is None, reason="needs webdataset")


def jpeg(i):
    """A picture of one colour, of which i can be read."""
    file = io.BytesIO()
    Image.new("RGB", (20 + i % 3, 19), (8 * i, 0, 0)).save(file, "JPEG", quality=100)
    return file.getvalue()


@pytest.fixture
def pattern(tmp_path):
    """Four shards of 23 images in all, of 5 classes, and one to test on; without an index."""
    at = 0
    for shard, count in enumerate(COUNTS):
        path = tmp_path / f"train-{shard:03d}.tar"
        path.write_bytes(write_shard([(jpeg(i), i % 5) for i in range(at, at + count)]))
        at += count
    (tmp_path / "val-000.tar").write_bytes(write_shard([(jpeg(i), i) for i in range(5)]))
    return f"{tmp_path}/train-{{000..003}}.tar"


@pytest.fixture
def indexed(pattern, tmp_path):
    """The same with indices."""
    for split in ("train", "val"):
        index = index_shards(sorted(tmp_path.glob(f"{split}-*.tar")))
        index["classes"] = list("abcde")
        (tmp_path / f"{split}.json").write_text(json.dumps(index))
    return pattern


def batches(images, count, **options):
    options = {"batch_size": 4, "transform": TrainAugment(15), "seed": 3, "device": CPU, **options}
    return list(islice(train_batches(images, **options), count))


def same(these, those):
    return [torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(these, those, strict=True)]


def drawn(images, count, **options):
    options = {"seed": 0, "rank": 0, "ranks": 1, "start": 0, "repeats": 1, **options}
    return list(islice(images.draws(**options), count))


def test_what_is_read_from_a_shard_is_what_was_written(pattern):
    images = open_images(pattern, "train")
    assert type(images) is ShardImages and images.classes == ["0", "1", "2", "3", "4"]
    assert images.labels.tolist() == [i % 5 for i in range(23)]
    assert [images.file(i) for i in range(23)] == [jpeg(i) for i in range(23)]
    assert images.read(22).size == (21, 19) and "23 images of 5 classes in 4 shards" in images.summary()
    assert images.name(12) == f"0 of {pattern.replace('{000..003}', '002')}"


def test_the_shards_for_val_are_found_by_their_name(pattern, indexed):
    assert open_images(pattern, "val").labels.tolist() == [0, 1, 2, 3, 4]
    assert open_images(indexed, "val").classes == list("abcde")
    with pytest.raises(ValueError, match="names of shards should contain 'train'"):
        open_images("shards/all-{0..3}.tar", "val")


def test_an_index_says_the_same_as_the_shards_and_may_name_more_of_them(indexed, tmp_path):
    whole = open_images(indexed, "train")
    assert [whole.file(i) for i in range(23)] == [jpeg(i) for i in range(23)] and whole.classes == list("abcde")
    some = open_images(indexed.replace("{000..003}", "{001..002}"), "train")
    assert [some.file(i) for i in range(len(some))] == [jpeg(i) for i in range(7, 21)]
    assert whole.fingerprint != some.fingerprint


def test_training_from_shards_sees_each_image_once_an_epoch_and_goes_on_where_it_stopped(indexed):
    images = open_images(indexed, "train")
    assert sorted(d.index for d in drawn(images, 23)) == list(range(23))
    run = batches(images, 9)
    assert all(same(run[5:], batches(images, 4, start=5, workers=2)))


@needs_webdataset
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_stream_gives_every_image_once_an_epoch_over_all_processes(indexed, ranks, monkeypatch):
    monkeypatch.setattr("resbackbone.classification.shards.WINDOW", 6)
    images = open_images(f"pipe:cat {indexed}", "train")
    assert type(images) is StreamedImages
    for epoch in range(2):
        seen = Counter()
        for rank in range(ranks):
            counts = [share_of(images, 0, e, rank, ranks) for e in range(epoch + 1)]
            draws = drawn(images, counts[-1], rank=rank, ranks=ranks, start=sum(counts[:-1]))
            assert all(d.file == jpeg(d.index) for d in draws)
            seen.update(d.index for d in draws)
        assert seen == Counter(range(23))


def share_of(images, seed, epoch, rank, ranks):
    order = np.random.default_rng((seed, epoch)).permutation(len(COUNTS))[rank::ranks]
    return sum(COUNTS[shard] for shard in order)


@needs_webdataset
@pytest.mark.parametrize("start", [1, 9, 22, 23, 60])
def test_a_stream_mixes_what_comes_and_goes_on_where_it_stopped(indexed, start, monkeypatch):
    monkeypatch.setattr("resbackbone.classification.shards.WINDOW", 6)
    images = open_images(f"pipe:cat {indexed}", "train")
    run = drawn(images, start + 30)
    assert drawn(images, 30, start=start) == run[start:]
    assert len({d.seed for d in run}) == len(run)
    order = [d.index for d in run[:23]]
    assert order != [d.index for d in run[23:46]]
    within = [i for i in order if 12 <= i < 21]  # of one shard
    assert len(within) == 9 and within != sorted(within)


@needs_webdataset
def test_a_stream_gives_the_same_batches_to_any_number_of_workers(indexed):
    images = open_images(f"pipe:cat {indexed}", "train")
    run = batches(images, 8)
    assert all(same(run[3:], batches(images, 5, start=3, workers=2)))
    values = torch.cat([pixels[:, 0, 7, 7] for pixels, _ in run])[:23]
    assert torch.equal((values.double() / 8).round().sort().values, torch.arange(23.0).double())


@needs_webdataset
def test_streamed_images_can_be_evaluated_in_any_order(indexed):
    images = open_images(f"pipe:cat {indexed}", "train")
    for i in (0, 1, 4, 6, 7, 3, 22, 21, 5):
        assert images.file(i) == jpeg(i)


@needs_webdataset
def test_what_cannot_be_streamed_is_one_line(indexed, tmp_path):
    images = open_images(f"pipe:cat {indexed}", "train")
    with pytest.raises(ValueError, match="4 shards are too few for 5 processes"):
        drawn(images, 1, ranks=5)
    with pytest.raises(ValueError, match="streamed images cannot be repeated"):
        drawn(images, 1, repeats=3)
    (tmp_path / "train-002.tar").write_bytes(write_shard([(jpeg(0), 4)] * 9))
    with pytest.raises(ValueError, match="train-002.tar: image [0-9] is not the one in the index"):
        drawn(images, 23)
    (tmp_path / "train.json").unlink()
    with pytest.raises(ValueError, match="cannot read the index train.json, which tools/make_sh"):
        open_images(f"pipe:cat {indexed} 2>/dev/null", "train")


def add(path, name, content=b"1"):
    with tarfile.open(path, "a") as tar:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


def test_a_shard_made_elsewhere_may_hold_other_things_beside_image_and_label(pattern, tmp_path):
    path = tmp_path / "train-001.tar"
    for name, content in (("n01/x.json", b"{}"), ("n01/x.JPEG", jpeg(30)), ("n01/x.cls", b" 3\n"), ("._y.jpg", b"")):
        add(path, name, content)
    images = open_images(pattern, "train")
    assert len(images) == 24 and images.file(12) == jpeg(30) and images.labels[12] == 3


@pytest.mark.parametrize(
    "damage, says",
    [
        (lambda f: add(f / "train-001.tar", "n01/x.jpg"), "train-001.tar: n01/x has no label; n01/x.cls should"),
        (lambda f: (add(f / "train-001.tar", "x.jpg"), add(f / "train-001.tar", "x.cls", b"cat")), "x has no label"),
        (lambda f: add(f / "train-001.tar", "x.cls"), "train-001.tar: x has no image; there should be"),
        (lambda f: (f / "train-001.tar").write_bytes((f / "train-001.tar").read_bytes()[:900]), "not a whole tar"),
        (lambda f: (f / "train-002.tar").unlink(), "1 of 4 shards are missing, train-002.tar the first"),
    ],
)
def test_what_is_wrong_with_shards_is_one_line_before_training_starts(pattern, tmp_path, damage, says):
    damage(tmp_path)
    with pytest.raises(ValueError, match=says) as error:
        open_images(pattern, "train")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "damage, says",
    [
        (lambda f: add(f / "train-001.tar", "x", bytes(9999)), "001.tar: has 30,720 bytes, the index says 20,480"),
        (lambda f: (f / "train-002.tar").unlink(), "train-002.tar: no such file, but the index lists it"),
        (lambda f: (f / "train.json").write_text("{"), "cannot read the index train.json"),
        (lambda f: (f / "train.json").write_text("[]"), "the index train.json lacks classes or shards"),
        (
            lambda f: (f / "train.json").write_text((f / "train.json").read_text().replace("offsets", "places", 1)),
            "shard 0 in the index train.json should have name, bytes, labels, offsets, sizes",
        ),
        (
            lambda f: (f / "train.json").write_text((f / "train.json").read_text().replace(', "d", "e"', "")),
            "labels up to 4 of 3 classes",
        ),
    ],
)
def test_shards_that_are_not_those_of_their_index_are_one_line(indexed, tmp_path, damage, says):
    (tmp_path / "train-001.tar").write_bytes(write_shard([(b"abc", 1)] * 5))
    index = index_shards(sorted(tmp_path.glob("train-*.tar")))
    (tmp_path / "train.json").write_text(json.dumps({**index, "classes": list("abcde")}))
    open_images(indexed, "train")
    damage(tmp_path)
    with pytest.raises(ValueError, match=says):
        open_images(indexed, "train")


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda p: p.replace("{000..003}", "{003..000}"), "names no shard, because its numbers go down"),
        (lambda p: p.replace("003", "005"), "train-004.tar is not in the index, which has 4 shards"),
        (lambda p: p + ".gz", "tar.gz: shards must be plain tar files, not compressed"),
    ],
)
def test_a_pattern_that_names_no_shards_is_one_line(indexed, change, says):
    with pytest.raises(ValueError, match=says):
        open_images(change(indexed), "train")


def test_without_webdataset_a_url_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "webdataset", None)
    with pytest.raises(ValueError, match=r"needs webdataset: pip install 'resbackbone\[scale\]'"):
        open_shards("https://example.org/train-{0..3}.tar", "train")


def test_patterns_stand_for_names_and_indices():
    assert expand("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand("a-7.tar") == ["a-7.tar"]
    assert {index_name(name) for name in ("train-{00..11}.tar", "train_007.tar", "train.tar")} == {"train.json"}
    assert beside("pipe:aws s3 cp s3://b.tar/x-{0..3}.tar -", "x.json") == "pipe:aws s3 cp s3://b.tar/x.json -"
    assert beside("https://host/a/x-{0..3}.tar?key=1", "x-2.tar") == "https://host/a/x-2.tar?key=1"


@needs_webdataset
def test_webdataset_reads_what_is_written_here(pattern):
    import webdataset

    samples = list(webdataset.WebDataset(pattern, shardshuffle=False).decode("rgb8").to_tuple("jpg", "cls"))
    assert [label for _, label in samples] == [i % 5 for i in range(23)]
    assert samples[3][0].shape == (19, 20, 3)

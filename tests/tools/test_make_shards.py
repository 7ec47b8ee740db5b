"""The command that writes shards, and the one that measures what they bring."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resbackbone.classification.data import open_images
from resbackbone.tools import make_shards


def picture(path, width, height, seed):
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(path, quality=95)


@pytest.fixture
def folder(tmp_path):
    """Three classes, 13 training images, every other one larger than 40 pixels a side, and 3 to test on."""
    for i in range(13):
        picture(tmp_path / "data" / "train" / f"c{i % 3}" / f"{i:02d}.jpg", *((90, 61) if i % 2 else (33, 50)), i)
    for i in range(3):
        picture(tmp_path / "data" / "val" / f"c{i}" / f"{i}.jpg", 90, 61, 20 + i)
    return tmp_path / "data"


def run(folder, *flags):
    output = folder.parent / "shards"
    sizes = ["--shorter-side", "40", "--images-per-shard", "5"]
    make_shards.main(["--data", str(folder), "--output", str(output), *sizes, "--workers", "1", *flags])
    return output


def contents(output):
    return {path.name: path.read_bytes() for path in sorted(output.iterdir())}


def test_every_image_is_in_the_shards_with_its_label_large_ones_resized(folder):
    output = run(folder)
    assert sorted(contents(output)) == [
        *(f"train-00000{i}.tar" for i in range(3)),
        "train.json",
        "val-000000.tar",
        "val.json",
    ]
    images, originals = open_images(f"{output}/train-{{000000..000002}}.tar", "train"), open_images(folder, "train")
    assert images.classes == ["c0", "c1", "c2"]
    order = np.random.default_rng(0).permutation(13)
    for i, original in enumerate(order):
        assert images.labels[i] == originals.labels[original]
        before, after = originals.read(original), images.read(i)
        if before.size == (33, 50):
            assert images.file(i) == originals.file(original)
        else:
            assert after.size == (59, 40)
            resized = before.resize((59, 40), Image.Resampling.BICUBIC)
            assert np.abs(np.asarray(resized, dtype=float) - np.asarray(after)).mean() < 4


def test_two_processes_write_what_one_does(folder, tmp_path):
    one = contents(run(folder))
    make_shards.main(
        ["--data", str(folder), "--output", str(tmp_path / "two"), "--shorter-side", "40", "--images-per-shard", "5"]
        + ["--workers", "2"]
    )
    assert contents(tmp_path / "two") == one


def test_a_killed_run_goes_on_with_its_shards_unless_settings_differ(folder, monkeypatch, capsys):
    whole, output = contents(run(folder)), folder.parent / "shards"
    for path in output.iterdir():
        path.unlink()

    def killed_after_two(path, file, describe=make_shards.describe_shard):
        if len(list(output.glob("*.tar"))) == 2:
            raise KeyboardInterrupt
        return describe(path, file)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(make_shards, "describe_shard", killed_after_two)
        run(folder, "--workers", "1")
    before = {path: path.stat().st_ino for path in output.glob("*.tar")}
    assert before and not (output / "train.json").exists()
    for changed in (("--images-per-shard", "6"), ("--quality", "80")):  # before it is finished, and after
        with pytest.raises(ValueError, match="other images or settings; give another --output, or remove it"):
            run(folder, *changed)
        assert contents(run(folder)) == whole
    assert "train.json already exists" in capsys.readouterr().out
    assert all(path.stat().st_ino == inode for path, inode in before.items())
    for index in output.glob("*.json"):
        index.unlink()
    changed = contents(run(folder, "--quality", "80"))  # and no shard of the former settings is left
    assert all(changed[path.name] != whole[path.name] for path in before)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_broken_image_is_named_or_left_out_and_counted(folder, capsys, workers):
    broken = folder / "train" / "c1" / "04.jpg"
    broken.write_bytes(b"")
    with pytest.raises(ValueError, match="04.jpg: empty file"):
        run(folder, "--workers", workers)
    output = run(folder, "--workers", workers, "--skip-bad-images")
    said = capsys.readouterr().out.replace("\n", "")
    assert f"skipped image {broken}: empty file" in said and "12 images, without 1 that cannot be read" in said
    assert len(open_images(f"{output}/train-{{000000..000002}}.tar", "train")) == 12


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_disk_that_is_full_is_one_line(folder, monkeypatch, workers):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(make_shards, "write_atomically", full)
    with pytest.raises(OSError, match=r"^\[Errno 28\] No space left on device$"):
        run(folder, "--workers", workers)


@pytest.mark.parametrize("split, count, flags", [("val", 3, []), ("train", 13, ["--shorter-side", "0"])])
def test_images_to_test_on_and_with_side_0_all_files_are_copied_as_they_are(folder, split, count, flags):
    output = run(folder, *flags)
    images, originals = open_images(f"{output}/train-{{000000..000002}}.tar", split), open_images(folder, split)
    assert sorted(images.file(i) for i in range(count)) == sorted(originals.file(i) for i in range(count))


def test_an_index_can_be_written_for_shards_that_are_there(folder):
    output = run(folder)
    before = json.loads((output / "train.json").read_text())
    (output / "train.json").unlink()
    make_shards.main(["--index", f"{output}/train-{{000000..000002}}.tar"])
    after = json.loads((output / "train.json").read_text())
    assert after["shards"] == before["shards"] and after["classes"] == ["0", "1", "2"]
    with pytest.raises(ValueError, match="1 of 4 shards are missing, the first .*train-000003.tar"):
        make_shards.main(["--index", f"{output}/train-{{000000..000003}}.tar"])


@pytest.mark.parametrize(
    "flags, says",
    [
        ([], "give --data and --output, or --index"),
        (["--data", "nowhere", "--output", "x"], "--data nowhere: no images; it should hold train/<class>/"),
        (["--data", "data", "--output", "x", "--quality", "96"], "--quality 96: must be 1 to 95"),
        (["--data", "data", "--output", "x", "--workers", "0"], "--workers 0: must be at least 1"),
        (["--data", "data", "--output", "data/val/c0/0.jpg"], "--output data/val/c0/0.jpg: is a file; give a folder"),
    ],
)
def test_a_mistake_is_answered_in_one_line(folder, flags, says, monkeypatch):
    monkeypatch.chdir(folder.parent)
    before = sorted(Path().rglob("*"))
    with pytest.raises(ValueError, match=says):
        make_shards.main(flags)
    assert sorted(Path().rglob("*")) == before

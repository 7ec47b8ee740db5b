"""Write ImageNet's class folders as webdataset shards, with training images re-encoded smaller to be read faster.

python tools/make_shards.py --data imagenet --output shards                         shorter side 320, JPEG quality 90
python tools/make_shards.py --data imagenet --output shards --shorter-side 256
python tools/make_shards.py --data imagenet --output shards --shorter-side 0        the files as they are
python tools/make_shards.py --index 'shards/train-{000000..000146}.tar'             an index for shards made elsewhere

then  python tools/pretrain.py --data 'shards/train-{000000..000320}.tar'

We know of no published figure for what re-encoding costs in accuracy. Users of FFCV report losses when they test on
re-encoded images (github.com/libffcv/ffcv, issues 352 and 364), so validation images are copied unchanged, and so are
training images that are small enough. Recipes with larger images, such as `paper` with shorter sides of up to 480,
enlarge an image of 320.
"""

import io
import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from signal import SIG_IGN, SIGINT, signal

from resbackbone.cli.command import Auto, console, main_of, parse, progress_console, track
from resbackbone.cli.errors import from_option

import numpy as np
from PIL import Image

from resbackbone.atomic import write_atomically
from resbackbone.checks import UserError
from resbackbone.classification.data import LAYOUT, open_images
from resbackbone.classification.images import Images, split_folder
from resbackbone.classification.shards import describe_shard, expand, index_name, index_shards, write_shard
from resbackbone.image_io import BadImage


@dataclass(frozen=True)
class Options:
    """Write class folders as webdataset shards, with training images re-encoded smaller."""

    data: Auto[Path] = None
    """Folder with train/<class>/ and val/<class>/ (or test/<class>/), or one of the two."""
    output: Auto[Path] = None
    """Folder for the shards, train-000000.tar and so on, and their indices, train.json and val.json."""
    shorter_side: int = 320
    """Shorter side in pixels that larger training images are resized to; 0 copies all files unchanged."""
    quality: int = 90
    """JPEG quality of re-encoded images, 1 to 95."""
    images_per_shard: int = 4000
    """Number of images in a shard, which is built in memory."""
    workers: int = os.cpu_count() or 1
    """Processes; each writes one shard at a time."""
    skip_bad_images: bool = False
    """Leave out images that cannot be read; their names and the reasons are printed."""
    index: Auto[str] = None
    """Only write an index for existing shards, 'path/train-{000000..000146}.tar'."""
    quiet: bool = False
    """Print only warnings, errors and the result."""


def main(argv: list[str] | None = None) -> None:
    """Folders -> shards and indices. Run the same command again to resume."""
    options = parse(Options, argv)
    if options.index is not None:
        write_index_of(options.index)
        return
    check(options)
    options.output.mkdir(parents=True, exist_ok=True)
    for split in ("train", "val"):
        if split_folder(options.data, split) is not None:
            with from_option("--data"):
                images = open_images(options.data, split, skip_bad_images=options.skip_bad_images)
            progress_console.print(f"{split}: {images.summary()}")
            write_split(images, split, options)


def check(options: Options) -> None:
    """Raise UserError if an option is missing or out of range."""
    if options.data is None or options.output is None:
        raise UserError("give --data and --output, or --index")
    if not (split_folder(options.data, "train") or split_folder(options.data, "val")):
        raise UserError(f"--data {options.data}: no images; it should hold {LAYOUT}")
    if options.quality > 95:
        raise UserError(f"--quality {options.quality}: must be 1 to 95")
    if options.workers < 1:  # other commands take 0
        raise UserError(f"--workers {options.workers}: must be at least 1")


def write_split(images: Images, split: str, options: Options) -> None:
    """Write the missing shards of a split, each whole or not at all, then the index that makes them usable."""
    order = np.random.default_rng(0).permutation(len(images))  # because reading shuffles only within a window
    parts = [order[i : i + options.images_per_shard] for i in range(0, len(order), options.images_per_shard)]
    paths = [options.output / f"{split}-{i:06d}.tar" for i in range(len(parts))]
    side = options.shorter_side if split == "train" else 0
    index, unfinished = options.output / f"{split}.json", options.output / f"{split}-unfinished.json"
    made_of = [images.fingerprint, side, options.quality, options.images_per_shard]
    content = {"classes": images.classes, "made_of": made_of}
    for path in filter(Path.exists, (index, unfinished)):
        if json.loads(path.read_bytes()).get("made_of") != made_of:
            raise UserError(f"{path} belongs to other images or settings; give another --output, or remove it")
    if index.exists():
        progress_console.print(f"{split}: {index} already exists")
        return
    if not unfinished.exists():
        for path in paths:  # of unknown images and settings
            path.unlink(missing_ok=True)
    write_atomically(unfinished, json.dumps(content))
    make = partial(make_shard, images, side=side, quality=options.quality)
    shards, skipped = [], set()
    # Ctrl-C is for this process, which ends the others.
    with ProcessPoolExecutor(options.workers, initializer=signal, initargs=(SIGINT, SIG_IGN)) as pool:
        for shard, messages in track(pool.map(make, parts, paths), len(parts), f"{split} shards"):
            for message in messages:
                console.print(f"skipped {message}")
            shards.append(shard)
            skipped.update(messages)
    write_atomically(index, json.dumps({**content, "shards": shards}))
    unfinished.unlink()
    count, size = (sum(numbers) for numbers in zip(*((len(s["labels"]), s["bytes"]) for s in shards), strict=True))
    without = f", without {len(skipped)} that cannot be read" if skipped else ""
    console.print(f"{split}: {count} images{without} in {len(shards)} shards, {size / 1e9:.3g} GB; index {index}")


def make_shard(images: Images, part: np.ndarray, path: Path, *, side: int, quality: int) -> tuple[dict, list[str]]:
    """Write one shard, unless it is there; return its entry in the index and the messages of skipped images."""
    if path.exists():
        return describe_shard(path, io.BytesIO(path.read_bytes())), []
    files, messages = [], []
    for i in part.tolist():
        try:
            files.append((encoded(images, i, side, quality), int(images.labels[i])))
        except BadImage as error:
            if not images.skip_bad_images:
                raise
            messages.append(str(error))
    content = write_shard(files)
    write_atomically(path, content)
    return describe_shard(path, io.BytesIO(content)), messages


def encoded(images: Images, index: int, side: int, quality: int) -> bytes:
    """An image as a JPEG with a shorter side of `side`, or its original file if it is no larger."""
    image = images.read(index)
    shorter = min(image.size)
    if not side or shorter <= side:
        file = images.file(index)
        if file[:2] == b"\xff\xd8" or not side:
            return file
    else:
        width, height = (max(1, round(length * side / shorter)) for length in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    written = io.BytesIO()
    image.save(written, "JPEG", quality=quality)
    return written.getvalue()


def write_index_of(pattern: str) -> None:
    """Write the index of existing shards; classes are named by their numbers."""
    folder, name = Path(pattern).parent, Path(pattern).name
    paths = [folder / shard for shard in expand(name)]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"--index {pattern}: {len(missing)} of {len(paths)} shards are missing, the first {missing[0]}")
    index = index_shards(paths)
    write_atomically(folder / index_name(name), json.dumps(index))
    count = sum(len(shard["labels"]) for shard in index["shards"])
    console.print(f"{count} images in {len(paths)} shards; index {folder / index_name(name)}")


if __name__ == "__main__":
    main_of(main)

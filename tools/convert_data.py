"""Convert data for detection between COCO's, YOLO's and Pascal VOC's files; tools/train_coco.py reads all of them.

python tools/convert_data.py my_folder my_folder_yolo --to yolo
python tools/convert_data.py VOCdevkit voc_as_coco --to coco

Reads every layout that tools/train_coco.py reads, and writes each split that there is. Images are hard links where the
file system supports them, else copies. Only boxes are converted: no masks, no key points.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resbackbone.cli.command import console, main_of, parse, progress_console

import tyro

from detection.coco import CocoImages
from detection.convert import FORMATS
from detection.layouts import describe_layout, whole_splits
from detection.splits import Split
from resbackbone.atomic import folder_atomically
from resbackbone.checks import UserError, one_of


@dataclass(frozen=True)
class Options:
    """Convert data for detection between COCO's, YOLO's and Pascal VOC's files."""

    source: tyro.conf.Positional[Path]
    """Folder to read, as tools/train_coco.py takes it as --data."""
    output: tyro.conf.Positional[Path]
    """New folder to write."""
    to: str
    """coco, yolo or voc."""
    skip_bad_images: bool = False
    """Leave out images that are missing or cannot be read; their names and the reasons are printed."""
    quiet: bool = False
    """Print only warnings, errors and the path of the result."""


def main(argv: list[str] | None = None) -> None:
    """A folder of any layout -> one of another format; writes everything or nothing."""
    options = parse(Options, argv)
    one_of("format", options.to, FORMATS)
    progress_console.print(f"data:  {describe_layout(options.source)}")
    convert(whole_splits(options.source), options.output, options.to, skip_bad_images=options.skip_bad_images)


def convert(splits: Mapping[str, Split], output: Path, form: str, *, skip_bad_images: bool) -> None:
    """Write the splits to the new folder `output` as one of FORMATS."""
    if output.exists():
        raise UserError(f"{output} already exists; give a new folder")
    opened: dict[str, CocoImages] = {}
    for name, split in splits.items():
        categories = next(iter(opened.values())).categories if opened else None
        more: dict[str, Any] = {"categories": categories, "skip_bad_images": skip_bad_images}
        opened[name] = images = CocoImages(split.images, split.annotations, reader=split.reader, **more)
        images.check_files()
        for message in images.broken:
            console.print(f"left out: {message}")
        progress_console.print(f"{name}: {images.summary()}")
    with folder_atomically(output) as folder:
        FORMATS[form](folder, opened)
    names = next(iter(opened.values())).categories.values()
    progress_console.print(f"{len(names)} classes: {', '.join(names)}")
    console.print(f"written: {output}; train on it with tools/train_coco.py --data {output}")


def run() -> None:
    main_of(main)


if __name__ == "__main__":
    run()

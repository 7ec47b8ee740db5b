"""Convert Pascal VOC's XML annotations to COCO's JSON: tools/convert_data.py --to coco, by lists of any name.

python tools/voc_to_coco.py VOCdevkit/VOC2007 voc2007
python tools/voc_to_coco.py VOCdevkit voc0712 --train trainval --val test         all years that have these lists

tools/train_coco.py reads VOC's folders as they are. Objects marked `difficult` become crowds (iscrowd 1): they are not
trained on, and their detections count neither as right nor as wrong, as in VOC. Unlike VOC's scorer, COCO's lets
several detections match a crowd.
"""

from dataclasses import dataclass
from pathlib import Path

from resbackbone.cli.command import main_of, parse

import tyro

from detection.voc import LISTS, find_voc
from resbackbone.checks import UserError
from resbackbone.image_io import BadImage
from resbackbone.tools.convert_data import convert

LAYOUT = "Annotations/, JPEGImages/ and ImageSets/Main/*.txt"


@dataclass(frozen=True)
class Options:
    """Convert Pascal VOC's XML annotations to COCO's JSON."""

    root: tyro.conf.Positional[Path]
    """Folder with Annotations/, JPEGImages/ and ImageSets/Main/*.txt (VOC2007), or with several such (VOCdevkit)."""
    output: tyro.conf.Positional[Path]
    """New folder to write: annotations/instances_{train,val,test}.json, train/, val/ and test/."""
    train: str = "train"
    """The list in ImageSets/Main to train on. Without any lists, all annotated images are used."""
    val: str = "val"
    """The list to validate on. Without val.txt, train_coco.py holds out a tenth of the training images."""
    skip_bad_files: bool = False
    """Leave out annotations and images that cannot be used; their names and the reasons are printed."""
    quiet: bool = False
    """Print only warnings, errors and the path of the result."""


def main(argv: list[str] | None = None) -> None:
    """Lists of images -> an instances file and a folder of images for each; writes everything or nothing."""
    options = parse(Options, argv)
    lists: dict[str, tuple[str, ...]] = {"train": (options.train,), "val": (options.val,)}
    if "test" not in (options.train, options.val):
        lists["test"] = LISTS["test"]
    found = find_voc(options.root, lists) if options.root.is_dir() else None
    if found is None:
        raise UserError(f"{options.root}: no folder Annotations in it or below; it should hold {LAYOUT}")
    for name, of in (("train", options.train), ("val", options.val)):
        if name not in found.splits and (name == "train" or of != "val" or name in found.broken):
            raise UserError(f"{options.root}: no image in ImageSets/Main/{of}.txt; --{name} names another list")
    try:
        convert(found.splits, options.output, "coco", skip_bad_images=options.skip_bad_files)
    except BadImage as error:
        raise UserError(f"{error}; --skip-bad-files skips it") from None


if __name__ == "__main__":
    main_of(main)

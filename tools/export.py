"""Export a trained detector to one file that runs without this package: ONNX, or PyTorch's .pt2.

python tools/export.py runs/mine detector.onnx
python tools/export.py runs/mine detector.onnx --check photo.jpg other.png        compare the file with the detector
python tools/export.py torchvision:FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1 detector.pt2 --score-thresh 0.5

The file takes images of any size and gives boxes in their own pixels: resizing, normalization, NMS and RoIAlign are
inside.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from resbackbone.cli.command import Auto, Several, console, main_of, parse, progress_console

import torch
import tyro
from torch import Tensor

from detection.export import INPUT_TYPES, load_exported, white_of
from detection.saved import load_detector
from resbackbone.checks import UserError, one_of, require
from resbackbone.export import check_destination
from resbackbone.image_io import BadImage, read_image

PIXELS, SCORE = 0.1, 1e-3  # rounding stays far below, and a wrong operator goes far above


@dataclass(frozen=True)
class Options:
    """Export a trained detector to one file: ONNX, or PyTorch's .pt2."""

    run: tyro.conf.Positional[str]
    """A run's folder, a weight file of a Faster R-CNN (ours, torchvision's, detectron2's, mmdetection's), or a named
    source: torchvision:FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1."""
    file: tyro.conf.Positional[Path]
    """The file to write, .onnx or .pt2; an existing one is replaced."""
    input_type: str = "uint8"
    """What the file takes: uint8 (0..255) or float32 (0..1) images."""
    score_thresh: Auto[float] = None
    """Lowest score of the boxes that the file gives. Default: the detector's own."""
    check: Several[Path] = ()
    """Images on which the file must find what the detector finds; an .onnx runs in ONNX Runtime."""
    quiet: bool = False
    """Print only warnings, errors and the file's path."""


def main(argv: list[str] | None = None) -> None:
    """A detector -> a file, and what it finds in the images of --check beside what the detector finds."""
    options = parse(Options, argv)
    one_of("input type", options.input_type, INPUT_TYPES)
    if check_destination(options.file).suffix == ".onnx" and options.check:
        require("export", "onnxruntime", user="--check of an .onnx")
    images = read_images(options.check)
    detector = load_detector(options.run)
    if options.score_thresh is not None:
        detector.roi_heads.score_thresh = options.score_thresh
    progress_console.print(f"exporting {options.run}, which takes about half a minute")
    detector.export(options.file, input_type=options.input_type)
    console.print(f"exported: {options.file}")
    if not images:
        return
    find = load_exported(options.file)
    with torch.inference_mode():
        for path, image in images.items():
            as_float = image.float() / (255 / white_of(detector))
            [found] = find((image if options.input_type == "uint8" else as_float)[None])
            [expected] = detector([as_float])
            progress_console.print(f"{path}: {agreement(path, found, expected)}")


def read_images(paths: Iterable[Path]) -> dict[Path, Tensor]:
    try:
        return {path: read_image(path) for path in paths}
    except BadImage as error:
        raise UserError(f"--check {error}") from None


def agreement(path: Path, found: dict[str, Tensor], expected: dict[str, Tensor]) -> str:
    """How far the file's boxes and scores are from the detector's. Raises UserError if further than by rounding.

    A box is compared with the nearest of its label, since equal scores may come in another order.
    """
    ours, theirs = len(found["boxes"]), len(expected["boxes"])
    if ours == theirs == 0:
        return "nothing found, as by the detector"
    what = f"the file finds {ours} objects and the detector {theirs}"
    if ours == theirs:
        apart = torch.cdist(expected["boxes"], found["boxes"], p=math.inf)
        pixels, nearest = apart.masked_fill(expected["labels"][:, None] != found["labels"], math.inf).min(1)
        score = (found["scores"][nearest] - expected["scores"]).abs().max()
        differences = f"boxes within {pixels.max():.1g} pixels, scores within {score:.1g}"
        if pixels.max() <= PIXELS and score <= SCORE:
            return f"{ours} objects, {differences}"
        what = differences
    raise UserError(
        f"--check {path}: {what}; equal scores explain this on an image of one colour: on a photo, please report it"
    )


def run() -> None:
    main_of(main)


if __name__ == "__main__":
    run()

"""Find objects in images with a trained detector: pictures with boxes, and detections.json.

python tools/detect.py runs/shapes-r18-fpn-short photo.jpg other.png
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from detection.coco import BadImage, read_image
from detection.evaluate import detect
from detection.faster_rcnn import detector_file, load_detector
from detection.report import draw_boxes
from detection.scoring import entries
from resbackbone.atomic import write_atomically
from resbackbone.checks import one_of
from resbackbone.training.command import console, main_of, parse, track
from resbackbone.training.distributed import count_processes, native_precision
from resbackbone.weights.sources import is_named


@dataclass(frozen=True)
class Options:
    """Find objects in images: pictures with boxes, and JSON."""

    run: tyro.conf.Positional[str]
    """A run's folder, a weight file of a Faster R-CNN (ours, torchvision's, detectron2's, mmdetection's), or a named
    source: torchvision:FasterRCNN_ResNet50_FPN_Weights.COCO_V1."""
    images: tyro.conf.Positional[tuple[Path, ...]]
    """Image files."""
    output: Path | None = None
    """Folder for the pictures and detections.json. Default: detected/ in the run's folder, or beside the file."""
    threshold: float = 0.5
    """Boxes with a lower score are not drawn; detections.json has them all."""
    device: str | None = None
    """cuda, cuda:N or cpu. Default: a GPU if there is one."""
    precision: str | None = None
    """fp32 or bf16 (autocast). Default: bf16 where the device computes in it."""
    skip_bad_images: bool = False
    """Go on without images that cannot be read; they are named."""


def main(argv: list[str] | None = None) -> None:
    """Images -> pictures with boxes, and what was found as JSON: {"image", "category", "bbox", "score", ..} each."""
    options = parse(Options, argv)
    if not options.images:
        raise ValueError("no image given: python tools/detect.py RUN IMAGE...")
    if not 0 <= options.threshold <= 1:
        raise ValueError(f"--threshold {options.threshold}: a score between 0 and 1 is wanted")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    count_processes(device, None)
    precision = one_of("precision", options.precision or native_precision(device), ("fp32", "bf16"))
    file = detector_file(options.run)
    detector = load_detector(file).to(device, memory_format=torch.channels_last)
    folder = options.output or (Path() if is_named(options.run) else file.parent) / "detected"
    folder.mkdir(parents=True, exist_ok=True)

    pictures = picture_files(options.images, folder)
    everything, ids = [], list(detector.categories)
    for number, path in enumerate(track(options.images, len(options.images), "detect"), 1):
        try:
            image = read_image(path)
        except BadImage as error:
            if not options.skip_bad_images:
                raise
            console.print(f"skipped {error}")
            continue
        found = entries(detect(detector, image, number, ids, torch.device(device), bf16=precision == "bf16"))
        found = [entry for entry in found if entry["category_id"] in detector.real_categories]
        drawn = [entry for entry in found if entry["score"] >= options.threshold]
        picture = pictures[number - 1]
        draw_boxes(image, drawn, detector.categories).save(picture)
        console.print(f"{path}: {len(drawn)} found, {picture}")
        everything += [{"image": str(path), "category": detector.categories[e["category_id"]], **e} for e in found]
    write_atomically(folder / "detections.json", json.dumps(everything, indent=1))
    console.print(f"all detections: {folder / 'detections.json'}")


def picture_files(images: Sequence[Path], folder: Path) -> list[Path]:
    """Where the picture of each image goes: under its name, numbered where several have it; never over an image."""
    stems = [path.stem for path in images]
    names = [f"{stem}-{i}.png" if stems.count(stem) > 1 else f"{stem}.png" for i, stem in enumerate(stems, 1)]
    given = {path.resolve() for path in images}
    for name in names:
        if (folder / name).resolve() in given:
            raise ValueError(f"--output {folder}: a picture would replace the image {folder / name}; choose another")
    return [folder / name for name in names]


if __name__ == "__main__":
    main_of(main)

"""Find objects in images and videos with a trained detector: pictures with boxes, and JSON.

python tools/detect.py runs/shapes-r18-fpn-short photo.jpg other.png
python tools/detect.py runs/mine photos 'more/**/*.jpg' --batch-size 8 --no-pictures
python tools/detect.py runs/mine coco/val2017 --annotations coco/annotations/instances_val2017.json
python tools/detect.py torchvision:FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1 clip.mp4 --output found
python tools/detect.py runs/mine 0                                    the first camera, until Ctrl-C
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from resbackbone.cli.command import Auto, Several, console, main_of, parse, progress_console, track
from resbackbone.cli.errors import from_option

import torch
import tyro
from torch import Tensor

from detection.evaluate import json_list
from detection.faster_rcnn import prepare_for_detection
from detection.inputs import find_inputs, frames_file, image_ids_of, output_files
from detection.predict import Prediction, batches, predictions
from detection.saved import load_detector, run_folder
from detection.video import Video, video_file
from resbackbone.checks import UserError, one_of, sibling
from resbackbone.engine.best import is_best
from resbackbone.engine.device import INFERENCE, choose_device, choose_precision, use
from resbackbone.engine.termination import termination
from resbackbone.image_io import BadImage, read_image
from resbackbone.weights.sources import is_named

Find = Callable[[Sequence[Tensor]], list[Prediction]]
ACCEPT_BAD = "with --skip-bad-images the exit status is 0 all the same"


@dataclass(frozen=True)
class Options:
    """Find objects in images and videos: pictures with boxes, and JSON."""

    run: tyro.conf.Positional[str]
    """A run's folder, a weight file of a Faster R-CNN (ours, torchvision's, detectron2's, mmdetection's), or a named
    source: torchvision:FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1."""
    inputs: tyro.conf.Positional[Several[str]]
    """Images, folders of images, quoted patterns such as 'photos/**/*.jpg', video files, or a camera's number."""
    output: Auto[Path] = None
    """Folder for pictures and JSON. Default: detected/ in the run's folder, or beside the weight file; for a
    run's best/ detected-best/ beside it."""
    recursive: bool = False
    """Include images in subfolders."""
    threshold: float = 0.5
    """Lowest score of the boxes that are drawn; the JSON has all boxes."""
    pictures: bool = True
    """Draw the boxes: a picture of each image, a video of each video."""
    format: str = "jpg"
    """Of the pictures: jpg or png."""
    annotations: Auto[Path] = None
    """COCO annotation file with the ids of the images by file name. Default: numbers from 1, in order."""
    batch_size: int = 1
    """Images read at a time; images of equal size go through the network together."""
    max_frames: Auto[int] = None
    """Stop each video or camera after this many frames. Default: no limit."""
    device: Auto[str] = None
    """cuda, cuda:N, cpu or mps. Default: a GPU, or the CPU if there is none."""
    precision: Auto[str] = None
    """fp32 or bf16 (autocast). Default: bf16 where the device computes in it."""
    skip_bad_images: bool = False
    """Exit with status 0 even if images cannot be read. They are skipped and named in any case."""
    quiet: bool = False
    """Print only warnings, errors and the paths of the results."""


def main(argv: list[str] | None = None) -> None:
    """Images and videos -> pictures with boxes, and what was found as JSON."""
    options = parse(Options, argv)
    with from_option("--device"):
        device = torch.device(choose_device(options.device))
    with from_option("--precision"):
        bf16 = choose_precision(options.precision, str(device), INFERENCE) == "bf16"
    use(device)
    folder = run_folder(options.run)
    beside = folder.resolve().with_name("detected-best") if is_best(folder) else folder / "detected"
    folder = options.output or beside
    images, videos = inputs = find_inputs(options.inputs, folder, recursive=options.recursive)
    with from_option("--output"):
        pictures = output_files(inputs, folder, one_of("format", options.format, ("jpg", "png")))

    one = len(images) == 1 and not options.skip_bad_images and Path(options.run).exists() or is_named(options.run)
    if one and images and not any(path.exists() for path in images):  # before a download
        raise UserError(f"image {images[0]}: no such file{sibling(images[0])}")
    detector = load_detector(options.run).to(device, memory_format=torch.channels_last)
    with from_option("--annotations"):
        image_ids = image_ids_of(images, options.annotations, detector.real_categories)
    prepare_for_detection(detector, bf16=bf16)
    find = partial(predictions, detector, bf16=bf16)
    folder.mkdir(parents=True, exist_ok=True)
    bad: list[BadImage] = []
    with termination.handled(), termination.deferred():
        if images:
            bad = detect_images(find, images, image_ids, pictures, folder / "detections.json", options)
        for source in videos:
            detect_video(find, source, pictures[source], options)
            if termination.requested:
                break
    if bad:
        raise UserError(f"{len(bad)} of {len(images)} images, named above, cannot be read; {ACCEPT_BAD}")


def detect_images(
    find: Find, images: list[Path], image_ids: list[int], pictures: dict, out: Path, options: Options
) -> list[BadImage]:
    """Image files -> pictures, and the list `out` of detections, each with the file's name.

    Ctrl-C ends it after the images at hand. Returns what is wrong with unreadable images, unless --skip-bad-images is
    given. Raises the BadImage of a single one, and leaves `out` as it was if none of several can be read.
    """
    bad: list[BadImage] = []
    one_of_many = len(images) > 1 or options.skip_bad_images
    readable = read_images(track(images, len(images), "detect"), image_ids, bad if one_of_many else None)
    done = 0
    with json_list(out) as add:
        for batch in batches(readable, options.batch_size):
            paths, tensors, ids = zip(*batch, strict=True)
            for path, image_id, found in zip(paths, ids, find(tensors), strict=True):
                for entry in named_entries(found, image_id):
                    add({"image": str(path), **entry})
                sure = found.at_least(options.threshold)
                if options.pictures:
                    sure.save(pictures[path])
                where = f", {pictures[path]}" if options.pictures else ""
                why = (
                    "" if sure else f" at --threshold {options.threshold:g}, the highest score is {highest(found):.2f}"
                )
                progress_console.print(f"{path}: {len(sure)} found{why}{where}")
            done += len(batch)
            if termination.requested:
                break
        if bad and not done and not options.skip_bad_images:
            raise UserError(f"none of these {len(images)} images can be read; {ACCEPT_BAD}")
    console.print(f"all detections: {out}")
    if termination.requested:
        termination.stop(f"after {done} of {len(images)} images")
    return [] if options.skip_bad_images else bad


def highest(found: Prediction) -> float:
    """The highest score; 0 without detections."""
    return float(found.scores.max()) if len(found) else 0.0


def read_images(
    paths: Iterable[Path], image_ids: Iterable[int], bad: list[BadImage] | None
) -> Iterator[tuple[Path, Tensor, int]]:
    """Yield (file, uint8 [3, H, W], id). BadImage of an unreadable image is raised, or printed and added to `bad`."""
    for path, image_id in zip(paths, image_ids, strict=True):
        try:
            yield path, read_image(path), image_id
        except BadImage as error:
            if bad is None:
                raise
            console.print(f"skipped {error}")
            bad.append(error)


def named_entries(found: Prediction, image_id: int) -> list[dict]:
    """A list of {"category", "image_id", "category_id", "bbox", "score"}."""
    return [{"category": name, **entry} for name, entry in zip(found.names, found.to_coco(image_id), strict=True)]


def detect_video(find: Find, source: Path | int, out: Path, options: Options) -> None:
    """Video -> video with boxes, and a list of {"frame", "seconds", "detections"}. Ctrl-C ends both where they are."""
    video = Video(source)
    total = min(filter(None, (video.count, options.max_frames)), default=None)
    frames = track(islice(video, options.max_frames), total, f"detect {video.name}")
    number = boxes = 0
    pictures = video_file(out, video.rate) if options.pictures else nullcontext()
    with json_list(frames_file(out)) as add, pictures as add_picture:
        for batch in batches(frames, options.batch_size):
            for found in find(batch):
                sure = found.at_least(options.threshold)
                if options.pictures:
                    add_picture(sure.picture())
                detections = named_entries(found, number)
                for entry in detections:
                    del entry["image_id"]
                add({"frame": number, "seconds": round(number / video.rate, 3), "detections": detections})
                number, boxes = number + 1, boxes + len(sure)
            if termination.requested:
                break
        if not number:
            raise UserError(f"{video.name}: no frame can be read")
    progress_console.print(f"{video.name}: {boxes} found in {number} frames{f', {out}' if options.pictures else ''}")
    console.print(f"all detections: {frames_file(out)}")
    if termination.requested and isinstance(source, Path):  # a camera has no other end
        termination.stop(f"after {number} of {video.count or 'unknown'} frames")


def run() -> None:
    main_of(main)


if __name__ == "__main__":
    run()

"""Evaluate a detector: detect on every image once, on any number of ranks, score on rank 0, write the results."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader

from detection.coco import CocoImages
from detection.faster_rcnn import FasterRCNN
from detection.predict import boxes_of
from detection.scoring import DETECTION, METRICS, entries, score
from detection.transforms import to_model_input
from resbackbone.atomic import open_atomically, write_json
from resbackbone.engine.distributed import Rank, broadcast, gather
from resbackbone.engine.state import mean_of
from resbackbone.engine.termination import worker_processes
from resbackbone.image_io import BadImage
from resbackbone.report.numbers import percent

CLASSES_SHOWN = 30  # in the table


class Evaluation(NamedTuple):
    """The outcome of an evaluation. Every rank has the results, only rank 0 the detections."""

    results: dict  # the content of results.json
    detections: np.ndarray  # DETECTION [n], sorted by image id; empty on other ranks


def evaluate(
    detector: FasterRCNN,
    dataset: CocoImages,
    rank: Rank,
    *,
    workers: int = 0,
    bf16: bool = False,
    backend: str = "hotcoco",
    progress: Callable[[Iterator, int], Iterator] = lambda items, total: items,
) -> Evaluation:
    """Detect on every image of `dataset` and score with `backend`; leaves the detector in eval mode.

    `progress` wraps the loop over this rank's images and gets their number. Detections of classes absent from the data
    set are discarded (torchvision's detectors have the ids that COCO skips). Raises BadImage for an image that cannot
    be read; if the data set skips bad images, it counts as an image without detections, and
    `results["skipped_images"]` holds the message.
    """
    share = rank.share(len(dataset))
    loader = DataLoader(dataset, batch_size=None, sampler=share, **worker_processes(workers))
    detector.eval()
    found = [np.empty(0, DETECTION)]
    skipped: list[str] = []
    for sample in progress(iter(loader), len(share)):
        if isinstance(sample, BadImage):
            if not dataset.skip_bad_images:
                raise sample
            skipped.append(str(sample))
            continue
        image, target = sample
        found += detect(detector, [image], [target["image_id"]], rank.device, bf16=bf16)
    own = np.concatenate(found)
    parts = gather((own[np.isin(own["category_id"], list(dataset.categories))], skipped), rank)
    results, detections = None, np.empty(0, DETECTION)
    if parts is not None:
        detections = np.concatenate([rows for rows, _ in parts])
        detections = detections[np.argsort(detections["image_id"], kind="stable")]
        results = score(dataset.annotations, detections, backend=backend)
        results["skipped_images"] = [message for _, messages in parts for message in messages]
    return Evaluation(broadcast(results, rank), detections)


def detect(
    detector: FasterRCNN,
    images: Sequence[torch.Tensor],
    image_ids: Sequence[int],
    device: torch.device,
    *,
    bf16: bool = False,
) -> list[np.ndarray]:
    """Images, uint8 [3, H, W] each, to the detections of each, DETECTION [n], as `predict.boxes_of` finds them."""
    category_ids = np.array(list(detector.categories))
    found = []
    for image_id, of_image in zip(image_ids, boxes_of(detector, images, device, bf16=bf16), strict=True):
        rows = of_image.double().numpy()
        rows[:, 2:4] -= rows[:, :2]
        detections = np.empty(len(rows), DETECTION)
        detections["image_id"], detections["bbox"], detections["score"] = image_id, rows[:, :4], rows[:, 4]
        detections["category_id"] = category_ids[rows[:, 5].astype(np.int64) - 1]
        found.append(detections)
    return found


@torch.inference_mode()
def validation_losses(
    detector: FasterRCNN,
    dataset: CocoImages,
    rank: Rank,
    *,
    workers: int = 0,
    bf16: bool = False,
    progress: Callable[[Iterator, int], Iterator] = lambda items, total: items,
) -> dict[str, float]:
    """The training losses on every image of `dataset`, in eval mode: the mean of each, and "loss", their sum.

    Anchors and regions are drawn with an image's index as the seed, so the same detector gets the same losses, on any
    number of ranks. Images that cannot be read are left out; {} if none can.
    """
    share = rank.share(len(dataset))
    loader = DataLoader(dataset, batch_size=None, sampler=share, **worker_processes(workers))
    detector.eval()
    losses: dict[int, dict[str, torch.Tensor]] = {}  # by image
    for index, sample in zip(share, progress(iter(loader), len(share)), strict=True):
        if isinstance(sample, BadImage):
            continue
        image, target = sample
        target = {name: target[name].to(rank.device) for name in ("boxes", "labels")}
        with (
            torch.random.fork_rng([rank.device] if rank.device.type == "cuda" else []),
            torch.autocast(rank.device.type, torch.bfloat16, enabled=bf16),
        ):
            torch.manual_seed(index)
            losses[index] = detector.losses([to_model_input(image, rank.device)], [target])
    own = {index: {name: loss.item() for name, loss in terms.items()} for index, terms in losses.items()}
    parts = gather(own, rank)
    mean = None
    if parts is not None:
        of_images = {index: terms for part in parts for index, terms in part.items()}
        terms = mean_of([of_images[index] for index in sorted(of_images)]) if of_images else {}
        mean = {"loss": sum(terms.values()), **terms} if terms else {}
    return broadcast(mean, rank)


def write_results(folder: Path, results: dict, detections: np.ndarray) -> None:
    """Write `detections.json` (COCO's results format) and `results.json` into the run's folder."""
    with json_list(folder / "detections.json") as add:
        for entry in entries(detections):
            add(entry)
    write_json(folder / "results.json", results)


@contextmanager
def json_list(path: Path) -> Iterator[Callable[[dict], None]]:
    """Yield a function that appends an item to a JSON list, one per line; the file appears when it is complete."""
    with open_atomically(path) as file:
        start = "[\n"

        def add(item: dict) -> None:
            nonlocal start
            file.write(f"{start}{json.dumps(item)}".encode())
            start = ",\n"

        yield add
        file.write(b"[]\n" if start == "[\n" else b"\n]\n")


def by_falling_ap(per_class: Mapping[str, dict]) -> list[tuple[str, dict]]:
    """Classes and their numbers, those without an AP last."""
    return sorted(per_class.items(), key=lambda item: 1 if item[1]["AP"] is None else -item[1]["AP"])


def results_table(results: dict) -> str:
    """The 12 numbers, and the AP of up to CLASSES_SHOWN classes by falling AP, those without boxes last."""
    classes = by_falling_ap(results["per_class"])
    shown = [(name, percent(e["AP"]), percent(e["AP50"]), str(e["boxes"])) for name, e in classes[:CLASSES_SHOWN]]
    rows = [
        ("COCO box AP, %", *METRICS[:6]),
        ("all classes", *(percent(results["bbox"][name]) for name in METRICS[:6])),
        ("", *METRICS[6:]),
        ("recall", *(percent(results["bbox"][name]) for name in METRICS[6:])),
        ("by class", "AP", "AP50", "boxes"),
        *shown,
    ]
    width = max(len(row[0]) for row in rows)
    lines = [row[0].ljust(width) + "".join(value.rjust(7) for value in row[1:]) for row in rows]
    if len(classes) > CLASSES_SHOWN:
        lines.append(f"{len(classes) - CLASSES_SHOWN} more classes in results.json")
    return "\n".join(lines)


def results_summary(results: dict) -> str:
    """Why numbers are undefined or 0, which images were skipped and why, and a last line with AP and AP50."""
    ap, ap50 = (percent(results["bbox"][name]) for name in ("AP", "AP50"))
    notes = [results["note"]] if results["note"] else []
    skipped = [f"skipped {message}" for message in results["skipped_images"]]
    return "\n".join([*notes, *skipped, f"AP {ap}, AP50 {ap50} on {results['images']} images"])

"""A detector to its COCO AP: every image once on any number of ranks, scored on rank 0; and what is written of it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from rich.table import Table
from torch.utils.data import DataLoader

from detection.coco import BadImage, CocoImages
from detection.faster_rcnn import FasterRCNN
from detection.scoring import DETECTION, METRICS, entries, score
from detection.transforms import to_model_input
from resbackbone.atomic import write_atomically
from resbackbone.training.command import console
from resbackbone.training.distributed import Rank, RankShare, broadcast, gather

AT_ONCE = 10_000  # detections turned into text together


def evaluate(
    detector: FasterRCNN,
    dataset: CocoImages,
    rank: Rank,
    *,
    workers: int = 0,
    bf16: bool = False,
    backend: str = "hotcoco",
    progress: Callable[[Iterator, int], Iterator] = lambda items, total: items,
) -> tuple[dict, np.ndarray]:
    """Detect on every image of `dataset` and score by `backend`: (results, detections).

    `results` is what results.json holds, the same on every rank; `detections`, DETECTION [n] in the order of the image
    ids, are all of them on rank 0 and none elsewhere. They take 56 bytes each while they are collected.
    `progress` wraps the loop over this rank's images; it is given their number. An image that cannot be read raises
    BadImage, or with the dataset's `skip_bad_images` counts as one without detections and is named in the results.
    A detection of a class that the data set has not is none (torchvision's detectors know the ids that COCO skips).
    """
    share = RankShare(len(dataset), rank=rank.rank, ranks=rank.ranks)
    loader = DataLoader(dataset, batch_size=None, sampler=share, num_workers=workers)
    category_ids, was_training = list(detector.categories), detector.training
    detector.eval()
    found = [np.empty(0, DETECTION)]
    skipped: list[str] = []
    try:
        for sample in progress(iter(loader), len(share)):
            if isinstance(sample, BadImage):
                if not dataset.skip_bad_images:
                    raise sample
                skipped.append(str(sample))
                continue
            image, image_id = sample[0], sample[1]["image_id"]
            found.append(detect(detector, image, image_id, category_ids, rank.device, bf16=bf16))
    finally:
        detector.train(was_training)
    own = np.concatenate(found)
    parts = gather((own[np.isin(own["category_id"], list(dataset.categories))], skipped), rank)
    results, detections = None, np.empty(0, DETECTION)
    if parts is not None:
        detections = merged([rows for rows, _ in parts])
        results = score(dataset.annotations, detections, backend=backend)
        results["skipped_images"] = [message for _, messages in parts for message in messages]
    return broadcast(results, rank), detections


def merged(parts: list[np.ndarray]) -> np.ndarray:
    """The ranks' detections in the order of the image ids; an image that several ranks have counts once."""
    rows, rank = np.concatenate(parts), np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    order = np.lexsort((rank, rows["image_id"]))
    rows, rank = rows[order], rank[order]
    last = np.searchsorted(rows["image_id"], rows["image_id"], side="right") - 1  # the last row of a row's image
    return rows[rank == rank[last]]


@torch.inference_mode()
def detect(
    detector: FasterRCNN,
    image: torch.Tensor,
    image_id: int,
    category_ids: list[int],
    device: torch.device,
    *,
    bf16: bool = False,
) -> np.ndarray:
    """One image, uint8 [3, H, W], to its detections, DETECTION [n], the surest first.

    Images go one at a time: in a batch, padding changes the boxes slightly, and so would the number of ranks.
    """
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        output = detector([to_model_input(image, device)])[0]
    boxes, scores = (output[name].cpu().double().numpy() for name in ("boxes", "scores"))
    boxes[:, 2:] -= boxes[:, :2]
    rows = np.empty(len(scores), DETECTION)
    rows["image_id"], rows["bbox"], rows["score"] = image_id, boxes, scores
    rows["category_id"] = np.array(category_ids)[output["labels"].cpu().numpy() - 1]
    return rows


def write_results(folder: Path, results: dict, detections: np.ndarray) -> None:
    """Write `detections.json` (COCO's results format) and `results.json` into the run's folder."""
    write_atomically(folder / "detections.json", _as_json(detections))
    write_atomically(folder / "results.json", json.dumps(results, indent=2) + "\n")


def _as_json(detections: np.ndarray) -> Iterator[str]:
    yield "["
    for start in range(0, len(detections), AT_ONCE):
        text = json.dumps(entries(detections[start : start + AT_ONCE]))
        yield f"{', ' if start else ''}{text[1:-1]}"
    yield "]"


def percent(value: float | None) -> str:
    """A fraction as COCO tables print it: 37.0, or n/a for what is undefined."""
    return "n/a" if value is None else f"{100 * value:.1f}"


def print_results(results: dict) -> None:
    """The 12 numbers and AP by class as a table, what was left out and why, and last one line with AP and AP50."""
    table = Table("", *METRICS[:6], title="COCO box AP, percent")
    table.add_row("all classes", *(percent(results["bbox"][name]) for name in METRICS[:6]))
    table.add_section()
    table.add_row("", *METRICS[6:], style="bold")
    table.add_row("recall", *(percent(results["bbox"][name]) for name in METRICS[6:]))
    table.add_section()
    table.add_row("by class", "AP", "AP50", "boxes", style="bold")
    for name, entry in results["per_class"].items():
        table.add_row(name, percent(entry["AP"]), percent(entry["AP50"]), str(entry["boxes"]))
    console.print(table)
    if results["note"]:
        console.print(results["note"])
    for message in results["skipped_images"]:
        console.print(f"skipped {message}")
    ap, ap50 = (percent(results["bbox"][name]) for name in ("AP", "AP50"))
    console.print(f"AP {ap}, AP50 {ap50} on {results['images']} images")

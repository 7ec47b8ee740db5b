"""A detector to its COCO AP: every image once on any number of ranks, scored on rank 0; and what is written of it."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.table import Table
from torch.utils.data import DataLoader

from detection.coco import CocoImages
from detection.faster_rcnn import FasterRCNN
from detection.scoring import DETECTION, METRICS, entries, score_and_scorer
from detection.transforms import to_model_input
from resbackbone.atomic import write_atomically
from resbackbone.cli.command import console, progress_console
from resbackbone.engine.distributed import Rank, RankShare, broadcast, gather
from resbackbone.engine.termination import worker_processes
from resbackbone.image_io import BadImage
from resbackbone.report.numbers import percent

AT_ONCE = 10_000  # detections turned into text together
CLASSES_SHOWN = 30  # on the terminal


class Evaluation(NamedTuple):
    """What came of an evaluation; all but the results are on rank 0 alone."""

    results: dict  # what results.json holds
    detections: np.ndarray  # DETECTION [n], in the order of the image ids; on the other ranks none
    scorer: Any  # see `score_and_scorer`; on the other ranks None


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
    """Detect on every image of `dataset` and score by `backend`.

    Detections take 56 bytes each while they are collected. `progress` wraps the loop over this rank's images; it is
    given their number. An image that cannot be read raises BadImage, or with the dataset's `skip_bad_images` counts as
    one without detections and is named in the results. A detection of a class that the data set has not is none
    (torchvision's detectors know the ids that COCO skips).
    """
    share = RankShare(len(dataset), rank=rank.rank, ranks=rank.ranks)
    loader = DataLoader(dataset, batch_size=None, sampler=share, **worker_processes(workers))
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
    results, detections, scorer = None, np.empty(0, DETECTION), None
    if parts is not None:
        detections = merged([rows for rows, _ in parts])
        results, scorer = score_and_scorer(dataset.annotations, detections, backend=backend)
        results["skipped_images"] = [message for _, messages in parts for message in messages]
    return Evaluation(broadcast(results, rank), detections, scorer)


def merged(parts: list[np.ndarray]) -> np.ndarray:
    """The ranks' detections in the order of the image ids; an image that several ranks have counts once."""
    rows, rank = np.concatenate(parts), np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    order = np.lexsort((rank, rows["image_id"]))
    rows, rank = rows[order], rank[order]
    last = np.searchsorted(rows["image_id"], rows["image_id"], side="right") - 1  # the last row of a row's image
    return rows[rank == rank[last]]


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
    return detect_batch(detector, [image], [image_id], category_ids, device, bf16=bf16)[0]


@torch.inference_mode()
def detect_batch(
    detector: FasterRCNN,
    images: Sequence[torch.Tensor],
    image_ids: Sequence[int],
    category_ids: list[int],
    device: torch.device,
    *,
    bf16: bool = False,
) -> list[np.ndarray]:
    """Images, uint8 [3, H, W] each, to the detections of each, as `detect` gives them.

    Images of one size go through the network together: nothing is padded for another's sake, so the boxes are those
    that each image has alone, up to rounding.
    """
    found: list[np.ndarray] = [np.empty(0, DETECTION)] * len(images)
    for shape in {image.shape: None for image in images}:
        which = [i for i, image in enumerate(images) if image.shape == shape]
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            outputs = detector([to_model_input(images[i], device) for i in which])
        columns = [torch.cat((o["boxes"], o["scores"][:, None], o["labels"][:, None]), 1) for o in outputs]
        rows = torch.cat(columns).cpu().double().numpy()  # a GPU is waited for once
        ends = np.cumsum([len(of_image) for of_image in columns])[:-1]
        for i, of_image in zip(which, np.split(rows, ends), strict=True):
            boxes, scores, labels = of_image[:, :4], of_image[:, 4], of_image[:, 5].astype(np.int64)
            boxes[:, 2:] -= boxes[:, :2]
            found[i] = np.empty(len(scores), DETECTION)
            found[i]["image_id"], found[i]["bbox"], found[i]["score"] = image_ids[i], boxes, scores
            found[i]["category_id"] = np.array(category_ids)[labels - 1]
    return found


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


def print_results(results: dict) -> None:
    """The 12 numbers and AP by class as a table, what was left out and why, and last one line with AP and AP50.

    Classes come by falling AP, those without boxes to find last; of more than CLASSES_SHOWN the others are counted.
    """
    table = Table("", *METRICS[:6], title="COCO box AP, percent")
    table.add_row("all classes", *(percent(results["bbox"][name]) for name in METRICS[:6]))
    table.add_section()
    table.add_row("", *METRICS[6:], style="bold")
    table.add_row("recall", *(percent(results["bbox"][name]) for name in METRICS[6:]))
    table.add_section()
    table.add_row("by class", "AP", "AP50", "boxes", style="bold")
    per_class = results["per_class"]
    classes = sorted(per_class.items(), key=lambda item: 1 if item[1]["AP"] is None else -item[1]["AP"])
    for name, entry in classes[:CLASSES_SHOWN]:
        table.add_row(name, percent(entry["AP"]), percent(entry["AP50"]), str(entry["boxes"]))
    progress_console.print(table)
    if len(classes) > CLASSES_SHOWN:
        progress_console.print(f"{len(classes) - CLASSES_SHOWN} more classes in results.json")
    if results["note"]:
        console.print(results["note"])
    for message in results["skipped_images"]:
        console.print(f"skipped {message}")
    ap, ap50 = (percent(results["bbox"][name]) for name in ("AP", "AP50"))
    console.print(f"AP {ap}, AP50 {ap50} on {results['images']} images")

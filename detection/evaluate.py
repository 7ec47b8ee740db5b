"""Detections to COCO AP: every image once on any number of ranks, scored by pycocotools on rank 0."""

import contextlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from rich.table import Table
from torch.utils.data import DataLoader

from detection.coco import BadImage, CocoImages, read_annotations
from detection.faster_rcnn import FasterRCNN
from detection.transforms import to_model_input
from resbackbone.atomic import write_atomically
from resbackbone.training.command import console
from resbackbone.training.distributed import Rank, RankShare, broadcast, gather

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def evaluate(
    detector: FasterRCNN,
    dataset: CocoImages,
    rank: Rank,
    *,
    workers: int = 0,
    bf16: bool = False,
    progress: Callable[[Iterator, int], Iterator] = lambda items, total: items,
) -> tuple[dict, list[dict]]:
    """Detect on every image of `dataset` and score: (results, detections).

    `results` is what results.json holds, the same on every rank; `detections`, in COCO's results format, are all of
    them on rank 0 and none elsewhere.
    `progress` wraps the loop over this rank's images; it is given their number. An image that cannot be read raises
    BadImage, or with the dataset's `skip_bad_images` counts as one without detections and is named in the results.
    A detection of a class that the data set has not is none (torchvision's detectors know the ids that COCO skips).
    """
    share = RankShare(len(dataset), rank=rank.rank, ranks=rank.ranks)
    loader = DataLoader(dataset, batch_size=None, sampler=share, num_workers=workers)
    category_ids, was_training = list(detector.categories), detector.training
    detector.eval()
    found: dict[int, list[dict]] = {}
    skipped: list[str] = []
    try:
        for sample in progress(iter(loader), len(share)):
            if isinstance(sample, BadImage):
                if not dataset.skip_bad_images:
                    raise sample
                skipped.append(str(sample))
                continue
            image, image_id = sample[0], sample[1]["image_id"]
            entries = detect(detector, image, image_id, category_ids, rank.device, bf16=bf16)
            found[image_id] = [e for e in entries if e["category_id"] in dataset.categories]
    finally:
        detector.train(was_training)
    parts = gather((found, skipped), rank)
    results, detections = None, []
    if parts is not None:
        merged: dict[int, list[dict]] = {}
        for part, _ in parts:
            merged |= part  # by image, so that one detected twice would still count once
        detections = [entry for image_id in sorted(merged) for entry in merged[image_id]]
        results = score(read_annotations(dataset.annotation_file), detections)
        results["skipped_images"] = [message for _, messages in parts for message in messages]
    return broadcast(results, rank), detections


@torch.inference_mode()
def detect(
    detector: FasterRCNN,
    image: torch.Tensor,
    image_id: int,
    category_ids: list[int],
    device: torch.device,
    *,
    bf16: bool = False,
) -> list[dict]:
    """One image, uint8 [3, H, W], to its detections in COCO's results format, the surest first.

    Images go one at a time: in a batch, padding changes the boxes slightly, and so would the number of ranks.
    """
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        output = detector([to_model_input(image, device)])[0]
    boxes, labels, scores = (output[name].cpu().double().numpy() for name in ("boxes", "labels", "scores"))
    boxes[:, 2:] -= boxes[:, :2]
    return [
        {"image_id": image_id, "category_id": category_ids[int(label) - 1], "bbox": box.tolist(), "score": float(score)}
        for box, label, score in zip(boxes, labels, scores, strict=True)
    ]


def score(ground_truth: dict, detections: list[dict]) -> dict:
    """The 12 COCO numbers for boxes, and those of each class, as fractions 0..1; None for what is undefined.

    `ground_truth` is an instances file's content; annotations that are not finite are left out, all else is as it
    is. Images without detections count. Without any detection every defined number is 0, and `note` says why.
    """
    truth = _coco(ground_truth, [dict(a) for a in ground_truth["annotations"] if np.isfinite(a["bbox"]).all()])
    note = None
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints as it goes
        if detections:
            found = truth.loadRes([dict(entry) for entry in detections])
        else:
            found = _coco(ground_truth, [])  # loadRes takes no empty list
            note = "no detections at all: no box scored above the detector's threshold, so every AP is 0"
        scorer = COCOeval(truth, found, "bbox")
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    if not truth.anns:
        note = "the annotations hold no box to be found, so no AP is defined"
    precision = scorer.eval["precision"]  # [IoU, recall, class, area, detections]
    per_class = {}
    for k, category in enumerate(scorer.params.catIds):
        entry = truth.cats[category]
        boxes = truth.getAnnIds(catIds=[category], iscrowd=False)
        ap, ap50 = (_mean(precision[which, :, k, 0, -1]) for which in (slice(None), 0))
        name = entry["name"] if entry["name"] not in per_class else f"{entry['name']} (id {category})"
        per_class[name] = {"AP": ap, "AP50": ap50, "boxes": len(boxes)}
    return {
        "bbox": dict(zip(METRICS, (None if value < 0 else float(value) for value in scorer.stats), strict=True)),
        "per_class": per_class,
        "images": len(truth.imgs),
        "detections": len(detections),
        "note": note,
    }


def _coco(content: dict, annotations: list[dict]) -> COCO:
    for i, annotation in enumerate(annotations):
        annotation["id"] = i + 1  # pycocotools takes an annotation with the id 0 for one not found
    coco = COCO()
    coco.dataset = {"images": content["images"], "categories": content["categories"], "annotations": annotations}
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _mean(values: np.ndarray) -> float | None:
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else None


def write_results(folder: Path, results: dict, detections: list[dict]) -> None:
    """Write `detections.json` (COCO's results format) and `results.json` into the run's folder."""
    write_atomically(folder / "detections.json", json.dumps(detections))
    write_atomically(folder / "results.json", json.dumps(results, indent=2) + "\n")


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

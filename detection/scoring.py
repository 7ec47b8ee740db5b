"""COCO box AP of detections in flat arrays, by hotcoco or pycocotools: the same numbers, bit for bit."""

import contextlib
import io
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import hotcoco
import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detection.annotations import Annotations
from resbackbone.checks import UserError, one_of

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
DETECTION = np.dtype(  # COCO's results format; bbox is x, y, width, height in pixels
    [("image_id", np.int64), ("category_id", np.int64), ("bbox", np.float64, 4), ("score", np.float64)]
)


def entries(detections: np.ndarray) -> Iterator[dict]:
    """DETECTION [n] as the dictionaries of COCO's results format, one after another."""
    names = DETECTION.names or ()
    columns = (detections[name].tolist() for name in names)
    return (dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True))


def score(annotations: Annotations, detections: np.ndarray, *, backend: str = "hotcoco") -> dict:
    """The 12 COCO box numbers and AP by class, as fractions 0..1 or None if undefined: the content of results.json.

    `detections`, DETECTION [n], may be in any order; of equal scores in an image the first ranks higher. Detections of
    unknown classes match nothing. `backend` is "hotcoco" (some hundred times faster) or "pycocotools", which always
    scores detections that are not finite, as the two differ there. Annotations that are not finite are left out.
    Without detections every defined number is 0, and `note` says why. Raises UserError if a detection is of an image
    that is not in the annotations.
    """
    one_of("COCO backend", backend, BACKENDS)
    unknown = ~np.isin(detections["image_id"], annotations.image_ids.numpy())
    if unknown.any():
        raise UserError(
            f"{unknown.sum()} of {len(detections)} detections are of images that are not in the annotations; the first "
            f"is of image {detections['image_id'][unknown][0]}"
        )
    truth = np.isfinite(annotations.boxes_xywh.numpy()).all(1)
    known = detections[np.isin(detections["category_id"], list(annotations.categories))]
    if not (np.isfinite(known["bbox"]).all() and np.isfinite(known["score"]).all()):
        backend = "pycocotools"
    with contextlib.redirect_stdout(io.StringIO()):  # both print progress
        scorer = evaluated(annotations, truth, known, backend=backend)
        scorer.accumulate()
        scorer.summarize()
    note = None
    if not len(detections):
        note = "no detections at all: no box scored above the detector's threshold, so every AP is 0"
    if not truth.any():
        note = "the annotations hold no box to be found, so no AP is defined"
    precision = scorer.eval["precision"]  # [IoU, recall, class, area, detections]
    to_find = truth & ~annotations.crowds.numpy()
    boxes = np.bincount(annotations.labels.numpy()[to_find], minlength=len(annotations.categories) + 1)[1:]
    per_class = {}
    for k, (category, name) in enumerate(annotations.categories.items()):
        ap, ap50 = (_mean(precision[which, :, k, 0, -1]) for which in (slice(None), 0))
        name = name if name not in per_class else f"{name} (id {category})"
        per_class[name] = {"AP": ap, "AP50": ap50, "boxes": int(boxes[k])}
    return {
        "bbox": dict(zip(METRICS, (None if value < 0 else float(value) for value in scorer.stats), strict=True)),
        "per_class": per_class,
        "images": len(annotations.image_ids),
        "detections": len(detections),
        "note": note,
    }


def evaluated(annotations: Annotations, truth: np.ndarray, detections: np.ndarray, *, backend: str = "hotcoco") -> Any:
    """The backend's COCOeval once it has matched `detections`, of known classes, with annotations: those of `truth`.

    `truth` is bool [M]. Ids become ranks from 1, since both backends hold them in float arrays, which are exact up to
    2^53 only. Their order matters: detections of equal score rank by image id.
    """
    image_ids, category_ids = np.sort(annotations.image_ids.numpy()), list(annotations.categories)
    image_rank = np.argsort(np.argsort(annotations.image_ids.numpy())) + 1
    columns = (
        image_rank[annotations.image_indices.numpy()[truth]],
        annotations.labels.numpy()[truth].astype(np.int64),
        annotations.boxes_xywh.numpy()[truth],
        annotations.areas.numpy()[truth],
        annotations.crowds.numpy()[truth].astype(np.int64),
    )
    images = np.searchsorted(image_ids, detections["image_id"]) + 1
    categories = np.searchsorted(category_ids, detections["category_id"]) + 1
    found = np.column_stack([images, detections["bbox"], detections["score"], categories])
    scorer = BACKENDS[backend](
        [{"id": i} for i in range(1, len(image_ids) + 1)],
        [{"id": i, "name": str(i)} for i in range(1, len(category_ids) + 1)],
        columns,
        found,
    )
    scorer.evaluate()
    return scorer


def _hotcoco(images: list[dict], categories: list[dict], columns: tuple, found: np.ndarray) -> hotcoco.COCOeval:
    *places, areas, crowds = columns
    wanted = hotcoco.COCO.from_arrays(images, categories, *places, area=areas, iscrowd=crowds)
    return hotcoco.COCOeval(wanted, wanted.load_res(found), "bbox")


def _pycocotools(images: list[dict], categories: list[dict], columns: tuple, found: np.ndarray) -> COCOeval:
    # Numbered from 1: pycocotools treats an annotation with the id 0 as unmatched.
    names = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
    rows = zip(itertools.count(1), *(column.tolist() for column in columns), strict=False)
    wanted, nothing = COCO(), COCO()
    nothing.dataset = {"images": images, "categories": categories, "annotations": []}
    wanted.dataset = {**nothing.dataset, "annotations": [dict(zip(names, row, strict=True)) for row in rows]}
    wanted.createIndex()
    nothing.createIndex()
    return COCOeval(wanted, wanted.loadRes(found) if len(found) else nothing, "bbox")  # loadRes takes no empty list


BACKENDS: dict[str, Callable] = {"hotcoco": _hotcoco, "pycocotools": _pycocotools}


def _mean(values: np.ndarray) -> float | None:
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else None

"""Which detections are right and which objects are missed, and the score that separates right from wrong best."""

from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from detection.coco import CocoImages, usable_boxes
from detection.scoring import evaluated

IOU = 0.5  # detections are right from this IoU on
SCORES = np.arange(1, 100) / 100  # the thresholds that are tried: 0.01 .. 0.99


class Outcome(NamedTuple):
    """How one image's detections match its objects; detections in a crowd of their class are left out."""

    image_index: int
    found: np.ndarray  # DETECTION [d], by falling score
    right: np.ndarray  # bool [d]
    taken_at: np.ndarray  # float [objects]: the score of the detection that took each, -inf for a missed one

    @property
    def seen(self) -> np.ndarray:
        """bool [objects]"""
        return np.isfinite(self.taken_at)

    @property
    def f1(self) -> float:
        """2 right / (detections + objects); 1 without either."""
        total = len(self.found) + len(self.seen)
        return 2 * self.right.sum() / total if total else 1.0

    @property
    def wrong(self) -> int:
        """Wrong detections and missed objects."""
        return int((~self.right).sum() + (~self.seen).sum())

    def above(self, score: float) -> "Outcome":
        """That of the detections from `score` on, as a detection takes its object from none with a higher score."""
        kept = self.found["score"] >= score
        taken_at = np.where(self.taken_at >= score, self.taken_at, -np.inf)
        return self._replace(found=self.found[kept], right=self.right[kept], taken_at=taken_at)


def match(dataset: CocoImages, detections: np.ndarray) -> tuple[Any, list[Outcome]]:
    """Match the detections of every image with its objects, as COCO's evaluation does: (hotcoco's COCOeval, outcomes).

    By falling score, each detection takes the free object of its class with the largest IoU of at least IOU.
    """
    annotations = dataset.annotations
    known = np.isin(detections["category_id"], list(dataset.categories)) & np.isfinite(detections["bbox"]).all(1)
    known &= np.isin(detections["image_id"], dataset.image_ids.numpy()) & np.isfinite(detections["score"])
    found = detections[known]
    found = found[np.lexsort((-found["score"], found["image_id"]))]
    truth = np.isfinite(annotations.boxes_xywh.numpy()).all(1)
    scorer = evaluated(annotations, truth, found)
    matched = scorer.image_diagnostics(IOU)  # by number from 1, without crowds and what is detected in them
    status = np.array([matched["dt_status"].get(number, "") for number in range(1, len(found) + 1)], str)
    rows = usable_boxes(annotations, Counter())[1]  # of the annotations, in the order of the data set's boxes
    by = [matched["gt_match"].get(number) for number in truth.cumsum()[rows].tolist()]
    taken_at = np.array([-np.inf if number is None else found["score"][number - 1] for number in by])
    found, status = found[status != ""], status[status != ""]
    result = []
    for index, image_id in enumerate(dataset.image_ids.tolist()):
        objects = slice(*dataset.offsets[index : index + 2].tolist())
        detected = slice(*np.searchsorted(found["image_id"], [image_id, image_id + 1]))
        result.append(Outcome(index, found[detected], status[detected] == "tp", taken_at[objects]))
    return scorer, result


class OverScores(NamedTuple):
    """Fractions, [99] each, of the detections from each of SCORES on; NaN where undefined."""

    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray

    @property
    def best(self) -> int | None:
        """The index of the threshold with the highest F1, the middle one of several; None if none finds an object."""
        if not np.nanmax(self.f1, initial=0):
            return None
        best = np.flatnonzero(self.f1 == np.nanmax(self.f1))
        return int(best[len(best) // 2])


def over_scores(scores: np.ndarray, right: np.ndarray, objects: int) -> OverScores:
    """Precision, recall and F1 of detections, of which some are `right`, over the lowest score that counts."""
    found, hits = (len(of) - np.searchsorted(np.sort(of), SCORES) for of in (scores, scores[right]))
    with np.errstate(invalid="ignore"):
        return OverScores(hits / found, hits / np.float64(objects), 2 * hits / np.float64(found + objects))

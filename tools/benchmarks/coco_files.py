"""COCO files of any size, made on the spot, and their loading and scoring here and by pycocotools."""

import contextlib
import gc
import io
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.contest import OWN, Contender

REFEREE = "pycocotools"
BOXES_AN_IMAGE = 7.3  # as in COCO train2017
CROWDS = 0.012  # of the boxes
CATEGORIES = 80
WIDTH, HEIGHT = 640, 480


def write_instances(path: Path, images: int) -> np.ndarray:
    """Write an instances file of so many images: random boxes, each with its four corners as its outline.

    Returns the boxes as rows image_id, x, y, width, height, category_id. The outlines of real files are longer.
    """
    rng = np.random.default_rng(0)
    image_ids = np.repeat(np.arange(1, images + 1), rng.poisson(BOXES_AN_IMAGE, images))
    count = len(image_ids)
    sides = np.exp(rng.uniform(np.log(8), np.log(400), (count, 2)))
    corners = rng.uniform(0, 1, (count, 2)) * ([WIDTH, HEIGHT] - sides)
    boxes = np.round(np.concatenate([corners.clip(0), sides], 1), 2)
    categories, crowds = rng.integers(1, CATEGORIES + 1, count), rng.random(count) < CROWDS
    rows = zip(image_ids.tolist(), boxes.tolist(), categories.tolist(), crowds.tolist(), strict=True)
    lines = (
        f'{{"id":{i},"image_id":{image},"category_id":{category},"bbox":[{x},{y},{w},{h}],"area":{w * h:.2f},'
        f'"iscrowd":{int(crowd)},"segmentation":[[{x},{y},{x + w:.2f},{y},{x + w:.2f},{y + h:.2f},{x},{y + h:.2f}]]}}'
        for i, (image, (x, y, w, h), category, crowd) in enumerate(rows, 1)
    )
    with open(path, "w") as file:
        file.write('{"images":[')
        names = (
            f'{{"id":{i},"file_name":"{i:012d}.jpg","width":{WIDTH},"height":{HEIGHT}}}' for i in range(1, images + 1)
        )
        file.write(",".join(names))
        file.write('],"categories":[')
        file.write(",".join(f'{{"id":{i},"name":"class {i}"}}' for i in range(1, CATEGORIES + 1)))
        file.write('],"annotations":[')
        file.write(",".join(lines))
        file.write("]}")
    return np.column_stack([image_ids, boxes, categories])


def detections_for(truth: np.ndarray, images: int, an_image: int) -> np.ndarray:
    """So many detections an image on average: most boxes of the truth, moved a little, and others anywhere.

    [n, 7], as pycocotools takes them: image_id, x, y, width, height, score, category_id.
    """
    rng = np.random.default_rng(1)
    total = images * an_image
    found = truth[rng.random(len(truth)) < 0.8][:total]
    moved = found[:, 1:5] + rng.normal(0, 0.08, (len(found), 4)) * np.tile(found[:, 3:5], 2)
    sides = np.exp(rng.uniform(np.log(8), np.log(400), (total - len(found), 2)))
    corners = rng.uniform(0, 1, sides.shape) * ([WIDTH, HEIGHT] - sides)
    elsewhere = np.concatenate([corners.clip(0), sides], 1)
    rows = np.empty((total, 7))
    rows[:, 0] = np.concatenate([found[:, 0], rng.integers(1, images + 1, len(sides))])
    rows[:, 1:5] = np.concatenate([np.maximum(moved, [0, 0, 1, 1]), elsewhere])
    rows[:, 5] = np.concatenate([rng.beta(4, 2, len(found)), rng.beta(1, 6, len(sides))])
    rows[:, 6] = np.concatenate([found[:, 5], rng.integers(1, CATEGORIES + 1, len(sides))])
    return rows[np.argsort(rows[:, 0], kind="stable")]


def scoring(annotations: Path, detections: Path, name: str) -> Contender:
    """Annotation file and detections in memory -> the 12 COCO numbers."""
    rows = np.load(detections)
    return Contender(_ours(annotations, rows) if name == OWN else _pycocotools(annotations, rows))


def _ours(annotations: Path, rows: np.ndarray):
    from detection.annotations import read_annotations
    from detection.scoring import DETECTION, score

    ours = np.empty(len(rows), DETECTION)
    ours["image_id"], ours["bbox"], ours["score"], ours["category_id"] = (
        rows[:, 0],
        rows[:, 1:5],
        rows[:, 5],
        rows[:, 6],
    )

    def run() -> Mapping[str, Tensor]:
        box = score(read_annotations(annotations), ours, backend="hotcoco")["bbox"]
        return {"numbers": torch.tensor([-1.0 if x is None else x for x in box.values()], dtype=torch.float64)}

    return run


def _pycocotools(annotations: Path, rows: np.ndarray):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def run() -> Mapping[str, Tensor]:
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO(str(annotations))
            scorer = COCOeval(truth, truth.loadRes(rows), "bbox")
            scorer.evaluate()
            scorer.accumulate()
            scorer.summarize()
        return {"numbers": torch.from_numpy(scorer.stats)}

    return run


def loading(annotations: Path, name: str) -> Contender:
    """Annotation file -> what answers which boxes an image has."""
    kept: list[object] = []  # what is loaded; it is freed before the next run, which is not timed

    if name == OWN:
        from detection.annotations import read_annotations

        def load():
            return read_annotations(annotations)

        def sizes(loaded) -> tuple[int, int]:
            return len(loaded.image_ids), len(loaded.boxes_xywh)
    else:
        from pycocotools.coco import COCO

        def load():
            with contextlib.redirect_stdout(io.StringIO()):
                return COCO(str(annotations))

        def sizes(loaded) -> tuple[int, int]:
            return len(loaded.imgs), len(loaded.anns)

    def clock() -> float:
        kept.clear()
        gc.collect()
        began = time.perf_counter()
        kept.append(load())
        return time.perf_counter() - began

    def run() -> Mapping[str, Tensor]:
        clock()
        images, boxes = sizes(kept[0])
        return {"images": torch.tensor(images), "boxes": torch.tensor(boxes)}

    return Contender(run, clock=clock)

"""COCO scoring by this package and by pycocotools.

Modules that a machine which only times networks may lack are imported where they are used.
"""

import contextlib
import io
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from resbackbone.tools.benchmarks.contest import OWN, Contender, Workload

CATEGORIES, WIDTH, HEIGHT = 80, 640, 480
BOXES, DETECTIONS = 7, 100  # of an image; COCO train2017 has 7.3 boxes


def write_instances(path: Path, images: int) -> np.ndarray:
    """Write a COCO instances file of random boxes, 1.2% of them crowds; return detections for it.

    The detections are moved boxes of the file, some with their class and high scores, most with others: [n, 7], as
    pycocotools takes them: image_id, x, y, width, height, score, category_id.
    """
    rng = np.random.default_rng(0)
    sides = np.exp(rng.uniform(np.log(8), np.log(400), (images * BOXES, 2)))  # pixels
    corners = rng.uniform(0, 1, sides.shape) * ([WIDTH, HEIGHT] - sides)
    boxes = np.concatenate([corners, sides], 1).round(2)
    image_ids = np.repeat(np.arange(1, images + 1), BOXES)
    categories = rng.integers(1, CATEGORIES + 1, len(boxes))
    annotations = [
        {"id": i, "image_id": int(image_id), "category_id": int(category), "bbox": box, "area": box[2] * box[3]}
        | {"iscrowd": int(rng.random() < 0.012)}
        for i, (image_id, category, box) in enumerate(zip(image_ids, categories, boxes.tolist(), strict=True), 1)
    ]
    size = {"width": WIDTH, "height": HEIGHT}
    content = {
        "images": [{"id": i, "file_name": f"{i:012d}.jpg", **size} for i in range(1, images + 1)],
        "categories": [{"id": i, "name": f"class {i}"} for i in range(1, CATEGORIES + 1)],
        "annotations": annotations,
    }
    path.write_text(json.dumps(content))
    chosen = np.sort(rng.integers(len(boxes), size=images * DETECTIONS))
    right = rng.random(len(chosen)) < BOXES / DETECTIONS
    moved = boxes[chosen] + rng.normal(0, 0.08, (len(chosen), 4)) * np.tile(boxes[chosen, 2:], 2)
    scores = np.where(right, rng.beta(4, 2, len(chosen)), rng.beta(1, 6, len(chosen)))
    found = np.where(right, categories[chosen], rng.integers(1, CATEGORIES + 1, len(chosen)))
    return np.column_stack([image_ids[chosen], np.maximum(moved, [0, 0, 1, 1]), scores, found])


def contender(work: Workload, name: str) -> Contender:
    """Annotation file and detections in memory, of as many images as the workload says -> the 12 COCO numbers."""
    folder = tempfile.TemporaryDirectory()  # removed with the contender
    detections = write_instances(Path(folder.name, "instances.json"), work.batch_size)
    if name == OWN:
        from detection.annotations import read_annotations
        from detection.scoring import DETECTION, score

        found = np.empty(len(detections), DETECTION)
        found["image_id"], found["bbox"] = detections[:, 0], detections[:, 1:5]
        found["score"], found["category_id"] = detections[:, 5], detections[:, 6]

        def run() -> dict[str, Tensor]:
            box = score(read_annotations(Path(folder.name, "instances.json")), found)["bbox"]
            return {"numbers": torch.tensor([-1.0 if x is None else x for x in box.values()], dtype=torch.float64)}

    else:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        def run() -> dict[str, Tensor]:
            with contextlib.redirect_stdout(io.StringIO()):
                truth = COCO(Path(folder.name, "instances.json"))
                scorer = COCOeval(truth, truth.loadRes(detections), "bbox")
                scorer.evaluate()
                scorer.accumulate()
                scorer.summarize()
            return {"numbers": torch.from_numpy(scorer.stats)}

    return Contender(run)

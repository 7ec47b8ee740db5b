"""Jobs on data: COCO files loaded and scored, images read for ImageNet training.

Modules that a machine which only times networks may lack are imported where they are used.
"""

import contextlib
import gc
import io
import json
import time
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detection.shapes import make_shapes
from resbackbone.tools.benchmarks.contest import OWN, Contender
from resbackbone.weights.inputs import MEAN, STD

REFEREE = "pycocotools"
BOXES_AN_IMAGE = 7.3  # as in COCO train2017
CROWDS = 0.012  # of the boxes
CATEGORIES = 80
WIDTH, HEIGHT = 640, 480
DETECTIONS_AN_IMAGE = 100
PLAIN, FILES = "PIL + torchvision", f"{OWN}, files as they are"
SHARDS = {f"{OWN}, shards of {side} pixels": side for side in (320, 256)}
PIPELINES = (FILES, *SHARDS, PLAIN)
INPUT_IMAGES, INPUT_BATCH, CROP = 100, 20, 224  # images in a round and in a batch; the side of the crop in pixels


def write_instances(path: Path, images: int) -> np.ndarray:
    """Write a COCO instances file: random boxes, each with its four corners as its outline.

    Returns the boxes as rows image_id, x, y, width, height, category_id. The outlines of real files are longer.
    """
    rng = np.random.default_rng(0)
    image_ids = np.repeat(np.arange(1, images + 1), rng.poisson(BOXES_AN_IMAGE, images))
    sides = np.exp(rng.uniform(np.log(8), np.log(400), (len(image_ids), 2)))  # pixels
    corners = rng.uniform(0, 1, sides.shape) * ([WIDTH, HEIGHT] - sides)
    boxes = np.concatenate([corners.clip(0), sides], 1).round(2)
    categories = rng.integers(1, CATEGORIES + 1, len(boxes))
    crowds = (rng.random(len(boxes)) < CROWDS).astype(int)
    columns = [column.tolist() for column in (image_ids, categories, boxes, crowds)]
    size = {"width": WIDTH, "height": HEIGHT}
    content = {
        "images": [{"id": i, "file_name": f"{i:012d}.jpg", **size} for i in range(1, images + 1)],
        "categories": [{"id": i, "name": f"class {i}"} for i in range(1, CATEGORIES + 1)],
        "annotations": [
            {"id": i, "image_id": image_id, "category_id": category, "iscrowd": crowd, "bbox": [x, y, w, h]}
            | {"area": round(w * h, 2), "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]}
            for i, (image_id, category, (x, y, w, h), crowd) in enumerate(zip(*columns, strict=True), 1)
        ],
    }
    path.write_text(json.dumps(content, separators=(",", ":")))
    return np.column_stack([image_ids, boxes, categories])


def detections_for(truth: np.ndarray, images: int) -> np.ndarray:
    """DETECTIONS_AN_IMAGE on average, moved boxes of the truth: some with its class and high scores, most with others.

    [n, 7], as pycocotools takes them: image_id, x, y, width, height, score, category_id.
    """
    rng = np.random.default_rng(1)
    rows = truth[np.sort(rng.integers(len(truth), size=images * DETECTIONS_AN_IMAGE))]
    right = rng.random(len(rows)) < BOXES_AN_IMAGE / DETECTIONS_AN_IMAGE
    boxes = rows[:, 1:5] + rng.normal(0, 0.08, (len(rows), 4)) * np.tile(rows[:, 3:5], 2)
    scores = np.where(right, rng.beta(4, 2, len(rows)), rng.beta(1, 6, len(rows)))
    categories = np.where(right, rows[:, 5], rng.integers(1, CATEGORIES + 1, len(rows)))
    return np.column_stack([rows[:, 0], np.maximum(boxes, [0, 0, 1, 1]), scores, categories])


def scoring(annotations: Path, detections: np.ndarray, name: str) -> Contender:
    """Annotation file and detections in memory -> the 12 COCO numbers."""
    if name == OWN:
        from detection.annotations import read_annotations
        from detection.scoring import DETECTION, score

        found = np.empty(len(detections), DETECTION)
        found["image_id"], found["bbox"] = detections[:, 0], detections[:, 1:5]
        found["score"], found["category_id"] = detections[:, 5], detections[:, 6]

        def run() -> Mapping[str, Tensor]:
            box = score(read_annotations(annotations), found, backend="hotcoco")["bbox"]
            return {"numbers": torch.tensor([-1.0 if x is None else x for x in box.values()], dtype=torch.float64)}

    else:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        def run() -> Mapping[str, Tensor]:
            with contextlib.redirect_stdout(io.StringIO()):
                truth = COCO(annotations)
                scorer = COCOeval(truth, truth.loadRes(detections), "bbox")
                scorer.evaluate()
                scorer.accumulate()
                scorer.summarize()
            return {"numbers": torch.from_numpy(scorer.stats)}

    return Contender(run)


def loading(annotations: Path, name: str) -> Contender:
    """Annotation file -> an object that knows the boxes of each image."""
    if name == OWN:
        from detection.annotations import read_annotations as load

        fields = {"images": "image_ids", "boxes": "boxes_xywh"}
    else:
        from pycocotools.coco import COCO as load  # type: ignore[no-redef]  # noqa: N813

        fields = {"images": "imgs", "boxes": "anns"}
    loaded: list[object] = []  # freed before the next run, outside of its time

    def clock() -> float:
        loaded.clear()
        gc.collect()
        began = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            loaded.append(load(annotations))
        return time.perf_counter() - began

    def run() -> Mapping[str, Tensor]:
        clock()
        return {name: torch.tensor(len(getattr(loaded[0], field))) for name, field in fields.items()}

    return Contender(run, clock=clock)


def reading(folder: Path, scratch: Path, name: str) -> Contender:
    """Encoded images -> normalized fp32 batches [B, 3, 224, 224], in one thread without worker processes.

    Decoding, RandomResizedCrop, flip, batching and normalizing. The time is that of the processor (user and system),
    which other processes disturb less than the clock; the files are in the system's cache after the first run.
    """
    from torch.utils.data import DataLoader
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    from resbackbone.classification.data import train_batches
    from resbackbone.classification.images import FolderImages
    from resbackbone.classification.transforms import TrainAugment, to_model_input

    cpu = torch.device("cpu")
    batches: Any
    if name == PLAIN:  # what the examples of torchvision and PyTorch do
        steps = [transforms.RandomResizedCrop(CROP), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
        dataset = ImageFolder(str(folder), transforms.Compose([*steps, transforms.Normalize(MEAN, STD)]))
        batches = DataLoader(dataset, INPUT_BATCH, shuffle=True)
    else:
        images = FolderImages(folder.resolve()) if name == FILES else shards(folder, scratch, SHARDS[name])
        batches = train_batches(images, batch_size=INPUT_BATCH, transform=TrainAugment(CROP), seed=0, device=cpu)

    def clock() -> float:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            began = time.process_time()
            for batch in islice(batches, INPUT_IMAGES // INPUT_BATCH):
                if name != PLAIN:
                    to_model_input(batch[0], cpu)
            return time.process_time() - began
        finally:
            torch.set_num_threads(threads)

    def run() -> None:  # its batches are drawn at random, so there is nothing to compare
        clock()

    return Contender(run, clock=clock)


def shards(folder: Path, scratch: Path, side: int):
    """The images in shards, as tools/make_shards.py writes them."""
    from resbackbone.classification.data import open_images
    from resbackbone.tools import make_shards

    data, output = scratch / "data", scratch / f"shards-{side}"
    if not data.exists():
        data.mkdir()
        (data / "train").symlink_to(folder.resolve())
    make_shards.main(["--data", str(data), "--output", str(output), "--shorter-side", str(side), "--workers", "1"])
    last = len(list(output.glob("train-*.tar"))) - 1
    return open_images(f"{output}/train-{{000000..{last:06d}}}.tar", "train")


def drawn_images(scratch: Path) -> Path:
    """A class folder of JPEGs about as large as ImageNet's."""
    drawn = make_shapes(scratch / "drawn", train_images=INPUT_IMAGES, val_images=1, size=424)
    (scratch / "images").mkdir()
    (drawn / "train2017").rename(scratch / "images" / "class")
    return scratch / "images"

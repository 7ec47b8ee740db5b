"""Jobs on data: COCO files loaded and scored, batches drawn from an index, images read for ImageNet training.

Modules that a machine which only times networks may lack are imported where they are used.
"""

import contextlib
import gc
import io
import json
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from resbackbone.tools.benchmarks.contest import OWN, Contender
from resbackbone.weights.inputs import MEAN, STD

REFEREE = "pycocotools"
BOXES_AN_IMAGE = 7.3  # as in COCO train2017
CROWDS = 0.012  # of the boxes
CATEGORIES = 80
WIDTH, HEIGHT = 640, 480
DETECTIONS_AN_IMAGE = 100
INDEX_SIZES = (1_000, 10_000, 100_000, 1_000_000)  # images
INDEXES = tuple(f"{OWN}, {size:,} images" for size in INDEX_SIZES)
BATCHES, BATCH_SIZE = 1000, 16
PORTRAIT = 0.27  # of the images of an index; the rest are landscape
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
    boxes = random_boxes(rng, len(image_ids)).round(2)
    categories = rng.integers(1, CATEGORIES + 1, len(image_ids))
    crowds = (rng.random(len(image_ids)) < CROWDS).astype(int)
    x1, y1, width, height = boxes.T
    x2, y2 = (x1 + width).round(2), (y1 + height).round(2)
    outlines = np.stack([x1, y1, x2, y1, x2, y2, x1, y2], 1)
    columns = (image_ids, categories, boxes, (width * height).round(2), crowds, outlines[:, None])
    names = ("image_id", "category_id", "bbox", "area", "iscrowd", "segmentation")
    rows = zip(*(column.tolist() for column in columns), strict=True)
    content = {
        "images": [
            {"id": i, "file_name": f"{i:012d}.jpg", "width": WIDTH, "height": HEIGHT} for i in range(1, images + 1)
        ],
        "categories": [{"id": i, "name": f"class {i}"} for i in range(1, CATEGORIES + 1)],
        "annotations": [{"id": i, **dict(zip(names, row, strict=True))} for i, row in enumerate(rows, 1)],
    }
    path.write_text(json.dumps(content, separators=(",", ":")))
    return np.column_stack([image_ids, boxes, categories])


def random_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """[count, 4]: x, y, width, height in pixels; sides from 8 to 400."""
    sides = np.exp(rng.uniform(np.log(8), np.log(400), (count, 2)))
    corners = rng.uniform(0, 1, (count, 2)) * ([WIDTH, HEIGHT] - sides)
    return np.concatenate([corners.clip(0), sides], 1)


def detections_for(truth: np.ndarray, images: int) -> np.ndarray:
    """DETECTIONS_AN_IMAGE on average: most boxes of the truth, moved a little, and others anywhere.

    [n, 7], as pycocotools takes them: image_id, x, y, width, height, score, category_id.
    """
    rng = np.random.default_rng(1)
    total = images * DETECTIONS_AN_IMAGE
    found = truth[rng.random(len(truth)) < 0.8][:total]
    others = total - len(found)
    moved = found[:, 1:5] + rng.normal(0, 0.08, (len(found), 4)) * np.tile(found[:, 3:5], 2)
    image_ids = np.concatenate([found[:, 0], rng.integers(1, images + 1, others)])
    boxes = np.concatenate([np.maximum(moved, [0, 0, 1, 1]), random_boxes(rng, others)])
    scores = np.concatenate([rng.beta(4, 2, len(found)), rng.beta(1, 6, others)])
    categories = np.concatenate([found[:, 5], rng.integers(1, CATEGORIES + 1, others)])
    return np.column_stack([image_ids, boxes, scores, categories])[np.argsort(image_ids, kind="stable")]


def scoring(annotations: Path, detections: Path, name: str) -> Contender:
    """Annotation file and detections in memory -> the 12 COCO numbers."""
    rows = np.load(detections)
    if name == OWN:
        from detection.annotations import read_annotations
        from detection.scoring import DETECTION, score

        found = np.empty(len(rows), DETECTION)
        for field, columns in {"image_id": 0, "bbox": slice(1, 5), "score": 5, "category_id": 6}.items():
            found[field] = rows[:, columns]

        def run() -> Mapping[str, Tensor]:
            box = score(read_annotations(annotations), found, backend="hotcoco")["bbox"]
            return {"numbers": torch.tensor([-1.0 if x is None else x for x in box.values()], dtype=torch.float64)}

    else:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        def run() -> Mapping[str, Tensor]:
            with contextlib.redirect_stdout(io.StringIO()):
                truth = COCO(annotations)
                scorer = COCOeval(truth, truth.loadRes(rows), "bbox")
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


class Index:
    """What the sampler needs of a data set: widths and heights in pixels, int32 [images, 2]."""

    def __init__(self, images: int):
        portrait = np.random.default_rng(0).random(images) < PORTRAIT
        self.widths_heights = np.where(portrait[:, None], [480, 640], [640, 480]).astype(np.int32)


def drawing(name: str) -> Contender:
    """The first BATCHES batches of a training, including the work that is done once an epoch."""
    from detection.sampler import TrainBatches

    index = Index(INDEX_SIZES[INDEXES.index(name)])

    def run() -> dict:
        batches = iter(TrainBatches(index, batch_size=BATCH_SIZE, seed=0))  # type: ignore[arg-type]
        for _ in islice(batches, BATCHES):
            pass
        return {"batches": batches}  # its memory counts

    return Contender(run, check=dict)  # nothing to compare: the data differ


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

    batches: Iterable
    if name == PLAIN:  # what the examples of torchvision and PyTorch do
        steps = [transforms.RandomResizedCrop(CROP), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
        dataset = ImageFolder(str(folder), transforms.Compose([*steps, transforms.Normalize(MEAN, STD)]))
        batches, finish = DataLoader(dataset, INPUT_BATCH, shuffle=True), lambda batch: batch
    else:
        images = FolderImages(folder.resolve()) if name == FILES else shards(folder, scratch, SHARDS[name])
        cpu = torch.device("cpu")
        batches = train_batches(images, batch_size=INPUT_BATCH, transform=TrainAugment(CROP), seed=0, device=cpu)
        finish = lambda batch: to_model_input(batch[0], cpu)  # noqa: E731

    def run() -> None:
        for batch in islice(batches, INPUT_IMAGES // INPUT_BATCH):
            finish(batch)

    return Contender(run, clock=partial(on_one_core, run))


def on_one_core(run: Callable[[], None]) -> float:
    """Seconds of processor time with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        began = time.process_time()
        run()
        return time.process_time() - began
    finally:
        torch.set_num_threads(threads)


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


def noise_images(folder: Path) -> Path:
    """Write JPEGs about as large as ImageNet's (456 x 394 pixels, 100 KB) into two class folders."""
    rng = np.random.default_rng(0)
    for i in range(INPUT_IMAGES):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 14, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((456, 394), Image.Resampling.BICUBIC)) + rng.normal(0, 12, (394, 456, 3))
        path = folder / f"class{i % 2}" / f"{i:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=92)
    return folder

"""Images a second that one core makes ready for training, beside the plain pipeline of PIL and torchvision.

python tools/benchmark_input.py --data imagenet/train               class folders; a hundred images are enough
python tools/benchmark_input.py --data imagenet/train --rounds 31

Each row goes from encoded files on disk to normalized fp32 batches [B, 3, 224, 224], in one process without workers:
decoding, RandomResizedCrop, flip, batching, normalizing. The rows take turns in an order that is shuffled each round.
What is compared is the processor time of a round (user and system), which others on the machine disturb less than the
clock, and the ratio is the median over the rounds of plain / row within a round. Files are in the system's cache after
the first round, which is not counted: the figures are of the processor, not of the disk.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from resbackbone.cli.command import console, main_of, parse

import numpy as np
import torch
from PIL import Image
from rich import box
from rich.table import Table
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from resbackbone.classification.data import open_images, train_batches
from resbackbone.classification.images import FolderImages, Images
from resbackbone.classification.transforms import TrainAugment, to_model_input
from resbackbone.tools import make_shards
from resbackbone.tools.benchmarks.contest import Contender, Contest
from resbackbone.tools.benchmarks.report import Spread, rows_of
from resbackbone.tools.benchmarks.rounds import Session, hold
from resbackbone.weights.inputs import MEAN, STD

CPU = torch.device("cpu")
PLAIN = "PIL + torchvision"


@dataclass(frozen=True)
class Options:
    """Images a second that one core makes ready for training, beside the plain pipeline of PIL and torchvision."""

    data: Path
    """A folder of class folders with JPEGs."""
    size: int = 224
    """Side of the crop."""
    batch_size: int = 20
    """Images in a batch."""
    images: int = 100
    """Images in a round, the first of an epoch's order."""
    rounds: int = 15
    """Rounds that are counted."""


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Folder -> table of images a second and ratios; the ratios by row."""
    options = parse(Options, argv)
    with tempfile.TemporaryDirectory() as scratch:
        contest = pipelines(options, Path(scratch))
        result = contest.empty_result()
        hold(contest, result, Session("cpu", rounds=options.rounds))
    return report(result, options)


def pipelines(options: Options, scratch: Path) -> Contest:
    """A contest between the rows; `scratch` is a folder for the shards."""
    rows = {
        "resbackbone, files as they are": ours(FolderImages(options.data.resolve()), options),
        **{
            f"resbackbone, shards of {side} pixels": ours(shards(scratch, side, options), options)
            for side in (320, 256)
        },
        PLAIN: plain(options.data, options),
    }
    images = options.images // options.batch_size * options.batch_size
    heading = f"ImageNet input pipeline, one core, {images} images"
    build = {name: Contender(run, clock=partial(on_one_core, run)) for name, run in rows.items()}.__getitem__
    return Contest("input", heading, tuple(rows), build, reference=PLAIN, items=(images,) * len(rows))


def on_one_core(run: Callable[[], None]) -> float:
    """Seconds of processor time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        began = time.process_time()
        run()
        return time.process_time() - began
    finally:
        torch.set_num_threads(threads)


def plain(folder: Path, options: Options) -> Callable[[], None]:
    """A round of what torchvision's and PyTorch's examples do."""
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(options.size),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    loader = DataLoader(ImageFolder(str(folder), transform), options.batch_size, shuffle=True)

    def one_round() -> None:
        for _ in islice(loader, options.images // options.batch_size):
            pass

    return one_round


def ours(images: Images, options: Options) -> Callable[[], None]:
    """A round of this package's batches."""
    batches = train_batches(
        images, batch_size=options.batch_size, transform=TrainAugment(options.size), seed=0, device=CPU
    )

    def one_round() -> None:
        for pixels, _ in islice(batches, options.images // options.batch_size):
            to_model_input(pixels, CPU)

    return one_round


def shards(scratch: Path, side: int, options: Options) -> Images:
    """The same images in shards, as tools/make_shards.py writes them."""
    data, output = scratch / "data", scratch / f"shards-{side}"
    if not data.exists():
        data.mkdir()
        (data / "train").symlink_to(options.data.resolve())
    make_shards.main(["--data", str(data), "--output", str(output), "--shorter-side", str(side), "--workers", "1"])
    last = len(list(output.glob("train-*.tar"))) - 1
    return open_images(f"{output}/train-{{000000..{last:06d}}}.tar", "train")


def noise_images(folder: Path, count: int) -> Path:
    """JPEGs about as large as ImageNet's (456 x 394 pixels, 100 KB), in two class folders."""
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 14, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((456, 394), Image.Resampling.BICUBIC)) + rng.normal(0, 12, (394, 456, 3))
        path = folder / f"class{i % 2}" / f"{i:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=92)
    return folder


def report(result: dict, options: Options) -> dict[str, float]:
    """Print the table; the median ratio of the plain pipeline's time to each row's."""
    table = Table("pipeline, one core", "images/s", "ratio", "middle half", box=box.SIMPLE_HEAD)
    table.columns[0].no_wrap = True
    ratios = {}
    for row in sorted(rows_of(result), key=lambda row: row.name != PLAIN):
        each = [plain / own for plain, own in zip(result["seconds"][PLAIN], result["seconds"][row.name], strict=True)]
        low, ratios[row.name], high = Spread.of(each)
        table.add_row(row.name, f"{row.images_per_second:.0f}", f"{ratios[row.name]:.2f}", f"{low:.2f} .. {high:.2f}")
    console.print(table)
    console.print(
        f"{result['items'][PLAIN]} images a round, {options.rounds} rounds taken in turns, medians of processor time; "
        f"torch {torch.__version__}"
    )
    return ratios


if __name__ == "__main__":
    main_of(main)

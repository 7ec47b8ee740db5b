"""Images a second that one core makes ready for training, beside the plain pipeline of PIL and torchvision.

python tools/benchmark_input.py --data imagenet/train               class folders; a hundred images are enough
python tools/benchmark_input.py --data imagenet/train --rounds 31

Each row goes from encoded files on disk to normalized fp32 batches [B, 3, 224, 224], in one process without workers:
decoding, RandomResizedCrop, flip, batching, normalizing. The rows take turns, round by round, each starting one round
in as many; what is compared is the processor time of a round (user and system), which others on the machine disturb
less than the clock, and the ratio is the median over the rounds of plain / row within a round. Files are in the
system's cache after the first round, which is not counted: the figures are of the processor, not of the disk.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import make_shards
import torch
from rich import box
from rich.table import Table
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from resbackbone.classification.images import FolderImages, Images, open_images, train_batches
from resbackbone.classification.transforms import TrainAugment, to_model_input
from resbackbone.training.command import console, main_of, parse
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
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        seconds = measure(pipelines(options, scratch), options.rounds)
    return report(seconds, options)


def pipelines(options: Options, scratch: str) -> dict[str, Callable[[], None]]:
    """A round of each row; `scratch` is a folder for the shards."""
    rows = {
        PLAIN: plain(options.data, options),
        "resbackbone, files as they are": ours(FolderImages(options.data.resolve()), options),
    }
    for side in (320, 256):
        rows[f"resbackbone, shards of {side} pixels"] = ours(shards(scratch, side, options), options)
    return rows


def plain(folder: Path, options: Options) -> Callable[[], None]:
    """What torchvision's and PyTorch's examples do."""
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(options.size),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    return over(ImageFolder(str(folder), transform), options)


def over(dataset: ImageFolder, options: Options) -> Callable[[], None]:
    """A round of a data set in a shuffled DataLoader."""
    loader = DataLoader(dataset, options.batch_size, shuffle=True)

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


def shards(scratch: str, side: int, options: Options) -> Images:
    """The same images in shards, as tools/make_shards.py writes them."""
    data, output = Path(scratch) / "data", Path(scratch) / f"shards-{side}"
    if not data.exists():
        data.mkdir()
        (data / "train").symlink_to(options.data.resolve())
    make_shards.main(["--data", str(data), "--output", str(output), "--shorter-side", str(side), "--workers", "1"])
    last = len(list(output.glob("train-*.tar"))) - 1
    return open_images(f"{output}/train-{{000000..{last:06d}}}.tar", "train")


def measure(rows: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of processor time of each round of each row; a first round is not counted."""
    seconds = {name: [] for name in rows}
    names = list(rows)
    for i in range(rounds + 1):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            began = time.process_time()
            rows[name]()
            if i:
                seconds[name].append(time.process_time() - began)
    return seconds


def report(seconds: dict[str, list[float]], options: Options) -> dict[str, float]:
    """Print the table; the median ratio of each row to the first."""
    table = Table("pipeline, one core", "images/s", "ratio", "middle half", box=box.SIMPLE_HEAD)
    table.columns[0].no_wrap = True
    images = options.images // options.batch_size * options.batch_size
    base, ratios = next(iter(seconds.values())), {}
    for name, times in seconds.items():
        each = [plain / own for plain, own in zip(base, times, strict=True)]
        low, ratios[name], high = statistics.quantiles(each, n=4)
        table.add_row(
            name, f"{images / statistics.median(times):.0f}", f"{ratios[name]:.2f}", f"{low:.2f} .. {high:.2f}"
        )
    console.print(table)
    console.print(
        f"{images} images a round, {options.rounds} rounds taken in turns, medians of processor time; "
        f"torch {torch.__version__}"
    )
    return ratios


if __name__ == "__main__":
    main_of(main)

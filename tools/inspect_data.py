"""Look at a data set before training: what it holds, what is odd about it, and what a detector will see of it.

python tools/inspect_data.py my_folder
python tools/inspect_data.py my_folder --output report

Writes data.html, one page with tables, charts and pictures that works without a network, and data.json with the same
numbers; `detection.statistics.DataStatistics` documents its keys. Files of equal sizes are compared byte for byte in
sets where these are under 2 GB, and images decoded in splits of up to 64 MB; the report says where that was left out.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from resbackbone.cli.command import Auto, console, main_of, parse, progress_console
from resbackbone.cli.errors import from_option

import tyro

from detection.data import open_checked
from detection.data_report import data_sections
from detection.layouts import describe_layout, whole_splits
from detection.statistics import describe
from resbackbone.atomic import write_atomically, write_json
from resbackbone.report.page import page


@dataclass(frozen=True)
class Options:
    """Report on a data set: classes, sizes, duplicates, leaks between splits and suspicious boxes."""

    data: tyro.conf.Positional[Path]
    """The data set, as tools/train_coco.py takes it: a folder, its data.yaml, or a COCO file beside its images."""
    output: Auto[Path] = None
    """Folder for data.html and data.json; existing ones are replaced. Default: runs/data-NAME, by the data's folder."""
    quiet: bool = False
    """Print only what to look at, and the page's path."""


def main(argv: list[str] | None = None) -> None:
    """A folder of data -> its splits -> statistics -> a page and the same as JSON."""
    options = parse(Options, argv)
    layout = describe_layout(options.data)
    names = ["train", "val", *(["test"] if "test" in whole_splits(options.data) else [])]
    splits = {name: open_checked(options.data, name, skip_bad_images=True) for name in names}
    progress_console.print(f"data:  {layout}")
    for split, dataset in splits.items():
        progress_console.print(f"{split + ':':6} {dataset.summary()}")
    data = describe(splits)
    name = options.data.resolve().name
    folder = options.output or Path("runs") / f"data-{name}"
    with from_option("--output"):
        folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "data.json", {"data": str(options.data), **asdict(data)}, indent=1)
    subtitle = f"{', '.join(splits)} in {options.data}"
    write_atomically(folder / "data.html", page(f"Data set {name}", subtitle, data_sections(splits, data)))
    for line in data.findings:
        console.print(line)
    console.print(f"written: {folder / 'data.html'}, {folder / 'data.json'}")


def run() -> None:
    main_of(main)


if __name__ == "__main__":
    run()

"""Evaluate a trained detector: the 12 COCO numbers, a table by class, detections.json and results.json.

python tools/evaluate_coco.py runs/shapes-r18-fpn-short
python tools/evaluate_coco.py runs/mine --split test
python tools/evaluate_coco.py runs/mine --data coco --output scores
python tools/evaluate_coco.py runs/mine --box-refinement --scales 200 400 600 800 1000     as the ResNet paper tests
python tools/evaluate_coco.py runs/mine --tta     at nine sizes, each mirrored too
"""

import contextlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from resbackbone.cli.command import Auto, Several, be_quiet, console, main_of, parse
from resbackbone.cli.errors import from_option
from resbackbone.cli.options import launch_command
from resbackbone.cli.training import Session

import torch
import tyro

from detection.coco import OtherClasses
from detection.data import open_split
from detection.evaluate import evaluate, results_summary, results_table, write_results
from detection.faster_rcnn import prepare_for_detection
from detection.layouts import data_of, describe_layout
from detection.paper import ImprovedTesting
from detection.saved import detector_file, load_detector, run_folder
from detection.scoring import BACKENDS
from detection.splits import SPLIT_NAMES
from detection.tta import TestTimeAugmentation
from resbackbone.checks import UserError, one_of
from resbackbone.engine.best import is_best
from resbackbone.engine.device import INFERENCE, choose_precision
from resbackbone.engine.distributed import Rank, from_main
from resbackbone.engine.run import read_yaml


@dataclass(frozen=True)
class Options:
    """Evaluate a trained detector on a split of a data set."""

    run: tyro.conf.Positional[str]
    """A run's folder, a weight file of a Faster R-CNN (ours, torchvision's, detectron2's, mmdetection's), or a named
    source: torchvision:FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1."""
    data: Auto[Path] = None
    """Folder of data, as tools/train_coco.py takes it. Default: the data the run was trained on."""
    split: str = "val"
    """val, test or train; or all images of --data that has no splits, of which val is a tenth."""
    output: Auto[Path] = None
    """Folder for detections.json and results.json. Default: the run's folder, or eval-NAME/ in it if --data, --split or
    an option changes the detections, and eval-best/ for its best/."""
    box_refinement: bool = False
    """Score and regress once more from the regressed boxes, and vote (He et al. 2015, appendix B)."""
    scales: Several[int] = ()
    """Shorter sides in pixels of an image pyramid: a region's features are the larger of those on its two best scales
    (appendix B, with 200 400 600 800 1000). Default: the detector's own size."""
    tta: bool = False
    """Detect at several sizes, each mirrored too, and merge the detections by box voting."""
    tta_sizes: Several[int] = ()
    """Shorter sides in pixels for --tta. Default: 4/8, 5/8, .. 12/8 of the detector's own (400 500 .. 1200 for 800)."""
    coco_backend: str = "hotcoco"
    """Scorer: hotcoco, or pycocotools, which gives the same numbers about a hundred times slower."""
    skip_bad_images: bool = False
    """Skip images that cannot be read: print their names and score them as images without detections."""
    device: Auto[str] = None
    """cuda, cuda:N, cpu or mps. Default: all GPUs, or the CPU if there are none."""
    gpus: Auto[int] = None
    """Number of this machine's GPUs to use. Default: all."""
    workers: Auto[int] = None
    """Processes that load images, for each GPU. Default: 6 with a GPU, 0 on a CPU."""
    precision: Auto[str] = None
    """fp32 or bf16 (autocast). Default: the run's, else bf16 where the device computes in it."""
    quiet: bool = False
    """Print only warnings, errors and the result."""


def main(argv: list[str] | None = None) -> None:
    """A run -> its 12 numbers, in one process or in one for each GPU."""
    options = parse(Options, argv)
    one_of("split", options.split, (*SPLIT_NAMES, "all"))
    one_of("COCO backend", options.coco_backend, BACKENDS)
    if options.tta and (options.box_refinement or options.scales):
        other = "--scales" if options.scales else "--box-refinement"
        raise UserError(f"--tta and {other} exclude each other: give one of them")
    if options.tta_sizes and not options.tta:
        raise UserError("--tta-sizes are for --tta: give it too, or leave them out")
    launch_command(score, options, INFERENCE)


def score(rank: Rank, options: Options) -> None:
    """Detector and data -> results, in every process; rank 0 writes."""
    be_quiet(options)
    session = Session(options, rank)
    file = detector_file(options.run)
    folder = run_folder(options.run)
    config = read_yaml(folder / "config.yaml") if (folder / "config.yaml").is_file() else {}
    data = options.data or data_of(config)
    if data is None:
        raise UserError(f"{options.run} does not say what it was trained on (no config.yaml); give --data DIR")
    recorded = config.get("precision") if rank.device.type != "mps" else None
    precision = options.precision or (recorded if recorded in INFERENCE else None)
    precision = choose_precision(precision, rank.device.type, INFERENCE)

    detector = load_detector(file).to(rank.device, memory_format=torch.channels_last)
    given = {"categories": detector.real_categories, "skip_bad_images": options.skip_bad_images}
    with from_option("--data" if options.data else "--data (from config.yaml)"):
        if options.data:
            session.info(f"data:  {from_main(lambda: describe_layout(data), rank)}")
        try:
            dataset = from_main(lambda: open_split(data, options.split, **given), rank)
        except OtherClasses:
            if any(not re.fullmatch(r"class \d+", name) for name in detector.real_categories.values()):
                raise
            raise UserError(
                f"{data}: {file} names no classes to match these with; save_detector(load_detector(FILE, "
                "categories={id: name, ..}), NEW) writes a file that does"
            ) from None
    session.info(f"{file} on {dataset.summary()}, {precision}")
    bf16 = precision == "bf16"
    prepare_for_detection(detector, bf16=bf16)
    if options.box_refinement or options.scales:
        with from_option("--scales"):
            detector = ImprovedTesting(detector, box_refinement=options.box_refinement, scales=options.scales)
    if options.tta:
        with from_option("--tta-sizes"):
            detector = TestTimeAugmentation(detector, options.tta_sizes)
    evaluation = evaluate(
        detector,
        dataset,
        rank,
        workers=(6 if rank.device.type == "cuda" else 0) if options.workers is None else options.workers,
        bf16=bf16,
        backend=options.coco_backend,
        progress=session.track,
    )
    if not rank.is_main:
        return
    own = options.data is None or config.get("data") and options.data.resolve() == Path(config["data"]).resolve()
    names = [] if own else [options.data.resolve().name]
    names += [options.split] * (options.split != "val")
    if is_best(folder):
        folder, names = folder.resolve().parent, ["best", *names]
    names += ["refined"] * options.box_refinement + [str(scale) for scale in options.scales]
    names += ["tta"] * options.tta + [str(size) for size in options.tta_sizes]
    target = options.output or (folder / f"eval-{'-'.join(names)}" if names else folder)
    target.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError, ValueError):  # a training's own results, which these replace
        skipped = json.loads((target / "results.json").read_bytes()).get("skipped_training_images", [])
        evaluation.results["skipped_training_images"] = skipped
    write_results(target, evaluation.results, evaluation.detections)
    session.info(results_table(evaluation.results))
    console.print(results_summary(evaluation.results))
    session.info(f"results: {target / 'results.json'}")


def run() -> None:
    main_of(main)


if __name__ == "__main__":
    run()

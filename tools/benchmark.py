"""This package beside torchvision, timm and detectron2 (those installed): time and memory of the same jobs.

python tools/benchmark.py                                             every job, on the CPU; about a quarter of an hour
python tools/benchmark.py --jobs training --modes fp32 --rounds 9 --output runs/benchmark
python tools/benchmark.py --device cuda                               within 9 minutes
python tools/benchmark.py --device cuda --jobs detector-training --detector-batch-sizes 1 2 16
python tools/benchmark.py --height 64 --width 96 --depth 18 --rounds 1      to see that it works; figures of no use
python tools/benchmark.py --render docs/benchmarks/2026-01-31-cpu.json      tables and plot of a run again, beside it

All packages get the same weights, inputs and settings, and what they compute is compared before anything is timed. They
take turns in an order that is shuffled each round; a round in which other processes took over 6% of the machine is
repeated. A ratio is the median over the rounds of time / time of the fastest other package: below 1 is faster.
What fails is named at the end, and everything else is measured. docs/benchmarks.md says what each job is.
"""

import importlib.util
import json
import math
import shlex
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from resbackbone.cli.command import console, main_of, parse, progress_console
from resbackbone.cli.options import check_counts

import torch

from resbackbone.checks import UserError, one_of
from resbackbone.engine.device import choose_device
from resbackbone.resnet import DEPTHS
from resbackbone.tools.benchmarks.contest import COMPILED, MODES, Contest
from resbackbone.tools.benchmarks.jobs import GPU_MODES, JOBS, ON_CPU_ONLY, ON_GPU_ONLY, PEERS
from resbackbone.tools.benchmarks.machine import describe
from resbackbone.tools.benchmarks.report import label_of, markdown, remarks_on, write_json, write_tables
from resbackbone.tools.benchmarks.rounds import EVERYTHING, Session, hold, recorded


@dataclass(frozen=True)
class Options:
    """This package beside torchvision, timm and detectron2: time and memory of the same jobs."""

    jobs: tuple[str, ...] | None = None
    """Of inference, training, detector-inference, detector-training, imagenet, compiled-training, compiled-inference,
    scoring, annotations, index, input, import, scaling. Default: those that suit the device."""
    modes: tuple[str, ...] | None = None
    """Of fp32, fp32-channels-last, tf32-channels-last (GPU), bf16-channels-last. Default: those that suit the job."""
    peers: tuple[str, ...] = PEERS
    """Of torchvision, timm, detectron2; one that is not installed is left out. None: only this package's own times."""
    depth: int = 50
    """Of every network: 18, 34, 50, 101 or 152."""
    height: int = 800
    """Pixels; for detectors those of the shorter side."""
    width: int = 1216
    """Pixels."""
    batch_size: int = 1
    """Images in a backbone's run."""
    detector_batch_sizes: tuple[int, ...] = (1,)
    """Images in a detector's run; each size is measured by itself."""
    imagenet_batch_size: int = 256
    """Images in an ImageNet training step."""
    rounds: int | None = None
    """Rounds that count. Default: 5, on a GPU 8."""
    threads: int | None = None
    """Of torch on the CPU. Default: as torch chooses."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    output: Path | None = None
    """Folder for benchmark.json (every round), .md and .png."""
    budget: float | None = None
    """Seconds after which nothing more is begun. Default: none, on a GPU 500."""
    data: Path | None = None
    """COCO, for the detectors' image. Default: where train_coco.py looks for it, else a drawn image."""
    images: Path | None = None
    """A folder of class folders with JPEGs, for the input pipelines. Default: noise, saved as JPEGs."""
    scoring_images: int = 1000
    """Images to score, with 100 detections each."""
    annotation_images: int = 118_287
    """Images of the annotation file to load; COCO train2017's number."""
    render: Path | None = None
    """Measure nothing: write the tables and the plot of this JSON file beside it."""
    quiet: bool = False
    """Print warnings, errors and the tables alone."""

    @property
    def on_gpu(self) -> bool:
        return torch.device(self.device).type == "cuda"


def main(argv: list[str] | None = None) -> dict:
    """Jobs -> contests -> tables; what benchmark.json holds. Raises ValueError in the end, naming what failed."""
    options = parse(Options, argv)
    if options.render is not None:
        return render(options.render)
    check(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.on_gpu:
        torch.cuda.set_device(torch.device(options.device).index or 0)  # events and graphs are the current device's
    budget = options.budget or (500.0 if options.on_gpu else math.inf)
    rounds = options.rounds or (8 if options.on_gpu else 5)
    session = Session(options.device, rounds=rounds, deadline=time.monotonic() + budget)
    missing = [name for name in options.peers if not importlib.util.find_spec(name)]
    content = {
        "command": shlex.join(["python", "tools/benchmark.py", *(sys.argv[1:] if argv is None else argv)]),
        **describe(options.device, torch.get_num_threads()),
        "options": {name: str(v) if isinstance(v, Path) else v for name, v in asdict(options).items()},
        "finished": False,
        "failed": [],
        "skipped": [f"{name}, which is not installed" for name in missing],
        "jobs": {},
        "contests": [],
    }
    for line in content["skipped"]:
        progress_console.print(f"without {line}")
    options = replace(options, peers=tuple(name for name in options.peers if name not in missing))
    left_out = ON_CPU_ONLY if options.on_gpu else ON_GPU_ONLY
    try:
        with tempfile.TemporaryDirectory() as scratch:
            for job in options.jobs or [job for job in JOBS if job not in left_out]:
                hold_job(job, options, Path(scratch), content, session)
        content["finished"] = True
    finally:  # an interrupted run has measured what it has
        if options.output is not None:
            write_json(content, options.output / "benchmark.json")
        console.print(markdown(content))
        if options.output is not None:
            write_tables(content, options.output / "benchmark.json")
            progress_console.print(f"written to {options.output}")
    if content["failed"]:
        raise UserError(f"{len(content['failed'])} failed: {'; '.join(content['failed'])}")
    return content


def check(options: Options) -> None:
    """Make the output folder. Raises ValueError for options that cannot be."""
    choices = (("job", options.jobs, JOBS), ("mode", options.modes, MODES), ("peer", options.peers, PEERS))
    for kind, asked, there in choices:
        for name in asked or ():
            one_of(kind, name, there)
    one_of("depth", options.depth, DEPTHS)
    counts = ("height", "width", "batch_size", "imagenet_batch_size", "rounds", "threads", "budget")
    check_counts(options, least=1, names=(*counts, "scoring_images", "annotation_images"))
    for size in options.detector_batch_sizes:
        if size < 1:
            raise UserError(f"--detector-batch-sizes {size}: must be at least 1")
    one_of("device", torch.device(choose_device(options.device)).type, ("cpu", "cuda"))
    for mode in set(options.modes or ()) & set(GPU_MODES):
        if not options.on_gpu:
            raise UserError(f"--modes {mode} with --device {options.device}: TF32 needs --device cuda")
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)


def hold_job(job: str, options: Options, scratch: Path, content: dict, session: Session) -> None:
    """Hold all contests of a job. Each is in the output folder before the next one begins."""
    if session.is_over():
        content["skipped"].append(f"{job}: the budget is spent")
        return
    contests, result = [], Contest(job).empty_result()
    with recorded(result, EVERYTHING):
        contests = list(JOBS[job](job, options, scratch))
    if not contests:  # something went wrong before there was one
        add(result, content, options)
    for contest in contests:
        content["jobs"][job] = contest.heading
        began, result = time.monotonic(), contest.empty_result()
        try:
            hold(contest, result, session)
        finally:  # an interrupted contest keeps its rounds
            add(result, content, options)
        thrown = f", {result['thrown_away']} rounds thrown away" if result["thrown_away"] else ""
        progress_console.print(f"{label_of(result)} took {time.monotonic() - began:.0f} s{thrown}")
        session.release_memory()
        if any(name.endswith(COMPILED) for name in contest.names):
            torch.compiler.reset()  # else torch.compile gives up on a class of which it has compiled eight networks


def add(result: dict, content: dict, options: Options) -> None:
    """Add a contest to the run, and write benchmark.json."""
    content["contests"].append(result)
    content["failed"] += remarks_on(result, ["failed"])
    for line in remarks_on(result):
        progress_console.print(line)
    if options.output is not None:
        write_json(content, options.output / "benchmark.json")


def render(path: Path) -> dict:
    """Tables and plot of a JSON file, beside it under its name."""
    try:
        content = json.loads(path.read_text())
        text = markdown(content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--render {path}: not a benchmark.json ({error!r})") from None
    write_tables(content, path)
    console.print(text)
    return content


if __name__ == "__main__":
    main_of(main)

"""This package beside torchvision, timm and detectron2 (those installed): time and memory of the same jobs.

python tools/benchmark.py                                             every job, on the CPU; about a quarter of an hour
python tools/benchmark.py --jobs training --modes fp32 --rounds 9 --output runs/benchmark
python tools/benchmark.py --device cuda                               within 9 minutes
python tools/benchmark.py --height 64 --width 96 --depth 18 --rounds 1      to see that it works; figures of no use
python tools/benchmark.py --render docs/benchmarks/2026-01-31-cpu.json      tables and plot of a run again, beside it

All packages get the same weights, inputs and settings, and what they compute is compared before anything is timed. They
take turns in an order that is shuffled anew each round; a round in which other processes took over 6% of the machine
is made again. A ratio is the median over the rounds of time / time of the fastest other package: below 1 is faster.
docs/benchmarks.md says what each job is.
"""

import gc
import importlib.util
import json
import shlex
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from benchmarks.contest import MODES, Clock, empty_result, hold, say
from benchmarks.jobs import JOBS, ON_CPU_ONLY, ON_GPU_ONLY, PEERS, Plan, titles
from benchmarks.machine import describe
from benchmarks.report import draw, markdown, summary, write, write_json
from rich.console import Console

from resbackbone.atomic import write_atomically
from resbackbone.checks import one_of
from resbackbone.resnet import DEPTHS
from resbackbone.training.command import main_of, parse
from resbackbone.training.distributed import count_processes
from resbackbone.training.options import check_counts

BUDGET = 500.0  # seconds on a GPU
WIDTH = 140  # characters of the table, in a log too


@dataclass(frozen=True)
class Options:
    """This package beside torchvision, timm and detectron2: time and memory of the same jobs."""

    jobs: tuple[str, ...] | None = None
    """Of inference, training, detector-inference, detector-training, imagenet, compiled-inference, compiled-training,
    scoring, annotations, index, input, import, scaling. Default: those that suit the device."""
    modes: tuple[str, ...] | None = None
    """Of fp32, fp32-channels-last, bf16-channels-last. Default: all; for detectors the first and the last."""
    peers: tuple[str, ...] = PEERS
    """Of torchvision, timm, detectron2; one that is not installed is left out. None: only this package's own times."""
    depth: int = 50
    """Of every network: 18, 34, 50, 101 or 152."""
    height: int = 800
    """Pixels; for detectors those of the shorter side."""
    width: int = 1216
    """Pixels."""
    batch_size: int = 1
    """Images of a backbone's run."""
    rounds: int | None = None
    """That are counted. Default: 5, on a GPU 20."""
    threads: int | None = None
    """Of torch on the CPU. Default: as torch chooses."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    output: Path | None = None
    """Folder for benchmark.json (every round), .md, .png and .svg."""
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
    imagenet_batch_size: int = 256
    """Images of an ImageNet training step."""
    matrix_side: int = 4096
    """Of the square matrices whose product is timed in every round, as the machine's own rate."""
    render: Path | None = None
    """Measure nothing: write the tables and the plot of this JSON file beside it."""
    quiet: bool = False
    """Print warnings, errors and the tables alone."""


def main(argv: list[str] | None = None) -> dict:
    """Jobs -> contests -> tables; what benchmark.json holds."""
    options = parse(Options, argv)
    if options.render is not None:
        return render(options.render)
    jobs, plan = check(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    on_gpu = torch.device(options.device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(torch.device(options.device).index or 0)  # events and graphs are the current device's
    budget = options.budget or (BUDGET if on_gpu else float("inf"))
    deadline, clock = time.monotonic() + budget, Clock(options.device)
    rounds = options.rounds or (20 if on_gpu else 5)
    content = {
        "command": shlex.join(["python", "tools/benchmark.py", *(sys.argv[1:] if argv is None else argv)]),
        **describe(options.device, torch.get_num_threads()),
        "options": {name: str(v) if isinstance(v, Path) else v for name, v in asdict(options).items()},
        "finished": False,
        "skipped": [f"{name}, which is not installed" for name in options.peers if name not in plan.peers],
        "jobs": {},
        "contests": [],
    }
    for line in content["skipped"]:
        say(f"without {line}")
    try:
        with tempfile.TemporaryDirectory() as scratch:
            plan = Plan(**{**vars(plan), "scratch": Path(scratch)})
            for job in jobs:
                content["jobs"][job] = titles(plan)[job]
                hold_job(job, plan, content, options, rounds=rounds, clock=clock, deadline=deadline)
        content["finished"] = True
    finally:  # a run that is interrupted, or finds outputs that differ, has measured what it has
        content["contests"] = [result for result in content["contests"] if any(result["seconds"].values())]
        Console(width=WIDTH).print(summary(content))
        if options.output is not None:
            write(content, options.output / "benchmark")
            say(f"written to {options.output}")
    return content


def check(options: Options) -> tuple[tuple[str, ...], Plan]:
    """The jobs to do and what they are done with; ValueError for options that cannot be."""
    for kind, asked, there in (
        ("job", options.jobs, JOBS),
        ("mode", options.modes, MODES),
        ("peer", options.peers, PEERS),
    ):
        for name in asked or ():
            one_of(kind, name, there)
    one_of("depth", options.depth, DEPTHS)
    check_counts(
        options, least=1, names=("height", "width", "batch_size", "rounds", "threads", "budget", "matrix_side")
    )
    check_counts(options, least=1, names=("scoring_images", "annotation_images", "imagenet_batch_size"))
    count_processes(options.device, None)
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
    left_out = ON_CPU_ONLY if torch.device(options.device).type == "cuda" else ON_GPU_ONLY
    jobs = options.jobs or tuple(job for job in JOBS if job not in left_out)
    fields = {name: value for name, value in vars(options).items() if name in Plan.__dataclass_fields__}
    fields["peers"] = tuple(name for name in options.peers if importlib.util.find_spec(name))
    return jobs, Plan(**fields, scratch=Path())


def hold_job(job: str, plan: Plan, content: dict, options: Options, *, rounds: int, clock: Clock, deadline: float):
    """All contests of a job, written into `content` and after each into the output folder."""
    if time.monotonic() > deadline:
        content["skipped"].append(f"{job}: the budget is spent")
        return
    try:
        contests = list(JOBS[job](plan))
    except ImportError as error:
        content["skipped"].append(f"{job}, which needs what is not installed ({error})")
        say(f"without {content['skipped'][-1]}")
        return
    for contest in contests:
        began = time.monotonic()
        result = empty_result(contest)
        content["contests"].append(result)
        hold(
            contest,
            result,
            rounds=rounds,
            threads=torch.get_num_threads(),
            clock=clock,
            side=options.matrix_side,
            deadline=deadline,
        )
        if result["skipped"] and not result["seconds"]:
            content["skipped"].append(f"{job} {contest.mode}: {result['skipped']}")
        gc.collect()
        if clock.on_gpu:
            torch.cuda.empty_cache()
        thrown = f", {result['thrown_away']} rounds thrown away" if result["thrown_away"] else ""
        note = f" ({result['skipped']})" if result["skipped"] else ""
        say(f"{job} {contest.mode} took {time.monotonic() - began:.0f} s{thrown}{note}")
        if options.output is not None:
            write_json(content, options.output / "benchmark")


def render(path: Path) -> dict:
    """Tables and plot of a JSON file, beside it under its name."""
    try:
        content = json.loads(path.read_text())
        text = markdown(content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--render {path}: not a benchmark.json ({error!r})") from None
    write_atomically(path.with_suffix(".md"), text)
    draw(content, path.with_suffix(""))
    Console(width=WIDTH).print(summary(content))
    return content


if __name__ == "__main__":
    main_of(main)

"""Check this machine: versions, devices, what is installed, and one call of the compiled operators detectors need.

python tools/doctor.py
"""

import importlib.metadata
import platform
import re
import signal
import sys
from collections.abc import Callable

EXTRAS = ("detection", "train", "video", "export", "demo")
TOGETHER = "install torch and torchvision together, of one build: pip install --force-reinstall torch torchvision"


def main(argv: list[str] | None = None) -> int:
    """Print one line for each check. Returns 0 if everything installed works, else 1, and prints a fix per failure."""
    words = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    if words:
        sys.exit(f"error: {words[0]!r}: the doctor takes no options and no words; it runs every check")
    print(f"python {platform.python_version()} on {platform.platform()}")
    core = [
        check("packages", lambda: versions(None), "pip install resbackbone"),
        check("torchvision operators", operators, TOGETHER),
        check("backbone", backbone, "pip install --force-reinstall resbackbone"),
        check("import detection", detection, "pip uninstall detection, then install resbackbone again"),
    ]
    for extra in EXTRAS:
        try:
            print(f"  ok       {extra}: {versions(extra)}")
        except importlib.metadata.PackageNotFoundError as error:
            print(f"  missing  {extra} needs {error.name}: pip install 'resbackbone[{extra}]'")
    for line in devices():
        print(f"  {line}")
    failures = core.count(False)
    print(f"{failures} checks failed; each names its fix" if failures else "everything installed works")
    return min(failures, 1)


def check(name: str, call: Callable[[], str], fix: str) -> bool:
    """Run one check and print its result."""
    try:
        print(f"  ok       {name}: {call()}")
        return True
    except Exception as error:  # whatever is broken, the other checks are still made
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"  FAILED   {name}: {reason[:200]}\n           fix: {fix}")
        return False


def versions(extra: str | None) -> str:
    """Name and version of the packages that an extra of ours brings, or that the core needs."""
    requirements = [re.split(r"; *extra *== *", line) for line in importlib.metadata.requires("resbackbone") or ()]
    wanted = [repr(extra), f'"{extra}"'] if extra else []
    names = [re.match(r"[\w.-]+", name)[0] for name, *of in requirements if (of[0] in wanted if of else not extra)]
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


def operators() -> str:
    import torch
    import torchvision

    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 11, 11], [20, 20, 30, 30]])
    kept = torchvision.ops.nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5).tolist()
    assert kept == [0, 2], f"nms kept {kept}, expected [0, 2]"
    pooled = torchvision.ops.roi_align(torch.ones(1, 1, 8, 8), [torch.tensor([[0.0, 0, 8, 8]])], output_size=2)
    assert torch.allclose(pooled, torch.ones(1, 1, 2, 2)), f"roi_align gave {pooled.tolist()}, expected ones"
    return "nms, roi_align"


def backbone() -> str:
    import torch

    from resbackbone import build_resnet_backbone

    maps = build_resnet_backbone(18, fpn=True).eval()(torch.zeros(1, 3, 65, 97))
    return ", ".join(f"{level} {list(map.shape[1:])}" for level, map in maps.items())


def detection() -> str:
    from resbackbone.checks import detection_clash

    assert (clash := detection_clash()) is None, clash
    return "ours"


def devices() -> list[str]:
    """One line for each device, and why there is no GPU if there is none."""
    try:
        import torch

        from resbackbone.engine.device import native_precision
    except Exception as error:  # the checks above have failed too
        return [f"devices unknown: {error}"]
    lines = [f"device   cpu, {torch.get_num_threads()} threads, {native_precision('cpu')} by default"]
    for i in range(torch.cuda.device_count()):
        properties, precision = torch.cuda.get_device_properties(i), native_precision(f"cuda:{i}")
        size = f"{properties.total_memory / 2**30:.0f} GiB"
        lines.append(f"device   cuda:{i} {properties.name}, {size}, {precision} by default")
    if torch.backends.mps.is_available():
        lines.append("device   mps, this Apple GPU: fp32, on request (--device mps); not tested by us")
    if torch.cuda.device_count() == 0:
        built = torch.version.cuda
        why = f"torch is built for CUDA {built}, but no driver or GPU is found (nvidia-smi says more)"
        lines.append(f"no GPU   {why if built else 'torch is built without CUDA'}; everything runs on the CPU")
    return lines


def run() -> None:
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head -1` ends it quietly
    sys.exit(main())


if __name__ == "__main__":
    run()

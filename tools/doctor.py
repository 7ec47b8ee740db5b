"""Check this machine: versions, devices, what is installed, and one call of the compiled operators detectors need.

python tools/doctor.py
"""

import importlib.metadata
import platform
import sys
from collections.abc import Callable

NEEDED = (
    *("torch", "torchvision", "timm", "safetensors", "numpy", "pillow", "huggingface_hub", "filelock"),
    *("pycocotools", "hotcoco", "msgspec", "pyyaml", "tyro", "rich", "tensorboard", "matplotlib", "simplejpeg"),
)
OPTIONAL = {
    "onnxruntime": "pip install onnxruntime onnx onnxscript",
    "transformers": "pip install transformers",
    "webdataset": "pip install webdataset",
    "gradio": "pip install gradio",
    "opencv-python-headless": "pip install opencv-python-headless",
    "detectron2": "no release on the registry: build it from its repository",
}


def main() -> int:
    """Print a line a check; 0 if all that is needed works, else 1, with the fix beside what does not."""
    print(f"python {platform.python_version()} on {platform.platform()}")
    failures = 0
    for name in NEEDED:
        failures += not check(name, lambda name=name: importlib.metadata.version(name), f"pip install {name}")
    for name, fix in OPTIONAL.items():
        try:
            print(f"  ok       {name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"  not here {name}, which is optional ({fix})")
    pair = "install torch and torchvision together, of one build: pip install --force-reinstall torch torchvision"
    failures += not check("torch computes", torch_computes, "pip install --force-reinstall torch")
    failures += not check("torchvision nms", nms, pair)
    failures += not check("torchvision roi_align", roi_align, pair)
    failures += not check("backbone", backbone, "pip install --force-reinstall .")
    for line in devices():
        print(f"  {line}")
    print("all that is needed works" if not failures else f"{failures} checks failed; the fix stands beside each")
    return min(failures, 1)


def check(name: str, call: Callable[[], str], fix: str) -> bool:
    """Run one check and print how it went."""
    try:
        print(f"  ok       {name} {call()}")
        return True
    except Exception as error:  # noqa: BLE001 - whatever is broken, the other checks should still be made
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"  FAILED   {name}: {reason[:200]}\n           fix: {fix}")
        return False


def torch_computes() -> str:
    import torch

    product = torch.ones(8, 8) @ torch.ones(8, 8)
    assert product[0, 0] == 8, "a matrix product is wrong"
    return f"({torch.get_num_threads()} threads)"


def nms() -> str:
    import torch
    import torchvision

    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 11, 11], [20, 20, 30, 30]])
    kept = torchvision.ops.nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5).tolist()
    assert kept == [0, 2], f"kept {kept}, expected [0, 2]"
    return ""


def roi_align() -> str:
    import torch
    import torchvision

    pooled = torchvision.ops.roi_align(torch.ones(1, 1, 8, 8), [torch.tensor([[0.0, 0, 8, 8]])], output_size=2)
    assert torch.allclose(pooled, torch.ones(1, 1, 2, 2)), f"gave {pooled.tolist()}, expected ones"
    return ""


def backbone() -> str:
    import torch

    from resbackbone import build_resnet_backbone

    maps = build_resnet_backbone(18, fpn=True).eval()(torch.zeros(1, 3, 65, 97))
    return ", ".join(f"{level} {list(map.shape[1:])}" for level, map in maps.items())


def devices() -> list[str]:
    """One line for each device, and why there is no GPU if there is none."""
    try:
        import torch

        from resbackbone.engine.device import native_precision

        lines = [f"device   cpu, {torch.get_num_threads()} threads, {native_precision('cpu')} by default"]
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            size = f"{properties.total_memory / 2**30:.0f} GiB"
            lines.append(f"device   cuda:{i} {properties.name}, {size}, {native_precision('cuda')} by default")
            if native_precision("cuda") == "fp32":
                lines.append("         it has no bf16: --precision fp16 trains faster there")
        if torch.backends.mps.is_available():
            lines.append("device   mps, this Apple GPU: fp32, on request (--device mps); not tested by us")
        if torch.cuda.device_count() == 0:
            built = torch.version.cuda
            why = f"torch is built for CUDA {built}, but no driver or GPU is found (nvidia-smi says more)"
            lines.append(f"no GPU   {why if built else 'torch is built without CUDA'}; everything runs on the CPU")
        return lines
    except Exception as error:  # noqa: BLE001 - reported above already
        return [f"devices unknown: {error}"]


if __name__ == "__main__":
    sys.exit(print(__doc__) if {"-h", "--help"} & set(sys.argv) else main())

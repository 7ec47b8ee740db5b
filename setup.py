"""Installs `resbackbone` (the library, with tools/ as resbackbone.tools) and `detection` (Faster R-CNN on COCO)."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
[VERSION] = re.findall(r'^__version__ = "(.+)"$', (HERE / "resbackbone/__init__.py").read_text(encoding="utf-8"), re.M)

BOTH = ["jinja2>=3.1", "pyyaml>=6", "simplejpeg>=1.7"]
DETECTION = [*BOTH, "hotcoco>=1.3", "msgspec>=0.19", "pycocotools>=2.0.8"]
TRAIN = [
    *BOTH,
    *("huggingface_hub>=0.30", "matplotlib>=3.8", "rich>=14.1", "tensorboard>=2.15", "timm>=1.0.15", "tyro>=1.0"),
]
ALL = [*DETECTION, *TRAIN]
DEMO = ["gradio>=6"]
VIDEO = ["opencv-python-headless>=4.10"]
EXPORT = ["onnx>=1.17", "onnxscript>=0.3", "onnxruntime>=1.20"]
DOCS = ["mkdocs-material>=9.5.50", "mkdocstrings[python]>=1.0"]
# What the tests and `make check` use; versions of ruff and mypy are written here and nowhere else.
LINT = ["ruff==0.17.6", "mypy==2.4.1", "types-PyYAML", "pre-commit>=4"]
DEV = [
    *(*EXPORT, *DOCS, *LINT, "pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100"),
    *("openvino>=2026", "transformers>=4.50", "webdataset>=0.2.100"),
]

COMMANDS = (
    *("train_coco", "pretrain", "detect", "evaluate_coco", "export", "convert_weights", "convert_data", "inspect_data"),
    *("compare_runs", "publish", "doctor"),
)

setup(
    name="resbackbone",
    version=VERSION,
    description="ResNet backbones for detection: feature maps, frozen batch norm, FPN, and Faster R-CNN on COCO",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[
        *find_packages(include=["resbackbone", "resbackbone.*", "detection", "detection.*"]),
        *(f"resbackbone.{name}" for name in find_packages(include=["tools", "tools.*"])),
    ],
    package_dir={"resbackbone.tools": "tools"},
    package_data={"resbackbone": ["py.typed"], "detection": ["py.typed"], "resbackbone.report": ["templates/*"]},
    entry_points={
        "console_scripts": [f"resbackbone-{name.replace('_', '-')} = resbackbone.tools.{name}:run" for name in COMMANDS]
    },
    # torch and torchvision bring the last three; these are the versions that our own imports need.
    install_requires=[
        *("torch>=2.11", "torchvision>=0.26", "safetensors>=0.4.3"),
        *("numpy>=1.26", "pillow>=10", "filelock>=3.12"),
    ],
    extras_require={
        "detection": DETECTION,
        "train": TRAIN,
        "all": ALL,
        "demo": DEMO,
        "video": VIDEO,
        "export": EXPORT,
        "docs": DOCS,
        "dev": DEV,
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
)

"""Installs two packages: `resbackbone` (the backbone library) and `detection` (Faster R-CNN on COCO)."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

SCALE = ["webdataset>=0.2.100"]
DEMO = ["gradio>=6"]
VIDEO = ["opencv-python-headless>=4.10"]
EXPORT = ["onnx>=1.17", "onnxscript>=0.3", "onnxruntime>=1.20"]
DOCS = ["mkdocs-material>=9.5.50", "mkdocstrings[python]>=1.0"]
# What the tests and `make check` use; versions of ruff and mypy are written here and nowhere else.
LINT = ["ruff==0.17.6", "mypy==2.4.1", "types-PyYAML", "pre-commit>=4"]
DEV = [*EXPORT, *SCALE, *DOCS, *LINT, "pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100", "transformers>=4.50"]

setup(
    name="resbackbone",
    version="0.1.0",
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
    package_data={"resbackbone.report": ["templates/*"]},
    install_requires=[
        "torch>=2.11",
        "torchvision>=0.26",
        "safetensors>=0.4.3",
        "numpy>=1.26",
        "pillow>=10",
        "timm>=1.0.15",
        "huggingface_hub>=0.30",
        "filelock>=3.12",
        "pycocotools>=2.0.8",
        "hotcoco>=1.3",
        "msgspec>=0.19",
        "pyyaml>=6",
        "tyro>=1.0",
        "rich>=14.1",
        "tensorboard>=2.15",
        "matplotlib>=3.8",
        "simplejpeg>=1.7",
        "jinja2>=3.1",
    ],
    extras_require={"demo": DEMO, "video": VIDEO, "export": EXPORT, "scale": SCALE, "docs": DOCS, "dev": DEV},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
)

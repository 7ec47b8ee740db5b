"""Commands are tested in an empty folder, and know of no data but what a test gives them."""

import importlib

import pytest
from commands import SIX_STEPS

from resbackbone.classification import cifar10


@pytest.fixture(autouse=True)
def empty_place(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in ("IMAGENET_DIR", "CIFAR10_DIR", "COCO_DIR", "DETECTRON2_DATASETS", "RESBACKBONE_DEBUG"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def few_synthetic_images():
    """Of those that CIFAR trainings draw."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cifar10, "SYNTHETIC_IMAGES", {"train": 20, "test": 10})
        yield


@pytest.fixture(scope="module")  # other modules' tests may change the number of threads, and with it the last bits
def six_steps_left_alone(module_path, few_synthetic_images):
    """The folder of a CIFAR training of SIX_STEPS on few synthetic images; tests only read it."""
    folder = module_path / "alone"
    importlib.import_module("resbackbone.tools.train_cifar10").main([*SIX_STEPS, "--output", str(folder)])
    return folder

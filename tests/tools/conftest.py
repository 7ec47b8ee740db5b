"""Commands are tested in an empty folder, and know of no data but what a test gives them."""

import pytest


@pytest.fixture(autouse=True)
def empty_place(tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))
    for name in ("IMAGENET_DIR", "CIFAR10_DIR", "COCO_DIR", "DETECTRON2_DATASETS", "RESBACKBONE_DEBUG"):
        monkeypatch.delenv(name, raising=False)

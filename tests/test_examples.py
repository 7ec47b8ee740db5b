"""Every file in examples/ runs unchanged, in seconds and without a network."""

import importlib.util
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
FRAMEWORKS = {"detectron2_faster_rcnn": "detectron2", "transformers_detr": "transformers"}
SAYS = {
    "detectron2_faster_rcnn": "loss_rpn_cls",
    "plain_pytorch": "step 10: loss",
    "timm_features": "stride 32: 512 channels, (2, 512, 4, 5)",
    "torchvision_retinanet": "bbox_regression",
    "transformers_detr": "saved and loaded again: ResBackboneModel",
}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_unchanged_and_prints_what_it_shows(path, monkeypatch, capsys):
    if (framework := FRAMEWORKS.get(path.stem)) and importlib.util.find_spec(framework) is None:
        pytest.skip(f"{framework} is not installed")
    monkeypatch.setattr(sys, "argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")
    assert SAYS[path.stem] in capsys.readouterr().out


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_fits_on_a_screen_and_says_how_to_run_it(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 60 and f"python examples/{path.name}" in text

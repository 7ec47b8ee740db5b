"""Every file in examples/ runs unchanged, in seconds and without a network."""

import importlib.util
import json
import re
import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from detection.faster_rcnn import FasterRCNN
from detection.shapes import make_shapes

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


NOTEBOOK = Path(__file__).parents[1] / "examples/own_data.ipynb"


def cells_of(kind):
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [("".join(cell["source"]), cell) for cell in cells if cell["cell_type"] == kind]


def test_the_notebook_goes_from_a_folder_of_images_to_a_detector_that_is_used(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_shapes("my_folder", train_images=4, val_images=2, size=64)  # smaller than what it draws without one
    shown, exported = [], []
    display = ModuleType("IPython.display")  # which Jupyter brings
    display.IFrame = lambda page, **size: shown.append(Path(page))
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setattr(FasterRCNN, "export", lambda detector, path: exported.append(path))  # takes half a minute
    names = {}
    for source, cell in cells_of("code"):
        exec(compile(source, str(NOTEBOOK), "exec"), names)
        if "parameters" in cell["metadata"].get("tags", []):
            names["STEPS"] = 1
    assert shown == [Path("runs/data-my_folder/data.html"), Path("runs/notebook/report.html")]
    assert all(page.is_file() for page in shown) and exported == [Path("runs/notebook/detector.onnx")]
    assert isinstance(names["result"].picture(), Image.Image)
    assert re.search(r"AP \d+\.\d, AP50 \d+\.\d on 2 images", capsys.readouterr().out)


def test_the_notebook_is_kept_without_outputs_and_its_links_lead_somewhere():
    assert all(not cell["outputs"] and cell["execution_count"] is None for _, cell in cells_of("code"))
    links = [link for text, _ in cells_of("markdown") for link in re.findall(r"\]\(([^)#]+)", text)]
    assert len(links) == 2 and all((NOTEBOOK.parent / link).is_file() for link in links)

"""docs/own_data.md runs as it stands: every command and block, in the page's order, and prints what it says."""

import importlib
import re
import shlex
from pathlib import Path
from xml.sax.saxutils import escape

import pytest

from detection.annotations import read_annotations
from detection.shapes import make_shapes

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "own_data.md"
PUBLISHED = "torchvision:FasterRCNN_ResNet50_FPN_Weights.COCO_V1"  # a download


def draw_voc(year: Path) -> None:
    """A few drawn images as Pascal VOC keeps them."""
    shapes = make_shapes(year.parent / "drawn", train_images=4, val_images=2, size=64)
    (year / "Annotations").mkdir(parents=True)
    (year / "ImageSets" / "Main").mkdir(parents=True)
    (year / "JPEGImages").mkdir()
    for split in ("train", "val"):
        found = read_annotations(shapes / "annotations" / f"instances_{split}2017.json")
        names = found.file_names()
        objects = [""] * len(names)
        for image, label, (x, y, w, h) in zip(
            found.image_indices.tolist(), found.labels.tolist(), found.boxes_xywh.tolist(), strict=True
        ):
            corners = zip(("xmin", "ymin", "xmax", "ymax"), (x + 1, y + 1, x + w, y + h), strict=True)
            box = "".join(f"<{name}>{value}</{name}>" for name, value in corners)
            name = escape(list(found.categories.values())[label - 1])
            objects[image] += f"<object><name>{name}</name><bndbox>{box}</bndbox></object>"
        for name, content in zip(names, objects, strict=True):
            (year / "JPEGImages" / name).write_bytes((shapes / f"{split}2017" / name).read_bytes())
            (year / "Annotations" / f"{Path(name).stem}.xml").write_text(f"<annotation>{content}</annotation>")
        lines = "".join(f"{Path(name).stem}\n" for name in names)
        (year / "ImageSets" / "Main" / f"{split}.txt").write_text(lines)


def run(command: str, monkeypatch) -> None:
    """One line of the page; the published detector, which is a download, is the page's own first run here."""
    python, tool, *argv = shlex.split(command)
    assert python == "python" and tool.startswith("tools/") and (ROOT / tool).is_file()
    if PUBLISHED in argv:
        argv[argv.index(PUBLISHED)] = "runs/first/model.safetensors"
        argv += ["--max-steps", "1", "--recipe", "short"]  # the recipe `small` is for a GPU
    module = importlib.import_module(f"resbackbone.tools.{Path(tool).stem}")
    module.main([*argv, "--device", "cpu"] if "device" in module.Options.__dataclass_fields__ else argv)


def test_every_command_and_block_of_the_page_runs_and_prints_what_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    draw_voc(Path("VOCdevkit/VOC2007"))
    blocks = re.findall(r"```(sh|python|text)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert [kind for kind, _ in blocks].count("sh") == 5
    said, names = "", {}
    for kind, block in blocks:
        if kind == "python":
            exec(compile(block, str(PAGE), "exec"), names)
        elif kind == "sh":
            for command in block.strip().splitlines():
                run(command, monkeypatch)
        said += capsys.readouterr().out
        if kind == "text":
            for line in block.strip().splitlines():
                assert line in said.splitlines()
    assert len(names["names"]) == len(names["found"]["labels"]) > 0
    assert "runs/first/model.safetensors hold a detector of 10 classes; new, for" in said
    assert {path.name for path in Path("runs").iterdir()} == {"first", "mine", "voc2007-r18-fpn-short"}


@pytest.mark.parametrize("name", ["small", "short"])
def test_the_recipes_that_the_page_names_are_there_with_its_figures(name):
    from detection.recipes import RECIPES, SMALL_DATA

    text = PAGE.read_text(encoding="utf-8")
    assert name in RECIPES and f"{SMALL_DATA:,} images" in text
    small = RECIPES["small"]
    assert f"{small.schedule.steps:,} updates of {small.batch_size}" in text and f"{small.epochs} epochs" in text
    assert f"cosine from {small.schedule.rate} for {small.batch_size} images" in text

"""docs/own_data.md runs as it stands, in order, and prints what it says; its `bash` blocks would take too long."""

import importlib
import re
import shlex
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "own_data.md"
PUBLISHED = "torchvision:FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1"  # a download


OBJECT = "<object><name>{}</name><bndbox><xmin>5</xmin><ymin>9</ymin><xmax>40</xmax><ymax>30</ymax></bndbox></object>"


def draw_voc(year: Path) -> None:
    """Six images with two objects each, as Pascal VOC keeps them."""
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (year / folder).mkdir(parents=True)
    objects = OBJECT.format("cat") + OBJECT.format("dog")
    for split, names in (("train", "abcd"), ("val", "ef")):
        (year / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names))
        for name in names:
            Image.new("RGB", (64, 48), "red").save(year / "JPEGImages" / f"{name}.jpg")
            (year / "Annotations" / f"{name}.xml").write_text(f"<annotation>{objects}</annotation>")


def run(command: str) -> None:
    """One line of the page; the published detector, which is a download, is the page's own first run here."""
    python, tool, *argv = shlex.split(command)
    assert python == "python" and tool.startswith("tools/") and (ROOT / tool).is_file()
    if PUBLISHED in argv:
        argv[argv.index(PUBLISHED)] = "runs/first/model.safetensors"
        argv += ["--max-steps", "1", "--recipe", "short"]  # the recipe `small` would take hours
    module = importlib.import_module(f"resbackbone.tools.{Path(tool).stem}")
    module.main([*argv, "--device", "cpu"] if "device" in module.Options.__dataclass_fields__ else argv)


def test_every_command_and_block_of_the_page_runs_and_prints_what_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    draw_voc(Path("VOCdevkit/VOC2007"))
    blocks = re.findall(r"```(sh|python|text)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert [kind for kind, _ in blocks].count("sh") == 6
    said, names = "", {}
    for kind, block in blocks:
        if kind == "python":
            exec(compile(block, str(PAGE), "exec"), names)
        elif kind == "sh":
            for command in block.strip().splitlines():
                run(command)
        said += capsys.readouterr().out
        if kind == "text":
            for line in block.strip().splitlines():
                assert line in said.splitlines()
    assert names["result"].image_size == (96, 96) and Path("boxes.png").is_file()
    assert "a detector of 10 classes, from runs/first/model.safetensors" in said
    runs = {path.name for path in Path("runs").iterdir()}
    assert runs == {"data-my_folder", "first", "mine", "voc2007-r18-fpn-short"}


def test_the_recipes_that_the_page_names_are_there_with_its_figures():
    from detection.recipes import RECIPES, SMALL_DATA

    text = " ".join(PAGE.read_text(encoding="utf-8").split())
    small, scratch = RECIPES["small"], RECIPES["scratch"]
    assert "short" in RECIPES and f"{SMALL_DATA:,} images" in text
    for recipe in (small, scratch):
        updates = f"{recipe.schedule.steps:,} updates of {recipe.batch_size}"
        assert updates in text and f"{recipe.least_epochs} epochs" in text
    assert f"cosine from {small.schedule.rate} for {small.batch_size} images" in text
    assert f"shorter side of {scratch.detector.min_size} pixels" in text and len(scratch.detector.cascade_ious) == 3
    assert f"a ResNet-{scratch.backbone.depth} with three box heads" in text

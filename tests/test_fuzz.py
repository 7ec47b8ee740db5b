"""Thousands of wrong inputs: each gives a result or one sentence, never another exception.

RESBACKBONE_FUZZ=20 goes through twenty times as many; the seed is hypothesis's own then.
"""

import copy
import importlib
import io
import json
import os
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from detection.coco import CocoImages, read_image
from detection.scoring import DETECTION, score
from resbackbone.image_io import BadImage, decode

TOOLS = Path(__file__).parents[1] / "tools"
TIMES = int(os.environ.get("RESBACKBONE_FUZZ", "1"))
CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
many = settings(max_examples=300 * TIMES, deadline=None, derandomize=TIMES == 1, suppress_health_check=CHECKS)
seeds = st.integers(0, 2**32)


def one_sentence(error: Exception) -> bool:
    return 0 < len(str(error)) < 2000 and "Traceback" not in str(error)


# Annotations

GOOD = {
    "images": [{"id": i, "file_name": f"{i}.png", "width": 40 + i, "height": 30} for i in range(3)],
    "annotations": [
        {"id": k, "image_id": k % 3, "category_id": 7, "bbox": [1.0 * k, 2, 10, 9.5], "area": 95.0, "iscrowd": k // 4}
        for k in range(5)
    ],
    "categories": [{"id": 7, "name": "cat"}, {"id": 90, "name": "dog"}],
}
VALUES = (
    *(None, True, False, 0, -1, 1, 7, 2**31, 2**63, -(2**63) - 1, 10**400, 1.5, -0.0, 1e308, float("nan")),
    *(float("inf"), float("-inf"), "", "a", "../../etc/passwd", "/etc/passwd", "a\0b", "\ud800", "é" * 300, [], {}),
    *([[]], [1, 2], [1, 2, 3, 4], [0, 0, 0, 0], ["1", 2, 3, 4], [None] * 4, [1e308] * 4, {"id": 1}, "0.png"),
)


def places(value, path=()):
    """Every place in a JSON value, as (container, key)."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in list(entries):
        yield value, key
        yield from places(child, (*path, key))


def mutated(chance: random.Random) -> str:
    content = copy.deepcopy(GOOD)
    for _ in range(chance.randrange(1, 4)):
        container, key = chance.choice(list(places(content)))
        how = chance.randrange(5)
        if how == 0:
            del container[key]
        elif how == 1 and isinstance(container, list):
            container.append(copy.deepcopy(container[key]))
        elif how == 2 and isinstance(container, dict):
            container[chance.choice(["id", "bbox", "name", "extra", "segmentation", ""])] = chance.choice(VALUES)
        else:
            container[key] = copy.deepcopy(chance.choice(VALUES))
    text = json.dumps(content)
    if chance.random() < 0.15:  # the text itself
        at = chance.randrange(len(text))
        text = text[:at] + chance.choice(["", "{", "]", '"', "NaN", "[" * 3000, "\\u0000", "1e999"]) + text[at + 1 :]
    return text


@pytest.fixture(scope="module")
def images(module_path):
    for entry in GOOD["images"]:
        Image.new("RGB", (entry["width"], entry["height"])).save(module_path / entry["file_name"])
    return module_path


@many
@given(seeds)
def test_mutated_annotations_make_a_data_set_or_one_sentence(images, seed):
    chance = random.Random(seed)
    file = images / "annotations.json"
    file.write_bytes(mutated(chance).encode(errors="surrogatepass"))
    try:
        dataset = CocoImages(images, file, skip_bad_images=True)
    except ValueError as error:
        assert one_sentence(error)
        return
    for i in range(len(dataset)):
        target = dataset.target(i)
        boxes, (width, height) = target["boxes"], dataset.widths_heights[i]
        assert torch.isfinite(boxes).all() and (boxes[:, 2:] > boxes[:, :2]).all()
        assert (boxes >= 0).all() and (boxes[:, 2] <= int(width)).all() and (boxes[:, 3] <= int(height)).all()
        assert ((target["labels"] >= 1) & (target["labels"] <= len(dataset.categories))).all()
        assert isinstance(dataset[i], tuple | BadImage)
        assert dataset.path(i).resolve().is_relative_to(images.resolve())
    found = np.zeros(2, DETECTION)
    found["image_id"], found["category_id"] = int(dataset.image_ids[0]), next(iter(dataset.categories))
    found["bbox"], found["score"] = [1, 2, 10, 9], [0.9, 0.8]
    numbers = score(dataset.annotations, found)["bbox"].values()
    assert all(number is None or 0 <= number <= 1 for number in numbers)


# Images


TURNED = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0"  # orientation 6, a quarter turn


def files() -> dict[str, bytes]:
    """A small image in every format and mode."""
    noise = np.random.default_rng(0).integers(0, 256, (23, 37, 4), dtype=np.uint8)
    rgba = Image.fromarray(noise)
    rgb, palette = rgba.convert("RGB"), rgba.convert("P")
    deep = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    kinds = {
        "jpeg": (rgb, "JPEG", {}),
        "progressive": (rgb, "JPEG", {"progressive": True}),
        "cmyk": (rgba.convert("CMYK"), "JPEG", {}),
        "grey": (rgba.convert("L"), "JPEG", {}),
        "turned": (rgb, "JPEG", {"exif": TURNED}),
        "png": (rgba, "PNG", {}),
        "palette": (palette, "PNG", {"transparency": 3}),
        "16 bit": (deep, "PNG", {}),
        "1 bit": (rgba.convert("1"), "PNG", {}),
        "tiff": (deep, "TIFF", {}),
        "webp": (rgba, "WEBP", {}),
        "gif": (palette, "GIF", {"save_all": True, "append_images": [palette] * 3}),
        "bmp": (rgb, "BMP", {}),
        "ppm": (rgb, "PPM", {}),
    }
    return {name: encoded(*arguments) for name, arguments in kinds.items()}


def encoded(image: Image.Image, kind: str, options: dict) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


FILES = files()


def damaged(content: bytes, chance: random.Random) -> bytes:
    content = bytearray(content)
    for _ in range(chance.randrange(1, 6)):
        how, at = chance.randrange(4), chance.randrange(len(content)) if content else 0
        if how == 0:
            del content[at:]
        elif how == 1 and content:
            content[at] = chance.randrange(256)
        elif how == 2 and len(content) > 64:  # where formats keep sizes and counts
            content[chance.randrange(64)] = chance.choice([0, 1, 127, 128, 255])
        else:
            content[at:at] = bytes(chance.randrange(256) for _ in range(chance.randrange(1, 20)))
    return bytes(content)


@pytest.mark.filterwarnings("ignore")  # decoders warn of what they then refuse
@many
@given(st.sampled_from(sorted(FILES)), seeds)
def test_damaged_images_are_pixels_or_one_sentence_that_names_them(images, name, seed):
    content = damaged(FILES[name], random.Random(seed))
    path = images / "damaged"
    path.write_bytes(content)
    for read in (lambda: decode(content, "damaged"), lambda: read_image(path).permute(1, 2, 0).numpy()):
        try:
            pixels = read()
        except BadImage as error:
            assert one_sentence(error) and "damaged" in str(error)
            continue
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.size


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_image_is_read_as_it_is(images, name):
    assert decode(FILES[name], name).shape == (23, 37, 3)


def test_an_image_that_would_fill_the_memory_is_refused_by_its_header(images):
    Image.new("1", (20_000, 20_000)).save(images / "bomb.png")
    content = (images / "bomb.png").read_bytes()
    assert len(content) < 1_000_000
    for read in (lambda: decode(content, "bomb.png"), lambda: read_image(images / "bomb.png")):
        tracemalloc.start()
        try:
            with pytest.raises(BadImage, match=r"bomb.png: cannot be decoded .*exceeds limit"):
                read()
            assert tracemalloc.get_traced_memory()[1] < 50_000_000
        finally:
            tracemalloc.stop()


# Command lines

COMMANDS = ("train_coco", "pretrain", "train_cifar10", "evaluate_coco", "detect", "degradation", "layer_responses")
WORDS = (
    *("", "-1", "0", "1", "7", "1e9", "nan", "inf", "99999999999999999999", "None", "True", "fp32", "bf16", "cpu"),
    *("cuda:99", "short", "1x", "fpn", "vgg16", "BN", "c2", "..", "/dev/null", "a\nb", "é", "{}", "[1]", "--", "-"),
    *("-h9", "--nothing", "18", "50", "demo", "torchvision:nothing", "detectron2:nothing", "--config"),
    "--config=/dev/null",
)


@settings(many, max_examples=100 * TIMES)  # a parser takes long to build
@given(st.sampled_from(COMMANDS), seeds)
def test_wrong_command_lines_are_options_or_one_sentence(tmp_path_factory, name, seed):
    chance = random.Random(seed)
    module = importlib.import_module(f"resbackbone.tools.{name}")
    flags = [f"--{field.replace('_', '-')}" for field in module.Options.__dataclass_fields__]
    argv = [chance.choice([chance.choice(flags), chance.choice(WORDS)]) for _ in range(chance.randrange(1, 7))]
    before = os.getcwd()
    os.chdir(tmp_path_factory.getbasetemp())
    try:
        options = module.parse(module.Options, argv)
        if hasattr(module, "complete"):
            module.complete(options)
    except ValueError as error:
        assert one_sentence(error), argv
    except SystemExit as stopped:
        assert stopped.code in (0, None), argv  # --help
    finally:
        os.chdir(before)

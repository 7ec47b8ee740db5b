"""The built-in data set: ten classes of drawn objects in COCO's layout, generated from a seed.

A class is a form or a pattern; colours are random. Objects are rotated and stretched, overlap and reach over the
frame; distractors of other forms, some striped or checked, belong to no class.
"""

import json
import math
import multiprocessing
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from resbackbone.checks import UserError

FORMAT = 2  # raise it when the same arguments draw other files, so that older folders are refused

# Lengths are in pixels of a 160 x 160 image and scale with `size`. A pair is a range.
REFERENCE_SIZE = 160
MIN_SIZE = 64
SCALE = 3  # objects and clutter are drawn this much larger, then averaged down
OBJECTS = (1, 7)  # an image
DISTRACTORS = (0, 3)
SIDE = (18, 80)  # geometric mean of an object's width and height; log-uniform
STRETCH = (0.75, 1 / 0.75)  # width over height, before turning; log-uniform
MARGIN = 0.3  # distance of a centre to the border, as a fraction of the object's width and height
MIN_VISIBLE = 0.6  # visible fraction of an object; an arrow's head alone is smaller
TRIES = 12  # places to try before an object is dropped
MIN_CONTRAST = 60  # luma-weighted colour distance, 0..255, to four fifths of the surroundings
CLUTTER = (0, 14)  # strokes and crumbs, each
LIGHT = (0, 0.25)  # relative change of brightness from one side of the image to the other, up and down
BRIGHTNESS = (-25, 25)  # 0..255
CONTRAST = (0.75, 1.2)
NOISE = (1, 7)  # standard deviation, 0..255
BLUR = (0, 0.7)  # standard deviation in pixels, at every size
JPEG_QUALITY = 92
MANY = 200  # images
SPLITS = ("train2017", "val2017")
FIRST_ID = {"train2017": 1, "val2017": 1_000_001}  # an image id tells its split, as in COCO
LUMA = np.array([0.299, 0.587, 0.114])

T = TypeVar("T")
Polygon = np.ndarray  # [N, 2]: x, y


class Figure(NamedTuple):
    """An object's form, about 2 wide around (0, 0): its outline, holes, and a pattern in a second colour."""

    outline: Polygon
    holes: tuple[Polygon, ...] = ()
    pattern: tuple[Polygon, ...] = ()


def arc(start: float, stop: float) -> Polygon:
    """The part of the unit circle between two angles, given in turns."""
    angles = 2 * math.pi * np.linspace(start, stop, 48)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def rectangle(x0: float, y0: float, x1: float, y1: float) -> Polygon:
    return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])


def spikes(points: int, inner_radius: float) -> Polygon:
    """A star; with an inner radius of cos(pi / points) it is the regular polygon."""
    angles = math.pi / points * np.arange(2 * points)
    radii = np.where(np.arange(2 * points) % 2, inner_radius, 1.0)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


DISK = arc(0, 1)
SQUARE = rectangle(-1, -1, 1, 1)
CROSS = np.array(
    [(0.34, 0.34), (0.34, 1), (-0.34, 1), (-0.34, 0.34), (-1, 0.34), (-1, -0.34)]
    + [(-0.34, -0.34), (-0.34, -1), (0.34, -1), (0.34, -0.34), (1, -0.34), (1, 0.34)]
)
ARROW = np.array([(1, 0), (0.05, 0.9), (0.05, 0.34), (-1, 0.34), (-1, -0.34), (0.05, -0.34), (0.05, -0.9)])
STRIPES = tuple(rectangle(-2, y, 2, y + 0.4) for y in (-0.6, 0.2))
CHECKS = tuple(
    rectangle(x / 2, y / 2, x / 2 + 0.5, y / 2 + 0.5) for x in range(-2, 2) for y in range(-2, 2) if (x + y) % 2
)

OBJECT_FIGURES = {
    "disk": Figure(DISK),
    "ring": Figure(DISK, holes=(0.55 * DISK,)),
    "square": Figure(SQUARE),
    "triangle": Figure(spikes(3, 0.5)),
    "star": Figure(spikes(5, 0.42)),
    "cross": Figure(CROSS),
    "crescent": Figure(DISK, holes=(0.8 * DISK + (0.5, 0),)),
    "arrow": Figure(ARROW),
    "striped disk": Figure(DISK, pattern=STRIPES),
    "checkered square": Figure(SQUARE, pattern=CHECKS),
}
CLASSES = tuple(OBJECT_FIGURES)
CATEGORY_IDS = (1, 2, 4, 7, 8, 11, 13, 16, 17, 21)  # with gaps, as COCO's

BAR = rectangle(-1, -0.25, 1, 0.25)
ELL = np.array([(-1, -1), (-0.4, -1), (-0.4, 0.4), (1, 0.4), (1, 1), (-1, 1)])
HALF_DISK = arc(0, 0.5)
FIGURES = (  # the classes in their order, then distractors
    *OBJECT_FIGURES.values(),
    *(Figure(BAR), Figure(ELL), Figure(HALF_DISK)),
    *(Figure(BAR, pattern=CHECKS), Figure(ELL, pattern=STRIPES), Figure(HALF_DISK, pattern=CHECKS)),
)


def make_shapes(
    folder: str | Path, *, seed: int = 0, train_images: int = 2000, val_images: int = 200, size: int = 160
) -> Path:
    """Draw the data set into `folder`, unless it is already there, and return the folder.

    The layout is COCO's: train2017/000000000001.jpg .., val2017/000001000001.jpg .., RGB, `size` x `size` pixels, and
    annotations/instances_{train,val}2017.json with the boxes [x, y, width, height] and areas of the visible parts in
    pixels, and category ids with gaps. The same arguments give the same bytes on one machine; other processors and
    versions of numpy and Pillow may round differently. An image depends only on the seed, its split, its number and
    `size`. Raises UserError if the seed is negative, a split has no image or the size is below 64, and as `draw_once`.
    """
    arguments = {"seed": seed, "train_images": train_images, "val_images": val_images, "size": size}
    for (name, value), least in zip(arguments.items(), (0, 1, 1, MIN_SIZE), strict=True):
        if value < least:
            raise UserError(f"{name} is {value}; it must be at least {least}")

    def draw(unfinished: Path) -> None:
        write_split(unfinished, "train2017", train_images, seed=seed, size=size)
        write_split(unfinished, "val2017", val_images, seed=seed, size=size)

    return draw_once(Path(folder), {"format": FORMAT, **arguments}, draw)


def draw_once(folder: Path, made_of: dict, draw: Callable[[Path], None]) -> Path:
    """Let `draw` fill `folder`, unless it already holds the set made of `made_of`, and return the folder.

    `folder` appears when it is complete. Raises UserError if it holds anything else, which stays as it is, or if it
    cannot be written.
    """
    target = folder.resolve()
    if is_made(target, made_of):
        return folder
    unfinished = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        unfinished.mkdir(parents=True)
        draw(unfinished)
        (unfinished / "shapes.json").write_text(json.dumps(made_of) + "\n")
        os.rename(unfinished, target)  # unlike `folder_atomically` without a sync of thousands of files
    except OSError as error:
        if not is_made(target, made_of):  # if it is, another run was faster
            why = error.strerror or error
            raise UserError(f"{target}: cannot be drawn ({why}); free space there or use another folder") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def is_made(folder: Path, made_of: dict) -> bool:
    """Whether the folder holds this set; False if missing or empty. Raises UserError if it holds anything else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        found = json.loads((folder / "shapes.json").read_text())
    except (OSError, ValueError):  # no such file, or not JSON
        found = "other files"
    if found != made_of:
        raise UserError(f"{folder} already holds {found}; to make {made_of}, remove it or choose another folder")
    return True


def write_split(folder: Path, split: str, count: int, *, seed: int, size: int) -> None:
    """Write `count` images and their COCO annotations."""
    images: list[dict] = []
    annotations: list[dict] = []
    (folder / split).mkdir(parents=True)
    (folder / "annotations").mkdir(exist_ok=True)
    for image, objects in in_processes(partial(save_image, folder, split, seed, size), range(1, count + 1)):
        images.append(image)
        for found in objects:
            annotations.append({"id": len(annotations) + 1, "image_id": image["id"], **found})
    named = zip(CATEGORY_IDS, CLASSES, strict=True)
    content = {
        "info": {"description": f"resbackbone shapes, format {FORMAT}, seed {seed}", "version": str(FORMAT)},
        "licenses": [{"id": 1, "name": "drawn by detection/shapes.py", "url": ""}],
        "images": images,
        "annotations": annotations,
        "categories": [{"id": id, "name": name, "supercategory": "shape"} for id, name in named],
    }
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def save_image(folder: Path, split: str, seed: int, size: int, number: int) -> tuple[dict, list[dict]]:
    """Draw one image into `folder`; return COCO's entries of the image and of its objects."""
    image, objects = draw_image(np.random.default_rng([seed, SPLITS.index(split), number]), size)
    image_id = FIRST_ID[split] + number - 1
    file_name = f"{image_id:012d}.jpg"
    image.save(folder / split / file_name, quality=JPEG_QUALITY)
    return {"id": image_id, "file_name": file_name, "width": size, "height": size, "license": 1}, objects


def in_processes(function: Callable[[int], T], numbers: Sequence[int]) -> Iterator[T]:
    """`map`, over all cores if there are many numbers and the system can fork."""
    if len(numbers) < MANY or sys.platform != "linux":
        yield from map(function, numbers)
        return
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("fork")) as pool:
        yield from pool.map(function, numbers, chunksize=20)


def draw_image(rng: np.random.Generator, size: int) -> tuple[Image.Image, list[dict]]:
    """One RGB image [size, size] and COCO's entries of its objects, farthest first."""
    canvas = background(rng, size).resize((size * SCALE, size * SCALE), Image.Resampling.BILINEAR)
    add_clutter(rng, canvas)
    objects = add_objects(rng, canvas)
    return develop(rng, canvas.reduce(SCALE)), objects


def background(rng: np.random.Generator, size: int) -> Image.Image:
    """Two colours mixed by a random field, a third by another, and a slowly varying tint."""
    colours = rng.uniform(0, 255, (3, 3)).astype(np.float32)
    pixels = mix(colours[0], colours[1], random_field(rng, size))
    pixels = mix(pixels, colours[2], rng.uniform(0, 0.7) * random_field(rng, size))
    tint = np.stack([smooth_noise(rng, size, 4) for _ in range(3)], axis=-1) - 0.5
    return to_image(pixels + rng.uniform(0, 90) * tint)


def mix(one: np.ndarray, other: np.ndarray, share: np.ndarray) -> np.ndarray:
    return one + share[..., None] * (other - one)


def random_field(rng: np.random.Generator, size: int) -> np.ndarray:
    """Numbers in 0..1, [size, size]: a gradient, clouds, blotches, or stripes."""
    kind = rng.choice(["gradient", "clouds", "blotches", "stripes"])
    if kind in ("clouds", "blotches"):
        field = smooth_noise(rng, size, integer(rng, (3, 12)))
        return field if kind == "clouds" else soft_step(field - 0.5, 0.03)
    angle, period = rng.uniform(0, 2 * math.pi), log_uniform(rng, (0.06, 0.4))
    axis = np.linspace(-0.5, 0.5, size, dtype=np.float32)
    along = math.cos(angle) * axis + math.sin(angle) * axis[:, None]
    if kind == "gradient":
        return np.clip(along + 0.5, 0, 1)
    wave = np.sin(2 * math.pi * (along / period + rng.uniform()))
    return soft_step(wave, rng.uniform(0.2, 2))


def smooth_noise(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """Numbers of about 0..1, [size, size], that vary over size / cells pixels."""
    coarse = Image.fromarray(rng.random((cells, cells), dtype=np.float32))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))


def soft_step(x: np.ndarray, width: float) -> np.ndarray:
    return np.clip(x / width + 0.5, 0, 1)


def add_clutter(rng: np.random.Generator, canvas: Image.Image) -> None:
    """Draw lines, arcs, specks and splinters, all smaller or thinner than any object."""
    draw, unit = ImageDraw.Draw(canvas), canvas.width / REFERENCE_SIZE
    for _ in range(integer(rng, CLUTTER)):
        x, y = rng.uniform(0, canvas.width, 2)
        colour, width = random_colour(rng), round(rng.uniform(0.6, 2) * unit)
        if rng.random() < 0.5:
            dx, dy = rng.uniform(-60, 60, 2) * unit
            draw.line([x, y, x + dx, y + dy], fill=colour, width=width)
        else:
            radius, start = rng.uniform(6, 50) * unit, rng.uniform(0, 360)
            stop = start + rng.uniform(30, 180)
            draw.arc([x - radius, y - radius, x + radius, y + radius], start, stop, fill=colour, width=width)
    for _ in range(integer(rng, CLUTTER)):
        x, y = rng.uniform(0, canvas.width, 2)
        if rng.random() < 0.5:
            radius = rng.uniform(0.6, 2) * unit
            draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=random_colour(rng))
        else:
            corners = (x, y) + rng.uniform(-6, 6, (4, 2)) * unit
            draw.polygon(corners.ravel().tolist(), fill=random_colour(rng))


def add_objects(rng: np.random.Generator, canvas: Image.Image) -> list[dict]:
    """Paint objects and distractors one over another; return the objects' annotations, without ids."""
    kinds = [*rng.integers(len(CLASSES), size=integer(rng, OBJECTS))]
    kinds += [*rng.integers(len(CLASSES), len(FIGURES), size=integer(rng, DISTRACTORS))]
    owners = Image.new("L", canvas.size)  # at each pixel the number of the visible figure, from 1, or 0
    shown: list[Any] = []
    whole: list[int] = []  # each figure's area, and that of its visible part
    visible: list[int] = []
    for kind in rng.permutation(kinds):
        for _ in range(TRIES):
            stamp = place(rng, FIGURES[kind], canvas.width)
            hides = owners.crop(stamp.box).histogram(stamp.mask)  # hidden pixels of the background and of each figure
            whole_then = [*whole, stamp.area]
            visible_then = [*(n - lost for n, lost in zip(visible, hides[1:], strict=False)), sum(hides)]
            if all(n >= MIN_VISIBLE * area for n, area in zip(visible_then, whole_then, strict=True)):
                paint(rng, canvas, stamp)
                shown, whole, visible = [*shown, kind], whole_then, visible_then
                owners.paste(len(shown), stamp.box, stamp.mask)
                break
    return [
        annotation(kind, owners.point([255 * (owner == number) for owner in range(256)]), area)
        for number, (kind, area) in enumerate(zip(shown, visible, strict=True), start=1)
        if kind < len(CLASSES)
    ]


class Stamp(NamedTuple):
    """A figure at its place on the canvas, clipped to the frame."""

    box: tuple[int, int, int, int]  # x0, y0, x1, y1
    mask: Image.Image  # 0 or 255, as large as the box
    pattern: Image.Image  # likewise
    area: int  # pixels of the whole, unclipped figure


def place(rng: np.random.Generator, figure: Figure, canvas_size: int) -> Stamp:
    """Stretch, rotate, scale and move a figure at random."""
    stretch, angle = math.sqrt(log_uniform(rng, STRETCH)), rng.uniform(0, 2 * math.pi)
    cos, sin = math.cos(angle), math.sin(angle)
    matrix = np.array([[stretch, 0], [0, 1 / stretch]]) @ np.array([[cos, sin], [-sin, cos]])
    extent = np.ptp(figure.outline @ matrix, axis=0)
    scale = log_uniform(rng, SIDE) * canvas_size / REFERENCE_SIZE / math.sqrt(extent.prod())
    matrix, extent = scale * matrix, scale * extent
    corner = rng.uniform(MARGIN * extent, canvas_size - MARGIN * extent) - extent / 2
    x, y = (math.floor(v) for v in corner)
    width, height = (math.ceil(v) + 2 for v in extent)
    shift = corner - (x, y) - (figure.outline @ matrix).min(axis=0)

    mask, pattern = Image.new("L", (width, height)), Image.new("L", (width, height))
    for image, polygons, value in [
        (mask, (figure.outline,), 255),
        (mask, figure.holes, 0),
        (pattern, figure.pattern, 255),
    ]:
        draw = ImageDraw.Draw(image)
        for polygon in polygons:
            draw.polygon((polygon @ matrix + shift).ravel().tolist(), fill=value)
    box = max(x, 0), max(y, 0), min(x + width, canvas_size), min(y + height, canvas_size)
    frame = box[0] - x, box[1] - y, box[2] - x, box[3] - y
    return Stamp(box, mask.crop(frame), ImageChops.darker(mask, pattern).crop(frame), mask.histogram()[255])


def paint(rng: np.random.Generator, canvas: Image.Image, stamp: Stamp) -> None:
    """Paint a stamp in colours that stand out from what it covers, and from each other."""
    covered = canvas.crop(stamp.box).resize((5, 5), Image.Resampling.NEAREST)
    ground = np.asarray(covered, dtype=float).reshape(-1, 3)
    first = contrasting_colour(rng, ground)
    canvas.paste(first, stamp.box, stamp.mask)
    second = contrasting_colour(rng, np.concatenate([ground, np.broadcast_to(first, ground.shape)]))
    canvas.paste(second, stamp.box, stamp.pattern)


def contrasting_colour(rng: np.random.Generator, colours: np.ndarray) -> tuple[int, ...]:
    """A random colour that differs by MIN_CONTRAST from four fifths of the colours [N, 3], if one of 24 does."""
    candidates = rng.integers(0, 256, (24, 3))
    distances = np.sqrt((candidates[:, None] - colours) ** 2 @ LUMA)  # [24, N]
    distance = np.sort(distances, axis=1)[:, len(colours) // 5]
    best = np.argmax(np.minimum(distance, MIN_CONTRAST))  # the first with enough contrast
    return tuple(candidates[best].tolist())


def annotation(label: int, mask: Image.Image, area: int) -> dict:
    """COCO's entry of one object, without ids, from its visible part on the canvas."""
    box = mask.getbbox()
    assert box is not None  # at least MIN_VISIBLE of it
    x0, y0, x1, y1 = box
    return {
        "category_id": CATEGORY_IDS[label],
        "bbox": [round(v / SCALE, 2) for v in (x0, y0, x1 - x0, y1 - y0)],
        "area": round(area / SCALE**2, 2),
        "iscrowd": 0,
        "segmentation": [],
    }


def develop(rng: np.random.Generator, image: Image.Image) -> Image.Image:
    """A camera's effects: blur, uneven light, contrast, brightness, noise."""
    pixels: np.ndarray = np.asarray(image.filter(ImageFilter.GaussianBlur(rng.uniform(*BLUR))), dtype=np.float32)
    light = 1 + rng.uniform(*LIGHT) * (2 * smooth_noise(rng, image.width, 2) - 1)
    pixels = (pixels * light[..., None] - 128) * rng.uniform(*CONTRAST) + 128 + rng.uniform(*BRIGHTNESS)
    noise = rng.standard_normal(pixels.shape, dtype=np.float32)
    return to_image(pixels + rng.uniform(*NOISE) * noise)


def to_image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def random_colour(rng: np.random.Generator) -> tuple[int, ...]:
    return tuple(rng.integers(0, 256, 3).tolist())


def integer(rng: np.random.Generator, bounds: tuple[int, int]) -> int:
    return int(rng.integers(bounds[0], bounds[1], endpoint=True))


def log_uniform(rng: np.random.Generator, bounds: tuple[float, float]) -> float:
    return math.exp(rng.uniform(math.log(bounds[0]), math.log(bounds[1])))

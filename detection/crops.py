"""The built-in classification set: the drawn objects cut out, in folders by class."""

from pathlib import Path

import numpy as np

from detection.shapes import CATEGORY_IDS, CLASSES, FORMAT, JPEG_QUALITY, draw_image, draw_once

ROOM = 1.3  # side of a crop over the longer side of its object
MIN_CROP = 24  # pixels


def make_shape_crops(folder: str | Path, *, train_scenes: int = 1000, val_scenes: int = 200, size: int = 96) -> Path:
    """Draw scenes as `shapes.make_shapes` does, and cut their objects out into {train,val}/<class>/NNNNNN_N.jpg.

    A crop is a square around one object, which others may reach into; a scene of `size` x `size` pixels gives about
    four. An existing set is reused, and UserError raised, as in `shapes.draw_once`.
    """
    splits = {"train": train_scenes, "val": val_scenes}

    def draw(unfinished: Path) -> None:
        for split, (name, scenes) in enumerate(splits.items()):
            for label in CLASSES:
                (unfinished / name / label).mkdir(parents=True)
            for number in range(scenes):
                _write_crops(unfinished / name, np.random.default_rng([0, split, number]), number, size)

    made_of = {"format": FORMAT, "train_scenes": train_scenes, "val_scenes": val_scenes, "size": size}
    return draw_once(Path(folder), made_of, draw)


def _write_crops(folder: Path, rng: np.random.Generator, number: int, size: int) -> None:
    image, objects = draw_image(rng, size)
    for i, found in enumerate(objects):
        x, y, width, height = found["bbox"]
        side = min(size, max(MIN_CROP, round(ROOM * max(width, height))))
        left, top = (
            int(np.clip(round(corner + length / 2 - side / 2), 0, size - side))
            for corner, length in ((x, width), (y, height))
        )
        crop = image.crop((left, top, left + side, top + side))
        name = CLASSES[CATEGORY_IDS.index(found["category_id"])]
        crop.save(folder / name / f"{number:06d}_{i}.jpg", quality=JPEG_QUALITY)

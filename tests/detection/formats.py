"""One tiny data set as each exporter writes it: odd sizes, an image without objects, a class with a space."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ["big cat", "dog"]
SIZES = {"train": {"a": (33, 21), "b": (20, 41), "c d": (17, 17)}, "val": {"e": (39, 23), "f": (64, 48)}}
BOXES = {  # class, x, y, width, height in pixels
    "a": [(0, 3, 2, 20, 9), (1, 0, 0, 33, 21)],
    "b": [(1, 4, 30, 9, 11)],
    "e": [(0, 10, 3, 11, 17)],
    "f": [(1, 7, 5, 30, 20), (0, 60, 40, 4, 8)],
}


def images(folder: Path, names) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        size = next(of[name] for of in SIZES.values() if name in of)
        pixels = np.random.default_rng(len(name) + ord(name[0])).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")


def coco_file(file: Path, names, *, name_of="{}.png", first=1) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    sizes = {name: size for of in SIZES.values() for name, size in of.items()}
    content = {
        "images": [
            {"id": i, "file_name": name_of.format(name), "width": sizes[name][0], "height": sizes[name][1]}
            for i, name in enumerate(names, first)
        ],
        "annotations": [
            {"id": 0, "image_id": i, "category_id": box[0] + 1, "bbox": list(box[1:])}
            for i, name in enumerate(names, first)
            for box in BOXES.get(name, ())
        ],
        "categories": [{"id": i, "name": name} for i, name in enumerate(NAMES, 1)],
    }
    for number, annotation in enumerate(content["annotations"]):
        annotation["id"] = number
    file.write_text(json.dumps(content))


def yolo_labels(folder: Path, names, *, digits=6, polygons=False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        width, height = next(of[name] for of in SIZES.values() if name in of)
        lines = []
        for category, x, y, w, h in BOXES.get(name, ()):
            numbers = [(x + w / 2) / width, (y + h / 2) / height, w / width, h / height]
            if polygons:
                corners = [(x, y + h / 2), (x + w / 2, y), (x + w, y + h / 2), (x + w / 2, y + h)]
                numbers = [value for px, py in corners for value in (px / width, py / height)]
            lines.append(" ".join([str(category), *(f"{number:.{digits}f}" for number in numbers)]))
        (folder / f"{name}.txt").write_text("\n".join(lines))


def voc_files(folder: Path, names, *, first=1) -> None:
    """`first` 1 writes VOC's corners, 0 edges that count from 0 with a decimal point."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        objects = "".join(
            f"<object><name>{NAMES[category]}</name><difficult>0</difficult><bndbox>"
            + "".join(
                f"<{tag}>{value if first else float(value)}</{tag}>"
                for tag, value in (("xmin", x + first), ("ymin", y + first), ("xmax", x + w), ("ymax", y + h))
            )
            + "</bndbox></object>"
            for category, x, y, w, h in BOXES.get(name, ())
        )
        (folder / f"{name}.xml").write_text(f"<annotation><filename>{name}.png</filename>{objects}</annotation>")


def coco(folder: Path) -> None:
    for split, names in SIZES.items():
        images(folder / f"{split}2017", names)
        coco_file(folder / f"annotations/instances_{split}2017.json", [*names][::-1])


def roboflow_coco(folder: Path) -> None:
    for split, place in (("train", "train"), ("val", "valid")):
        images(folder / place / "images", SIZES[split])
        coco_file(folder / place / "_annotations.coco.json", SIZES[split], name_of="images/{}.png")


def files_by_name(folder: Path) -> None:
    for split, names in SIZES.items():
        images(folder / "pictures", names)
        coco_file(folder / f"my_{split}.json", names, name_of=r"C:\pictures\{}.png")


def ultralytics(folder: Path) -> None:
    for split, names in SIZES.items():
        images(folder / "images" / split, names)
        yolo_labels(folder / "labels" / split, names)
    text = "path: ../datasets/mine  # of another machine\ntrain: images/train\nval: images/val\n"
    (folder / "mine.yaml").write_text(f"{text}names:\n  0: {NAMES[0]}\n  1: {NAMES[1]}\n")


def roboflow_yolo(folder: Path) -> None:
    for split, place in (("train", "train"), ("val", "valid")):
        images(folder / place / "images", SIZES[split])
        yolo_labels(folder / place / "labels", SIZES[split], digits=17, polygons=True)
    text = "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n\nnc: 2\n"
    (folder / "data.yaml").write_text(f"{text}names: {NAMES}\n")


def yolo_lists(folder: Path) -> None:
    """As CVAT writes it: lists of paths that are right on another machine only, labels beside the images."""
    for split, names in SIZES.items():
        images(folder / "obj_train_data", names)
        yolo_labels(folder / "obj_train_data", names)
        (folder / f"{split}.txt").write_text("".join(f"data/obj_train_data/{name}.png\n" for name in names))
    (folder / "obj.names").write_text("\n".join(NAMES))
    (folder / "obj.data").write_text(
        "classes = 2\ntrain = data/train.txt\nvalid = data/val.txt\nnames = data/obj.names\nbackup = backup/\n"
    )


def yolo_without_yaml(folder: Path) -> None:
    for split, names in SIZES.items():
        images(folder / split / "images", names)
        yolo_labels(folder / split / "labels", names)
    (folder / "classes.txt").write_text("\n".join(NAMES))


def roboflow_darknet(folder: Path) -> None:
    for split, place in (("train", "train"), ("val", "valid")):
        images(folder / place, SIZES[split])
        yolo_labels(folder / place, SIZES[split])
        (folder / place / "_darknet.labels").write_text("\n".join(NAMES))


def voc(folder: Path) -> None:
    lists = folder / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    for split, names in SIZES.items():
        images(folder / "JPEGImages", names)
        voc_files(folder / "Annotations", names)
        (lists / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))


def roboflow_voc(folder: Path) -> None:
    for split, place in (("train", "train"), ("val", "valid")):
        images(folder / place, SIZES[split])
        voc_files(folder / place, SIZES[split], first=0)


def unpacked(folder: Path) -> None:
    """An archive of one folder."""
    ultralytics(folder / "archive" / "mine")


FORMATS = {
    make.__name__: make
    for make in (
        *(
            coco,
            roboflow_coco,
            files_by_name,
            ultralytics,
            roboflow_yolo,
            yolo_lists,
            yolo_without_yaml,
            roboflow_darknet,
        ),
        *(voc, roboflow_voc, unpacked),
    )
}

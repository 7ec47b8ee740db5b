import json

import pytest
import torch
from PIL import Image
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from detection.anchors import Anchors
from detection.coco import CocoImages
from detection.statistics import LEVELS, describe, object_sizes, unreached
from detection.transforms import InputTransform


def drawn(folder, images, *, names=("cat", "dog"), **options):
    """A data set with an image for each (width, height, boxes [(class, x, y, width, height[, crowd]), ..])."""
    (folder / "images").mkdir(parents=True)
    listed, annotations = [], []
    for i, (width, height, boxes) in enumerate(images, 1):
        Image.effect_noise((width, height), 60).convert("RGB").save(folder / "images" / f"{i}.png")
        listed.append({"id": i, "file_name": f"{i}.png", "width": width, "height": height})
        annotations += [
            {"image_id": i, "category_id": 5 + k, "bbox": box[:4], "iscrowd": len(box) - 4} for k, *box in boxes
        ]
    categories = [{"id": 5 + k, "name": name} for k, name in enumerate(names)]
    (folder / "instances.json").write_text(
        json.dumps({"images": listed, "annotations": annotations, "categories": categories})
    )
    return CocoImages(folder / "images", folder / "instances.json", **options)


@pytest.fixture(scope="module")
def crowded(tmp_path_factory):
    """Images of several shapes, one without boxes, with boxes of all sizes, some at the border."""
    generator = torch.Generator().manual_seed(0)
    images = []
    for width, height in ((97, 64), (50, 211), (33, 21), (300, 40)):
        boxes = []
        for _ in range(0 if width == 33 else 60):
            x, y, w, h = torch.rand(4, generator=generator).tolist()
            x, y = x * (width - 2), y * (height - 2)
            boxes.append((0, x, y, 2 + w * w * (width - 2 - x), 2 + h * h * (height - 2 - y)))
        images.append((width, height, boxes))
    return drawn(tmp_path_factory.mktemp("crowded"), images)


def resized(dataset, index, shorter_side, max_size):
    """The padded image and its boxes as a detector's own transform makes them."""
    transform = InputTransform(shorter_side, max_size, [0.0] * 3, [1.0] * 3).eval()
    image, target = dataset[index]
    images, [target] = transform([image / 255], [target])
    return images, target["boxes"]


@pytest.mark.parametrize("shorter_side, max_size", [(50, 1333), (128, 160)])
def test_object_sizes_are_those_after_the_detectors_transform(crowded, shorter_side, max_size):
    boxes = torch.cat([resized(crowded, i, shorter_side, max_size)[1] for i in range(len(crowded))])
    expected = (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt()
    torch.testing.assert_close(object_sizes(crowded, shorter_side, max_size), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("scale, levels, iou", [(8, LEVELS, 0.5), (2.5, ("p3", "p4"), 0.7)])
def test_a_box_is_unreached_if_no_anchor_of_the_detector_overlaps_it_enough(crowded, scale, levels, iou):
    strides = [2 ** int(level[1:]) for level in levels]
    anchors = Anchors([(scale * stride,) for stride in strides], strides, as_torchvision=False)
    expected = []
    for index in range(len(crowded)):
        images, boxes = resized(crowded, index, 90, 200)
        maps = [torch.empty(1, 1, *(-(-side // stride) for side in images.tensors.shape[2:])) for stride in strides]
        [of_image] = anchors(ImageList(images.tensors, images.image_sizes), maps)
        expected.append(box_iou(boxes, of_image).amax(1) < iou)
    found = unreached(crowded, 90, 200, scale, levels, iou=iou)
    assert torch.equal(found, torch.cat(expected)) and 0 < found.sum() < len(found)


GOOD = (0, 1, 2, 20, 10)


@pytest.mark.parametrize(
    "kind, boxes",
    [
        ("boxes that are not finite", [GOOD, (0, 1, float("nan"), 9, 9)]),
        ("boxes of zero or negative size", [GOOD, (1, 1, 2, 20, 0), (1, 1, 2, -3, 5)]),
        ("boxes under a pixel or outside their image", [GOOD, (0, 61, 3, 5, 5), (0, 3, 3, 0.5, 5)]),
        ("boxes clipped to their image", [GOOD, (0, 50, 3, 15, 5)]),
        ("boxes equal to another of their class", [GOOD, GOOD, (1, 1, 2, 20, 11), GOOD]),
        ("boxes equal to one of another class", [GOOD, (1, 1, 2, 20, 10)]),
        ("boxes over 95% of their image", [GOOD, (0, 0, 0, 60, 39)]),
        ("boxes with a side under 2 pixels", [GOOD, (0, 3, 4, 30, 1.5)]),
        (None, [GOOD, (0, 0, 0, 60, 40, 1), (0, 0, 0, 60, 40, 1), (0, 0, 0, 1.5, 0, 1), (0, 0, 0, 60, 37)]),
    ],
)
def test_each_kind_of_odd_box_is_counted_with_its_place_and_no_other_kind(tmp_path, kind, boxes):
    dataset = drawn(tmp_path, [(60, 40, [GOOD]), (60, 40, boxes)])
    data = describe({"train": dataset})
    odd = data.splits["train"].odd_boxes
    wrong = {"boxes equal to another of their class": 2, "boxes of zero or negative size": 2}.get(kind, 1)
    wrong = 2 if kind == "boxes under a pixel or outside their image" else wrong
    assert {name: of.boxes for name, of in odd.items() if of.boxes} == ({kind: wrong} if kind else {})
    if kind:
        assert odd[kind].examples[0]["file"] == "2.png" and len(odd[kind].examples) == wrong
        assert any(line.startswith(f"train: {kind}: {wrong}; the first: ") for line in data.findings)


@pytest.mark.parametrize("keep_empty", [True, False])
def test_classes_empty_and_crowded_images_are_counted_in_each_split(tmp_path, keep_empty):
    many = [(k % 2, k % 50, 3, 5 + k / 50, 9) for k in range(101)]
    train = drawn(tmp_path / "train", [(60, 40, many), (50, 21, []), (60, 40, [GOOD])], keep_empty=keep_empty)
    val = drawn(tmp_path / "val", [(33, 21, [GOOD, (0, 5, 5, 9, 9)])], names=("cat", "dog", "bird"))
    data = describe({"train": train, "val": val})
    of_train, of_val = data.splits.values()
    assert (of_train.images, of_train.boxes, of_train.empty_images, of_train.crowded_images) == (3, 102, 1, 1)
    assert of_train.boxes_per_image.max == 101 and sum(of_train.histograms["boxes_per_image"]) == 3
    assert of_train.image_sizes == [(60, 40, 2), (50, 21, 1)]
    assert [(c.name, c.boxes, c.images) for c in data.classes] == [
        ("cat", {"train": 52, "val": 2}, {"train": 2, "val": 1}),
        ("dog", {"train": 50, "val": 0}, {"train": 1, "val": 0}),
        ("bird", {"val": 0}, {"val": 0}),
    ]
    assert "val: classes without a box: dog, bird" in data.findings
    assert "train: classes that train does not list: bird" in data.findings
    assert (of_val.box_sides.min, of_val.box_sides.max) == (9, round(200**0.5, 3))
    assert of_val.aspect_ratios.max == 2 and of_val.histograms["aspect_ratios"] == [0] * 8 + [1, 0, 1] + [0] * 5


def test_images_with_the_same_bytes_are_found_within_a_split_and_between_splits(tmp_path):
    train, val = (drawn(tmp_path / name, [(20, 10, [])] * 4) for name in ("train", "val"))
    pixels = {path: path.read_bytes() for path in (train.path(i) for i in range(4))}
    for path in (train.path(2), val.path(1), val.path(3)):
        path.write_bytes(pixels[train.path(0)])
    end = bytearray(pixels[train.path(1)])
    end[-20] ^= 1  # as large, not equal
    val.path(0).write_bytes(end)
    train.path(3).unlink()
    data = describe({"train": train, "val": val})
    assert data.equal_images == [{"train": ["1.png", "3.png"], "val": ["2.png", "4.png"]}]
    assert data.copies == {"train": 1, "val": 1} and data.leaks == {"val in train": 2}
    assert any(line.startswith("val: 2 of 4 images are in train too, with the same bytes") for line in data.findings)


def test_a_set_without_boxes_has_statistics(tmp_path):
    data = describe({"train": drawn(tmp_path, [(20, 10, [])])})
    assert data.splits["train"].box_sides.median is None and data.splits["train"].at_network_sizes[0].small == 0


def test_of_too_many_files_of_equal_sizes_none_is_read_and_a_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("detection.statistics.HASHED", 100)
    dataset = drawn(tmp_path, [(20, 10, [GOOD])] * 2)
    dataset.path(1).write_bytes(dataset.path(0).read_bytes())
    data = describe({"train": dataset})
    assert data.equal_images == [] and data.not_compared_bytes == 2 * dataset.path(0).stat().st_size
    assert any(line.startswith("equal images were not looked for: ") for line in data.findings)

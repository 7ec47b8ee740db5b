import json

import pytest
import torch
from PIL import Image
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from detection.anchors import Anchors
from detection.coco import CocoImages
from detection.statistics import object_sizes, unreached
from detection.transforms import InputTransform


def drawn(folder, images, *, names=("cat", "dog")):
    """A data set with an image for each (width, height, boxes [(class, x, y, width, height), ..])."""
    (folder / "images").mkdir(parents=True)
    listed, annotations = [], []
    for i, (width, height, boxes) in enumerate(images, 1):
        Image.effect_noise((width, height), 60).convert("RGB").save(folder / "images" / f"{i}.png")
        listed.append({"id": i, "file_name": f"{i}.png", "width": width, "height": height})
        annotations += [{"image_id": i, "category_id": 5 + k, "bbox": box} for k, *box in boxes]
    categories = [{"id": 5 + k, "name": name} for k, name in enumerate(names)]
    (folder / "instances.json").write_text(
        json.dumps({"images": listed, "annotations": annotations, "categories": categories})
    )
    return CocoImages(folder / "images", folder / "instances.json")


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


@pytest.mark.parametrize("scale, levels, iou", [(8, ("p2", "p3", "p4", "p5"), 0.5), (2.5, ("p3", "p4"), 0.7)])
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

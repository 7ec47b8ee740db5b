"""What several tests of detection make: annotation files, small detectors, and pycocotools' own numbers."""

import contextlib
import io

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

from detection.config import BACKBONE_OF
from detection.faster_rcnn import build_faster_rcnn
from resbackbone import build_resnet_backbone

CATEGORIES = [{"id": 90, "name": "toothbrush"}, {"id": 3, "name": "car"}, {"id": 13, "name": "stop sign"}]
FEW = {  # regions: enough to train on a tiny image, and to find something
    "min_size": 64,
    "max_size": 97,
    "box_score_thresh": 0.0,
    "rpn_pre_nms_top_n_train": 60,
    "rpn_post_nms_top_n_train": 20,
    "rpn_post_nms_top_n_test": 30,
    "box_batch_size_per_image": 8,
    "representation_size": 16,
}

TWO_IMAGES = (64, 97), (50, 61)
SOME_BOXES = (3, 4, 40, 50), (20, 10, 96, 60)
V2 = {"rpn_conv_depth": 2, "box_conv_layers": (256,) * 4, "box_norm": "BN"}


def content(images=1, boxes=((1, 2, 10, 8),), **changes):
    """An instances file: images 7, 8, .. of 33 x 21 pixels, `boxes` on the first, of each category in turn."""
    return {
        "images": [{"id": 7 + i, "file_name": f"{7 + i}.png", "width": 33, "height": 21} for i in range(images)],
        "annotations": [
            {"id": 1 + i, "image_id": 7, "category_id": CATEGORIES[i % 3]["id"], "bbox": list(box), "iscrowd": 0}
            for i, box in enumerate(boxes)
        ],
        "categories": [dict(category) for category in CATEGORIES],
        **changes,
    }


def cats_and_dogs(boxes, categories=("cat", "dog"), images=2, **changes):
    """An instances file: images 1, 2, .. of 60 x 50 pixels, `boxes` of the first category on the first."""
    return {
        "images": [{"id": 1 + i, "file_name": f"{1 + i}.png", "width": 60, "height": 50} for i in range(images)],
        "categories": [{"id": 3 + 4 * i, "name": name} for i, name in enumerate(categories)],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": 3, "bbox": list(box), "area": box[2] * box[3], "iscrowd": 0}
            for i, box in enumerate(boxes)
        ],
        **changes,
    }


COLOURS = {1: (255, 0, 0), 2: (0, 255, 0), 3: (0, 0, 255), 4: (255, 255, 0)}  # of the objects with these labels


def coloured(height, width, boxes):
    """An image with an object for each label in its own colour on grey."""
    image = torch.full((3, height, width), 90, dtype=torch.uint8)
    for label, (x1, y1, x2, y2) in boxes.items():
        image[:, y1:y2, x1:x2] = torch.tensor(COLOURS[label], dtype=torch.uint8)[:, None, None]
    return image, {"boxes": torch.tensor([*boxes.values()]).float().view(-1, 4), "labels": torch.tensor([*boxes])}


def seen(image):
    """{label: box} of the colours in an image."""
    found = {}
    for label, colour in COLOURS.items():
        near = (image.int() - torch.tensor(colour)[:, None, None]).abs().amax(0) < 100
        if near.any():
            rows, columns = near.nonzero().unbind(1)
            found[label] = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    return found


def assert_boxes_are_seen(image, target):
    found = seen(image)
    returned = dict(zip(target["labels"].tolist(), target["boxes"].tolist(), strict=True))
    assert len(returned) == len(target["labels"]) and returned.keys() <= found.keys()
    for label, box in found.items():
        if label in returned:
            assert np.abs(np.subtract(box, returned[label])).max() <= 1
        else:
            assert min(box[2] - box[0], box[3] - box[1]) <= 2  # under a pixel, which may lie across two


def keys_of_torchvisions_draws(labels):
    """Keys for `sampling.sample` by which it draws what torchvision's sampler does from the same random state."""
    keys = torch.zeros(labels.shape, dtype=torch.float64)
    for of_image, row in zip(keys, labels, strict=True):
        for group in (row >= 1, row == 0):  # its order
            places = group.nonzero().squeeze(1)
            of_image[places[torch.randperm(len(places))]] = 1 - torch.arange(len(places)).double() / (1 + len(places))
    return keys


def target(*boxes, labels=None):
    labels = [1 + i % 3 for i in range(len(boxes))] if labels is None else labels
    return {"boxes": torch.tensor(boxes).float().reshape(-1, 4), "labels": torch.tensor(labels, dtype=torch.int64)}


def two_images():
    return [torch.rand(3, *size) for size in TWO_IMAGES]


def small_detector(variant="fpn", *, depth=18, norm="BN", **options):
    arguments = dict(BACKBONE_OF[variant]) | ({"fpn_channels": 16} if variant == "fpn" else {})
    backbone = build_resnet_backbone(depth, norm=norm, **arguments)
    return build_faster_rcnn(backbone, 3, variant=variant, **{**FEW, **options})


def lively(model):
    """Norms that are not the identity, and classes, boxes and scores that vary, without training; in eval mode."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(getattr(module, "running_var", None), torch.Tensor):
                module.weight.uniform_(0.2, 0.6)
                module.bias.normal_(0, 0.1)
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
        for name, parameter in model.named_parameters():
            if "box_predictor" in name and name.endswith("weight"):
                parameter.mul_(5)
    return model.eval()


def with_masks_and_keypoints(detector):
    heads, levels = detector.roi_heads, ["p2", "p3", "p4", "p5"]
    heads.mask_roi_pool = MultiScaleRoIAlign(levels, output_size=14, sampling_ratio=2)
    heads.mask_head, heads.mask_predictor = MaskRCNNHeads(16, (16,), 1), MaskRCNNPredictor(16, 16, 4)
    heads.keypoint_roi_pool = MultiScaleRoIAlign(levels, output_size=14, sampling_ratio=2)
    heads.keypoint_head, heads.keypoint_predictor = KeypointRCNNHeads(16, (16,)), KeypointRCNNPredictor(16, 5)
    return detector


def pycocotools_says(annotations, detections, category=None):
    """The 12 numbers as a user gets them, from the file of the annotations and detections in COCO's results format."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        scorer = COCOeval(truth, truth.loadRes(detections), "bbox")
        if category is not None:
            scorer.params.catIds = [category]
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    return [None if value < 0 else value for value in scorer.stats]

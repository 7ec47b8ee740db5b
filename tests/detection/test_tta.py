import pytest
import torch
from made import coloured, lively, seen, small_detector
from torch import nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import batched_nms, box_iou

from detection import tta
from resbackbone import build_resnet_backbone
from resbackbone.checks import UserError

IMAGE = 51, 70
NAMES = "boxes", "scores", "labels"


@torch.inference_mode()
def found_by(detector, *images):
    return detector(list(images))


class ByColour(nn.Module):
    """A detector that finds the objects of `made.coloured`, and notes the sizes it sees them at."""

    nms_thresh, detections_per_img = 0.5, 10

    def __init__(self):
        super().__init__()
        self.transform = GeneralizedRCNNTransform(64, 100, [0.0] * 3, [1.0] * 3)
        self.sizes = []

    def forward(self, images):
        resized, _ = self.transform(images)
        self.sizes += resized.image_sizes
        found = [seen(image * 255) for image in resized.tensors]
        results = [
            {
                "boxes": torch.tensor([[float(x) for x in box] for box in boxes.values()]).view(-1, 4),
                "labels": torch.tensor([*boxes], dtype=torch.int64),
                "scores": 1 - torch.arange(len(boxes)) / 10,
            }
            for boxes in found
        ]
        return self.transform.postprocess(results, resized.image_sizes, [image.shape[-2:] for image in images])


def test_each_object_is_found_once_where_it_is_from_all_sizes_and_their_mirror_images():
    boxes = {1: (0, 0, 20, 15), 2: (30, 20, 51, 40), 3: (55, 2, 70, 13)}
    image, target = coloured(*IMAGE, boxes)
    empty, _ = coloured(33, 41, {})
    detector = ByColour().eval()
    found, nothing = found_by(tta.TestTimeAugmentation(detector, (40, 64, 90)), image / 255, empty / 255)
    assert detector.sizes[::2] == [(40, 54)] * 2 + [(64, 87)] * 2 + [(90, 123)] * 2
    assert sorted(found["labels"].tolist()) == [1, 2, 3]
    assert (found["boxes"] - target["boxes"][found["labels"] - 1]).abs().max() <= 1
    assert nothing["boxes"].shape == (0, 4) and nothing["labels"].shape == (0,)
    assert (detector.transform.min_size, detector.transform.max_size) == ((64,), 100)


@pytest.fixture(params=["ours", "torchvision's RetinaNet"])
def detector(request):
    torch.manual_seed(0)
    if request.param == "ours":
        return lively(small_detector())
    backbone = build_resnet_backbone(18, fpn=True, fpn_channels=16, norm="BN")
    retinanet = RetinaNet(backbone, 4, min_size=64, max_size=97, score_thresh=0.0, detections_per_img=50)
    with torch.no_grad():
        retinanet.head.classification_head.cls_logits.weight.mul_(50)
    return lively(retinanet)


def test_at_the_detectors_own_size_alone_its_detections_are_the_same_bit_for_bit(detector):
    image = torch.rand(3, *IMAGE)
    [alone] = found_by(detector, image)
    [same] = found_by(tta.TestTimeAugmentation(detector, (64,), flip=False), image)
    assert len(alone["boxes"]) > 10 and all(torch.equal(alone[name], same[name]) for name in NAMES)
    [other] = found_by(tta.TestTimeAugmentation(detector, (48,), flip=False), image)
    assert not torch.equal(alone["scores"], other["scores"])


def test_a_mirrored_image_gives_mirrored_detections(detector):
    image = torch.rand(3, *IMAGE)
    augmented = tta.TestTimeAugmentation(detector, (48, 64))
    [found], [mirrored] = (found_by(augmented, each) for each in (image, image.flip(-1)))
    assert len(found["boxes"]) > 10
    assert torch.equal(mirrored["scores"], found["scores"]) and torch.equal(mirrored["labels"], found["labels"])
    torch.testing.assert_close(tta.mirror(mirrored["boxes"], IMAGE[1]), found["boxes"], rtol=0, atol=1e-3)
    assert not torch.allclose(mirrored["boxes"], found["boxes"], atol=1)


def test_merged_boxes_lie_in_the_image_and_keep_no_graph_of_the_passes(detector):
    [found] = tta.TestTimeAugmentation(detector, (48, 64))([torch.rand(3, 33, 65)])
    assert (found["boxes"] >= 0).all() and (found["boxes"] <= torch.tensor([65, 33, 65, 33])).all()
    assert not found["boxes"].requires_grad and not found["scores"].requires_grad


def test_a_detectors_categories_are_those_of_the_augmented_one(detector):
    assert tta.TestTimeAugmentation(detector).categories == getattr(detector, "categories", None)


def test_detections_of_the_versions_are_voted_on_at_the_detectors_thresholds(detector):
    image = torch.rand(3, *IMAGE)
    heads = getattr(detector, "roi_heads", detector)
    heads.nms_thresh, heads.detections_per_img = 0.6, 20
    alone = [found_by(tta.TestTimeAugmentation(detector, (size,), flip=False), image)[0] for size in (48, 64)]
    [found] = found_by(tta.TestTimeAugmentation(detector, (48, 64), flip=False), image)
    boxes, scores, labels = (torch.cat([of_size[name] for of_size in alone]) for name in NAMES)
    kept = batched_nms(boxes, scores, labels, 0.6)[:20]
    assert torch.equal(found["scores"], scores[kept]) and torch.equal(found["labels"], labels[kept])
    moved = 0
    for box, label, voted in zip(boxes[kept], labels[kept], found["boxes"], strict=True):
        votes = (box_iou(box[None], boxes)[0] >= 0.6) & (labels == label)  # not 0.5: NMS keeps neighbours apart at that
        mean = (boxes[votes] * scores[votes, None]).sum(0) / scores[votes].sum()
        torch.testing.assert_close(voted, mean)
        moved += int(votes.sum() > 1)
    assert moved


def test_the_default_sizes_are_in_proportion_to_the_detectors_own():
    detector = ByColour()
    assert tta.TestTimeAugmentation(detector).sizes == (32, 40, 48, 56, 64, 72, 80, 88, 96)
    detector.transform.min_size = (600, 48)  # of which inference takes the last
    assert tta.TestTimeAugmentation(detector).sizes == (32, 36, 42, 48, 54, 60, 66, 72)
    detector.transform.min_size = (17,)
    assert tta.TestTimeAugmentation(detector, (17,)).sizes == (17,)


@pytest.mark.parametrize("sizes", [(64, 64), (31,), (-3, 64), 64, (float("nan"),), (48.5,), "64"])
def test_sizes_that_make_no_sense_or_no_difference_are_refused(sizes):
    with pytest.raises(UserError, match="sizes must be a list of distinct whole numbers of at least 32 pixels"):
        tta.TestTimeAugmentation(ByColour(), sizes)


def test_a_detector_of_one_fixed_size_takes_no_others():
    fixed = ByColour()
    fixed.transform.fixed_size = (64, 64)
    with pytest.raises(UserError, match="32: this detector has one fixed size; leave sizes out"):
        tta.TestTimeAugmentation(fixed, (32,))
    assert tta.TestTimeAugmentation(fixed).sizes == (64,)


def test_the_detector_keeps_its_size_when_it_fails():
    detector = ByColour()
    with pytest.raises(UserError), tta.resizing_to(99, detector.transform):
        raise UserError("stopped")
    assert detector.transform.min_size == (64,) and detector.transform.max_size == 100

"""Cascade R-CNN beside a plain loop over images and stages, and beside detectron2's CascadeROIHeads."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from made import lively, small_detector
from torch import nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image

from detection.boxes import is_large
from detection.cascade import CascadeRoIHeads
from detection.paper import ImprovedTesting
from detection.roi_heads import NO_LOSS, is_real
from detection.saved import load_detector, read_described_weights, retarget_detector, save_detector
from resbackbone.weights import read_weights, write_as
from resbackbone.weights.translate import from_ours

IOUS = (0.5, 0.6, 0.7)
WEIGHTS = (10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0)
SIZES = (64, 97), (50, 61), (33, 90)
BOXES = [[3.0, 4, 40, 50], [20, 10, 96, 60], [5, 5, 12, 14]], [], [[10, 3, 80, 30]]
IOU_LOSSES = {"giou": "generalized_box_iou_loss", "diou": "distance_box_iou_loss", "ciou": "complete_box_iou_loss"}


def cascade(**options):
    torch.manual_seed(0)
    few = {"resize_in_training": False, "box_batch_size_per_image": 24, "canonical_scale": 60}
    return lively(small_detector(**{**few, "cascade_ious": IOUS, **options})).double()


def with_leaps(heads):
    """Some boxes leave the image, whatever the weights, and the others move little."""

    def leap(layer, given, deltas):
        away = deltas + deltas.new_tensor([100, 0, 0, 0])
        return torch.where((1000 * deltas[:, :1]).remainder(1) < 0.2, away, deltas / 4)

    for predictor in heads.box_predictor:
        predictor.bbox_pred.register_forward_hook(leap)
    return heads


def targets():
    boxes = [torch.tensor(of_image, dtype=torch.float64).reshape(-1, 4) for of_image in BOXES]
    return [{"boxes": b, "labels": torch.arange(len(b)) % 3 + 1} for b in boxes]


@pytest.fixture
def given():
    """Images, and what the second stage of a detector gets of them: maps, proposals, sizes; maps keep gradients."""

    def make(detector):
        torch.manual_seed(1)
        batch, _ = detector.transform([torch.rand(3, *size, dtype=torch.float64) for size in SIZES])
        with torch.no_grad():
            maps = detector.backbone(batch.tensors)
            proposals, _ = detector.rpn(batch, maps)
        return {name: x.requires_grad_() for name, x in maps.items()}, proposals, batch.image_sizes

    return make


@pytest.fixture
def samples(monkeypatch):
    """The first stage's regions, labels and truth of each image, as the heads sampled them last."""
    kept, sampled = [], CascadeRoIHeads._sampled

    def keep(heads, *arguments):
        kept[:] = [sampled(heads, *arguments)]
        return kept[0]

    monkeypatch.setattr(CascadeRoIHeads, "_sampled", keep)
    return kept


def drawn_of(samples):
    """Each image's regions and labels without the places that fill up."""
    [(regions, labels, _)] = samples
    return [(regions[i, used], labels[i, used]) for i, used in enumerate(labels != NO_LOSS)]


def matched(regions, target, iou):
    """Labels and ground truth of an image's regions."""
    if not len(target["boxes"]):
        return torch.zeros(len(regions), dtype=torch.int64), torch.zeros_like(regions)
    best, index = box_iou(target["boxes"], regions).max(0)
    return target["labels"][index].where(best >= iou, 0), target["boxes"][index]


def plain_losses(heads, maps, image_sizes, drawn, box_loss):
    """Cai and Vasconcelos 2018 as detectron2 has it; also returns how many boxes were dropped, and objects a stage."""
    losses, regions, dropped, objects = {}, [regions for regions, _ in drawn], 0, []
    for stage, iou in enumerate(IOUS):
        coder, labels_and_truth = (
            BoxCoder(WEIGHTS[stage]),
            [matched(*both, iou) for both in zip(regions, targets(), strict=True)],
        )
        labels, truth = (torch.cat(parts) for parts in zip(*labels_and_truth, strict=True))
        pooled = heads.box_roi_pool(maps, regions, image_sizes)
        pooled.register_hook(lambda gradient: gradient / len(IOUS))
        logits, deltas = heads.box_predictor[stage](heads.box_head[stage](pooled))
        positive, together = labels > 0, torch.cat(regions)
        decoded = coder.decode_single(deltas, together)
        if box_loss == "smooth_l1":
            wanted = coder.encode_single(truth[positive], together[positive])
            error = F.smooth_l1_loss(deltas[positive], wanted, beta=1 / 9, reduction="sum")
        else:
            error = getattr(torchvision.ops, IOU_LOSSES[box_loss])(decoded[positive], truth[positive], reduction="sum")
        losses |= {f"loss_classifier_{stage}": F.cross_entropy(logits, labels)}
        losses |= {f"loss_box_reg_{stage}": error / len(labels)}
        objects.append(int(positive.sum()))
        boxes = decoded.detach().split([len(of_image) for of_image in regions])
        clipped = [clip_boxes_to_image(*both) for both in zip(boxes, image_sizes, strict=True)]
        regions = [of_image[is_real(of_image)] for of_image in clipped]
        dropped += sum(map(len, boxes)) - sum(map(len, regions))
    return losses, dropped, objects


def plain_detections(heads, maps, proposals, image_sizes):
    found = []
    for i, size in enumerate(image_sizes):
        of_image = {name: x[i : i + 1] for name, x in maps.items()}
        regions, scores = proposals[i][is_real(proposals[i])], 0
        for stage, weights in enumerate(WEIGHTS):
            pooled = heads.box_roi_pool(of_image, [regions], [size])
            logits, deltas = heads.box_predictor[stage](heads.box_head[stage](pooled))
            scores = scores + logits.softmax(1) / len(IOUS)
            regions = clip_boxes_to_image(BoxCoder(weights).decode_single(deltas, regions), size)
        region, label = (scores[:, 1:] > heads.score_thresh).nonzero().unbind(1)
        boxes, scores = regions[region], scores[region, label + 1]
        large = is_large(boxes, 0.01)
        boxes, scores, label = boxes[large], scores[large], label[large]
        kept = batched_nms(boxes, scores, label, heads.nms_thresh)[: heads.detections_per_img]
        found.append({"boxes": boxes[kept], "labels": label[kept] + 1, "scores": scores[kept]})
    return found


def gradients(losses, heads, maps):
    """Of parameters and maps, p6 apart, by their names; the losses count by their names' order."""
    inputs = dict(heads.named_parameters()) | {name: x for name, x in maps.items() if name != "p6"}
    total = sum((i + 1) * losses[name] for i, name in enumerate(sorted(losses)))
    return dict(zip(inputs, torch.autograd.grad(total, [*inputs.values()]), strict=True))


def assert_same(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"geometry": "detectron2", "box_loss": "giou"},
        {"variant": "dc5", "box_loss": "ciou"},
        {"box_conv_layers": (32,), "box_norm": "GN"},
    ],
    ids=str,
)
def test_losses_gradients_and_detections_are_those_of_a_loop_over_images_and_stages(options, given, samples):
    detector = cascade(**options)
    heads, (maps, proposals, sizes) = with_leaps(detector.roi_heads), given(detector)
    with torch.no_grad():
        found = heads(maps, proposals, sizes)[0]
        wanted = plain_detections(heads, maps, proposals, sizes)
    assert sum(len(of_image["boxes"]) for of_image in found) > 30
    assert_same(found, wanted)
    losses = heads.train()(maps, proposals, sizes, targets())[1]
    wanted, dropped, objects = plain_losses(heads, maps, sizes, drawn_of(samples), options.get("box_loss", "smooth_l1"))
    assert dropped > 0 and min(objects) > 0
    assert_same(losses, wanted)
    assert_same(gradients(losses, heads, maps), gradients(wanted, heads, maps))


@pytest.mark.parametrize("box_loss", ["smooth_l1", "giou", "diou", "ciou"])
def test_losses_gradients_and_detections_are_detectron2s(box_loss, given, samples, monkeypatch):
    pytest.importorskip("detectron2", reason="detectron2 is not installed")
    from detectron2.structures import Boxes, Instances
    from detectron2.utils.events import EventStorage

    monkeypatch.setattr(torch.Tensor, "float", lambda x: x)  # it decodes and keeps boxes in fp32
    monkeypatch.setattr(Boxes, "__init__", lambda boxes, tensor: setattr(boxes, "tensor", tensor))
    detector = cascade(geometry="detectron2", box_loss=box_loss, box_loss_weight=2.0)
    ours, (maps, proposals, sizes) = with_leaps(detector.roi_heads), given(detector)
    theirs = with_leaps(detectron2s(box_loss, {level: 2 ** int(level[1]) for level in maps if level != "p6"}))
    state = from_ours({f"roi_heads.{name}": x for name, x in ours.state_dict().items()}, "detectron2")
    theirs.load_state_dict({name.removeprefix("roi_heads."): x for name, x in state.items()})

    def instances(size, boxes, **fields):
        return Instances(size, proposal_boxes=Boxes(boxes), objectness_logits=torch.zeros(len(boxes)), **fields)

    real = [instances(size, x[is_real(x)]) for size, x in zip(sizes, proposals, strict=True)]
    with torch.no_grad():
        wanted, _ = theirs.eval()(None, maps, real)
        found, _ = ours(maps, proposals, sizes)
    for got, every in zip(found, wanted, strict=True):
        expected = every[is_large(every.pred_boxes.tensor, 0.01)]  # torchvision's detectors drop smaller ones
        assert 10 < len(got["boxes"]) < len(every)
        assert_same(got["scores"], expected.scores)
        assert_same(got["boxes"], expected.pred_boxes.tensor)
        assert torch.equal(got["labels"], expected.pred_classes + 1)

    losses = ours.train()(maps, proposals, sizes, targets())[1]
    truth, sampled = [], []
    for size, target, (regions, labels) in zip(sizes, targets(), drawn_of(samples), strict=True):
        truth.append(Instances(size, gt_boxes=Boxes(target["boxes"]), gt_classes=target["labels"] - 1))
        _, boxes = matched(regions, target, IOUS[0])
        classes = (labels - 1).where(labels > 0, 3)
        sampled.append(instances(size, regions, gt_classes=classes, gt_boxes=Boxes(boxes)))
    with EventStorage():
        of_theirs = theirs.train()._forward_box(maps, sampled, truth)
    names = {"loss_cls": "loss_classifier", "loss_box_reg": "loss_box_reg"}
    wanted = {f"{ours}_{i}": of_theirs[f"{name}_stage{i}"] for i in range(3) for name, ours in names.items()}
    assert_same(losses, wanted)
    found, wanted = gradients(losses, ours, maps), gradients(wanted, theirs, maps)
    of_heads = {f"roi_heads.{name}": found.pop(name) for name in [*found] if name not in maps}
    found |= {name.removeprefix("roi_heads."): x for name, x in from_ours(of_heads, "detectron2").items()}
    assert_same(found, wanted)


def detectron2s(box_loss, strides):
    """Its CascadeROIHeads with the settings of `cascade`."""
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.box_regression import Box2BoxTransform
    from detectron2.modeling.matcher import Matcher
    from detectron2.modeling.poolers import ROIPooler
    from detectron2.modeling.roi_heads import CascadeROIHeads, FastRCNNConvFCHead, FastRCNNOutputLayers

    predictor = {
        "num_classes": 3,
        "test_score_thresh": 0.0,
        "cls_agnostic_bbox_reg": True,
        "smooth_l1_beta": 1 / 9,
        "box_reg_loss_type": box_loss,
        "loss_weight": {"loss_box_reg": 2.0},
    }
    shape = ShapeSpec(channels=16, height=7, width=7)
    heads = [FastRCNNConvFCHead(shape, conv_dims=[], fc_dims=[16, 16]) for _ in IOUS]
    return CascadeROIHeads(
        box_in_features=list(strides),
        box_pooler=ROIPooler(7, [1 / x for x in strides.values()], 0, "ROIAlignV2", canonical_box_size=60),
        box_heads=heads,
        box_predictors=[
            FastRCNNOutputLayers(head.output_shape, box2box_transform=Box2BoxTransform(weights=weights), **predictor)
            for head, weights in zip(heads, WEIGHTS, strict=True)
        ],
        proposal_matchers=[Matcher([iou], [0, 1]) for iou in IOUS],
        num_classes=3,
        batch_size_per_image=24,
        positive_fraction=0.25,
    ).double()


# The detector


def test_it_trains_also_on_an_image_without_objects():
    detector = small_detector(cascade_ious=IOUS, resize_in_training=False).train()
    images, optimizer = [torch.rand(3, *size) for size in SIZES[:2]], torch.optim.SGD(detector.parameters(), lr=0.02)
    of_images = [{"boxes": target["boxes"].float(), "labels": target["labels"]} for target in targets()[:2]]
    history = []
    for _ in range(20):
        losses = detector(images, of_images)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        history.append(sum(losses.values()).item())
    assert losses.keys() > {f"loss_{part}_{i}" for part in ("classifier", "box_reg") for i in range(3)}
    assert sum(history[-3:]) < 0.7 * sum(history[:3])
    assert all(parameter.grad.isfinite().all() for parameter in detector.parameters())


def test_in_bf16_it_trains_and_detects():
    detector = cascade(box_loss="ciou").bfloat16()
    images = [torch.rand(3, *size).bfloat16() for size in SIZES]
    assert len(detector(images)[0]["boxes"]) > 0
    of_images = [{"boxes": target["boxes"].float(), "labels": target["labels"]} for target in targets()]
    assert all(loss.isfinite() for loss in detector.losses(images, of_images).values())


@pytest.mark.parametrize("options", [{}, {"box_conv_layers": (8, 8), "box_norm": "BN", "cascade_ious": (0.5, 0.8)}])
def test_files_of_ours_hold_it(options, tmp_path):
    detector = cascade(categories={3: "car", 7: "bus", 9: "dog"}, box_loss="giou", **options).float()
    save_detector(detector, tmp_path / "ours.safetensors")
    back, image = load_detector(tmp_path / "ours.safetensors"), torch.rand(3, 64, 97)
    assert back.config == detector.config and back.roi_heads.ious == detector.config.cascade_ious
    torch.testing.assert_close(back([image]), detector([image]))
    detector.roi_heads.box_coder.weights = (5.0, 5.0, 2.0, 2.0)
    save_detector(detector, tmp_path / "ours.safetensors")
    assert load_detector(tmp_path / "ours.safetensors").config.bbox_reg_weights == (5.0, 5.0, 2.0, 2.0)
    detector.roi_heads.ious = (0.5,)
    with pytest.raises(ValueError, match=r"roi_heads.ious is \(0.5,\), and load_detector would make it"):
        save_detector(detector, tmp_path / "ours.safetensors")


def test_detectron2_may_have_it_and_give_it_back(tmp_path):
    detector, image = cascade(geometry="detectron2").float(), torch.rand(3, 64, 97)
    save_detector(detector, tmp_path / "ours.safetensors")
    weights = read_weights(tmp_path / "ours.safetensors")
    write_as(tmp_path / "theirs.pkl", weights, "detectron2")
    back = load_detector(tmp_path / "theirs.pkl")
    assert back.config == detector.config
    torch.testing.assert_close(back([image]), detector([image]), rtol=1e-4, atol=1e-3)
    for format, named in (
        ("torchvision", "torchvision has no Cascade R-CNN"),
        ("mmdetection", "has no name for 24 ten"),
    ):
        with pytest.raises(ValueError, match=named):
            write_as(tmp_path / "theirs.pth", weights, format)


def test_a_bare_state_dict_shows_its_stages_and_their_ious_are_assumed(caplog):
    detector = cascade(cascade_ious=(0.5, 0.6, 0.7, 0.8), box_conv_layers=(32,), box_norm="GN")
    weights, image = read_weights(detector.state_dict()), torch.rand(3, 64, 97)
    with pytest.raises(ValueError, match=r"have 4 box heads; state its IoUs: load_detector\(.., cascade_ious="):
        load_detector(weights)
    settings = {"min_size": 64, "max_size": 97, "box_score_thresh": 0.0, "rpn_post_nms_top_n_test": 30}
    back = load_detector(weights, **settings, canonical_scale=60, cascade_ious=(0.5, 0.6, 0.7, 0.8))
    torch.testing.assert_close(back([image]), detector.float()([image]), rtol=1e-4, atol=1e-3)
    load_detector(cascade().state_dict())
    assert "stages trained at the IoUs (0.5, 0.6, 0.7) (cascade_ious)" in caplog.text
    by_class = {f"roi_heads.box_predictor.{i}.bbox_pred.weight": torch.zeros(16, 8) for i in range(3)}
    with pytest.raises(ValueError, match="a box for each class, and .*CLS_AGNOSTIC_BBOX_REG True.* --part backbone"):
        load_detector(cascade().state_dict() | by_class)


@pytest.mark.parametrize("ious", [IOUS, (0.6, 0.7), (0.4, 0.5)])
def test_boxes_are_kept_for_other_classes_and_scores_are_new(ious, tmp_path):
    detector = cascade(cascade_ious=ious).float()
    save_detector(detector, tmp_path / "ours.safetensors")
    weights = read_described_weights(tmp_path / "ours.safetensors")
    built, new = retarget_detector(weights, {1: "cat", 2: "dog"}, backbone={}, box_bg_iou_thresh=0.5)
    scores = [f"roi_heads.box_predictor.{i}.cls_score.{leaf}" for i in range(len(ious)) for leaf in ("weight", "bias")]
    assert sorted(new) == sorted(scores) and built.roi_heads.box_predictor[1].cls_score.out_features == 3
    assert all(torch.equal(x, weights.state[key]) for key, x in built.state_dict().items() if key not in new)
    matcher = built.roi_heads.proposal_matcher
    assert built.roi_heads.ious == ious and (matcher.low_threshold, matcher.high_threshold) == (ious[0], ious[0])
    matcher.high_threshold = 0.9
    with pytest.raises(ValueError, match="roi_heads.ious is .*, and load_detector would make it"):
        save_detector(built, tmp_path / "ours.safetensors")


@pytest.mark.parametrize(
    "options, named",
    [
        ({"variant": "c4"}, "cascade_ious are for fpn and dc5 without global_context, not for variant 'c4'"),
        ({"global_context": True}, "without global_context, not for global_context"),
        ({"box_fg_iou_thresh": 0.6}, "cascade_ious begin with 0.5, and box_fg_iou_thresh is 0.6: they are the same"),
        ({"box_conv_layers": (16,), "box_norm": "GN"}, "norm GN has 32 groups, and a layer here has 16 channels"),
        ({"cascade_ious": (0.5, 1.5)}, r"cascade_ious is \(0.5, 1.5\); it must be from 0 to 1"),
        ({"box_loss": "iou"}, "unknown box loss 'iou'; choose from smooth_l1, giou, diou, ciou"),
        ({"box_loss_weight": 0.0}, "box_loss_weight is 0.0; it must be above 0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(options, named):
    with pytest.raises(ValueError, match=named):
        small_detector(**{"cascade_ious": IOUS, **options})


def test_improvements_of_testing_are_for_one_box_head():
    detector, image = cascade(), torch.rand(3, 64, 97).double()
    assert ImprovedTesting(detector)([image])[0]["scores"].equal(detector([image])[0]["scores"])
    with pytest.raises(ValueError, match="box_refinement and scales are for one box head"):
        ImprovedTesting(detector, box_refinement=True)


@pytest.mark.parametrize(
    "predictor", [FastRCNNPredictor(8, 6), nn.ModuleList(FastRCNNPredictor(8, 6) for _ in IOUS), nn.ModuleList()]
)
def test_a_predictor_that_is_no_list_of_stages_is_refused(predictor):
    detector = cascade()
    detector.roi_heads.box_predictor = predictor.double()
    with pytest.raises(ValueError, match="a cascade of 3 stages has lists of 3 modules .*retarget_detector builds"):
        detector([torch.rand(3, 64, 97).double()])


def test_where_torchvisions_code_would_run_it_says_that_this_has_no_cascade(monkeypatch):
    detector, single = cascade(), small_detector(box_loss="giou").train()
    monkeypatch.setattr(torchvision.models.detection.roi_heads, "fastrcnn_loss", lambda *_: None)
    with pytest.raises(ValueError, match="has no cascade: undo the change"):
        detector([torch.rand(3, 64, 97).double()])
    images, of_images = (
        [torch.rand(3, 64, 97)],
        [{"boxes": torch.tensor([[3.0, 4, 40, 50]]), "labels": torch.ones(1).long()}],
    )
    with pytest.raises(
        ValueError, match="torchvision's own code runs, which has no box_loss='giou' and box_loss_weight"
    ):
        single(images, of_images)

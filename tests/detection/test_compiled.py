"""The detector under torch.compile: one graph, whatever the sizes.

All but the slow test use backends that leave the operations as they are.
"""

import copy
import pickle

import pytest
import torch
import torch._inductor.config
from functorch.compile import make_boxed_func
from made import FEW, lively
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

from detection.config import BACKBONE_OF
from detection.faster_rcnn import build_faster_rcnn
from resbackbone import build_resnet_backbone


def a_batch(*sizes, counts):
    """In fp64, where rounding does not decide which proposals are kept."""
    random, targets = torch.Generator().manual_seed(sum(counts)), []
    for count in counts:
        corners, sides = 40 * torch.rand(2, count, 2, generator=random, dtype=torch.float64)
        labels = torch.randint(1, 4, (count,), generator=random)
        targets.append({"boxes": torch.cat((corners, corners + 8 + sides), 1), "labels": labels})
    return [torch.rand(3, *size, generator=random, dtype=torch.float64) for size in sizes], targets


def results(detector, images, targets, call=None):
    """Losses and gradients from the same random state."""
    torch.manual_seed(0)
    losses = (detector if call is None else call)(images, targets)
    detector.zero_grad()
    sum(losses.values()).backward()
    return {**losses, **{name: p.grad for name, p in detector.named_parameters() if p.grad is not None}}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=1e-9, rtol=1e-9)


def trained(variant="fpn", **options):
    """In training; a pyramid has two levels, the fewest, since compiling takes long."""
    levels = {"levels": ["p2", "p3"], "fpn_channels": 16} if variant == "fpn" else {}
    backbone = build_resnet_backbone(18, norm=options.pop("norm", "BN"), **BACKBONE_OF[variant] | levels)
    options = {**FEW, "resize_in_training": False, **options}
    detector = lively(build_faster_rcnn(backbone, 3, variant=variant, **options)).train().double()
    for module in detector.modules():  # statistics that stay, so that calls can be compared
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    return detector


BATCHES = [
    a_batch((128, 192), (64, 61), counts=(2, 0)),
    a_batch((192, 128), (100, 61), counts=(30, 5)),
    a_batch((128, 128), (30, 61), counts=(0, 0)),
]


def test_one_graph_serves_all_sizes_and_numbers_of_boxes_with_the_same_losses_and_gradients():
    detector = trained()
    wanted = [results(detector, *batch) for batch in BATCHES]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    detector.compile(backend=counter)
    for batch, expected in zip(BATCHES, wanted, strict=True):
        assert_same(results(detector, *batch), expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    "options",
    [
        {"geometry": "detectron2", "global_context": True},
        pytest.param({"variant": "c4"}, marks=pytest.mark.slow),
        {"variant": "dc5", "cascade_ious": (0.5, 0.6, 0.7), "box_loss": "ciou"},
    ],
    ids=str,
)
def test_every_variant_is_one_graph(options):
    detector = trained(**options)
    wanted = results(detector, *BATCHES[0])
    torch._dynamo.reset()
    detector.compile(backend="eager")
    assert_same(results(detector, *BATCHES[0]), wanted)


@pytest.mark.parametrize("options", [{}, pytest.param({"geometry": "detectron2"}, marks=pytest.mark.slow)], ids=str)
@pytest.mark.filterwarnings("ignore:aten")  # of running the graphs on no device
def test_the_graphs_of_a_detector_on_a_device_hold_nothing_on_the_cpu(options):
    """CUDA graphs would end there. Of backward it shows what lies below the losses, where autograd ends on meta."""
    detector = trained(**options).float().to("meta")
    found = []

    def look(graph, inputs):
        found.append({value.device.type for node in graph.graph.nodes for value in tensors_of(node)})
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    detector.compile(backend=aot_autograd(fw_compiler=look, bw_compiler=look))
    batch = torch.empty(2, 3, 2, 64, 3, 64), torch.empty(2, 2), torch.empty(2, 16, 4), torch.empty(2, 16).long()
    sum(detector._compiled(detector, "any", *(x.to("meta") for x in batch)).values()).backward()
    assert found == [{"meta"}, {"meta"}]  # forward and backward


def tensors_of(node):
    values = node.meta.get("val")
    return [x for x in (values if isinstance(values, list | tuple) else [values]) if isinstance(x, torch.Tensor)]


def test_a_list_of_images_and_targets_goes_into_one_graph_too():
    detector = trained()
    wanted = results(detector, *BATCHES[0])
    torch._dynamo.reset()
    compiled = torch.compile(detector, fullgraph=True, backend="eager")
    assert_same(results(detector, *BATCHES[0], call=compiled), wanted)


def test_a_batch_of_other_sides_is_padded_and_a_compiled_detector_still_detects():
    detector = trained()
    detector.compile(backend="eager")
    losses = detector(*a_batch((97, 130), (50, 61), counts=(3, 0)))
    assert len(losses) == 4 and all(loss.isfinite() for loss in losses.values())
    assert len(detector.eval()([torch.rand(3, 64, 97).double()])[0]["boxes"]) > 0


def test_a_part_that_is_hooked_after_compile_counts():
    detector = trained()
    detector.compile(backend="eager")
    detector.rpn.head.register_forward_hook(lambda module, given, output: ([x * 0 for x in output[0]], output[1]))
    losses = detector(*BATCHES[0])
    assert losses["loss_objectness"].item() == pytest.approx(0.6931, abs=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        lambda detector: detector.rpn.anchor_generator.cell_anchors[0].mul_(2),
        lambda detector: patch_grid(detector.rpn.anchor_generator),
        lambda detector: detector.backbone.layer3.register_forward_hook(lambda module, given, output: output * 2),
    ],
    ids=["anchors", "a patch", "a hook on the backbone"],
)
def test_what_changes_after_the_first_compiled_call_counts(change):
    detector = trained()
    torch._dynamo.reset()
    detector.compile(backend="eager")
    before = results(detector, *BATCHES[0])
    change(detector)
    found = results(detector, *BATCHES[0])
    detector._compiled = None
    assert_same(found, results(detector, *BATCHES[0]))
    assert found["loss_rpn_box_reg"] != before["loss_rpn_box_reg"]


def patch_grid(anchors):
    theirs = anchors.grid_anchors
    anchors.grid_anchors = lambda *given: [boxes + 4 for boxes in theirs(*given)]


def test_validation_losses_make_no_graph():
    detector = trained()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    detector.compile(backend=counter)
    with torch.no_grad():
        assert detector.eval().losses(*BATCHES[0]).keys() == detector.train()(*BATCHES[0]).keys()
    assert counter.frame_count == 0


def test_copies_and_pickles_of_a_compiled_detector_are_as_before():
    detector = trained()
    detector.compile(backend="eager")
    wanted = results(detector, *BATCHES[0])
    for other in (copy.deepcopy(detector), pickle.loads(pickle.dumps(detector))):  # noqa: S301
        assert_same(results(other, *BATCHES[0]), wanted)


@pytest.mark.slow  # compiles for five minutes on two cores
def test_inductor_computes_the_same_losses_and_gradients(monkeypatch):
    monkeypatch.setattr(torch._inductor.config, "fallback_random", True)  # the same samples as without
    detector = trained(norm="GN")
    wanted = results(detector, *BATCHES[0])
    torch._dynamo.reset()
    detector.compile()
    assert_same(results(detector, *BATCHES[0]), wanted)

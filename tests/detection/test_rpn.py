import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

from detection.anchors import Anchors
from detection.batch import Targets
from detection.roi_heads import is_real
from detection.rpn import FP32RPNHead, SampledRPN

pytestmark = pytest.mark.usefixtures("torchvisions_samples")
CHANNELS = 6
PYRAMID = {4: (24, 31), 8: (12, 16), 16: (6, 8), 32: (3, 4), 64: (2, 2)}  # stride: height, width of the map
SINGLE = {16: (9, 13)}
SIZES = [(96, 124), (70, 101)]  # of the images, in pixels, before padding
BOXES = [[3.0, 4, 40, 50], [20, 10, 96, 60], [5, 5, 12, 14], [90, 60, 124, 96]]
TARGETS = {"boxes": [BOXES, BOXES[:2]], "boxes on one image": [[], BOXES], "no boxes": [[], []]}


def rpn(kind, levels, *, sampled=32, geometry="torchvision", top=50, depth=1):
    sides = [(8.0 * stride,) for stride in levels] if len(levels) > 1 else [(16.0, 32.0, 64.0, 96.0, 128.0)]
    anchors = Anchors(sides, list(levels), as_torchvision=geometry == "torchvision")
    head = FP32RPNHead(CHANNELS, anchors.num_anchors_per_location()[0], depth)
    before, after = {"training": top, "testing": top // 2}, {"training": top, "testing": 30}
    return kind(anchors, head, 0.7, 0.3, sampled, 0.5, before, after, 0.7)


def pair(levels, dtype=torch.float64, **options):
    """torchvision's network and ours with the same weights."""
    theirs = rpn(RegionProposalNetwork, levels, **options).to(dtype)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0, 0.3 / len(theirs.head.conv))
    ours = rpn(SampledRPN, levels, **options).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def maps_of(levels, images=2, dtype=torch.float64):
    return {f"p{stride}": torch.randn(images, CHANNELS, *size, dtype=dtype) for stride, size in levels.items()}


def maps_at(seed):
    torch.manual_seed(seed)
    return maps_of(PYRAMID)


def images_of(levels):
    stride, (height, width) = next(iter(levels.items()))
    return ImageList(torch.zeros(2, 3, stride * height, stride * width), SIZES)


def targets_of(name, dtype=torch.float32):
    of_images = [torch.tensor(boxes, dtype=dtype).reshape(-1, 4) for boxes in TARGETS[name]]
    return [{"boxes": boxes, "labels": torch.ones(len(boxes), dtype=torch.int64)} for boxes in of_images]


def run(network, levels, maps, targets, *, layout=torch.contiguous_format):
    """Proposals, losses and the gradients of parameters and maps."""
    leaves = {name: x.detach().clone(memory_format=layout).requires_grad_() for name, x in maps.items()}
    torch.manual_seed(1)
    if isinstance(network, SampledRPN):
        padded, losses = network(images_of(levels), leaves, targets and Targets.of(targets))
        proposals = [boxes[is_real(boxes)] for boxes in padded]
    else:
        proposals, losses = network(images_of(levels), leaves, targets)
    gradients = {}
    if losses:
        (losses["loss_objectness"] + 3 * losses["loss_rpn_box_reg"]).backward()
        gradients = {**{n: p.grad for n, p in network.named_parameters()}, **{n: x.grad for n, x in leaves.items()}}
        network.zero_grad()
    return proposals, losses, gradients


@pytest.mark.parametrize("levels", [PYRAMID, SINGLE], ids=["pyramid", "single map"])
@pytest.mark.parametrize("boxes", TARGETS)
@pytest.mark.parametrize("geometry", ["torchvision", "detectron2"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_proposals_losses_and_gradients_are_torchvisions(levels, boxes, geometry, layout, depth):
    maps, targets = maps_of(levels), targets_of(boxes)
    networks = pair(levels, geometry=geometry, depth=depth)
    results = [run(network, levels, maps, targets, layout=layout) for network in networks]
    (wanted_proposals, wanted, wanted_gradients), (proposals, losses, gradients) = results
    assert [len(boxes) for boxes in proposals] == [len(boxes) for boxes in wanted_proposals] and len(proposals[0]) > 20
    for found, expected in zip(proposals, wanted_proposals, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
    for name, loss in wanted.items():
        torch.testing.assert_close(losses[name], loss, atol=1e-10, rtol=1e-10)
    assert wanted_gradients.keys() == gradients.keys()
    for name, gradient in wanted_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-10, rtol=1e-10)


def test_in_fp32_gradients_are_torchvisions_to_rounding():
    maps, targets = maps_of(PYRAMID, dtype=torch.float32), targets_of("boxes")
    wanted, found = (run(network, PYRAMID, maps, targets)[2] for network in pair(PYRAMID, torch.float32))
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5)


def test_under_bf16_autocast_gradients_are_as_close_to_fp64_as_torchvisions():
    maps, targets = {name: x.bfloat16().double() for name, x in maps_of(PYRAMID).items()}, targets_of("boxes")
    theirs, ours = pair(PYRAMID)
    *_, wanted = run(theirs, PYRAMID, maps, targets)
    errors = []
    for network in (theirs, ours):
        network = copy.deepcopy(network).float()
        with torch.autocast("cpu", torch.bfloat16):
            proposals, losses, found = run(network, PYRAMID, {n: x.bfloat16() for n, x in maps.items()}, targets)
        assert all(x.dtype == torch.float32 for x in (*proposals, *losses.values()))
        assert all(found[name].dtype == torch.bfloat16 for name in maps)
        errors.append(torch.stack([(found[n] - g).norm() / g.norm() for n, g in wanted.items() if g.norm() > 0]))
    assert errors[1].max() < 0.02 and errors[1].mean() < 1.1 * errors[0].mean()  # means of nine: 0.0045 and 0.0043


def test_detections_need_no_targets_and_are_torchvisions_also_where_scores_are_equal():
    flat = {name: torch.zeros_like(x) for name, x in maps_of(PYRAMID).items()}
    for maps in (maps_of(PYRAMID), flat):
        for (wanted, _, _), (found, losses, _) in [[run(x.eval(), PYRAMID, maps, None) for x in pair(PYRAMID)]]:
            assert losses == {} and not found[0].requires_grad
            for ours, theirs in zip(found, wanted, strict=True):
                assert 10 < len(ours) <= 30
                torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)


def test_proposals_below_the_score_threshold_are_left_out_as_by_torchvision():
    networks = pair(PYRAMID, top=600)
    for network in networks:
        network.score_thresh, network.nms_thresh = 0.9, 1.0
    maps = maps_of(PYRAMID)
    wanted, found = (run(network, PYRAMID, maps, targets_of("boxes"))[0] for network in networks)
    assert 0 < len(found[0]) < 600 and [len(x) for x in found] == [len(x) for x in wanted]


@pytest.mark.parametrize("boxes", TARGETS)
@pytest.mark.parametrize("sampled, depth", [(1, 1), (2, 1), (32, 1), (1, 2)])
def test_every_parameter_and_map_has_a_gradient_whatever_is_sampled(boxes, sampled, depth):
    """DDP waits for all of them; with one sample an image, most levels have none."""
    _, ours = pair(PYRAMID, sampled=sampled, depth=depth)
    *_, gradients = run(ours, PYRAMID, maps_of(PYRAMID), targets_of(boxes))
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    assert gradients["head.cls_logits.weight"].abs().sum() > 0


@pytest.mark.parametrize("depth, share", [(1, 0.2), (2, 0.4)])
def test_backward_keeps_nothing_of_the_size_of_a_map(depth, share):
    def kept(network):
        sizes = {}

        def note(x):
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            leaves = {name: x.requires_grad_() for name, x in maps_of(levels).items()}
            targets = targets_of("boxes")
            alive = network(images, leaves, Targets.of(targets) if isinstance(network, SampledRPN) else targets)
        return sum(sizes.values()) if alive else 0

    levels = {stride: (4 * height, 4 * width) for stride, (height, width) in PYRAMID.items()}
    images = images_of(levels)
    theirs, ours = (kept(network) for network in pair(levels, sampled=8, depth=depth))
    assert ours < share * theirs


class Scaled(nn.Module):
    """A layer in a wrapper that passes its weights on, as adapters such as LoRA are built."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    weight, bias = property(lambda self: self.layer.weight), property(lambda self: self.layer.bias)

    def forward(self, x):
        return 1.5 * self.layer(x)


def exchange(name, change):
    """Replace the module `name` of the RPN by change(module)."""

    def apply(network):
        parent, _, last = name.rpartition(".")
        setattr(network.get_submodule(parent), last, change(network.get_submodule(name)))

    return apply


def circular(network):
    network.head.conv[0][0].padding_mode = "circular"


def halved(module, inputs, output):
    return 0.5 * output


def patch(name, change):
    return lambda network: setattr(network, name, change(getattr(network, name)))


CHANGES = {
    "spectral norm": lambda network: spectral_norm(network.head.conv[0][0]),
    "old spectral norm": lambda network: nn.utils.spectral_norm(network.head.conv[0][0]),
    "a wrapper around the convolution": exchange("head.conv.0.0", Scaled),
    "a wrapper around an output": exchange("head.bbox_pred", Scaled),
    "pruning": lambda network: prune.l1_unstructured(network.head.conv[0][0], "weight", 0.5),
    "another activation": exchange("head.conv.0.1", lambda relu: nn.GELU()),
    "one convolution without a Sequential": exchange("head.conv", lambda convs: convs[0][0]),
    "circular padding": circular,
    "a hook on the convolutions": lambda network: network.head.conv.register_forward_hook(halved),
    "a hook on an output": lambda network: network.head.cls_logits.register_forward_hook(halved),
    "a patched loss": patch("compute_loss", lambda old: lambda *given: tuple(2 * loss for loss in old(*given))),
    "a patched filter": patch(
        "filter_proposals", lambda old: lambda *given: tuple([x[:7] for x in found] for found in old(*given))
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_changed_head_or_method_counts_in_training_as_in_torchvision(change):
    results = []
    for network in pair(PYRAMID):
        torch.manual_seed(2)
        change(network)
        for _ in range(2):  # a pruned weight is made again before every call
            results.append(run(network, PYRAMID, maps_at(0), targets_of("boxes")))
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter.mul_(0.9)
    for (wanted_boxes, wanted, wanted_gradients), (boxes, losses, gradients) in zip(
        results[:2], results[2:], strict=True
    ):
        for found, expected in zip(boxes, wanted_boxes, strict=True):
            torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)
        for found, expected in ((losses, wanted), (gradients, wanted_gradients)):
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, atol=1e-9, rtol=1e-9)


def test_torchvisions_own_head_trains():
    ours = rpn(SampledRPN, PYRAMID).double()
    ours.head = RPNHead(CHANNELS, 3).double()
    *_, gradients = run(ours, PYRAMID, maps_of(PYRAMID), targets_of("boxes"))
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_a_change_of_the_cell_anchors_counts_from_the_next_image_on():
    make, maps, images = rpn(SampledRPN, PYRAMID).anchor_generator, list(maps_of(PYRAMID).values()), images_of(PYRAMID)
    first = make(images, maps)[0]
    make.cell_anchors[0].mul_(2)
    written = make(images, maps)[0]
    assert not torch.equal(written, first) and make(images, maps)[0] is written
    make.cell_anchors = [2 * x for x in make.cell_anchors]
    assert not torch.equal(make(images, maps)[0], written)


def test_anchors_are_made_once_for_a_size_and_anew_for_another():
    network = rpn(SampledRPN, PYRAMID)
    maps = list(maps_of(PYRAMID).values())
    make = network.anchor_generator
    other = {stride: (height + 1, width) for stride, (height, width) in PYRAMID.items()}
    larger = make(images_of(other), list(maps_of(other).values()))[0]
    first = make(images_of(PYRAMID), maps)[0]
    assert make(images_of(PYRAMID), maps)[0] is first and len(first) < len(larger)
    padded = ImageList(torch.zeros(2, 3, 127, 124), SIZES)  # the same maps, another stride
    fresh = rpn(SampledRPN, PYRAMID).anchor_generator
    assert torch.equal(make(padded, maps)[0], fresh(padded, maps)[0])
    assert not torch.equal(make(padded, maps)[0], first)

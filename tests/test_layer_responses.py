import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from resbackbone import build_resnet_backbone, build_resnet_classifier
from resbackbone.analysis import gradient_norms, layer_responses
from resbackbone.cifar import build_cifar_resnet

IMAGES, LABELS = torch.randn(3, 3, 70, 97, generator=torch.Generator().manual_seed(1)), torch.tensor([1, 0, 4])


class Shown(nn.Module):
    """A norm, and an addition of zeros whose gradient is that of its output."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        self.y = self.norm(x)
        self.zeros = torch.zeros_like(self.y, requires_grad=True)
        return self.y + self.zeros


def reference(model, images, labels):
    """{layer: (std, norm)} of a torchvision network's 3x3 layers, in training mode."""
    model, shown = copy.deepcopy(model).train(), {}
    for prefix, block in list(model.named_modules()):
        for i in (1, 2, 3):
            convolution = getattr(block, f"conv{i}", None)
            if convolution is not None and convolution.kernel_size == (3, 3):
                shown[f"{prefix}.conv{i}"] = Shown(getattr(block, f"bn{i}"))
                setattr(block, f"bn{i}", shown[f"{prefix}.conv{i}"])
    F.cross_entropy(model(images), labels, reduction="sum").backward()
    norms = {name: norm.zeros.grad.flatten(1).norm(dim=1).square().mean().sqrt() for name, norm in shown.items()}
    return {name: (norm.y.std(correction=0).item(), norms[name].item()) for name, norm in shown.items()}


def measured(model, images=IMAGES, labels=LABELS):
    """The same of ours."""
    responses, gradients = layer_responses(model, images), gradient_norms(model, images, labels)
    assert [r["layer"] for r in responses] == [g["layer"] for g in gradients]
    return {r["layer"]: (r["std"], g["norm"]) for r, g in zip(responses, gradients, strict=True)}


@pytest.mark.parametrize("depth, layers", [(18, 16), (50, 16)])
@pytest.mark.parametrize("frozen", [False, True])
def test_responses_and_gradients_are_those_of_torchvisions_3x3_layers(depth, layers, frozen, randomised):
    norm = torchvision.ops.FrozenBatchNorm2d if frozen else nn.BatchNorm2d
    theirs = randomised(getattr(torchvision.models, f"resnet{depth}")(norm_layer=norm, num_classes=5))
    ours = build_resnet_classifier(depth, num_classes=5, norm="FrozenBN" if frozen else "BN")
    ours.load_state_dict(theirs.state_dict())
    expected, found = reference(theirs, IMAGES, LABELS), measured(ours)
    assert list(found) == list(expected) and len(found) == layers
    also_theirs = measured(theirs)
    for layer, values in expected.items():
        assert found[layer] == pytest.approx(values, rel=2e-3), layer
        assert also_theirs[layer] == pytest.approx(values, rel=2e-3), layer


def test_where_a_trunk_is_frozen_half_way_both_halves_are_measured(randomised):
    model = build_resnet_classifier(18, num_classes=5)
    whole = measured(model)
    model.freeze("c3")
    with torch.no_grad():
        for block in (*model.layer1, *model.layer2):
            block.bn1.weight.fill_(0.25)
    half = measured(model)
    assert list(half) == list(whole)
    assert all(norm > 0 for _, norm in half.values())
    assert half["layer1.0.conv1"][0] == pytest.approx(0.25 * layer_std(model, "layer1.0.conv1"), rel=1e-4)
    assert half["layer4.0.conv1"][0] == pytest.approx(1, rel=1e-2)


def layer_std(model, layer):
    """Of the first block's convolution, before its norm (whose statistics are those of no image: 0 and 1)."""
    x = F.max_pool2d(model.stem(IMAGES), 3, stride=2, padding=1)
    return model.get_submodule(layer)(x).std().item()


def test_a_cifar_network_has_a_response_of_each_of_its_3x3_layers():
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 9, 3, 3])
    for depth, shortcut in ((20, "A"), (20, "none"), (32, "C")):
        model = build_cifar_resnet(depth, shortcut=shortcut)
        found = measured(model, images, labels)
        assert len(found) == depth - 1 and list(found)[0] == "conv1" and list(found)[-1].startswith("layer3.")
        assert [std for std, _ in found.values()] == pytest.approx([1] * (depth - 1), abs=2e-3)  # batch norm's doing


def test_responses_follow_what_a_norm_has_learned():
    model = build_cifar_resnet(20)
    nn.init.constant_(model.layer2[1].bn2.weight, 0.25)
    stds = {entry["layer"]: entry["std"] for entry in layer_responses(model, torch.randn(4, 3, 32, 32))}
    assert stds.pop("layer2.1.conv2") == pytest.approx(0.25, rel=1e-2)
    assert min(stds.values()) > 0.99


def test_the_gradient_grows_from_layer_to_layer_in_a_plain_network_and_hardly_in_a_residual_one():
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    first = {}
    for shortcut in ("none", "A"):
        gradients = gradient_norms(build_cifar_resnet(56, shortcut=shortcut), images, labels)
        assert gradients[-1]["relative"] == 1
        assert gradients[7]["relative"] == gradients[7]["norm"] / gradients[-1]["norm"]
        first[shortcut] = gradients[0]["relative"]
    assert first["none"] > 30 * first["A"] > 30


def test_the_gradient_is_an_images_whatever_the_size_of_the_batch(randomised):
    model = build_resnet_classifier(18, num_classes=5, norm="FrozenBN")
    one = gradient_norms(model, IMAGES[:1], LABELS[:1])
    four = gradient_norms(model, IMAGES[:1].repeat(4, 1, 1, 1), LABELS[:1].repeat(4))
    assert [g["norm"] for g in four] == pytest.approx([g["norm"] for g in one], rel=1e-3)


def test_measuring_leaves_the_network_alone():
    model = build_resnet_classifier(18, num_classes=5).eval()
    model.layer1[0].bn1.train()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        measured(model)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and IMAGES.grad is None and not IMAGES.requires_grad
    assert not model.training and model.layer1[0].bn1.training


def test_where_no_gradient_arrives_nothing_is_relative_to_it():
    model = build_cifar_resnet(20)
    nn.init.zeros_(model.fc.weight)
    gradients = gradient_norms(model, torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))
    assert all(g["norm"] == 0 and g["relative"] is None for g in gradients)


def test_responses_of_a_backbone_are_measured_up_to_its_last_level():
    layers = [r["layer"] for r in layer_responses(build_resnet_backbone(18, levels=["c3"]), IMAGES)]
    assert [layer.removeprefix("trunk.") for layer in layers] == [
        f"layer{stage}.{block}.conv{i}" for stage in (1, 2) for block in (0, 1) for i in (1, 2)
    ]


def test_a_network_without_3x3_layers_is_an_error():
    with pytest.raises(ValueError, match=r"no 3x3 layer \(a convN with its bnN\)"):
        layer_responses(nn.Conv2d(3, 4, 3), IMAGES)


def test_a_deep_stem_is_no_layer_of_the_blocks():
    found = measured(build_resnet_classifier(18, num_classes=5, stem="deep", shortcut="D"))
    assert [name.partition(".")[0] for name in found] == [f"layer{i}" for i in (1, 2, 3, 4) for _ in range(4)]

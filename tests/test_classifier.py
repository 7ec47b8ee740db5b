import pytest
import torch
import torchvision

from resbackbone import build_resnet_backbone, build_resnet_classifier


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_the_logits_equal_torchvision_given_its_weights(depth, norm, randomised):
    reference = randomised(getattr(torchvision.models, f"resnet{depth}")())
    model = build_resnet_classifier(depth, weights=reference.state_dict(), norm=norm).eval()
    images = torch.randn(2, 3, 65, 97)
    with torch.no_grad():
        logits, expected = model(images), reference(images)
    assert logits.shape == (2, 1000)
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_classifier_and_torchvision_load_each_other_strictly():
    model, reference = build_resnet_classifier(18), torchvision.models.resnet18()
    reference.load_state_dict(model.state_dict())
    model.load_state_dict(reference.state_dict())


def test_what_is_not_asked_comes_from_the_weights_and_what_is_asked_otherwise_is_refused():
    state = torchvision.models.resnet18(num_classes=10).state_dict()
    assert build_resnet_classifier(weights=state).fc.weight.shape == (10, 512)
    for depth, classes, said in (
        (18, 7, "num_classes=10, but you asked for num_classes=7"),
        (34, 10, "depth=18, but you asked for depth=34"),
    ):
        with pytest.raises(ValueError, match=said):
            build_resnet_classifier(depth, classes, weights=state)
    del state["fc.bias"]
    with pytest.raises(ValueError, match="1 missing: fc.bias"):
        build_resnet_classifier(18, 10, weights=state)
    del state["fc.weight"]
    with pytest.raises(ValueError, match="hold no classifier: fc.weight is missing"):
        build_resnet_classifier(18, 10, weights=state)


def test_a_classifiers_trunk_is_a_backbone():
    model = build_resnet_classifier(18, 5).eval()
    backbone = build_resnet_backbone(18, levels=["c5"], weights=model.state_dict())
    images = torch.randn(1, 3, 33, 65)
    expected = model.fc(backbone(images)["c5"].mean((2, 3)))
    assert (model(images) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_every_parameter_trains_and_a_tiny_image_has_logits():
    model = build_resnet_classifier(18, 3)
    model(torch.randn(2, 3, 33, 65)).square().sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]
    assert model.eval()(torch.randn(1, 3, 1, 1)).isfinite().all()


def test_an_unknown_depth_is_answered_with_the_choices():
    with pytest.raises(ValueError, match="unknown depth 110; choose from 18, "):
        build_resnet_classifier(110)

"""The trunk inside transformers: its backbone interface, a detector over it, files."""

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
from transformers import AutoBackbone, DetrConfig, DetrForObjectDetection  # noqa: E402

from resbackbone import build_resnet_backbone  # noqa: E402
from resbackbone.adapters.transformers import ResBackboneConfig, ResBackboneModel, as_transformers  # noqa: E402
from resbackbone.checks import UserError  # noqa: E402


def images() -> torch.Tensor:
    return torch.randn(2, 3, 97, 130)


def test_autobackbone_gives_the_stages_asked_for_and_their_channels():
    model = AutoBackbone.from_config(ResBackboneConfig(depth=50, out_features=["stem", "stage2", "stage4"]))
    assert isinstance(model, ResBackboneModel) and model.channels == [64, 512, 2048]
    with torch.no_grad():
        maps = model.eval()(images()).feature_maps
    assert [tuple(x.shape) for x in maps] == [(2, 64, 49, 65), (2, 512, 13, 17), (2, 2048, 4, 5)]


def test_indices_name_the_same_stages():
    model = ResBackboneModel(ResBackboneConfig(depth=18, out_indices=[1, 4]))
    assert model.out_features == ["stage1", "stage4"] and model.channels == [64, 512]
    assert ResBackboneConfig(depth=18).out_features == ["stage4"]


def test_maps_and_hidden_states_are_those_of_the_trunk(randomised):
    backbone = randomised(build_resnet_backbone(18))
    model = as_transformers(backbone, out_features=["stage1", "stage4"]).eval()
    x = images()
    with torch.no_grad():
        expected, given = backbone(x), model(x, output_hidden_states=True)
        as_tuple = model(x, return_dict=False)
    assert torch.equal(given.feature_maps[0], expected["c2"]) and torch.equal(given.feature_maps[1], expected["c5"])
    assert len(given.hidden_states) == 5 and torch.equal(given.hidden_states[2], expected["c3"])
    assert model(x).hidden_states is None and torch.equal(as_tuple[0][1], expected["c5"])


def test_weights_start_as_the_library_starts_them_not_as_transformers_does():
    model = ResBackboneModel(ResBackboneConfig(depth=18))
    weight = model.backbone.layer4[1].conv2.weight  # fan out 512 * 9
    assert weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.02)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_saved_model_comes_back_with_its_norms_options_and_outputs(tmp_path, randomised, frozen):
    weights = randomised(build_resnet_backbone(18)).state_dict() if frozen else None
    backbone = randomised(build_resnet_backbone(18, weights=weights, eps=1e-3, dilate_c5=True))
    as_transformers(backbone, out_features=["stage2", "stage4"]).save_pretrained(tmp_path)
    again = ResBackboneModel.from_pretrained(tmp_path).eval()
    x = images()
    with torch.no_grad():
        expected, given = backbone(x), again(x).feature_maps
    assert torch.equal(given[0], expected["c3"]) and torch.equal(given[1], expected["c5"])
    assert again.backbone.summary() == backbone.summary()
    assert ResBackboneModel.from_pretrained(tmp_path, out_features=["stage1"]).channels == [64]


def test_gradients_reach_the_trunk_under_detr():
    config = DetrConfig(
        backbone_config=ResBackboneConfig(depth=18, out_features=["stage4"]),
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_queries=5,
        num_labels=3,
    )
    detr = DetrForObjectDetection(config)
    output = detr(images()[:1])
    (output.logits.square().sum() + output.pred_boxes.sum()).backward()  # its own loss needs scipy
    trunk = detr.model.backbone.model.backbone
    for weight in (trunk.conv1.weight, trunk.layer4[1].conv2.weight):
        assert weight.grad.isfinite().all() and weight.grad.abs().sum() > 0


def test_tied_weights_come_along_untied():
    trunk = build_resnet_backbone(18)
    trunk.layer1[1].conv1.weight = trunk.layer1[0].conv1.weight
    model = as_transformers(trunk)
    assert torch.equal(model.backbone.layer1[1].conv1.weight, trunk.layer1[0].conv1.weight)


def test_what_trains_and_the_mode_are_those_of_the_trunk():
    backbone = build_resnet_backbone(18).eval()
    backbone.layer1.requires_grad_(False)
    model = as_transformers(backbone)
    assert model.backbone.summary() == backbone.summary() and not model.training
    assert not model.backbone.layer1[0].conv1.weight.requires_grad and model.backbone.conv1.weight.requires_grad
    assert as_transformers(backbone.train()).training
    assert as_transformers(backbone.double()).backbone.bn1.running_var.dtype == torch.float64


@pytest.mark.parametrize("trunk", [{"fpn": True}, {"levels": ["c3"]}, {"depth": 50}])
def test_a_config_that_asks_for_more_or_less_than_four_stages_is_refused(trunk):
    with pytest.raises(UserError, match="four stages"):
        ResBackboneModel(ResBackboneConfig(depth=18, trunk=trunk))


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda m: setattr(m, "relu", nn.GELU()), r"1 of its layers: relu is GELU\(.*\), not ReLU\(inplace=True\)"),
        (lambda m: setattr(m.bn1, "eps", 0.1), r"bn1 is BatchNorm2d\(64, eps=0.1, .*, not BatchNorm2d\(64, eps=1e-05"),
        (lambda m: setattr(m.layer2[0].conv1, "stride", (1, 1)), "1 of its layers: layer2.0.conv1 is Conv2d"),
        (lambda m: m.fuse(), r"conv1 is Conv2d\(.*, not Conv2d\(.*bias=False\); call as_transformers before fuse\(\)"),
        (lambda m: m.layer1.append(nn.Identity()), r"layer1.2 is Identity\(\), not absent"),
        (
            lambda m: m.layer1.register_forward_hook(lambda *call: 2 * call[2]),
            r"1 of its layers: layer1 is .* with hooks, not ",
        ),
        (lambda m: m.layer1.register_full_backward_hook(lambda *call: None), r"layer1 is .* with hooks, not "),
        (lambda m: nn.utils.spectral_norm(m.conv1), r"conv1 is Conv2d\(.*\) with hooks, not Conv2d"),
        (lambda m: setattr(m.relu, "forward", torch.sigmoid), r"relu is ReLU\(inplace=True\) with another forward"),
        (lambda m: nn.utils.parametrizations.weight_norm(m.conv1), "conv1 is ParametrizedConv2d"),
    ],
)
def test_layers_that_the_config_does_not_describe_are_refused_in_one_line(change, says):
    backbone = build_resnet_backbone(18)
    change(backbone)
    with pytest.raises(UserError, match=says) as error:
        as_transformers(backbone)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("arguments", [{"fpn": True}, {"levels": ["c3", "c4"]}])
def test_a_pyramid_or_part_of_a_trunk_is_refused(arguments):
    with pytest.raises(ValueError, match="four stages"):
        as_transformers(build_resnet_backbone(18, **arguments))

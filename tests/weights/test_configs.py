"""What a config.json beside weights says is what the network computes, wherever the two files lie; or it is refused."""

import argparse
import json
import re

import numpy as np
import pytest
import timm
import torch
from reading import refusal
from safetensors.torch import save_file

from resbackbone import build_resnet_backbone, build_resnet_classifier
from resbackbone.weights import INPUT, MEAN, read_weights
from resbackbone.weights.file import write_weights
from resbackbone.weights.inputs import BGR_255
from resbackbone.weights.write import write_as

transformers = pytest.importorskip("transformers")
RESNET_50 = {  # of microsoft/resnet-50
    "architectures": ["ResNetForImageClassification"],
    "depths": [3, 4, 6, 3],
    "downsample_in_first_stage": False,
    "embedding_size": 64,
    "hidden_act": "relu",
    "hidden_sizes": [256, 512, 1024, 2048],
    "id2label": {"0": "tench", "1": "goldfish"},
    "label2id": {"tench": 0, "goldfish": 1},
    "layer_type": "bottleneck",
    "model_type": "resnet",
    "num_channels": 3,
    "torch_dtype": "float32",
    "transformers_version": "4.18.0.dev0",
}
PROCESSOR_50 = {
    "crop_pct": 0.875,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "ConvNextFeatureExtractor",
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
    "size": 224,
}
TIMM_50 = {  # of timm/resnet50.a1_in1k
    "architecture": "resnet50",
    "num_classes": 1000,
    "num_features": 2048,
    "pretrained_cfg": {
        "tag": "a1_in1k",
        "custom_load": False,
        "input_size": [3, 224, 224],
        "test_input_size": [3, 288, 288],
        "fixed_input_size": False,
        "interpolation": "bicubic",
        "crop_pct": 0.95,
        "test_crop_pct": 1.0,
        "crop_mode": "center",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "num_classes": 1000,
        "pool_size": [7, 7],
        "first_conv": "conv1",
        "classifier": "fc",
        "origin_url": "https://github.com/huggingface/pytorch-image-models",
        "paper_ids": "arXiv:2110.00476",
    },
}


@pytest.fixture(scope="module")
def small():
    """A ResNet-18 of transformers, saved with each config by `folder`."""
    config = transformers.ResNetConfig(layer_type="basic", depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512])
    return transformers.ResNetModel(config)


@pytest.fixture
def folder(tmp_path, small):
    """Writes a folder of transformers with changes to its config; returns the paths by which it is given."""

    def write(processor=None, **changes):
        small.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
        if processor is not None:
            (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
        return tmp_path, tmp_path / "model.safetensors"

    return write


@torch.inference_mode()
@pytest.mark.parametrize("depth, settings", [(18, {}), (50, {}), (50, {"downsample_in_bottleneck": True})])
def test_what_transformers_saves_computes_the_same_from_folder_and_file(tmp_path, randomised, depth, settings):
    blocks = {18: ("basic", [2, 2, 2, 2], 1), 50: ("bottleneck", [3, 4, 6, 3], 4)}[depth]
    sizes = [width * blocks[2] for width in (64, 128, 256, 512)]
    config = transformers.ResNetConfig(layer_type=blocks[0], depths=blocks[1], hidden_sizes=sizes, **settings)
    theirs = randomised(transformers.ResNetModel(config))
    theirs.save_pretrained(tmp_path)
    images = torch.randn(1, 3, 65, 97)
    expected = theirs(images).last_hidden_state
    for source in (tmp_path, tmp_path / "model.safetensors"):
        weights = read_weights(source)
        assert list(weights.assumed) == ["input"] and weights.origins["stride_in_1x1"] == "config.json"
        got = build_resnet_backbone(weights=weights).eval()(images)["c5"]
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'; networks of this package have 'relu'"),
        ({"downsample_in_first_stage": True}, "downsample_in_first_stage True"),
        ({"downsample_in_bottleneck": "yes"}, "downsample_in_bottleneck 'yes'"),
        ({"layer_type": "preactivation"}, "layer_type 'preactivation'"),
        ({"embedding_size": 32}, "embedding_size 32"),
        ({"hidden_sizes": [64, 128, 256, 500]}, "hidden_sizes [64, 128, 256, 500]"),
        ({"dilation": 2}, "dilation 2, which this package does not know"),
        ({"auto_map": {"AutoModel": "net.Net"}}, "auto_map {'AutoModel': 'net.Net'}, which this package does not know"),
        ({"model_type": "detr"}, "model_type 'detr'; this package reads the ResNets of transformers"),
        ({"model_type": None}, "transformers_version '"),
        ({"num_channels": "3"}, "num_channels '3', not a whole number"),
    ],
)
def test_a_value_that_changes_the_network_is_refused_by_its_name(folder, changes, named):
    for source in folder(**changes):
        assert f"config.json has {named}" in refusal(source)


@pytest.mark.parametrize(
    "changes, named", [({"depths": [3, 4, 6, 3]}, "depth=34"), ({"num_channels": 1}, "in_channels=1")]
)
def test_a_config_of_another_network_than_the_tensors_is_refused(folder, changes, named):
    for source in folder(**changes):
        with pytest.raises(ValueError, match=f"are said to be for {named} by config.json, but their tensors are for"):
            build_resnet_backbone(weights=source)


@pytest.mark.parametrize(
    "changes, given",
    [
        ({}, {}),
        ({"image_std": [0.5, 0.5, 0.25]}, {"std": [0.5, 0.5, 0.25]}),
        ({"do_rescale": True, "rescale_factor": 0.00392156862745098}, {}),
        ({"do_flip_channel_order": True, "image_mean": list(MEAN[::-1])}, {"channel_order": "BGR", "mean": MEAN[::-1]}),
        (
            {"do_rescale": False, "image_mean": [123.675, 116.28, 103.53]},
            {"mean": [123.675, 116.28, 103.53], "top": 255},
        ),
    ],
)
def test_the_preprocessor_tells_the_input(folder, changes, given):
    for source in folder(processor={**PROCESSOR_50, **changes}):
        found = read_weights(source).metadata["converted_from"]["input"]
        assert found["range"][1] == given.get("top", 1)
        assert found["channel_order"] == given.get("channel_order", "RGB")
        for key, usual in (("mean", PROCESSOR_50["image_mean"]), ("std", PROCESSOR_50["image_std"])):
            assert found[key] == pytest.approx(given.get(key, usual))


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"image_std": [1.0, "1", 1.0]}, "has std [1.0, '1', 1.0], not three numbers above 0, one a colour"),
        ({"image_std": [0.2, 0.0, 0.2]}, "has std [0.2, 0.0, 0.2], not three numbers above 0"),
        ({"image_mean": 0.5}, "has mean 0.5, not three numbers"),
        ({"image_mean": None}, "has mean None"),
        ({"rescale_factor": "1/255"}, "has rescale_factor '1/255', not a number above 0"),
        ({"do_normalize": "no"}, "has do_normalize 'no'"),
        ({"do_normalize": False}, "cannot be converted exactly"),
        ({"rescale_offset": True}, "has rescale_offset True, which this package does not know"),
    ],
)
def test_a_preprocessor_that_cannot_be_followed_is_refused(folder, changes, named):
    for source in folder(processor={**PROCESSOR_50, **changes}):
        assert named in refusal(source)


@pytest.mark.parametrize(
    "config, processor, depth", [(RESNET_50, PROCESSOR_50, 50), (TIMM_50, None, 50)], ids=["transformers", "timm"]
)
def test_published_configs_are_read_without_assumptions(tmp_path, config, processor, depth):
    theirs = timm.create_model("resnet50", num_classes=2)
    if config is RESNET_50:
        theirs = transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=2))
    save_file(theirs.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    if processor:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    for source in (tmp_path, tmp_path / "model.safetensors"):
        weights = read_weights(source)
        assert weights.assumed == {} and weights.metadata["backbone"]["depth"] == depth
        build_resnet_classifier(weights=weights)


@torch.inference_mode()
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("network", ["resnet18", "resnet18d"])
def test_what_timm_saves_computes_the_same_from_folder_and_file(tmp_path, randomised, network, file):
    overlay = {"std": (0.5, 0.25, 0.5)}
    theirs = randomised(timm.create_model(network, num_classes=3, pretrained_cfg_overlay=overlay))
    timm.models.save_for_hf(theirs, tmp_path, safe_serialization=file == "model.safetensors")
    images = torch.rand(1, 3, 65, 97)
    mean, ours, std = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, (0.229, 0.224, 0.225), overlay["std"]))
    expected = theirs((images - mean) / std)
    for source in (tmp_path, tmp_path / file):
        got = build_resnet_classifier(weights=source).eval()((images - mean) / ours)
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.inference_mode()
def test_timms_output_stride_of_16_is_a_dilated_c5(tmp_path, randomised):
    theirs = randomised(timm.create_model("resnet50", num_classes=3, output_stride=16))
    timm.models.save_for_hf(theirs, tmp_path, safe_serialization=True, model_args={"output_stride": 16})
    images = torch.randn(1, 3, 65, 97)
    backbone = build_resnet_backbone(weights=tmp_path).eval()
    assert backbone.features["c5"].stride == 16
    for got, expected in (
        (backbone(images)["c5"], theirs.forward_features(images)),
        (build_resnet_classifier(weights=tmp_path).eval()(images), theirs(images)),
    ):
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert build_resnet_backbone(weights=tmp_path, dilate_c5=False).features["c5"].stride == 32


@pytest.mark.parametrize(
    "config, named",
    [
        (
            {"model_args": {"act_layer": "silu"}},
            "model_args has act_layer 'silu'; networks of this package have 'relu'",
        ),
        ({"model_args": {"aa_layer": "blurpool"}}, "model_args has aa_layer 'blurpool'"),
        ({"model_args": {"output_stride": 8}}, "model_args has output_stride 8"),
        ({"model_args": {"stem_type": "deep_tiered"}}, "model_args has stem_type 'deep_tiered'"),
        ({"model_args": {"norm_layer": "layernorm2d"}}, "model_args has norm_layer 'layernorm2d'"),
        ({"model_args": {"block_args": {"attn_layer": "se"}}}, "model_args has block_args {'attn_layer': 'se'}"),
        ({"model_args": {"padding": "same"}}, "model_args has padding 'same', which this package does not know"),
        ({"model_args": "none"}, "has model_args 'none', not a table"),
        ({"model_args": {"in_chans": "3"}}, "model_args has in_chans '3', not a whole number"),
        ({"global_pool": "max"}, "global_pool 'max'"),
        ({"architecture": "seresnet18"}, "seresnet18 is not one of timm's ResNets that this package builds"),
        ({"architecture": "resnetblur18"}, "resnetblur18, which blurs its maps before it subsamples"),
        ({"pretrained_cfg": {"mean": "imagenet"}}, "pretrained_cfg has mean imagenet, not three numbers"),
        ({"pretrained_cfg": {"std": [1, 1]}}, "pretrained_cfg has std [1, 1], not three numbers above 0"),
        ({"pretrained_cfg": {"channel_order": "bgr"}}, "pretrained_cfg has channel_order 'bgr', which this package"),
    ],
)
def test_timms_settings_of_another_network_are_refused_by_their_names(tmp_path, config, named):
    save_file(timm.create_model("resnet18").state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet18", **config}))
    for source in (tmp_path, tmp_path / "model.safetensors"):
        assert named in refusal(source)


@torch.inference_mode()
def test_a_backbone_of_this_package_comes_back_from_transformers(tmp_path, randomised):
    from resbackbone.adapters.transformers import as_transformers

    ours = randomised(build_resnet_backbone(50, stride_in_1x1=True, eps=1e-3))
    as_transformers(ours).save_pretrained(tmp_path)
    images = torch.randn(1, 3, 65, 97)
    for source in (tmp_path, tmp_path / "model.safetensors"):
        back = build_resnet_backbone(weights=source).eval()
        assert (back.config.stride_in_1x1, back.config.eps) == (True, 1e-3)
        for got, expected in zip(back(images).values(), ours(images).values(), strict=True):
            assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    "config",
    [
        '{"model_type": "bert", "vocab_size": 3}',
        '{"model_type": "resnet", "lr": 0.1}',
        '{"architecture": "resnet18", "optimizer": "sgd"}',
        '{"lr": 0.1, "arch": "resnet18"}',
        "// not JSON",
    ],
)
def test_a_training_programs_config_json_concerns_neither_a_checkpoint_nor_our_own_file(tmp_path, config):
    state = timm.create_model("resnet18").state_dict()
    torch.save(state, tmp_path / "best.pth")
    (tmp_path / "config.json").write_text(config)
    assert read_weights(tmp_path / "best.pth").assumed["input"] == INPUT
    write_weights(tmp_path / "model.safetensors", state, {"backbone": {"depth": 18}})
    for source in (tmp_path / "model.safetensors", tmp_path):
        assert read_weights(source).format == "resbackbone"


FILES = ["model.safetensors", "pytorch_model.bin", "best.safetensors", "best.pth"]
SMP = {"_model_class": "Unet", "classes": 1, "encoder_name": "resnet18", "encoder_weights": None, "in_channels": 3}


@pytest.mark.parametrize("file", FILES)
def test_a_config_json_of_other_programs_is_a_trainings_arguments_whatever_the_files_name(tmp_path, file):
    state = timm.create_model("resnet18").state_dict()
    (save_file if file.endswith(".safetensors") else torch.save)(state, tmp_path / file)

    def read(config):
        (tmp_path / "config.json").write_text(json.dumps(config))
        return [read_weights(source) for source in (tmp_path / file, tmp_path) if source.is_file() or file in FILES[:2]]

    for config in ({"lr": 0.1}, {"num_classes": 1000}, SMP, {"architecture": {"name": "x"}}):
        for weights in read(config):
            assert weights.assumed["input"] == INPUT
    for config in (STATED, {"architecture": "resnet18", "lr": 1, **STATED}):
        for weights in read(config):
            assert weights.metadata["converted_from"]["input"] == {**INPUT, **STATED}
    (tmp_path / "config.json").write_text(
        json.dumps({"architecture": "resnet18", "model_args": {"act_layer": "gelu"}, "lr": 1})
    )
    assert "model_args has act_layer 'gelu'" in refusal(tmp_path / file)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "resnet", "hidden_act": "gelu"}))
    assert "hidden_act 'gelu'" in refusal(tmp_path / file)


STATED = {"mean": list(MEAN), "std": [0.5, 0.5, 0.5]}
TIMM_OF_STATED = {"architecture": "resnet18", "pretrained_cfg": STATED}


def test_the_config_json_beside_a_checkpoint_is_said_and_torchvisions_file_has_none(tmp_path, caplog):
    for name in ("best.pth", "resnet18-f37072fd.pth"):
        torch.save(timm.create_model("resnet18").state_dict(), tmp_path / name)
    (tmp_path / "config.json").write_text("\ufeff" + json.dumps(TIMM_OF_STATED))
    assert read_weights(tmp_path / "best.pth").metadata["converted_from"]["input"]["std"] == STATED["std"]
    assert "depth, input is from config.json beside it" in caplog.text
    assert read_weights(tmp_path / "resnet18-f37072fd.pth").assumed["input"] == INPUT
    assert "torchvision's by name, so the config.json beside it is not used" in caplog.text


@pytest.mark.parametrize("place", ["entries", "dict", "namespace", "safetensors", "config.json"])
def test_mean_std_and_arch_of_a_training_are_read_wherever_they_are(tmp_path, place):
    state = timm.create_model("resnet18").state_dict()

    def save(said):
        if place == "safetensors":
            texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in said.items()}
            save_file(state, tmp_path / "own.safetensors", texts)
            return tmp_path / "own.safetensors"
        inside = {"dict": {"args": said}, "namespace": {"args": argparse.Namespace(**said)}, "config.json": {}}
        torch.save({"state_dict": state, **inside.get(place, said)}, tmp_path / "best.pth")
        if place == "config.json":
            (tmp_path / "config.json").write_text(json.dumps(said))
        return tmp_path / "best.pth"

    assert read_weights(save({"arch": "resnet18", **STATED})).metadata["converted_from"]["input"] == {**INPUT, **STATED}
    assert "'a', 0, 0], not three numbers" in refusal(save({**STATED, "mean": ["a", 0, 0]})).replace('"', "'")
    bgr = {"mean": [103.53, 116.28, 123.675], "std": [1.0, 1.0, 1.0]}
    assert read_weights(save(bgr)).metadata["converted_from"]["input"] == BGR_255
    assert "only ImageNet's tells whether it is RGB or BGR" in refusal(save({**bgr, "mean": [100.0, 110.0, 120.0]}))
    assert "timm's resnetblur18, which blurs its maps" in refusal(save({"arch": "resnetblur18"}))


IMAGENETS = {"mean": list(MEAN), "std": [0.229, 0.224, 0.225]}
MMENGINES = (
    "model = dict(backbone=dict(type='ResNet', depth=18))\n"
    "img_norm_cfg = dict(mean=[103.53, 116.28, 123.675], std=[1., 1., 1.], to_rgb=False)"
)


@pytest.mark.parametrize(
    "checkpoint, config, named",
    [
        (
            {"meta": {"cfg": MMENGINES}},
            IMAGENETS,
            "input is BGR 0..255, .* by the mmengine config in the file, but RGB",
        ),
        ({"args": {**STATED}}, IMAGENETS, "input is RGB 0..1, .* by the file, but RGB 0..1, .*229.* by config.json"),
        (
            {"meta": {"cfg": MMENGINES}},
            {"architecture": "resnet34"},
            "depth is 18 by the mmengine .*, but 34 by config",
        ),
    ],
)
def test_two_places_that_state_different_values_are_named(tmp_path, checkpoint, config, named):
    torch.save({**checkpoint, "state_dict": timm.create_model("resnet18").state_dict()}, tmp_path / "best.pth")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert re.search(named + ".*; remove the one that is not of these weights", refusal(tmp_path / "best.pth"))
    (tmp_path / "config.json").unlink()
    read_weights(tmp_path / "best.pth")


def test_what_one_place_alone_states_is_kept_beside_another(tmp_path):
    write_as(tmp_path / "model.safetensors", read_weights(our_dilated(tmp_path)), "timm")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet18", "pretrained_cfg": IMAGENETS}))
    assert build_resnet_backbone(weights=tmp_path).features["c5"].stride == 16
    (tmp_path / "config.json").write_text(json.dumps(TIMM_OF_STATED))
    assert "input is RGB 0..1" in refusal(tmp_path) and "but RGB 0..1, mean 0.485" in refusal(tmp_path)


def test_a_published_file_is_what_its_content_shows_beside_another_config(tmp_path, monkeypatch):
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "best.pth")
    (tmp_path / "config.json").write_text(json.dumps(TIMM_OF_STATED))
    monkeypatch.setattr("resbackbone.weights.read.recognised", lambda path: {"backbone": {"eps": 0.0}, "input": INPUT})
    metadata = read_weights(tmp_path / "best.pth").metadata
    assert metadata["backbone"]["eps"] == 0.0 and metadata["converted_from"]["input"] == INPUT


def our_dilated(folder):
    backbone = build_resnet_backbone(18, dilate_c5=True)
    write_weights(folder / "ours.safetensors", backbone.state_dict(), {"backbone": backbone.config.to_json()})
    return folder / "ours.safetensors"


HALF, TEXT = [0.5] * 3, {"mean": "0.485, 0.456, 0.406", "std": "0.5 0.5 0.5"}
NAMED = argparse.Namespace


@pytest.fixture(scope="module")
def state():
    return timm.create_model("resnet18").state_dict()


@pytest.fixture
def saved(tmp_path, state):
    """Writes a checkpoint with what a training says."""

    def save(said, name="best.pth"):
        torch.save({"state_dict": state, **said}, tmp_path / name)
        return tmp_path / name

    return save


@pytest.mark.parametrize(
    "said",
    [
        {"mean": torch.tensor(MEAN), "std": 0.5},
        {"args": NAMED(mean=np.array(MEAN), std=np.array(HALF))},
        {"args": NAMED(mean=None, std=None, transform=NAMED(**TEXT), loss={"mean": 0.1, "std": 0.2})},
        {"transforms": [("Resize", 224), ("Normalize", {"mean": MEAN, "std": HALF})], "args": NAMED(lr=0.1)},
        {"opt": NAMED(img_mean=["0.485", "0.456", "0.406"], img_std=[0.5], init={"mean": 0.0, "std": 0.02})},
        {"hyper_parameters": {"data": {"normalize": STATED}, "std": 0.02}},
        {"config": json.dumps({"transforms": [{"name": "flip"}, {"IMAGE_MEAN": MEAN, "IMAGE_STD": HALF}]})},
        {"meta": {"input_mean": MEAN, "input_std": HALF}, "pretrained_cfg": STATED, "data_config": TEXT},
    ],
)
def test_mean_and_std_of_a_training_are_read_in_any_form_and_table(saved, said):
    found = read_weights(saved(said))
    assert found.metadata["converted_from"]["input"] == {**INPUT, "std": HALF} and "input" not in found.assumed


@pytest.mark.parametrize("texts", [{"pretrained_cfg": json.dumps(STATED)}, {**TEXT, "std": "0.5"}])
def test_metadata_of_safetensors_may_hold_json_and_single_numbers(tmp_path, state, texts):
    save_file(state, tmp_path / "own.safetensors", texts)
    assert read_weights(tmp_path / "own.safetensors").metadata["converted_from"]["input"]["std"] == HALF


@pytest.mark.parametrize(
    "said, words",
    [
        (
            {"args": NAMED(data={"mean": [0.5] * 4, "std": HALF})},
            "its args.data has mean [0.5, 0.5, 0.5, 0.5], not three",
        ),
        ({"args": NAMED(mean="imagenet", std="imagenet")}, "its args has mean imagenet, not three numbers"),
        ({"args": NAMED(mean=0.5, std=0.5)}, "mean 0.5 0.5 0.5, std 0.5 0.5 0.5 cannot be converted exactly"),
        (
            {"args": {"mean": MEAN, "std": HALF}, "cfg": {"mean": MEAN, "std": 1.0}},
            "its args (mean and std) and cfg (mean and std) contradict: RGB 0..1, mean 0.485 0.456 0.406, std 0.5",
        ),
        ({"args": NAMED(model_kwargs={"act_layer": "gelu"})}, "args.model_kwargs has act_layer 'gelu'; networks of"),
        ({"args": NAMED(model_kwargs={"stem_type": "deep_tiered"})}, "args.model_kwargs has stem_type 'deep_tiered'"),
        ({"config": {"model": {"activation": torch.nn.GELU}}}, "its config.model has activation 'gelu'"),
        ({"args": NAMED(OUTPUT_STRIDE=8)}, "OUTPUT_STRIDE '8'; trunks here have '32' or '16'; if it is"),
        ({"args": NAMED(replace_stride_with_dilation=[False, True, True])}, "dilation '[false, true, true]'; trunks"),
        ({"args": NAMED(dilation=2)}, "its args has dilation '2'"),
        ({"args": NAMED(dilation=True, output_stride=32)}, "contradict: dilate_c5=True; and dilate_c5=False"),
        ({"args": NAMED(aa_layer="blurpool")}, "its args has aa_layer 'blurpool'"),
        ({"args": NAMED(bn_eps="small")}, "its args has bn_eps 'small', not a number"),
        ({"args": NAMED(bgr=True)}, "its args (bgr) states BGR but no mean and std of it; give its state dict alone"),
        ({"hyper_parameters": {"net": {"backbone": "resnetaa50d"}}}, "timm's resnetaa50d, which blurs its maps"),
        ({"arch": "deeplabv3_resnet50"}, "its checkpoint has arch 'deeplabv3_resnet50', a segmentation network"),
        ({"config": {"model": {"name": "FCN"}}}, "its config.model has name 'FCN', a segmentation network"),
    ],
)
def test_what_a_training_says_of_another_network_or_input_is_refused_with_its_place(saved, said, words):
    assert words in refusal(saved(said))


@pytest.mark.parametrize(
    "said, stated",
    [
        ({"args": NAMED(dilation=True, backbone="resnet50")}, {"dilate_c5": True}),
        ({"args": NAMED(dilation=False)}, {"dilate_c5": False}),
        ({"args": NAMED(model_kwargs={"output_stride": 16, "pretrained": True})}, {"dilate_c5": True}),
        ({"args": NAMED(replace_stride_with_dilation=(False, False, True))}, {"dilate_c5": True}),
        ({"args": NAMED(bn_eps=1e-3, dilation=None, aa_layer=None, bgr=False)}, {"eps": 1e-3}),
        ({"hyper_parameters": {"activation": "sigmoid", "act_layer": "nn.ReLU", "head": {"activation": "gelu"}}}, {}),
    ],
)
def test_what_a_training_says_of_the_network_is_applied(saved, said, stated):
    assert read_weights(saved(said)).metadata.get("backbone", {}) == stated


@torch.inference_mode()
def test_a_checkpoint_of_timm_with_an_output_stride_and_an_eps_computes_the_same(tmp_path, randomised):
    theirs = randomised(timm.create_model("resnet18", output_stride=16))
    for norm in theirs.modules():
        norm.eps = 1e-3
    arguments = NAMED(model="resnet18", model_kwargs={"output_stride": 16}, bn_eps=1e-3)
    torch.save({"state_dict": theirs.state_dict(), "args": arguments}, tmp_path / "last.pth")
    images = torch.randn(1, 3, 65, 97)
    expected = theirs.forward_features(images)
    got = build_resnet_backbone(weights=tmp_path / "last.pth").eval()(images)["c5"]
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_file_and_the_config_beside_it_that_state_different_inputs_are_refused(saved, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"data": {"mean": list(MEAN), "std": HALF}}))
    assert read_weights(saved({"args": NAMED(**STATED)})).origins["input"] == "config.json"
    message = refusal(saved({"args": NAMED(mean=MEAN, std=0.25)}))
    assert "std 0.25 0.25 0.25 by the file, but RGB 0..1" in message and "std 0.5 0.5 0.5 by config.json" in message


def test_one_number_for_a_network_of_one_channel_is_said_and_not_converted(tmp_path, caplog):
    theirs = timm.create_model("resnet18", in_chans=1)
    torch.save({"state_dict": theirs.state_dict(), "args": NAMED(mean=[0.5], std=[0.25])}, tmp_path / "grey.pth")
    assert torch.equal(read_weights(tmp_path / "grey.pth").state["conv1.weight"], theirs.conv1.weight)
    assert "for 1 channels: give them images normalised with the mean 0.5 and std 0.25" in caplog.text


def test_a_name_with_dc5_leaves_the_dilation_to_the_caller(saved):
    path = saved({}, "detr-r50-dc5-f0fb7ef5.pth")
    with pytest.raises(ValueError, match="do not state whether c5 is dilated at stride 16"):
        build_resnet_backbone(weights=path)
    assert build_resnet_backbone(weights=path, dilate_c5=True).features["c5"].stride == 16


@pytest.mark.parametrize("channels", [1, 4])
def test_timms_network_of_other_channels_says_the_input_it_takes(tmp_path, caplog, channels):
    theirs = timm.create_model("resnet18", in_chans=channels)
    timm.models.save_for_hf(theirs, tmp_path, safe_serialization=True, model_args={"in_chans": channels})
    weights = read_weights(tmp_path)
    assert torch.equal(weights.state["conv1.weight"], theirs.conv1.weight) and weights.assumed == {}
    assert f"timm's resnet18 has {channels} channels: give it images normalised with the mean" in caplog.text


def test_timms_names_may_have_a_tag_and_its_layers_capitals(tmp_path):
    save_file(timm.create_model("resnet18").state_dict(), tmp_path / "model.safetensors")
    config = {"architecture": "resnet18.a1_in1k", "model_args": {"norm_layer": "BatchNorm2d", "act_layer": "ReLU"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_weights(tmp_path).metadata["backbone"]["norm"] == "BN"


def test_the_preprocessor_is_read_without_a_config_and_inside_a_processors(folder, tmp_path):
    folder(max_length=20, do_sample=False)  # transformers 4 writes these too
    (tmp_path / "processor_config.json").write_text(
        json.dumps({"image_processor": {**PROCESSOR_50, "image_std": [0.5] * 3}})
    )
    for _ in range(2):
        assert read_weights(tmp_path).metadata["converted_from"]["input"]["std"] == [0.5] * 3
        (tmp_path / "config.json").unlink(missing_ok=True)
        (tmp_path / "processor_config.json").write_text(json.dumps({**PROCESSOR_50, "image_std": [0.5] * 3}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR_50))
    assert "state different inputs; keep one" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["resnetblur50-84f4748f.pth", "timm_resnetaa50_a1h-4cf422b3.pth"])
def test_a_file_with_the_name_of_a_blurring_network_is_refused(tmp_path, name):
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / name)
    assert "which blurs its maps before it subsamples them; no network here does" in refusal(tmp_path / name)
    torch.save({"arch": name, "state_dict": timm.create_model("resnet18").state_dict()}, tmp_path / "last.pth")
    assert "which blurs its maps before it subsamples them; no network here does" in refusal(tmp_path / "last.pth")

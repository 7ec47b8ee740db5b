import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from resbackbone import build_resnet_classifier
from resbackbone.analysis import count_parameters
from resbackbone.cifar import CIFAR_DEPTHS, build_cifar_resnet, save_cifar_resnet

# Table 6 in millions, and counted from its text: 3x3 layers, two numbers for each norm's channel, fc.
PARAMETERS = {
    20: (0.27, 269_722),
    32: (0.46, 464_154),
    44: (0.66, 658_586),
    56: (0.85, 853_018),
    110: (1.7, 1_727_962),
    1202: (19.4, 19_421_274),
}


@pytest.mark.parametrize("depth", CIFAR_DEPTHS)
def test_residual_and_plain_nets_have_the_parameters_of_table_6(depth):
    published, counted = PARAMETERS[depth]
    for shortcut in ("A", "none"):
        with torch.device("meta"):
            model = build_cifar_resnet(depth, shortcut=shortcut)
        assert count_parameters(model) == counted
        assert round(counted / 1e6, len(str(published).split(".")[1])) == published


def test_shortcuts_b_and_c_project_where_they_should():
    def projections(shortcut):
        names = build_cifar_resnet(20, shortcut=shortcut).state_dict()
        return [name.removesuffix(".downsample.0.weight") for name in names if name.endswith("downsample.0.weight")]

    assert projections("A") == projections("none") == []
    assert projections("B") == ["layer2.0", "layer3.0"]
    assert projections("C") == [f"layer{i}.{j}" for i in (1, 2, 3) for j in (0, 1, 2)]


def written_out(state, x, *, plain):
    """The network of Sec. 4.2 from its tensors, in eval mode."""

    def norm(name, x):
        w, b, mean, var = (state[f"{name}.{leaf}"] for leaf in ("weight", "bias", "running_mean", "running_var"))
        return F.batch_norm(x, mean, var, w, b, eps=1e-5)

    x = norm("bn1", F.conv2d(x, state["conv1.weight"], padding=1)).relu()
    for i in (1, 2, 3):
        for j in range(3):
            block, stride = f"layer{i}.{j}", 2 if i > 1 and j == 0 else 1
            y = norm(f"{block}.bn1", F.conv2d(x, state[f"{block}.conv1.weight"], stride=stride, padding=1)).relu()
            y = norm(f"{block}.bn2", F.conv2d(y, state[f"{block}.conv2.weight"], padding=1))
            if not plain:
                kept = x[:, :, ::stride, ::stride]
                y[:, : kept.shape[1]] += kept  # the new channels get zeros
            x = y.relu()
    return F.linear(x.mean((2, 3)), state["fc.weight"], state["fc.bias"])


@pytest.mark.parametrize("shortcut", ["A", "none"])
@pytest.mark.parametrize("height, width", [(32, 32), (31, 45)])
def test_the_output_is_that_of_the_network_written_out(randomised, shortcut, height, width):
    model = randomised(build_cifar_resnet(20, shortcut=shortcut, num_classes=7)).double()
    x = torch.randn(2, 3, height, width, dtype=torch.float64)
    wanted = written_out(model.state_dict(), x, plain=shortcut == "none")
    found = model(x)
    assert found.shape == (2, 7)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(model(x.contiguous(memory_format=torch.channels_last)), wanted)


def test_weights_start_as_in_the_papers_reference_13():
    model = build_cifar_resnet(110)
    for stage, width in ((model.layer1, 16), (model.layer2, 32), (model.layer3, 64)):
        weights = torch.cat([block.conv2.weight.flatten() for block in stage])
        assert float(weights.detach().std()) == pytest.approx((2 / (9 * width)) ** 0.5, rel=0.02)


@pytest.mark.parametrize("shortcut", ["A", "B", "C", "none"])
def test_a_saved_network_comes_back_without_being_described(tmp_path, randomised, shortcut):
    model = randomised(build_cifar_resnet(20, shortcut=shortcut, num_classes=3))
    mean = torch.rand(3, 32, 32)
    file = tmp_path / "model.safetensors"
    save_cifar_resnet(model, file, mean_image=mean, classes=["a", "b", "c"], recipe="none")
    again = build_cifar_resnet(weights=file).eval()
    assert again.config == model.config == {"depth": 20, "shortcut": shortcut, "num_classes": 3}
    assert torch.equal(again.mean_image, mean)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(again(x), model(x))


def test_a_published_checkpoint_loads_under_its_own_names(tmp_path, randomised):
    model = randomised(build_cifar_resnet(32))
    named = {f"module.{name.replace('fc.', 'linear.')}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": named, "best_prec1": 92.6}, tmp_path / "resnet32.th")
    again = build_cifar_resnet(32, weights=tmp_path / "resnet32.th").eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(again(x), model(x)) and again.mean_image is None
    assert build_cifar_resnet(weights=tmp_path / "resnet32.th").config["depth"] == 32


@pytest.mark.parametrize("depth", [18, 26, 20.0, None])
def test_a_depth_that_the_paper_has_not_is_refused(depth):
    with pytest.raises(
        ValueError, match=rf"unknown depth {re.escape(str(depth))}; choose from 20, 32, 44, 56, 110, 1202"
    ):
        build_cifar_resnet(depth)


def test_a_shortcut_that_is_none_is_refused():
    with pytest.raises(ValueError, match="unknown shortcut 'D'; choose from A, B, C, none"):
        build_cifar_resnet(20, shortcut="D")


@pytest.mark.parametrize(
    "asked, says",
    [
        ({"depth": 32}, "depth=20, but you asked for depth=32"),
        ({"num_classes": 100}, "num_classes=10, but you asked for num_classes=100"),
        ({"shortcut": "A"}, "shortcut=B, but you asked for shortcut=A"),
    ],
)
def test_weights_of_another_network_are_refused_in_one_sentence(asked, says):
    state = build_cifar_resnet(20, shortcut="B").state_dict()
    with pytest.raises(ValueError) as error:
        build_cifar_resnet(**asked, weights=state)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_file_of_a_plain_net_is_not_loaded_as_a_residual_one(tmp_path):
    file = tmp_path / "model.safetensors"
    plain = build_cifar_resnet(20, shortcut="none")
    save_cifar_resnet(plain, file, mean_image=torch.zeros(3, 32, 32), classes=["a"] * 10, recipe="none")
    with pytest.raises(ValueError, match="are for shortcut=none, but you asked for shortcut=A"):
        build_cifar_resnet(shortcut="A", weights=file)


def test_weights_that_do_not_fit_are_named():
    state = build_cifar_resnet(20).state_dict()
    state["layer2.1.conv1.weight"] = torch.zeros(32, 32, 1, 1)
    del state["bn1.bias"]
    with pytest.raises(
        ValueError, match=r"1 missing: bn1.bias; 1 of another shape: layer2.1.conv1.weight is \[32, 32, 1"
    ):
        build_cifar_resnet(weights=state)


def test_a_network_for_imagenet_is_none_of_these():
    with pytest.raises(ValueError, match="are of no CIFAR network"):
        build_cifar_resnet(weights=build_resnet_classifier(18).state_dict())


def test_a_cifar_network_is_none_for_imagenet(tmp_path):
    file = tmp_path / "model.safetensors"
    model = build_cifar_resnet(20)
    save_cifar_resnet(model, file, mean_image=torch.zeros(3, 32, 32), classes=["a"] * 10, recipe="none")
    with pytest.raises(ValueError):
        build_resnet_classifier(weights=file)
    with pytest.raises(ValueError, match="do not fit"):
        build_resnet_classifier(18, weights=file)


def test_a_safetensors_file_without_metadata_loads_too(tmp_path):
    model = build_cifar_resnet(20)
    save_file(model.state_dict(), tmp_path / "bare.safetensors")
    assert torch.equal(build_cifar_resnet(weights=tmp_path / "bare.safetensors").fc.weight, model.fc.weight)

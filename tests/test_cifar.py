import re

import pytest
import torch
import torch.nn.functional as F

from resbackbone import build_resnet_backbone, build_resnet_classifier
from resbackbone.analysis import count_parameters
from resbackbone.atomic import file_digest
from resbackbone.cifar import CIFAR_DEPTHS, build_cifar_resnet, save_cifar_resnet, save_for_akamaster
from resbackbone.weights import read_weights, sources

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


def written_out(state, x, *, shortcut, padding="end", n=3):
    """The network of Sec. 4.2 from its tensors, in eval mode."""

    def norm(name, x):
        w, b, mean, var = (state[f"{name}.{leaf}"] for leaf in ("weight", "bias", "running_mean", "running_var"))
        return F.batch_norm(x, mean, var, w, b, eps=1e-5)

    x = norm("bn1", F.conv2d(x, state["conv1.weight"], padding=1)).relu()
    for i in (1, 2, 3):
        for j in range(n):
            block, stride = f"layer{i}.{j}", 2 if i > 1 and j == 0 else 1
            y = norm(f"{block}.bn1", F.conv2d(x, state[f"{block}.conv1.weight"], stride=stride, padding=1)).relu()
            y = norm(f"{block}.bn2", F.conv2d(y, state[f"{block}.conv2.weight"], padding=1))
            if shortcut == "A":
                kept = x[:, :, ::stride, ::stride]
                first = (y.shape[1] - kept.shape[1]) // 2 if padding == "both" else 0
                y[:, first : first + kept.shape[1]] += kept  # the new channels get zeros
            x = y.relu()
    return F.linear(x.mean((2, 3)), state["fc.weight"], state["fc.bias"])


@pytest.mark.parametrize("shortcut", ["A", "none"])
@pytest.mark.parametrize("height, width", [(32, 32), (31, 45)])
def test_the_output_is_that_of_the_network_written_out(randomised, shortcut, height, width):
    model = randomised(build_cifar_resnet(20, shortcut=shortcut, num_classes=7)).double()
    x = torch.randn(2, 3, height, width, dtype=torch.float64)
    wanted = written_out(model.state_dict(), x, shortcut=shortcut)
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
    other = "A" if shortcut == "none" else "none"
    with pytest.raises(ValueError, match=f"are for shortcut={shortcut}, but you asked for shortcut={other}"):
        build_cifar_resnet(shortcut=other, weights=file)


@pytest.fixture
def theirs(tmp_path, randomised):
    """Writes a network as akamaster/pytorch_resnet_cifar10 does: a file, and its state dict under our names."""

    def write(depth=20, shortcut="A"):
        state = randomised(build_cifar_resnet(depth, shortcut=shortcut)).state_dict()
        named = {
            f"module.{name.replace('fc.', 'linear.').replace('downsample', 'shortcut')}": state[name] for name in state
        }
        torch.save({"state_dict": named, "best_prec1": 92.6}, file := tmp_path / f"resnet{depth}.th")
        return file, state

    return write


def test_zero_channels_on_both_sides_are_converted_exactly(theirs):
    x = torch.randn(2, 3, 31, 45, dtype=torch.float64)
    for depth in (20, 32):
        file, state = theirs(depth)
        for padding in ("both", "end"):
            model = build_cifar_resnet(depth, weights=file, shortcut="A", shortcut_padding=padding).eval().double()
            blocks = written_out(
                {k: v.double() for k, v in state.items()}, x, shortcut="A", padding=padding, n=(depth - 2) // 6
            )
            torch.testing.assert_close(model(x), blocks, rtol=1e-12, atol=1e-12)
        assert sorted(model.state_dict()) == sorted(state) and model.input is None and model.mean_image is None


@pytest.mark.parametrize("asked", [{}, {"shortcut": "A"}, {"shortcut_padding": "both"}])
def test_shortcuts_that_tensors_do_not_show_are_asked_for_in_one_sentence(theirs, asked):
    file, state = theirs()
    for weights in (file, state, read_weights(file)):
        with pytest.raises(ValueError, match="do not show which shortcuts") as error:
            build_cifar_resnet(20, weights=weights, **asked)
        said = str(error.value)
        assert "shortcut='A' with shortcut_padding='end'" in said and "'both'" in said and "shortcut='none'" in said
        assert "\n" not in said
    plain = build_cifar_resnet(weights=file, shortcut="none").eval()
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(plain(x), written_out(state, x, shortcut="none"))


def test_projections_need_no_answer_whatever_they_are_called(theirs, caplog):
    file, _ = theirs(20, "B")
    model = build_cifar_resnet(weights=file)
    assert model.config["shortcut"] == "B"
    assert caplog.messages == [
        f"weights from {file}: left out best_prec1",
        f"weights from {file}: shortcut B (the tensors); input not stated, so normalize images as in the training",
    ]
    with pytest.raises(ValueError, match="shortcut_padding='both' is for shortcut A; weights from .* have B"):
        build_cifar_resnet(weights=file, shortcut_padding="both")


def test_a_published_file_is_recognised_by_its_content_and_told(theirs, monkeypatch, caplog):
    file, state = theirs()
    monkeypatch.setitem(sources.RECOGNISED, file_digest(file)[:8], sources.AKAMASTER)
    model = build_cifar_resnet(weights=file).eval()
    images = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    wanted = written_out(state, (images - mean) / std, shortcut="A", padding="both")
    torch.testing.assert_close(model(model.normalize(images)), wanted, rtol=1e-5, atol=1e-5)
    _, line = caplog.messages  # the first names what is left out
    assert "shortcut A, shortcut_padding both, input RGB 0..1, mean 0.485 0.456 0.406, std 0.229 0.224 0.225 (" in line
    assert "akamaster" in line and "sha256" in line
    with pytest.raises(ValueError, match="are for shortcut_padding=both, but you asked for shortcut_padding=end"):
        build_cifar_resnet(weights=file, shortcut_padding="end")


def test_images_are_normalized_as_the_weights_say():
    images = torch.rand(2, 3, 32, 32)
    model = build_cifar_resnet(20)
    with pytest.raises(ValueError, match="input is not known"):
        model.normalize(images)
    given = {"channel_order": "BGR", "range": [0.0, 255.0], "mean": [1.0, 2.0, 3.0], "std": [4.0, 5.0, 6.0]}
    weights = read_weights(model.state_dict(), given_input=given)
    model = build_cifar_resnet(weights=weights, shortcut="A", shortcut_padding="end")
    wanted = torch.stack([(255 * images[:, 2 - i] - (i + 1)) / (i + 4) for i in range(3)], 1)
    torch.testing.assert_close(model.normalize(images), wanted)
    for wrong in (255 * images, (255 * images).byte()):
        with pytest.raises(ValueError, match=r"give floats in 0..1 \(divide by 255\)"):
            model.normalize(wrong)
    assert model.normalize(images[:0]).shape == (0, 3, 32, 32)


def test_padding_is_a_question_about_weights_only():
    with pytest.raises(ValueError, match="shortcut_padding is for weights"):
        build_cifar_resnet(20, shortcut_padding="both")
    with pytest.raises(ValueError, match="unknown shortcut_padding 'left'; choose from None, end, both"):
        build_cifar_resnet(weights=build_cifar_resnet(20).state_dict(), shortcut="A", shortcut_padding="left")


@pytest.mark.parametrize(
    "change, says",
    [
        ({"layer4.0.conv1.weight": torch.zeros(64, 64, 3, 3)}, "they have layer4, as torchvision's"),
        ({"layer3.3.conv1.weight": torch.zeros(64, 64, 3, 3)}, "layer1, layer2 and layer3 have 3, 3, 4 blocks"),
        ({"conv1.weight": torch.zeros(64, 3, 3, 3)}, r"conv1.weight is \[64, 3, 3, 3\], not \[16, 3, 3, 3\]"),
        ({"layer1.0.conv1.weight": torch.zeros(16, 16, 1, 1)}, r"layer1.0.conv1.weight is \[16, 16, 1, 1\]"),
        ({"fc.weight": None}, "fc.weight is missing"),
    ],
)
def test_relatives_of_the_papers_networks_are_refused_in_words(change, says):
    state = {**build_cifar_resnet(20).state_dict(), **change}
    with pytest.raises(ValueError, match=f"of no CIFAR network of the paper's, .*: {says}"):
        build_cifar_resnet(weights={key: x for key, x in state.items() if x is not None}, shortcut="none")


def test_networks_for_small_images_are_refused_in_words_where_imagenets_are_built():
    state = build_resnet_classifier(18).state_dict()  # kuangliu's ResNet-18 has this shape
    for weights in ({**state, "conv1.weight": torch.zeros(64, 3, 3, 3)}, build_cifar_resnet(20).state_dict()):
        for build in (build_resnet_classifier, build_resnet_backbone):
            with pytest.raises(
                ValueError,
                match="for small images or with a deep stem: conv1 is 3 x 3, and networks built here have 7 x 7",
            ):
                build(weights=weights)


def test_what_akamasters_code_cannot_compute_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="unknown shortcut of akamaster's networks 'C'; choose from A, B"):
        save_for_akamaster(build_cifar_resnet(20, shortcut="C"), tmp_path / "x.th")
    with pytest.raises(ValueError, match="akamaster's code normalizes each channel"):
        save_for_akamaster(build_cifar_resnet(20), tmp_path / "x.th")
    with pytest.raises(ValueError, match="input is not known: give mean_image"):
        save_cifar_resnet(build_cifar_resnet(20), tmp_path / "x.safetensors")


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


def test_weights_that_do_not_fit_are_named():
    state = build_cifar_resnet(20).state_dict()
    state["layer2.1.conv1.weight"] = torch.zeros(32, 32, 1, 1)
    del state["bn1.bias"]
    with pytest.raises(
        ValueError, match=r"1 missing: bn1.bias; 1 of another shape: layer2.1.conv1.weight is \[32, 32, 1"
    ):
        build_cifar_resnet(weights=state, shortcut="A", shortcut_padding="end")

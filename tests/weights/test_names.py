import pytest

from resbackbone.weights.names import Template, by_leaf, with_value


@pytest.mark.parametrize(
    "text, name, values",
    [
        ("conv1.weight", "conv1.weight", {}),
        ("layer{i}.{j}.bn{k}.{leaf}", "layer3.12.bn2.running_var", {"i": 3, "j": 12, "k": 2, "leaf": "running_var"}),
        ("res{i+1}.{j}.shortcut.weight", "res5.0.shortcut.weight", {"i": 4, "j": 0}),
        ("stages.{i-1}.layer.{k-1}.weight", "stages.0.layer.2.weight", {"i": 1, "k": 3}),
        ("res{i+1}_{j}_branch2{k:abc}_w", "res2_0_branch2c_w", {"i": 1, "j": 0, "k": 3}),
    ],
)
def test_a_template_reads_the_names_it_writes(text, name, values):
    assert Template(text).read(name) == values
    assert Template(text).write(values) == name


@pytest.mark.parametrize(
    "text, name",
    [
        ("conv1.weight", "xconv1.weight"),
        ("conv1.weight", "conv1.weight\n"),
        ("conv1.weight", "conv1_weight"),  # a dot is a dot
        ("bn1.{leaf}", "bn1.momentum"),
        ("layer{i}.bias", "layer.bias"),
        ("layer{i}.bias", "layer01.bias"),  # two names for one number would hide a tensor
        ("layer{i}.bias", "layer-1.bias"),
        ("res_branch2{k:abc}_w", "res_branch2d_w"),
    ],
)
def test_a_name_of_another_form_is_not_read(text, name):
    assert Template(text).read(name) is None


def test_a_place_is_filled_with_its_shift():
    assert with_value("res{i+1}.{j}.conv{k}", "i", 4) == "res5.{j}.conv{k}"
    assert with_value("stages.{i-1}.{i+1}", "i", 1) == "stages.0.2"


def test_a_template_of_leaves_is_one_for_each():
    assert by_leaf("bn.{leaf}", [("weight", "s"), ("bias", "b")]) == [("bn.weight", "s"), ("bn.bias", "b")]

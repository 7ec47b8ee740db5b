import pytest

from resbackbone.weights.names import read_name, write_name


@pytest.mark.parametrize(
    "template, name, values",
    [
        ("conv1.weight", "conv1.weight", {}),
        ("layer{i}.{j}.bn{k}.{leaf}", "layer3.12.bn2.running_var", {"i": 3, "j": 12, "k": 2, "leaf": "running_var"}),
        ("res{i+1}.{j}.shortcut.weight", "res5.0.shortcut.weight", {"i": 4, "j": 0}),
        ("stages.{i-1}.layer.{k-1}.weight", "stages.0.layer.2.weight", {"i": 1, "k": 3}),
        ("res{i+1}_{j}_branch2{k:abc}_w", "res2_0_branch2c_w", {"i": 1, "j": 0, "k": 3}),
    ],
)
def test_a_template_reads_the_names_it_writes(template, name, values):
    assert read_name(template, name) == values
    assert write_name(template, values) == name


@pytest.mark.parametrize(
    "template, name",
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
def test_a_name_of_another_form_is_not_read(template, name):
    assert read_name(template, name) is None


def test_placeholders_without_a_value_stay():
    assert write_name("res{i+1}.{j}.conv{k}", {"i": 4}) == "res5.{j}.conv{k}"

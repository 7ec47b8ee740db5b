import pytest

from resbackbone.weights.names import rename


@pytest.mark.parametrize(
    "ours, theirs, name, other",
    [
        ("conv1.weight", "conv1_w", "conv1.weight", "conv1_w"),
        (
            "layer{i}.{j}.bn{k}.{leaf}",
            "res{i+1}.{j}.conv{k}.norm.{leaf}",
            "layer3.12.bn2.bias",
            "res4.12.conv2.norm.bias",
        ),
        (
            "layer{i}.conv{k}.weight",
            "stages.{i-1}.layer.{k-1}.weight",
            "layer1.conv3.weight",
            "stages.0.layer.2.weight",
        ),
        ("layer{i}.{j}.conv{k}", "res{i+1}_{j}_branch2{k-1:a,b,c}", "layer1.0.conv3", "res2_0_branch2c"),
        ("bn1.{leaf}", "bn_{leaf:s,b,rm,riv}", "bn1.running_mean", "bn_rm"),
    ],
)
def test_a_pair_of_templates_renames_both_ways(ours, theirs, name, other):
    assert rename(name, ours, theirs) == other
    assert rename(other, theirs, ours) == name


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
        ("res_branch2{k-1:a,b,c}_w", "res_branch2d_w"),
    ],
)
def test_a_name_of_another_form_is_not_read(template, name):
    assert rename(name, template, template) is None


@pytest.mark.parametrize("name", ["conv0.weight", "conv4.weight", "conv1.running_var"])
def test_a_name_that_the_other_form_has_no_word_for_is_not_written(name):
    assert rename(name, "conv{k}.{leaf}", "branch2{k-1:a,b,c}_{leaf:w,b}") is None

"""The command that converts weights: what it writes, what it says, and what it refuses."""

import json
import re
from pathlib import Path

import pytest
import torch
import torchvision
from commands import error_line
from safetensors import safe_open

from detection.faster_rcnn import build_faster_rcnn
from detection.saved import load_detector, save_detector
from resbackbone import build_resnet_backbone
from resbackbone.cifar import build_cifar_resnet, save_for_akamaster
from resbackbone.tools import convert_weights
from resbackbone.weights import INPUT as RGB
from resbackbone.weights import read_weights
from resbackbone.weights.file import write_weights
from resbackbone.weights.sources import is_named
from resbackbone.weights.translate import from_ours, merged_norms
from resbackbone.weights.write import TARGETS

CATEGORIES = {3: "car", 13: "stop sign"}
INPUT = "RGB 0..1, mean 0.485 0.456 0.406, std 0.229 0.224 0.225"
MSRA_INPUT = "BGR 0..255, mean 103.53 116.28 123.675, std 1 1 1"


@pytest.fixture(scope="module")
def classifier(randomised):
    torch.manual_seed(0)
    return randomised(torchvision.models.resnet18(num_classes=5)).state_dict()


@pytest.fixture(scope="module")
def detector(randomised):
    torch.manual_seed(0)
    backbone = build_resnet_backbone(18, fpn=True, fpn_channels=8)
    return randomised(build_faster_rcnn(backbone, 2, categories=CATEGORIES, representation_size=8, min_size=64))


@pytest.fixture(scope="module")
def bottlenecks(randomised):
    """Of a ResNet-50, narrow and without its last stage."""
    torch.manual_seed(0)
    return randomised(build_resnet_backbone(50, levels=["c4"], width_per_group=4)).state_dict()


def convert(*argv):
    convert_weights.main([*map(str, argv)])


def said_by(capsys, *argv):
    capsys.readouterr()
    convert(*argv)
    return capsys.readouterr().out


def error_of(*argv):
    """The one line of a conversion that fails; no file is made, changed or gone then."""
    before = everything()
    said = error_line(lambda words: convert(*words), argv)
    assert everything() == before
    return said


def everything():
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns, path.stat().st_size) for path in Path().rglob("*")}


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return {key: json.loads(value) for key, value in file.metadata().items()}


def assert_same_tensors(state, expected, *, atol=0.0):
    state, expected = (
        {key: value for key, value in tensors.items() if not key.endswith("num_batches_tracked")}
        for tensors in (state, expected)
    )
    assert state.keys() == expected.keys()
    for key, tensor in expected.items():
        assert (state[key] - tensor).abs().max() <= atol, key


def test_a_chain_through_every_format_ends_with_the_tensors_it_began_with(classifier, capsys):
    torch.save(classifier, "start.pth")
    chain = [
        ("detectron2", "a.pkl", "torchvision / timm names: ", f"{INPUT}, assumed\n"),
        ("mmdetection", "b.pth", "detectron2 names, in its part model: ", f"{MSRA_INPUT}; converted to {INPUT}\n"),
        ("transformers", "c", "mmdetection names, in its part state_dict: ", f"{INPUT}\n"),
        ("timm", "d.bin", "transformers names: ", f"{INPUT}\n"),
        ("resbackbone", "e.safetensors", "torchvision / timm names: ", f"{INPUT}, assumed\n"),
        ("torchvision", "f.pt", "a file of this package: ", f"{INPUT}\n"),
    ]
    source = "start.pth"
    for format, destination, found, given in chain:
        said = said_by(capsys, source, destination, "--to", format)
        assert f"found   {found}resnet18, classifier of 5 classes, " in said
        assert f"input   {given}" in said and "stride" not in said  # blocks of two 3x3 have one place for it
        assert f"wrote   {destination} ({format}), read back: " in said
        source = destination
    assert_same_tensors(torch.load("f.pt"), classifier, atol=1e-7)
    assert json.loads(Path("c/config.json").read_text())["depths"] == [2, 2, 2, 2]


def test_a_network_with_group_norms_is_written_and_read_with_its_norm_given(tmp_path):
    network = build_resnet_backbone(18, norm="GN")
    write_weights(tmp_path / "gn.safetensors", network.state_dict(), {"backbone": network.config.to_json()})
    convert(tmp_path / "gn.safetensors", tmp_path / "gn.pth", "--to", "torchvision")
    convert(tmp_path / "gn.pth", tmp_path / "back.safetensors", "--norm", "GN")
    assert build_resnet_backbone(weights=tmp_path / "back.safetensors").config.norm == "GN"


def test_caffe2s_names_have_merged_norms_and_end_as_the_same_network(classifier):
    torch.save(classifier, "start.pth")
    convert("start.pth", "msra.pkl", "--to", "msra")
    convert("msra.pkl", "end.safetensors")
    assert_same_tensors(merged_norms(read_weights("end.safetensors").state), merged_norms(classifier), atol=1e-6)


def test_what_is_given_is_kept_in_the_file_and_no_longer_assumed(bottlenecks, capsys):
    torch.save(bottlenecks, "r50.pth")
    said = said_by(capsys, "r50.pth", "assumed.safetensors")
    assert "found   torchvision / timm names: resnet50, trunk, " in said
    assert "stride  in the 3x3, assumed\n" in said and f"input   {INPUT}, assumed\n" in said
    assert metadata_of("assumed.safetensors")["backbone"]["stride_in_1x1"] is False

    given = ["--stride-in-1x1", "--input", "bgr-255"]
    said = said_by(capsys, "r50.pth", "given.safetensors", *given)
    assert "stride  in the 1x1\n" in said and f"input   {MSRA_INPUT}; converted to {INPUT}\n" in said
    metadata = metadata_of("given.safetensors")
    assert metadata["backbone"]["stride_in_1x1"] is True and metadata["backbone"]["depth"] == 50
    assert metadata["source"] == "r50.pth"
    assert metadata["converted_from"]["input"]["channel_order"] == "BGR" and metadata["input"]["range"] == [0, 1]

    image = torch.rand(1, 3, 33, 47)
    theirs = build_resnet_backbone(50, levels=["c4"], width_per_group=4, stride_in_1x1=True).eval()
    theirs.load_state_dict(bottlenecks, strict=False)
    mean = torch.tensor([103.53, 116.28, 123.675]).view(3, 1, 1)
    std, ours_mean = (torch.tensor(x).view(3, 1, 1) for x in ([0.229, 0.224, 0.225], [0.485, 0.456, 0.406]))
    ours = build_resnet_backbone(weights="given.safetensors", levels=["c4"]).eval()
    with torch.inference_mode():
        got, expected = ours((image - ours_mean) / std)["c4"], theirs(255 * image.flip(1) - mean)["c4"]
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()


def test_files_that_say_their_stride_and_input_are_not_told_others(bottlenecks):
    torch.save(bottlenecks, "r50.pth")
    convert("r50.pth", "ours.safetensors", "--stride-in-1x1")
    said = error_of("ours.safetensors", "other.safetensors", "--no-stride-in-1x1")
    assert "ours.safetensors are for stride_in_1x1=True, but you asked for stride_in_1x1=False; leave" in said
    assert "ours.safetensors is a file of this package, which states its input; leave out yours" in error_of(
        "ours.safetensors", "other.safetensors", "--input", "bgr-255"
    )
    assert "torchvision's networks have the stride in the 3x3" in error_of(
        "ours.safetensors", "other.pth", "--to", "torchvision"
    )


def test_a_depth_that_names_do_not_tell_can_be_given(bottlenecks):
    torch.save({key: value for key, value in bottlenecks.items() if not key.startswith("layer3")}, "two.pth")
    assert "two.pth do not show their depth" in error_of("two.pth", "two.safetensors")
    convert("two.pth", "two.safetensors", "--depth", "101")
    assert metadata_of("two.safetensors")["backbone"]["depth"] == 101


def test_a_part_of_a_checkpoint_is_chosen_by_its_name(classifier, capsys):
    average = {key: value + 1 if value.is_floating_point() else value for key, value in classifier.items()}
    wrapped = {f"module.{key}": value for key, value in classifier.items()}
    torch.save({"model": wrapped, "model_ema": average, "epoch": 3}, "run.pth")
    assert "in its part model_ema: resnet18" in said_by(capsys, "run.pth", "ema.safetensors")
    assert "in its part model, under module.: resnet18" in said_by(
        capsys, "run.pth", "own.safetensors", "--entry", "model"
    )
    assert_same_tensors(read_weights("ema.safetensors").state, average)
    assert_same_tensors(read_weights("own.safetensors").state, classifier)
    assert "'run.pth': no part 'teacher' in the file" in error_of("run.pth", "x.safetensors", "--entry", "teacher")


def test_one_of_several_trunks_is_chosen_by_the_beginning_of_its_names(classifier, capsys):
    other = {f"encoder_k.{key}": value + 1 for key, value in classifier.items()}
    torch.save({**{f"encoder_q.{key}": value for key, value in classifier.items()}, **other}, "moco.pth")
    assert "prefix='encoder_q.' or prefix='encoder_k.'" in error_of("moco.pth", "x.safetensors")
    assert "under encoder_q.: resnet18" in said_by(capsys, "moco.pth", "q.safetensors", "--prefix", "encoder_q.")
    assert_same_tensors(read_weights("q.safetensors").state, classifier)


def test_what_only_training_needs_is_left_out_and_named(classifier, capsys):
    torch.save({**classifier, "n_averaged": torch.tensor(7)}, "averaged.pth")
    assert "omitted n_averaged (1 in all)" in (said := said_by(capsys, "averaged.pth", "out.safetensors"))
    assert "n_averaged" in said and "n_averaged" not in read_weights("out.safetensors").state


def test_a_detector_goes_out_and_comes_back_with_its_categories(detector, capsys):
    save_detector(detector, "model.safetensors")
    assert "resnet18, Faster R-CNN (fpn, 2 classes), " in said_by(
        capsys, "model.safetensors", "a.pkl", "--to", "detectron2"
    )
    said = said_by(capsys, "a.pkl", "b.pth", "--to", "mmdetection")
    assert "note    made with torchvision's RoIAlign and anchors" in said
    said = said_by(capsys, "b.pth", "c.safetensors", "--to", "torchvision")
    assert "boxes differ" not in said
    assert "note    torchvision has other settings: set there min_size 64 (usual: 800), its categories" in said
    convert("c.safetensors", "d.safetensors")
    back = load_detector("d.safetensors")
    assert dict(back.categories) == CATEGORIES and back.config == detector.config
    expected = detector.state_dict()
    predictor = "roi_heads.box_predictor.bbox_pred"
    for state in (expected, got := back.state_dict()):
        for leaf in ("weight", "bias"):
            state[f"{predictor}.{leaf}"] = state[f"{predictor}.{leaf}"][4:]  # no format but ours has background's box
    assert_same_tensors(got, expected, atol=1e-6)


def test_a_part_of_a_detector_is_a_backbone_or_a_trunk(detector, capsys):
    save_detector(detector, "model.safetensors")
    whole = detector.backbone.state_dict()
    said = said_by(capsys, "model.safetensors", "backbone.safetensors", "--part", "backbone")
    assert "resnet18, backbone with pyramid, " in said
    assert_same_tensors(read_weights("backbone.safetensors").state, whole)
    assert "detector" not in metadata_of("backbone.safetensors")
    assert "resnet18, trunk, " in said_by(capsys, "model.safetensors", "trunk.safetensors", "--part", "trunk")
    trunk = {key: value for key, value in whole.items() if not key.startswith("fpn.")}
    assert_same_tensors(read_weights("trunk.safetensors").state, trunk)
    assert build_resnet_backbone(weights="trunk.safetensors").config.depth == 18
    error_of("model.safetensors", "trunk", "--to", "transformers")


def test_a_mask_head_is_refused_by_name_and_its_backbone_converts(detector):
    state = from_ours(detector.state_dict(), "torchvision")
    torch.save({**state, "roi_heads.mask_predictor.conv5_mask.weight": torch.zeros(2, 3)}, "mask.pth")
    said = error_of("mask.pth", "mask.safetensors")
    assert "conv5_mask.weight; --part backbone converts these" in said
    convert("mask.pth", "mask.safetensors", "--part", "backbone")
    assert_same_tensors(read_weights("mask.safetensors").state, detector.backbone.state_dict())


def test_the_list_has_every_source_in_a_line_of_its_own_that_begins_with_its_name(capsys, monkeypatch):
    monkeypatch.setattr(convert_weights.console, "width", 40)
    heading, *rows = said_by(capsys, "--list").splitlines()
    names = [row.split()[0] for row in rows]
    assert heading.split()[0] == "weights" and len(names) == len(set(names)) > 100
    assert all(is_named(name) and name.partition(":")[2] for name in names)
    assert all(row.split()[1] in {"18", "34", "50", "101", "152"} for row in rows)
    assert {"timm:resnet50.a1_in1k", "detectron2:ImageNetPretrained/MSRA/R-50.pkl"} <= set(names)
    assert all("  " in row and row.index(row.split()[2]) == heading.index("what") for row in rows)


def test_a_file_that_is_there_is_replaced_only_when_asked(classifier):
    torch.save(classifier, "r18.pth")
    Path("out.safetensors").write_text("precious")
    assert "out.safetensors exists already; --overwrite replaces it" in error_of("r18.pth", "out.safetensors")
    convert("r18.pth", "out.safetensors", "--overwrite")
    assert_same_tensors(read_weights("out.safetensors").state, classifier)
    convert("out.safetensors", "out.safetensors", "--overwrite")  # onto itself
    assert_same_tensors(read_weights("out.safetensors").state, classifier)


def test_only_a_folder_of_transformers_is_replaced(classifier):
    torch.save(classifier, "r18.pth")
    convert("r18.pth", "net", "--to", "transformers")
    assert "net exists already" in error_of("r18.pth", "net", "--to", "transformers")
    convert("r18.pth", "net", "--to", "transformers", "--overwrite")
    Path("net/thesis.tex").write_text("precious")
    said = error_of("r18.pth", "net", "--to", "transformers", "--overwrite")
    assert "net holds more than transformers' files and is not replaced: thesis.tex" in said
    assert "net is a folder; resbackbone needs the name of a file" in error_of("r18.pth", "net", "--overwrite")
    for nameless in (".", "/"):
        assert "give a name to write to" in error_of("r18.pth", nameless, "--to", "transformers", "--overwrite")


@pytest.mark.parametrize("at", ["write_as", "read_weights"])
@pytest.mark.parametrize("to, name", [("resbackbone", "out.safetensors"), ("transformers", "out")])
def test_a_conversion_that_fails_in_the_middle_leaves_the_old_one_whole(classifier, at, to, name, monkeypatch):
    torch.save(classifier, "r18.pth")
    convert("r18.pth", name, "--to", to)
    real, calls = getattr(convert_weights, at), []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:  # the first reads the source, or writes what is tried
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(convert_weights, at, failing)
    assert "No space left on device" in error_of("r18.pth", name, "--to", to, "--overwrite")
    assert len(calls) == 2


def test_a_file_that_does_not_read_back_is_not_put_in_the_place_of_the_old_one(classifier, monkeypatch):
    torch.save(classifier, "r18.pth")
    Path("out.safetensors").write_text("precious")
    real = convert_weights.write_as

    def damaging(path, weights, format):
        state = {**weights.state, "layer3.1.bn2.bias": weights.state["layer3.1.bn2.bias"] + 1}
        real(path, convert_weights.replace(weights, state=state), format)

    monkeypatch.setattr(convert_weights, "write_as", damaging)
    said = error_of("r18.pth", "out.safetensors", "--overwrite")
    assert "out.safetensors is not written, as resbackbone does not hold all of this network: layer3.1.bn2.bias" in said


@pytest.mark.parametrize(
    "change, told",
    [
        ({"layer2.0.conv1.weight": None}, "1 missing: layer2.0.conv1.weight"),
        ({"layer2.0.conv9.weight": torch.zeros(3, 3)}, "1 unexpected: layer2.0.conv9.weight"),
        ({"layer2.2.conv1.weight": torch.zeros(1)}, "have 2-3-2-2 basic blocks"),
        ({"fc.weight": torch.tensor(1.0)}, "bad.pth: fc.weight is [], which no layer has"),
        ({"fc.weight": torch.zeros(0, 512)}, "bad.pth: fc.weight is [0, 512], which no layer has"),
        ({"conv1.weight": torch.zeros(64, 0, 7, 7)}, "bad.pth: conv1.weight is [64, 0, 7, 7], which no layer has"),
        ({"bn1.bias": torch.zeros(64, dtype=torch.int8)}, "bn1.bias holds int8, not floating point numbers"),
        ({"conv1.weight": None}, "bad.pth: unknown tensor names"),
    ],
)
def test_weights_that_are_not_a_whole_network_are_refused_by_name(classifier, change, told):
    state = {key: value for key, value in {**classifier, **change}.items() if value is not None}
    torch.save(state, "bad.pth")
    said = error_of("bad.pth", "out.safetensors")
    assert told in said and "bad.pth" in said


@pytest.fixture
def cifar(randomised):
    """Writes a CIFAR network as akamaster's code does, and returns it with zero channels at the end."""

    def write(file, shortcut="A"):
        model = randomised(build_cifar_resnet(20, shortcut=shortcut, num_classes=3))
        model.input = INPUT_OF_CIFAR
        save_for_akamaster(model, "described.th") if shortcut in "AB" else torch.save(model.state_dict(), file)
        if shortcut in "AB":
            torch.save({"state_dict": torch.load("described.th")["state_dict"], "best_prec1": 91.6}, file)
        return model

    return write


GIVEN_OF_CIFAR = ["--mean", ".4914", ".4822", ".4465", "--std", ".2023", ".1994", ".201"]
INPUT_OF_CIFAR = {**RGB, "mean": [0.4914, 0.4822, 0.4465], "std": [0.2023, 0.1994, 0.201]}
PADDED = ["--shortcut", "A", "--shortcut-padding", "both"]


def assert_same_cifar_network(file, model):
    back = build_cifar_resnet(weights=file)
    assert back.config == model.config and back.input == INPUT_OF_CIFAR
    assert_same_tensors(back.state_dict(), model.state_dict())


@pytest.mark.parametrize("shortcut, given", [("A", PADDED), ("B", []), ("none", ["--shortcut", "none"])])
def test_cifar_networks_come_in_with_what_tensors_do_not_show_and_go_out_again(cifar, capsys, shortcut, given):
    model = cifar("theirs.th", shortcut)
    said = said_by(capsys, "theirs.th", "ours.safetensors", *given, *GIVEN_OF_CIFAR)
    assert re.search(rf"^shortcut +{shortcut} +{'the caller' if given else 'the tensors'}$", said, re.M)
    assert re.search(r"^input +RGB 0..1, mean 0.4914 0.4822 0.4465, std 0.2023 0.1994 0.201 +the caller$", said, re.M)
    assert "wrote   ours.safetensors (resbackbone), read back: " in said
    assert_same_cifar_network("ours.safetensors", model)
    assert metadata_of("ours.safetensors")["source"] == "theirs.th"
    if shortcut == "none":
        assert "unknown shortcut of akamaster's networks 'none'; choose from A, B" in error_of(
            "ours.safetensors", "again.th", "--to", "akamaster"
        )
        return
    convert("ours.safetensors", "again.th", "--to", "akamaster")
    assert_same_tensors(torch.load("again.th")["state_dict"], torch.load("theirs.th")["state_dict"])
    convert("again.th", "last.safetensors")  # the file says what it is
    assert "ours.safetensors is a file of this package" in error_of(
        "ours.safetensors", "x.safetensors", "--input", "rgb"
    )
    assert_same_cifar_network("last.safetensors", model)


def test_what_a_cifar_file_does_not_say_is_asked_for(cifar):
    cifar("theirs.th")
    assert "theirs.th do not show which shortcuts they were trained with; give shortcut='A' with" in error_of(
        "theirs.th", "x.safetensors"
    )
    said = error_of("theirs.th", "x.safetensors", *PADDED)
    assert "theirs.th does not state its input; give --mean and --std of its training" in said
    assert "--mean and --std belong together" in error_of("theirs.th", "x.safetensors", *PADDED, *GIVEN_OF_CIFAR[:4])


def test_cifar_networks_are_not_written_as_imagenets(cifar, classifier):
    cifar("theirs.th")
    given = [*PADDED, *GIVEN_OF_CIFAR]
    assert "unknown format of a CIFAR network 'timm'; choose from resbackbone, akamaster" in error_of(
        "theirs.th", "x.pth", "--to", "timm", *given
    )
    for option in (["--part", "trunk"], ["--eps", "0.001"], ["--norm", "GN"], ["--dilate-c5"]):
        assert f"{option[0]} is for ImageNet's networks" in error_of("theirs.th", "x.safetensors", *option, *given)
    assert "x.pkl: unknown suffix '.pkl' for akamaster; choose from .th, .pth, .pt" in error_of(
        "theirs.th", "x.pkl", "--to", "akamaster", *given
    )
    torch.save(classifier, "r18.pth")
    assert "unknown format for r18.pth 'akamaster'; choose from" in error_of("r18.pth", "x.th", "--to", "akamaster")


def explained(capsys, *argv):
    """{fact: its value and where it is from} of --explain, which writes nothing."""
    before = everything()
    said = said_by(capsys, "--explain", *argv)
    assert everything() == before
    return {line.split()[0]: " ".join(line.split()[1:]) for line in said.splitlines()}


def test_explain_says_where_each_fact_is_from_and_writes_nothing(bottlenecks, cifar, capsys):
    torch.save({"model": bottlenecks, "epoch": 3}, "r50.pth")
    facts = explained(capsys, "r50.pth")
    assert facts["found"].startswith("torchvision / timm names, in its part model: resnet50, trunk, ")
    assert facts["depth"] == "50 the tensors" and facts["width_per_group"] == "4 the tensors"
    usual = "assumed, as usual for torchvision / timm names"
    assert facts["stride_in_1x1"] == f"False {usual}; --stride-in-1x1 changes it"
    assert facts["eps"] == "1e-05 default; --eps changes it"
    assert facts["input"] == f"{INPUT} {usual}; --input changes it"
    facts = explained(capsys, "r50.pth", "--stride-in-1x1", "--input", "bgr-255")
    assert facts["stride_in_1x1"] == "True the caller" and facts["input"] == f"{MSRA_INPUT} the caller"
    convert("r50.pth", "ours.safetensors", "--stride-in-1x1")
    facts = explained(capsys, "ours.safetensors")
    assert facts["stride_in_1x1"] == "True the file" and facts["input"] == f"{INPUT} the file"

    cifar("theirs.th")
    facts = explained(capsys, "theirs.th")
    assert facts["shortcut"].startswith("? not known; needed to convert or build it: shortcut='A' with")
    assert (
        facts["input"] == "? not known; needed to convert it: --mean and --std" and facts["depth"] == "20 the tensors"
    )
    facts = explained(capsys, "theirs.th", *PADDED)
    assert facts["shortcut"] == "A the caller" and facts["shortcut_padding"] == "both the caller"


def test_explain_lists_a_detectors_settings_and_what_is_left_out(detector, capsys):
    torch.save(from_ours(detector.state_dict(), "torchvision") | {"lr": torch.zeros(())}, "theirs.pth")
    facts = explained(capsys, "theirs.pth")
    assert facts["variant"].startswith("fpn the tensors") and facts["fpn_channels"] == "8 the tensors"
    assert facts["box_score_thresh"] == "0.05 default" and facts["norm"] == "FrozenBN default for a BN with weights"
    assert facts["omitted"].startswith("lr (1 in all)")
    save_detector(detector, "ours.safetensors")
    facts = explained(capsys, "ours.safetensors")
    assert facts["min_size"] == "64 the file" and facts["categories"] == "2 names the file"


def test_a_plain_network_for_imagenet_is_converted_when_its_shortcuts_are_given(randomised):
    model = randomised(build_resnet_backbone(18, shortcut="none"))
    torch.save(model.state_dict(), "plain18.pth")
    assert "missing: layer2.0.downsample.0.weight" in error_of("plain18.pth", "x.safetensors")
    convert("plain18.pth", "plain18.safetensors", "--shortcut", "none")
    assert build_resnet_backbone(weights="plain18.safetensors").config.shortcut == "none"
    assert "--shortcut-padding is for CIFAR networks" in error_of(
        "plain18.pth", "x.safetensors", "--shortcut-padding", "both"
    )


def test_explain_of_what_cannot_be_built_is_one_line_after_the_facts(classifier, capsys):
    torch.save({**classifier, "layer2.0.conv9.weight": torch.zeros(3, 3)}, "bad.pth")
    assert "do not fit: 1 unexpected: layer2.0.conv9.weight" in error_of("bad.pth", "--explain")
    assert "give SRC and DST" in error_of("--explain")


@pytest.mark.parametrize(
    "metadata, told",
    [
        ({"detector": {"variant": "fpn"}}, "a detector this version cannot build"),
        ({"backbone": {"eps": "small"}}, "a backbone this version"),
    ],
)
def test_a_network_whose_description_is_broken_is_one_line(detector, metadata, told):
    write_weights(
        "bad.safetensors", detector.state_dict(), {"backbone": detector.backbone.config.to_json(), **metadata}
    )
    assert f"bad.safetensors describes {told}" in error_of("bad.safetensors", "x.safetensors")


def test_wrong_arguments_are_one_line_that_names_them(classifier):
    torch.save(classifier, "r18.pth")
    Path("empty").mkdir()
    assert "give SRC and DST" in error_of("r18.pth")
    assert "give SRC and DST" in error_of()
    assert "weights 'empty': the folder holds no model.safetensors" in error_of("empty", "x.safetensors")
    assert f"unknown format 'caffe'; choose from {', '.join(TARGETS)}, akamaster" in error_of(
        "none.pth", "x.pkl", "--to", "caffe"
    )
    assert "nowhere: no such folder to write into" in error_of("r18.pth", "nowhere/x.safetensors")
    assert "r18.pth: no such folder to write into" in error_of("r18.pth", "r18.pth/x.safetensors")
    assert "unknown input 'bgr'; choose from rgb, rgb-255, bgr-255" in error_of(
        "r18.pth", "x.safetensors", "--input", "bgr"
    )
    assert "unknown part 'head'" in error_of("r18.pth", "x.safetensors", "--part", "head")
    assert "depth=18, but you asked for depth=34" in error_of("r18.pth", "x.safetensors", "--depth", "34")
    assert "--overwrit" in error_of("r18.pth", "x.safetensors", "--overwrit")


def test_the_eps_of_a_detector_with_frozen_norms_is_assumed_in_words_or_given(detector, tmp_path, capsys):
    state = from_ours(detector.state_dict(), "torchvision")
    frozen = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    torch.save(frozen, tmp_path / "frozen.pth")
    said = said_by(capsys, tmp_path / "frozen.pth", tmp_path / "assumed.safetensors")
    assert "eps     1e-05, assumed (--eps 0 if it was trained from torchvision's published detector)" in said
    said = said_by(capsys, tmp_path / "frozen.pth", tmp_path / "given.safetensors", "--eps", "0")
    assert "assumed (--eps" not in said
    for name, eps in (("assumed", 1e-5), ("given", 0.0)):
        assert load_detector(tmp_path / f"{name}.safetensors").backbone.bn1.eps == eps
    said = error_line(
        convert_weights.main, [tmp_path / "given.safetensors", tmp_path / "x.safetensors", "--eps", "1e-5"]
    )
    assert "are for eps=0.0, but you asked for eps=1e-05" in said


def test_a_dilated_trunk_is_written_only_where_a_reader_dilates_it_too(randomised, capsys):
    x, files = torch.rand(1, 3, 64, 96), {18: ("d.safetensors", "timm"), 50: ("e.pkl", "detectron2")}
    for depth, (destination, format) in files.items():
        backbone = randomised(build_resnet_backbone(depth, dilate_c5=True, stride_in_1x1=depth == 50)).eval()
        write_weights("model.safetensors", backbone.state_dict(), {"backbone": backbone.config.to_json()})
        for other in ("a.pth --to torchvision", "b.pth --to timm", "c --to transformers"):
            assert depth == 50 or "dilate_c5=True" in error_of("model.safetensors", *other.split())
        assert depth == 50 or "stride in the 1x1" in error_of("model.safetensors", "f.pth", "--to", "mmdetection")
        assert "for the dilated c5" in said_by(capsys, "model.safetensors", destination, "--to", format)
        back = build_resnet_backbone(depth, weights=destination).eval()
        expected = backbone(x)["c5"]
        torch.testing.assert_close(back(x)["c5"], expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_anchors_that_a_format_does_not_state_are_refused_or_said(randomised, capsys):
    detector = build_faster_rcnn(
        build_resnet_backbone(18, fpn=True, fpn_channels=8), 2, representation_size=8, anchor_scale=4.0
    )
    save_detector(randomised(detector), "model.safetensors")
    said = error_of("model.safetensors", "a.pth", "--to", "torchvision")
    assert "do not state anchor_scale 4.0 (usual: 8.0), canonical_scale 112 (usual: 224)" in said
    assert "set there anchor_scale 4.0" in said_by(capsys, "model.safetensors", "a.pkl", "--to", "detectron2")
    assert load_detector("a.pkl").config.anchor_scale == 4.0


def test_the_input_of_a_network_of_one_channel_is_not_three_means(tmp_path, capsys):
    torch.save(build_resnet_backbone(18, in_channels=1).state_dict(), tmp_path / "gray.pth")
    convert_weights.main(["--explain", str(tmp_path / "gray.pth")])
    said = capsys.readouterr().out
    assert "1 channel, as in its training" in said and "mean" not in said

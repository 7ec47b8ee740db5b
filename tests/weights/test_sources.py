import json
import shutil
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
import torchvision
from huggingface_hub import constants, errors

from resbackbone.weights import sources
from resbackbone.weights.inputs import BGR_255, INPUT, MEAN
from resbackbone.weights.sources import is_named, locate, published_sha256

STRIDE_IN_3X3 = {"stride_in_1x1": False, "eps": 1e-5}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    """Every cache in the test's own folder, and no network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "iopath"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: pytest.fail("a test went to the network"))


@pytest.fixture
def downloads(monkeypatch):
    """The calls of download(), none of which downloads."""
    calls = []

    def record(url, to, *, sha256="", md5=""):
        calls.append((url, to, sha256, md5))

    monkeypatch.setattr(sources, "download", record)
    return calls


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for Hugging Face: repository -> file -> content, or an error to raise."""
    repositories = {}

    def snapshot_download(repository, *, revision=None, allow_patterns):
        folder = tmp_path / "snapshot" / repository
        shutil.rmtree(folder, ignore_errors=True)
        content = repositories[f"{repository}@{revision}" if revision else repository]
        if isinstance(content, Exception):
            raise content
        for file in content.keys() & {*allow_patterns}:
            text = content[file] if isinstance(content[file], str) else json.dumps(content[file])
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(text, encoding="utf-8")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return repositories


def refusal(source: str) -> str:
    with pytest.raises(ValueError) as error:
        locate(source)
    message = str(error.value)
    assert "\n" not in message and message.startswith(f"weights {source!r}: ")
    return message


def test_names_are_told_from_paths():
    for name in ("torchvision:A.B", "timm:resnet50", "hf:a/b", "detectron2:R-50.pkl", "https://h/a.pth", "HTTP://h/a"):
        assert is_named(name)
    for path in ("r50.safetensors", "runs/timm/r50.pth", "C:\\r50.pth", "timm", "ftp://h/a.pth", "./hf:a/b"):
        assert not is_named(path)
    assert "no such file" in refusal("r50.pth")


# torchvision


def test_torchvision_weights_lie_where_torchvision_keeps_them_and_say_what_it_says(downloads):
    path, stated = locate("torchvision:ResNet50_Weights.IMAGENET1K_V2")
    url = "https://download.pytorch.org/models/resnet50-11ad3fa6.pth"
    assert path == Path(torch.hub.get_dir()) / "checkpoints" / "resnet50-11ad3fa6.pth"
    assert downloads == [(url, path, "11ad3fa6", "")]
    assert stated["source"] == "torchvision:ResNet50_Weights.IMAGENET1K_V2" and stated["licence"] == "BSD-3-Clause"
    assert stated["backbone"] == STRIDE_IN_3X3 and stated["input"] == INPUT
    assert len(stated["classes"]) == 1000 and stated["classes"][0] == "tench"
    assert stated["recipe"].startswith("https://github.com/pytorch/vision/")
    json.dumps(stated)  # as metadata of a file
    assert locate("torchvision:ResNet50_Weights.DEFAULT")[1] == stated  # an alias


@pytest.mark.parametrize(
    "name, eps",
    [
        ("FasterRCNN_ResNet50_FPN_Weights.COCO_V1", 0.0),
        ("KeypointRCNN_ResNet50_FPN_Weights.COCO_LEGACY", 1e-5),
        ("FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1", 1e-5),
    ],
)
def test_torchvision_detectors_state_the_eps_that_torchvision_loads_them_with(downloads, monkeypatch, name, eps):
    _, stated = locate(f"torchvision:{name}")
    assert stated["backbone"] == {"stride_in_1x1": False, "eps": eps} and stated["input"] == INPUT

    weights = torchvision.models.get_weight(name)
    builder = torchvision.models.get_model_builder(name.split("_Weights")[0].lower())
    monkeypatch.setattr(type(weights), "get_state_dict", lambda *_, **__: {})
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", lambda *_, **__: None)
    assert builder(weights=weights).backbone.body.bn1.eps == eps


@pytest.mark.parametrize(
    "name, says",
    [
        ("ResNet50_Weights", "did you mean ResNet50_Weights.IMAGENET1K_V1?"),
        ("ResNet50_Weights.IMAGENET1K_V3", "did you mean ResNet50_Weights.IMAGENET1K_V2?"),
        ("ResNet50.IMAGENET1K_V2", "did you mean ResNet50_Weights.IMAGENET1K_V2?"),
        ("resnet", "resbackbone.weights.list_sources() names those that fit"),
    ],
)
def test_a_name_torchvision_does_not_know_is_answered_with_the_nearest_or_the_list(name, says):
    assert f"torchvision has no such weights; {says}" in refusal(f"torchvision:{name}")


# timm


def test_timm_weights_come_from_its_hub_and_say_what_its_registry_says(hub):
    hub["timm/resnet50.a1_in1k"] = {"model.safetensors": "tensors"}
    path, stated = locate("timm:resnet50.a1_in1k")
    assert path.name == "model.safetensors" and path.read_text() == "tensors"
    assert stated["licence"] == "apache-2.0" and stated["recipe"] == "a1_in1k (arXiv:2110.00476)"
    assert stated["backbone"] == {**STRIDE_IN_3X3, "depth": 50} and stated["input"] == INPUT
    assert locate("timm:resnet50")[1]["source"] == "timm:resnet50.a1_in1k"  # its default tag


def test_a_timm_network_trained_on_another_input_says_so(hub):
    hub["timm/resnet34.ra4_e3600_r224_in1k"] = {"pytorch_model.bin": "tensors"}
    path, stated = locate("timm:resnet34.ra4_e3600_r224_in1k")
    assert path.name == "pytorch_model.bin"
    assert stated["input"] == {**INPUT, "mean": [0.5] * 3, "std": [0.5] * 3}


@pytest.mark.parametrize(
    "name, answer",
    [
        ("resnet50.a9_in1k", "list_sources() names those that fit"),
        ("vgg16.tv_in1k", "not one of timm's ResNets"),
        ("resnetblur50.bt_in1k", "blurs its maps"),
        ("resnetaa50.a1h_in1k", "blurs its maps"),
        ("resnet200.untrained", "publishes no weights"),
        ("", "timm has no such weights"),
    ],
)
def test_a_name_timm_has_nothing_for_is_answered_with_what_there_is(name, answer):
    assert answer in refusal(f"timm:{name}")


# Hugging Face


def test_a_transformers_repository_states_stride_input_classes_and_licence(hub):
    hub["me/net"] = {
        "model.safetensors": "tensors",
        "config.json": {
            "model_type": "resnet",
            "downsample_in_bottleneck": True,
            "id2label": {"1": "dog", "0": "cat"},
        },
        "preprocessor_config.json": {"image_mean": list(MEAN), "image_std": [0.5, 0.25, 0.125]},
        "README.md": '---\ntags:\n- x\nlicense: "mit"\n---\n# Net\nlicense: gpl\n',
    }
    path, stated = locate("hf:me/net")
    assert path.read_text() == "tensors"
    assert stated == {
        "source": "hf:me/net",
        "licence": "mit",
        "publisher": "transformers",
        "backbone": {"stride_in_1x1": True, "eps": 1e-5},
        "input": {**INPUT, "std": [0.5, 0.25, 0.125]},
        "classes": ["cat", "dog"],
        "stated_by": "config.json",
    }


def test_what_a_repository_does_not_say_is_not_stated(hub):
    hub["me/net"] = {
        "pytorch_model.bin": "tensors",
        "config.json": {"model_type": "resnet", "id2label": {"0": "LABEL_0", "1": "LABEL_1"}},
        "README.md": "# Net\nlicense: gpl\n",
    }
    path, stated = locate("hf:me/net")
    assert path.name == "pytorch_model.bin"
    assert stated["licence"] == "unknown" and not {"input", "classes"} & set(stated)
    assert stated["backbone"] == STRIDE_IN_3X3  # transformers' default
    hub["me/net"] = {"model.safetensors": "tensors"}
    assert not {"backbone", "input"} & set(locate("hf:me/net")[1])


@pytest.mark.parametrize("nested", [True, False])
def test_a_timm_repository_states_its_pretrained_cfg(hub, nested):
    config = {"mean": [0.5] * 3, "std": [0.25] * 3, "license": "mit", "label_names": ["a", "b"]}
    config = {"architecture": "resnet18", **({"pretrained_cfg": config} if nested else config)}
    hub["timm/resnet18.a1_in1k"] = {"model.safetensors": "tensors", "config.json": config}
    stated = locate("hf:timm/resnet18.a1_in1k")[1]
    assert stated["input"] == {**INPUT, "mean": [0.5] * 3, "std": [0.25] * 3}
    assert (stated["licence"], stated["classes"], stated["backbone"]) == (
        "mit",
        ["a", "b"],
        {**STRIDE_IN_3X3, "depth": 18},
    )


def test_a_revision_and_a_file_can_be_named(hub):
    hub["me/net@refs/pr/1"] = {"sub/last.pth": "tensors", "model.safetensors": "others"}
    assert locate("hf:me/net@refs/pr/1:sub/last.pth")[0].name == "last.pth"
    hub["me/net"] = {}
    assert "holds no sub/last.pth" in refusal("hf:me/net:sub/last.pth")
    assert "holds no model.safetensors and no pytorch_model.bin" in refusal("hf:me/net")


@pytest.mark.parametrize("name", ["", "resnet-50", "a/b/c", "a/b@", "a/b:", "a b/c", "https://huggingface.co/a/b"])
def test_a_name_that_is_no_repository_is_refused(name):
    assert "hf:OWNER/REPO[@REVISION][:FILE]" in refusal(f"hf:{name}")


@pytest.mark.parametrize("content", ["{", "[1]", "[" * 100_000, "nul"])
def test_a_config_that_is_no_json_object_is_refused(hub, content):
    hub["me/net"] = {"model.safetensors": "tensors", "config.json": content}
    assert "its config.json" in refusal("hf:me/net")


@pytest.mark.parametrize("kind", ["RepositoryNotFoundError", "GatedRepoError", "RevisionNotFoundError"])
def test_what_hugging_face_refuses_is_its_own_message_in_one_line(hub, kind):
    error = getattr(errors, kind).__new__(getattr(errors, kind))  # its constructor takes the server's answer
    error.args = ("404 Client Error.\n\nNot found: https://hf",)
    hub["me/net@v2"] = error
    assert refusal("hf:me/net@v2").endswith("me/net could not be read: 404 Client Error. Not found: https://hf")


@pytest.mark.parametrize("source", ["timm:resnet50.a1_in1k", "hf:timm/resnet50.a1_in1k"])
def test_offline_one_line_says_what_to_fetch_and_that_its_path_will_do(source):
    message = refusal(source)
    assert "https://huggingface.co/timm/resnet50.a1_in1k/resolve/main/model.safetensors" in message
    assert "give the path of the downloaded model.safetensors instead" in message


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_offline_what_is_in_the_cache_is_used(tmp_path, file):
    repository = tmp_path / "hub" / "models--timm--resnet50.a1_in1k"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    (snapshot / file).write_text("tensors")
    for source in ("timm:resnet50.a1_in1k", "hf:timm/resnet50.a1_in1k"):
        assert locate(source)[0] == snapshot / file


# detectron2

MASK_RCNN = "mask_rcnn_{}/1/model_final_a54504.pkl"


@pytest.mark.parametrize(
    "path, stride_in_1x1, order, std",
    [
        ("ImageNetPretrained/MSRA/R-50.pkl", True, "BGR", [1.0, 1.0, 1.0]),
        ("ImageNetPretrained/torchvision/R-50.pkl", False, "RGB", [58.395, 57.12, 57.375]),
        ("ImageNetPretrained/FAIR/X-101-32x8d.pkl", False, "BGR", [57.375, 57.12, 58.395]),
        ("COCO-InstanceSegmentation/" + MASK_RCNN.format("R_101_FPN_3x"), True, "BGR", [1.0, 1.0, 1.0]),
        ("COCO-Keypoints/" + MASK_RCNN.format("X_101_32x8d_FPN_3x"), False, "BGR", [57.375, 57.12, 58.395]),
    ],
)
def test_detectron2_files_state_what_their_configs_set(downloads, tmp_path, path, stride_in_1x1, order, std):
    file, stated = locate(f"detectron2:{path}")
    assert file == tmp_path / "iopath" / "detectron2" / path  # detectron2's own place
    assert stated["backbone"] == {"stride_in_1x1": stride_in_1x1, "eps": 1e-5}
    given = stated["input"]
    assert (given["channel_order"], given["range"], given["std"]) == (order, [0, 255], std)
    mean = [255 * value for value in MEAN]
    assert given["mean"] == pytest.approx(mean if order == "RGB" else mean[::-1])
    assert stated["licence"] == "CC-BY-SA-3.0"


@pytest.mark.parametrize("path", ["Misc/" + MASK_RCNN.format("R_50_FPN_3x_gn"), "new_baselines/mask_rcnn_R_50/a.pkl"])
def test_detectron2_files_with_configs_of_their_own_state_nothing_assumed(downloads, path):
    assert not {"backbone", "input"} & set(locate(f"detectron2:{path}")[1])


def test_a_config_of_detectron2s_zoo_stands_for_its_file(downloads):
    path, stated = locate("detectron2:COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
    name = "COCO-Detection/faster_rcnn_R_50_FPN_1x/137257794/model_final_b275ba.pkl"
    assert downloads == [(f"https://dl.fbaipublicfiles.com/detectron2/{name}", path, "", "b275ba")]  # md5: MODEL_ZOO
    assert stated["source"] == f"detectron2:{name}" and stated["input"] == BGR_255
    assert stated["recipe"] == "detectron2 configs/COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
    assert locate(f"detectron2:{name}") == locate("detectron2:COCO-Detection/faster_rcnn_R_50_FPN_1x") == (path, stated)


@pytest.mark.parametrize(
    "name", ["", "../../R-50.pkl", "/etc/R-50.pkl", "a/../b.pkl", "R-50.pth", "a b.pkl", "a?b.pkl", "faster_rcnn.yaml"]
)
def test_a_path_outside_detectron2s_folder_is_refused(downloads, name):
    refusal(f"detectron2:{name}")
    assert not downloads


# URLs


def test_a_url_is_downloaded_with_the_hash_of_its_name_or_its_ending(downloads):
    path, stated = locate("https://host/net-0676ba61.pth?key=secret")
    public = "https://host/net-0676ba61.pth"  # without the query, which may be a key
    assert path.name == "net-0676ba61.pth" and path.parents[1] == Path(torch.hub.get_dir()) / "resbackbone"
    assert stated == {"source": public, "licence": "unknown"}
    assert locate("https://host/net-0676ba61.pth?key=secret#sha256=11111111AA")[0] == path
    url = "https://host/net-0676ba61.pth?key=secret"
    assert downloads == [(url, path, "0676ba61", ""), (url, path, "11111111AA", "")]
    paths = {locate(f"https://{rest}")[0] for rest in ("a/m.pth", "b/m.pth", "a/m.pth?v=2")}
    assert len(paths) == 3 and {path.name for path in paths} == {"m.pth"}  # kept apart


@pytest.mark.parametrize(
    "url",
    [
        "http:net.pth",
        "https:///net.pth",
        "https://host",
        "https://host/folder/",
        "https://host/..",
        "https://[host/net.pth",
        "https://me:secret@host/net.pth",
        "https://host/a net.pth",
        "https://host/n\u00e9t.pth",
        "https://host/net.pth#sha256=123",
        "https://host/net.pth#md5=12345678",
    ],
)
def test_a_url_that_names_no_file_or_hash_is_refused(downloads, url):
    refusal(url)
    assert not downloads


@pytest.mark.parametrize(
    "url", ["https://host/%2e%2e%2f%2e%2e%2fnet.pth", "https://host/a%00b.pth", "https://h/" + "n" * 999]
)
def test_no_url_leads_out_of_the_cache(downloads, url):
    path = locate(url)[0]
    assert path.parents[1] == Path(torch.hub.get_dir()) / "resbackbone"
    assert path.resolve() == path and len(path.name) <= 100 and "\0" not in str(path)


@pytest.mark.parametrize(
    "file, digits",
    [
        ("resnet50-0676ba61.pth", "0676ba61"),
        ("faster_rcnn_r50_fpn_1x_coco_20200130-047c8118.pth", "047c8118"),
        ("resnet34-43635321.pth", "43635321"),  # timm's, and no date
        (f"net-{'a1' * 32}.pt", "a1" * 32),
        ("resnet20-12fca82f.th", "12fca82f"),
        ("net-20200130.pth", ""),  # a date
        ("resnet18_fbgemm_16fa66dd.pth", ""),
        ("net-0676ba6.pth", ""),
        ("net-0676ba61.pkl", ""),
        ("net-" + "0676ba61" * 5 + ".pth", ""),  # a commit
        ("model.safetensors", ""),
    ],
)
def test_the_digits_of_a_file_name_that_are_its_hash(file, digits):
    assert published_sha256(file) == digits


def test_without_a_network_nothing_is_tried_again_and_again(monkeypatch, capfd):
    def no_network(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.getaddrinfo", no_network)
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it waited for a network"))
    for source in ("hf:microsoft/resnet-50", "timm:resnet50.a1_in1k"):
        with pytest.raises(ValueError, match=r"could not be downloaded \(offline, and not in the cache\)"):
            locate(source)
    assert capfd.readouterr() == ("", "")

import re
from pathlib import Path

import torchvision

from resbackbone.resnet import DEPTHS
from resbackbone.weights import sources
from resbackbone.weights.sources import locate
from resbackbone.weights.zoo import list_sources

LISTED = {named.name: named for named in list_sources()}
METRICS = {"classifier": "top-1", "detector": "box AP"}


def test_all_weights_are_listed_once_with_depth_and_licence():
    assert len(LISTED) == len(list_sources()) > 100
    assert LISTED["timm:resnet50d.ra2_in1k"].depth == 50
    assert {name.partition(":")[0] for name in LISTED} == {"torchvision", "timm", "hf", "detectron2"}
    for named in LISTED.values():
        assert named.depth in DEPTHS and named.kind in METRICS
        assert named.accuracy is None or 30 < named.accuracy < 90
        assert named.published and re.fullmatch(r"[A-Za-z][A-Za-z0-9.-]+", named.licence)


def test_all_of_torchvisions_resnets_are_listed_with_the_figures_of_its_metadata():
    members = [
        weights
        for model in torchvision.models.list_models(module=torchvision.models)
        if re.match(r"(resnet|resnext|wide_resnet)", model)
        for weights in torchvision.models.get_model_weights(model)
    ]
    assert len(members) == 17
    for weights in members:
        assert LISTED[f"torchvision:{weights}"].accuracy == weights.meta["_metrics"]["ImageNet-1K"]["acc@1"]
    detectors = {name: named for name, named in LISTED.items() if "torchvision" in name and named.kind == "detector"}
    assert "torchvision:RetinaNet_ResNet50_FPN_Weights.COCO_V1" in detectors
    for name, named in detectors.items():
        weights = torchvision.models.get_weight(name.removeprefix("torchvision:"))
        assert named.accuracy == weights.meta["_metrics"]["COCO-val2017"]["box_map"]


def test_all_listed_weights_can_be_looked_up_and_state_their_licence_stride_and_input(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "download", lambda *_, **__: None)
    monkeypatch.setattr(sources, "_on_hub", lambda repository, *_: (tmp_path, tmp_path / "model.safetensors"))
    for name, named in LISTED.items():
        if name.startswith("hf:"):  # their publisher states it in files of the repository
            continue
        stated = locate(name)[1]
        assert stated["licence"] == named.licence
        assert stated["backbone"]["stride_in_1x1"] == ("MSRA" in name or "rcnn_R_" in name)
        assert stated["input"]["channel_order"] in ("RGB", "BGR")


def test_the_model_zoo_recommends_weights_that_are_listed_with_their_figures():
    page = (Path(__file__).parents[2] / "MODEL_ZOO.md").read_text()
    rows = re.findall(r"^\| `(\w+:[^`]+)` \| [^|]+ \| ([^|]*)\|", page, re.MULTILINE)
    assert 8 <= len(rows) <= 12
    for name, figure in rows:
        named = LISTED[name]
        assert named.accuracy is None or figure.strip() == f"{named.accuracy:.1f} {METRICS[named.kind]}"

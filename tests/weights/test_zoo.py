import re
from pathlib import Path

import pytest
import torchvision
from timm.models import get_pretrained_cfg, list_models

from resbackbone.resnet import DEPTHS
from resbackbone.weights import sources
from resbackbone.weights.sources import locate
from resbackbone.weights.zoo import ARCHITECTURES, TIMM_TOP1, list_sources

LISTED = list_sources()


def test_every_source_is_named_once_and_says_its_depth_metric_and_licence():
    assert len({source.name for source in LISTED}) == len(LISTED) > 100
    assert {source.name.partition(":")[0] for source in LISTED} == {"torchvision", "timm", "hf", "detectron2"}
    for source in LISTED:
        assert source.depth in DEPTHS and str(source.depth) in source.architecture
        assert source.metric == {"classifier": "top-1", "detector": "box AP"}[source.kind]
        assert source.value is None or 30 < source.value < 90
        assert source.published and re.fullmatch(r"[A-Za-z][A-Za-z0-9.-]+", source.licence)


def test_all_of_torchvisions_resnets_are_listed_with_the_figures_of_its_metadata():
    listed = {source.name.removeprefix("torchvision:"): source for source in LISTED if "torchvision:" in source.name}
    members = [
        weights
        for model in torchvision.models.list_models(module=torchvision.models)
        if re.match(r"(resnet|resnext|wide_resnet)", model)
        for weights in torchvision.models.get_model_weights(model)
    ]
    assert len(members) == 17
    for weights in members:
        source = listed[str(weights)]
        assert source.value == weights.meta["_metrics"]["ImageNet-1K"]["acc@1"] and source.kind == "classifier"
    detectors = {name for name, source in listed.items() if source.kind == "detector"}
    assert len(detectors) + len(members) == len(listed)
    for name in detectors:
        assert listed[name].value == torchvision.models.get_weight(name).meta["_metrics"]["COCO-val2017"]["box_map"]
    assert {"FasterRCNN_ResNet50_FPN_Weights.COCO_V1", "RetinaNet_ResNet50_FPN_Weights.COCO_V1"} < detectors


def test_all_of_timms_figures_are_of_weights_that_timm_publishes():
    listed = {source.name.removeprefix("timm:"): source for source in LISTED if source.name.startswith("timm:")}
    assert len(set(listed) & set(TIMM_TOP1)) > 60  # timm's releases differ in the rest
    for name, source in listed.items():
        assert source.value == TIMM_TOP1.get(name) and source.licence == get_pretrained_cfg(name).license


def test_the_model_zoo_lists_the_same_sources_and_figures():
    lines = (Path(__file__).parents[2] / "MODEL_ZOO.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    zoo = {name.strip("`"): (depth, kind, figure, licence) for name, depth, kind, figure, licence, _ in rows}
    assert len(zoo) == len(rows) > 100
    for source in LISTED:
        figure = "" if source.value is None else f"{source.value:.1f} {source.metric}"
        if source.name in zoo or source.value is not None:
            assert zoo[source.name] == (str(source.depth), source.kind, figure, source.licence)


@pytest.mark.parametrize("name, value", [("resnet50.tv_in1k", 76.13), ("resnet152.tv2_in1k", 82.284)])
def test_the_copies_that_timm_keeps_of_torchvisions_weights_score_as_these_do(name, value):
    assert TIMM_TOP1[name] == pytest.approx(value, abs=0.05)


def test_every_source_can_be_looked_up_and_states_the_figure_it_is_listed_with(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "download", lambda *_, **__: None)
    monkeypatch.setattr(sources, "_hub_file", lambda repository, revision, file: tmp_path / repository / file)
    for source in LISTED:
        if source.name.startswith("hf:"):  # what these state is in files of theirs
            continue
        stated = locate(source.name).stated
        figures = {figure["metric"]: (figure["value"], figure["published"]) for figure in stated["accuracy"]}
        assert figures.get(source.metric) == ((source.value, source.published) if source.value else None)
        assert stated["licence"] == source.licence
        assert stated["backbone"]["stride_in_1x1"] == ("MSRA" in source.name or "rcnn_R_" in source.name)
        assert stated["input"]["channel_order"] in ("RGB", "BGR")


def test_every_architecture_is_a_name_of_timms():
    assert set(ARCHITECTURES) < set(list_models(module="resnet"))

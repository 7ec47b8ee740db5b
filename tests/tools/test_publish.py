import json
import re
import shutil
import socket
from pathlib import Path

import pytest
import torch
import yaml
from commands import error_line
from huggingface_hub import ModelCard, constants
from safetensors import safe_open

from detection import load_detector
from detection.shapes import make_shapes
from resbackbone import build_resnet_backbone, build_resnet_classifier
from resbackbone.report.numbers import percent
from resbackbone.tools import convert_weights, publish, train_coco
from resbackbone.weights import read_weights, write_weights

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHORT = ["--recipe", "short", "--device", "cpu", "--precision", "fp32", "--batch-size", "2", "--log-period", "1"]
COMMAND = "python '/home/jane/my code/tools/train_coco.py' --data '/home/jane/my data/shapes' --weights=/home/net.pth"
PUBLISHED_COMMAND = "python tools/train_coco.py --data shapes --weights=net.pth"
LICENSED = ["--repo", "me/shapes", "--licence", "CC-BY-4.0"]


@pytest.fixture(scope="module")
def trained(module_path):
    """A run of three steps, evaluated at the second too; tests only read it."""
    data = make_shapes(module_path / "home of jane/shapes", train_images=4, val_images=2, size=64)
    run = module_path / "run"
    few = ["--data", str(data), "--max-steps", "3", "--eval-period", "2", "--pictures", "1"]
    train_coco.main([*SHORT, *few, "--output", str(run)])
    return run


@pytest.fixture
def run(trained, tmp_path):
    run = Path(shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "events*")))
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["effective"]["command"] = COMMAND  # as it is recorded where no test calls the tool
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return run


@pytest.fixture
def classifier(tmp_path):
    """What a run of pretrain.py leaves that publish.py reads."""
    folder = tmp_path / "classifier"
    folder.mkdir()
    torch.manual_seed(0)
    model = build_resnet_classifier(18, 2)
    told = {"architecture": "resnet18", "num_classes": 2, "classes": ["cat", "dog"], "backbone": {"depth": 18}}
    told["backbone"] |= {"stem": "7x7", "shortcut": "B", "groups": 1, "width_per_group": 64}
    write_weights(folder / "model.safetensors", model.state_dict(), told)
    results = {"top1": 0.625, "top5": 1.0, "images": 8, "skipped_images": ["image /home/jane/x/a.jpg: is truncated"]}
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "config.yaml").write_text("data: /home/jane/pets\nweights: timm:resnet18.a1_in1k\n")
    return folder


@pytest.fixture
def on_hub(tmp_path, monkeypatch):
    """Puts a published folder into the cache of huggingface_hub as a repository, with no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def place(folder, name):
        repository = tmp_path / "cache" / f"models--{name.replace('/', '--')}"
        shutil.copytree(folder, repository / "snapshots" / COMMIT)
        (repository / "refs").mkdir()
        (repository / "refs/main").write_text(COMMIT)
        return f"hf:{name}"

    return place


def published(*words):
    publish.main([str(word) for word in words])


def numbers_of(card):
    return {result.metric_name: result.metric_value for result in card.data.eval_results}


# The folder


def test_a_detectors_card_has_what_the_hub_reads_and_the_results_of_the_run(run, monkeypatch):
    published(run, *LICENSED, "--dataset", "me/data")
    assert {path.name for path in (run / "hub").iterdir()} == {*publish.FILES}
    card, results = ModelCard.load(run / "hub/README.md"), json.loads((run / "results.json").read_text())
    assert (card.data.license, card.data.library_name) == ("cc-by-4.0", "resbackbone")
    assert card.data.pipeline_tag == "object-detection" and card.data.datasets == ["me/data"]
    measured = {name: value for name, value in results["bbox"].items() if value is not None}
    assert numbers_of(card) == {name: pytest.approx(value, abs=1e-4) for name, value in measured.items()}
    assert json.loads((run / "hub/results.json").read_text()) == results
    rows = [line.strip("|").split("|") for line in card.text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in row] for row in rows]
    assert [percent(value) for value in [*results["bbox"].values()][:6]] in cells
    for name, one in results["per_class"].items():
        assert [name, percent(one["AP"]), percent(one["AP50"]), str(one["boxes"])] in cells
    facts = {row[0]: row[1] for row in cells if len(row) == 2}
    effective = yaml.safe_load((run / "config.yaml").read_text())["effective"]
    assert facts["commit of resbackbone"] == effective["commit"] and facts["hardware"] == effective["hardware"]
    assert (facts["updates"], facts["training images"]) == ("3", "4")
    assert facts["command"] == f"`{PUBLISHED_COMMAND}`"
    assert "{" not in card.text and "None" not in card.text and "On 2 validation images" in card.text


def test_nothing_of_the_machine_is_published(run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["effective"]["hardware"] = "AMD w/ Radeon"
    weights = "https://jane:secret@host/net.pth?key=secret"
    config |= {"weights": weights, "bn_file": r"C:\Users\jane\images", "train_json": "/home/jane/a.json"}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    results = json.loads((run / "results.json").read_text())
    name = "/home/jane/my data/a.jpg"
    results["skipped_images"] = [f"image {name}: cannot identify image file '{name}'"]
    (run / "results.json").write_text(json.dumps(results))
    published(run, *LICENSED)
    secrets = [str(Path.home()), str(Path.cwd()), str(run.parent), socket.gethostname(), "jane", "secret", "Users"]
    with safe_open(run / "hub/model.safetensors", "pt") as file:
        texts = {"model.safetensors": str(file.metadata())}
    texts |= {name: (run / "hub" / name).read_text() for name in publish.FILES if not name.endswith(("jpg", "tensors"))}
    for name, text in texts.items():
        assert not re.findall("|".join(rf"(?<!\w){re.escape(secret)}(?!\w)" for secret in secrets), text), name
    kept = yaml.safe_load((run / "hub/config.yaml").read_text())
    assert (kept["data"], kept["weights"], kept["bn_file"]) == ("shapes", "https://host/net.pth", "images")
    assert "train_json" not in kept
    assert kept["effective"] == {**config["effective"], "command": PUBLISHED_COMMAND}
    assert json.loads((run / "hub/results.json").read_text())["skipped_images"] == ["a.jpg"]


def test_best_is_published_with_its_own_results(run):
    best = json.loads((run / "best/best.json").read_text())
    best |= {"step": 2, "result": {**best["result"], "AP": 0.5}}  # of other weights than those of results.json
    (run / "best/best.json").write_text(json.dumps(best))
    published(run / "best", *LICENSED, "--no-picture")
    card = ModelCard.load(run / "hub-best/README.md")
    assert numbers_of(card)["AP"] == 0.5 and "the validation images" in card.text and "2, the best of 3" in card.text
    assert not (run / "hub-best/example.jpg").exists() and "example.jpg" not in card.text
    evaluated = {"bbox": best["result"], "per_class": {"disk|ring": {"AP": 0.5, "AP50": 0.75, "boxes": 7}}, "images": 2}
    (run / "eval-best").mkdir()
    (run / "eval-best/results.json").write_text(json.dumps(evaluated))
    published(run / "best", *LICENSED)
    assert not (run / "hub-best/example.jpg").exists()  # the run's pictures are of its last weights
    text = (run / "hub-best/README.md").read_text()
    assert "| AP | AP50 | AP75 | APs | APm | APl |\n| --- | --- | --- | --- | --- | --- |\n| 50.0 |" in text
    assert "to detect, train a detector" in text and "| disk\\|ring | 50.0 | 75.0 | 7 |" in text


def test_a_classifiers_card_has_its_accuracy_and_the_licence_of_the_weights_it_started_from(classifier):
    published(classifier, "--repo", "me/pets")
    card = ModelCard.load(classifier / "hub/README.md")
    assert card.data.license == "apache-2.0" and card.data.pipeline_tag == "image-classification"
    assert numbers_of(card) == {"top1": 0.625, "top5": 1.0} and "| 62.5 | 100.0 |" in card.text
    assert "cat, dog" in card.text and "timm:resnet18.a1_in1k, apache-2.0" in card.text
    assert "jane" not in "".join(path.read_text() for path in (classifier / "hub").glob("*.[jmy]*[lnd]"))


def test_a_licence_that_the_hub_has_no_name_for_is_another(run):
    published(run, "--repo", "me/shapes", "--licence", "Our own terms (2026)")
    card = ModelCard.load(run / "hub/README.md")
    assert (card.data.license, card.data.license_name) == ("other", "our-own-terms-2026-")
    assert "These weights: Our own terms (2026)." in card.text


# Read back


def test_a_published_detector_is_the_runs_own(run, on_hub, tmp_path):
    published(run, *LICENSED)
    name = on_hub(run / "hub", "me/shapes")
    images = [torch.rand(3, 70, 91), torch.rand(3, 64, 33)]
    with torch.inference_mode():
        expected = load_detector(run)(images)
        for source in (name, run / "hub", run / "hub/model.safetensors"):
            found = load_detector(source)(images)
            for one, other in zip(found, expected, strict=True):
                assert all(torch.equal(one[part], other[part]) for part in ("boxes", "scores", "labels"))
    trunk = build_resnet_backbone(weights=name, fpn=True).state_dict()
    state = read_weights(run / "model.safetensors").state
    assert trunk and all(torch.equal(tensor, state[f"backbone.{key}"]) for key, tensor in trunk.items())


def test_a_detector_trained_from_a_published_one_knows_its_licence(trained, run, on_hub, tmp_path):
    published(run, *LICENSED)
    name = on_hub(run / "hub", "me/shapes")
    data = yaml.safe_load((run / "config.yaml").read_text())["data"]
    few = ["--max-steps", "1", "--pictures", "0", "--output", str(tmp_path / "next")]
    train_coco.main([*SHORT, "--data", data, "--weights", name, *few])
    published(tmp_path / "next", "--repo", "me/next")
    card = ModelCard.load(tmp_path / "next/hub/README.md")
    assert card.data.license == "cc-by-4.0" and card.data.base_model == "me/shapes"


def test_a_published_classifier_is_read_whatever_config_lies_beside_it(classifier, on_hub):
    published(classifier, "--repo", "me/pets")
    other = {"model_type": "vit", "architecture": "vit_base_patch16_224"}
    for name, config in (("me/pets", None), ("me/odd", other)):
        if config:
            (classifier / "hub/config.json").write_text(json.dumps(config))
        source = on_hub(classifier / "hub", name)
        weights = read_weights(source)
        assert weights.metadata["classes"] == ["cat", "dog"] and weights.metadata["licence"] == "apache-2.0"
        images = torch.rand(2, 3, 64, 49)
        run = build_resnet_classifier(weights=classifier / "model.safetensors").eval()
        assert torch.equal(build_resnet_classifier(weights=source).eval()(images), run(images))


def test_our_config_says_nothing_about_another_file_beside_it(classifier, tmp_path):
    published(classifier, "--repo", "me/pets")
    hub = classifier / "hub"
    convert_weights.main([str(hub / "model.safetensors"), str(hub / "r18.pkl"), "--to", "msra", "--part", "trunk"])
    assert read_weights(hub / "r18.pkl").format == "msra"


# Refused


@pytest.mark.parametrize(
    "words, message",
    [
        (["--repo", "shapes"], "--repo shapes: give owner/name"),
        (["--repo", "me/a b"], "--repo Repo id must use alphanumeric chars"),
        (["--repo", "me/shapes"], "the licence of run is not known; give it, for example --licence apache-2.0"),
        ([*LICENSED, "--output", "."], "--output .: holds other files (here, ..); give a new folder"),
        ([*LICENSED, "--upload"], "no token for the Hugging Face Hub; run `hf auth login`, or set HF_TOKEN"),
    ],
)
def test_a_mistake_is_one_line(run, words, message, monkeypatch, tmp_path):
    monkeypatch.setattr(publish, "get_token", lambda: None)
    monkeypatch.chdir(tmp_path)
    assert message in error_line(publish.main, ["run", *words])


def test_what_is_not_measured_is_not_published(run):
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 4, "loss": 1.0}\n')
    assert "its training went on after its results" in error_line(publish.main, [run, *LICENSED])
    published(run / "best", *LICENSED)
    results = json.loads((run / "results.json").read_text())
    (run / "results.json").write_text(json.dumps({**results, "bbox": {"AP": None}}))
    assert "neither an AP nor an accuracy" in error_line(publish.main, [run, *LICENSED])
    (run / "results.json").unlink()
    assert "holds no results.json" in error_line(publish.main, [run, *LICENSED])
    (run / "model.safetensors").unlink()
    assert "holds no model.safetensors" in error_line(publish.main, [run, *LICENSED])
    assert not (run / "hub").exists()


# Uploaded


class FakeApi:
    """HfApi that records its calls, or fails."""

    calls: list = []
    error: Exception | None = None

    def create_repo(self, repo_id, **options):
        if self.error:
            raise self.error
        self.calls.append((repo_id, options))

    def upload_folder(self, **options):
        self.calls.append(options)


@pytest.fixture
def api(monkeypatch):
    monkeypatch.setattr(FakeApi, "calls", [])
    monkeypatch.setattr(FakeApi, "error", None)
    monkeypatch.setattr(publish, "HfApi", FakeApi)
    monkeypatch.setattr(publish, "get_token", lambda: "hf_token")
    return FakeApi


def test_an_upload_makes_a_private_repository_of_these_files(classifier, api, capsys):
    published(classifier, "--repo", "me/pets", "--upload")
    created, uploaded = api.calls
    card = (classifier / "hub/README.md").read_text()
    assert created == ("me/pets", {"private": True, "exist_ok": True})
    assert (uploaded["repo_id"], uploaded["folder_path"]) == ("me/pets", classifier / "hub")
    assert uploaded["allow_patterns"] == [*publish.FILES]
    assert capsys.readouterr().out.endswith("uploaded: https://huggingface.co/me/pets\n")
    (classifier / "hub/README.md").write_text(card + "\nThese are pets.\n")
    published(classifier / "hub", "--repo", "me/pets", "--upload", "--no-private")
    assert api.calls[2][1]["private"] is False and api.calls[3]["folder_path"] == classifier / "hub"
    assert (classifier / "hub/README.md").read_text() == card + "\nThese are pets.\n"
    assert "add --upload" in error_line(publish.main, [classifier / "hub", "--repo", "me/pets"])
    for repo in ("me/cats", "me/pet"):
        said = error_line(publish.main, [classifier / "hub", "--repo", repo, "--upload"])
        assert f"--repo {repo}: {classifier / 'hub'} was written for me/pets" in said


def test_what_the_hub_refuses_is_one_line_that_says_what_to_do(classifier, api):
    api.error = ConnectionError("Cannot reach the Hub.\n\nOffline")
    line = error_line(publish.main, [classifier, "--repo", "me/pets", "--upload"])
    assert line == f"error: --upload to me/pets: Cannot reach the Hub. Offline; the files are in {classifier / 'hub'}"
    api.error = PermissionError("403 Forbidden")
    api.error.response = type("Response", (), {"status_code": 403})
    line = error_line(publish.main, [classifier, "--repo", "you/pets", "--upload"])
    assert "403 Forbidden; give a token that may write there, and a --repo of yours" in line

import json

import numpy as np
import pytest
import torch
from made import cats_and_dogs, small_detector
from PIL import Image

from detection import evaluate as evaluate_module
from detection.annotations import read_annotations
from detection.coco import BadImage, CocoImages
from detection.evaluate import (
    detect,
    evaluate,
    results_summary,
    results_table,
    validation_losses,
    write_results,
)
from detection.scoring import DETECTION, METRICS, entries, score
from resbackbone.engine.distributed import Rank

CPU = torch.device("cpu")


# Detections


class Stub(torch.nn.Module):
    """Finds, in every image, one object whose place and score are functions of its pixels, and in some a second."""

    categories = {3: "cat", 7: "dog"}

    def forward(self, images):
        [image] = images
        assert not self.training and image.dtype == torch.float32 and image.max() <= 1
        height, width = image.shape[-2:]
        value = image.mean().item()
        boxes = torch.tensor([[1.0, 2.0, width * value, height * value], [0.25, 0.5, 3.125, 5.0]])
        count = 1 + (value > 0.3)
        labels, scores = torch.tensor([2, 1]), torch.tensor([value, 0.5])
        return [{"boxes": boxes[:count], "labels": labels[:count], "scores": scores[:count]}]


def data_set(folder, count=5, **options):
    folder.mkdir(exist_ok=True)
    content = cats_and_dogs([(1, 1, 20, 30), (2, 3, 40, 40)], images=count)
    for i, image in enumerate(content["images"]):
        Image.new("RGB", (60, 50), (40 * i + 30,) * 3).save(folder / image["file_name"])
    (folder / "instances.json").write_text(json.dumps(content))
    return CocoImages(folder, folder / "instances.json", **options)


def on_ranks(monkeypatch, ranks, *arguments, function=evaluate):
    """evaluate() as on several ranks, one after another, the values gathered by hand; rank 0's answer."""
    sent = []
    for rank in reversed(range(ranks)):
        gathered = (lambda value, _: sent.append(value)) if rank else (lambda value, _: [value, *reversed(sent)])
        monkeypatch.setattr(evaluate_module, "gather", gathered)
        monkeypatch.setattr(evaluate_module, "broadcast", lambda value, _: value)
        answer = function(*arguments, Rank(rank, ranks, CPU))
        assert rank == 0 or function is not evaluate or len(answer.detections) == 0
    return answer


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_any_number_of_ranks_gives_what_one_does(tmp_path, monkeypatch, ranks):
    dataset = data_set(tmp_path / "images")
    alone = evaluate(Stub(), dataset, Rank(0, 1, CPU))
    ids = alone.detections["image_id"].tolist()
    assert len(ids) > 5 and ids == sorted(ids) and set(ids) == {1, 2, 3, 4, 5}
    results, detections = on_ranks(monkeypatch, ranks, Stub(), dataset)
    assert results == alone.results and np.array_equal(detections, alone.detections)


def test_the_losses_on_a_data_set_are_means_over_its_images_for_any_seed_and_any_number_of_ranks(tmp_path, monkeypatch):
    dataset, rank = data_set(tmp_path / "images", 3), Rank(0, 1, CPU)
    detector = small_detector().eval()
    expected = []
    for index in range(3):
        image, target = dataset[index]
        torch.manual_seed(index)
        with torch.no_grad():
            expected.append(detector.losses([image / 255], [target]))
    losses = validation_losses(detector, dataset, rank)
    assert {name: sum(each[name].item() for each in expected) / 3 for name in expected[0]}.items() <= losses.items()
    assert losses["loss"] == sum(value for name, value in losses.items() if name != "loss")
    torch.manual_seed(7)
    assert validation_losses(detector, dataset, rank) == losses
    assert on_ranks(monkeypatch, 2, detector, dataset, function=validation_losses) == losses
    assert not any(module.training for module in detector.modules())


def test_a_detection_is_written_in_the_terms_of_the_data_set(tmp_path):
    image = torch.full((3, 50, 60), 51, dtype=torch.uint8)
    [found] = detect(Stub().eval(), [image], [77], CPU)
    assert found.dtype == DETECTION
    [entry] = entries(found)
    assert entry["image_id"] == 77 and entry["category_id"] == 7
    assert entry["bbox"] == pytest.approx([1, 2, 11, 8]) and entry["score"] == pytest.approx(0.2)
    json.dumps(entry)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_counts_as_one_without_detections_where_it_may_be_skipped(tmp_path, workers):
    dataset = data_set(tmp_path / "images")
    (tmp_path / "images" / "3.png").write_bytes(b"")
    with pytest.raises(BadImage, match="3.png: empty file"):
        evaluate(Stub(), dataset, Rank(0, 1, CPU), workers=workers)
    dataset.skip_bad_images = True
    results, detections = evaluate(Stub(), dataset, Rank(0, 1, CPU), workers=workers)
    assert set(detections["image_id"].tolist()) == {1, 2, 4, 5}
    assert results["images"] == 5 and "3.png: empty file" in results["skipped_images"][0]


# What is written, and what a person sees


@pytest.mark.parametrize("count", [0, 1, 11])
def test_the_detections_are_written_as_one_list_of_json(tmp_path, count):
    random = np.random.default_rng(0)
    rows = np.empty(count, DETECTION)
    rows["image_id"], rows["category_id"] = random.integers(-9, 9, (2, count)) * 2**55
    rows["bbox"], rows["score"] = random.random((count, 4), np.float32), random.random(count, np.float32)
    write_results(tmp_path, {"bbox": {"AP": None}}, rows)
    wanted = [
        {"image_id": int(i), "category_id": int(c), "bbox": list(map(float, box)), "score": float(s)}
        for i, c, box, s in rows
    ]
    assert json.loads((tmp_path / "detections.json").read_text()) == wanted
    assert json.loads((tmp_path / "results.json").read_text()) == {"bbox": {"AP": None}}


def test_the_table_shows_percent_and_every_class_whatever_its_name(tmp_path):
    content = cats_and_dogs([(1, 1, 20, 30)], categories=("[red]cat[/red]", "dog"))
    (tmp_path / "instances.json").write_text(json.dumps(content))
    rows = np.array([(1, 3, (1, 1, 20, 30), 0.9)], DETECTION)
    results = score(read_annotations(tmp_path / "instances.json"), rows)
    text = results_table(results)
    assert "[red]cat[/red]" in text and "100.0" in text and "n/a" in text and "AR100" in text
    summary = results_summary({**results, "skipped_images": ["image [b].jpg: empty file"]})
    assert summary == "skipped image [b].jpg: empty file\nAP 100.0, AP50 100.0 on 2 images"


def test_classes_come_by_falling_ap_and_what_is_too_much_for_a_screen_is_counted():
    aps = [0.25, None, 0.75, *(0.5 for _ in range(40))]
    per_class = {f"class{i}": {"AP": ap, "AP50": ap, "boxes": i} for i, ap in enumerate(aps)}
    results = {"bbox": dict.fromkeys(METRICS, 0.5), "per_class": per_class, "images": 3, "note": None}
    for left_out, last in ((13, "class31"), (0, "class1")):
        text = results_table({**results, "per_class": dict(list(per_class.items())[: 30 + left_out])})
        names = [word for word in text.split() if word.startswith("class") and word[5:].isdigit()]
        assert len(names) == 30 and names[:2] == ["class2", "class3"] and names[-1] == last
        assert ("13 more classes in results.json" in text) == bool(left_out)


def test_detections_of_what_the_data_set_has_not_are_left_out(tmp_path):
    class Torchvisions(Stub):
        categories = {3: "cat", 5: "N/A"}  # label 2 stands for no class

    dataset = data_set(tmp_path / "images")
    rank = Rank(0, 1, CPU)
    _, everything = evaluate(Stub(), dataset, rank)
    _, real = evaluate(Torchvisions(), dataset, rank)
    assert set(everything["category_id"].tolist()) == {3, 7}
    assert np.array_equal(real, everything[everything["category_id"] == 3])

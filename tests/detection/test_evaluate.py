import contextlib
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detection import evaluate as evaluate_module
from detection.coco import BadImage, CocoImages, coco_paths, read_annotations
from detection.evaluate import METRICS, detect, evaluate, percent, print_results, score, write_results
from resbackbone.training.distributed import Rank

CPU = torch.device("cpu")


def pycocotools_says(annotations, detections, category=None):
    """The 12 numbers as a user gets them, from files."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        scorer = COCOeval(truth, truth.loadRes(str(detections)), "bbox")
        if category is not None:
            scorer.params.catIds = [category]
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    return [None if value < 0 else value for value in scorer.stats]


def jittered(annotations, seed=0):
    """Detections that are right, wrong in place, wrong in class, and missing, in about equal parts."""
    random, found = np.random.default_rng(seed), []
    ids = [category["id"] for category in annotations["categories"]]
    for annotation in annotations["annotations"]:
        x, y, w, h = annotation["bbox"]
        kind = random.integers(4)
        if kind == 0:
            continue
        shift = random.normal(0, 0.03 if kind == 1 else 0.3, 4) * (w, h, w, h)
        category = int(random.choice(ids)) if kind == 3 else annotation["category_id"]
        box = [x + shift[0], y + shift[1], max(w + shift[2], 1), max(h + shift[3], 1)]
        entry = {"image_id": annotation["image_id"], "category_id": category, "bbox": [float(v) for v in box]}
        found += [{**entry, "score": float(random.random())}] * random.integers(1, 3)
    return found


def annotations(boxes, categories=("cat", "dog"), images=2, **changes):
    return {
        "images": [{"id": 1 + i, "file_name": f"{1 + i}.png", "width": 60, "height": 50} for i in range(images)],
        "categories": [{"id": 3 + 4 * i, "name": name} for i, name in enumerate(categories)],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": 3, "bbox": list(box), "area": box[2] * box[3], "iscrowd": 0}
            for i, box in enumerate(boxes)
        ],
        **changes,
    }


def found(box, image_id=1, category_id=3, score=0.9):
    return {"image_id": image_id, "category_id": category_id, "bbox": list(box), "score": score}


# Scores


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_numbers_are_pycocotools_own_on_real_annotations(data, split, tmp_path):
    _, path = coco_paths(data / "coco_tiny", split)
    detections = jittered(read_annotations(path))
    results = score(read_annotations(path), detections)
    write_results(tmp_path, results, detections)
    wanted = pycocotools_says(path, tmp_path / "detections.json")
    assert 0.05 < results["bbox"]["AP"] < 0.95 and None not in wanted
    assert [results["bbox"][name] for name in METRICS] == wanted
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert (results["images"], results["detections"], results["note"]) == (50, len(detections), None)


def test_the_numbers_of_a_class_are_pycocotools_for_that_class_alone(data, tmp_path):
    _, path = coco_paths(data / "coco_tiny", "val")
    content = read_annotations(path)
    detections = jittered(content)
    per_class = score(content, detections)["per_class"]
    write_results(tmp_path, {}, detections)
    assert list(per_class) == [c["name"] for c in sorted(content["categories"], key=lambda c: c["id"])]
    for category in content["categories"]:
        entry = per_class[category["name"]]
        ap, ap50, *_ = pycocotools_says(path, tmp_path / "detections.json", category["id"])
        assert entry["AP"] == pytest.approx(ap, abs=1e-12) and entry["AP50"] == pytest.approx(ap50, abs=1e-12)
        of_class = [a for a in content["annotations"] if a["category_id"] == category["id"] and not a["iscrowd"]]
        assert entry["boxes"] == len(of_class) and (entry["AP"] is None) == (not of_class)


def test_perfect_detections_score_1_and_what_has_no_box_is_undefined():
    results = score(annotations([(1, 1, 20, 30), (30, 5, 20, 20)]), [found((1, 1, 20, 30)), found((30, 5, 20, 20))])
    assert results["bbox"]["AP"] == results["bbox"]["AR100"] == results["bbox"]["APs"] == pytest.approx(1)
    assert results["bbox"]["APm"] is None and results["bbox"]["APl"] is None
    assert results["per_class"]["cat"] == {"AP": pytest.approx(1), "AP50": pytest.approx(1), "boxes": 2}
    assert results["per_class"]["dog"] == {"AP": None, "AP50": None, "boxes": 0}


def test_an_annotation_with_the_id_0_can_be_found_too():
    """Given to pycocotools as it is, such an annotation is taken for one that was not matched."""
    content = annotations([(1, 1, 20, 30)])
    assert content["annotations"][0]["id"] == 0
    assert score(content, [found((1, 1, 20, 30))])["bbox"]["AP"] == pytest.approx(1)


def test_without_detections_every_defined_number_is_0_and_it_says_why():
    results = score(annotations([(1, 1, 20, 30)]), [])
    assert results["note"].startswith("no detections at all") and results["detections"] == 0
    assert results["bbox"]["AP"] == results["bbox"]["APs"] == results["bbox"]["AR1"] == 0
    assert results["bbox"]["APm"] is None and results["bbox"]["ARl"] is None
    assert results["per_class"] == {
        "cat": {"AP": 0, "AP50": 0, "boxes": 1},
        "dog": {"AP": None, "AP50": None, "boxes": 0},
    }


@pytest.mark.parametrize("detections", [[], [found((1, 1, 20, 30))]])
def test_without_ground_truth_no_number_is_defined_and_it_says_why(detections):
    results = score(annotations([]), detections)
    assert set(results["bbox"].values()) == {None} and results["per_class"]["cat"]["AP"] is None
    assert "no box to be found" in results["note"]


def test_crowds_are_neither_missed_nor_wrongly_found():
    crowd = {"id": 9, "image_id": 1, "category_id": 3, "bbox": [30, 5, 20, 20], "area": 400, "iscrowd": 1}
    content = annotations([(1, 1, 20, 30)])
    content["annotations"].append(crowd)
    results = score(content, [found((1, 1, 20, 30), score=0.5), found((32, 7, 10, 10), score=0.9)])
    assert results["bbox"]["AP"] == pytest.approx(1) and results["per_class"]["cat"]["boxes"] == 1


def test_annotations_that_are_not_finite_are_left_out_and_nothing_given_is_changed():
    content, detections = annotations([(1, 1, 20, 30), (float("nan"), 1, 2, 3)]), [found((1, 1, 20, 30))]
    before = repr((content, detections))
    assert score(content, detections)["bbox"]["AP"] == pytest.approx(1)
    assert repr((content, detections)) == before


def test_more_detections_than_100_an_image_count_as_in_coco():
    boxes = [(1, 1, 20, 30)]
    many = [found((40, 40, 5, 5), score=0.9 - i / 1000) for i in range(100)] + [found(boxes[0], score=0.1)]
    assert score(annotations(boxes), many)["bbox"]["AP"] == 0
    assert score(annotations(boxes), many[1:])["bbox"]["AP"] > 0


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
    content = annotations([(1, 1, 20, 30), (2, 3, 40, 40)], images=count)
    for i, image in enumerate(content["images"]):
        Image.new("RGB", (60, 50), (40 * i + 30,) * 3).save(folder / image["file_name"])
    (folder / "instances.json").write_text(json.dumps(content))
    return CocoImages(folder, folder / "instances.json", **options)


def on_ranks(monkeypatch, ranks, *arguments):
    """evaluate() as on several ranks, one after another, the values gathered by hand; rank 0's answer."""
    sent = []
    for rank in reversed(range(ranks)):
        gathered = (lambda value, _: sent.append(value)) if rank else (lambda value, _: [value, *reversed(sent)])
        monkeypatch.setattr(evaluate_module, "gather", gathered)
        monkeypatch.setattr(evaluate_module, "broadcast", lambda value, _: value)
        answer = evaluate(*arguments, Rank(rank, ranks, CPU))
        assert rank == 0 or answer[1] == []
    return answer


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_any_number_of_ranks_gives_what_one_does(tmp_path, monkeypatch, ranks):
    dataset = data_set(tmp_path / "images")
    alone = evaluate(Stub(), dataset, Rank(0, 1, CPU))
    assert len(alone[1]) > 5 and {entry["image_id"] for entry in alone[1]} == {1, 2, 3, 4, 5}
    assert on_ranks(monkeypatch, ranks, Stub(), dataset) == alone


def test_a_detection_is_written_in_the_terms_of_the_data_set(tmp_path):
    image = torch.full((3, 50, 60), 51, dtype=torch.uint8)
    [entry] = detect(Stub().eval(), image, 77, [3, 7], CPU)
    assert entry["image_id"] == 77 and entry["category_id"] == 7
    assert entry["bbox"] == pytest.approx([1, 2, 11, 8]) and entry["score"] == pytest.approx(0.2)
    json.dumps(entry)


@pytest.mark.parametrize("training", [True, False])
def test_the_detectors_mode_is_as_it_was_afterwards_even_after_an_error(tmp_path, training):
    dataset, detector = data_set(tmp_path / "images"), Stub().train(training)
    evaluate(detector, dataset, Rank(0, 1, CPU))
    assert detector.training == training
    (tmp_path / "images" / "3.png").write_bytes(b"")
    with pytest.raises(BadImage, match="3.png: empty file"):
        evaluate(detector, dataset, Rank(0, 1, CPU))
    assert detector.training == training


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_counts_as_one_without_detections_where_it_may_be_skipped(tmp_path, workers):
    dataset = data_set(tmp_path / "images", skip_bad_images=True)
    (tmp_path / "images" / "3.png").write_bytes(b"")
    results, detections = evaluate(Stub(), dataset, Rank(0, 1, CPU), workers=workers)
    assert {entry["image_id"] for entry in detections} == {1, 2, 4, 5}
    assert results["images"] == 5 and "3.png: empty file" in results["skipped_images"][0]


def test_progress_is_told_of_every_image(tmp_path):
    seen = []

    def progress(items, total):
        for item in items:
            seen.append(total)
            yield item

    evaluate(Stub(), data_set(tmp_path / "images"), Rank(0, 1, CPU), progress=progress)
    assert seen == [5] * 5


# What a person sees


def test_the_table_shows_percent_and_every_class_whatever_its_name(capsys):
    content = annotations([(1, 1, 20, 30)], categories=("[red]cat[/red]", "dog"))
    print_results({**score(content, [found((1, 1, 20, 30))]), "skipped_images": ["image [b].jpg: empty file"]})
    text = capsys.readouterr().out
    assert "skipped image [b].jpg: empty file" in text
    assert "[red]cat[/red]" in text and "100.0" in text and "n/a" in text and "AR100" in text
    assert (percent(None), percent(0.3704), percent(0.0)) == ("n/a", "37.0", "0.0")


def test_detections_of_what_the_data_set_has_not_are_left_out(tmp_path):
    class Torchvisions(Stub):
        categories = {3: "cat", 5: "N/A"}  # label 2 stands for no class

    dataset = data_set(tmp_path / "images")
    rank = Rank(0, 1, CPU)
    _, everything = evaluate(Stub(), dataset, rank)
    _, real = evaluate(Torchvisions(), dataset, rank)
    assert {entry["category_id"] for entry in everything} == {3, 7}
    assert real == [entry for entry in everything if entry["category_id"] == 3]

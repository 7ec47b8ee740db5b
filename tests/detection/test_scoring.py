import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made import cats_and_dogs, pycocotools_says

from detection import scoring
from detection.annotations import read_annotations
from detection.layouts import find_split
from detection.scoring import BACKENDS, DETECTION, METRICS, entries, score

both_backends = pytest.mark.parametrize("backend", list(BACKENDS))


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


def found(box, image_id=1, category_id=3, score=0.9):
    return {"image_id": image_id, "category_id": category_id, "bbox": list(box), "score": score}


def as_rows(detections):
    names = DETECTION.names
    return np.array([tuple(tuple(e[n]) if n == "bbox" else e[n] for n in names) for e in detections], DETECTION)


def read(folder, content):
    path = folder / "instances.json"
    path.write_text(json.dumps(content))
    return read_annotations(path)


@pytest.fixture(params=list(BACKENDS))
def scored(tmp_path, request):
    """score() of an instances file's content and of detections in COCO's results format, by each backend in turn."""
    return lambda content, found: score(read(tmp_path, content), as_rows(found), backend=request.param)


# Scores


@both_backends
@pytest.mark.parametrize("split", ["train", "val"])
def test_the_numbers_are_pycocotools_own_on_real_annotations(data, split, backend):
    path = find_split(data / "coco_tiny", split).annotations
    detections = jittered(json.loads(path.read_text()))
    results = score(read_annotations(path), as_rows(detections), backend=backend)
    wanted = pycocotools_says(path, detections)
    assert 0.05 < results["bbox"]["AP"] < 0.95 and None not in wanted
    assert [results["bbox"][name] for name in METRICS] == wanted
    assert (results["images"], results["detections"], results["note"]) == (50, len(detections), None)


@both_backends
def test_the_numbers_of_a_class_are_pycocotools_for_that_class_alone(data, backend):
    path = find_split(data / "coco_tiny", "val").annotations
    content = json.loads(path.read_text())
    detections = jittered(content)
    per_class = score(read_annotations(path), as_rows(detections), backend=backend)["per_class"]
    assert list(per_class) == [c["name"] for c in sorted(content["categories"], key=lambda c: c["id"])]
    for category in content["categories"]:
        entry = per_class[category["name"]]
        ap, ap50, *_ = pycocotools_says(path, detections, category["id"])
        assert entry["AP"] == pytest.approx(ap, abs=1e-12) and entry["AP50"] == pytest.approx(ap50, abs=1e-12)
        of_class = [a for a in content["annotations"] if a["category_id"] == category["id"] and not a["iscrowd"]]
        assert entry["boxes"] == len(of_class) and (entry["AP"] is None) == (not of_class)


def test_perfect_detections_score_1_and_what_has_no_box_is_undefined(scored):
    """The first annotation has the id 0, which pycocotools takes for unmatched."""
    results = scored(cats_and_dogs([(1, 1, 20, 30), (30, 5, 20, 20)]), [found((1, 1, 20, 30)), found((30, 5, 20, 20))])
    assert results["bbox"]["AP"] == results["bbox"]["AR100"] == results["bbox"]["APs"] == pytest.approx(1)
    assert results["bbox"]["APm"] is None and results["bbox"]["APl"] is None
    assert results["per_class"]["cat"] == {"AP": pytest.approx(1), "AP50": pytest.approx(1), "boxes": 2}
    assert results["per_class"]["dog"] == {"AP": None, "AP50": None, "boxes": 0}


def test_without_detections_every_defined_number_is_0_and_it_says_why(scored):
    results = scored(cats_and_dogs([(1, 1, 20, 30)]), [])
    assert results["note"].startswith("no detections at all") and results["detections"] == 0
    assert results["bbox"]["AP"] == results["bbox"]["APs"] == results["bbox"]["AR1"] == 0
    assert results["bbox"]["APm"] is None and results["bbox"]["ARl"] is None
    assert results["per_class"]["cat"] == {"AP": 0, "AP50": 0, "boxes": 1}
    assert results["per_class"]["dog"] == {"AP": None, "AP50": None, "boxes": 0}


@pytest.mark.parametrize("detections", [[], [found((1, 1, 20, 30))]])
def test_without_ground_truth_no_number_is_defined_and_it_says_why(detections, scored):
    results = scored(cats_and_dogs([]), detections)
    assert set(results["bbox"].values()) == {None} and results["per_class"]["cat"]["AP"] is None
    assert "no box to be found" in results["note"]


def test_crowds_are_neither_missed_nor_wrongly_found_and_nothing_is_printed(scored, capfd):
    crowd = {"id": 9, "image_id": 1, "category_id": 3, "bbox": [30, 5, 20, 20], "area": 400, "iscrowd": 1}
    content = cats_and_dogs([(1, 1, 20, 30)])
    content["annotations"].append(crowd)
    results = scored(content, [found((1, 1, 20, 30), score=0.5), found((32, 7, 10, 10), score=0.9)])
    assert results["bbox"]["AP"] == pytest.approx(1) and results["per_class"]["cat"]["boxes"] == 1
    assert capfd.readouterr() == ("", "")


def test_annotations_that_are_not_finite_are_left_out(scored):
    results = scored(cats_and_dogs([(1, 1, 20, 30), (float("nan"), 1, 2, 3)]), [found((1, 1, 20, 30))])
    assert results["bbox"]["AP"] == pytest.approx(1) and results["per_class"]["cat"]["boxes"] == 1


def test_more_detections_than_100_an_image_count_as_in_coco(scored):
    boxes = [(1, 1, 20, 30)]
    many = [found((40, 40, 5, 5), score=0.9 - i / 1000) for i in range(100)] + [found(boxes[0], score=0.1)]
    assert scored(cats_and_dogs(boxes), many)["bbox"]["AP"] == 0
    assert scored(cats_and_dogs(boxes), many[1:])["bbox"]["AP"] > 0


def test_a_class_whose_name_another_has_is_told_by_its_id(scored):
    results = scored(cats_and_dogs([(1, 1, 20, 30)], categories=("cat", "cat", "dog")), [found((1, 1, 20, 30))])
    boxes = {name: entry["boxes"] for name, entry in results["per_class"].items()}
    assert boxes == {"cat": 1, "cat (id 7)": 0, "dog": 0}


def test_a_detection_of_a_class_that_the_annotations_have_not_is_counted_and_matches_nothing(scored):
    content, right = cats_and_dogs([(1, 1, 20, 30)]), found((1, 1, 20, 30))
    results = scored(content, [found((1, 1, 20, 30), category_id=2, score=1.0), right])
    assert results["detections"] == 2 and results["bbox"] == scored(content, [right])["bbox"]
    alone = scored(content, [found((1, 1, 20, 30), category_id=2)])
    assert alone["bbox"]["AP"] == 0 and alone["note"] is None


def test_a_detection_of_an_image_that_the_annotations_have_not_is_an_error(scored):
    with pytest.raises(ValueError, match="1 of 2 detections are of images .* the first is of image 9"):
        scored(cats_and_dogs([(1, 1, 20, 30)]), [found((1, 1, 20, 30)), found((1, 1, 20, 30), image_id=9)])


def test_of_equal_scores_the_first_in_an_image_and_the_lower_image_id_come_first(scored):
    """Ids above 2^53, where floats skip every other one, and images in the order of the file, not of the ids."""
    content = cats_and_dogs([(1, 1, 20, 30)])
    first, second = 2**60 + 2, 2**60 + 1
    content["images"][0]["id"], content["images"][1]["id"] = first, second
    content["annotations"][0]["image_id"] = first
    right, wrong = found((1, 1, 20, 30), first), found((40, 40, 5, 5), first)
    assert scored(content, [right, wrong])["bbox"]["AP"] == pytest.approx(1)
    assert scored(content, [wrong, right])["bbox"]["AP"] == pytest.approx(0.5)
    assert scored(content, [right, found((1, 1, 20, 30), second)])["bbox"]["AP"] == pytest.approx(0.5)


# hotcoco and pycocotools

SIDES = st.sampled_from([0, 1, 5, 9.5, 10, 20, 31.99, 32, 33, 96, 97, 200, 1e5]) | st.floats(0, 300)
PLACES = st.sampled_from([0, 1, 2.5, 10, -5]) | st.floats(-50, 50)
SCORES = st.sampled_from([0.0, -0.0, 0.1, 0.5, 0.50000001, 1.0, -1.0]) | st.floats(0, 1)
IDS = st.integers(-(2**63), 2**63 - 1) | st.integers(-2, 5)
AREAS = st.none() | st.sampled_from([0, 1024, 1024.0001, 9216, 1e10, 1e11, -1.0])
ODD = st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e300])


@st.composite
def problems(draw, odd=SIDES):
    """An instances file's content, and detections near its boxes and elsewhere, some of them many times over."""
    image_ids = draw(st.lists(IDS, min_size=1, max_size=3, unique=True))
    category_ids = draw(st.lists(IDS, min_size=1, max_size=3, unique=True))
    boxes = draw(st.lists(st.tuples(PLACES, PLACES, SIDES, SIDES), min_size=1, max_size=6))
    wanted, rows = [], []
    for i in range(draw(st.integers(0, 8))):
        entry = {"id": i + draw(st.sampled_from([0, 100])), "image_id": draw(st.sampled_from(image_ids))}
        entry |= {"category_id": draw(st.sampled_from(category_ids)), "bbox": list(draw(st.sampled_from(boxes)))}
        entry |= {"iscrowd": int(draw(st.integers(0, 3)) == 3), "area": draw(AREAS)}
        if draw(st.integers(0, 9)) == 9:
            entry["bbox"][draw(st.integers(0, 3))] = draw(odd | SIDES)
        wanted.append(entry)
    for _ in range(draw(st.integers(0, 12))):
        near = [value + draw(st.sampled_from([0, 0, 0, 0.5, 1, -3])) for value in draw(st.sampled_from(boxes))]
        if draw(st.integers(0, 9)) == 9:
            near[draw(st.integers(0, 3))] = draw(odd | SIDES)
        row = {"image_id": draw(st.sampled_from(image_ids)), "category_id": draw(st.sampled_from([*category_ids, 6]))}
        rows += [{**row, "bbox": near, "score": draw(SCORES | odd)}] * draw(st.sampled_from([1, 1, 2, 60]))
    return {
        "images": [{"id": i, "file_name": "a.png", "width": 300, "height": 200} for i in image_ids],
        "categories": [{"id": i, "name": "all alike"} for i in category_ids],
        "annotations": wanted,
    }, rows


@settings(max_examples=150, deadline=None)
@given(problems())
def test_both_backends_give_the_same_results_bit_for_bit(tmp_path_factory, problem):
    content, rows = problem
    annotations = read(tmp_path_factory.getbasetemp(), content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "_pycocotools", None)  # hotcoco is on its own
        found = score(annotations, as_rows(rows))
    assert found == score(annotations, as_rows(rows), backend="pycocotools")


@settings(max_examples=50, deadline=None)
@given(problems(odd=ODD))
def test_both_backends_give_the_same_results_for_what_is_not_finite(tmp_path_factory, problem):
    content, rows = problem
    annotations = read(tmp_path_factory.getbasetemp(), content)
    assert score(annotations, as_rows(rows)) == score(annotations, as_rows(rows), backend="pycocotools")


@settings(max_examples=50, deadline=None)
@given(problems())
def test_the_numbers_are_those_of_pycocotools_on_the_files(tmp_path_factory, problem):
    """Where it takes them: no annotation with the id 0, areas and detections given."""
    content, rows = problem
    for i, annotation in enumerate(content["annotations"]):
        annotation["id"] = i + 1
        if annotation["area"] is None:
            annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
    rows = rows or [found((1, 1, 5, 5), content["images"][0]["id"])]
    results = score(read(tmp_path_factory.getbasetemp(), content), as_rows(rows))
    path = tmp_path_factory.getbasetemp() / "instances.json"
    assert [results["bbox"][name] for name in METRICS] == pycocotools_says(path, [dict(row) for row in rows])


def test_entries_are_what_json_takes(tmp_path):
    rows = [found((1, 2.5, 3, 4)), found((5, 6, 7, 8), image_id=2**60 + 1, score=0.125)]
    assert list(entries(as_rows(rows))) == json.loads(json.dumps(rows)) and list(entries(as_rows([]))) == []

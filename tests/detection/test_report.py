import contextlib
import io
import json
import re
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from detection.coco import CocoImages
from detection.data_report import data_section
from detection.evaluate import Evaluation
from detection.gallery import GAP, MIN_SIDE, class_colour, draw_boxes, save_pictures
from detection.outcomes import match
from detection.report import write_report
from detection.scoring import DETECTION, METRICS, evaluated, score
from resbackbone.report.page import LIMIT


def boxed(folder, boxes, *, names=("cat", "dog"), size=(60, 40), files=None):
    """A data set with an image for each list of (class, x, y, width, height[, crowd])."""
    (folder / "images").mkdir(parents=True)
    files = files or [f"{i}.png" for i in range(1, len(boxes) + 1)]
    images = [{"id": i, "file_name": name, "width": size[0], "height": size[1]} for i, name in enumerate(files, 1)]
    annotations = [
        {"image_id": i, "category_id": 5 + box[0], "bbox": list(box[1:5]), "iscrowd": int(len(box) > 5)}
        for i, of_image in enumerate(boxes, 1)
        for box in of_image
    ]
    for name in files:
        Image.effect_noise(size, 60).convert("RGB").save(folder / "images" / name)
    categories = [{"id": 5 + i, "name": name} for i, name in enumerate(names)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(content))
    return CocoImages(folder / "images", folder / "instances.json")


def colours(picture):
    return {colour for _, colour in picture.getcolors(picture.width * picture.height)}


def distance(picture):
    """Of the pixel that is nearest to the first class's colour; JPEG changes colours a little."""
    return np.abs(np.asarray(picture, int) - class_colour(0)).max(2).min()


def grey(height, width):
    return torch.full((3, height, width), 100, dtype=torch.uint8)


def test_a_picture_shows_truth_beside_detections_even_for_a_tiny_image(tmp_path):
    dataset = boxed(tmp_path, [[(0, 1, 1, 5, 4)]], size=(9, 7))
    found = np.array([(1, 5, (2, 2, 6, 4), 0.9)], DETECTION)
    [path] = save_pictures(tmp_path / "pictures", dataset, found)
    assert path == tmp_path / "pictures" / "1.jpg"
    picture = Image.open(path)
    zoom = -(-MIN_SIDE // 7)
    assert picture.size == (2 * 9 * zoom + GAP, 7 * zoom + 26)
    left, right = (picture.crop((x, 26, x + 9 * zoom, picture.height)) for x in (0, 9 * zoom + GAP))
    assert distance(left) < 20 and distance(right) < 20
    assert left.tobytes() != right.tobytes()


def test_detections_with_low_scores_or_of_other_images_are_not_drawn(tmp_path):
    dataset = boxed(tmp_path, [[]])
    found = np.array([(1, 5, (2, 2, 6, 4), 0.49), (2, 5, (2, 2, 6, 4), 0.9)], DETECTION)
    [nothing] = save_pictures(tmp_path / "pictures", dataset, found)
    assert distance(Image.open(nothing)) > 50


@pytest.mark.parametrize("count, names", [(0, []), (1, [1]), (3, [1, 3, 5]), (12, [1, 3, 4, 5])])
def test_the_requested_pictures_are_spread_over_the_readable_images(tmp_path, count, names):
    dataset = boxed(tmp_path, [[]] * 5)
    (tmp_path / "images" / "2.png").write_bytes(b"")
    written = save_pictures(tmp_path / "pictures", dataset, np.empty(0, DETECTION), count=count)
    assert [int(path.stem) for path in written] == names
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == sorted(path.name for path in written)


@pytest.mark.parametrize("name", ["猫 🐈", "\u0000\ufffe", "", "two\nlines", "a" * 300, "[bold]red[/bold]"])
def test_any_class_name_can_be_drawn(name):
    entries = [{"category_id": 5, "bbox": [2, 3, 20, 10], "score": 0.5}]
    assert class_colour(0) in colours(draw_boxes(grey(33, 40), entries, {5: name}, title=name))


def test_only_the_box_and_its_label_are_drawn():
    assert colours(draw_boxes(grey(500, 600), [], {5: "cat"})) == {(100, 100, 100)}
    picture = np.asarray(draw_boxes(grey(500, 600), [{"category_id": 5, "bbox": [200, 150, 300, 250]}], {5: "cat"}))
    rows, columns = np.nonzero(np.any(picture != 100, axis=-1))
    assert (columns.min(), columns.max(), rows.max()) == (200, 500, 400)
    assert 100 < rows.min() < 150  # the label stands above the box
    assert (picture[200:380, 220:480] == 100).all()


def test_a_large_or_narrow_image_keeps_its_size_and_a_title_goes_above_it():
    assert draw_boxes(grey(481, 640), [], {}).size == (640, 481)
    assert draw_boxes(grey(481, 640), [], {}, title="truth").size == (640, 507)
    width, height = draw_boxes(grey(2, 1500), [], {}).size
    assert width * height < 20e6


def test_classes_have_distinct_light_colors():
    assert len({class_colour(i) for i in range(80)}) == 80
    assert all(sum(class_colour(i)) > 250 for i in range(80))


# report.html


def found(*rows):
    """(image, class, x, y, width, height, score) each."""
    return np.array([(i, 5 + k, box, score) for i, k, *box, score in rows], DETECTION)


def report_of(folder, dataset=None, detections=None, *, evaluations=1, updates=2, about_data=None, **changed):
    """The report of a run that ended with these detections: (HTML, results)."""
    results = evaluation = None
    lines = [
        {"kind": "train", "step": step, "loss": 2.0 / step, "loss_box_reg": 0.5, "loss_classifier": 0.25, "lr": 0.1}
        | {"gradient_norm": 1.0, "seconds": 0.5, "data_seconds": 0.1, "memory_mib": 10.0, "images_per_second": 4.0}
        for step in range(1, updates + 1)
    ]
    if dataset is not None:
        results = score(dataset.annotations, detections) | {"skipped_images": []} | changed
        evaluation = Evaluation(results, detections)
        lines += [{"kind": "eval", "step": 1 + i, **results["bbox"], "seconds": 3.0} for i in range(evaluations)]
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text("data: a/shapes\ndepth: 18\nvariant: fpn\nrecipe: short\nbatch_size: 2\n")
    assert write_report(folder, dataset, evaluation, about_data) == folder / "report.html"
    return (folder / "report.html").read_text(), results


def values(html, name):
    """The numbers in the table row that begins with a name."""
    [cells] = re.findall(rf"<tr><td>(?:<b>)?{re.escape(name)}(?:</b><br>[^<]*)?</td>(.*?)</tr>", html)
    return [float(value) if value else None for value in re.findall(r'data-value="([^"]*)"', cells)]


def part(html, title):
    [content] = re.findall(rf"<section [^>]*>\s*<h2>{title}</h2>(.*?)</section>", html, re.DOTALL)
    return content


TWO = [[(0, 2, 2, 20, 20), (1, 30, 5, 20, 30)], [(0, 10, 10, 30, 20)]]
NEAR = found(
    (1, 0, 3, 2, 20, 20, 0.9), (1, 1, 30, 5, 20, 28, 0.8), (2, 0, 12, 10, 30, 20, 0.7), (2, 1, 0, 0, 9, 9, 0.6)
)
OF_EVALUATION = ["The 12 numbers", "Classes", "Precision and recall", "Confusions", "Errors", "Boxes", "Worst images"]
SECTIONS = ["Summary", "Facts", "Training", *OF_EVALUATION, "Timing", "Configuration"]


def test_a_report_agrees_with_results_json(tmp_path):
    html, results = report_of(tmp_path / "run", boxed(tmp_path, TWO), NEAR)
    for name in METRICS:
        assert values(part(html, "The 12 numbers"), name)[0] == results["bbox"][name]
    for name, entry in results["per_class"].items():
        assert values(part(html, "Classes"), name)[:3] == [entry["AP"], entry["AP50"], entry["boxes"]]
    assert f"<b>{100 * results['bbox']['AP']:.1f} %</b><span>AP</span>" in html
    assert "Faster R-CNN R18-fpn on shapes" in html and "2 images evaluated" in html and "this run has one" in html


def test_a_report_has_every_section_and_loads_nothing(tmp_path):
    html, _ = report_of(tmp_path / "run", boxed(tmp_path, TWO), NEAR, evaluations=2)
    assert re.findall("<h2>([^<]*)</h2>", html) == SECTIONS
    assert "http://" not in html and "https://" not in html
    addresses = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert addresses and all(address.startswith(("#", "data:image/jpeg;base64,")) for address in addresses)
    assert "AP over time, percent" in html and "needs two evaluations" not in html
    assert len(html.encode()) < LIMIT


def test_a_report_shows_the_data_that_was_trained_on(tmp_path):
    train, val = boxed(tmp_path / "train", [*TWO, [], [(1, 0, 0, 60, 39)]]), boxed(tmp_path / "val", TWO)
    about_data = partial(data_section, {"train": train, "val": val})
    html, _ = report_of(tmp_path / "run", val, NEAR, about_data=about_data)
    assert re.findall("<h2>([^<]*)</h2>", html) == ["Summary", "Facts", "Data", *SECTIONS[2:]]
    facts = part(html, "Facts")
    assert "<dd>60 × 40 pixels</dd>" in facts and "<dd>4 in train, 3 in val</dd>" in facts
    data = part(html, "Data")
    assert "<b>4</b><span>images, train</span>" in data and "<b>3</b><span>boxes, val</span>" in data
    assert "train: boxes over 95% of their image: 1; the first: dog in 4.png" in data
    assert values(data, "cat") == [2, 2, 2, 2] and values(data, "boxes clipped to their image") == [0, 0]
    assert data.count("data:image/jpeg") == 4 + 2 and data.count("<details>") == 1


@pytest.mark.parametrize("updates", [0, 1])
def test_a_run_without_evaluation_says_what_is_missing(tmp_path, updates):
    html, _ = report_of(tmp_path / "run", updates=updates)
    assert re.findall("<h2>([^<]*)</h2>", html) == SECTIONS
    for title in ("Summary", *OF_EVALUATION):
        assert "No evaluation yet" in part(html, title)
    assert "AP over time needs two evaluations; this run has none yet." in html
    assert part(html, "Training").count("<circle") == (0 if not updates else 5)  # loss, two parts, rate, norm


@pytest.mark.parametrize("detections", [found(), found((1, 0, 0, 0, 5, 5, np.nan), (1, 0, np.inf, 0, 5, 5, 0.9))])
def test_a_report_without_a_usable_detection_says_so(tmp_path, detections):
    html, _ = report_of(tmp_path / "run", boxed(tmp_path, TWO), detections)
    assert "There are no detections." in part(html, "Errors") and "F1 0.0 %" in part(html, "Worst images")


def test_a_report_on_images_without_objects_has_no_numbers(tmp_path):
    html, _ = report_of(tmp_path / "run", boxed(tmp_path, [[], []]), NEAR)
    assert values(part(html, "The 12 numbers"), "AP") == [None, 100] and "no box to be found" in html
    assert "There are no objects to find." in part(html, "Errors")


def test_hostile_names_of_classes_and_files_are_escaped(tmp_path):
    hostile = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>']
    dataset = boxed(tmp_path, TWO, names=hostile, files=["<b>'1&.png", "2.png"])
    html, _ = report_of(tmp_path / "run", dataset, NEAR)
    assert html.count("<script>") == 1 and "<img" not in html and "<b>'" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in part(html, "Classes")
    assert "&lt;b&gt;&#39;1&amp;.png" in part(html, "Summary")


def test_five_hundred_classes_and_large_images_stay_within_two_megabytes(tmp_path):
    names = [f"class {i} {'<&' * 60}" for i in range(500)]
    dataset = boxed(tmp_path, [[(i, 5, 5, 300, 300)] for i in range(1, 15)], names=names, size=(640, 480))
    html, _ = report_of(tmp_path / "run", dataset, found(*((i, i - i % 2, 5, 5, 300, 300, 0.9) for i in range(1, 15))))
    assert len(html.encode()) < LIMIT and "Left out" not in html
    assert part(html, "Classes").count("<tr>") == 501 and html.count("data:image/jpeg") == 5 + 6


@pytest.mark.parametrize(
    "kind, row",
    [
        ("classification", (1, 1, 2, 2, 20, 20, 0.5)),
        ("localization", (2, 0, 30, 10, 20, 20, 0.5)),
        ("both", (2, 1, 30, 10, 20, 20, 0.5)),
        ("duplicate", (1, 0, 3, 3, 20, 20, 0.5)),
        ("background", (2, 0, 0, 33, 5, 5, 0.5)),
        ("missed", None),
    ],
)
def test_each_kind_of_error_is_counted(tmp_path, kind, row):
    right = [(1, 0, 2, 2, 20, 20, 0.9), (2, 0, 10, 10, 30, 20, 0.9)]
    right += [] if kind == "missed" else [(1, 1, 30, 5, 20, 30, 0.9), row]
    html, _ = report_of(tmp_path / "run", boxed(tmp_path, TWO), found(*right))
    errors = part(html, "Errors")
    counts = {row: values(errors, row)[1] for row in re.findall(r"<tr><td><b>(\w+)</b>", errors)}
    assert counts == dict.fromkeys(counts, 0) | {kind: 1} and len(counts) == 6


def outcome(tmp_path, boxes, *rows):
    _, [whole] = match(boxed(tmp_path, [boxes]), found(*rows))
    only = whole.above(0.5)
    return only.right.tolist(), only.seen.tolist()


def test_the_highest_score_takes_an_object_and_a_duplicate_is_wrong(tmp_path):
    rows = [(1, 0, 2, 2, 20, 20, 0.6), (1, 0, 4, 2, 20, 20, 0.9), (1, 0, 2, 2, 20, 20, 0.4)]
    assert outcome(tmp_path, [(0, 2, 2, 20, 20)], *rows) == ([True, False], [True])  # by falling score, none below 0.5


@pytest.mark.parametrize("row", [(1, 1, 2, 2, 20, 20, 0.9), (1, 0, 13, 2, 20, 20, 0.9), (2, 0, 2, 2, 20, 20, 0.9)])
def test_another_class_place_or_image_is_no_match(tmp_path, row):
    right, seen = outcome(tmp_path, [(0, 2, 2, 20, 20)], row)
    assert not any(right) and seen == [False]


def test_a_detection_in_a_crowd_of_its_class_is_ignored(tmp_path):
    rows = [(1, 0, 5, 5, 10, 10, 0.9), (1, 1, 5, 5, 10, 10, 0.8)]  # of the crowd's class, and of another
    assert outcome(tmp_path, [(0, 0, 0, 50, 40, "crowd")], *rows) == ([False], [])


def test_the_worst_and_best_images_are_ranked_by_f1(tmp_path):
    boxes = [[(0, 2, 2, 20, 20)], [(0, 2, 2, 20, 20)], [(0, 2, 2, 20, 20)] * 2, []]
    dataset = boxed(tmp_path, boxes)
    html, _ = report_of(tmp_path / "run", dataset, found((1, 0, 2, 2, 20, 20, 0.9), (3, 0, 2, 2, 20, 20, 0.9)))
    ranked = []
    for title in ("Worst images", "Summary"):
        shown = re.findall(r"F1 ([\d.]+) %: (\d) right, (\d) wrong, (\d) missed. (\S+?)<", part(html, title))
        ranked.append([" ".join(row) for row in shown])
    assert ranked == [["0.0 0 0 1 2.png", "66.7 1 0 1 3.png"], ["100.0 1 0 0 1.png", "66.7 1 0 1 3.png"]]


def test_the_gallery_skips_an_unreadable_image(tmp_path):
    dataset = boxed(tmp_path, TWO)
    (tmp_path / "images" / "2.png").write_bytes(b"")
    html, _ = report_of(tmp_path / "run", dataset, NEAR, skipped_images=["image 2.png: empty file"])
    assert html.count("data:image/jpeg") == 1 and "skipped in evaluation: image 2.png: empty file." in html


def test_the_gallery_draws_a_box_in_place_in_its_class_color(tmp_path):
    html, _ = report_of(tmp_path / "run", boxed(tmp_path, [[(1, 30, 5, 20, 30)]]), found((1, 1, 0, 0, 3, 40, 0.75)))
    scale, colour = 300 / 60, ",".join(map(str, class_colour(1)))
    for kind, (x, y, w, h) in (("truth wrong", (30, 5, 20, 30)), ("found wrong", (0, 0, 3, 40))):
        wanted = [round(round(v * scale, 1), 1) for v in (x, y, x + w, y + h)]
        [drawn] = re.findall(rf'<rect x="(.+?)" y="(.+?)" width="(.+?)" height="(.+?)" [^>]*class="{kind}"', html)
        x1, y1, width, height = map(float, drawn)
        assert [x1, y1, x1 + width, y1 + height] == pytest.approx(wanted, abs=0.1)
    assert f'fill="rgb({colour})"' in html and "dog 0.75</text>" in html


def test_a_report_that_fails_does_not_stop_the_run(tmp_path, capsys):
    dataset = boxed(tmp_path, TWO)
    assert write_report(tmp_path, dataset, Evaluation({"bbox": {}}, NEAR)) is None
    assert "report.html could not be written (KeyError" in capsys.readouterr().out.splitlines()[0]


# The threshold, confusions and boxes


def matched_by_hand(boxes, rows, score):
    """(right detections, detections, objects) from a score on, one by one."""
    right = 0
    for image, of_image in enumerate(boxes, 1):
        free = list(of_image)
        for i, k, *box, value in sorted(rows, key=lambda row: -row[-1]):
            if i != image or value < score:
                continue
            ious = {j: overlap(box, free[j][1:5]) for j in range(len(free)) if free[j][0] == k}
            if ious and max(ious.values()) >= 0.5:
                free.pop(max(ious, key=ious.get))
                right += 1
    return right, sum(row[-1] >= score for row in rows), sum(map(len, boxes))


def overlap(a, b):
    sides = [min(a[i] + a[i + 2], b[i] + b[i + 2]) - max(a[i], b[i]) for i in (0, 1)]
    both = max(sides[0], 0) * max(sides[1], 0)
    return both / (a[2] * a[3] + b[2] * b[3] - both)


def noisy(seed=0, images=9, classes=3):
    """Boxes of images, and detections near most of them and elsewhere, with better scores for the near ones."""
    random = np.random.default_rng(seed)
    boxes, rows = [], []
    for image in range(1, images + 1):
        corners = random.integers(0, [30, 15], (4, 2))
        boxes.append([(int(random.integers(classes)), *map(int, xy), 20, 20) for xy in corners])
        for k, x, y, w, h in boxes[-1]:
            shift, other = random.normal(0, 2, 2), (k + (random.random() < 0.2)) % classes
            rows.append((image, other, x + shift[0], y + shift[1], w, h, round(random.beta(5, 2), 3)))
        rows.append((image, 0, *random.integers(0, 20, 2).tolist(), 15, 12, round(random.beta(2, 4), 3)))
    return boxes, rows


def test_the_suggested_threshold_has_the_highest_f1_of_all(tmp_path):
    boxes, rows = noisy()
    html, _ = report_of(tmp_path / "run", boxed(tmp_path, boxes, names=["cat", "dog", "owl"]), found(*rows))
    counts = {score / 100: matched_by_hand(boxes, rows, score / 100) for score in range(1, 100)}
    f1 = {score: 2 * right / (detections + objects) for score, (right, detections, objects) in counts.items()}
    section = part(html, "Precision and recall")
    suggested = float(re.search("Suggested threshold: ([0-9.]+) ", section)[1])
    assert 0.1 < suggested < 0.9 and f1[suggested] == max(f1.values()) > 0.5
    right, detections, objects = counts[suggested]
    said = [f"{100 * value:.1f} %" for value in (f1[suggested], right / detections, right / objects)]
    assert re.findall(r"[0-9.]+ %", section)[:3] == said
    [points] = re.findall(r"""data-name="F1" data-points='([^']*)'""", section)
    assert {float(x): y for _, x, y in json.loads(points)} == {score: f"{100 * v:.1f}" for score, v in f1.items()}
    assert re.findall(r"[0-9.]+ %", part(html, "Summary").partition("Suggested")[2])[:3] == said


def test_precision_over_recall_is_that_of_pycocotools(tmp_path):
    boxes, rows = noisy(1)
    dataset = boxed(tmp_path, boxes, names=["cat", "dog", "owl"])
    html, _ = report_of(tmp_path / "run", dataset, found(*rows))
    truth = np.ones(len(dataset.annotations.labels), bool)
    with contextlib.redirect_stdout(io.StringIO()):
        scorer = evaluated(dataset.annotations, truth, found(*rows), backend="pycocotools")
        scorer.accumulate()
    points = dict(re.findall(r"""data-name="([^"]*)" data-points='([^']*)'""", part(html, "Precision and recall")))
    for name, row in (("IoU 0.50", 0), ("IoU 0.75", 5)):
        precision = scorer.eval["precision"][row, :, :, 0, -1].mean(1)
        assert [y for *_, y in json.loads(points[name])] == [f"{100 * value:.1f}" for value in precision]


def confusion_rows(html):
    [matrix] = re.findall(r'<table class="matrix.*?</table>', part(html, "Confusions"), re.DOTALL)
    found = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall("<tr>(<td.*?)</tr>", matrix)]
    return {name: [int(count or 0) for count in counts] for name, *counts in found}


def test_confusions_count_every_object_in_its_row_and_every_detection_in_its_column(tmp_path):
    boxes, rows = noisy(2)
    names = ["cat", "dog", "owl"]
    html, _ = report_of(tmp_path / "run", boxed(tmp_path, boxes, names=names), found(*rows))
    score = float(re.search("Suggested threshold: ([0-9.]+) ", html)[1])
    matrix = confusion_rows(html)
    assert list(matrix) == [*names, "background"] and matrix["background"][-1] == 0
    labels = [box[0] for of_image in boxes for box in of_image]
    assert [sum(matrix[name]) for name in names] == [labels.count(k) for k in range(3)]
    taken = [row[1] for row in rows if row[-1] >= score]
    assert np.sum(list(matrix.values()), 0)[:3].tolist() == [taken.count(k) for k in range(3)]
    assert sum(sum(matrix[name]) - matrix[name][k] for k, name in enumerate(names)) > 0
    boxes_section = part(html, "Boxes")
    assert values(boxes_section, "objects")[0] == len(labels) and values(boxes_section, "detections")[0] == len(taken)


def test_a_class_taken_for_another_a_missed_object_and_a_false_detection_are_told_apart(tmp_path):
    boxes = [[(0, 2, 2, 20, 20), (1, 30, 5, 20, 30)], [(0, 10, 10, 30, 20), (0, 0, 0, 50, 40, "crowd")]]
    rows = [(1, 0, 2, 2, 20, 20, 0.9), (1, 0, 30, 5, 20, 30, 0.9), (2, 1, 0, 0, 5, 5, 0.9)]
    html, _ = report_of(tmp_path / "run", boxed(tmp_path, boxes), found(*rows))
    assert confusion_rows(html) == {"cat": [1, 0, 1], "dog": [1, 0, 0], "background": [0, 1, 0]}
    assert re.findall("<tr><td>dog</td><td>cat</td>.*?</tr>", part(html, "Confusions"))


def test_of_eighty_classes_the_twenty_most_confused_are_shown(tmp_path):
    names = [f"class {i}" for i in range(80)]
    boxes = [[(k, 2, 2, 20, 20)] for k in range(80)]
    rows = [(k + 1, k + 1 if k < 3 else k, 2, 2, 20, 20, 0.9) for k in range(80)]
    html, _ = report_of(tmp_path / "run", boxed(tmp_path, boxes, names=names), found(*rows))
    assert "Of 80 classes, the 20 with the most errors are shown." in part(html, "Confusions")
    shown = confusion_rows(html)
    assert len(shown) == 20 + 1 and {"class 0", "class 3", "background"} < set(shown) and "class 79" not in shown


def test_one_class_and_one_image_have_every_section(tmp_path):
    dataset = boxed(tmp_path, [[(0, 2, 2, 20, 20)]], names=["cat"])
    html, _ = report_of(tmp_path / "run", dataset, found((1, 0, 2, 2, 20, 20, 0.9)))
    assert confusion_rows(html) == {"cat": [1, 0], "background": [0, 0]} and "Most confused" not in html
    assert "No readable image has an error" in part(html, "Worst images") and "100.0 %" in part(html, "Summary")
    assert "AP50 is 100.0. Of the 0.0 that is missing" in part(html, "Errors")


def test_no_label_covers_another(tmp_path):
    crowded = [[(0, 5 + 2 * i, 5 + i, 30, 25) for i in range(12)]]
    rows = [(1, 0, 5 + 2 * i, 5 + i, 30, 25, 0.95 - i / 100) for i in range(12)] + [(1, 1, 40, 30, 9, 9, 0.9)]
    html, _ = report_of(tmp_path / "run", boxed(tmp_path, crowded), found(*rows))
    pictures = re.findall(r"<svg viewBox=[^>]*>\s*<(?:image|use).*?</svg>", html, re.DOTALL)
    assert len(pictures) == 3
    for picture in pictures:
        places = re.findall(r'<rect x="(\S+)" y="(\S+)" width="(\S+)" height="(\S+)" fill', picture)
        labels = [tuple(map(float, place)) for place in places]
        assert labels and not any(
            a[0] < b[0] + b[2] and b[0] < a[0] + a[2] and a[1] < b[1] + b[3] and b[1] < a[1] + a[3]
            for i, a in enumerate(labels)
            for b in labels[:i]
        )


@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_every_section_and_fetches_nothing(opened, tmp_path, width):
    dataset = boxed(tmp_path / "data", TWO, names=["<script>alert(1)</script>", "dog"])
    shown = opened(report_of(tmp_path / "run", dataset, NEAR[:2])[0], width=width)
    assert shown.locator("h2").all_inner_texts() == SECTIONS and shown.said == []
    assert shown.evaluate("document.documentElement.scrollWidth") == width
    classes = shown.locator("#classes")
    assert classes.locator("tbody td:first-child").all_inner_texts() == ["<script>alert(1)</script>", "dog"]
    classes.locator("th button").first.click()
    classes.locator("th button").first.click()
    assert classes.locator("tbody td:first-child").all_inner_texts() == ["dog", "<script>alert(1)</script>"]
    pictures = shown.locator("#worst-images svg, .strip svg")
    assert pictures.count() == 3 and all(pictures.nth(i).bounding_box()["height"] > 100 for i in range(3))

import json
import re

import numpy as np
import pytest
from PIL import Image

from resbackbone.classification.report import WORST, Predictions, write_report
from resbackbone.image_io import BadImage
from resbackbone.report.confusions import PAIRS, WHOLE
from resbackbone.report.page import LIMIT

SECTIONS = ["Summary", "Facts", "Training", "Classes", "Confusions", "Worst images", "Timing", "Configuration"]


def predictions(labels, best, *, losses=None, classes=("cat", "dog", "owl"), size=(32, 32), bad=()):
    def image(index):
        if index in bad:
            raise BadImage(f"image {index}: empty file")
        return Image.effect_noise(size, 60)

    best = np.array(best).reshape(len(labels), -1)
    losses = np.ones(len(labels)) if losses is None else np.array(losses, float)
    return Predictions(classes, np.array(labels), best, image, "folder/{}.png".format, losses)


def report_of(folder, shown=None, results=None, *, lines=(), network="resnet-20", **why):
    folder.mkdir(exist_ok=True)
    evaluations = [] if results is None else [{"kind": "eval", "step": 9, "seconds": 1.0, **results}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, *evaluations]))
    (folder / "config.yaml").write_text("data: a/photos\nbatch_size: 2\n")
    path = write_report(folder, network=network, predictions=shown, **why)
    assert path == folder / "report.html"
    return path.read_text()


def part(html, title):
    [content] = re.findall(rf"<section [^>]*>\s*<h2>{title}</h2>(.*?)</section>", html, re.DOTALL)
    return content


def rows(html):
    """The rows of a part's sortable table, as text."""
    [table] = re.findall(r'<table class="sortable">.*?</table>', html, re.DOTALL)
    return [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall("<tr>(<td.*?)</tr>", table)]


LABELS, BEST = [0, 0, 0, 1, 1, 2], [0, 1, 1, 1, 0, 1]


def test_a_report_has_every_section_and_the_results(tmp_path):
    results = {"top1": 0.3333, "top5": 0.875, "images": 6, "unreadable": 1, "protocol": "10crop"}
    html = report_of(tmp_path, predictions(LABELS, BEST), results)
    assert re.findall("<h2>([^<]*)</h2>", html) == SECTIONS
    assert "<b>33.3 %</b><span>top-1" in html and "<b>87.5 %</b><span>top-5" in html
    assert "On 6 images, 10crop." in html and "Unreadable images, which count as wrong: 1." in html
    assert "<title>resnet-20 on photos</title>" in html and "http://" not in html and "https://" not in html
    html = report_of(tmp_path, predictions(LABELS, BEST), {"error": 0.0875, "loss": 0.5, "images": 6})
    assert "<b>8.8 %</b><span>error" in html and "top-1 accuracy" not in html and "mean loss 0.5" in html


def test_each_class_has_its_accuracy(tmp_path):
    html = report_of(tmp_path, predictions(LABELS, [[0, 1], [1, 0], [1, 2], [1, 0], [0, 1], [1, 0]]))
    assert rows(part(html, "Classes")) == [
        ["cat", "3", "33.3", "66.7"],
        ["dog", "2", "50.0", "100.0"],
        ["owl", "1", "0.0", "0.0"],
    ]


def test_the_matrix_and_the_most_confused_pairs_count_every_image(tmp_path):
    confusions = part(report_of(tmp_path, predictions(LABELS, BEST)), "Confusions")
    [matrix] = re.findall(r'<table class="matrix.*?</table>', confusions, re.DOTALL)
    counts = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall("<tr>(<td.*?)</tr>", matrix)]
    assert counts == [["cat", "1", "2", ""], ["dog", "1", "1", ""], ["owl", "", "1", ""]]
    assert rows(confusions) == [
        ["cat", "dog", "2", "66.7"],
        ["dog", "cat", "1", "50.0"],
        ["owl", "dog", "1", "100.0"],
    ]


def test_of_many_classes_the_most_confused_are_shown(tmp_path):
    n = 20_000
    labels = np.arange(n)
    best = np.where(labels < 5, 7, labels + 1) % n
    shown = predictions(np.append(labels, 3), np.append(best, 7), classes=[str(i) for i in range(n)])
    confusions = part(report_of(tmp_path, shown), "Confusions")
    assert len(rows(confusions)) == PAIRS and rows(confusions)[0] == ["3", "7", "2", "100.0"]
    assert f"Of 20,000 classes, the {WHOLE} with the most errors are shown." in confusions
    [matrix] = re.findall(r'<table class="matrix.*?</table>', confusions, re.DOTALL)
    assert matrix.count("<tr><td>") == WHOLE and ">7</th>" in matrix and ">9999</th>" not in matrix


@pytest.mark.parametrize("best", [LABELS, [-1] * 6])
def test_without_wrong_predictions_the_page_says_so_and_unreadable_images_are_no_confusions(tmp_path, best):
    html = report_of(tmp_path, predictions(LABELS, best))
    assert "No image was classified wrongly." in part(html, "Confusions")
    assert "No image was classified wrongly." in part(html, "Worst images")


def shown_images(html):
    return [int(name) for name in re.findall(r"(\d+)\.png", part(html, "Worst images"))]


def test_the_worst_images_are_wrong_ones_with_the_largest_loss(tmp_path):
    losses = [9.0, 1.0, 3.0, 0.1, 2.0, 0.5]
    html = report_of(tmp_path, predictions(LABELS, BEST, losses=losses, bad=[4]))
    assert shown_images(html) == [2, 1, 5]  # 0 and 3 are right, 4 cannot be read
    assert re.findall(r"(\d+)\.png", part(html, "Summary")) == ["3", "0"]  # the smallest loss first
    assert "<b>cat</b>, predicted as dog, loss 3. 2.png" in html


def test_a_run_without_evaluation_says_why(tmp_path):
    html = report_of(tmp_path, why_not="Nothing is evaluated: synthetic.")
    assert re.findall("<h2>([^<]*)</h2>", html) == SECTIONS
    for title in ("Summary", "Classes", "Confusions", "Worst images"):
        assert "Nothing is evaluated: synthetic." in part(html, title)
    assert "No evaluation yet." in report_of(tmp_path)


def test_the_error_over_time_is_drawn_with_that_of_the_training_batches(tmp_path):
    lines = [{"kind": "train", "step": s, "loss": 1.0, "lr": 0.1, "train_error": 0.5} for s in (1, 2)]
    assert "not drawn: no evaluation yet" in report_of(tmp_path, lines=lines)
    lines += [{"kind": "eval", "step": s, "error": 0.4, "images": 3} for s in (1, 2)]
    html = report_of(tmp_path, lines=lines)
    assert "Error, percent" in html and "test</span>" in html and "training batches</span>" in html
    lines = [{"kind": "eval", "step": s, "top1": 0.4, "top5": 0.9, "images": 3} for s in (1, 2)]
    assert "Accuracy, percent" in report_of(tmp_path, lines=lines)


def test_hostile_names_are_escaped_and_large_images_stay_within_two_megabytes(tmp_path):
    names = ["<script>alert(1)</script>", *(f"class {i} {'<&' * 60}" for i in range(1, 500))]
    labels = np.arange(500)
    shown = predictions(labels, (labels + 1) % 500, losses=-labels, classes=names, size=(500, 400))
    html = report_of(tmp_path, shown, network="<script>alert(2)</script>")
    assert html.count("<script>") == 1 and "&lt;script&gt;alert(1)&lt;/script&gt;" in part(html, "Worst images")
    assert len(html.encode()) < LIMIT and "Left out" not in html and html.count("data:image/jpeg") == WORST


@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_every_section_and_fetches_nothing(opened, tmp_path, width):
    classes = ["<script>alert(1)</script>", *"abcdefghijklmnopqrs"]
    html = report_of(tmp_path / "run", predictions([0, 1, 2], [1, 0, 2], classes=classes))
    shown = opened(html, width=width)
    assert shown.locator("h2").all_inner_texts() == SECTIONS and shown.said == []
    assert shown.evaluate("document.documentElement.scrollWidth") == width
    assert shown.locator(".matrix th").nth(1).inner_text() == classes[0]
    assert shown.locator(".thumbs img").count() == 3
    assert all(shown.locator(".thumbs img").nth(i).evaluate("image => image.naturalWidth") == 32 for i in range(3))

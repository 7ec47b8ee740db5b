import base64
import io
import json
import math
import platform
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from markupsafe import Markup, escape
from PIL import Image

from resbackbone.report import page as page_module
from resbackbone.report.charts import MAX_POINTS, histogram, line_chart, ticks
from resbackbone.report.numbers import duration, number, percent
from resbackbone.report.page import (
    ENVIRONMENT,
    LIMIT,
    MAX_NAME,
    MAX_ROWS,
    Cell,
    Section,
    absent,
    jpeg,
    page,
    short,
    table,
)
from resbackbone.report.run import (
    MEMORY,
    RunLog,
    configuration_section,
    facts_section,
    summary,
    timing_section,
    training_section,
    write_report,
)

HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "' onload='alert(1)", "&lt;b&gt; </style>"]


def everything(name):
    """A page with a name in every place that takes one."""
    written = '<p>{{ name }}</p><svg><title>{{ name }}</title><rect class="{{ name }}"/></svg>'
    parts = [
        Markup(ENVIRONMENT.from_string(written).render(name=name)),
        absent(name),
        table((name, "n"), [(name, 1)], sortable=True),
        line_chart(name, {name: [(0, 1), (1, 2)], f"{name} too": [(0, 2), (1, 1)]}, x=name),
    ]
    return page(name, name, [Section("Names", Markup().join(parts)), Section("Of sorts", paragraph("x"))])


def paragraph(text):
    return Markup("<p>{}</p>").format(text)


def loads(html):
    """The addresses in a page's attributes and styles."""
    addresses = re.findall(r"""(?:src|href|srcset|action|data|poster)\s*=\s*["']([^"']*)""", html)
    return [a for a in [*addresses, *re.findall(r"url\(([^)]*)|@import (\S*)", html)] if not str(a).startswith("#")]


def attributes_of(html):
    """The names of all attributes on a page, as a parser finds them."""
    found = set()
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.update(name for name, _ in attributes)
    parser.feed(html)
    return found


# Text


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_escaped_everywhere(name):
    html, harmless = everything(name), everything("cat")
    assert html.count("<script>") == 1 and html.count("</style>") == 1
    assert html.count("<") == harmless.count("<")  # no element more than with any other name
    attributes = attributes_of(html)
    assert {"class", "href"} < attributes and "src" not in attributes
    assert not [name for name in attributes if name.startswith("on")]
    assert escape(name) in html


def test_no_template_turns_escaping_off():
    templates = [path.read_text(encoding="utf-8") for path in page_module.TEMPLATES.glob("*.html")]
    assert len(templates) > 3 and not [text for text in templates if re.search(r"\bsafe\b|autoescape", text)]


@pytest.mark.parametrize("name", ["\x00\x1b[31m", "\udcff", "\ufffe", "a\x85b"])
def test_control_characters_and_surrogates_are_replaced(name):
    html = everything(name)
    html.encode("utf-8")
    assert "\ufffd" in html and not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffe]", html)


def test_long_names_are_cut():
    assert len(short("x" * 10_000)) == MAX_NAME and short("猫") == "猫"
    assert "x" * (MAX_NAME + 1) not in page("x" * 1000, "x" * 1000, [])


@pytest.mark.parametrize(
    "value, shown",
    [(0, "0"), (1234567, "1,234,567"), (0.5, "0.5"), (-0.25, "-0.25"), (1.23456, "1.235"), (0.0000123, "1.23e-05")]
    + [(None, "n/a"), (math.nan, "n/a"), (math.inf, "n/a"), (1e300, "1.00e+300"), (98765.4, "9.88e+04")],
)
def test_numbers_are_short_and_undefined_ones_are_n_a(value, shown):
    assert number(value) == shown


def test_percent_has_one_decimal():
    assert [percent(v) for v in (0.37, 1, 0, None, math.nan)] == ["37.0", "100.0", "0.0", "n/a", "n/a"]


# The page


def test_a_page_is_complete_and_loads_nothing():
    html = everything("cat")
    assert html.startswith("<!DOCTYPE html>") and html.rstrip().endswith("</html>")
    assert loads(html) == [] and "http://" not in html and "https://" not in html
    assert "default-src &#39;none&#39;" in html and "unsafe" not in html
    assert re.findall('<a href="#([^"]*)"', html) == re.findall('<section id="([^"]*)"', html) == ["names", "of-sorts"]


def test_a_page_over_its_limit_leaves_out_the_largest_section_and_says_so(monkeypatch):
    big = Section("Big", paragraph("é" * 1000) * 2000)
    sections = [Section("Small", paragraph("here")), big, Section("Other", paragraph("there"))]
    html = page("title", "", sections)
    assert len(html.encode()) < LIMIT and "here" in html and "there" in html
    assert "Left out: its 4.0 MB" in html and "Big" in html
    monkeypatch.setattr(page_module, "LIMIT", 10**8)
    size = len(page("title", "", sections).encode())
    for limit in (size, size - 1):
        monkeypatch.setattr(page_module, "LIMIT", limit)
        assert ("Left out" in page("title", "", sections)) is (limit < size)


def test_a_long_table_says_how_many_rows_it_does_not_show():
    html = table(("a", "b"), [("x", i) for i in range(MAX_ROWS + 3)])
    assert html.count("<tr>") == MAX_ROWS + 1 and "3 more rows are not shown." in html
    assert "not shown" not in table(("a",), [("x",)] * MAX_ROWS)


def test_a_cell_is_sorted_by_its_value_and_not_by_its_text():
    html = table(("a", "b"), [("x", Cell("37.0", 0.3701)), ("y", Cell("n/a", None)), ("z", 1500)])
    values = re.findall(r'data-value="([^"]*)">([^<]*)', html)
    assert values == [("0.3701", "37.0"), ("", "n/a"), ("1500.0", "1,500")]


@pytest.mark.parametrize("size", [(1, 1), (3000, 2), (97, 1301)])
def test_a_picture_keeps_its_limits_and_aspect_ratio(size):
    uri = jpeg(Image.effect_noise(size, 90), side=400, limit=6000)
    width, height = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).size
    assert uri.startswith("data:image/jpeg;base64,") and len(uri) <= 6000 and max(width, height) <= 400
    assert width == size[0] or width / height == pytest.approx(size[0] / size[1], rel=0.1) or 1 in (width, height)


# Charts


def curves_of(html):
    """The points of every curve, [n, 2], in the chart's units."""
    paths = re.findall(r'class="curve[^"]*" d="M([^"]*)"', html)
    return [np.array([[float(v) for v in point.split()] for point in path.split("L")]) for path in paths]


def test_a_curve_goes_through_its_points():
    [points] = curves_of(line_chart("t", {"a": [(0, 1.0), (10, 2.0), (20, 4.0)]}, x="x"))
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and x0 < x1
    assert y1 - y2 == pytest.approx(2 * (y0 - y1), abs=0.3) and y0 > y1


@pytest.mark.parametrize("gap", [None, math.nan, math.inf])
def test_a_value_that_is_not_finite_is_a_gap_in_the_curve(gap):
    html = line_chart("t", {"a": [(0, 1.0), (1, 2.0), (2, gap), (3, 2.0), (4, 1.0)]}, x="x")
    assert [len(curve) for curve in curves_of(html)] == [2, 2] and "nan" not in html and "inf" not in html


def points_of(html):
    """{curve: {x: y}} that the pointer shows, in words."""
    found = re.findall(r"""data-name="([^"]*)" data-points='([^']*)'""", html)
    return {name: {x: y for _, x, y in json.loads(points)} for name, points in found}


def test_each_curve_carries_its_values_for_the_pointer():
    html = line_chart("t", {"a": [(0, 1 / 3), (10, None), (1500, 2e6)], "it's": [(5, 1.0)]}, x="updates")
    assert points_of(html) == {"a": {"0": "0.3333", "1,500": "2,000,000"}, "it&#39;s": {"5": "1"}}
    assert points_of(histogram("t", [1, 2, 4], {"a": [3, 1]}, x="x")) == {"a": {"1 to 2": "75.0", "2 to 4": "25.0"}}


def test_a_single_point_is_a_dot_and_no_point_a_sentence():
    html = line_chart("t", {"a": [(7, 3.0)]}, x="x")
    assert html.count("<circle") == 1 and not curves_of(html)
    for points in ([], [(0, None)], [(0, math.nan), (1, None)]):
        assert "No finite value to draw." in line_chart("t", {"a": points}, x="x")


def test_a_long_curve_is_thinned_and_its_band_shows_the_extremes():
    points = [(i, 1.0) for i in range(100_000)]
    points[50_001] = (50_001, 9.0)
    html = line_chart("t", {"a": points}, x="x", y_range=(0, 10))
    [curve] = curves_of(html)
    assert len(curve) == MAX_POINTS and len(html) < 20_000
    [band] = re.findall(r'class="band[^"]*" d="M([^"]*)Z"', html)
    heights = [float(point.split()[1]) for point in band.split("L")]
    flat = max(set(heights), key=heights.count)
    bottom, top = 192, 10  # of the drawing: 0 and 10
    assert min(heights) == pytest.approx(bottom - 0.9 * (bottom - top), abs=0.2)
    assert flat == pytest.approx(bottom - 0.1 * (bottom - top), abs=0.2)


@pytest.mark.parametrize("values", [[0.0], [5.0, 5.0], [-3.0, 2.0], [1e-12, 3e-12], [1e30, 2e30], [0.0, 1e-300]])
def test_any_range_can_be_drawn_inside_its_frame(values):
    for curve in curves_of(line_chart("t", {"a": list(enumerate(values))}, x="x")):
        assert (curve >= 0).all() and (curve[:, 0] <= 420).all() and (curve[:, 1] <= 230).all()


def test_a_histogram_has_a_step_as_high_as_each_bins_share_and_no_empty_ends():
    edges, counts = [1, 2, 4, 8, 16, 32], {"a": [0, 3, 0, 1, 0], "b": [0, 50, 50, 0, 0], "none": [0] * 5}
    html = histogram("t", edges, counts, x="x")
    assert re.findall(r'text-anchor="middle">([^<]*)</text>', html) == ["2", "4", "8", "16", "x"]
    outlines = re.findall(r'class="curve[^"]*" d="M48 192([^"]*)V192"', html)
    high, low = 192 - 182 * 75 / 80, 192 - 182 * 25 / 80  # the axis ends at 80 percent
    heights = [[float(step) for step in re.findall(r"V([\d.]+)H", outline)] for outline in outlines]
    middle = 192 - 182 * 50 / 80
    assert heights == [pytest.approx([high, 192, low], abs=0.06), pytest.approx([middle, middle, 192], abs=0.06)]
    assert outlines[0].endswith("H398.0") and "none" not in html
    assert "No finite value to draw." in histogram("t", edges, {"none": [0] * 5}, x="x")


@pytest.mark.parametrize("low, high", [(0, 1), (0, 90_000), (-0.3, 2.5), (1e-5, 9e-5), (17, 18)])
def test_ticks_are_round_evenly_spaced_and_inside(low, high):
    found = ticks(low, high, 5)
    assert 3 <= len(found) <= 11 and low <= min(found) and max(found) <= high
    steps = np.diff(found)
    assert steps == pytest.approx(steps[0]) and f"{steps[0]:.6e}"[0] in "125" and f"{steps[0]:.6e}"[2:8] == "000000"


def test_one_curve_needs_no_legend_and_two_have_one():
    one, two = ({name: [(0, 1), (1, 2)] for name in names} for names in (["a"], ["a", "b"]))
    assert "<i" not in line_chart("t", one, x="x") and line_chart("t", two, x="x").count("<i ") == 2


# Sections of any run


def run_of(
    tmp_path, *lines, config="data: /somewhere/photos\nbatch_size: 8\nweights: null\neffective:\n  rate: 0.02\n"
):
    (tmp_path / "config.yaml").write_text(config)
    text = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    return RunLog(tmp_path)


def trained(step, loss=1.0, seconds=2.0, **more):
    return {
        "kind": "train",
        "step": step,
        "loss": loss,
        "lr": 0.1,
        "seconds": seconds,
        "data_seconds": 0.5,
        "images_per_second": 8 / seconds,
        **more,
    }


@pytest.mark.parametrize("high, shown", [(2e-4, {"0", "5e-5", "1.5e-4", "2e-4"}), (0.02, {"0.005", "0.02"})])
def test_small_numbers_at_an_axis_are_short(high, shown):
    assert shown <= set(re.findall(r"<text[^>]*>([^<]*)</text>", line_chart("t", {"a": [(0, 0), (9, high)]}, x="x")))


def test_malformed_lines_of_metrics_are_skipped(tmp_path):
    log = run_of(tmp_path, trained(1), {"kind": "eval", "step": 1, "AP": 0.5}, "[]\n", '{"kind": "train"}\n', '{"kin')
    assert [line["step"] for line in log.train] == [1] and log.curve("AP", evaluations=True) == [(1, 0.5)]
    assert log.data_name() == "photos"


def test_timing_weights_a_line_by_its_number_of_updates(tmp_path):
    first, second = trained(10, seconds=1.0), trained(40, seconds=3.0, memory_mib=1536.4)
    log = run_of(tmp_path, first, second, {"kind": "eval", "step": 40, "seconds": 7})
    html = timing_section(log).content
    facts = log.facts()
    assert facts["updates recorded"] == 40 and facts["seconds per update"] == 2.5
    assert facts["images per second"] == pytest.approx(8 / 2.5) and facts[MEMORY] == 1536
    assert where_it_went(html) == {
        "waiting for data": [20, pytest.approx(20 / 107)],
        "rest of the updates": [80, pytest.approx(80 / 107)],
        "evaluations": [7, pytest.approx(7 / 107)],
    }
    assert "Forward and backward are not listed" in html


def where_it_went(html):
    """{part: [seconds, share]}"""
    rows = re.findall(r"<tr><td>([^<]*)</td>(<td[^<]*</td><td[^<]*</td>)<td><svg", html)
    return {name: [float(value) for value in re.findall('data-value="([^"]*)"', cells)] for name, cells in rows}


def test_the_parts_of_an_update_and_the_rest_are_shown(tmp_path):
    parts = {"forward_seconds": 0.4, "backward_seconds": 0.8, "optimizer_seconds": 0.2}
    lines = [trained(5, **parts), trained(10)]  # the second line has only data_seconds
    html = timing_section(run_of(tmp_path, *lines)).content
    assert where_it_went(html) == {
        "waiting for data": [5, 0.25],
        "forward": [2, pytest.approx(0.1)],
        "backward": [4, pytest.approx(0.2)],
        "optimizer": [1, pytest.approx(0.05)],
        "rest of the updates": [pytest.approx(8), pytest.approx(0.4)],
    }
    assert "not listed" not in html and "<figcaption>Images per second</figcaption>" in html


def test_a_summary_has_the_facts_the_results_and_the_files_that_exist(tmp_path):
    run_of(tmp_path, trained(10, seconds=2.0), trained(30, loss=0.25, memory_mib=2500.0))
    (tmp_path / "model.safetensors").touch()
    said = summary(tmp_path, {"AP": "20.0"}, {"detector": "model.safetensors", "report": "report.html"})
    rows = dict(line.strip().split("  ", 1) for line in said.splitlines() if line.startswith("  "))
    assert {name: value.strip() for name, value in rows.items()} == {
        "updates recorded": "30",
        "seconds of updates": "60",
        "seconds per update": "2",
        "images per second": "4",
        "percent of the time waiting for data": "25",
        "seconds of evaluation": "0",
        "peak memory of the main process or its GPU, MiB": "2,500",
        "loss in the last 20 updates": "0.25",
        "AP": "20.0",
    }
    assert said.endswith(f"detector: {tmp_path}/model.safetensors") and "report" not in said


@pytest.mark.parametrize(
    "lines",
    [(), ({"kind": "eval", "step": 0, "AP": 0.1, "seconds": 3.0},), ({"kind": "train", "step": 1, "loss": 2.0},)],
)
def test_a_run_without_updates_has_a_summary_too(lines, tmp_path):
    run_of(tmp_path, *lines)
    assert summary(tmp_path, {"AP": "n/a"}, {}) == "Summary\n  updates recorded  0\n  AP                n/a"


def test_a_new_run_says_what_is_missing(tmp_path):
    log = RunLog(tmp_path)
    assert "Nothing to draw" in training_section(log, Markup()).content
    assert "No time" in timing_section(log).content
    assert "no config.yaml" in configuration_section(log).content


def test_undefined_losses_leave_the_rest_of_the_curve(tmp_path):
    lines = [trained(1, loss=math.nan), trained(2, loss=None), trained(3, loss=2.0), trained(4, loss=1.5)]
    html = training_section(run_of(tmp_path, *lines), Markup()).content
    assert len(curves_of(html)[0]) == 2 and "nan" not in html.lower()


def test_the_configuration_is_complete(tmp_path):
    log = run_of(tmp_path, config="depth: 18\nweights: <b>\neffective:\n  rate: 0.02\n")
    html = configuration_section(log).content
    for name, value in (("depth", "18"), ("weights", "&lt;b&gt;"), ("rate", "0.02")):
        assert f"<dt>{name}</dt><dd>{value}</dd>" in html
    assert "<dt>torch</dt>" in html and "<dt>Python</dt>" in html


def test_the_facts_say_what_was_trained_on_what_and_how_long(tmp_path):
    effective = {"command": "python tools/train.py --data 'a <b>'", "hardware": "CPU, 2 cores", "commit": "0123abcd"}
    effective |= {"processes": 2, "parameters": 41_500_000, "training_images": 205, "classes": 3, "torch": "2.14.1"}
    config = {"data": "a/photos", "batch_size": 8, "effective": {**effective, "resumed": ["after update 20"]}}
    evaluation = {"kind": "eval", "step": 60, "AP": 0.5, "seconds": 5.0}
    log = run_of(tmp_path, trained(60, seconds=61.0, memory_mib=1536.0), evaluation, config=yaml.safe_dump(config))
    html = facts_section(log, {"image sizes": "640 × 480"}).content
    assert "<pre>python tools/train.py --data &#39;a &lt;b&gt;&#39;</pre>" in html
    assert dict(re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", html)) == {
        "data": "a/photos",
        "training images": "205",
        "classes": "3",
        "image sizes": "640 × 480",
        "parameters": "41.5 million",
        "updates": "60 in 1 h 1 min",
        "images per update": "8",
        "evaluations": "1 in 5 s",
        "hardware": "CPU, 2 cores; 2 processes",
        "commit": "0123abcd",
        "resumed": "after update 20",
        "software": f"Python {platform.python_version()}, torch 2.14.1",
    }
    assert log.cost() == {
        "training images": "205",
        "classes": "3",
        "training and evaluation": "1 h 1 min",
        "images per second": "0.131",
        "peak memory": "1.5 GiB",
    }


@pytest.mark.parametrize(
    "seconds, shown",
    [(0, "0 s"), (41.4, "41 s"), (60, "1 min 0 s"), (863.8, "14 min 23 s"), (7500, "2 h 5 min"), (273600, "3 d 4 h")],
)
def test_a_duration_has_its_two_largest_units(seconds, shown):
    assert duration(seconds) == shown


def test_a_report_that_fails_is_one_line_and_keeps_the_previous_one(tmp_path):
    said = []
    assert write_report(tmp_path, lambda: "before", said.append) == tmp_path / "report.html" and said == []
    assert write_report(tmp_path, lambda: 1 / 0, said.append) is None
    assert write_report(tmp_path / "missing", lambda: "page", said.append) is None
    assert len(said) == 2 and "could not be written (ZeroDivisionError: division by zero)" in said[0]
    assert (tmp_path / "report.html").read_text() == "before" and [p.name for p in tmp_path.iterdir()] == [
        "report.html"
    ]


# In a browser


def column(shown, number):
    return shown.locator(f"tbody tr td:nth-child({number})").all_inner_texts()


def test_the_pointer_over_a_chart_shows_the_values_there(opened):
    curves = {"<b>": [(0, 1.0), (100, 2.0), (200, 4.5)], "seldom": [(200, 3.0)], "hidden": [(0, None)]}
    shown = opened(page("t", "", [Section("S", line_chart("t", curves, x="updates"))]))
    box, note = shown.locator("figure svg").bounding_box(), shown.locator(".note")
    assert not note.is_visible()
    for share, lines in ((0.5, ["updates: 100", "<b>: 2"]), (0.9, ["updates: 200", "<b>: 4.5", "seldom: 3"])):
        shown.mouse.move(box["x"] + share * box["width"], box["y"] + box["height"] / 2)
        assert note.inner_text().splitlines() == lines
    shown.mouse.move(0, 0)
    assert not note.is_visible() and shown.said == []


def test_a_click_on_a_heading_sorts_and_a_second_reverses(opened):
    rows = [("b", 3), ("C", Cell("n/a", None)), ("a", 10), ("d", Cell("0.5", 0.5))]
    shown = opened(page("t", "", [Section("S", table(("name", "n", ""), [(*r, "x") for r in rows], sortable=True))]))
    shown.locator("th button").nth(1).click()
    assert column(shown, 2) == ["10", "3", "0.5", "n/a"] and column(shown, 1) == ["a", "b", "d", "C"]
    shown.locator("th button").nth(1).click()
    assert column(shown, 2) == ["0.5", "3", "10", "n/a"]
    shown.locator("th button").nth(0).click()
    assert column(shown, 1) == ["a", "b", "C", "d"]
    assert shown.locator("th").nth(0).get_attribute("aria-sort") == "ascending"
    assert shown.locator("th").nth(1).get_attribute("aria-sort") is None
    assert shown.locator("th button").count() == 2 and shown.said == []


@pytest.mark.parametrize("name", HOSTILE)
def test_a_browser_shows_a_hostile_name_as_text(opened, name):
    shown = opened(everything(name))
    assert shown.locator("p").nth(1).inner_text() == name and shown.title() == name
    assert shown.said == [] and shown.locator("img").count() == 0


def test_the_content_security_policy_blocks_injected_markup(opened):
    slipped = Markup("<img src=x onerror=alert(1)><script>alert(2)</script><p onclick='alert(3)'>click</p>")
    shown = opened(page("t", "", [Section("S", slipped)]))
    shown.get_by_text("click").click()
    assert not [line for line in shown.said if line.startswith("dialog")]
    assert sum("Content Security Policy" in line for line in shown.said) >= 3, shown.said


@pytest.mark.parametrize("width", [320, 390, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_a_page_fits_its_screen_and_follows_light_and_dark(opened, width, dark):
    wide = table([f"column {i}" for i in range(30)], [["x" * 70] * 30])
    chart = line_chart("t", {"x" * 200: [(0, 1), (1, 2)], "b": [(0, 1)]}, x="x")
    shown = opened(page("T" * 70, "s" * 70, [Section("S", wide + chart)]), width=width, dark=dark)
    assert shown.evaluate("document.documentElement.scrollWidth") == width
    background = shown.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") is not dark and shown.said == []

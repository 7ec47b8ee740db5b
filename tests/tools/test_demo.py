import shutil
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import error_line
from PIL import Image

from detection.faster_rcnn import build_faster_rcnn
from detection.responses import look
from detection.saved import save_detector
from detection.shapes import make_shapes
from resbackbone import build_resnet_backbone
from resbackbone.image_io import read_image
from resbackbone.tools import demo

HOSTILE = {3: "<img src=x onerror=alert(1)>", 13: "${alert(2)} {{constructor}} </table>"}
INPUT = "#image input[type=file]"


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    backbone = build_resnet_backbone(18, fpn=True, fpn_channels=16)
    options = {"min_size": 64, "max_size": 97, "box_score_thresh": 0.0, "representation_size": 16}
    return build_faster_rcnn(backbone, 2, categories=HOSTILE, **options).eval()


CPU = torch.device("cpu")


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (50, 61, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


# Without the page


def test_the_threshold_changes_boxes_and_table(detector, photo):
    seen = look(detector, read_image(photo), CPU)
    scores = np.sort(seen.detections["score"])[::-1]
    pictures = []
    for count in (0, 3, len(scores)):
        threshold = 1.0 if count == 0 else float(scores[count - 1])
        picture, listed = demo.boxes(seen, threshold, detector.real_categories)
        pictures.append(np.asarray(picture))
        assert listed.count("<tr>") == (count and count + 1)
        assert f"\n{count} of {len(scores)} boxes score at least {threshold:g}" in listed
    assert not np.array_equal(pictures[0], pictures[1]) and not np.array_equal(pictures[1], pictures[2])
    assert "&lt;img src=x onerror=alert(1)&gt;" in listed and "<img" not in listed
    of_class = int((seen.detections["category_id"] == 13).sum())
    _, listed = demo.boxes(seen, 0.0, detector.real_categories, chosen=[13])
    assert f"{of_class} of {of_class} boxes" in listed and "onerror" not in listed and 0 < of_class < len(scores)


def test_the_samples_are_those_given_or_some_of_the_runs_validation_set(tmp_path, detector, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = make_shapes(tmp_path / "shapes", train_images=1, val_images=9, size=64)
    save_detector(detector, tmp_path / "model.safetensors")
    assert demo.samples(demo.Options(str(tmp_path))) == []
    (tmp_path / "config.yaml").write_text(f"data: {data}\n")
    names = [path.name for path in demo.samples(demo.Options(str(tmp_path)))]
    assert len(names) == 6 and (names[0], names[-1]) == ("000001000001.jpg", "000001000009.jpg")
    assert demo.samples(demo.Options(str(tmp_path), images=(f"{data}/train2017",))) == [*data.glob("train2017/*")]
    shutil.rmtree(data)
    assert demo.samples(demo.Options(str(tmp_path))) == []


def test_every_level_has_a_heat_map_with_a_caption(detector, photo):
    html = demo.levels(look(detector, read_image(photo), CPU))
    assert html.count("<img ") == html.count('src="data:image/jpeg;base64,') == 9
    assert "<b>c2</b>: 64 channels of 20 x 16, stride 4" in html
    assert "<b>p6</b>: 16 channels of 2 x 1, stride 64" in html


def test_wrong_options_and_a_missing_gradio_are_one_line(detector, tmp_path, monkeypatch):
    assert "--port 70000: must be between 1 and 65535" in error_line(demo.main, ["run", "--port", "70000"])
    assert "--device cuda:99: this " in error_line(demo.main, ["run", "--device", "cuda:99"])
    monkeypatch.setitem(sys.modules, "gradio", None)
    said = error_line(demo.main, [tmp_path, "--device", "cpu"])
    assert "the page needs gradio: pip install 'resbackbone[demo]'" in said


# The page


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def samples():
    """A photo that is neither in the working nor in the temporary directory."""
    return sorted(Path(__file__).parents[2].glob("docs/results/*/example.jpg"))


@pytest.fixture(scope="module")
def address(detector, samples):
    pytest.importorskip("gradio", reason="gradio is not installed: pip install gradio")
    options = {"title": "<b>run</b>: 2 classes", "threshold": 0.0, "samples": samples}
    page, port = demo.build_page(detector, CPU, **options), free_port()
    demo.serve(page, port, samples)
    yield f"http://127.0.0.1:{port}"
    page.close(verbose=False)


@pytest.fixture
def page(address, chromium):
    """The page as a phone has it; `said` lists errors, dialogs, and requests to anywhere else."""
    context = chromium.new_context(viewport={"width": 390, "height": 844})
    page = context.new_page()
    page.said = []
    page.on("console", lambda message: message.type == "error" and page.said.append(message.text))
    page.on("pageerror", lambda error: page.said.append(str(error)))
    page.on("dialog", lambda dialog: (page.said.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    own = (address, "data:", f"blob:{address}")
    page.on("request", lambda request: request.url.startswith(own) or page.said.append(request.url))
    page.goto(address)
    yield page
    context.close()


def upload(page, file):
    """Replace the sample that the page starts with."""
    page.get_by_text("The image has 1292 x 506 pixels; the network sees 97 x 37.").wait_for(timeout=60_000)
    page.get_by_role("button", name="Remove").first.click()
    page.set_input_files(INPUT, file)


def test_a_dropped_image_gets_boxes_and_heat_maps_and_the_threshold_filters_the_boxes(page, photo):
    upload(page, photo)
    page.get_by_text("The image has 61 x 50 pixels; the network sees 78 x 64.").wait_for(timeout=60_000)
    assert page.locator("#levels img").count() == 9
    page.wait_for_selector("#picture img", timeout=60_000)
    first = page.locator("#picture img").get_attribute("src")
    text = page.inner_text("#found")
    assert HOSTILE[3] in text and HOSTILE[13] in text and "boxes score at least 0" in text
    assert page.inner_text("h1") == "<b>run</b>: 2 classes"
    number = page.locator("#threshold input[type=number]")
    number.fill("0.99")
    number.press("Enter")
    page.get_by_text("boxes score at least 0.99").wait_for(timeout=60_000)
    assert "0 of 100" in page.inner_text("#found") and HOSTILE[3] not in page.inner_text("#found")
    page.reload()
    page.get_by_text("boxes score at least 0.99").wait_for(timeout=60_000)  # remembered
    page.wait_for_function(f"document.querySelector('#picture img').src !== {first!r}", timeout=60_000)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.said == []


def test_the_page_reports_a_file_that_is_no_image(page, tmp_path):
    (tmp_path / "notes.png").write_text("no image")
    upload(page, tmp_path / "notes.png")
    page.get_by_text("image notes.png: not an image").wait_for(timeout=60_000)
    assert page.locator("#levels img").count() == 0


def test_the_command_serves_on_this_machine_only_until_it_is_interrupted(detector, tmp_path, monkeypatch, capsys):
    gradio = pytest.importorskip("gradio", reason="gradio is not installed: pip install gradio")
    save_detector(detector, tmp_path / "model.safetensors")
    port = free_port()

    def interrupted(self):
        with socket.create_connection(("127.0.0.1", port)):
            assert self.local_url == f"http://127.0.0.1:{port}/" and self.share_url is None
        raise KeyboardInterrupt

    monkeypatch.setattr(gradio.Blocks, "block_thread", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo.main([str(tmp_path), "--device", "cpu", "--port", str(port)])
    assert f"on http://127.0.0.1:{port}, this machine only; Ctrl-C ends it" in capsys.readouterr().out
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        said = error_line(demo.main, [tmp_path, "--device", "cpu", "--port", port])
    assert f"--port {port}: is taken" in said

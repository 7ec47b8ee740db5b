"""A page in the browser: drop an image, see boxes, move the score threshold, see what every level responds to.

pip install -e '.[demo]'                                              gradio, which serves the page
python tools/demo.py runs/shapes-r18-fpn-short
python tools/demo.py torchvision:FasterRCNN_ResNet50_FPN_Weights.COCO_V1 --port 8000
"""

import os
from dataclasses import dataclass
from pathlib import Path

from resbackbone.cli.command import console, main_of, parse

import torch
import tyro
from PIL import Image

from detection.faster_rcnn import FasterRCNN, detector_file, load_detector, prepare_for_detection
from detection.report import draw_boxes
from detection.responses import Look, heat_map, look
from detection.scoring import entries
from resbackbone.checks import UserError
from resbackbone.engine.device import INFERENCE, choose_device, choose_precision, use
from resbackbone.image_io import BadImage, read_image
from resbackbone.report.page import Html, jpeg, short, tag

LOCAL = "127.0.0.1"
MOST_ROWS = 100
HEIGHT = 360  # pixels of the field for the image
PICTURE_BYTES = 200_000
LEVELS = (
    "Brightness is the mean over a level's channels of the activations' magnitudes; every level has a scale of its own."
)
STYLE = """
.levels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(45%, 14rem), 1fr)); gap: 0.8rem }
.levels + .levels { margin-top: 1rem }
.levels figure { margin: 0 }
.levels img { width: 100%; display: block; border-radius: 6px }
.levels figcaption, .found { font-size: 0.85rem }
.found { max-height: 19rem; overflow: auto }
.found table { width: auto; margin: 0 }
.found table, .found tr, .found th, .found td { border: 0 !important }
.found th, .found td { text-align: left; padding: 0.15rem 1rem 0.15rem 0 !important; overflow-wrap: break-word }
.found th:first-child, .found td:first-child { max-width: 38vw }
.found td + td { font-variant-numeric: tabular-nums }
"""


@dataclass(frozen=True)
class Options:
    """Serve a page, on this machine alone, that shows what a detector finds in an image and what its levels see."""

    run: tyro.conf.Positional[str]
    """A run's folder, a weight file of a Faster R-CNN (ours, torchvision's, detectron2's, mmdetection's), or a named
    source: torchvision:FasterRCNN_ResNet50_FPN_Weights.COCO_V1."""
    port: int = 7860
    """Where the page is: http://127.0.0.1:PORT."""
    threshold: float = 0.5
    """Score from which boxes are drawn, to begin with."""
    device: str | None = None
    """cuda, cuda:N, cpu or mps. Default: a GPU if there is one."""
    precision: str | None = None
    """fp32 or bf16 (autocast). Default: bf16 where the device computes in it."""


class Demo:
    """What the page shows, without the page: a detector, and what it makes of an image."""

    def __init__(self, detector: FasterRCNN, device: torch.device, *, bf16: bool = False):
        self.detector, self.device, self.bf16 = detector, device, bf16

    def look(self, path: str | Path) -> Look:
        """Run the network on an image file; BadImage if it cannot be read."""
        try:
            image = read_image(path)
        except BadImage as error:
            raise BadImage(str(error).replace(str(path), Path(path).name)) from None  # not where an upload was kept
        return look(self.detector, image, self.device, bf16=self.bf16)

    def boxes(self, seen: Look, threshold: float) -> tuple[Image.Image, Html]:
        """The image with the boxes that score `threshold` or more, and a table of them; runs no network."""
        names = self.detector.real_categories
        sure = [e for e in entries(seen.detections) if e["category_id"] in names and e["score"] >= threshold]
        rows = [
            tag("tr", tag("td", short(names[e["category_id"]])), tag("td", f"{e['score']:.2f}"), tag("td", _box(e)))
            for e in sure[:MOST_ROWS]
        ]
        count = f"{len(sure)} of {len(seen.detections)} boxes score {threshold:g} or more"
        if len(sure) > MOST_ROWS:
            count += f"; the first {MOST_ROWS} are listed"
        head = tag("tr", *(tag("th", title) for title in ("class", "score", "x, y, width, height")))
        listed = tag("div", tag("table", head, *rows), class_="found") if rows else ""
        return draw_boxes(seen.image, sure, names), tag("div", tag("p", count), listed)

    def levels(self, seen: Look) -> Html:
        """A heat map of every level, with what kind of map it is."""
        figures: dict[str, list[Html]] = {}  # the trunk's, c, and the pyramid's, p
        for level, response in seen.responses.items():
            uri, _ = jpeg(heat_map(seen.image, response), side=480, limit=PICTURE_BYTES)
            height, width = response.values.shape
            said = f"{response.channels} channels of {width} x {height}, stride {response.stride}"
            figures.setdefault(level[0], []).append(
                tag(
                    "figure",
                    tag("img", src=uri, alt=f"response of {level}"),
                    tag("figcaption", tag("b", level), f": {said}"),
                )
            )
        return tag("div", tag("p", LEVELS), *(tag("div", *group, class_="levels") for group in figures.values()))


def _box(entry: dict) -> str:
    return ", ".join(f"{value:.0f}" for value in entry["bbox"])


def main(argv: list[str] | None = None) -> None:
    """A detector -> a page that shows what it does, until Ctrl-C."""
    options = parse(Options, argv)
    if not 0 <= options.threshold <= 1:
        raise UserError(f"--threshold {options.threshold}: a score between 0 and 1 is wanted")
    if not 0 < options.port < 65536:
        raise UserError(f"--port {options.port}: 1 to 65535 are ports")
    device = torch.device(choose_device(options.device))
    bf16 = choose_precision(options.precision, str(device), INFERENCE) == "bf16"
    use(device)
    gradio()
    file = detector_file(options.run)
    detector = load_detector(file).to(device, memory_format=torch.channels_last)
    demo = Demo(prepare_for_detection(detector, bf16=bf16), device, bf16=bf16)
    page = build_page(
        demo, title=f"{Path(options.run).name}: {len(detector.real_categories)} classes", threshold=options.threshold
    )
    serve(page, options.port)
    console.print(f"{file} on http://{LOCAL}:{options.port}, this machine alone; Ctrl-C ends it")
    try:
        page.block_thread()
    finally:
        page.close(verbose=False)


def gradio():
    """The gradio module, told to send nothing anywhere; ValueError if it is not installed."""
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    try:
        import gradio
    except ModuleNotFoundError:
        raise UserError("the page takes gradio: pip install gradio") from None
    return gradio


def build_page(demo: Demo, *, title: str, threshold: float):
    """The page as gradio Blocks: an image and a threshold in, boxes and levels out."""
    gr = gradio()

    class AnyFile(gr.Image):  # gr.Image opens what is given and fails without a word that helps; read_image has one
        is_template = True

        def preprocess(self, payload):
            return None if payload is None else payload.path

    def looked_at(path: str | None, threshold: float):
        if path is None:
            return None, None, "", ""
        try:
            seen = demo.look(path)
        except BadImage as error:
            return None, None, tag("p", tag("b", error)), ""
        return seen, *demo.boxes(seen, threshold), demo.levels(seen)

    def moved(seen: Look | None, threshold: float):
        return (None, "") if seen is None else demo.boxes(seen, threshold)

    with gr.Blocks(title=short(title), analytics_enabled=False) as page:
        gr.HTML(tag("h1", short(title)))
        seen = gr.State()
        with gr.Row():
            with gr.Column():
                image = AnyFile(label="Image", sources=["upload", "clipboard"], height=HEIGHT, elem_id="image")
                score = gr.Slider(0, 1, threshold, step=0.01, label="Score threshold", elem_id="threshold")
            with gr.Column():
                picture = gr.Image(  # without gradio's button that shares on the internet
                    label="Boxes",
                    interactive=False,
                    format="png",
                    buttons=["download", "fullscreen"],
                    elem_id="picture",
                )
        found = gr.HTML(elem_id="found")
        gr.HTML(tag("h2", "What the levels respond to"))
        levels = gr.HTML(elem_id="levels")
        image.change(looked_at, [image, score], [seen, picture, found, levels], api_visibility="private")
        score.change(
            moved,
            [seen, score],
            [picture, found],
            show_progress="hidden",
            trigger_mode="always_last",
            api_visibility="private",
        )
    return page


def serve(page, port: int) -> None:
    """Start to serve the page on this machine alone, in the background; ValueError for a port that is taken."""
    gr = gradio()
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # no font is fetched
    try:
        page.launch(
            server_name=LOCAL,
            server_port=port,
            share=False,
            inbrowser=False,
            quiet=True,
            prevent_thread_lock=True,
            footer_links=[],
            theme=gr.themes.Default(**fonts),
            css=STYLE,
            ssr_mode=False,
            mcp_server=False,
        )
    except OSError:
        raise UserError(f"--port {port}: is taken, or not for users; give another one") from None


if __name__ == "__main__":
    main_of(main)

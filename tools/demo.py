"""A page in the browser: choose or drop an image, see boxes by score and class, see what every level responds to.

pip install -e '.[demo]'                                              gradio, which serves the page
python tools/demo.py runs/shapes-r18-fpn-short
python tools/demo.py torchvision:FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1 --images photos --port 8000
"""

import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resbackbone.cli.command import Auto, Several, console, main_of, parse
from resbackbone.cli.errors import from_option

import torch
import tyro
from markupsafe import Markup
from PIL import Image

from detection.data import open_split
from detection.faster_rcnn import FasterRCNN, prepare_for_detection
from detection.gallery import draw_boxes, spread
from detection.inputs import find_inputs
from detection.layouts import data_of
from detection.responses import Look, heat_map, look
from detection.saved import detector_file, load_detector, run_folder
from detection.scoring import entries
from resbackbone.checks import UserError, require
from resbackbone.engine.device import INFERENCE, choose_device, choose_precision, use
from resbackbone.engine.run import read_yaml
from resbackbone.image_io import BadImage, read_image
from resbackbone.report.page import jpeg, macros, short

LOCAL = "127.0.0.1"
MOST_ROWS = 100
MOST_SAMPLES = 6


@dataclass(frozen=True)
class Options:
    """Serve a page, on this machine only, that shows a detector's boxes in an image and the responses of its levels."""

    run: tyro.conf.Positional[str]
    """A run's folder, a weight file of a Faster R-CNN (ours, torchvision's, detectron2's, mmdetection's), or a named
    source: torchvision:FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1."""
    images: Several[str] = ()
    """Images, folders or quoted patterns, of which the page offers six. Default: of the run's validation set."""
    port: int = 7860
    """Port of the page: http://127.0.0.1:PORT."""
    device: Auto[str] = None
    """cuda, cuda:N, cpu or mps. Default: a GPU, or the CPU if there is none."""


def main(argv: list[str] | None = None) -> None:
    """A detector -> a page that shows what it does, until Ctrl-C."""
    options = parse(Options, argv)
    if not 0 < options.port < 65536:
        raise UserError(f"--port {options.port}: must be between 1 and 65535")
    with from_option("--device"):
        device = torch.device(choose_device(options.device))
    bf16 = choose_precision(None, str(device), INFERENCE) == "bf16"
    use(device)
    gradio()
    file, shown = detector_file(options.run), samples(options)
    detector = prepare_for_detection(load_detector(file).to(device, memory_format=torch.channels_last), bf16=bf16)
    title = f"{Path(options.run).name}: {len(detector.real_categories)} classes"
    page = build_page(detector, device, bf16=bf16, title=title, samples=shown)
    serve(page, options.port, shown)
    console.print(f"{file} on http://{LOCAL}:{options.port}, this machine only; Ctrl-C ends it")
    try:
        page.block_thread()
    finally:
        page.close(verbose=False)


def gradio() -> Any:
    """The gradio module, with its telemetry off. Raises MissingPackage if it is not installed."""
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    require("demo", "gradio", user="the page")
    import gradio

    return gradio


def samples(options: Options) -> list[Path]:
    """A few images to choose from, spread over those of --images or over the run's validation set."""
    config, images = run_folder(options.run) / "config.yaml", []
    if options.images:
        with from_option("--images"):
            images = find_inputs(options.images, Path("detected"), recursive=True).images
            wrong = [str(path) for path in images if not path.is_file()]
            if wrong or not images:
                raise UserError(f"{(wrong or options.images)[0]}: no such image")
    elif config.is_file():
        with suppress(UserError, OSError):  # the data may be gone
            if (data := data_of(read_yaml(config))) is not None:
                dataset = open_split(data, "val", skip_bad_images=True)
                images = [dataset.path(index) for index in range(len(dataset))]
    return [images[index] for index in spread(len(images), MOST_SAMPLES)]


def boxes(
    seen: Look, threshold: float, names: Mapping[int, str], chosen: Collection[int] = ()
) -> tuple[Image.Image, Markup]:
    """The image with the boxes that score at least `threshold`, and a table of them.

    `names` are the categories'; boxes of all of them are shown, or of the `chosen` ones.
    """
    every = [e for e in entries(seen.detections) if e["category_id"] in (chosen or names)]
    found = [e for e in every if e["score"] >= threshold]
    rows = [(names[e["category_id"]], e["score"], e["bbox"]) for e in found[:MOST_ROWS]]
    listed = macros("demo.html").found(rows, len(found), len(every), threshold, seen.image.shape[1:], seen.size)
    return draw_boxes(seen.image, found, names), listed


def levels(seen: Look) -> Markup:
    """A heat map of every level, the trunk's (c) before the pyramid's (p)."""
    figures = [
        (level, response, jpeg(heat_map(seen.image, response), side=480)) for level, response in seen.responses.items()
    ]
    return macros("demo.html").levels([[f for f in figures if f[0][0] == kind] for kind in "cp"])


def build_page(
    detector: FasterRCNN,
    device: torch.device,
    *,
    title: str,
    bf16: bool = False,
    threshold: float = 0.5,
    samples: Sequence[Path] = (),
) -> Any:
    """The page as gradio Blocks: an image, a threshold and classes in, boxes and levels out.

    It starts with the first of the `samples`. The browser remembers the threshold by the title.
    """
    gr, names = gradio(), detector.real_categories

    def show(path: str | None, threshold: float, chosen: list[int]):
        if path is None:
            return None, None, "", ""
        try:
            seen = look(detector, read_image(path), device, bf16=bf16)
        except BadImage as error:
            reason = str(error).replace(path, Path(path).name)  # without the folder of uploads
            return None, None, macros("demo.html").unreadable(reason), ""
        return seen, *boxes(seen, threshold, names, chosen), levels(seen)

    def choose(seen: Look | None, threshold: float, chosen: list[int]):
        return (None, "") if seen is None else boxes(seen, threshold, names, chosen)

    with gr.Blocks(title=short(title), analytics_enabled=False) as page:
        gr.HTML(Markup("<h1>{}</h1>").format(short(title)))
        seen = gr.State()
        with gr.Row():
            with gr.Column():
                image = gr.Image(label="Image", sources=["upload", "clipboard"], height=360, elem_id="image")
                # Its own method would open the file, with no helpful error.
                image.preprocess = lambda payload: None if payload is None else payload.path
                if samples:
                    gr.Examples([[str(path)] for path in samples], image, label="Images to choose from")
                score = gr.Slider(0, 1, threshold, step=0.01, label="Score threshold", elem_id="threshold")
                choices = [(short(name), category) for category, name in names.items()]
                classes = gr.Dropdown(choices, value=[], multiselect=True, label="Classes (none chosen: all)")
            with gr.Column():  # without gradio's button that shares on the internet
                options = {"format": "png", "buttons": ["download", "fullscreen"], "elem_id": "picture"}
                picture = gr.Image(label="Boxes", interactive=False, **options)
        found = gr.HTML(elem_id="found")
        gr.HTML("<h2>What the levels respond to</h2>")
        responses = gr.HTML(elem_id="levels")
        image.change(show, [image, score, classes], [seen, picture, found, responses], api_visibility="private")
        quietly = {"show_progress": "hidden", "trigger_mode": "always_last", "api_visibility": "private"}
        gr.on([score.change, classes.change], choose, [seen, score, classes], [picture, found], **quietly)
        # Without a secret of its own, gradio could not read what it stored before a restart.
        remembered = gr.BrowserState(threshold, storage_key=f"threshold {title}", secret="resbackbone")  # noqa: S106
        score.change(lambda value: value, score, remembered, **quietly)
        restored = page.load(lambda value: value, remembered, score, **quietly)
        if samples:
            restored.then(lambda: str(samples[0]), None, image, show_progress="hidden", api_visibility="private")
    return page


def serve(page: Any, port: int, samples: Sequence[Path] = ()) -> None:
    """Start to serve the page on this machine only, in the background. Raises UserError for a port that is taken.

    gradio reads no files outside the working and the temporary directory but these `samples`.
    """
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
            theme=gradio().themes.Default(**fonts),
            css=macros("demo.html").style,
            ssr_mode=False,
            mcp_server=False,
            allowed_paths=[str(path.absolute()) for path in samples],
        )
    except OSError:
        raise UserError(f"--port {port}: is taken or not permitted; choose another") from None


if __name__ == "__main__":
    main_of(main)

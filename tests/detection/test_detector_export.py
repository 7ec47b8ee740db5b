"""Exported detectors, run by ONNX Runtime, OpenVINO and torch, against the detectors they were made from."""

import gc
import json
import math
import subprocess
import sys
import warnings
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from made import FEW, lively, small_detector
from prints import prints_into
from torch import Tensor, nn

from detection import build_faster_rcnn
from detection.export import (
    LARGEST,
    OUTPUTS,
    ExportedDetector,
    load_exported,
    nms_in_onnx,
    nms_one_by_one,
    resized_sides,
    sigmoid_in_onnx,
)
from detection.faster_rcnn import prepare_for_detection
from detection.paper import build_vgg16_backbone
from detection.roi_heads import Detections
from resbackbone import build_resnet_backbone
from resbackbone.export import export_network

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

ODD_SIZES = [(1, 33, 41), (2, 97, 64), (1, 200, 311), (3, 61, 122), (1, 13, 13)]  # batch, height, width
CASCADE = (0.5, 0.6, 0.7)
NMS = torch.ops.resbackbone.nms_sorted.default


def runs_of(path: Path):
    """What runs the file, and the file as a function; without OpenVINO the test is skipped when all else has passed."""
    if path.suffix == ".pt2":
        module = torch.export.load(path).module()
        yield "torch", lambda *inputs: [out] if isinstance(out := module(*inputs), Tensor) else out
        return
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(*inputs):
        return [torch.tensor(x) for x in session.run(None, dict(zip(names, (x.numpy() for x in inputs), strict=True)))]

    yield "onnxruntime", run
    openvino = pytest.importorskip("openvino", reason="openvino is not installed: pip install openvino")
    model = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    yield "openvino", lambda *inputs: [torch.tensor(output) for output in model([x.numpy() for x in inputs]).values()]


def assert_finds_the_same(run, detector, images: Tensor) -> int:
    """The number of detections, which are the detector's, image by image, with zeros behind."""
    boxes, scores, labels, count = run(images)
    with torch.no_grad():
        expected = detector([image / 255 if image.dtype == torch.uint8 else image for image in images])
    assert count.tolist() == [len(found["boxes"]) for found in expected]
    for i, found in enumerate(expected):
        n = len(found["boxes"])
        assert torch.equal(labels[i, :n], found["labels"])
        torch.testing.assert_close(boxes[i, :n], found["boxes"], rtol=0, atol=1e-3)
        torch.testing.assert_close(scores[i, :n], found["scores"], rtol=0, atol=1e-5)
        assert not boxes[i, n:].any() and not scores[i, n:].any() and not labels[i, n:].any()
    return int(count.sum())


def vgg16(**options):
    return build_faster_rcnn(build_vgg16_backbone(), 3, variant="vgg16", **{**FEW, **options})


@pytest.mark.parametrize(
    "make, suffix",
    [
        (lambda: small_detector("c4", geometry="detectron2", global_context=True), "onnx"),
        (lambda: small_detector("fpn", geometry="detectron2"), "pt2"),
        (lambda: small_detector("fpn", geometry="detectron2"), "onnx"),
        (lambda: small_detector("dc5", global_context=True), "onnx"),
        (lambda: small_detector("dc5"), "pt2"),
        (vgg16, "onnx"),
        (lambda: small_detector("fpn", cascade_ious=CASCADE), "onnx"),
        (lambda: small_detector("fpn", cascade_ious=CASCADE), "pt2"),
    ],
    ids=[
        "c4 with context",
        "detectron2 pt2",
        "detectron2",
        "dc5 with context",
        "dc5 pt2",
        "vgg16",
        "cascade",
        "cascade pt2",
    ],
)
@pytest.mark.slow  # the detector of `export` below, with a pyramid, runs everywhere too
def test_every_kind_of_detector_is_exported_and_finds_the_same_at_any_batch_and_size(tmp_path, make, suffix):
    detector = lively(make())
    path = tmp_path / f"detector.{suffix}"
    detector.export(path)
    assert_runs_everywhere(runs_of(path), detector, torch.uint8)


@pytest.mark.parametrize(
    "make",
    [
        lambda: small_detector("fpn", geometry="detectron2", box_conv_layers=(16,), box_norm="BN", rpn_conv_depth=2),
        lambda: small_detector("dc5", global_context=True),
        lambda: small_detector("dc5", image_mean=(123.0, 117.0, 104.0), image_std=(58.0, 57.0, 57.0)),
        vgg16,
        lambda: small_detector("fpn", cascade_ious=CASCADE),
    ],
    ids=["like torchvision's V2", "dc5 with context", "pixels in 0..255", "vgg16", "cascade"],
)
def test_every_kind_of_detector_finds_the_same_in_the_form_that_is_exported(make):
    detector = lively(make())
    network = ExportedDetector(prepare_for_detection(deepcopy(detector)))
    images = torch.randint(0, 256, (2, 3, 61, 122), dtype=torch.uint8)
    expected = detector(list(images.float() if detector.transform.image_mean[0] > 1 else images / 255))
    found = Detections(*network(images)).as_list()
    assert sum(len(of_image["boxes"]) for of_image in expected) > 20
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def assert_runs_everywhere(runs, detector, dtype: torch.dtype) -> None:
    for name, run in runs:
        found = 0
        for size in ODD_SIZES:
            images = torch.randint(0, 256, (size[0], 3, *size[1:]), dtype=torch.uint8)
            found += assert_finds_the_same(run, detector, images if dtype == torch.uint8 else images / 255)
        assert found > 20, name
        images = torch.full((1, 3, 1, 98), 100).to(dtype)  # the detector would resize it to less than a pixel
        boxes, *_, count = run(images)
        assert count > 0 and (boxes >= 0).all() and boxes[..., 2].max() <= 98 and boxes[..., 3].max() <= 1.001, name


class Sides(nn.Module):
    """The resized sides of images [B, C, H, W]."""

    def __init__(self, shorter: int, longer: int):
        super().__init__()
        self.shorter, self.longer = shorter, longer

    def forward(self, images: Tensor) -> Tensor:
        sides = torch.stack([torch.scalar_tensor(side, dtype=torch.int64) for side in images.shape[2:]])
        return resized_sides(sides, self.shorter, self.longer)


@pytest.mark.parametrize("shorter, longer", [(800, 1333), (64, 97)])
def test_sides_are_resized_as_torchvision_does_it_in_fp64_also_where_there_is_no_fp64(tmp_path, shorter, longer):
    path = tmp_path / "sides.onnx"
    network, example = Sides(shorter, longer), torch.zeros(2, 1, 50, 70, dtype=torch.uint8)
    export_network(network, path, example, outputs=["sides"], metadata={})
    sides = torch.randint(1, 3000, (300, 2)) // torch.randint(1, 60, (300, 2)) + 1
    sides[::3, 1] = sides[::3, 0] * 3 // 2  # products that are whole numbers, where fp64 may lose a pixel
    sides[0], sides[1] = torch.tensor([LARGEST, 7]), torch.tensor([1201, 333])
    expected, lost = [], 0
    for height, width in sides.tolist():
        scale = min(shorter / min(height, width), longer / max(height, width))
        expected.append([math.floor(height * scale), math.floor(width * scale)])
        lost += min(expected[-1]) < shorter and max(expected[-1]) < longer
    assert lost  # by which a computation in exact numbers would differ
    for name, run in [("torch", lambda images: [network(images)]), *runs_of(path)]:
        for (height, width), resized in zip(sides.tolist(), expected, strict=True):
            images = torch.zeros(1, 1, height, width, dtype=torch.uint8)
            assert run(images)[0].tolist() == resized, f"{height} x {width} in {name}"


class Suppression(nn.Module):
    """Boxes as "images" [problems, 4, N, 2], twice; those without width or height are not valid."""

    def __init__(self, threshold: float):
        super().__init__()
        self.threshold = threshold

    def forward(self, images: Tensor) -> Tensor:
        boxes = images[..., 0].transpose(1, 2)
        valid = (boxes[..., 2:] > boxes[..., :2]).all(2)
        return torch.ops.resbackbone.nms_sorted(boxes, valid, self.threshold)


@pytest.mark.parametrize("threshold, suffix", [(0.7, "onnx"), (0.5, "onnx"), (0.3, "onnx"), (0.7, "pt2")])
def test_suppression_is_torchvisions_exactly_for_boxes_whose_overlap_is_the_threshold_too(tmp_path, threshold, suffix):
    path, network = tmp_path / f"nms.{suffix}", Suppression(threshold)
    operators = {NMS: (nms_in_onnx, nms_one_by_one)}
    export_network(network, path, torch.rand(3, 4, 5, 2), outputs=["keep"], metadata={}, operators=operators)
    for problems, count in [(1, 1), (2, 2), (3, 33), (7, 150)]:
        low = torch.randint(0, 30, (problems, 2, count))
        boxes = torch.cat((low, low + torch.randint(0, 21, low.shape)), 1)
        boxes[:, :, ::2] = torch.tensor([0, 0, 10, 10])[:, None]
        boxes[:, 2, ::2] -= torch.arange(len(boxes[0, 0, ::2])) % 10  # IoUs are 0.1, 0.2, .. of each other
        images = boxes[..., None].float().expand(-1, -1, -1, 2)
        for name, run in runs_of(path):
            [keep], [none] = run(images), run(-images)
            assert torch.equal(keep, network(images)) and keep.any(), name
            assert not none.any()  # nothing is valid


def condition(detector):
    modules = {name: (type(module), module.training) for name, module in detector.named_modules()}
    return modules, {name: (id(p), p.requires_grad) for name, p in detector.named_parameters()}


@pytest.fixture(scope="module")
def export(module_path):
    """A detector on two maps, the fewest of a pyramid, the folder of its two files, and what exporting did besides."""
    torch.manual_seed(0)
    backbone = build_resnet_backbone(18, fpn=True, fpn_channels=16, levels=["p2", "p3"])
    categories = {3: "car", 13: "stop sign", 90: "cup"}
    detector = lively(build_faster_rcnn(backbone, 3, categories=categories, **{**FEW, "box_score_thresh": 0.2}))
    detector.train().roi_heads.eval()
    detector.rpn.head.requires_grad_(False)
    before, state = condition(detector), deepcopy(detector.state_dict())
    gc.collect()  # what other tests left open warns here
    with (
        open(module_path / "said.txt", "w+") as said,
        warnings.catch_warnings(record=True) as warned,
        prints_into(said),
    ):
        warnings.simplefilter("always")
        detector.export(module_path / "detector.onnx")
        detector.export(module_path / "detector.pt2", input_type="float32")
    conditions = before, condition(detector)
    states = state, deepcopy(detector.state_dict())
    said, warned = (module_path / "said.txt").read_text(), [str(warning.message) for warning in warned]
    return SimpleNamespace(
        detector=detector.eval(), folder=module_path, said=said, warned=warned, conditions=conditions, states=states
    )


@pytest.fixture
def exported(export):
    return export.detector, export.folder


@pytest.fixture(scope="module")
def program(export):
    """The detector's .pt2 read, which takes seconds, and its metadata."""
    files = {"metadata.json": ""}
    program = torch.export.load(export.folder / "detector.pt2", extra_files=files)
    return program.module(), json.loads(files["metadata.json"])


def test_export_prints_nothing_and_leaves_the_detector_as_it_is(export):
    assert export.said == "" and not export.warned
    before, after = export.conditions
    assert after == before
    torch.testing.assert_close(*export.states, rtol=0, atol=0)


def test_an_onnx_finds_what_the_detector_does_at_any_batch_and_size(exported):
    detector, folder = exported
    assert_runs_everywhere(runs_of(folder / "detector.onnx"), detector, torch.uint8)


def test_floats_in_0_to_1_are_taken_too_in_a_pt2(exported, program):
    assert_runs_everywhere([("torch", program[0])], exported[0], torch.float32)


def test_either_kind_of_file_runs_by_one_function(exported):
    detector, folder = exported
    pixels = torch.randint(0, 256, (2, 3, 50, 71), dtype=torch.uint8)
    expected = detector(list(pixels / 255))
    for found in load_exported(folder / "detector.onnx")(pixels), load_exported(folder / "detector.pt2")(pixels / 255):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def test_a_pt2_needs_torch_and_torchvision_alone(exported):
    code = (
        "import sys, torch, torchvision\n"
        "boxes, *_, count = torch.export.load(sys.argv[1]).module()(torch.rand(1, 3, 50, 71))\n"
        "assert count > 0 and boxes.isfinite().all() and not {'detection', 'resbackbone'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code, exported[1] / "detector.pt2"], check=True, cwd=exported[1])


def test_an_exported_file_says_what_it_takes_what_its_labels_are_and_at_which_thresholds(exported, program):
    detector, folder = exported
    model = onnx.load(folder / "detector.onnx")
    onnx.checker.check_model(model, full_check=True)
    images, *outputs = (
        (value.name, [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim])
        for value in (*model.graph.input, *model.graph.output)
    )
    assert images == ("images", ["batch", 3, "height", "width"])
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert [name for name, _ in outputs] == list(OUTPUTS)
    assert [sizes for _, sizes in outputs] == [["batch", 100, 4], ["batch", 100], ["batch", 100], ["batch"]]
    in_onnx = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    _, in_pt2 = program
    assert in_onnx["input"] == {"type": "uint8", "range": [0, 255], "channels": "RGB"}
    assert in_pt2["input"] == {"type": "float32", "range": [0, 1], "channels": "RGB"}
    assert in_onnx == {**in_pt2, "input": in_onnx["input"]}
    assert in_pt2["categories"] == [
        {"label": 1, "id": 3, "name": "car"},
        {"label": 2, "id": 13, "name": "stop sign"},
        {"label": 3, "id": 90, "name": "cup"},
    ]
    assert (in_pt2["score_threshold"], in_pt2["nms_threshold"], in_pt2["detections_per_image"]) == (0.2, 0.5, 100)
    assert in_pt2["resized_to"] == {"shorter_side": 64, "longest_side": 97}
    assert in_pt2["detector"] == detector.config.to_json() and in_pt2["backbone"] == detector.backbone.config.to_json()


def test_an_exported_file_holds_nothing_of_this_machine(exported):
    _, folder = exported
    for suffix in ("onnx", "pt2"):
        assert str(Path(__file__).parents[2]).encode() not in (folder / f"detector.{suffix}").read_bytes()


@pytest.mark.slow
def test_a_detector_prepared_for_inference_exports_as_it_is_and_thresholds_are_those_of_now(tmp_path):
    detector = prepare_for_detection(lively(small_detector("dc5")))
    image = torch.randint(0, 256, (3, 65, 90), dtype=torch.uint8)
    [everything] = detector([image / 255])
    detector.roi_heads.score_thresh = everything["scores"].median().item()
    detector.export(tmp_path / "detector.pt2")
    [found], [expected] = load_exported(tmp_path / "detector.pt2")(image[None]), detector([image / 255])
    assert 0 < len(found["boxes"]) < len(everything["boxes"])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def _with_hook(detector):
    detector.roi_heads.box_head.register_forward_hook(lambda *_: None)


def _with_method(detector):
    detector.transform.normalize = lambda image: image


def _with_head(detector):
    detector.roi_heads.box_head = nn.Sequential(nn.Flatten(), nn.Linear(512 * 49, 16))


def _with_coder(detector):
    class Coder(type(detector.rpn.box_coder)):
        pass

    detector.rpn.box_coder = Coder((1.0, 1.0, 1.0, 1.0))


def _with_large_side(detector):
    detector.transform.max_size = 10**9


@pytest.mark.parametrize(
    "change, message",
    [
        (_with_hook, r"roi_heads\.box_head has hooks, which an exported file would not have: undo this"),
        (_with_method, r"transform has normalize, which an exported file would not have"),
        (_with_head, r"roi_heads\.box_head is Sequential, and .* would make it TwoMLPHead: .*, or undo the change"),
        (
            _with_coder,
            "rpn has a helper, or a function of torchvision, replaced, which an exported file would not have",
        ),
        (_with_large_side, r"min_size and max_size are 64 and 1000000000: an export takes whole numbers up to 32767"),
    ],
)
def test_a_detector_that_the_file_would_not_be_is_refused_in_one_sentence(tmp_path, change, message):
    detector = small_detector("dc5")
    change(detector)
    with pytest.raises(ValueError, match=message) as error:
        detector.export(tmp_path / "detector.onnx")
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "file, options, message",
    [
        ("detector.pth", {}, r"unknown suffix '\.pth'; choose from \.onnx, \.pt2"),
        ("nowhere/detector.pt2", {}, "no folder .*nowhere to export to"),
        ("detector.pt2", {"input_type": "int8"}, "unknown input type 'int8'; choose from uint8, float32"),
    ],
)
def test_a_path_or_type_that_will_not_do_is_refused_in_one_sentence(tmp_path, file, options, message):
    with pytest.raises(ValueError, match=message):
        small_detector("dc5").export(tmp_path / file, **options)
    assert not list(tmp_path.iterdir())


def test_onnxruntime_that_is_missing_is_named_with_the_command_that_installs_it(exported, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"running an \.onnx needs onnxruntime: pip install 'resbackbone\[export\]'"):
        load_exported(exported[1] / "detector.onnx")


class Sigmoid(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.sigmoid()


def test_small_scores_are_told_apart_as_in_pytorch(tmp_path):
    images = torch.linspace(-80, 20, 1001).view(1, 1, 7, 143)
    operators = {torch.ops.aten.sigmoid.default: (sigmoid_in_onnx, None)}
    example = torch.zeros(2, 1, 5, 6)
    export_network(Sigmoid(), tmp_path / "net.onnx", example, outputs=["y"], metadata={}, operators=operators)
    for _, run in runs_of(tmp_path / "net.onnx"):
        torch.testing.assert_close(run(images)[0], images.sigmoid(), rtol=1e-5, atol=0)

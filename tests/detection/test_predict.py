import copy
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from made import lively, small_detector
from PIL import Image

from detection import load_detector, save_detector
from detection.faster_rcnn import prepare_for_detection
from detection.foreign import NOT_A_CLASS
from resbackbone.checks import MissingPackage, UserError
from resbackbone.engine.checkpoints import save_checkpoint
from resbackbone.image_io import BadImage, read_image
from resbackbone.tools import detect

CATEGORIES = {3: "car", 12: NOT_A_CLASS, 90: "toothbrush"}
HEIGHT, WIDTH = 50, 61


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    return lively(small_detector(categories=CATEGORIES))


@pytest.fixture(autouse=True)
def photo(tmp_path, monkeypatch):
    """In an empty folder: photos of two sizes in photos/, and what is no image. Returns c.png's pixels [H, W, 3]."""
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    for name, pixels in {"c.png": noise, "a.png": noise[:33], "b.png": np.flip(noise, 0)}.items():
        Image.fromarray(pixels).save(f"photos/{name}")
    Path("photos/notes.txt").touch()
    return noise


def assert_same(found, wanted, tolerance=0.0):
    assert len(found) == len(wanted) > 0 and found.names == wanted.names and found.image_size == wanted.image_size
    torch.testing.assert_close(found.boxes_xyxy, wanted.boxes_xyxy, rtol=0, atol=tolerance)
    torch.testing.assert_close(found.scores, wanted.scores, rtol=0, atol=tolerance / 10)


def test_an_image_in_any_form_gives_the_boxes_of_its_file(detector, photo):
    wanted = detector.predict("photos/c.png", score=0)
    assert wanted.image_size == (HEIGHT, WIDTH) and wanted.path == Path("photos/c.png")
    tensor = torch.from_numpy(photo).permute(2, 0, 1)
    alpha = np.dstack([photo, np.full_like(photo[:, :, 0], 7)])
    turned = Image.fromarray(np.rot90(photo))
    turned.getexif()[0x0112] = 6  # which turns it by 90 degrees clockwise
    readonly = photo[:, :, ::-1].copy()[:, :, ::-1]
    readonly.flags.writeable = False
    given = [Path("photos/c.png"), Image.fromarray(photo), Image.fromarray(alpha), turned, photo, alpha, readonly]
    for found in detector.predict([*given, tensor, photo / 255], score=0):
        assert_same(found, wanted)
    wanted, *others = detector.predict(  # in another order in memory, which rounds differently
        ["photos/c.png", tensor.contiguous(), (tensor / 255).double().requires_grad_()], score=0, precision="fp32"
    )
    for found in others:
        assert_same(found, wanted, 1e-2)


def test_gray_pixels_are_three_equal_colours(detector, photo):
    gray = photo[:, :, 1]
    Image.fromarray(gray).save("gray.png")
    given = [gray, gray[:, :, None], torch.from_numpy(gray.copy())[None], Image.fromarray(gray)]
    wanted, *others = detector.predict(["gray.png", *given], score=0, precision="fp32")
    for found in others:
        assert_same(found, wanted, 1e-2)


def test_a_list_or_folder_gives_a_list_and_each_image_the_boxes_that_it_gets_alone(detector, photo):
    folder = detector.predict("photos", score=0, precision="fp32")
    assert [found.path.name for found in folder] == ["a.png", "b.png", "c.png"]
    for found in folder:
        assert_same(found, detector.predict(found.path, score=0, precision="fp32"))
    mixed = detector.predict([photo, Path("photos")], score=0, batch_size=3, precision="fp32")
    for found, wanted in zip(mixed, [folder[2], *folder], strict=True):
        assert_same(found, wanted, 1e-2)
    assert [len(detector.predict(images)) for images in (["photos/a.png"], [])] == [1, 0]


def test_boxes_are_bit_for_bit_those_of_detect_and_load_detector_takes_a_run(detector, capsys):
    save_checkpoint(Path("run"), 2, lambda folder: save_detector(detector, folder / "model.safetensors"), nbytes=1)
    detect.main(["run", "photos/c.png", "photos/a.png", "--device", "cpu", "--output", "found", "--threshold", "0.3"])
    written = json.loads(Path("found/detections.json").read_text())
    loaded = load_detector("run")
    ours = loaded.predict(["photos/c.png", "photos/a.png"], score=0)
    assert written == [
        {"image": str(found.path), "category": name, **entry}
        for i, found in enumerate(ours, 1)
        for name, entry in zip(found.names, found.to_coco(i), strict=True)
    ]
    sure = loaded.predict("photos/c.png", score=0.3)
    assert 0 < len(sure) < len(ours[0]) and sure.scores.min() >= 0.3
    assert f"photos/c.png: {len(sure)} found" in capsys.readouterr().out
    sure.save("ours.jpg")
    assert Path("ours.jpg").read_bytes() == Path("found/c.jpg").read_bytes()


def test_names_and_ids_are_those_of_the_labels_where_ids_have_gaps_and_outputs_stand_for_no_class(detector):
    found = detector.predict("photos/c.png", score=0)
    assert {*zip(found.labels.tolist(), found.category_ids.tolist(), found.names, strict=True)} == {
        (1, 3, "car"),
        (3, 90, "toothbrush"),
    }
    everything = prepare_for_detection(copy.deepcopy(detector))([read_image("photos/c.png") / 255])[0]["labels"]
    assert 2 in everything  # which had to be left out
    assert repr(found.at_least(2)) == "Prediction(photos/c.png, 61 x 50 pixels: nothing found)"
    assert f"{found.names.count('car')} car" in repr(found)


def test_the_detector_stays_as_it_is_and_trains_on(detector):
    training = copy.deepcopy(detector).train()
    training.roi_heads.eval()  # a part that the user keeps in eval mode
    modes = [module.training for module in training.modules()]
    before = {name: (tensor.data_ptr(), tensor._version) for name, tensor in training.state_dict().items()}
    assert_same(training.predict("photos/c.png", score=0), detector.predict("photos/c.png", score=0))
    assert [module.training for module in training.modules()] == modes
    assert {name: (tensor.data_ptr(), tensor._version) for name, tensor in training.state_dict().items()} == before
    assert all(parameter.requires_grad for parameter in training.roi_heads.parameters())
    with torch.no_grad():
        training.roi_heads.box_predictor.cls_score.bias[1] += 50  # no earlier copy remains
    assert set(training.predict("photos/c.png").names) == {"car"}
    training.roi_heads.score_thresh = 2.0
    assert not training.predict("photos/c.png", score=0)


def test_a_detector_that_is_ready_is_not_copied(detector, monkeypatch):
    wanted = detector.predict("photos/c.png", score=0)
    ready = prepare_for_detection(copy.deepcopy(detector))
    monkeypatch.setattr("detection.predict.copy.deepcopy", None)
    assert_same(ready.predict("photos/c.png", score=0), wanted)


def test_the_pixels_that_were_given_are_drawn_on_and_the_file_of_the_image_is_not_written_over(detector, photo):
    found = detector.predict(photo / 255)
    np.testing.assert_array_equal(found.picture(), detector.predict(photo).picture())
    found.boxes_xyxy[:] = 0  # an ordinary tensor, not one of inference mode
    of_file = detector.predict("photos/c.png")
    for path, says in (
        ("photos/../photos/c.png", "is the image itself"),
        ("boxes.what", "boxes.what: cannot be written"),
        ("no/boxes.png", "no/boxes.png: cannot be written"),
    ):
        with pytest.raises(UserError, match=says):
            of_file.save(path)
    of_file.save("boxes.jpg")
    assert Image.open("boxes.jpg").format == "JPEG" and Image.open("photos/c.png").size == (WIDTH, HEIGHT)


def test_supervision_gets_what_was_found_or_is_named(detector, monkeypatch):
    found = detector.predict("photos/c.png", score=0)
    monkeypatch.setitem(sys.modules, "supervision", None)
    monkeypatch.setattr("detection.predict.find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match="pip install supervision"):
        found.to_supervision()
    monkeypatch.undo()
    stand_in = SimpleNamespace(Detections=SimpleNamespace, __spec__=SimpleNamespace())
    monkeypatch.setitem(sys.modules, "supervision", stand_in)
    given = found.to_supervision()
    assert given.xyxy.shape == (len(found), 4) and given.data["class_name"].tolist() == found.names
    assert given.class_id.tolist() == found.labels.tolist() and given.confidence.dtype == np.float32


ARRAY = np.zeros((5, 7, 3), np.float32)


@pytest.mark.parametrize(
    "image, says",
    [
        ("https://example.org/photo.jpg", "is a URL, and predict reads files; download it first"),
        ("nowhere.jpg", "image nowhere.jpg: no such file"),
        ("photos/notes.txt", "image photos/notes.txt: empty file"),
        (["photos/c.png", "clip.MP4"], "clip.MP4: is a video; use tools/detect.py"),
        ("empty", "empty: holds no image"),
        (ARRAY + 200, "from 200 to 200; floats are in 0..1: divide it by 255"),
        (torch.full((3, 5, 7), -2.0), "leave out your own normalization"),
        (ARRAY + np.nan, "from nan to nan; floats are in 0..1"),
        (ARRAY.astype(np.uint16), "an array of uint16: pixels are uint8 in 0..255 or floats in 0..1"),
        (torch.zeros(3, 5, 7, dtype=torch.int64), "a tensor of torch.int64: pixels are"),
        (ARRAY.transpose(2, 0, 1), r"an array \[H, W, 3\], not \[3, 5, 7\]"),
        (torch.from_numpy(ARRAY), r"a tensor \[3, H, W\], not \[5, 7, 3\]"),
        (torch.zeros(2, 3, 5, 7), r"not \[2, 3, 5, 7\]; give several images as a list"),
        (ARRAY[:0], "has no pixels"),
        (7, "an image is a file, a PIL image, .* not 7"),
    ],
)
def test_what_is_no_image_is_one_line(detector, image, says):
    Path("empty").mkdir()
    with pytest.raises(UserError, match=says) as error:
        detector.predict(image)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("options", [{"score": 50}, {"score": float("nan")}, {"batch_size": 0}, {"precision": "fp8"}])
def test_options_out_of_range_are_refused(detector, options):
    with pytest.raises(UserError, match=next(iter(options))):
        detector.predict("photos/c.png", **options)


def test_a_broken_file_in_a_folder_is_named(detector):
    Path("photos/b.png").write_bytes(Path("photos/b.png").read_bytes()[:90])
    with pytest.raises(BadImage, match="image photos/b.png: cannot be decoded"):
        detector.predict("photos")

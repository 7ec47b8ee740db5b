import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import error_line
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detection.faster_rcnn import build_faster_rcnn
from detection.predict import predictions
from detection.saved import save_detector
from detection.video import Video, video_file
from resbackbone import build_resnet_backbone
from resbackbone.cli.command import main_of
from resbackbone.engine.checkpoints import save_checkpoint
from resbackbone.tools import detect

CATEGORIES = {3: "car", 13: "stop sign"}


@pytest.fixture(scope="module")
def run(module_path):
    torch.manual_seed(0)
    backbone = build_resnet_backbone(18, fpn=True, fpn_channels=16)
    options = {"min_size": 64, "max_size": 97, "box_score_thresh": 0.0, "representation_size": 16}
    save_detector(build_faster_rcnn(backbone, 2, categories=CATEGORIES, **options), module_path / "model.safetensors")
    return module_path


@pytest.fixture(autouse=True)
def photos(tmp_path, monkeypatch):
    """In an empty folder: a photo, a tall grey one, and one of the first's name elsewhere."""
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (50, 61, 3), dtype=np.uint8)
    Path("other").mkdir()
    for name, image in [("a.png", noise), ("b.jpg", noise[:, :21, 0]), ("other/a.png", noise[:33])]:
        Image.fromarray(np.ascontiguousarray(image)).save(name)


def detected(*argv):
    detect.main([*map(str, argv), "--device", "cpu"])


def error_of(*argv):
    return error_line(lambda words: detected(*words), argv)


def test_every_image_gets_a_picture_and_all_detections_are_written(run, capsys):
    detected(run, "a.png", "b.jpg", "--output", "found")
    assert sorted(path.name for path in Path("found").iterdir()) == ["a.jpg", "b.jpg", "detections.json"]
    assert Image.open("found/a.jpg").format == "JPEG"
    detections = json.loads(Path("found/detections.json").read_text())
    assert {entry["image"] for entry in detections} == {"a.png", "b.jpg"}
    for entry in detections:
        width, height = (61, 50) if entry["image"] == "a.png" else (21, 50)
        x, y, w, h = entry["bbox"]
        assert entry["category"] == CATEGORIES[entry["category_id"]] and 0 <= entry["score"] <= 1
        assert x >= 0 and y >= 0 and x + w <= width + 1e-3 and y + h <= height + 1e-3
    said = capsys.readouterr().out
    assert "a.png: " in said and "b.jpg: " in said and "found/detections.json" in said


def test_what_a_run_that_still_trains_finds_is_in_its_folder_and_not_in_the_checkpoints(run, tmp_path):
    save_checkpoint(tmp_path / "run", 2, lambda folder: shutil.copy(run / "model.safetensors", folder), nbytes=1)
    detected("run", "a.png")
    assert (tmp_path / "run" / "detected" / "detections.json").is_file()


def test_what_the_best_weights_of_a_run_find_is_beside_them_as_the_run_replaces_their_folder(run, monkeypatch):
    best = Path("run/best")
    shutil.copytree(run, best, ignore=shutil.ignore_patterns("detected"))
    (best / "best.json").write_text("{}")
    kept = list(best.iterdir())
    detected(best, "a.png")
    monkeypatch.chdir(best)
    detected("model.safetensors", "../../b.jpg", "--no-pictures")
    assert sorted(path.name for path in Path("../detected-best").iterdir()) == ["a.jpg", "detections.json"]
    assert [path.name for path in Path().iterdir()] == [path.name for path in kept]


def test_the_threshold_decides_what_is_drawn_and_not_what_is_written(run, capsys):
    written, drawn = [], []
    for threshold in ("0", "1"):
        detected(run, "a.png", "--threshold", threshold, "--output", threshold, "--format", "png")
        written.append(json.loads(Path(threshold, "detections.json").read_text()))
        drawn.append(np.asarray(Image.open(Path(threshold, "a.png"))))
    assert written[0] == written[1] and len(written[0]) > 0
    assert not np.array_equal(*drawn)
    said = capsys.readouterr().out
    assert f"a.png: {len(written[0])} found" in said and "a.png: 0 found" in said


def test_images_of_one_name_get_pictures_of_their_own(run):
    detected(run / "model.safetensors", "a.png", "other/a.png", "b.jpg")  # by default beside the detector
    found = run / "detected"
    assert sorted(path.name for path in found.glob("*.jpg")) == ["a-2.jpg", "a.jpg", "b.jpg"]
    detections = json.loads((found / "detections.json").read_text())
    assert {entry["image"] for entry in detections} == {"a.png", "other/a.png", "b.jpg"}


@pytest.mark.parametrize(
    "argv", [("other/a.png", "--output", "other", "--format", "png"), ("a.png", "b.jpg", "--output", ".")]
)
def test_the_images_themselves_are_never_written_over(run, argv):
    before = {path: path.read_bytes() for path in Path().rglob("*.*g")}
    assert "an output would replace the input" in error_of(run, *argv)
    assert {path: path.read_bytes() for path in Path().rglob("*.*g")} == before


def test_a_broken_image_is_named_and_the_others_are_done(run, capsys):
    Path("b.jpg").write_bytes(Path("b.jpg").read_bytes()[:200])
    assert error_of(run, "b.jpg", "--output", "found").startswith("error: image b.jpg: cannot be decoded")
    said = error_of(run, "b.jpg", "a.png", "--output", "found")
    assert said == (
        "error: 1 of 2 images, named above, cannot be read; with --skip-bad-images the exit status is 0 all the same"
    )
    assert "skipped image b.jpg: cannot be decoded" in capsys.readouterr().out
    assert images_in() == ["a.png"] and Path("found/a.jpg").is_file()
    detected(run, "b.jpg", "a.png", "--output", "found", "--skip-bad-images")
    assert "skipped image b.jpg: cannot be decoded" in capsys.readouterr().out
    assert error_of(run, "b.jpg", "nowhere.png", "--output", "found").startswith("error: none of these 2 images can be")
    assert images_in() == ["a.png"]  # as before


def test_ctrl_c_keeps_what_is_done(run, monkeypatch, capsys):
    def interrupted(detector, images, **options):
        os.kill(os.getpid(), signal.SIGINT)
        return predictions(detector, images, **options)

    monkeypatch.setattr(detect, "predictions", interrupted)
    with pytest.raises(SystemExit) as exit:
        main_of(lambda: detected(run, "a.png", "b.jpg", "other/a.png", "--output", "found"))
    assert exit.value.code == 130 and capsys.readouterr().err == "interrupted after 1 of 3 images\n"
    assert images_in() == ["a.png"] and Path("found/a.jpg").is_file()


def test_wrong_input_is_one_line_that_names_it(run):
    assert "no-run: no such run folder or file" in error_of("no-run", "a.png")
    assert "other holds no detector" in error_of("other", "a.png")
    assert "INPUTS is missing: Images, folders of images" in error_of(run)
    assert "image nowhere.png: no such file" in error_of(run, "nowhere.png", "--output", "found")
    assert "--threshold 1.5: must be from 0 to 1" in error_of(run, "a.png", "--threshold", "1.5")
    assert "--threshold" in error_of(run, "a.png", "--threshold", "high")
    assert "unknown format 'gif'; choose from jpg, png" in error_of(run, "a.png", "--format", "gif")
    assert "unknown precision 'fp8'" in error_of(run, "a.png", "--precision", "fp8")
    assert "--output a.png: is a file; give a folder" in error_of(run, "b.jpg", "--output", "a.png")
    assert not Path("found/detections.json").exists()
    assert "RUN is missing: A run's folder, " in error_line(detect.main, [])


# What is looked at


def images_in(file="found/detections.json"):
    return list(dict.fromkeys(entry["image"] for entry in json.loads(Path(file).read_text())))


def test_folders_and_patterns_are_looked_at_beside_files(run):
    Path("set/deep").mkdir(parents=True)
    for name in ("z.PNG", "m.jpg", "deep/a.png"):
        Image.open("a.png").save(Path("set", name))
    for _ in range(2):  # the second time its own pictures are there
        detected(run, "set", "othe*/*.png", "--output", "set/found", "--recursive")
        assert images_in("set/found/detections.json") == ["set/deep/a.png", "set/m.jpg", "set/z.PNG", "other/a.png"]


def test_what_names_no_image_is_one_line(run):
    Path("set").mkdir()
    assert "set: holds no image (.jpg, " in error_of(run, "set")
    assert "*.webp: no file matches this pattern" in error_of(run, "*.webp")
    assert "--batch-size 0: must be at least 1" in error_of(run, "a.png", "--batch-size", "0")


# What is written


def test_in_batches_every_image_gets_the_boxes_that_it_gets_alone(run):
    noise = np.random.default_rng(1).integers(0, 256, (6, 50, 61, 3), dtype=np.uint8)
    for i, image in enumerate(noise):
        Image.fromarray(image if i != 2 else image[:, :33]).save(f"n{i}.png")
    names = [f"n{i}.png" for i in range(6)]
    for options in (["--output", "alone"], ["--output", "batches", "--batch-size", "4"]):
        detected(run, *names, "--no-pictures", "--precision", "fp32", *options)
    alone, batches = (json.loads(Path(folder, "detections.json").read_text()) for folder in ("alone", "batches"))
    assert [e["image"] for e in alone] == [e["image"] for e in batches] and {e["image"] for e in alone} == set(names)
    for one, other in zip(alone, batches, strict=True):
        assert one["category"] == other["category"] and one["score"] == pytest.approx(other["score"], abs=1e-4)
        assert one["bbox"] == pytest.approx(other["bbox"], abs=1e-2)


def test_nothing_found_is_an_empty_list(run):
    Path("b.jpg").write_bytes(b"")
    detected(run, "b.jpg", "--skip-bad-images", "--output", "found")
    assert json.loads(Path("found/detections.json").read_text()) == []


def write_annotations(path, names, categories=CATEGORIES):
    images = [{"id": 70 + i, "file_name": name, "width": 61, "height": 50} for i, name in enumerate(names)]
    content = {"images": images, "annotations": []}
    content["categories"] = [{"id": i, "name": name} for i, name in categories.items()]
    content["annotations"] = [{"id": 1, "image_id": 70, "category_id": 3, "bbox": [1, 2, 30, 40], "area": 1200}]
    content["annotations"][0]["iscrowd"] = 0
    Path(path).write_text(json.dumps(content))


def test_detections_have_the_ids_of_the_annotations_and_are_what_pycocotools_takes(run):
    write_annotations("truth.json", ["other/a.png", "b.jpg", "a.png"])
    detected(run, "a.png", "other/a.png", "--annotations", "truth.json", "--no-pictures", "--output", "found")
    assert [path.name for path in Path("found").iterdir()] == ["detections.json"]
    found = json.loads(Path("found/detections.json").read_text())
    assert {e["image"]: e["image_id"] for e in found} == {"a.png": 72, "other/a.png": 70}
    truth = COCO("truth.json")
    results = truth.loadRes("found/detections.json")
    COCOeval(truth, results, "bbox").evaluate()
    assert len(results.anns) == len(found) > 0


def test_quiet_leaves_warnings_and_the_last_line(run, capsys):
    Path("b.jpg").write_bytes(b"")
    detected(run, "a.png", "b.jpg", "--skip-bad-images", "--output", "found", "--quiet")
    assert capsys.readouterr().out.splitlines() == [
        "skipped image b.jpg: empty file",
        "all detections: found/detections.json",
    ]


# Videos


@pytest.fixture
def clip():
    """Five frames of 64 x 48 at 10 a second."""
    pytest.importorskip("cv2", reason="OpenCV is not installed: pip install opencv-python-headless")
    noise = np.random.default_rng(0).integers(0, 256, (5, 48, 64, 3), dtype=np.uint8)
    with video_file(Path("clip.mp4"), 10.0) as add:
        for frame in noise:
            add(Image.fromarray(frame))
    return Path("clip.mp4")


def test_a_video_becomes_a_video_with_boxes_and_a_list_of_its_frames(run, clip):
    detected(run, clip, "a.png", "--output", "found", "--batch-size", "2")
    assert sorted(p.name for p in Path("found").iterdir()) == [
        "a.jpg",
        "clip-frames.json",
        "clip.mp4",
        "detections.json",
    ]
    frames = json.loads(Path("found/clip-frames.json").read_text())
    assert [(f["frame"], f["seconds"]) for f in frames] == [(0, 0.0), (1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)]
    assert all(frame["detections"] for frame in frames)
    entry = frames[0]["detections"][0]
    assert set(entry) == {"category", "category_id", "bbox", "score"} and entry["bbox"][2] <= 64
    drawn = Video(Path("found/clip.mp4"))
    shapes = {frame.shape for frame in drawn}
    assert drawn.rate == 10 and drawn.count == 5 and shapes == {(3, 480, 640)}  # enlarged, as small pictures are


def test_a_camera_is_a_number_and_ctrl_c_ends_it_with_all_that_it_saw(run, monkeypatch, capsys):
    class Camera:
        name, rate, count = "camera 3", 30.0, None

        def __init__(self, source):
            assert source == 3  # not the next one

        def __iter__(self):
            yield torch.zeros(3, 48, 64, dtype=torch.uint8)
            os.kill(os.getpid(), signal.SIGINT)
            yield torch.full((3, 48, 64), 9, dtype=torch.uint8)
            raise AssertionError("not stopped")

    monkeypatch.setattr(detect, "Video", Camera)
    detected(run, "3", "4", "--output", "found", "--no-pictures")
    assert [path.name for path in Path("found").iterdir()] == ["camera-3-frames.json"]
    assert len(json.loads(Path("found/camera-3-frames.json").read_text())) == 2
    assert "camera 3: " in capsys.readouterr().out
    detected(run, "3", "--output", "found", "--no-pictures", "--max-frames", "1")
    assert len(json.loads(Path("found/camera-3-frames.json").read_text())) == 1


def test_a_video_is_not_written_over(run, clip):
    before = clip.read_bytes()
    assert "an output would replace the input clip.mp4" in error_of(run, clip, "--output", ".")
    assert clip.read_bytes() == before


def test_a_broken_video_is_one_line(run, clip):
    Path("broken.mp4").write_bytes(b"nothing of the kind")
    assert "broken.mp4: not a video that OpenCV can read" in error_of(run, "broken.mp4", "--output", "found")
    assert not list(Path("found").iterdir())

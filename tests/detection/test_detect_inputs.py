import json
import os
from pathlib import Path

import pytest

from detection.inputs import Inputs, find_inputs, frames_file, image_ids_of, output_files


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.jpg", "a.PNG", "notes.txt", "clip.mp4", "deep/a.png", "deep/er/z.webp", "odd[1].png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()


def found(*words, output="found", **options):
    images, videos = find_inputs(words, Path(output), **options)
    return [str(path) for path in images], [str(video) for video in videos]


def test_a_folder_gives_its_images_by_name_and_recursively_those_of_subfolders():
    assert found(".") == (["a.PNG", "b.jpg", "odd[1].png"], [])
    below = ["deep/a.png", "deep/er/z.webp"]
    assert found(".", recursive=True) == (["a.PNG", "b.jpg", *below, "odd[1].png"], [])
    assert found("deep", recursive=True) == (below, [])


def test_pictures_of_an_earlier_call_are_left_out_unless_their_folder_is_given():
    assert found(".", recursive=True, output="deep") == (["a.PNG", "b.jpg", "odd[1].png"], [])
    assert found("deep", output="deep") == (["deep/a.png"], [])


def test_patterns_files_videos_and_cameras_keep_their_order_without_duplicates():
    assert found("b.jpg", "**/*.[pP]*", "./b.jpg", "0", "clip.mp4") == (
        ["b.jpg", "a.PNG", "deep/a.png", "odd[1].png"],
        ["0", "clip.mp4"],
    )
    assert found("*.mp4") == ([], ["clip.mp4"])
    assert found("odd[1].png") == (["odd[1].png"], [])  # a file's name, though it looks like a pattern


def test_missing_files_are_kept_and_a_file_named_by_digits_is_no_camera():
    assert found("nowhere.jpg", "nowhere.mp4") == (["nowhere.jpg"], ["nowhere.mp4"])
    Path("7").touch()
    assert found("7") == (["7"], [])


def test_a_folder_without_images_and_a_pattern_without_files_are_rejected():
    Path("empty").mkdir()
    Path("above/deep").mkdir(parents=True)
    Path("above/deep/x.png").touch()
    with pytest.raises(ValueError, match=r"^empty: holds no image \(.jpg, .*\)$"):
        found("empty", recursive=True)
    with pytest.raises(ValueError, match="^above: holds no image .*; try --recursive$"):
        found("above")
    with pytest.raises(ValueError, match=r"\*.gif: no file matches this pattern"):
        found("*.gif")


def test_images_in_a_folder_that_are_not_read_are_counted(caplog):
    for name in ("photos/a.HEIC", "photos/b.heic", "photos/c.pdf"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    with pytest.raises(ValueError, match=r"^photos: holds no image .*: left out 2 .heic, 1 .pdf; convert them to"):
        found("photos")
    Path("photos/d.jpg").touch()
    assert found("photos") == (["photos/d.jpg"], [])
    assert caplog.messages == ["photos: left out 2 .heic, 1 .pdf; convert them to JPEG or PNG"]


def test_a_quoted_pattern_may_begin_at_home(monkeypatch):
    monkeypatch.setenv("HOME", os.getcwd())
    Path("mine.png").touch()
    assert found("~/mine.*") == ([f"{os.getcwd()}/mine.png"], [])


def test_outputs_are_named_after_their_inputs_and_are_distinct():
    images = [Path("x/a.jpg"), Path("y/a.png"), Path("a-1.png"), Path("b.tif")]
    videos = [Path("a.avi"), Path("z/a.mp4"), 2]
    names = [file.name for file in output_files(Inputs(images, videos), Path("found")).values()]
    assert names == ["a.jpg", "a-2.jpg", "a-1.jpg", "b.jpg", "a.mp4", "a-6.mp4", "camera-2.mp4"]
    images = [Path(f"{folder}/{name}.png") for folder in "xyz" for name in ("a", "a-3", "a-3-4")]
    assert len(set(output_files(Inputs(images, []), Path("found")).values())) == 9
    assert frames_file(Path("found/a-2.mp4")) == Path("found/a-2-frames.json")


def test_no_input_is_overwritten():
    with pytest.raises(ValueError, match="^deep: an output would replace the input deep/a.png; choose another folder$"):
        output_files(Inputs([Path("deep/../deep/a.png")], []), Path("deep"), "png")
    with pytest.raises(ValueError, match="an output would replace the input clip.mp4"):
        output_files(Inputs([], [Path("clip.mp4")]), Path("."))


CATEGORIES = {3: "car", 13: "stop sign"}


def annotations(*names, categories=CATEGORIES):
    images = [{"id": 70 + i, "file_name": name, "width": 61, "height": 50} for i, name in enumerate(names)]
    content = {"images": images, "categories": [{"id": i, "name": name} for i, name in categories.items()]}
    Path("truth.json").write_text(json.dumps({**content, "annotations": []}))
    return Path("truth.json")


def test_image_ids_come_from_the_longest_matching_name_or_count_from_1():
    images = [Path("a.png"), Path("deep/a.png"), Path("b.jpg")]
    truth = annotations("b.jpg", "deep/a.png", "a.png")
    assert image_ids_of(images, truth, CATEGORIES) == [72, 71, 70]
    assert image_ids_of(images, None, CATEGORIES) == [1, 2, 3]


def test_image_ids_are_found_under_names_with_backslashes_and_ambiguous_ones_refused():
    assert image_ids_of([Path("deep/a.png")], annotations(r"deep\a.png", "a.png"), CATEGORIES) == [70]
    with pytest.raises(ValueError, match="^truth.json: has no image named a.png; it may be A.png or a.PNG$"):
        image_ids_of([Path("a.png")], annotations("A.png", "a.PNG"), CATEGORIES)


def test_a_file_that_several_inputs_or_several_ids_claim_is_refused():
    with pytest.raises(ValueError, match="has no image named x/a.png; it may be a.png, and so may .*/y/a.png$"):
        image_ids_of([Path("x/a.png"), Path("y/a.png")], annotations("a.png"), CATEGORIES)
    with pytest.raises(ValueError, match="^truth.json: names a.png for 2 images; leave one of them$"):
        image_ids_of([Path("a.png")], annotations("a.png", "b.png", "a.png"), CATEGORIES)


def test_annotations_of_other_images_or_categories_are_rejected():
    with pytest.raises(ValueError, match="^truth.json: has no image named a.png$"):
        image_ids_of([Path("a.png")], annotations("b.jpg"), CATEGORIES)
    with pytest.raises(ValueError, match="^truth.json: its categories differ from the detector's$"):
        image_ids_of([Path("a.png")], annotations("a.png", categories={3: "car", 14: "stop sign"}), CATEGORIES)

import json

import numpy as np
import pytest
import torch
from PIL import Image

from detection.coco import CocoImages
from detection.report import GAP, MIN_SIDE, class_colour, draw_boxes, save_pictures


def data_set(folder, count=3, size=(9, 7), names=("cat",), boxes=((1, 1, 5, 4),)):
    """Grey images 1.. of `size` (width, height), each with `boxes`."""
    images = [{"id": i, "file_name": f"{i}.png", "width": size[0], "height": size[1]} for i in range(1, count + 1)]
    annotations = [{"image_id": image["id"], "category_id": 5, "bbox": list(box)} for image in images for box in boxes]
    categories = [{"id": 5 + i, "name": name} for i, name in enumerate(names)]
    folder.mkdir(exist_ok=True)
    for image in images:
        Image.new("RGB", size, (100, 100, 100)).save(folder / image["file_name"])
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(content))
    return CocoImages(folder, folder / "instances.json")


def colours(picture):
    return {tuple(pixel) for pixel in np.asarray(picture).reshape(-1, 3).tolist()}


def grey(height, width):
    return torch.full((3, height, width), 100, dtype=torch.uint8)


def test_a_picture_shows_truth_and_detections_side_by_side_for_a_tiny_image_too(tmp_path):
    dataset = data_set(tmp_path / "images", count=1)
    found = [{"image_id": 1, "category_id": 5, "bbox": [2, 2, 6, 4], "score": 0.9}]
    [path] = save_pictures(tmp_path / "pictures", dataset, found)
    assert path == tmp_path / "pictures" / "000000000001.png"
    picture = Image.open(path)
    zoom = -(-MIN_SIDE // 7)
    assert picture.size == (2 * 9 * zoom + GAP, 7 * zoom + 26)
    left, right = (picture.crop((x, 26, x + 9 * zoom, picture.height)) for x in (0, 9 * zoom + GAP))
    assert class_colour(0) in colours(left) and class_colour(0) in colours(right)
    assert left.tobytes() != right.tobytes()


def test_detections_of_a_low_score_or_of_other_images_are_not_drawn(tmp_path):
    dataset = data_set(tmp_path / "images", count=1, boxes=())
    found = [
        {"image_id": 1, "category_id": 5, "bbox": [2, 2, 6, 4], "score": 0.49},
        {"image_id": 2, "category_id": 5, "bbox": [2, 2, 6, 4], "score": 0.9},
    ]
    [nothing] = save_pictures(tmp_path / "pictures", dataset, found)
    assert class_colour(0) not in colours(Image.open(nothing))
    [drawn] = save_pictures(tmp_path / "pictures", dataset, found, threshold=0.4)
    assert class_colour(0) in colours(Image.open(drawn))


@pytest.mark.parametrize("count, names", [(0, []), (1, [1]), (3, [1, 3, 5]), (12, [1, 2, 3, 4, 5])])
def test_as_many_pictures_as_asked_for_are_spread_over_the_data_set(tmp_path, count, names):
    dataset = data_set(tmp_path / "images", count=5)
    written = save_pictures(tmp_path / "pictures", dataset, [], count=count)
    assert [int(path.stem) for path in written] == names
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == sorted(path.name for path in written)


def test_an_image_that_cannot_be_read_has_no_picture(tmp_path):
    dataset = data_set(tmp_path / "images", count=3)
    (tmp_path / "images" / "2.png").write_bytes(b"")
    assert [int(path.stem) for path in save_pictures(tmp_path / "pictures", dataset, [])] == [1, 3]


@pytest.mark.parametrize("name", ["猫 🐈", "\u0000\ufffe", "", "two\nlines", "a" * 300, "[bold]red[/bold]"])
def test_any_class_name_can_be_drawn(name):
    entries = [{"category_id": 5, "bbox": [2, 3, 20, 10], "score": 0.5}]
    assert class_colour(0) in colours(draw_boxes(grey(33, 40), entries, {5: name}, title=name))


def test_a_box_is_drawn_where_it_is_and_nothing_without_boxes():
    assert colours(draw_boxes(grey(500, 600), [], {5: "cat"})) == {(100, 100, 100)}
    picture = np.asarray(draw_boxes(grey(500, 600), [{"category_id": 5, "bbox": [200, 150, 300, 250]}], {5: "cat"}))
    rows, columns = np.nonzero(np.any(picture != 100, axis=-1))
    assert (columns.min(), columns.max(), rows.max()) == (200, 500, 400)
    assert 100 < rows.min() < 150  # the label stands above the box
    assert (picture[200:380, 220:480] == 100).all()


def test_a_large_image_keeps_its_size_and_a_title_goes_above_it():
    assert draw_boxes(grey(481, 640), [], {}).size == (640, 481)
    assert draw_boxes(grey(481, 640), [], {}, title="truth").size == (640, 507)


def test_a_sliver_of_an_image_is_not_enlarged_beyond_measure():
    width, height = draw_boxes(grey(2, 1500), [], {}).size
    assert width * height < 20e6


def test_classes_have_light_colours_of_their_own():
    assert len({class_colour(i) for i in range(80)}) == 80
    assert all(sum(class_colour(i)) > 250 for i in range(80))

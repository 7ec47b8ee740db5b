import json
import math
from collections import Counter
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made import CATEGORIES, content
from PIL import Image
from torch.utils.data import DataLoader

from detection.annotations import read_annotations
from detection.coco import CocoImages, ImageRequest, usable_boxes
from detection.data import open_split
from detection.shapes import make_shapes
from detection.transforms import TrainTransform
from resbackbone.image_io import BadImage


def write(folder, what, split="train"):
    """`what` as a data set in COCO's layout, its images drawn in noise; (image folder, annotation file)."""
    images, annotations = folder / f"{split}2017", folder / "annotations" / f"instances_{split}2017.json"
    images.mkdir(parents=True, exist_ok=True)
    annotations.parent.mkdir(exist_ok=True)
    annotations.write_text(json.dumps(what))
    for image in what["images"]:
        Image.fromarray(noise(image["height"], image["width"])).save(images / image["file_name"])
    return images, annotations


def noise(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def opened(folder, what, **options):
    return CocoImages(*write(folder, what), **options)


# The official layout


def test_category_ids_become_labels_from_1_in_their_order_and_boxes_corners(tmp_path):
    dataset = opened(tmp_path, content(boxes=[(1.5, 2, 10, 8)] * 3))
    assert dataset.categories == {3: "car", 13: "stop sign", 90: "toothbrush"}
    image, target = dataset[0]
    assert target["labels"].tolist() == [3, 1, 2] and target["boxes"].tolist() == [[1.5, 2, 11.5, 10]] * 3
    assert torch.equal(image, torch.from_numpy(noise(21, 33)).permute(2, 0, 1))
    assert (target["labels"].dtype, target["boxes"].dtype, target["image_id"]) == (torch.int64, torch.float32, 7)


@pytest.mark.parametrize("split, boxes, crowds", [("train", 444, 6), ("val", 569, 11)])
def test_real_coco_is_read_whole_but_for_its_crowds(data, split, boxes, crowds):
    dataset = open_split(data / "coco_tiny", split)
    assert (len(dataset), len(dataset.categories), dataset.report["crowds"]) == (50, 80, crowds)
    ids, raw = list(dataset.categories), json.loads(dataset.annotation_file.read_text())
    wanted, found = Counter(), Counter()
    for annotation in raw["annotations"]:
        if not annotation["iscrowd"]:
            wanted[annotation["image_id"], annotation["category_id"]] += 1
    for index in range(50):
        target = dataset.target(index)
        found.update((target["image_id"], ids[label - 1]) for label in target["labels"].tolist())
    dropped = wanted - found
    assert not found - wanted and sum(wanted.values()) == boxes - crowds
    assert sum(dropped.values()) == dataset.report["boxes under a pixel or outside their image"]


def test_images_without_objects_or_with_crowds_alone_are_kept_or_left_out(tmp_path):
    what = content(images=3, boxes=[(0, 0, 5, 5), (0, 0, 30, 20)])
    what["annotations"][1].update(iscrowd=1, image_id=8)
    kept = opened(tmp_path, what)
    assert len(kept) == 3 and kept.report["crowds"] == 1 and "crowds (1)" in kept.summary()
    assert all(kept[i][1]["boxes"].shape == (0, 4) and kept[i][1]["labels"].shape == (0,) for i in (1, 2))
    left = opened(tmp_path, what, keep_empty=False)
    assert left.image_ids.tolist() == [7]
    assert left.report["images without a usable box"] == 2


def test_an_image_after_one_left_out_keeps_its_file_and_its_boxes(tmp_path):
    what = content(images=3, boxes=[(1, 2, 10, 8), (0, 0, 5, 5)])
    what["annotations"][0]["image_id"], what["annotations"][1]["image_id"] = 9, 8
    left = opened(tmp_path, what, keep_empty=False)
    assert [left.path(i).name for i in range(2)] == ["8.png", "9.png"]
    assert [left.target(i)["boxes"].tolist() for i in range(2)] == [[[0, 0, 5, 5]], [[1, 2, 11, 10]]]
    assert [left.target(i)["image_id"] for i in range(2)] == [8, 9]


def test_what_is_done_to_a_target_is_not_done_to_the_data_set(tmp_path):
    dataset = opened(tmp_path, content())
    target = dataset.target(0)
    target["boxes"] += 1
    target["labels"] += 1
    assert dataset.target(0)["boxes"].tolist() == [[1, 2, 11, 10]] and dataset.target(0)["labels"].tolist() == [3]


def test_a_draw_gives_the_same_sample_for_the_same_seed_and_leaves_the_random_state(tmp_path):
    def transform(image, target):
        return image + torch.randint(0, 9, (1,)).byte(), target

    dataset = opened(tmp_path, content(), transform=transform)
    before = torch.get_rng_state()
    one, again, *others = (dataset[ImageRequest(0, seed)][0] for seed in (5, 5, *range(4)))
    assert torch.equal(one, again) and any(not torch.equal(one, other) for other in others)
    assert torch.equal(before, torch.get_rng_state())


def with_pasting(folder, images=3):
    """Images 7, of three objects, and 8 and 9, of none, that get objects of one another."""
    boxes = ((1, 2, 10, 8), (12, 2, 8, 8), (22, 9, 11, 12))
    transform = TrainTransform((21,), 99, flip=0, copy_paste=1.0)
    return opened(folder, content(images=images, boxes=boxes), transform=transform)


def test_objects_of_another_image_are_pasted_by_the_seed_of_the_sample(tmp_path):
    dataset = with_pasting(tmp_path)
    drawn = [dataset[ImageRequest(1, seed)] for seed in range(30)]
    assert {8} == {target["image_id"] for _, target in drawn}
    counts = Counter(len(target["boxes"]) for _, target in drawn)
    assert {0, 1, 2} <= counts.keys() and 10 < counts[0] < 25  # one partner of two has none
    for seed, (image, target) in enumerate(drawn):
        torch.rand(1)  # whatever state the process is in
        again, same = dataset[ImageRequest(1, seed)]
        assert torch.equal(again, image) and torch.equal(same["boxes"], target["boxes"])


@pytest.mark.parametrize("images", [1, 2])
def test_an_image_gets_no_objects_of_its_own(tmp_path, images):
    dataset = with_pasting(tmp_path, images=images)
    drawn = [dataset[ImageRequest(0, seed)][1]["labels"].tolist() for seed in range(20)]
    assert drawn == [dataset.target(0)["labels"].tolist()] * 20  # what is pasted comes last


def test_a_broken_partner_is_an_error_value_or_named_and_nothing_pasted(tmp_path):
    dataset = with_pasting(tmp_path)
    (dataset.folder / "7.png").write_bytes(b"")
    assert {isinstance(dataset[ImageRequest(1, seed)], BadImage) for seed in range(30)} == {True, False}
    dataset.skip_bad_images = True
    drawn = [dataset[ImageRequest(1, seed)][1] for seed in range(30)]
    assert all(len(target["boxes"]) == 0 for target in drawn)
    assert {len(target["skipped"]) for target in drawn} == {0, 1}


# Broken images


broken_files = pytest.mark.parametrize(
    "harm, says",
    [
        (lambda path: path.unlink(), "no such file"),
        (lambda path: Image.fromarray(noise(33, 20)).save(path), "is 20 x 33, annotations say 33 x 21"),
        (lambda path: Image.fromarray(noise(33, 21)).save(path), "they have width and height swapped"),
    ],
)


@broken_files
@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_gives_a_broken_image_as_a_value_with_its_message(tmp_path, harm, says, workers):
    dataset = opened(tmp_path, content(images=3))
    harm(dataset.folder / "8.png")
    first, bad, last = DataLoader(dataset, batch_size=None, num_workers=workers)
    assert isinstance(bad, BadImage) and "8.png" in str(bad) and says in str(bad)
    assert first[1]["image_id"] == 7 and last[1]["image_id"] == 9


@broken_files
def test_a_broken_image_is_drawn_as_a_value_or_skipped_and_named(tmp_path, harm, says):
    dataset = opened(tmp_path, content(images=3))
    harm(dataset.folder / "9.png")
    assert isinstance(dataset[ImageRequest(2, 0)], BadImage)
    dataset.skip_bad_images = True
    image, target = dataset[ImageRequest(2, 0)]
    assert target["image_id"] == 7 and len(target["boxes"]) == 1 and image.shape == (3, 21, 33)
    [message] = target["skipped"]
    assert "9.png" in message and says in message
    assert dataset[ImageRequest(1, 0)][1]["skipped"] == []


def test_with_no_readable_image_at_all_skipping_ends_in_an_error_value(tmp_path):
    dataset = opened(tmp_path, content(images=2), skip_bad_images=True)
    for path in dataset.folder.iterdir():
        path.write_bytes(b"")
    bad = dataset[ImageRequest(1, 0)]
    assert isinstance(bad, BadImage) and "none of the 2 images" in str(bad) and "8.png" in str(bad)


def test_missing_images_are_named_at_once_or_counted(tmp_path):
    files = write(tmp_path, content(images=6))
    for number in (8, 9, 10, 12):
        (files[0] / f"{number}.png").unlink()
    with pytest.raises(BadImage, match="lacks 4 of 6 images.*10.png, 12.png, 8.png, [.]"):
        CocoImages(*files)
    dataset = CocoImages(*files, skip_bad_images=True)
    assert dataset.report["images missing"] == 4 and "images missing (4)" in dataset.summary()
    assert dataset.image_ids.tolist() == [10, 11, 12, 7, 8, 9]
    assert dataset[ImageRequest(2, 0)][1]["image_id"] == 7


def test_images_may_lie_in_folders_of_their_own(tmp_path):
    what = content(images=2)
    files = write(tmp_path, what)
    (files[0] / "sub").mkdir()
    (files[0] / "8.png").rename(files[0] / "sub" / "8.png")
    what["images"][1]["file_name"] = "sub/8.png"
    files[1].write_text(json.dumps(what))
    assert CocoImages(*files)[1][0].shape == (3, 21, 33)
    (files[0] / "sub" / "8.png").unlink()
    with pytest.raises(BadImage, match="sub/8.png"):
        CocoImages(*files)


# File names


def renamed(folder, names, **options):
    """A data set whose file names are `names`, with images 7.png, 8.png, .. in it."""
    what = content(images=len(names))
    files = write(folder, what)
    for image, name in zip(what["images"], names, strict=True):
        image["file_name"] = name
    files[1].write_text(json.dumps(what))
    return CocoImages(*files, **options)


ODD_NAMES = [
    *(r"images\7.png", r"..\..\data\7.png", "images/7.png", "train/7.png", "../7.png", "a/../../7.png"),
    *(r"C:\me\7.png", "/home/me/7.png", "7.PNG", "%37.png", "1a2b3c4d-7.png", "upload/1/1a2b3c4d-7.png"),
    *("/data/local-files/?d=images/7.png", "s3://bucket/7.png"),
]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_an_image_is_found_by_the_end_of_its_name_and_a_line_says_so(tmp_path, name):
    dataset = renamed(tmp_path, [name, "8.png"])
    assert dataset.path(0) == dataset.folder / "7.png" and dataset[0][1]["boxes"].tolist() == [[1, 2, 11, 10]]
    assert dataset.path(1) == dataset.folder / "8.png"
    assert dataset.summary().endswith(f"; file names found by their ends: 1 ({name} is 7.png)")
    assert "by their ends" not in renamed(tmp_path, ["7.png", "8.png"]).summary()


@pytest.mark.parametrize(
    "name, file", [("für.png", "fu\u0308r.png"), ("fu\u0308r.png", "für.png"), ("a%20b.png", "a b.png")]
)
def test_an_image_is_found_under_another_spelling_of_its_name(tmp_path, name, file):
    files = write(tmp_path, content(images=2))
    (files[0] / "7.png").rename(files[0] / file)
    files[1].write_text(files[1].read_text().replace("7.png", name))
    assert CocoImages(*files).path(1).name == file


def test_the_longest_end_decides_and_what_stays_ambiguous_is_named(tmp_path):
    files = write(tmp_path, content(images=4))
    for number, place in ((7, "a/1.png"), (8, "b/1.png"), (9, "c/b/1.png"), (10, "2.png")):
        (files[0] / place).parent.mkdir(parents=True, exist_ok=True)
        (files[0] / f"{number}.png").rename(files[0] / place)
    names = {7: r"x\a\1.png", 8: r"b\1.png", 9: r"y\c\b\1.png", 10: "sub/2.png"}
    text = files[1].read_text()

    def opened_with(names):
        what = json.loads(text)
        for image in what["images"]:
            image["file_name"] = names[image["id"]]
        files[1].write_text(json.dumps(what))
        return CocoImages(*files)

    dataset = opened_with(names)
    paths = [dataset.path(i).relative_to(dataset.folder).as_posix() for i in range(4)]
    assert paths == ["2.png", "a/1.png", "b/1.png", "c/b/1.png"] and len(dataset.matched) == 4
    assert dataset.image_ids.tolist() == [10, 7, 8, 9]
    with pytest.raises(BadImage, match=r"lacks 1 of 4 images .*: 1.png; 1.png may be a/1.png or b/1.png"):
        opened_with({**names, 7: "1.png"})
    with pytest.raises(BadImage, match="lacks 1 of 4 images .*: other/1.png$"):  # in no folder of that name
        opened_with({**names, 7: "other/1.png"})
    clash = "lacks 2 of 4 images .*: q/2.png, sub/2.png; q/2.png may be 2.png, and so may sub/2.png$"
    with pytest.raises(BadImage, match=clash):  # two cannot be one file
        opened_with({**names, 9: "q/2.png"})


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(
    "name", ["../secret.png", "{}/secret.png", "a/../../secret.png", "../train2017x/../secret.png"]
)
def test_an_image_outside_the_folder_is_never_read(tmp_path, name, skip):
    tmp_path.joinpath("data").mkdir()
    for place in (tmp_path, tmp_path / "data"):
        Image.fromarray(noise(21, 33)).save(place / "secret.png")
    with pytest.raises(ValueError, match="secret.png is outside .*train2017 and is not read"):
        renamed(tmp_path / "data", [name.format(tmp_path), "8.png"], skip_bad_images=skip)


# Boxes

NOT_FINITE = [(math.nan, 2, 5, 5), (1, 2, math.inf, 5), (1, -math.inf, 5, 5)]
EMPTY = [(9, 2, -5, 5), (9, 9, 5, -5), (1, 2, 0, 5), (1, 2, 5, 0.0)]
OUTSIDE = [(40, 2, 5, 5), (-9, 2, 5, 5), (1, 2, 0.4, 5), (1e300, 1e300, 1e300, 1e300)]


def test_unusable_boxes_are_dropped_and_counted(tmp_path):
    dataset = opened(tmp_path, content(boxes=[*NOT_FINITE, *EMPTY, *OUTSIDE, (1, 2, 10, 8)]))
    assert dataset[0][1]["boxes"].tolist() == [[1, 2, 11, 10]] and dataset[0][1]["labels"].tolist() == [2]
    counts = {"boxes that are not finite": 3, "boxes of zero or negative size": 4}
    counts["boxes under a pixel or outside their image"] = 4
    assert dataset.report == Counter(counts)
    assert all(f"{what} ({count})" in dataset.summary() for what, count in counts.items())


EDGES = st.sampled_from([0, -0.0, 0.4, 0.5, 1, 1.4, 20.2, 21, 32.5, 33, 33.5, 40, -0.5, -3, 1e300, -1e300])
ODD = st.sampled_from([math.nan, math.inf, -math.inf])
PLAIN = (st.sampled_from([-0.55, -0.5, -0.45, 0, 3, 7.1]),) * 2 + (st.sampled_from([1, 2, 9.25, 50]),) * 2
BOX = st.one_of(*[st.tuples(*PLAIN)] * 3, st.tuples(*[EDGES | st.floats(-50, 60)] * 4), st.tuples(*[EDGES | ODD] * 4))
BOXES = st.lists(st.tuples(BOX, st.integers(0, 2), st.integers(0, 5).map(lambda drawn: drawn == 5)), max_size=12)


def plain_boxes(what):
    """What is to be trained on, box by box: (one list of (x1, y1, x2, y2, label) for each image, the counts)."""
    found, report = [[] for _ in what["images"]], Counter()
    labels = {category: label for label, category in enumerate(sorted(c["id"] for c in what["categories"]), 1)}
    for annotation in what["annotations"]:
        x, y, w, h = annotation["bbox"]
        if annotation["iscrowd"]:
            report["crowds"] += 1
            continue
        if not all(map(math.isfinite, (x, y, w, h))):
            report["boxes that are not finite"] += 1
            continue
        if w <= 0 or h <= 0:
            report["boxes of zero or negative size"] += 1
            continue
        x1, y1, x2, y2 = max(x, 0), max(y, 0), min(x + w, 33), min(y + h, 21)
        if x2 - x1 < 1 or y2 - y1 < 1:
            report["boxes under a pixel or outside their image"] += 1
            continue
        if max(x1 - x, y1 - y, x + w - x2, y + h - y2) > 0.5:
            report["boxes clipped to their image"] += 1
        corners = [float(np.float32(value)) for value in (x1, y1, x2, y2)]
        found[annotation["image_id"] - 7].append((*corners, labels[annotation["category_id"]]))
    return found, report


@settings(max_examples=300, deadline=None)
@given(BOXES)
def test_the_boxes_to_train_on_and_their_counts_are_those_of_a_plain_loop(tmp_path_factory, rows):
    what = content(images=3, boxes=[box for box, *_ in rows])
    for annotation, (_, image, crowd) in zip(what["annotations"], rows, strict=True):
        annotation.update(iscrowd=int(crowd), image_id=7 + image)
    path = tmp_path_factory.getbasetemp() / "boxes.json"
    path.write_text(json.dumps(what))
    report = Counter()
    annotations = read_annotations(path)
    boxes, found = usable_boxes(annotations, report)
    wanted, counts = plain_boxes(what)
    images, labels = annotations.image_indices[found].tolist(), annotations.labels[found].tolist()
    assert boxes.dtype == np.float32
    assert list(zip(images, boxes.tolist(), labels, strict=True)) == [
        (i, list(box), label) for i, of_image in enumerate(wanted) for (*box, label) in of_image
    ]
    assert report == counts


# Many images, several processes


def many(folder, images):
    """A data set of `images` images of which one is there, three boxes each, and the most of them to be kept."""
    folder.mkdir()
    (folder / "7.png").write_bytes(b"")
    what = content(images=images, boxes=[(1, 2, 10, 8)] * (3 * images))
    for i, annotation in enumerate(what["annotations"]):
        annotation["image_id"] = 7 + i % images
    what["annotations"][0]["iscrowd"] = 1
    (folder / "instances.json").write_text(json.dumps(what))
    return CocoImages(folder, folder / "instances.json", skip_bad_images=True, keep_empty=False)


def test_what_a_worker_is_sent_does_not_grow_with_the_data_of_which_it_sees_the_one_copy(tmp_path):
    few, more = (len(ForkingPickler.dumps(many(tmp_path / str(n), n))) for n in (100, 5000))
    assert abs(more - few) < 300 and more < 20_000
    dataset = many(tmp_path / "again", 50)
    again = ForkingPickler.loads(ForkingPickler.dumps(dataset))  # in shared memory, as a worker gets it
    assert again.boxes.is_shared() and again.annotations.boxes_xywh.is_shared() and dataset.boxes.is_shared()
    assert all(torch.equal(again.target(i)["boxes"], dataset.target(i)["boxes"]) for i in range(50))
    assert again.path(49) == dataset.path(49) == tmp_path / "again" / "9.png"


# Annotation files


@pytest.mark.parametrize(
    "images, keep, says", [(0, True, "json: no image in it"), (1, False, "with a usable box in it")]
)
def test_a_file_without_usable_images_is_an_error(tmp_path, images, keep, says):
    with pytest.raises(ValueError, match=says):
        opened(tmp_path, content(images, boxes=()), keep_empty=keep)


def test_boxes_that_fit_their_images_only_as_corners_are_refused(tmp_path):
    corners = content(boxes=[*((i % 25, 2, 30, 19) for i in range(119)), (4, 2, 4, 19)])
    with pytest.raises(
        ValueError, match="[0-9]+ of 120 boxes reach out of their image as COCO's .*subtract the first two"
    ):
        opened(tmp_path, corners)
    assert len(opened(tmp_path / "few", content(boxes=[(9, 2, 30, 19)] * 3)).boxes) == 3


def test_classes_of_one_name_are_counted_and_one_without_a_name_is_refused(tmp_path):
    def named(*names):
        return content(categories=[{**of, "name": name} for of, name in zip(CATEGORIES, names, strict=True)])

    assert "classes that share the name 'cat': 2" in opened(tmp_path / "a", named("cat", "cat", "dog")).summary()
    with pytest.raises(ValueError, match="json: the class 90, which boxes have, has an empty name; give it one"):
        opened(tmp_path / "b", named(" ", "cat", "dog"))
    assert len(opened(tmp_path / "c", named("cat", "", "dog"))) == 1  # no box has it


@pytest.mark.parametrize("box", [(-1, 2, 31, 19), (-1, -1, 33, 21), (0, 0, 34, 22)])
def test_boxes_of_nearly_the_whole_image_are_no_corners(tmp_path, box):
    assert len(opened(tmp_path, content(boxes=[box] * 12)).boxes) == 12


def test_boxes_in_parts_of_the_image_are_counted_as_under_a_pixel(tmp_path):
    with pytest.raises(ValueError, match="usable box in it .boxes under a pixel or outside their image .3., images"):
        opened(tmp_path, content(boxes=[(0.1, 0.2, 0.5, 0.5)] * 3), keep_empty=False)


def test_categories_are_matched_by_name_where_ids_differ_or_classes_are_missing(tmp_path):
    files = write(tmp_path, content(boxes=[(1, 2, 10, 8)] * 3))  # a toothbrush, a car, a stop sign
    table = {3: "car", 13: "stop sign", 90: "toothbrush"}
    assert "matched by name" not in CocoImages(*files, categories=table).summary()
    others = CocoImages(*files, categories={0: "toothbrush", 1: "bus", 2: "car", 3: "stop sign"})
    assert others.target(0)["labels"].tolist() == others.annotations.labels.tolist() == [1, 3, 4]
    assert others.categories == {0: "toothbrush", 1: "bus", 2: "car", 3: "stop sign"}
    says = "category ids differ and are matched by name; classes that are not in these annotations: 1 (bus)"
    assert others.summary().endswith(says)


def test_a_class_with_boxes_that_the_detector_lacks_is_an_error_that_names_it(tmp_path):
    files = write(tmp_path, content(boxes=[(1, 2, 10, 8)] * 2))
    with pytest.raises(ValueError, match="its classes 'toothbrush' are not among the 2 of .* .car, bus.: remove"):
        CocoImages(*files, categories={3: "car", 13: "bus"})
    left = CocoImages(*files, categories={3: "car", 90: "toothbrush"})
    assert left.summary().endswith("classes without a box left out: 1 (stop sign)")
    with pytest.raises(ValueError, match="its ids differ from the 3 .*, and repeated names are ambiguous"):
        CocoImages(*files, categories={1: "car", 2: "toothbrush", 3: "car"})


def test_broken_images_are_found_before_training_or_counted(tmp_path, monkeypatch):
    folder = make_shapes(tmp_path / "shapes", train_images=4, val_images=1, size=64)
    (folder / "train2017" / "000000000002.jpg").write_bytes(b"")
    whole = (folder / "train2017" / "000000000003.jpg").read_bytes()
    (folder / "train2017" / "000000000003.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadImage, match=r"000000000002.jpg: empty file \(and 1 more\)"):
        open_split(folder, "train").check_files()
    skipping = open_split(folder, "train", skip_bad_images=True)
    skipping.check_files()
    assert skipping.report["images that cannot be used"] == len(skipping.broken) == 2
    assert "000000000003.jpg: cannot be decoded" in skipping.broken[1]
    open_split(folder, "val").check_files()
    monkeypatch.setattr("detection.coco.SMALL_SET", 0)  # of a large set, the empty files alone
    with pytest.raises(BadImage, match="000000000002.jpg: empty file$"):
        open_split(folder, "train").check_files()


def test_the_annotations_of_the_other_split_are_refused_on_the_embedded_set(tmp_path):
    folder = make_shapes(tmp_path / "shapes", train_images=2, val_images=2, size=64)
    with pytest.raises(ValueError, match="check that both belong to the same split"):
        CocoImages(folder / "train2017", folder / "annotations" / "instances_val2017.json")

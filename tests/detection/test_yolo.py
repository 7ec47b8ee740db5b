"""What YOLO's label files hold, box by box, and what is said about those that cannot be used."""

import pytest
from formats import FORMATS, NAMES, SIZES, images, ultralytics, yolo_labels
from PIL import Image

from detection.data import open_split
from detection.layouts import describe_layout, find_split, whole_splits
from resbackbone.image_io import BadImage


@pytest.fixture
def folder(tmp_path):
    """images/{train,val}, labels/{train,val} and data.yaml."""
    ultralytics(tmp_path)
    (tmp_path / "mine.yaml").rename(tmp_path / "data.yaml")
    return tmp_path


def described(folder, old, new):
    text = (folder / "data.yaml").read_text()
    assert old in text
    (folder / "data.yaml").write_text(text.replace(old, new))


def test_data_may_be_the_yaml_itself_and_its_keys_lists_of_folders_and_absolute_paths(folder):
    described(folder, "path: ../datasets/mine", f"path: {folder}")
    described(folder, "train: images/train", f"train: [images/train, {folder}/images/val]")
    found = open_split(folder / "data.yaml", "train")
    assert found.folder == folder / "images" and found.annotations.file_names()[::4] == ["train/a.png", "val/f.png"]
    assert found.image_ids.tolist() == [1, 2, 3, 4, 5] and len(found.boxes) == 6
    assert describe_layout(folder / "data.yaml").endswith("data.yaml in YOLO's layout: data.yaml")
    assert open_split(folder, "val").fingerprint == open_split(folder / "data.yaml", "val").fingerprint


def test_labels_lie_beside_the_images_where_there_is_no_folder_of_them(folder):
    for split, names in SIZES.items():
        yolo_labels(folder / "images" / split, names)
        for file in (folder / "labels" / split).iterdir():
            file.unlink()
    assert len(open_split(folder, "train").boxes) == 3


def test_images_with_an_empty_label_file_and_without_one_have_no_objects_and_are_counted(folder):
    (folder / "labels/train/b.txt").unlink()
    (folder / "labels/train/lost.txt").write_text("")
    train = open_split(folder, "train")
    assert len(train) == 3 and len(train.boxes) == 2
    says = "images without a label file, taken as without objects: 1; label files without an image: 1"
    assert train.summary().endswith(says)
    assert len(open_split(folder, "train", keep_empty=False)) == 1


def test_an_image_turned_by_its_exif_orientation_has_the_size_that_is_shown(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 24)).save(folder / "images/train/a.png", exif=exif)
    (folder / "labels/train/a.txt").write_text("0 0.5 0.25 1 0.5\n")
    image, target = open_split(folder, "train")[0]
    assert image.shape == (3, 40, 24) and target["boxes"].tolist() == [[0, 0, 24, 20]]


def test_coordinates_are_clipped_where_they_are_rounded_and_boxes_that_leave_the_image_counted(folder):
    (folder / "labels/train/a.txt").write_text("1.0 0.5 0.5 1.000001 1.005\n\n0 0.9 0.5 0.4 0.5\n")
    train = open_split(folder, "train")
    assert train.boxes.tolist()[0] == [0, 0, 33, 21] and train.report["boxes clipped to their image"] == 1


def test_corners_in_place_of_centers_are_refused_where_most_boxes_leave_the_image_so(folder):
    lines = [f"{i % 2} 0.{i} 0.{i % 5} 0.{i + 1}5 0.{i % 5 + 4}5\n" for i in range(9)]
    (folder / "labels/train/a.txt").write_text("".join(lines) + "0 0.1 0.2 0.3 0.8\n")
    for other in "bc":
        (folder / f"labels/train/{other}.txt").write_text("")
    with pytest.raises(ValueError, match="of 10 boxes reach out .* as YOLO's x_center, .*: write centers and sides"):
        open_split(folder, "train")


def test_key_points_after_the_box_are_passed_over_where_the_yaml_has_their_shape(folder):
    described(folder, "names:", "kpt_shape: [2, 3]\nnames:")
    (folder / "labels/train/a.txt").write_text("0 0.5 0.5 1 1 0.1 0.1 2 0.9 0.9 0\n")
    assert open_split(folder, "train").boxes[0].tolist() == [0, 0, 33, 21]


def test_names_are_text_whatever_yaml_makes_of_them_and_their_number_is_what_counts(folder):
    described(folder, f"  0: {NAMES[0]}\n  1: {NAMES[1]}\n", " [no, 1.0]\nnc: 5\n")
    train = open_split(folder, "train")
    assert (
        train.categories == {0: "no", 1: "1.0"} and "data.yaml has 2 names, and another number as nc" in train.summary()
    )


@pytest.mark.parametrize("name", ["ultralytics", "roboflow_yolo", "yolo_without_yaml"])
def test_the_fingerprint_changes_with_any_label(tmp_path, name):
    FORMATS[name](tmp_path)
    before = open_split(tmp_path, "train").fingerprint
    assert open_split(tmp_path, "train").fingerprint == before
    [file] = tmp_path.glob("**/b.txt")
    file.write_text("")
    assert open_split(tmp_path, "train").fingerprint != before


@pytest.mark.parametrize(
    "line, says",
    [
        ("2 0.5 0.5 1 1", "class 2 has no name; .*data.yaml names 0 to 1"),
        ("0.5 0.5 0.5 1 1", "class 0.5 has no name"),
        ("-1 0.5 0.5 1 1", "class -1 has no name"),
        ("0 0.5 0.5 1 1.2", "1.2 is outside 0 to 1; a line is: class x_center"),
        ("0 -0.1 0.5 1 1", "-0.1 is outside 0 to 1; "),
        ("0 16 10 33 21", "16 is outside 0 to 1, as pixels are; "),
        ("0 nan 0.5 1 1", "nan is outside 0 to 1"),
        ("0 0.5 0.5 1", "4 numbers; a line is"),
        ("0 0.5 0.5 1 1 0.93", "6 numbers, as predictions have with a confidence; "),
        ("0 0.1 0.1 0.2 0.2 0.3 0.3 0.4", "8 numbers; "),
        ("dog 0.5 0.5 1 1", "'dog 0.5 0.5 1 1' is not all numbers"),
    ],
)
def test_a_line_that_is_no_object_is_an_error_with_its_file_and_number(folder, line, says):
    (folder / "labels/train/b.txt").write_text(f"1 0.5 0.5 0.5 0.5\n{line}\n")
    with pytest.raises(ValueError, match=f"labels/train/b.txt, line 2: {says}"):
        open_split(folder, "train")
    train = open_split(folder, "train", skip_bad_images=True)
    assert len(train) == 2 and "images that cannot be used: 1" in train.summary()


def no_labels(folder):
    for file in (folder / "labels/train").iterdir():
        file.unlink()


def no_images(folder):
    for file in (folder / "images/train").iterdir():
        file.unlink()


def two_descriptions(folder):
    for name in ("one", "two"):
        (folder / f"{name}.yaml").write_text("names: [cat]\ntrain: images/train\n")
    (folder / "data.yaml").unlink()


@pytest.mark.parametrize(
    "harm, says",
    [
        (lambda at: described(at, "val: images/val", "val: images/no"), "no images/no, its val in data.yaml"),
        (
            lambda at: described(at, "names", "nmaes"),
            "data.yaml: names must list the names of the classes",
        ),
        (lambda at: described(at, "names:", "names: " + 9999 * "["), "data.yaml: cannot be read"),
        (lambda at: described(at, "names:", "names: {"), "data.yaml: cannot be read"),
        (lambda at: described(at, "names:", "names: [[cat]]\nother:"), "names must list the names"),
        (lambda at: described(at, "names:", "names: {a: cat}\nother:"), "names must list the names"),
        (lambda at: described(at, "train: images/train", "train: {a: b}"), "train is neither a path nor a list of"),
        (lambda at: described(at, "train: images/train", "train: [[a]]"), "train is neither a path nor a list of"),
        (lambda at: described(at, "train: images/train", ""), "has no train"),
        (lambda at: (at / "data.yaml").unlink(), "no .*/classes.txt: write the names of the labels' classes in it"),
        (no_labels, "none of 3 images has a label file; the first would be .*/labels/train/a.txt"),
        (no_images, "images/train: no images in it"),
        (lambda at: (at / "images/train/b.png").write_bytes(b""), "b.png: empty file$"),
        (two_descriptions, "one.yaml and two.yaml describe data; give one of them as --data FILE"),
    ],
)
def test_a_folder_that_cannot_be_read_is_one_line_that_says_why(folder, harm, says):
    harm(folder)
    with pytest.raises(ValueError, match=says) as error:
        [open_split(folder, split) for split in SIZES]
    assert "\n" not in str(error.value)


def test_a_list_with_an_image_that_is_nowhere_names_it(tmp_path):
    FORMATS["yolo_lists"](tmp_path)
    with open(tmp_path / "train.txt", "a") as file:
        file.write("data/obj_train_data/none.png\n")
    with pytest.raises(BadImage, match="obj_train_data/none.png: no such file"):
        open_split(tmp_path, "train")
    assert len(open_split(tmp_path, "train", skip_bad_images=True)) == 3 and len(open_split(tmp_path, "val")) == 2


@pytest.mark.parametrize(
    "images, labels",
    [
        ("images/{}2017", "labels/{}2017"),
        ("{}/images", "{}/labels"),
        ("data/{}/images", "data/{}/labels"),
    ],
)
def test_without_a_description_splits_are_found_by_the_names_of_folders(folder, images, labels):
    expected = [open_split(folder, split).boxes.tolist() for split in SIZES]
    (folder / "data.yaml").unlink()
    for kind, place in (("images", images), ("labels", labels)):
        for split in SIZES:
            (folder / place.format(split)).parent.mkdir(parents=True, exist_ok=True)
            (folder / kind / split).rename(folder / place.format(split))
        if not any((folder / kind).iterdir()):
            (folder / kind).rmdir()
    top = folder / images.partition("/")[0] if images.startswith("data") else folder
    (top / "classes.txt").write_text("\n".join(NAMES))
    assert [open_split(folder, split).boxes.tolist() for split in SIZES] == expected


def test_without_splits_images_and_labels_may_lie_in_folders_by_class(tmp_path):
    for place, name in (("zebra", "a"), ("lion", "b")):
        images(tmp_path / place, {name: (33, 21)})
        yolo_labels(tmp_path / place, [name])
    (tmp_path / "classes.txt").write_text("\n".join(NAMES))
    assert len(find_split(tmp_path, "all").reader.read(None).image_ids) == 2


@pytest.mark.parametrize("name", ["test", "val2014"])
def test_folders_by_class_beside_one_of_a_split_are_not_trained_on_together(tmp_path, name):
    for place in ("zebra", "lion", name):
        images(tmp_path / place, {"a": (33, 21)})
        yolo_labels(tmp_path / place, ["a"])
    (tmp_path / "classes.txt").write_text("\n".join(NAMES))
    with pytest.raises(ValueError, match="no known data layout"):
        find_split(tmp_path, "train")


@pytest.mark.parametrize("place", [".", "images"])
def test_an_archive_of_one_folder_needs_no_folders_of_splits(tmp_path, place):
    images(tmp_path / "archive" / place, {"a": (33, 21)})
    yolo_labels(tmp_path / "archive" / ("labels" if place == "images" else place), ["a"])
    (tmp_path / "archive/classes.txt").write_text("\n".join(NAMES))
    (tmp_path / "archive/training").mkdir()  # of another tool
    assert find_split(tmp_path, "all").images == tmp_path / "archive" / place


def test_labels_without_their_images_are_an_error_that_says_so(folder):
    (folder / "data.yaml").unlink()
    (folder / "classes.txt").write_text("\n".join(NAMES))
    (folder / "images").rename(folder / "elsewhere")
    yolo_labels(folder / "labels", ["a"])
    with pytest.raises(ValueError, match="no image in .* has a label file: put the images in images/, or beside their"):
        open_split(folder, "train")


def test_a_split_to_test_on_without_labels_is_no_split(folder):
    images(folder / "images/test", {"a": (33, 21)})
    described(folder, "val: images/val", "val: images/val\ntest: images/test")
    assert [*whole_splits(folder)] == ["train", "val"]
    with pytest.raises(ValueError, match="no image in .*images/test has a label file"):
        find_split(folder, "test")


def test_a_broken_image_is_left_out_and_named_where_that_is_asked_for(folder):
    (folder / "images/train/b.png").write_bytes(b"")
    train = open_split(folder, "train", skip_bad_images=True)
    assert len(train) == 2 and "images that cannot be used: 1" in train.summary()
    [message] = train.broken
    assert message.endswith("b.png: empty file")


def test_another_set_beside_the_folder_is_not_taken_for_its_own(tmp_path):
    FORMATS["roboflow_yolo"](tmp_path)
    FORMATS["roboflow_yolo"](tmp_path / "mine")
    assert open_split(tmp_path / "mine", "train").folder == tmp_path / "mine/train/images"


def test_two_paths_that_lead_nowhere_do_not_mean_one_folder(tmp_path):
    images(tmp_path / "images", SIZES["train"])
    yolo_labels(tmp_path / "labels", SIZES["train"])
    (tmp_path / "data.yaml").write_text(f"train: ../train/images\nval: ../valid/images\nnames: {NAMES}\n")
    assert len(open_split(tmp_path, "train")) == 3
    with pytest.raises(ValueError, match="no ../valid/images, its val in data.yaml"):
        find_split(tmp_path, "val")


def test_a_file_name_that_is_no_text_is_named(folder):
    try:
        (folder / "images/train/a.png").rename(folder / "images/train/\udce4.png")
    except OSError:
        pytest.skip("this file system has no such names")
    with pytest.raises(ValueError, match="udce4.png.: this file's name is not in UTF-8; rename it"):
        open_split(folder, "train")


def test_without_a_usable_image_there_is_one_line(folder):
    for file in (folder / "images/train").iterdir():
        file.write_bytes(b"")
    with pytest.raises(ValueError, match="data.yaml: no image in it can be used; the first: .*png: empty file"):
        open_split(folder, "train", skip_bad_images=True)


@pytest.mark.parametrize("train, val", [("images/train", "images"), ("images", "images/train")])
def test_a_path_that_leads_nowhere_does_not_mean_a_folder_around_or_in_another_splits(folder, train, val):
    described(folder, "train: images/train", f"train: {train}")
    described(folder, "val: images/val", f"val: /kaggle/x/{val}")
    with pytest.raises(ValueError, match=f"no /kaggle/x/{val}, its val in data.yaml"):
        find_split(folder, "val")


def test_a_list_that_is_not_in_utf_8_is_an_error_in_a_line(folder):
    described(folder, "train: images/train", "train: train.txt")
    (folder / "train.txt").write_bytes(b"\xe4.png")
    with pytest.raises(ValueError, match="train.txt: not text in UTF-8 .*; save it in UTF-8"):
        open_split(folder, "train")

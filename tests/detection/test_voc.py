"""Pascal VOC's XML, box by box: where corners count from, sizes, lists, and files that cannot be used."""

import pytest
from formats import SIZES, images, voc, voc_files
from PIL import Image

from detection.data import open_split
from detection.layouts import describe_layout, find_split, whole_splits

OBJECT = """<object><name>{}</name><difficult>{}</difficult><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax>
<ymax>{}</ymax></bndbox><part><name>head</name><bndbox><xmin>1</xmin></bndbox></part></object>"""
BOMB = """<!DOCTYPE a [<!ENTITY b "bbbbbbbb"><!ENTITY c "&b;&b;&b;&b;&b;&b;&b;&b;">]>
<annotation><object><name>&c;</name></object></annotation>"""
OUTSIDE = """<!DOCTYPE a SYSTEM "file:///etc/passwd"><annotation/>"""


@pytest.fixture
def folder(tmp_path):
    voc(tmp_path)
    return tmp_path


def annotate(folder, *objects, name="a", more=""):
    text = "".join(OBJECT.format(*values) for values in objects)
    (folder / f"Annotations/{name}.xml").write_text(f"<annotation>{more}{text}</annotation>")


def boxes(folder):
    """Those of image a: x, y, width, height."""
    found = open_split(folder, "train").annotations
    return found.boxes_xywh[found.image_indices == 0].tolist()


def without_lists(folder):
    for file in (folder / "ImageSets/Main").iterdir():
        file.unlink()


def test_corners_count_from_1_and_the_last_is_inside(folder):
    annotate(folder, ("dog", 0, 1, 1, 33, 21), ("dog", 0, 3, 4, 5, 9), ("dog", 0, 2.5, 1, 3.5, 2))
    assert boxes(folder) == [[0, 0, 33, 21], [2, 3, 3, 6], [1.5, 0, 2, 2]]
    assert "corners are pixels, counted from 1" in open_split(folder, "val").summary()


@pytest.mark.parametrize("corner", [0, "0.0"])
def test_a_corner_of_0_anywhere_makes_them_edges_in_all_splits(folder, corner):
    annotate(folder, ("dog", 0, 3, 4, 5, 9))
    annotate(folder, ("dog", 0, corner, 4, 5, 9), name="e")
    assert boxes(folder) == [[3, 4, 2, 5]] and "are edges, counted from 0" in open_split(folder, "train").summary()


def test_boxes_without_a_size_as_bccd_has_them_are_left_out_and_counted(folder):
    annotate(folder, ("dog", 0, 7, 7, 7, 7), ("dog", 0, 7, 1, 7, 9), ("dog", 0, 1, 1, 4, 4))
    found = open_split(folder, "train")
    assert found.target(0)["boxes"].tolist() == [[0, 0, 4, 4]] and found.report["boxes of zero or negative size"] == 2


def test_the_folders_of_xml_files_and_of_images_may_have_any_name(folder):
    expected = boxes(folder)
    without_lists(folder)
    (folder / "Annotations").rename(folder / "annots")
    (folder / "JPEGImages").rename(folder / "photos")
    assert boxes(folder) == expected
    (folder / "annots").rename(folder / "more")
    voc_files(folder / "annots", ["a"])
    with pytest.raises(ValueError, match="it should contain"):  # two folders of XML files
        find_split(folder, "train")


@pytest.mark.parametrize("names", [("train", "val"), ("TRAIN", "TEST"), ("Training", "Validation")])
@pytest.mark.parametrize("place", ["{0}/{1}", "{1}/{0}", "{1}", "{1}/VOC2007/{0}"])
def test_without_lists_splits_are_found_by_the_names_of_folders(tmp_path, names, place):
    for split, name in zip(SIZES, names, strict=True):
        images(tmp_path / place.format("images", name), SIZES[split])
        voc_files(tmp_path / place.format("annotations", name), SIZES[split])
    second = "test" if names[1] == "TEST" else "val"
    found = {split: of.reader.count_images() for split, of in whole_splits(tmp_path).items()}
    assert found == {"train": 3, second: 2}


@pytest.mark.parametrize(
    "line", ["{}", "./{}.png", "/home/me/VOC/JPEGImages/{}.png", "./JPEGImages/{0}.png ./Annotations/{0}.xml"]
)
@pytest.mark.parametrize("place", ["ImageSets", "."])
def test_lists_may_lie_outside_of_main_and_name_files(folder, place, line):
    expected = open_split(folder, "val").boxes.tolist()
    without_lists(folder)
    for split, names in SIZES.items():
        listed = "".join(line.format(name) + "\n" for name in names if " " not in name)
        (folder / place / f"{split}.txt").write_text(listed)
    assert open_split(folder, "val").boxes.tolist() == expected and len(open_split(folder, "train")) == 2


def test_archives_unpacked_beside_each_other_are_one_set(folder, tmp_path):
    for archive in ("trainval", "test"):
        voc(tmp_path / "both" / archive / "VOCdevkit" / "VOC2007")
    lists = tmp_path / "both/test/VOCdevkit/VOC2007/ImageSets/Main"
    (lists / "train.txt").unlink()
    (lists / "val.txt").rename(lists / "test.txt")
    found = {split: of.reader.count_images() for split, of in whole_splits(tmp_path / "both").items()}
    assert found == {"train": 3, "val": 2, "test": 2}


def test_images_may_lie_in_folders_that_their_annotations_do_not(folder):
    expected = sorted(open_split(folder, "train").boxes.tolist())
    (folder / "JPEGImages/cats").mkdir()
    (folder / "JPEGImages/a.png").rename(folder / "JPEGImages/cats/a.png")
    assert sorted(open_split(folder, "train").boxes.tolist()) == expected
    (folder / "JPEGImages/dogs").mkdir()
    Image.new("RGB", (33, 21)).save(folder / "JPEGImages/dogs/a.png")
    with pytest.raises(ValueError, match="no image a in"):  # two of the name
        open_split(folder, "train")


def test_images_in_folders_of_splits_are_not_trained_on_by_annotations_that_are_not(folder):
    without_lists(folder)
    for split, names in SIZES.items():
        (folder / "JPEGImages" / split).mkdir()
        for name in names:
            (folder / f"JPEGImages/{name}.png").rename(folder / f"JPEGImages/{split}/{name}.png")
    with pytest.raises(ValueError, match="no image a in"):
        open_split(folder, "train")


def test_images_without_an_annotation_are_counted_where_no_list_leaves_them_out(folder):
    Image.new("RGB", (9, 9)).save(folder / "JPEGImages/unlabelled.png")
    assert "without an XML file" not in open_split(folder, "train").summary()
    without_lists(folder)
    assert "images without an XML file, not used: 1" in open_split(folder, "train").summary()


def test_difficult_objects_are_crowds_and_parts_no_objects(folder):
    annotate(folder, ("dog", 1, 1, 1, 4, 4), ("dog", 0, 1, 1, 8, 8))
    found = open_split(folder, "train")
    assert found.report["crowds"] == 1 and found.target(0)["boxes"].tolist() == [[0, 0, 8, 8]]
    assert found.categories == {1: "big cat", 2: "dog"}


def test_classes_are_those_of_all_splits(folder):
    annotate(folder, ("ape", 0, 1, 1, 4, 4), name="e")
    assert [open_split(folder, split).categories for split in SIZES] == [{1: "ape", 2: "big cat", 3: "dog"}] * 2


def test_the_images_own_size_counts_and_another_one_in_the_file_is_counted(folder):
    size = "<size><width>{}</width><height>{}</height></size>"
    annotate(folder, ("dog", 0, 1, 1, 4, 4), more=size.format(66, 42))
    annotate(folder, ("dog", 0, 1, 1, 4, 4), more=size.format(0, 0), name="b")
    found = open_split(folder, "train")
    assert found[0][0].shape == (3, 21, 33) and found[1][0].shape == (3, 41, 20)
    assert "images of another size than their annotation says: 1" in found.summary()
    annotate(folder, ("dog", 0, 1, 1, 60, 40), more=size.format(66, 42))
    with pytest.raises(ValueError, match="a.png: is 33 x 21, its annotation is of 66 x 42, and its boxes reach out"):
        open_split(folder, "train")


def test_boxes_on_the_image_as_it_is_stored_are_told_by_the_size(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 24)).save(folder / "JPEGImages/a.png", exif=exif)
    for size, shape in (((24, 40), (3, 40, 24)), ((40, 24), (3, 24, 40))):
        text = "<size><width>{}</width><height>{}</height></size>".format(*size)
        annotate(folder, ("dog", 0, 1, 1, 20, 20), more=text)
        assert open_split(folder, "train")[0][0].shape == shape


def test_several_years_are_taken_together_and_lists_may_have_a_column_for_a_class(tmp_path):
    for year in ("VOC2007", "VOC2012"):
        voc(tmp_path / "VOCdevkit" / year)
    lists = tmp_path / "VOCdevkit/VOC2012/ImageSets/Main"
    (lists / "val.txt").unlink()
    (lists / "train.txt").rename(lists / "trainval.txt")
    (lists / "trainval.txt").write_text("a  1\nb -1\nc d\n")
    train, val = (open_split(tmp_path, split) for split in SIZES)
    names = [f"VOC{year}/JPEGImages/{name}.png" for year in (2007, 2012) for name in ("a", "b", "c d")]
    assert train.annotations.file_names() == names and train.folder == tmp_path / "VOCdevkit"
    assert len(val) == 2 and val.folder == tmp_path / "VOCdevkit/VOC2007/JPEGImages"


def test_without_lists_a_tenth_of_all_images_is_held_out(tmp_path):
    images(tmp_path / "images", [*SIZES["train"], *SIZES["val"]])
    voc_files(tmp_path / "annotations", [*SIZES["train"], *SIZES["val"]])  # Kaggle's names of folders
    (tmp_path / "images/b.png").rename(tmp_path / "images/b.PNG")
    assert [len(open_split(tmp_path, split)) for split in SIZES] == [4, 1]
    assert "in Pascal VOC's layout: annotations; there is no validation split" in describe_layout(tmp_path)


def test_an_image_is_found_by_the_name_in_its_annotation_too(folder):
    (folder / "JPEGImages/a.png").rename(folder / "JPEGImages/other.png")
    annotate(folder, ("dog", 0, 1, 1, 4, 4), more="<filename>other.jpg</filename>")
    assert open_split(folder, "train").annotations.file_names() == ["b.png", "c d.png", "other.png"]
    (folder / "JPEGImages/b.png").unlink()
    annotate(folder, ("dog", 0, 1, 1, 4, 4), name="b", more="<filename>other.jpg</filename>")
    with pytest.raises(ValueError, match="other.png: has two annotations; one is .*Annotations/b.xml"):
        open_split(folder, "train")


@pytest.mark.parametrize(
    "xml, says",
    [
        (BOMB, "it has a DOCTYPE"),
        (OUTSIDE, "it has a DOCTYPE"),
        ("<annotation><object>", "not an annotation"),
        ("<annotations/>", "its root is <annotations>, where VOC's is <annotation>"),
        ("<annotation><object><name>cat</name></object></annotation>", "object 1 has the corners [None"),
        (f"<annotation>{OBJECT.format('cat', 0, 5, 1, 4, 2)}</annotation>", "no box of a class"),
        (f"<annotation>{OBJECT.format('cat', 0, 'nan', 1, 4, 2)}</annotation>", "no box of a class"),
        (f"<annotation>{OBJECT.format(' ', 0, 1, 1, 4, 2)}</annotation>", "no box of a class"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_in_a_line_or_left_out_and_named(folder, xml, says):
    (folder / "Annotations/b.xml").write_text(xml)
    with pytest.raises(ValueError) as error:
        open_split(folder, "train")
    assert str(error.value).startswith(f"image {folder}/Annotations/b.xml: ") and says in str(error.value)
    found = open_split(folder, "train", skip_bad_images=True)
    assert found.annotations.file_names() == ["a.png", "c d.png"] and says in found.broken[0]
    assert "images that cannot be used: 1" in found.summary()


def test_missing_files_and_names_that_leave_the_folder_are_bad_too(folder):
    (folder / "JPEGImages/a.png").unlink()
    (folder / "JPEGImages/b.png").write_text("no image")
    (folder / "ImageSets/Main/train.txt").write_text("a\nb\n../../x\nnone\nc d\n")
    with pytest.raises(ValueError, match=r"no image a in .* \(and 3 more\)$"):
        open_split(folder, "train")
    broken = open_split(folder, "train", skip_bad_images=True).broken
    wanted = ("no image a in", "'../../x' in a list of", "b.png: not an image", "none.xml: cannot be read")
    assert len(broken) == 4 and all(any(part in line for line in broken) for part in wanted)


def test_a_list_without_images_and_annotations_without_objects_are_errors(folder):
    (folder / "ImageSets/Main/val.txt").write_text("\n")
    with pytest.raises(ValueError, match="Pascal VOC's layout, but no image in val.txt"):
        find_split(folder, "val")
    for file in (folder / "Annotations").iterdir():
        file.write_text("<annotation/>")
    with pytest.raises(ValueError, match="Annotations: no object in any of the annotations"):
        open_split(folder, "train")


@pytest.mark.parametrize("name", ["test", "val"])
def test_the_name_of_the_data_folder_is_no_splits(tmp_path, name):
    images(tmp_path / name, SIZES["train"])
    voc_files(tmp_path / name, SIZES["train"])
    assert [len(open_split(tmp_path / name, split)) for split in SIZES] == [2, 1]


def test_without_lists_no_list_is_missing(tmp_path):
    images(tmp_path / "val", SIZES["val"])
    voc_files(tmp_path / "val", SIZES["val"])
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="Pascal VOC's layout, but no folder named train$"):
        find_split(tmp_path, "train")


def test_a_list_that_is_not_in_utf_8_is_an_error_in_a_line(folder):
    (folder / "ImageSets/Main/train.txt").write_bytes(b"\xe4")
    with pytest.raises(ValueError, match="train.txt: not text in UTF-8 .*; save it in UTF-8"):
        find_split(folder, "train")


def test_lines_of_a_list_may_end_in_an_images_suffix(folder):
    (folder / "Annotations/b.xml").rename(folder / "Annotations/b.jpg.xml")
    (folder / "JPEGImages/b.png").rename(folder / "JPEGImages/b.jpg.png")
    (folder / "ImageSets/Main/train.txt").write_text("a.png 1\nb.jpg\n")
    assert open_split(folder, "train").annotations.file_names() == ["a.png", "b.jpg.png"]

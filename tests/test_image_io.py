"""Image files of every kind become RGB bytes; what is wrong with a file is one sentence that names it."""

import io

import numpy as np
import pytest
import torch
from pictures import encoded
from PIL import Image

from resbackbone.image_io import BadImage, _say_once, decode, image_sizes, open_rgb, read_image

EXIF_ORIENTATION = 0x0112
STORED_OF = {  # how a camera stores an upright image [H, W, 3] under each EXIF orientation
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: upright[::-1, ::-1].transpose(1, 0, 2),
    8: lambda upright: np.rot90(upright, -1),
}


def noise(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_upright_unless_its_annotations_are_of_the_stored_one(tmp_path, orientation):
    path = tmp_path / "turned.png"
    for upright in (noise(17, 17), noise(21, 33)):
        save_turned(upright, orientation, path)
        for size in (upright.shape[1::-1], None):
            assert np.array_equal(pixels(read_image(path, size)), upright)
    if orientation > 4:
        assert np.array_equal(pixels(read_image(path, (21, 33))), STORED_OF[orientation](upright))
        assert image_sizes(path)[1] == (21, 33)


def test_an_orientation_in_a_jpeg_is_followed_and_an_unknown_one_passed_over(tmp_path):
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    stored = Image.new("RGB", (32, 16), "red")
    stored.save(tmp_path / "phone.jpg", exif=exif)
    assert read_image(tmp_path / "phone.jpg").shape == (3, 32, 16)
    assert image_sizes(tmp_path / "phone.jpg") == ((16, 32), (32, 16))
    exif[EXIF_ORIENTATION] = 42
    stored.save(tmp_path / "odd.jpg", exif=exif)
    assert read_image(tmp_path / "odd.jpg").shape == (3, 16, 32)


def save_turned(upright, orientation, path):
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    Image.fromarray(np.ascontiguousarray(STORED_OF[orientation](upright))).save(path, exif=exif)


def pixels(image):
    assert image.dtype == torch.uint8
    return image.permute(1, 2, 0).numpy()


GREY = np.arange(21 * 33, dtype=np.uint32).reshape(21, 33)


BYTES = (GREY % 256).astype(np.uint8)


def grey_16_bit(values):
    return Image.fromarray(values.astype(np.uint16)), values / 257


def palette_image(**info):
    colours = np.random.default_rng(1).integers(0, 256, (4, 3), dtype=np.uint8)
    image = Image.fromarray((GREY % 4).astype(np.uint8), "L").convert("P")
    image.putpalette(colours.tobytes())
    image.info.update(info)
    return image, colours[GREY % 4]


MODES = {
    "grey": (Image.fromarray(BYTES), BYTES),
    "16 bits": grey_16_bit(GREY * 94),  # up to 65048
    "16 bits, dark": grey_16_bit(GREY % 256),  # no value is over 255
    "black and white": (Image.fromarray((GREY % 2 * 255).astype(np.uint8)).convert("1"), GREY % 2 * 255),
    "alpha": (Image.fromarray(np.dstack([noise(21, 33), BYTES])), noise(21, 33)),
    "grey with alpha": (Image.fromarray(np.dstack([BYTES, 255 - BYTES])), BYTES),
    "palette": palette_image(),
    "palette with a transparent colour": palette_image(transparency=2),
    "palette with alpha": palette_image(transparency=bytes([0, 90, 255, 7])),
}


@pytest.mark.parametrize("image, colours", MODES.values(), ids=MODES)
def test_an_image_of_any_colour_mode_gives_its_colours_as_rgb_bytes(tmp_path, image, colours):
    image.save(tmp_path / "image.png")
    found = pixels(read_image(tmp_path / "image.png", (33, 21)))
    assert np.array_equal(decode((tmp_path / "image.png").read_bytes(), "x"), found)
    wanted = np.broadcast_to(colours[..., None] if colours.ndim == 2 else colours, (21, 33, 3))
    assert np.abs(found - wanted.astype(float)).max() <= 0.51


def test_an_image_of_12_bits_kept_in_16_is_dark_and_this_is_said_once(tmp_path, caplog):
    _say_once.cache_clear()
    for values, said in ((GREY * 94, 0), (GREY, 1), (GREY, 1)):
        grey_16_bit(values)[0].save(tmp_path / "image.png")
        read_image(tmp_path / "image.png")
        assert caplog.text.count("uses under 1/8 of its range and becomes nearly black: scale such images") == said


@pytest.mark.parametrize("mode", ["CMYK", "L", "RGB"])
def test_a_jpeg_of_any_colour_mode_looks_as_it_should(tmp_path, mode):
    rows = np.linspace(0, 255, 21)[:, None].repeat(33, 1)
    columns = np.linspace(255, 60, 33)[None].repeat(21, 0)
    colours = np.dstack([rows, columns, 0 * rows + 90]) if mode != "L" else np.dstack([rows] * 3)
    Image.fromarray(colours.astype(np.uint8)).convert(mode).save(tmp_path / "image.jpg", quality=95)
    found = pixels(read_image(tmp_path / "image.jpg"))
    assert found.shape == (21, 33, 3)
    assert np.abs(found - colours).mean() < 8


BROKEN = {
    "no such file": lambda path: path.unlink(),
    "cannot be read": lambda path: (path.unlink(), path.mkdir()),
    "empty file": lambda path: path.write_bytes(b""),
    "cannot be decoded": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "a Git LFS pointer, not the file itself; run git lfs pull": lambda path: path.write_text(
        "version https://git-lfs.github.com/spec/v1"
    ),
    "not an image": lambda path: path.write_text("<html>404 Not Found</html>"),
    "is 20 x 33, annotations say 33 x 21": lambda path: Image.fromarray(noise(33, 20)).save(path),
    "1 x 3000 is too narrow": lambda path: Image.new("RGB", (1, 3000)).save(path),
}


@pytest.mark.parametrize("says, harm", BROKEN.items(), ids=BROKEN)
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_broken_image_is_an_error_that_names_the_file_and_what_is_wrong(tmp_path, says, harm, suffix):
    path = tmp_path / f"photo.{suffix}"
    Image.fromarray(noise(21, 33)).save(path)
    harm(path)
    with pytest.raises(BadImage, match=f"photo.{suffix}: .*{says}"):
        read_image(path, (33, 21))


@pytest.mark.parametrize("suffix, begins", [("heic", "TIFF"), ("pdf", "%PDF"), ("dng", None)])
def test_a_format_that_is_not_read_is_named(tmp_path, suffix, begins):
    path = tmp_path / f"photo.{suffix}"
    if begins is None:  # a raw image, which begins as the TIFF of its thumbnail
        Image.fromarray(noise(21, 33)).save(path, "TIFF")
    else:
        path.write_text(begins)
    with pytest.raises(
        BadImage, match=f"photo.{suffix}: {suffix.upper()} cannot be read as such; convert it to JPEG or PNG"
    ):
        read_image(path)


def test_whatever_a_decoder_raises_becomes_a_bad_image(tmp_path, monkeypatch):
    def decoder_fails(image):
        raise RuntimeError("Failed to decode frame 0")  # as the AVIF decoder does

    path = tmp_path / "photo.png"
    Image.fromarray(noise(21, 33)).save(path)
    monkeypatch.setattr("resbackbone.image_io.to_rgb", decoder_fails)
    with pytest.raises(BadImage, match="photo.png: cannot be decoded .Failed to decode frame 0"):
        read_image(path)


@pytest.mark.parametrize(
    "mode, kind", [("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("RGB", "PNG"), ("RGBA", "PNG"), ("P", "PNG")]
)
def test_the_fast_decoder_gives_what_pil_gives(mode, kind):
    file = encoded(37, 53, mode=mode, kind=kind)
    expected = np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))
    assert np.array_equal(decode(file, "x"), expected) and np.array_equal(open_rgb(file, "x"), expected)


def test_real_jpegs_are_decoded_to_the_values_that_pil_gives(data):
    for path in sorted((data / "imagenet_sample").rglob("*.JPEG"))[::5]:
        assert np.array_equal(decode(path.read_bytes(), "x"), np.asarray(Image.open(path).convert("RGB"))), path


def test_an_image_too_large_to_be_true_is_left_to_pil_which_refuses_it(monkeypatch):
    file = encoded(37, 53)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 37 * 53 // 2 - 1)
    with pytest.raises(BadImage, match="x: cannot be decoded .*decompression bomb"):
        decode(file, "x")

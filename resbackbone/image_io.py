"""Image files to uint8 RGB pixels, and what is wrong with unusable files. No other module opens images."""

import io
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from resbackbone.checks import LFS_POINTER, UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff")
RAW = (".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2")  # some are TIFFs of a thumbnail, to PIL
NOT_READ = (".avif", ".gif", ".heic", ".heif", ".pdf", ".svg", *RAW)  # of these, PIL may read some
EXIF_ORIENTATION = 0x0112
MAX_ASPECT = 200  # longer side over shorter; a narrower image would have no width left after resizing to max_size


class BadImage(UserError):
    """An image that cannot be used, for example because its file is missing. The message is `image FILE: REASON`.

    Data sets opened with `skip_bad_images=True` skip such images and no others; commands then print the messages and
    list them in results.json.
    """


def read_image(path: str | os.PathLike, size: tuple[int, int] | None = None) -> Tensor:
    """Read an image file of any colour mode as uint8 [3, H, W], RGB; 16 bits are scaled to 8, alpha is dropped.

    `size` is the annotated (width, height), if any. An EXIF orientation is applied unless only the stored image has
    this size: boxes are in the coordinates that the annotator saw. Raises BadImage, with the file's name, if it is
    missing, empty, truncated, not an image, or of another size.
    """
    with _opened(read_file(path), path) as image:
        orientation = image.getexif().get(EXIF_ORIENTATION, 1)
        turn = orientation != 1
        if size is not None and image.size == size != image.size[::-1]:
            turn = 1 < orientation < 5  # 5..8 would swap width and height
        rgb = to_rgb(ImageOps.exif_transpose(image) if turn else image)
    width, height = rgb.size
    if max(rgb.size) > MAX_ASPECT * min(rgb.size):
        raise BadImage(f"image {path}: {width} x {height} is too narrow to be resized")
    if size is not None and rgb.size != tuple(size):
        hint = ": they have width and height swapped" if rgb.size == tuple(size)[::-1] else ""
        raise BadImage(f"image {path}: is {width} x {height}, annotations say {size[0]} x {size[1]}{hint}")
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)


def read_file(path: str | os.PathLike) -> bytes:
    """The bytes of an image file. Raises BadImage if it cannot be read."""
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read()
    except FileNotFoundError:
        raise BadImage(f"image {path}: no such file") from None
    except OSError as error:
        raise BadImage(f"image {path}: cannot be read ({error.strerror})") from None


def image_sizes(path: str | os.PathLike) -> tuple[tuple[int, int], tuple[int, int]]:
    """(width, height) in pixels as shown, turned by the EXIF orientation, and as stored; reads only the file's head.

    Raises BadImage if the file is missing or not an image.
    """
    try:
        with open(path, "rb") as file, _opened(file, path) as image:
            decodes = image.format == "PNG" and "exif" not in image.info  # the whole file, to look behind the pixels
            turned = not decodes and image.getexif().get(EXIF_ORIENTATION, 1) > 4
            return image.size[::-1] if turned else image.size, image.size
    except FileNotFoundError:
        raise BadImage(f"image {path}: no such file") from None
    except OSError as error:
        raise BadImage(f"image {path}: cannot be read ({error.strerror})") from None


def decode(file: bytes, name: str) -> np.ndarray:
    """Decode an image file to uint8 [H, W, 3] with the values of `open_rgb`; JPEGs take 3/4 of the time or less.

    simplejpeg uses PIL's libjpeg-turbo. CMYK files, sizes that PIL warns about and files that simplejpeg rejects go to
    PIL. Raises BadImage, with `name`, if PIL cannot decode the file.
    """
    import simplejpeg

    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(file)
        if colours in ("YCbCr", "RGB", "Gray") and height * width <= (Image.MAX_IMAGE_PIXELS or np.inf):
            return simplejpeg.decode_jpeg(file, "RGB")
    except ValueError:  # PIL reads the file or says what is wrong
        pass
    return np.array(open_rgb(file, name))


def open_rgb(file: bytes, name: str) -> Image.Image:
    """Decode an image file of any colour mode to a PIL image in RGB. Raises BadImage, with `name`, if that fails.

    Ignores the EXIF orientation, as torchvision and timm do for published accuracies.
    """
    with _opened(file, name) as image:
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB. Scales 16 bits and more to 8, which PIL's conversion clips, and drops alpha."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        largest = values.max(initial=0)
        top = 65535.0 if image.mode.startswith("I;16") or largest > 255 else 255.0
        if 0 < largest < top / 8:
            _say_once("an image of over 8 bits uses under 1/8 of its range and becomes nearly black: scale such images")
        return Image.fromarray((values.clip(0, top) * (255.0 / top)).round().astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


@cache
def _say_once(message: str) -> None:
    logging.getLogger("resbackbone").warning(message)


@contextmanager
def _opened(file: bytes | BinaryIO, name: str | os.PathLike) -> Iterator[Image.Image]:
    """Open an image with PIL. Errors in the block, where PIL decodes, become BadImage."""
    stream = io.BytesIO(file) if isinstance(file, bytes) else file
    suffix = os.path.splitext(name)[1].lower()
    try:
        if suffix in RAW:
            raise UnidentifiedImageError
        with Image.open(stream) as image:
            yield image
    except UnidentifiedImageError:
        stream.seek(0)
        start = stream.read(len(LFS_POINTER))
        what = "not an image" if start else "empty file"
        if start == LFS_POINTER:
            what = "a Git LFS pointer, not the file itself; run git lfs pull"
        elif start and suffix in NOT_READ:
            what = f"{suffix[1:].upper()} cannot be read as such; convert it to JPEG or PNG"
        raise BadImage(f"image {name}: {what}") from None
    except Exception as error:  # decoders raise OSError, SyntaxError, RuntimeError, struct.error, ..
        raise BadImage(f"image {name}: cannot be decoded ({error})") from None

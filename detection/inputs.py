"""The inputs of tools/detect.py: images, folders, patterns, videos and cameras, and where their outputs go."""

import glob
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from detection import video
from detection.annotations import read_annotations
from detection.file_names import match_names, unclear
from resbackbone.checks import UserError, is_url
from resbackbone.image_io import NOT_READ, SUFFIXES


class Inputs(NamedTuple):
    """Image files; and videos, which are files or numbers of cameras."""

    images: list[Path]
    videos: list[Path | int]


def find_inputs(words: Sequence[str], output: Path, *, recursive: bool = False) -> Inputs:
    """The inputs that `words` name, in order and without duplicates; those of a folder or pattern sorted by name.

    A number is a camera. Images of a folder that are below `output` are left out: an earlier call drew them. Files that
    do not exist fail when they are read. Raises UserError if a folder holds no image or a pattern matches no file.
    """
    images: dict[Path, None] = {}
    videos: dict[Path | int, None] = {}
    if len(words) > 1 and Path(together := " ".join(words)).exists():
        raise UserError(f"{together}: put quotes around a name with spaces")
    for word in map(os.path.expanduser, words):  # shells leave the ~ of quoted patterns
        path, files = Path(word), [Path(word)]
        if word.isdecimal() and not path.exists():
            videos[int(word)] = None
            continue
        if is_url(word):
            raise UserError(f"{word}: is a URL; download it, and give the file")
        if path.is_dir():
            files = _images_not_below(output, path, recursive=recursive)
        elif glob.has_magic(word) and not path.exists():  # a name may contain brackets
            files = [file for file in map(Path, sorted(glob.glob(word, recursive=True))) if file.is_file()]
            if not files:
                raise UserError(f"{word}: no file matches this pattern")
        for file in files:
            (videos if file.suffix.lower() in video.SUFFIXES else images)[file] = None
    return Inputs(list(images), list(videos))


def images_in(folder: Path, *, recursive: bool = False) -> list[Path]:
    """The image files of a folder, sorted by name."""
    return sorted(f for f in (folder.rglob("*") if recursive else folder.iterdir()) if f.suffix.lower() in SUFFIXES)


def _images_not_below(output: Path, folder: Path, *, recursive: bool) -> list[Path]:
    files = images_in(folder, recursive=recursive)
    others = Counter(f.suffix.lower() for f in (folder.rglob("*") if recursive else folder.iterdir()))
    counts = [f"{others[suffix]} {suffix}" for suffix in NOT_READ if suffix in others]
    left_out = f": left out {', '.join(counts)}; convert them to JPEG or PNG" if counts else ""
    if folder.resolve() != output.resolve():
        files = [file for file in files if output.resolve() not in file.resolve().parents]
    if not files:
        deeper = "; try --recursive" if not recursive and images_in(folder, recursive=True) else ""
        raise UserError(f"{folder}: holds no image ({', '.join(SUFFIXES)}){deeper or left_out}")
    if left_out:
        logging.getLogger("resbackbone").warning("%s%s", folder, left_out)
    return files


def frames_file(video_file: Path) -> Path:
    """The file for the detections in a video's frames, beside the video with boxes."""
    return video_file.with_name(f"{video_file.stem}-frames.json")


def output_files(inputs: Inputs, folder: Path, picture: str = "jpg") -> dict[Path | int, Path]:
    """The output file in `folder` for each input, under the input's name; a name that is taken gets a number.

    `picture` is the suffix of pictures; videos are .mp4.

    Raises ValueError if an output would overwrite an input.
    """
    sources = [(source, f".{picture}") for source in inputs.images] + [(source, ".mp4") for source in inputs.videos]
    names: dict[str, Path | int] = {}
    for number, (source, suffix) in enumerate(sources, 1):
        stem = f"camera-{source}" if isinstance(source, int) else source.stem
        while f"{stem}{suffix}" in names:
            stem = f"{stem}-{number}"
        names[f"{stem}{suffix}"] = source
    given = {source.resolve() for source, _ in sources if isinstance(source, Path)}
    for name in names:
        if (folder / name).resolve() in given:
            raise UserError(f"{folder}: an output would replace the input {folder / name}; choose another folder")
    return {source: folder / name for name, source in names.items()}


def image_ids_of(images: Sequence[Path], annotations: Path | None, categories: Mapping[int, str]) -> list[int]:
    """The image files' ids in a COCO annotation file, found by file name; without one they count from 1.

    If file names in the annotations include folders, the longest match counts (`file_names.match_names`). Raises
    ValueError if the annotations lack an image, name several that it may be, or have other categories than
    `categories`.
    """
    if annotations is None:
        return list(range(1, len(images) + 1))
    content = read_annotations(annotations)
    if content.categories != categories:
        raise UserError(f"{annotations}: its categories differ from the detector's")
    known = dict(zip(content.file_names(), content.image_ids.tolist(), strict=True))
    matched, several = match_names(map(_absolute, images), known)
    for path in images:
        if (name := _absolute(path)) not in matched:
            why = f"; it{unclear(name, several)}" if name in several else ""
            raise UserError(f"{annotations}: has no image named {path}{why}")
    counts = Counter(content.file_names())
    for name in matched.values():
        if counts[name] > 1:
            raise UserError(f"{annotations}: names {name} for {counts[name]} images; leave one of them")
    return [known[matched[_absolute(path)]] for path in images]


def _absolute(path: Path) -> str:
    return path.absolute().as_posix()

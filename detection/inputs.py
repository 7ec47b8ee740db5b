"""What a person names on a command line to be looked at: images, folders, patterns, videos, cameras."""

import glob
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from detection import video
from detection.annotations import read_annotations
from detection.faster_rcnn import FasterRCNN
from resbackbone.checks import UserError
from resbackbone.image_io import SUFFIXES


class Inputs(NamedTuple):
    """Image files, and videos, which are files or the numbers of cameras."""

    images: list[Path]
    videos: list[Path | int]


def find_inputs(words: Sequence[str], output: Path, *, recursive: bool = False) -> Inputs:
    """What `words` name, in their order, each once; a folder's and a pattern's files in the order of their names.

    A number is a camera. What lies in the folder `output` is left out of a folder around it: pictures of an earlier
    call. Raises ValueError for a folder without images, and for a pattern that no file fits.
    """
    images: dict[Path, None] = {}
    videos: dict[Path | int, None] = {}
    for word in words:
        path = Path(word)
        if word.isdecimal() and not path.exists():
            videos[int(word)] = None
        elif path.is_dir():
            images |= dict.fromkeys(_images_in(path, output, recursive=recursive))
        elif glob.has_magic(word) and not path.exists():
            files = [file for file in map(Path, sorted(glob.glob(word, recursive=True))) if file.is_file()]
            if not files:
                raise UserError(f"{word}: no file fits this pattern")
            images |= dict.fromkeys(file for file in files if not _is_video(file))
            videos |= dict.fromkeys(file for file in files if _is_video(file))
        else:
            (videos if _is_video(path) else images)[path] = None
    return Inputs(list(images), list(videos))


def _images_in(folder: Path, output: Path, *, recursive: bool) -> list[Path]:
    files = [f for f in (folder.rglob("*") if recursive else folder.iterdir()) if f.suffix.lower() in SUFFIXES]
    if folder.resolve() != output.resolve():
        files = [file for file in files if output.resolve() not in file.resolve().parents]
    if not files:
        deeper = "" if recursive else "; --recursive looks in its subfolders too"
        raise UserError(f"{folder}: holds no image ({', '.join(SUFFIXES)}){deeper}")
    return sorted(files)


def _is_video(path: Path) -> bool:
    return path.suffix.lower() in video.SUFFIXES


def frames_file(video_file: Path) -> Path:
    """Where the detections of a video's frames go: beside the video with its boxes."""
    return video_file.with_name(f"{video_file.stem}-frames.json")


def output_files(inputs: Inputs, folder: Path) -> dict[Path | int, Path]:
    """Where in `folder` the picture or video of each input goes: under its name, numbered where several have it.

    ValueError if one would be written over what is given.
    """
    stems = [f"camera-{source}" if isinstance(source, int) else source.stem for source in inputs.videos]
    names = [f"{name}.png" for name in _distinct([path.stem for path in inputs.images])]
    names += [f"{name}.mp4" for name in _distinct(stems)]
    files = dict(zip([*inputs.images, *inputs.videos], (folder / name for name in names), strict=True))
    given = {source.resolve() for source in files if isinstance(source, Path)}
    for source, file in files.items():
        if file.resolve() in given:
            kind, what = ("picture", "image") if source in inputs.images else ("video", "video")
            raise UserError(f"--output {folder}: a {kind} would replace the {what} {file}; choose another")
    return files


def _distinct(stems: list[str]) -> list[str]:
    count, taken, names = Counter(stems), set(stems), []
    for number, stem in enumerate(stems, 1):
        name = stem
        while count[stem] > 1 and name in taken:
            name = f"{name}-{number}"
        taken.add(name)
        names.append(name)
    return names


def image_ids_of(images: Sequence[Path], annotations: Path | None, detector: FasterRCNN) -> list[int]:
    """The ids of image files: those of a COCO annotation file, by file name, or without one numbers from 1.

    A file name in the annotations may have folders in it. Raises ValueError for an image that is not in the file, and
    for annotations whose categories are not the detector's.
    """
    if annotations is None:
        return list(range(1, len(images) + 1))
    content = read_annotations(annotations)
    if content.categories != detector.real_categories:
        raise UserError(f"--annotations {annotations}: its categories are not those the detector was made for")
    known = dict(zip(content.file_names(), content.image_ids.tolist(), strict=True))
    return [_id_of(path, known, annotations) for path in images]


def _id_of(path: Path, known: dict[str, int], annotations: Path) -> int:
    parts = path.absolute().parts
    for start in range(len(parts)):  # the longest name first: two folders may have files of one name
        if (image_id := known.get("/".join(parts[start:]))) is not None:
            return image_id
    raise UserError(f"{path}: no image of this name in --annotations {annotations}")

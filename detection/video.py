"""Frames of a video file or a camera, and a video of pictures: through OpenCV, which is optional."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from resbackbone.checks import UserError

SUFFIXES = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv")
RATE = 30.0  # frames a second, where the source gives none, as many cameras


class Video:
    """The frames of a video file, or of the camera of a number, one at a time.

    `count` is their number, None for a camera and where the file does not say (what it says can be wrong); `rate`
    is in frames a second. Raises ValueError for a file or camera that cannot be opened, and without OpenCV.
    """

    def __init__(self, source: Path | int):
        self.name = f"camera {source}" if isinstance(source, int) else str(source)
        if isinstance(source, Path) and not source.is_file():
            raise UserError(f"video {source}: no such file")
        cv2 = _opencv(self.name)
        self._capture = cv2.VideoCapture(source if isinstance(source, int) else str(source))
        if not self._capture.isOpened():
            what = "camera cannot be opened" if isinstance(source, int) else "not a video that OpenCV can read"
            raise UserError(f"{self.name}: {what}")
        count = int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT))
        self.count = count if isinstance(source, Path) and count > 0 else None
        rate = self._capture.get(cv2.CAP_PROP_FPS)
        self.rate = float(rate) if np.isfinite(rate) and rate > 0 else RATE

    def __iter__(self) -> Iterator[Tensor]:  # uint8 [3, H, W], RGB
        try:
            while True:
                there, frame = self._capture.read()  # BGR, [H, W, 3]
                if not there:
                    return
                yield torch.from_numpy(np.ascontiguousarray(frame[:, :, ::-1])).permute(2, 0, 1)
        finally:
            self._capture.release()


class VideoFile:
    """An MPEG-4 file of pictures; `video_file` makes it."""

    def __init__(self, path: Path, rate: float):
        self._path, self._rate = path, rate
        self._writer: Any = None  # OpenCV's, made for the first picture
        self._cv2 = _opencv(str(path))

    def add(self, picture: Image.Image) -> None:
        """Append an RGB picture, of the size of the first; an odd side loses its last pixels, as MPEG-4 wants it."""
        if self._writer is None:
            codec = self._cv2.VideoWriter.fourcc(*"mp4v")
            self._writer = self._cv2.VideoWriter(str(self._path), codec, self._rate, picture.size)
            if not self._writer.isOpened():
                raise UserError(f"{self._path}: OpenCV cannot write a video of {picture.width} x {picture.height}")
        self._writer.write(np.asarray(picture)[:, :, ::-1])

    def close(self) -> None:
        if self._writer is not None:
            self._writer.release()


@contextmanager
def video_file(path: Path, rate: float) -> Iterator[VideoFile]:
    """Yield what appends pictures to a video of `rate` frames a second; it is at `path` once it is whole."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")  # the suffix tells OpenCV the format
    file = VideoFile(temporary, rate)
    try:
        yield file
        file.close()
        if temporary.is_file():
            os.replace(temporary, path)
    finally:
        file.close()
        temporary.unlink(missing_ok=True)


def _opencv(name: str):
    os.environ.setdefault("OPENCV_LOG_LEVEL", "ERROR")  # what goes wrong is said here, in one line
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    try:
        import cv2
    except ModuleNotFoundError:
        raise UserError(f"{name}: a video takes OpenCV: pip install opencv-python-headless") from None
    return cv2

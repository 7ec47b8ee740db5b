"""Videos and cameras, read and written frame by frame through OpenCV, which is optional."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from resbackbone.checks import UserError, require

SUFFIXES = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv")
RATE = 30.0  # frames per second where the source states none, as many cameras do


class Video:
    """The frames of a video file, or of a camera given by its number.

    `count` is the number of frames that the file states, which can be wrong, or None; `rate` is in frames per second.
    Raises ValueError if the file or camera cannot be opened or OpenCV is missing.
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
                success, frame = self._capture.read()  # BGR, [H, W, 3]
                if not success:
                    return
                yield torch.from_numpy(np.ascontiguousarray(frame[:, :, ::-1])).permute(2, 0, 1)
        finally:
            self._capture.release()


@contextmanager
def video_file(path: Path, rate: float) -> Iterator[Callable[[Image.Image], None]]:
    """Yield a function that appends an RGB picture to an MPEG-4 video of `rate` frames per second.

    All pictures have the size of the first; MPEG-4 drops the last row or column of an odd side. The file appears at
    `path` once it is complete, and not at all without pictures.
    """
    cv2 = _opencv(str(path))
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")  # the suffix tells OpenCV the format
    writer: Any = None

    def add(picture: Image.Image) -> None:
        nonlocal writer
        if writer is None:
            writer = cv2.VideoWriter(str(temporary), cv2.VideoWriter.fourcc(*"mp4v"), rate, picture.size)
            if not writer.isOpened():
                raise UserError(f"{path}: OpenCV cannot write a video of {picture.width} x {picture.height}")
        writer.write(np.asarray(picture)[:, :, ::-1])

    try:
        yield add
        if writer is not None:
            writer.release()
            os.replace(temporary, path)
    finally:
        if writer is not None:
            writer.release()
        temporary.unlink(missing_ok=True)


def _opencv(name: str):
    os.environ.setdefault("OPENCV_LOG_LEVEL", "ERROR")  # our own errors explain what is wrong
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    require("video", "cv2", user=f"{name}: a video")
    import cv2

    return cv2

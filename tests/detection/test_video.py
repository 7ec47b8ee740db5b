import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detection.video import RATE, Video, video_file


@pytest.fixture
def opencv():
    return pytest.importorskip("cv2", reason="OpenCV is not installed: pip install opencv-python-headless")


def write(path, frames, rate=12.5):
    with video_file(path, rate) as add:
        for frame in frames:
            add(Image.fromarray(frame))


def plain(colour, size=(48, 64)):
    return np.full((*size, 3), colour, np.uint8)


def test_written_frames_are_read_back_as_rgb_in_order_and_at_their_rate(opencv, tmp_path):
    colours = [(200, 30, 30), (30, 200, 30), (30, 30, 200)]
    write(tmp_path / "a.mp4", map(plain, colours))
    video = Video(tmp_path / "a.mp4")
    frames = list(video)
    assert (video.count, video.rate, video.name) == (3, 12.5, str(tmp_path / "a.mp4"))
    assert all(frame.shape == (3, 48, 64) and frame.dtype == torch.uint8 for frame in frames)
    for frame, colour in zip(frames, colours, strict=True):
        assert frame.float().mean((1, 2)).tolist() == pytest.approx(colour, abs=12)  # compression


def test_an_odd_side_loses_its_last_pixels(opencv, tmp_path):
    write(tmp_path / "a.mp4", [plain((9, 9, 9), (45, 61))] * 2)
    (height, width) = next(iter(Video(tmp_path / "a.mp4"))).shape[1:]
    assert (height, width) == (44, 60)


def test_a_video_appears_once_it_is_complete(opencv, tmp_path):
    path = tmp_path / "a.mp4"
    with pytest.raises(KeyError), video_file(path, RATE) as add:
        add(Image.fromarray(plain((1, 2, 3))))
        assert not path.exists()
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    write(path, [])  # no frame, no file
    assert list(tmp_path.iterdir()) == []


def test_an_unreadable_video_or_camera_is_one_line_and_opencv_prints_nothing(opencv, tmp_path, capfd):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"no video" * 99)
    with pytest.raises(ValueError, match="a.mp4: not a video that OpenCV can read"):
        Video(path)
    with pytest.raises(ValueError, match="^camera 987: camera cannot be opened"):
        Video(987)
    assert capfd.readouterr().err == ""


def test_without_opencv_the_package_to_install_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    (tmp_path / "a.mp4").touch()
    with pytest.raises(ValueError, match="^video nowhere.mp4: no such file$"):
        Video(Path("nowhere.mp4"))
    for source in (tmp_path / "a.mp4", 0):
        with pytest.raises(ValueError, match=r"a video needs cv2: pip install 'resbackbone\[video\]'$"):
            Video(source)
    with pytest.raises(ValueError, match=r"pip install 'resbackbone\[video\]'$"), video_file(tmp_path / "b.mp4", RATE):
        pass

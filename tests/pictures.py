"""Random pictures as image files, for tests that read them."""

import io

import numpy as np
from PIL import Image


def encoded(height, width, seed=0, mode="RGB", kind="JPEG"):
    """A smooth random picture as a file."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 5, 4), dtype=np.uint8)
    image = Image.fromarray(small[:, :, :3]).resize((width, height), Image.Resampling.BICUBIC).convert(mode)
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()

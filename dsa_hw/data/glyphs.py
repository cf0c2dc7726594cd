"""``glyphs``: characters drawn from matplotlib's fonts, a data set that needs no download.

Digits and capital letters (36 classes) in 19 faces, under random affine maps, colours,
low-frequency backgrounds, occluding bars and noise. Meant for benchmarks in which width
has to matter and a training run takes minutes on a processor.
"""

import math
import string
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dsa_hw.data.tensors import ImageTensors

CHARACTERS = string.digits + string.ascii_uppercase
FACES = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    "cmr10",
    "cmss10",
    "cmtt10",
)
TRAIN_SIZE = 16_000
TEST_SIZE = 4_000
INPUT_SHAPE = (3, 24, 24)

_MASTER_SIZE = 64  # pixels a side of a master drawing
_EM_SIZE = 48  # pixels an em of a master drawing: capitals are about 35 high
_CHUNK = 250  # images drawn at once, each chunk from its own random stream
_BARS = 3  # each image has each of them with probability 1/2
_NEGATIVES = 0.25  # part with dark ink; at 1/2 no linear feature helps and training starts late
_STREAMS = {"train": 0, "test": 1}

Split = Literal["train", "test"]
Uniform = Callable[..., Tensor]  # (low, high, *shape) -> [chunk, *shape]


class GlyphsDataset(ImageTensors):
    """Rendered characters; labels index :data:`CHARACTERS`.

    Each image is normalised by itself: papers and inks differ so much that under common figures
    training takes some hundred steps to find anything else.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        super().__init__(images, labels, mean=None, std=None, max_shift=2)


def make_glyphs(
    split: Split, size: int, *, seed: int = 0, height: int = 24, width: int = 24
) -> GlyphsDataset:
    """Draw ``size`` RGB images of ``height`` x ``width`` for ``split``.

    The same arguments give the same images; the first images of a larger set are the
    smaller set. The splits draw from separate random streams.
    """
    masters = draw_masters()
    images = torch.empty(size, 3, height, width, dtype=torch.uint8)
    labels = torch.empty(size, dtype=torch.int64)
    for number, start in enumerate(range(0, size, _CHUNK)):
        generator = _generator(seed, _STREAMS[split], number)
        chunk_images, chunk_labels = _draw_chunk(masters, height, width, generator)
        stop = min(start + _CHUNK, size)
        images[start:stop] = chunk_images[: stop - start]
        labels[start:stop] = chunk_labels[: stop - start]
    return GlyphsDataset(images, labels)


def draw_masters() -> Tensor:
    """Coverage in [0, 1] of every character in every face: ``[faces, 36, 64, 64]``."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return torch.stack([_draw_face(folder / f"{face}.ttf") for face in FACES])


def _draw_face(font_file: Path) -> Tensor:
    from matplotlib.ft2font import FT2Font

    font = FT2Font(str(font_file))
    font.set_size(_EM_SIZE, 72)  # at 72 dots an inch a point is a pixel
    drawings = []
    for character in CHARACTERS:
        font.set_text(character)
        font.draw_glyphs_to_bitmap(antialiased=True)
        drawings.append(_centre(np.array(font.get_image())))
    return torch.stack(drawings)


def _centre(bitmap: np.ndarray) -> Tensor:
    """The bitmap's inked part in the middle of a master, as coverage."""
    rows, columns = np.nonzero(bitmap.any(1))[0], np.nonzero(bitmap.any(0))[0]
    ink = bitmap[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    top, left = ((_MASTER_SIZE - side) // 2 for side in ink.shape)
    master = torch.zeros(_MASTER_SIZE, _MASTER_SIZE)
    master[top : top + ink.shape[0], left : left + ink.shape[1]] = torch.from_numpy(ink / 255)
    return master


def _draw_chunk(
    masters: Tensor, height: int, width: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    labels = torch.randint(len(CHARACTERS), (_CHUNK,), generator=generator)
    faces = torch.randint(len(FACES), (_CHUNK,), generator=generator)
    uniform = partial(_uniform, generator)

    paper, ink = _colours(uniform)
    canvas = paper + _low_frequency(height, width, uniform)
    coverage = _warp(masters[faces, labels][:, None], height, width, uniform)
    canvas = torch.lerp(canvas, ink + _low_frequency(height, width, uniform) / 2, coverage)
    for _ in range(_BARS):
        canvas = torch.lerp(canvas, uniform(0, 1, 3, 1, 1), _bar(height, width, uniform))
    canvas = torch.where(uniform(0, 1, 1, 1, 1) < _NEGATIVES, 1 - canvas, canvas)
    noise = torch.randn(canvas.shape, generator=generator)
    canvas = canvas + uniform(0.02, 0.15, 1, 1, 1) * noise
    return (canvas.clamp(0, 1) * 255).round().to(torch.uint8), labels


def _colours(uniform: Uniform) -> tuple[Tensor, Tensor]:
    """Paper and lighter ink ``[B, 3, 1, 1]``."""
    paper = uniform(0.05, 0.65, 3, 1, 1)
    return paper, paper + uniform(0.2, 0.55, 1, 1, 1) * uniform(0.6, 1.4, 3, 1, 1)


def _low_frequency(height: int, width: int, uniform: Uniform) -> Tensor:
    """Smooth colour blotches ``[B, 3, H, W]`` of random strength."""
    coarse = uniform(-1, 1, 3, 5, 5) * uniform(0.05, 0.25, 1, 1, 1)
    return F.interpolate(coarse, (height, width), mode="bilinear", align_corners=True)


def _warp(masters: Tensor, height: int, width: int, uniform: Uniform) -> Tensor:
    """Coverage ``[B, 1, H, W]`` under random scale, aspect, rotation, shear and shift."""
    angle = uniform(-0.35, 0.35)  # radians
    zoom = uniform(0.7, 1.3)  # 1: capitals are 0.55 of the image's height
    stretch = uniform(0.85, 1.18)
    shear = uniform(-0.25, 0.25)
    cos, sin = angle.cos() / zoom, angle.sin() / zoom
    rows = torch.stack([cos * stretch, (shear * cos - sin) * stretch, uniform(-0.15, 0.15)], 1)
    columns = torch.stack([sin / stretch, (shear * sin + cos) / stretch, uniform(-0.15, 0.15)], 1)
    theta = torch.stack([rows, columns], 1)
    oversampling = 2 if max(height, width) < _MASTER_SIZE else 1
    fine = [len(masters), 1, height * oversampling, width * oversampling]
    grid = F.affine_grid(theta, fine, align_corners=False)
    return F.avg_pool2d(F.grid_sample(masters, grid, align_corners=False), oversampling)


def _bar(height: int, width: int, uniform: Uniform) -> Tensor:
    """Opacity ``[B, 1, H, W]`` of a straight bar; half of the images get none."""
    y = torch.linspace(-1, 1, height)[:, None]
    x = torch.linspace(-1, 1, width)
    angle = uniform(0, math.pi, 1, 1, 1)
    across = x * angle.cos() + y * angle.sin() - uniform(-0.8, 0.8, 1, 1, 1)
    half_width = uniform(0.05, 0.16, 1, 1, 1)
    edge = ((half_width - across.abs()) * height / 2 + 0.5).clamp(0, 1)
    return edge * (uniform(0, 1, 1, 1, 1) < 0.5)


def _uniform(generator: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    """Uniform numbers ``[chunk, *shape]`` in [low, high)."""
    return torch.rand(_CHUNK, *shape, generator=generator) * (high - low) + low


def _generator(*entropy: int) -> torch.Generator:
    state = np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)

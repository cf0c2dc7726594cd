"""Images that tell apart in seconds: colours under noise."""

from __future__ import annotations

import torch

from dsa_hw.data import DataSplits, ImageTensors


def coloured(classes: int, size: int, train: int, test: int, *, max_shift: int = 0) -> DataSplits:
    """``classes`` colours under noise, (3, size, size); the same at every call."""
    generator = torch.Generator().manual_seed(5)
    means = torch.randint(60, 196, (classes, 3, 1, 1), generator=generator)

    def split(count: int) -> ImageTensors:
        labels = torch.randint(0, classes, (count,), generator=generator)
        shade = torch.randint(-60, 60, (count, 3, size, size), generator=generator)
        images = (means[labels] + shade).clamp(0, 255).to(torch.uint8)
        return ImageTensors(images, labels, mean=0.5, std=0.2, max_shift=max_shift)

    return DataSplits(split(train), split(test), classes, (3, size, size))

"""Images held in memory as bytes, and whole batches taken straight from them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dsa_hw.errors import UserError


class ImageTensors(Dataset[tuple[Tensor, int]]):
    """A data set that lies in memory.

    Attributes:
        images: uint8 ``[N, C, H, W]``.
        labels: int64 ``[N]``.
        mean, std: of a pixel after division by 255; items are ``(pixel / 255 - mean) / std``.
            None takes each image's own (``std`` with a fortieth added, against flat images).
        max_shift: the largest shift, in pixels, that training may apply to an image.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        mean: float | None,
        std: float | None,
        max_shift: int = 0,
    ) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ValueError(f"images must be uint8 [N, C, H, W], got {_describe(images)}")
        if labels.shape != images.shape[:1]:
            raise ValueError(f"{len(images)} images need as many labels, got {_describe(labels)}")
        self.images = images
        self.labels = labels
        self.mean = mean
        self.std = std
        self.max_shift = max_shift

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.normalise(self.images[index]), int(self.labels[index])

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int]]:
        """Several items at once; a ``DataLoader`` calls this where it exists."""
        chosen = torch.as_tensor(indices)
        return list(
            zip(self.normalise(self.images[chosen]), self.labels[chosen].tolist(), strict=True)
        )

    def subset(self, chosen: Tensor) -> "ImageTensors":
        """The images that ``chosen`` (int64 ``[n]``) indexes, in that order."""
        return ImageTensors(
            self.images[chosen],
            self.labels[chosen],
            mean=self.mean,
            std=self.std,
            max_shift=self.max_shift,
        )

    def normalise(self, images: Tensor) -> Tensor:
        """float32 of the same shape, about zero mean and unit spread."""
        pixels = images.float() / 255
        each = (-3, -2, -1)
        mean = pixels.mean(each, keepdim=True) if self.mean is None else self.mean
        std = pixels.std(each, keepdim=True) + 0.025 if self.std is None else self.std
        return (pixels - mean) / std


@dataclass(frozen=True, eq=False)
class TensorBatches:
    """Normalised batches ``(x [B, C, H, W] float32, y [B] int64)``, made by indexing.

    Each iteration is one epoch. A shuffled one takes its order and its shifts from
    ``generator``, which moves on, so that epochs differ and a run repeats.

    ``part`` is (which, of how many): only this part of every batch is made. All parts together
    are the whole batches, whatever their number.
    """

    dataset: ImageTensors
    batch_size: int
    generator: torch.Generator
    shuffle: bool
    augment: bool
    part: tuple[int, int] = (0, 1)

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for chosen in self._order().split(self.batch_size):
            shifts = self._shifts(len(chosen))
            index, count = self.part
            own = chosen.tensor_split(count)[index]
            images = self.dataset.images[own]
            if shifts is not None:
                images = shift(images, shifts.tensor_split(count, dim=1)[index])
            yield self.dataset.normalise(images), self.dataset.labels[own]

    def _shifts(self, count: int) -> Tensor | None:
        """int64 ``[2, count]``; None where images stay where they are."""
        if not self.augment or not self.dataset.max_shift:
            return None
        return random_shifts(count, self.dataset.max_shift, self.generator)

    def _order(self) -> Tensor:
        if self.shuffle:
            return torch.randperm(len(self.dataset), generator=self.generator)
        return torch.arange(len(self.dataset))


def batches(
    dataset: ImageTensors,
    batch_size: int,
    *,
    shuffle: bool = False,
    augment: bool = False,
    seed: int = 0,
    part: tuple[int, int] = (0, 1),
) -> TensorBatches:
    """Batches of an in-memory data set, some times faster than a ``DataLoader``'s.

    The last batch may be smaller. ``augment`` shifts each image by up to the data set's
    ``max_shift`` pixels along both axes. ``part`` is this process's of every batch, and the number
    of processes.

    Raises:
        UserError: ``batch_size`` is not positive.
    """
    if batch_size < 1:
        raise UserError(f"batch size is {batch_size}; it must be 1 or more")
    generator = torch.Generator().manual_seed(seed)
    return TensorBatches(dataset, batch_size, generator, shuffle, augment, part)


def random_shifts(count: int, max_shift: int, generator: torch.Generator) -> Tensor:
    """int64 ``[2, count]``: rows and columns to move each image by, at most ``max_shift``."""
    return torch.randint(-max_shift, max_shift + 1, (2, count), generator=generator)


def shift(images: Tensor, shifts: Tensor) -> Tensor:
    """Each image of ``[B, C, H, W]`` moved by its own of ``[2, B]`` pixels, edges repeated.

    The result has the channels-last memory format.
    """
    count, _, height, width = images.shape
    rows = (torch.arange(height) + shifts[0, :, None]).clamp(0, height - 1)
    columns = (torch.arange(width) + shifts[1, :, None]).clamp(0, width - 1)
    image = torch.arange(count)[:, None, None]
    return images.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]].permute(
        0, 3, 1, 2
    )


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"

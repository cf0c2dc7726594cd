"""A data set's name turned into its training and test splits.

torchvision, scikit-learn and matplotlib are imported only when a name asks for them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, Subset

from dsa_hw.data import glyphs
from dsa_hw.data.tensors import ImageTensors
from dsa_hw.errors import UserError
from dsa_hw.runs.factories import is_factory_name, load_factory

DATASET_NAMES = ("glyphs", "digits", "cifar10", "cifar100", "imagefolder")
_DIGITS_TEST_SIZE = 360  # a fifth of the 1,797
_CIFAR_FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
_CIFAR_MEAN, _CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class DataSplits:
    """Training and test data.

    Both yield ``(image, label)``: a normalised float tensor of ``input_shape``
    (channels, height, width) and an int in ``[0, num_classes)``.
    """

    train: Dataset[tuple[Tensor, int]]
    test: Dataset[tuple[Tensor, int]]
    num_classes: int
    input_shape: tuple[int, int, int]


def load_data(
    name: str,
    root: Path | None = None,
    *,
    input_shape: tuple[int, int, int] | None = None,
    seed: int = 0,
    train_size: int | None = None,
    test_size: int | None = None,
) -> DataSplits:
    """The data set that ``name`` stands for.

    Args:
        name: ``glyphs``, ``digits``, ``cifar10``, ``cifar100``, ``imagefolder``, or
            ``package.module:factory``, a callable that takes ``root`` and returns
            :class:`DataSplits`.
        root: the folder of ``cifar10``, ``cifar100`` and ``imagefolder``.
        input_shape: channels, height and width; None takes the data set's own.
        seed: decides the glyphs, the digits' split, and which images a size keeps.
        train_size, test_size: how many images; None takes all (glyphs: 16,000 and 4,000).

    Raises:
        UserError: no such data set, no such folder, a size or shape it cannot have.
    """
    if name == "glyphs":
        return _glyphs(input_shape or glyphs.INPUT_SHAPE, seed, train_size, test_size)
    splits = _whole(name, root, input_shape, seed)
    return replace(
        splits,
        train=_part(splits.train, train_size, seed, "train"),
        test=_part(splits.test, test_size, seed, "test"),
    )


def _whole(
    name: str, root: Path | None, input_shape: tuple[int, int, int] | None, seed: int
) -> DataSplits:
    if name == "digits":
        return _digits(input_shape or (1, 8, 8), seed)
    if name in _CIFAR_FOLDERS:
        return _cifar(name, root, input_shape or (3, 32, 32))
    if name == "imagefolder":
        return _imagefolder(root, input_shape or (3, 224, 224))
    if is_factory_name(name):
        return _from_factory(name, root, input_shape)
    raise UserError(
        f"unknown data set {name!r}. Known: {', '.join(DATASET_NAMES)}, "
        "or package.module:factory for your own."
    )


def _glyphs(
    input_shape: tuple[int, int, int], seed: int, train_size: int | None, test_size: int | None
) -> DataSplits:
    _need_rgb("glyphs", input_shape)
    _, height, width = input_shape
    train_size = _at_least_one("train", train_size, glyphs.TRAIN_SIZE)
    test_size = _at_least_one("test", test_size, glyphs.TEST_SIZE)
    train = glyphs.make_glyphs("train", train_size, seed=seed, height=height, width=width)
    test = glyphs.make_glyphs("test", test_size, seed=seed, height=height, width=width)
    return DataSplits(train, test, len(glyphs.CHARACTERS), input_shape)


def _digits(input_shape: tuple[int, int, int], seed: int) -> DataSplits:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError(
            f"the digits data set comes with scikit-learn, which does not import here ({error}). "
            "Install it:  pip install scikit-learn"
        ) from error
    pixels, labels = load_digits(return_X_y=True)  # 0 to 16, a row of 64 an image
    images = torch.as_tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    images = (_resize(images, input_shape).clamp(0, 1) * 255).round().to(torch.uint8)
    order = _permutation(len(images), seed)
    test, train = (
        ImageTensors(images[part], torch.as_tensor(labels)[part].long(), mean=0.305, std=0.376)
        for part in (order[:_DIGITS_TEST_SIZE], order[_DIGITS_TEST_SIZE:])
    )
    return DataSplits(train, test, 10, input_shape)


def _cifar(name: str, root: Path | None, input_shape: tuple[int, int, int]) -> DataSplits:
    from torchvision import datasets, transforms

    _need_rgb(name, input_shape)
    layout = f"a folder that holds {_CIFAR_FOLDERS[name]}/, the unpacked Python version"
    folder = _need_folder(name, root, layout)
    resize = [] if input_shape[1:] == (32, 32) else [transforms.Resize(input_shape[1:])]
    to_tensor = [*resize, transforms.ToTensor(), transforms.Normalize(_CIFAR_MEAN, _CIFAR_STD)]
    augment = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
    source = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    try:
        train = source(folder, train=True, transform=transforms.Compose([*augment, *to_tensor]))
        test = source(folder, train=False, transform=transforms.Compose(to_tensor))
    except (RuntimeError, OSError) as error:  # torchvision: not found or corrupted
        raise UserError(
            f"cannot read {name} from {folder}: {error}. `root` must be {layout}."
        ) from error
    return DataSplits(train, test, len(train.classes), input_shape)


def _imagefolder(root: Path | None, input_shape: tuple[int, int, int]) -> DataSplits:
    from torchvision import transforms

    _need_rgb("imagefolder", input_shape)
    train_folder, test_folder = _image_folders(root)
    size = input_shape[1:]
    to_tensor = [transforms.ToTensor(), transforms.Normalize(_IMAGENET_MEAN, _IMAGENET_STD)]
    augment = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
    centre = [transforms.Resize(round(max(size) / 0.875)), transforms.CenterCrop(size)]
    train = _read_images(train_folder, transforms.Compose([*augment, *to_tensor]))
    test = _read_images(test_folder, transforms.Compose([*centre, *to_tensor]))
    if train.classes != test.classes:
        differing = sorted(set(train.classes) ^ set(test.classes))
        raise UserError(
            f"{train_folder} and {test_folder} must hold the same class folders; only one of "
            f"them has {', '.join(differing[:5])}"
        )
    return DataSplits(train, test, len(train.classes), input_shape)


def _image_folders(root: Path | None) -> tuple[Path, Path]:
    layout = "a folder that holds train/CLASS/IMAGE and val/CLASS/IMAGE (or test/CLASS/IMAGE)"
    folder = _need_folder("imagefolder", root, layout)
    train = _need_folder("imagefolder", folder / "train", layout)
    only_test = (folder / "test").is_dir() and not (folder / "val").is_dir()
    held_out = folder / ("test" if only_test else "val")
    return train, _need_folder("imagefolder", held_out, layout)


def _read_images(folder: Path, transform: Callable[[Any], Tensor]) -> Any:
    from torchvision.datasets import ImageFolder

    try:
        return ImageFolder(str(folder), transform)
    except FileNotFoundError as error:
        raise UserError(
            f"cannot read images from {folder}: {error}. It must hold one folder a class, with "
            "image files in each."
        ) from error


def _from_factory(
    name: str, root: Path | None, input_shape: tuple[int, int, int] | None
) -> DataSplits:
    splits = load_factory(name)(root=root)
    if not isinstance(splits, DataSplits):
        raise UserError(
            f"{name} returned a {type(splits).__name__}; a data factory must return "
            "dsa_hw.data.DataSplits"
        )
    if input_shape not in (None, splits.input_shape):
        raise UserError(
            f"{name} gives images of shape {splits.input_shape}, not the {input_shape} asked "
            "for. Change the factory, or leave the input shape out."
        )
    return splits


def _part(
    dataset: Dataset[tuple[Tensor, int]], size: int | None, seed: int, split: str
) -> Dataset[tuple[Tensor, int]]:
    """``size`` images chosen at random by ``seed``; all of them for None."""
    if size is None:
        return dataset
    total = len(dataset)  # pyright: ignore[reportArgumentType]  (map-style: it has a length)
    if _at_least_one(split, size, total) > total:
        raise UserError(f"{split}_size is {size}, but the data set has {total} {split} images")
    chosen = _permutation(total, seed)[:size]
    if isinstance(dataset, ImageTensors):
        return dataset.subset(chosen)
    return Subset(dataset, chosen.tolist())


def _at_least_one(split: str, size: int | None, default: int) -> int:
    if size is None:
        return default
    if size < 1:
        raise UserError(f"{split}_size is {size}; it must be 1 or more")
    return size


def _permutation(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def _resize(images: Tensor, input_shape: tuple[int, int, int]) -> Tensor:
    """``[N, 1, h, w]`` to ``[N, *input_shape]``, the one channel repeated."""
    channels, height, width = input_shape
    if images.shape[2:] != (height, width):
        images = F.interpolate(images, (height, width), mode="bilinear", align_corners=False)
    return images.expand(-1, channels, -1, -1)


def _need_rgb(name: str, input_shape: tuple[int, int, int]) -> None:
    if input_shape[0] != 3:
        raise UserError(
            f"{name} has 3 colour channels; the input shape {input_shape} asks for {input_shape[0]}"
        )


def _need_folder(name: str, folder: Path | None, layout: str) -> Path:
    if folder is None:
        raise UserError(f"{name} is read from a folder, and none was given: `root` is {layout}")
    if not folder.is_dir():
        raise UserError(f"{name}: there is no folder {folder}. `root` must be {layout}.")
    return folder

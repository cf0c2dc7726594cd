"""Laws of the data sets: the seed decides everything, splits do not overlap, errors help."""

import math
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader

from dsa_hw.data import DataSplits, GlyphsDataset, ImageTensors, batches, load_data, make_glyphs
from dsa_hw.data.glyphs import CHARACTERS, FACES, draw_masters
from dsa_hw.data.tensors import random_shifts, shift
from dsa_hw.errors import UserError


@pytest.fixture(scope="module")
def glyphs() -> DataSplits:
    return load_data("glyphs", train_size=750, test_size=500)


def image_set(dataset: ImageTensors) -> set[bytes]:
    return {image.numpy().tobytes() for image in dataset.images}


def tensors(dataset: object) -> ImageTensors:
    assert isinstance(dataset, ImageTensors)
    return dataset


def identity_splits(root: Path | None) -> DataSplits:
    images = torch.zeros(4, 3, 5, 5, dtype=torch.uint8)
    data = ImageTensors(images, torch.arange(4), mean=0.0, std=1.0)
    return DataSplits(data, data, 4, (3, 5, 5))


def not_splits(root: Path | None) -> int:
    return 3


# glyphs


def test_same_seed_same_glyphs() -> None:
    first, again = make_glyphs("train", 20, seed=3), make_glyphs("train", 20, seed=3)
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.labels, again.labels)


def test_other_seed_other_glyphs() -> None:
    one, other = make_glyphs("train", 250, seed=3), make_glyphs("train", 250, seed=4)
    assert not image_set(one) & image_set(other)


def test_smaller_glyphs_set_begins_the_larger() -> None:
    # 310 is no multiple of the 250 drawn at once, and the larger set has one chunk more
    larger, smaller = make_glyphs("test", 550), make_glyphs("test", 310)
    assert torch.equal(larger.images[:310], smaller.images)
    assert torch.equal(larger.labels[:310], smaller.labels)


def test_glyphs_train_and_test_share_no_image(glyphs: DataSplits) -> None:
    train, test = image_set(tensors(glyphs.train)), image_set(tensors(glyphs.test))
    assert len(train) == 750
    assert len(test) == 500
    assert not train & test


def test_glyphs_ignore_and_leave_the_global_random_state() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = make_glyphs("train", 10)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(make_glyphs("train", 10).images, first.images)


def test_glyphs_labels_cover_the_classes(glyphs: DataSplits) -> None:
    labels = tensors(glyphs.train).labels
    assert glyphs.num_classes == len(CHARACTERS) == 36
    # 750 draws miss one of 36 classes with a chance of 36 * (35/36)^750 < 1e-7; seed fixed
    assert torch.equal(labels.unique(), torch.arange(36))


def test_glyphs_items_are_normalised_and_typed(glyphs: DataSplits) -> None:
    image, label = glyphs.train[0]
    assert image.dtype == torch.float32
    assert image.shape == glyphs.input_shape == (3, 24, 24)
    assert type(label) is int
    pixels = tensors(glyphs.train).normalise(tensors(glyphs.train).images)
    # each image by its own mean (float32 sums over 1,728 pixels) and its own spread, which is at
    # least 0.05 here, beside the fortieth that is added to it
    assert pixels.mean((1, 2, 3)).abs().max() < 1e-5
    assert 0.6 < pixels.std((1, 2, 3)).min() < pixels.std((1, 2, 3)).max() < 1


def test_every_character_is_inked_and_whole_in_every_face() -> None:
    masters = draw_masters()
    assert masters.shape == (len(FACES), 36, 64, 64)
    assert (masters.amax((2, 3)) > 0.9).all()
    border = masters.clone()
    border[:, :, 1:-1, 1:-1] = 0
    assert not border.any(), "a character touches the border, so it may be cut off"


def test_glyphs_take_the_asked_size() -> None:
    splits = load_data("glyphs", input_shape=(3, 32, 40), train_size=8, test_size=4)
    assert splits.input_shape == (3, 32, 40)
    assert splits.train[7][0].shape == (3, 32, 40)
    assert len(tensors(splits.train)) == 8
    assert len(tensors(splits.test)) == 4


# batches


@settings(max_examples=25, deadline=None)
@given(size=st.integers(1, 40), batch_size=st.integers(1, 50), shuffle=st.booleans())
def test_an_epoch_shows_every_item_once(size: int, batch_size: int, shuffle: bool) -> None:
    images = torch.arange(size, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)
    data = ImageTensors(images, torch.arange(size), mean=0.0, std=1 / 255)
    loader = batches(data, batch_size, shuffle=shuffle, seed=size)
    parts = list(loader)
    assert len(parts) == len(loader) == math.ceil(size / batch_size)
    x, y = (torch.cat(column) for column in zip(*parts, strict=True))
    assert sorted(y.tolist()) == list(range(size))
    assert torch.equal(x[:, 0, 0, 0].round().long(), y)  # images stay with their labels


def test_batches_repeat_by_seed_and_differ_by_epoch(glyphs: DataSplits) -> None:
    data = tensors(glyphs.train)
    one, other = (batches(data, 100, shuffle=True, augment=True, seed=5) for _ in range(2))
    first, second = next(iter(one))[0], next(iter(one))[0]
    assert torch.equal(first, next(iter(other))[0])
    assert not torch.equal(first, second)


def test_batches_equal_a_data_loaders(glyphs: DataSplits) -> None:
    data = tensors(glyphs.test)
    for (x, y), (x_loader, y_loader) in zip(batches(data, 128), DataLoader(data, 128), strict=True):
        assert torch.equal(x, x_loader)
        assert torch.equal(y, y_loader)


@pytest.mark.parametrize("count", [2, 3])
def test_parts_of_batches_are_the_whole_ones(glyphs: DataSplits, count: int) -> None:
    """Several processes see the images, shifts included, that one would; also of an odd rest."""
    data = tensors(glyphs.train)
    options = {"shuffle": True, "augment": True, "seed": 5}
    whole = batches(data, 64, **options)
    parts = [batches(data, 64, **options, part=(index, count)) for index in range(count)]
    for (x, y), *own in zip(whole, *parts, strict=True):
        assert torch.equal(x, torch.cat([images for images, _ in own]))
        assert torch.equal(y, torch.cat([labels for _, labels in own]))
        sizes = [len(labels) for _, labels in own]
        assert max(sizes) - min(sizes) <= 1


def test_shift_moves_the_whole_image_and_repeats_its_edge() -> None:
    images = torch.arange(16, dtype=torch.uint8).reshape(1, 1, 4, 4).repeat(200, 3, 1, 1)
    padded = torch.nn.functional.pad(images.float(), (2, 2, 2, 2), mode="replicate")
    windows = [
        padded[0, :, top : top + 4, left : left + 4] for top in range(5) for left in range(5)
    ]
    shifted = shift(images, random_shifts(200, 2, torch.Generator().manual_seed(0)))
    seen: list[int] = []
    for image in shifted.float():
        matching = [n for n, window in enumerate(windows) if torch.equal(image, window)]
        assert len(matching) == 1
        seen += matching
    # 200 draws of 25 shifts miss one with a chance of 25 * (24/25)^200 = 0.7%; seed fixed
    assert set(seen) == set(range(25))


def test_batch_size_below_one_is_refused(glyphs: DataSplits) -> None:
    with pytest.raises(UserError, match="batch size is 0"):
        batches(tensors(glyphs.train), 0)


# other data sets


def test_digits_split_covers_everything_once_and_resizes() -> None:
    splits = load_data("digits", seed=1)
    assert len(tensors(splits.train)) + len(tensors(splits.test)) == 1797
    assert splits.input_shape == splits.train[0][0].shape == (1, 8, 8)
    pixels = tensors(splits.train).normalise(tensors(splits.train).images)
    assert pixels.mean() == pytest.approx(0, abs=0.02)  # constants are the whole set's,
    assert pixels.std() == pytest.approx(1, abs=0.02)  # given to three digits
    large = load_data("digits", seed=1, input_shape=(3, 16, 16))
    assert large.train[0][0].shape == (3, 16, 16)
    assert torch.equal(tensors(large.train).labels, tensors(splits.train).labels)


def test_sizes_choose_a_seeded_part() -> None:
    one, same, other = (
        tensors(load_data("digits", train_size=50, seed=seed).train) for seed in (1, 1, 2)
    )
    assert len(one) == 50
    assert torch.equal(one.images, same.images)
    assert not torch.equal(one.images, other.images)


def write_cifar(folder: Path, names: list[str], label_key: str, classes_key: str) -> None:
    """Two images a file, in the format of the published batches."""
    folder.mkdir()
    for name in names:
        batch = {"data": np.full((2, 3072), 100, np.uint8), label_key: [0, 1]}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "meta").write_bytes(pickle.dumps({classes_key: ["apple", "bee", "cup"]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({classes_key: ["apple", "bee", "cup"]}))


@pytest.mark.parametrize("shape", [(3, 32, 32), (3, 24, 40)])
def test_cifar_is_read_from_its_folder(
    shape: tuple[int, int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the checksums are those of the published files
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    batch_names = [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]
    write_cifar(tmp_path / "cifar-10-batches-py", batch_names, "labels", "label_names")
    write_cifar(tmp_path / "cifar-100-python", ["train", "test"], "fine_labels", "fine_label_names")
    for name, train_count in (("cifar10", 10), ("cifar100", 2)):
        splits = load_data(name, tmp_path, input_shape=shape)
        assert splits.num_classes == 3
        assert sum(1 for _ in DataLoader(splits.train)) == train_count
        image, label = splits.test[1]
        assert image.shape == shape
        assert label == 1


def write_images(folder: Path, classes: tuple[str, ...]) -> None:
    from PIL import Image

    for shade, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (40, 30), (60 * shade, 0, 0)).save(folder / name / "image.png")


@pytest.mark.parametrize("held_out", ["val", "test"])
def test_imagefolder_reads_either_layout(tmp_path: Path, held_out: str) -> None:
    write_images(tmp_path / "train", ("cat", "dog"))
    write_images(tmp_path / held_out, ("cat", "dog"))
    splits = load_data("imagefolder", tmp_path, input_shape=(3, 32, 48))
    assert splits.num_classes == 2
    for image, label in (splits.train[1], splits.test[1]):
        assert isinstance(image, Tensor)
        assert image.shape == (3, 32, 48)
        assert label == 1


def test_imagefolder_refuses_differing_classes(tmp_path: Path) -> None:
    write_images(tmp_path / "train", ("cat", "dog"))
    write_images(tmp_path / "val", ("cat", "fox"))
    with pytest.raises(UserError, match="dog, fox"):
        load_data("imagefolder", tmp_path)


def test_factory_is_called() -> None:
    splits = load_data(f"{__name__}:identity_splits", train_size=2)
    assert splits.num_classes == 4
    assert len(tensors(splits.train)) == 2


# errors


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mnist1d", ["'mnist1d'", "glyphs, digits, cifar10, cifar100, imagefolder"]),
        ("no_such_package.data:make", ["no_such_package.data", "PYTHONPATH"]),
        (f"{__name__}:missing", ["missing", "not a factory"]),
        (f"{__name__}:not_splits", ["int", "DataSplits"]),
        ("cifar10", ["root", "cifar-10-batches-py"]),
        ("imagefolder", ["root", "train/CLASS/IMAGE"]),
    ],
)
def test_wrong_names_are_explained(name: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_data(name)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "imagefolder"])
def test_missing_folder_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no folder .*nowhere"):
        load_data(name, tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "imagefolder"])
def test_empty_folder_is_named_with_the_layout(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_data(name, tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "`root` must be a folder that holds" in str(caught.value)


@pytest.mark.parametrize(("split", "size"), [("train", 0), ("test", -1), ("train", 10_000)])
def test_impossible_sizes_are_refused(split: str, size: int) -> None:
    train_size, test_size = (size, None) if split == "train" else (None, size)
    with pytest.raises(UserError, match=f"{split}_size is {size}"):
        load_data("digits", train_size=train_size, test_size=test_size)


def test_grey_glyphs_are_refused() -> None:
    with pytest.raises(UserError, match="3 colour channels"):
        load_data("glyphs", input_shape=(1, 24, 24))


def test_importing_costs_no_heavy_package() -> None:
    code = (
        "import sys, dsa_hw.data, dsa_hw.models; "
        "print([n for n in ('timm', 'torchvision', 'matplotlib', 'sklearn') if n in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_glyphs_class_is_an_image_tensors(glyphs: DataSplits) -> None:
    assert isinstance(glyphs.train, GlyphsDataset)
    assert isinstance(glyphs.train, ImageTensors)

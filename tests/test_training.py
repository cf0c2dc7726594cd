"""The reference training loop: what a stage sees, and runs of several precisions."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dsa_hw.comparison.cells import Cell, Target, run_config
from dsa_hw.data import DataSplits, ImageTensors
from dsa_hw.pipeline.finished_search import FinishedSearch
from dsa_hw.pipeline.run import continued
from dsa_hw.runs.config import CompareConfig, PruneConfig
from dsa_hw.runs.folder import RunFolder
from dsa_hw.training import precision as training_precision
from dsa_hw.training.schedule import Stage, make_optimizer
from dsa_hw.training.trainer import Trainer

IMAGES = 64
AUTO = PruneConfig(target_ratio=0.5, train_device="cpu", mixed_precision="auto")


def trainer_in(folder: Path, precision: str = "no") -> Trainer:
    """On images that tell their number: all pixels of the k-th are k."""
    pixels = torch.arange(IMAGES, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8)
    labels = torch.zeros(IMAGES, dtype=torch.long)
    data = ImageTensors(pixels.contiguous(), labels, mean=0.0, std=1.0)
    config = PruneConfig(
        target_ratio=0.5, train_batch_size=8, train_device="cpu", out=str(folder),
        mixed_precision=precision,  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    return Trainer(config, DataSplits(data, data, 2, (3, 8, 8)), RunFolder(folder))


class Recorder(nn.Module):
    """Classifies, and keeps the order of the images that it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += (255 * x.amax((1, 2, 3))).round().int().tolist()
        return self.head(x.mean((2, 3)))


def orders(folder: Path, stage: str, epochs: int) -> Iterator[tuple[int, ...]]:
    """The images of each epoch."""
    model = Recorder()
    trainer_in(folder).train(model, Stage(stage, epochs, 0, 8 * epochs))
    each = len(model.seen) // epochs
    return (tuple(model.seen[i * each : (i + 1) * each]) for i in range(epochs))


def test_no_epoch_of_a_run_repeats_the_order_of_another(tmp_path: Path) -> None:
    every = [o for stage in ("dense", "search", "finetune") for o in orders(tmp_path, stage, 3)]
    assert len(set(every)) == len(every) == 9
    assert {tuple(sorted(o)) for o in every} == {tuple(range(IMAGES))}


def test_the_same_stage_has_the_same_order_again(tmp_path: Path) -> None:
    assert list(orders(tmp_path / "a", "search", 2)) == list(orders(tmp_path / "b", "search", 2))


@pytest.mark.parametrize("first", ["bf16", "no"])
def test_one_process_trains_at_several_precisions(tmp_path: Path, first: str) -> None:
    """A comparison's second configuration may have another than its first."""
    for number, precision in enumerate([first, *({"bf16", "no"} - {first}), first]):
        model = Recorder()
        trainer = trainer_in(tmp_path / str(number), precision)
        found: list[torch.dtype] = []

        def note(module: nn.Module, inputs: object, out: Tensor, found: list = found) -> None:
            found.append(out.dtype)

        model.head.register_forward_hook(note)
        trainer.train(model, Stage("search", 1, 0, 8))
        assert found[0] == (torch.bfloat16 if precision == "bf16" else torch.float32)


@pytest.mark.parametrize(
    ("features", "precision"),
    [("avx2 fma avx512f avx512_bf16", "bf16"), ("asimd sve bf16 i8mm", "bf16"),
     ("avx2 fma", "no"), ("avx2 fma avx512f avx512_vnni", "no"), ("", "no")],
)  # fmt: skip
def test_auto_is_bf16_where_the_cpu_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, features: str, precision: str
) -> None:
    monkeypatch.setattr(training_precision, "cpu_identity", lambda: ("a cpu", features))
    trainer = trainer_in(tmp_path, "auto")
    assert trainer.precision == precision
    asked = dataclasses.replace(AUTO, mixed_precision="bf16")
    assert bool(training_precision.slow_precision_warning(asked)) == (precision == "no")
    assert not training_precision.slow_precision_warning(AUTO)


@pytest.mark.parametrize(
    ("options", "lr"),
    [
        ({}, 0.1), ({"pretrained": True}, 0.01), ({"weights": "w.safetensors"}, 0.01),
        ({"pretrained": True, "lr": 0.3}, 0.3), ({"lr": 0.02}, 0.02),
        ({"optimizer": "adamw"}, 1e-3), ({"optimizer": "adamw", "pretrained": True}, 1e-4),
    ],
)  # fmt: skip
def test_the_learning_rate_suits_the_weights_unless_it_is_given(options: dict, lr: float) -> None:
    config = PruneConfig(target_ratio=0.5, **options)
    assert config.resolved_lr == pytest.approx(lr)
    assert make_optimizer(Recorder(), config).param_groups[0]["lr"] == pytest.approx(lr)


def test_a_comparison_from_dense_networks_starts_them_anew_at_the_lower_rate() -> None:
    """The dense network itself, and uniform widths, train from scratch."""
    config = CompareConfig(target_ratios=(0.5,), from_dense=2)
    target = Target(None, 0.5)
    cells = (Cell("dense", None, 0), Cell("uniform", target, 0), Cell("dsa-latency", target, 0))
    rates = {cell.method: run_config(config, cell).resolved_lr for cell in cells}
    assert rates == pytest.approx({"dense": 0.1, "uniform": 0.1, "dsa-latency": 0.01})


def test_a_search_goes_on_at_its_own_learning_rate() -> None:
    search = FinishedSearch({}, {}, None, "taylor", trained=True, lr=0.01)
    config = PruneConfig(target_ratio=0.5, search_from="runs/s")
    assert continued(config, search).resolved_lr == 0.01
    assert continued(dataclasses.replace(config, lr=0.2), search).resolved_lr == 0.2


def test_every_batch_may_have_to_wait(tmp_path: Path) -> None:
    """Of training, of the keep ratios' loss, and of testing."""
    trainer, model = trainer_in(tmp_path), Recorder()
    seen_before: list[int] = []
    trainer.before_batch = lambda: seen_before.append(len(model.seen))
    trainer.train(model, Stage("finetune", 1, 0, 8))
    tested = 1  # in one batch, after the epoch
    assert seen_before == [8 * step for step in range(IMAGES // 8)] + tested * [IMAGES]
    trainer.accuracy(model)
    trainer.validation_loss(model.eval())()
    assert seen_before[-2:] == [IMAGES, IMAGES]
    assert len(seen_before) == IMAGES // 8 + tested + 2

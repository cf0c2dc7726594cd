"""Statistics of batch-norms after a cut: what is measured, and what stays as it was."""

from __future__ import annotations

import copy
from pathlib import Path

import fake_prune
import pytest
import torch
from conftest import Residual
from fake_device import FakeRuntime
from torch import Tensor, nn

import dsa_hw
from dsa_hw import prune
from dsa_hw.data import ImageTensors
from dsa_hw.pipeline import opening, run
from dsa_hw.pipeline.pruner import DSAPruner
from dsa_hw.training.batch_norms import retake_statistics

CPU = torch.device("cpu")


def batches(count: int, size: int = 16, seed: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [3.0 + 2.0 * torch.randn(size, 3, 16, 16, generator=generator) for _ in range(count)]


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {n: b.clone() for n, b in model.named_buffers() if "running" in n}


class DropPath(nn.Module):
    """Stochastic depth, as residual networks have it."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part, self.dropout = part, nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and float(torch.rand(())) < 0.5:
            return x
        return x + self.dropout(self.part(x))


def test_one_batch_looks_in_evaluation_as_it_does_in_training(residual: nn.Module) -> None:
    """With its statistics of one batch a network gives that batch the outputs of training mode."""
    (x,) = batches(1)
    assert retake_statistics(residual, [x], CPU) == 1
    in_training = copy.deepcopy(residual)(x)
    # running variances are unbiased, those of training are not: 1 part in 16 * 256 at each norm
    torch.testing.assert_close(residual.eval()(x), in_training, rtol=5e-3, atol=5e-3)


def test_all_batches_weigh_the_same() -> None:
    norm = nn.BatchNorm2d(3)
    several = batches(7)
    retake_statistics(nn.Sequential(norm), several, CPU)
    assert isinstance(norm.running_mean, Tensor)
    assert isinstance(norm.running_var, Tensor)
    mean = torch.stack([x.mean((0, 2, 3)) for x in several]).mean(0)
    var = torch.stack([x.var((0, 2, 3)) for x in several]).mean(0)
    torch.testing.assert_close(norm.running_mean, mean)  # equal up to float32 rounding
    torch.testing.assert_close(norm.running_var, var)


def test_dropout_and_stochastic_depth_stay_off() -> None:
    torch.manual_seed(0)
    noisy = nn.Sequential(DropPath(nn.Conv2d(3, 3, 1)), nn.Dropout(0.5), nn.BatchNorm2d(3))
    quiet = copy.deepcopy(noisy)
    for module in quiet.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    quiet[0].eval()
    for model in (noisy, quiet):
        retake_statistics(model, batches(3), CPU)
    for name, value in statistics(noisy).items():
        assert torch.equal(value, statistics(quiet)[name]), name


def test_modes_and_momenta_come_back(residual: nn.Module) -> None:
    residual.train()
    frozen = residual.get_submodule("a1bn").eval()
    before = statistics(residual)
    retake_statistics(residual, batches(2), CPU)
    after = statistics(residual)
    for name in before:
        assert torch.equal(before[name], after[name]) == name.startswith("a1bn."), name
    modes = {name: module.training for name, module in residual.named_modules()}
    assert [name for name, training in modes.items() if not training] == ["a1bn"]
    assert residual.get_submodule("bn").momentum == frozen.momentum == 0.1


def test_a_network_in_evaluation_mode_is_measured_and_stays_in_it(residual: nn.Module) -> None:
    before = statistics(residual.eval())
    retake_statistics(residual, [(x, torch.zeros(16)) for x in batches(2)], CPU)
    assert not any(module.training for module in residual.modules())
    assert not any(torch.equal(before[n], v) for n, v in statistics(residual).items())


def test_without_batches_nothing_changes(residual: nn.Module) -> None:
    before = statistics(residual)
    assert retake_statistics(residual, [], CPU) == 0
    assert all(torch.equal(before[n], v) for n, v in statistics(residual).items())


def test_a_finished_search_measures_the_small_network() -> None:
    """Evaluation then gives what training mode would; with the whole network's it does not."""
    torch.manual_seed(0)
    (x,) = batches(1, size=64)
    model = Residual()
    for _ in range(50):
        model(x)
    pruner = DSAPruner(model, torch.zeros(1, 3, 16, 16), dsa_hw.FlopsBudget(0.3), 10)
    pruner.retarget()
    gaps = []
    for given in (None, [x]):
        small = pruner.finish(batches=given)
        gaps.append(float((small.eval()(x) - small.train()(x)).detach().abs().max()))
    assert gaps[1] < 0.1 * gaps[0]


@pytest.mark.parametrize("finetune", ["0", "1"])
def test_a_run_measures_them_before_it_fine_tunes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finetune: str
) -> None:
    """Without fine-tuning a run's network has the statistics of the training images."""
    monkeypatch.setattr(opening, "configured_backend", lambda config: FakeRuntime())
    taken: list[nn.Module] = []
    retake = run.Trainer.retake_statistics

    def note(self: run.Trainer, model: nn.Module) -> None:
        taken.append(model)
        retake(self, model)

    monkeypatch.setattr(run.Trainer, "retake_statistics", note)
    out = tmp_path / "run"
    assert prune.main([
        "--model", "fake_prune:normed", "--data", "fake_prune:colours", "--out", str(out),
        "--table", str(tmp_path / "table.jsonl"), "--calibration-networks", "6", "--rounds", "2",
        "--epochs", "2", "--finetune-epochs", finetune, "--target-ratio", "0.6",
        "--train-batch-size", "30",
    ]) == 0  # fmt: skip
    assert len(taken) == 1
    if finetune == "1":
        return
    small = dsa_hw.load_pruned(fake_prune.normed(), out)
    before = statistics(small)
    data = fake_prune.colours().train
    assert isinstance(data, ImageTensors)
    retake_statistics(small, data.normalise(data.images).split(30), CPU)
    # other batches of the same 330 images, without the shifts by a pixel: within a tenth
    for name, value in statistics(small).items():
        spread = small.state_dict()[name.replace("running_mean", "running_var")]
        unit = spread.sqrt() if "mean" in name else spread
        assert float(((value - before[name]).abs() / unit).max()) < 0.1, name

"""``prune`` under ``accelerate launch``: two processes have one run, and it is the run of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import fake_prune
import pytest
import torch
from fake_device import FakeRuntime
from test_processes import free_port

from dsa_hw import compare, prune
from dsa_hw.errors import UserError
from dsa_hw.pipeline import opening
from dsa_hw.runs import options as cli
from dsa_hw.runs.config import ProfileConfig, PruneConfig
from dsa_hw.runs.folder import RunFolder
from dsa_hw.runs.options import run_command
from dsa_hw.training.trainer import Trainer

FILES = (
    "config.yaml", "result.json", "model.onnx", "weights.safetensors", "widths.json", "log.jsonl",
    "report.html",
)  # fmt: skip


def arguments(table: Path, out: Path) -> list[str]:
    return [
        "--model", "fake_prune:plain", "--data", "fake_prune:colours", "--train-batch-size", "30",
        "--epochs", "4", "--finetune-epochs", "1", "--lr", "0.05", "--importance", "filter_l1",
        "--train-dense", "true", "--distill", "0.3", "--train-device", "cpu",
        "--calibration-networks", "6", "--rounds", "2", "--measure-seconds", "0.5",
        "--target-ratio", "0.6", "--table", str(table), "--out", str(out),
    ]  # fmt: skip


def launch(argv: list[str]) -> subprocess.CompletedProcess[str]:
    """Two processes; ``--multi_gpu`` is how Accelerate is told to start more than one."""
    here = Path(__file__).parent
    known = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE", "OMP_"))}
    path = os.pathsep.join([str(here.parent), known.get("PYTHONPATH", "")])
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
        "--main_process_port", str(free_port()), str(here / "fake_prune.py"), *argv,
    ]  # fmt: skip
    return subprocess.run(
        command, capture_output=True, text=True, timeout=500, check=False,
        env=known | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def events(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_two_processes_finish_what_one_began_as_that_one_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(opening, "configured_backend", lambda config: FakeRuntime())
    table, alone, both = (tmp_path / name for name in ("table.jsonl", "alone", "both"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the network is too small to share
    assert prune.main(arguments(table, alone)) == 0
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save_checkpoint", fake_prune.failing_after("search"))
        assert prune.main(arguments(table, both)) == 2
    assert fake_prune.FULL in capsys.readouterr().err
    assert [e["event"] for e in events(both)][-1] == "epoch"
    torch.set_num_threads(threads)

    done = launch(arguments(table, both))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report.html") == 1
    assert done.stderr.count("timing the pruned network") == 1
    assert all((both / name).is_file() for name in FILES)
    one, two = (json.loads((f / "result.json").read_text()) for f in (alone, both))
    assert [g["width"] for g in two["groups"]] == [g["width"] for g in one["groups"]]
    # sums of gradients in another order: float32 rounding, grown by two epochs of Adam
    ratios = [[g["keep_ratio"] for g in r["groups"]] for r in (one, two)]
    assert ratios[1] == pytest.approx(ratios[0], abs=2e-3)
    assert min(ratios[1]) < 0.8  # something was learned
    assert two["pruned"]["measured_ms"] == one["pruned"]["measured_ms"]
    for part in ("dense", "pruned"):
        assert two[part]["accuracy"] == pytest.approx(one[part]["accuracy"], abs=0.03)  # 3 of 101
    same = ("event", "stage", "epoch", "step", "phase")
    seen = [[{k: e.get(k) for k in same} for e in events(f)] for f in (alone, both)]
    assert seen[0] == seen[1]  # nothing lost by the failure, nothing twice
    losses = [[e["train_loss"] for e in events(f) if "train_loss" in e] for f in (alone, both)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)


def test_a_batch_that_cannot_be_shared_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = PruneConfig(target_ratio=0.5, train_batch_size=30, train_device="cpu")
    trainer = Trainer(config, fake_prune.colours(), RunFolder(tmp_path))
    monkeypatch.setattr(trainer, "_processes", 4)
    with pytest.raises(UserError, match="a multiple of 4"):
        trainer._check_shares()


@pytest.mark.parametrize("error", [UserError("no"), RuntimeError("connection closed by peer")])
def test_only_the_main_process_speaks(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others wait for it, and a failure that is not the user's is told after that."""
    held: list[float] = []
    monkeypatch.setattr(cli.time, "sleep", held.append)

    def fail(config: ProfileConfig) -> int:
        raise error

    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        if isinstance(error, UserError):
            assert run_command("profile", ProfileConfig, fail, []) == 2
        else:
            with pytest.raises(RuntimeError, match="peer"):
                run_command("profile", ProfileConfig, fail, [])
        assert ("no" in capsys.readouterr().err) == (rank == "0" and isinstance(error, UserError))
        assert held == ([] if rank == "0" else [cli.HOLD_S])


def test_a_comparison_needs_no_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert compare.main(["--target-ratios", "0.5", "--out", str(tmp_path / "x")]) == 2
    assert "start the same command several times" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()

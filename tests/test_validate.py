"""A finished run is timed again by the measure it was pruned to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from fake_device import FakeDevice, FakeRuntime
from test_launched import arguments

from dsa_hw import prune, validate
from dsa_hw.pipeline import opening, record, run
from dsa_hw.runs.config import DeviceConfig
from profilers.speed import Speed
from profilers.timing import Round, Runner, SamplePlan


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose target was six tenths of the dense network, on the fake device."""
    folder = tmp_path_factory.mktemp("validate")
    argv = arguments(folder / "table.jsonl", folder / "run")
    for option, value in (("--epochs", "2"), ("--train-dense", "false")):
        argv[argv.index(option) + 1] = value
    at = argv.index("--distill")
    del argv[at : at + 2]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the network is too small to share
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "configured_backend", lambda config: FakeRuntime())
        patch.setattr(run, "write_run_report", lambda folder: None)  # tested elsewhere
        assert prune.main(argv) == 0
    torch.set_num_threads(threads)
    return folder / "run"


TRUSTED = ["--trust-run", "true"]
"""The network of these runs comes from a module of the tests."""


class TwiceAsSlow(FakeDevice):
    """The fake device on a day when all of it takes twice as long."""

    def __init__(self) -> None:
        super().__init__(slowdown=2.0)
        self.call_ms = 0.02


def validated(
    run: Path, device: FakeDevice, monkeypatch: pytest.MonkeyPatch, capsys
) -> dict[str, str]:
    """What is printed, by its heading."""
    monkeypatch.setattr(opening, "configured_backend", lambda config: device)
    assert validate.main(["--run", str(run), "--measure-seconds", "0.5", *TRUSTED]) == 0
    printed = capsys.readouterr().out.splitlines()
    return {head: rest.strip() for head, rest in (line.split(":", 1) for line in printed)}


def test_a_ratio_stays_the_same_when_only_the_machine_is_slower(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    result = json.loads((finished / "result.json").read_text())
    assert result["target_ratio"] == 0.6
    same = validated(finished, FakeDevice(), monkeypatch, capsys)
    slow = validated(finished, TwiceAsSlow(), monkeypatch, capsys)
    assert slow["measured"] != same["measured"]
    for shown in (same, slow):
        ratio = f"{result['ratio']['measured']:.3f}"
        assert shown["ratio"].startswith(f"{ratio} of dense; {ratio} at pruning, target 0.600")
    share = slow["target"].partition("; ")[2]
    assert share == same["target"].partition("; ")[2]
    used = result["pruned"]["measured_ms"] / result["target_ms"]
    assert share == f"measured is {100 * used:.1f}% of it"


def test_milliseconds_are_compared_with_milliseconds(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    result = json.loads((finished / "result.json").read_text())
    for name in ("config.yaml", "model.onnx"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    (tmp_path / "result.json").write_text(json.dumps(result | {"target_ratio": None}))
    device = TwiceAsSlow()
    shown = validated(tmp_path, device, monkeypatch, capsys)
    assert "ratio" not in shown
    used = 2 * result["pruned"]["measured_ms"] / result["target_ms"]
    assert shown["target"].endswith(f"measured is {100 * used:.1f}% of it")


def test_a_card_tells_its_energy_and_what_disturbed_it(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    class Counting(FakeDevice):
        def energy_mj(self, model: bytes | Path, seconds: float = 2.0) -> float:
            assert model == finished / "model.onnx"
            return 12.5

        def observations(self) -> tuple[str, ...]:
            return ("other processes used the card meanwhile",)

    shown = validated(finished, Counting(), monkeypatch, capsys)
    assert shown["energy"] == "12.5 mJ a run, of the whole card"
    assert shown["note"].startswith("other processes")
    assert "energy" not in validated(finished, FakeDevice(), monkeypatch, capsys)


def test_a_run_that_does_not_say_its_network_is_told_so(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = json.loads((finished / "result.json").read_text())
    for name in ("model.onnx", "config.yaml"):
        shutil.copy(finished / name, tmp_path / name)
    old = {k: v for k, v in result.items() if k != "num_classes"}
    (tmp_path / "result.json").write_text(json.dumps(old))
    assert validate.main(["--run", str(tmp_path), *TRUSTED]) == 2
    assert "made by an earlier version" in capsys.readouterr().err
    (tmp_path / "config.yaml").unlink()
    assert validate.main(["--run", str(tmp_path), *TRUSTED]) == 2
    assert "config.yaml is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "device", "backend"),
    [
        ([], "cuda:1", "tensorrt"),
        (["--device", "cuda:1"], "cuda:1", "tensorrt"),
        (["--device", "cpu"], "cpu", None),
        (["--backend", "torch"], "cuda:1", "torch"),
    ],
)
def test_a_run_is_timed_where_it_was_pruned_for(
    finished: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], device: str,
    backend: str | None,
) -> None:  # fmt: skip
    """On the run's device and runtime, unless another is asked for."""
    content = (finished / "config.yaml").read_text()
    pruned_on = content.replace("device: cpu", "device: cuda:1", 1)
    pruned_on = pruned_on.replace("backend: null", "backend: tensorrt", 1)
    assert pruned_on.count("cuda:1") == pruned_on.count("tensorrt") == 1
    opened = []

    def configured(config: DeviceConfig) -> FakeDevice:
        opened.append((config.device, config.backend))
        return FakeDevice()

    monkeypatch.setattr(opening, "configured_backend", configured)
    (finished / "config.yaml").write_text(pruned_on)
    argv = ["--run", str(finished), "--measure-seconds", "0.2", *TRUSTED, *options]
    try:
        assert validate.main(argv) == 0
    finally:
        (finished / "config.yaml").write_text(content)
    assert opened == [(device, backend)]


def test_a_disturbed_last_measurement_is_told(tmp_path: Path) -> None:
    rounds = [{"dense_ms": 2.0}, {"dense_ms": 1.5}, {"dense_ms": None}, {}]
    again = record.validate_command(tmp_path, "timm:regnetx_002", "glyphs")
    (told,) = record.disturbed_warning(rounds, 2.4, again)
    assert "2.4 ms, and 1.5 ms" in told
    assert told.endswith(f"--run {tmp_path}")  # timm's own networks are nobody's code
    own = record.validate_command(tmp_path, "my_net:make", "glyphs")
    assert own.endswith("--trust-run true")
    assert record.disturbed_warning(rounds, 1.6, again) == []
    assert record.disturbed_warning([], 9.0, again) == []


class Slower(FakeDevice):
    """The fake device on a host that is busy: its speed says so."""

    @contextmanager
    def open(self, model: bytes | Path) -> Iterator[Runner]:
        with super().open(model) as runner:
            ms = runner.elapsed_ms(1)
        yield SpeedTold(lambda: None, ms)


class SpeedTold(Runner):
    """A round on a machine that takes 1.7 times as long as it can."""

    def __init__(self, run: Callable[[], object], ms: float) -> None:
        super().__init__(run)
        self._ms = ms

    def speed(self) -> Speed:
        return Speed(1.7, 1.0)

    def take_round(self, plan: SamplePlan) -> Round:
        return Round(self._ms, self._ms, self._ms, 3, 1, speed=self.speed())


def test_what_is_not_the_run_s_fast_state_decides_nothing(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    result = json.loads((copy / "result.json").read_text())
    assert result["fast_state"] is None  # the fake device has no speed to read
    assert "undecided" not in validated(copy, Slower(), monkeypatch, capsys)["verdict"]
    for state, undecided in (({"compute_ms": 1.0, "memory_ms": 1.0}, True),
                             ({"compute_ms": 1.7, "memory_ms": 1.0}, False)):  # fmt: skip
        (copy / "result.json").write_text(json.dumps(result | {"fast_state": state}))
        said = validated(copy, Slower(), monkeypatch, capsys)["verdict"]
        assert ("the machine was slower than it can be" in said) == undecided
    (copy / "result.json").write_text(json.dumps(result | {"fast_state": {"compute_ms": "fast"}}))
    assert validate.main(["--run", str(copy), *TRUSTED]) == 2
    assert "fast_state" in capsys.readouterr().err

"""The commands: errors a user can cause are one message and exit code 2, and write nothing."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from dsa_hw import prune, report, validate
from dsa_hw.errors import UserError
from dsa_hw.runs.config import CompareConfig, PruneConfig
from dsa_hw.runs.options import parse, to_yaml

RATIO = ["--target-ratio", "0.5"]


def refused(capsys: pytest.CaptureFixture[str], code: int) -> str:
    """The one message on standard error."""
    captured = capsys.readouterr()
    assert code == 2
    assert "Traceback" not in captured.err
    return captured.err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "needs one of --target-ms and --target-ratio"),
        (["--target-ms", "3", *RATIO], "given: both"),
        (["--target-ms", "-3"], "target-ms is -3.0"),
        (["--target-ms", "abc"], "abc"),
        (["--target-ratio", "1.5"], "target-ratio is 1.5; expected between 0 and 1"),
        (["--targt-ms", "3"], "unknown option targt-ms (value: '3'); did you mean target"),
        ([*RATIO, "--model", "resnet19", "--epochs", "0"], "resnet18"),
        ([*RATIO, "--model", "timm:no_such_net", "--epochs", "0"], "no_such_net"),
        ([*RATIO, "--data", "imagefolder", "--data-root", "no/such/folder"], "no/such/folder"),
        ([*RATIO, "--data", "cifra10"], "unknown data set 'cifra10'"),
        ([*RATIO, "--device", "cuda:0", "--epochs", "0"], "finds no CUDA device"),
        ([*RATIO, "--device", "tpu", "--epochs", "0"], "unknown device 'tpu'"),
        ([*RATIO, "--precision", "fp16", "--epochs", "0"], "not measured at fp16 on cpu"),
        ([*RATIO, "--precision", "fp17"], "fp17"),
        ([*RATIO, "--budget", "watts"], "watts"),
        (["--budget", "flops"], "the budget flops needs a number"),
        ([*RATIO, "--weights", "none.safetensors", "--epochs", "0"], "none.safetensors"),
        ([*RATIO, "--input-shape", "3", "7", "--epochs", "0"], "channels, height and width"),
        (["--config", "no.yaml"], "no.yaml"),
    ],
)  # fmt: skip
def test_bad_input(
    argv: list[str], message: str, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code = prune.main([*argv, "--out", "runs/x"] if "--config" not in argv else argv)
    assert message in refused(capsys, code)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("modle: resnet18\n", "unknown option modle (value: 'resnet18'); did you mean model?"),
        ("target_ms: fast\n", "fast"),
        ("epochs: [1, 2]\n", "epochs"),
    ],
)
def test_bad_yaml(content: str, message: str, tmp_path: Path, capsys) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(content)
    assert message in refused(capsys, prune.main(["--config", str(path)]))


@pytest.mark.parametrize(
    ("content", "message"),
    [("combination: mean", "combination is gone: layers that share channels have the mean"),
     ("constraint: augmented_lagrangian", "expected one of projection, admm")],
)  # fmt: skip
def test_what_earlier_versions_had_is_told(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text(f"target_ratio: 0.5\n{content}\n")
    with pytest.raises(UserError, match=message):
        parse("prune", PruneConfig, ["--config", str(tmp_path / "old.yaml")])


def test_command_line_overrides_yaml(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("target_ratio: 0.5\nmodel: resnet18\nexclude: [fc, 'layer1.*']\n")
    config = parse("prune", PruneConfig, ["--config", str(path), "--target-ratio", "0.25"])
    assert (config.target_ratio, config.model) == (0.25, "resnet18")
    assert config.exclude == ("fc", "layer1.*")


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--allow-mismatch", "--seed", "1"], True),
        (["--allow-mismatch"], True),
        (["--allow-mismatch", "true"], True),
        (["--allow-mismatch", "false"], False),
        (["--allow-mismatch=false"], False),
        ([], False),
    ],
)
def test_an_option_by_itself_says_true(words: list[str], value: bool) -> None:
    config = parse("prune", PruneConfig, ["--target-ratio", "0.5", *words])
    assert config.allow_mismatch is value


def test_configurations_round_trip(tmp_path: Path) -> None:
    config = PruneConfig(target_ms=2.5, budget=("latency", "params"), params_ratio=0.5,
                         input_shape=(3, 24, 24))  # fmt: skip
    path = tmp_path / "c.yaml"
    path.write_text(to_yaml(config))
    assert parse("prune", PruneConfig, ["--config", str(path)]) == config


def test_shipped_configurations_are_valid() -> None:
    paths = sorted(Path(__file__).parent.parent.glob("configs/*.yaml"))
    assert paths
    for path in paths:
        sweeps = path.name.startswith("compare_")
        verb, config_class = ("compare", CompareConfig) if sweeps else ("prune", PruneConfig)
        assert set(yaml.safe_load(path.read_text())) <= set(config_class.__dataclass_fields__)
        parse(verb, config_class, ["--config", str(path)])


@pytest.mark.parametrize("verb", ["prune", "profile", "compare", "validate", "report"])
def test_help_is_quick_and_imports_nothing_heavy(verb: str) -> None:
    code = (
        f"import sys, runpy; sys.argv = ['x', '--help']\n"
        f"try: runpy.run_module('dsa_hw.{verb}', run_name='__main__')\n"
        f"except SystemExit as e: assert not e.code\n"
        f"print('HEAVY', [m for m in ('torch', 'onnx', 'pandas') if m in sys.modules])"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--config" in done.stdout
    assert "HEAVY []" in done.stdout
    assert time.monotonic() - start < 60  # a hang, not a speed: no test asserts an absolute time


def test_other_commands_refuse_what_is_not_there(tmp_path: Path, capsys) -> None:
    assert "no run folder" in refused(capsys, report.main([str(tmp_path / "nothing")]))
    assert "no finished run" in refused(capsys, report.main([str(tmp_path)]))
    assert "give one of" in refused(capsys, validate.main([]))
    assert "no finished run" in refused(capsys, validate.main(["--run", str(tmp_path)]))
    assert "no ONNX file" in refused(capsys, validate.main(["--onnx", str(tmp_path / "m.onnx")]))


def test_options_must_be_consistent() -> None:
    with pytest.raises(UserError, match="finetune-epochs is 5"):
        PruneConfig(target_ms=1.0, epochs=4, finetune_epochs=5)
    with pytest.raises(UserError, match="params-ratio"):
        PruneConfig(target_ms=1.0, params_ratio=0.5)

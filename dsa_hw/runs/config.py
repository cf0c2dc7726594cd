"""What a user can ask of the commands: one frozen dataclass each, from YAML and command line."""

# ruff: noqa: RUF009 - ``_option`` is ``dataclasses.field``

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from dsa_hw.errors import UserError
from dsa_hw.runs.budgets import BUDGETS
from dsa_hw.runs.importances import IMPORTANCES

Precision = Literal["fp32", "fp16", "int8"]
_RATIOS = ("flops", "params", "memory")
"""Budgets that have an option ``--NAME-ratio``."""
NO_USE = "no use of it without training (epochs is 0)"


def _option(
    default: Any,
    text: str,
    path: Literal["file", "folder"] | None = None,
    positional: bool = False,
    known: Iterable[str] = (),
) -> Any:
    """Describe an option.

    Args:
        path: a shell completes its value with paths.
        positional: its value is given without its name.
        known: values that a shell offers; others are allowed too.
    """
    metadata = {"help": text, "path": path, "positional": positional, "known": known}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class DeviceConfig:
    """Where and how the network will be deployed"""

    device: str = _option("cpu", "deployment device: cpu, cuda:0, or equal cards: cuda:0,cuda:1")
    backend: str | None = _option(None, "runtime; the best one installed for the device if unset")
    precision: Precision = _option("fp32", "deployment precision")
    batch_size: int = _option(1, "deployment batch size")
    threads: int | None = _option(None, "CPU threads; the runtime's default if unset")
    include_copies: bool = _option(
        False, "on CUDA, time the copies of inputs and outputs from and to the host too"
    )
    table: str | None = _option(
        None,
        "latency table file; if unset, one of the device and runtime in latency_tables/ of the "
        "working folder where there is such a folder, else in the user's data folder",
        path="file",
    )
    allow_mismatch: bool = _option(
        False, "use a table that was measured on another device or runtime all the same"
    )
    calibration_networks: int = _option(48, "whole networks timed to calibrate the latency model")
    rounds: int = _option(4, "rounds of each measurement")
    measure_seconds: float = _option(
        20.0,
        "at most so long to time networks against each other: half of it in a round of the closed "
        "loop, one and a half in the last measurement",
    )


@dataclass(frozen=True)
class ModelConfig(DeviceConfig):
    """Which network"""

    model: str = _option(
        "resnet18",
        "torchvision name, timm:NAME, one of the project's CIFAR networks, package.module:factory",
    )
    input_shape: tuple[int, ...] | None = _option(
        None, "channels height width; the model's or the data's own if unset"
    )
    remove_branches: bool = _option(
        False, "whole residual branches may be removed (those with an identity shortcut)"
    )
    exclude: tuple[str, ...] = _option((), "patterns of layer names that keep all channels")
    seed: int = _option(0, "of weights, data order, masks and random widths")


@dataclass(frozen=True)
class ProfileConfig(ModelConfig):
    """Measure a network's layers on a device, and add them to its latency table."""


@dataclass(frozen=True)
class TrainingConfig(ModelConfig):
    """What it is trained on, and how"""

    pretrained: bool = _option(False, "start from torchvision's or timm's weights")
    weights: str | None = _option(None, "start from these weights (safetensors)", path="file")
    importance: str = _option(
        "auto",
        "base importance: bn_scale, filter_l1, taylor, or package.module:factory; auto: taylor, "
        "without training filter_l1",
        known=("auto", *IMPORTANCES),
    )
    constraint: Literal["projection", "admm"] = _option(
        "projection", "how the search holds the budgets"
    )

    data: str = _option("glyphs", "glyphs, digits, cifar10, cifar100, imagefolder, or a factory")
    data_root: str | None = _option(None, "folder of the data set", path="folder")
    train_size: int | None = _option(None, "training images to use; all if unset")
    test_size: int | None = _option(None, "test images to use; all if unset")
    epochs: int = _option(12, "epochs in all, search and fine-tuning; 0 plans without training")
    finetune_epochs: int | None = _option(None, "of these, fine-tuning; two thirds if unset")
    train_dense: bool = _option(
        False, "also train the dense network for as many epochs, to know its accuracy"
    )
    train_batch_size: int = _option(128, "training batch size")
    optimizer: Literal["sgd", "adamw"] = _option("sgd", "sgd (Nesterov momentum 0.9) or adamw")
    lr: float | None = _option(
        None,
        "peak learning rate; if unset 0.1 for sgd and 0.001 for adamw, a tenth of that where "
        "training begins with given weights",
    )
    weight_decay: float = _option(5e-4, "weight decay")
    validation_fraction: float = _option(0.1, "training data set aside for the keep ratios")
    distill: float | None = _option(
        None, "share of the fine-tuning loss that imitates the dense network, in (0, 1]"
    )
    distill_temperature: float = _option(4.0, "softens the outputs that are imitated")
    mixed_precision: Literal["no", "bf16", "fp16", "auto"] = _option(
        "no", "training precision; auto: bf16 where the training device has instructions for it"
    )
    train_device: str | None = _option(None, "cpu or cuda; CUDA where there is one if unset")

    def __post_init__(self) -> None:
        _require(self.epochs >= 0, "epochs", self.epochs, "0 or more")
        _require(self.batch_size >= 1, "batch-size", self.batch_size, "1 or more")
        _require(self.train_batch_size >= 2, "train-batch-size", self.train_batch_size, ">= 2")
        _require(self.calibration_networks >= 4, "calibration-networks",
                 self.calibration_networks, "4 or more")  # fmt: skip
        _require(self.rounds >= 2, "rounds", self.rounds, "2 or more")
        _require(self.lr is None or self.lr > 0, "lr", self.lr, "a positive number")
        _require(self.distill is None or 0 < self.distill <= 1, "distill", self.distill,
                 "in (0, 1]")  # fmt: skip
        _require(self.distill_temperature > 0, "distill-temperature",
                 self.distill_temperature, "a positive number")  # fmt: skip
        self._check_training()
        _require(0 < self.validation_fraction < 1, "validation-fraction",
                 self.validation_fraction, "between 0 and 1")  # fmt: skip
        finetune = self.finetune_epochs
        if finetune is not None and self.epochs:
            _require(0 <= finetune < self.epochs, "finetune-epochs", finetune, "less than epochs")

    def _check_training(self) -> None:
        if self.importance != "auto":
            IMPORTANCES.check(self.importance)
        if self.epochs:
            return
        for name, wanted in (
            ("distill", self.distill),
            ("importance", self.importance == "taylor" or None),
        ):
            _require(wanted is None, name.replace("_", "-"), getattr(self, name), NO_USE)

    @property
    def starts_trained(self) -> bool:
        """Whether training begins with given weights."""
        return bool(self.pretrained or self.weights)

    @property
    def resolved_lr(self) -> float:
        """Peak learning rate: as given, or one that suits the optimizer and the weights.

        At sgd's 0.1 a trained network forgets what it knows before the search looks at it.
        """
        if self.lr is not None:
            return self.lr
        fresh = 0.1 if self.optimizer == "sgd" else 0.001
        return 0.1 * fresh if self.starts_trained else fresh

    @property
    def search_epochs(self) -> int:
        """Epochs with keep ratios being learned (warm-up included)."""
        return self.epochs - self.resolved_finetune_epochs

    @property
    def resolved_finetune_epochs(self) -> int:
        """Epochs of the small network."""
        if self.finetune_epochs is not None:
            return min(self.finetune_epochs, self.epochs)
        return 2 * self.epochs // 3


@dataclass(frozen=True)
class PruneConfig(TrainingConfig):
    """Prune a network to a number of milliseconds that is measured on the device."""

    out: str = _option(
        "runs/prune", "run folder; the same command again resumes what is in it", path="folder"
    )
    target_ms: float | None = _option(None, "latency to reach, in ms")
    target_ratio: float | None = _option(
        None, "latency to reach, as a part of the dense network's, in (0, 1)"
    )
    budget: tuple[str, ...] = _option(
        ("latency",),
        "what is limited: latency, flops, params, memory, or package.module:factory; several at "
        "once work; all but latency may be given with their number: flops=0.5",
        known=BUDGETS,
    )
    flops_ratio: float | None = _option(None, "part of the dense FLOPs to keep, in (0, 1)")
    params_ratio: float | None = _option(None, "part of the dense weights to keep, in (0, 1)")
    memory_ratio: float | None = _option(
        None, "part of the dense network's peak activation memory to keep, in (0, 1)"
    )
    search_from: str | None = _option(
        None, "run folder of a finished search on the same network and data: take what it learned "
        "to this run's budget, without a new search", path="folder"
    )  # fmt: skip

    def __post_init__(self) -> None:
        self._check_targets()
        _require(self.search_from is None or self.epochs > 0, "search-from", self.search_from,
                 NO_USE)  # fmt: skip
        super().__post_init__()

    def _check_targets(self) -> None:
        for name in self.budget_values:
            BUDGETS.check(name)
        latency = "latency" in self.budget_values
        given = [t for t in (self.target_ms, self.target_ratio) if t is not None]
        if latency and len(given) != 1:
            raise UserError(
                "a latency budget needs one of --target-ms and --target-ratio; "
                f"given: {'both' if given else 'neither'}"
            )
        _require(not given or latency, "target-ms / target-ratio", given, "a latency budget")
        _require((self.target_ms or 1) > 0, "target-ms", self.target_ms, "a positive number")
        _require(
            self.target_ratio is None or 0 < self.target_ratio < 1,
            "target-ratio",
            self.target_ratio,
            "between 0 and 1",
        )
        _require(len(self.budget) > 0, "budget", self.budget, "at least one")
        for name in _RATIOS:
            value = getattr(self, f"{name}_ratio")
            unused = value is None or name in self.budget_values
            _require(unused, f"{name}-ratio", value, f"{name} among the budgets")
        for name, value in self.budget_values.items():
            self._check_budget(name, value)

    def _check_budget(self, name: str, value: float | None) -> None:
        if name == "latency":
            return
        option = f"{name}-ratio" if name in _RATIOS else f"budget {name}"
        if value is None:
            extra = f", or --{option}" if name in _RATIOS else ""
            raise UserError(f"the budget {name} needs a number: --budget {name}=NUMBER{extra}")
        positive = math.isfinite(value) and value > 0
        _require(positive, option, value, "a positive number")
        _require(name not in _RATIOS or value < 1, option, value, "between 0 and 1")

    @property
    def budget_values(self) -> dict[str, float | None]:
        """The number given for each budget, by name.

        None where none was given, and for latency, whose target has options of its own.

        Raises:
            UserError: what follows ``=`` is no number, or a budget is given two different ones.
        """
        values: dict[str, float | None] = {}
        for entry in self.budget:
            name, equals, number = entry.partition("=")
            given = [_number(entry, number)] if equals else []
            if name in _RATIOS and (ratio := getattr(self, f"{name}_ratio")) is not None:
                given.append(ratio)
            if (earlier := values.get(name)) is not None:
                given.append(earlier)
            _require(not (name == "latency" and equals), "budget", entry,
                     "latency alone; its target is --target-ms or --target-ratio")  # fmt: skip
            _require(len(set(given)) <= 1, "budget", entry, f"one number for {name}, not {given}")
            values[name] = given[0] if given else None
        return values


BaselineName = Literal[
    "dsa-flops-by-8", "uniform", "magnitude", "taylor", "halp", "mdp", "netadapt"
]


@dataclass(frozen=True)
class CompareConfig(TrainingConfig):
    """Prune a network by several methods, to the same measured latency."""

    out: str = _option(
        "runs/compare",
        "sweep folder; the same command again (also beside itself) goes on with it",
        path="folder",
    )
    methods: tuple[Literal["dsa", BaselineName], ...] = _option(
        ("dsa", "uniform", "magnitude", "taylor", "halp", "mdp", "netadapt"),
        "what is compared; dsa stands for one method a budget",
    )
    budgets: tuple[Literal["latency", "flops"], ...] = _option(
        ("latency", "flops"), "what DSA searches under; all methods end at the measured target"
    )
    targets_ms: tuple[float, ...] | None = _option(None, "latencies to reach, in ms")
    target_ratios: tuple[float, ...] | None = _option(
        None, "latencies to reach, as parts of the dense network's, each in (0, 1)"
    )
    seeds: tuple[int, ...] = _option((0, 1, 2), "one run of every method and target for each")
    from_dense: int = _option(
        0,
        "epochs of training that each seed's dense network has before the methods start from it; "
        "uniform widths train from scratch for these and --epochs; 0: all start from scratch",
    )
    seed: int = _option(0, "of the random widths that calibrate; the runs have --seeds")

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [t for t in (self.targets_ms, self.target_ratios) if t]
        if len(given) != 1:
            raise UserError(
                "a comparison needs one of --targets-ms and --target-ratios; "
                f"given: {'both' if given else 'neither'}"
            )
        for target in self.targets_ms or ():
            _require(target > 0, "targets-ms", target, "positive numbers")
        for target in self.target_ratios or ():
            _require(0 < target < 1, "target-ratios", target, "numbers between 0 and 1")
        for name in ("methods", "budgets", "seeds"):
            values = getattr(self, name)
            _require(
                len(set(values)) == len(values) > 0, name, values, "one or more, all different"
            )
        _require(self.epochs >= 1, "epochs", self.epochs, "1 or more: what is compared is trained")
        given = self.starts_trained
        _require(self.from_dense >= 0, "from-dense", self.from_dense, "0 or more")
        _require(not (self.from_dense and given), "from-dense", self.from_dense,
                 "0 where weights are given: the runs start from those")  # fmt: skip
        _require(self.distill is None, "distill", self.distill, "nothing: all methods have the "
                 "same fine-tuning, on labels alone")  # fmt: skip


@dataclass(frozen=True)
class ValidateConfig(DeviceConfig):
    """Time a finished run, or an exported network, again on the device."""

    device: str = _option("auto", "deployment device; auto: that of the run, or the cpu")
    run: str | None = _option(
        None, "run folder: its model.onnx beside its prediction and target", path="folder"
    )
    onnx: str | None = _option(None, "an exported network to time by itself", path="file")
    trust_run: bool = _option(
        False, "import the package.module:factory that the run folder names, which runs its code"
    )


@dataclass(frozen=True)
class ReportConfig:
    """Draw the report of a run, a comparison or a latency table."""

    source: str = _option(
        "", "run folder, comparison folder, or latency table (.jsonl)", path="file", positional=True
    )
    out: str | None = _option(
        None, "HTML file; report.html in the run folder if unset", path="file"
    )


COMMANDS: dict[str, type] = {
    "profile": ProfileConfig,
    "prune": PruneConfig,
    "compare": CompareConfig,
    "validate": ValidateConfig,
    "report": ReportConfig,
}
"""The verbs, in the order in which a user meets them."""

SCRIPT = "dsa-hw"
"""The console script that ``pyproject.toml`` installs; its first word is a verb."""

COMPLETION = "completion"
"""The one word beside the verbs: it prints a script for one of ``SHELLS``."""

SHELLS = ("bash", "zsh")
"""Shells that options are completed in; others that shtab knows were not tried."""


def _number(entry: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"budget is {entry!r}; expected NAME or NAME=NUMBER") from None


def _require(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise UserError(f"{name} is {value!r}; expected {expected}")

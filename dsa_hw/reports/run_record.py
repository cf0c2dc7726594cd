"""What a run folder holds, as plain data for the page.

Every field may be None: the run did not record it, and the page says so.
"""

from dataclasses import dataclass
from pathlib import Path

from dsa_hw.reports.fields import Fields, Interval, read_json_lines, read_object, read_text
from dsa_hw.reports.setting import Setting


@dataclass(frozen=True, slots=True)
class NetworkFigures:
    """One whole network: the dense one, or the pruned one. ``accuracy`` is in 0..1."""

    predicted_ms: float | None
    measured_ms: float | None
    ci95_ms: Interval | None
    accuracy: float | None
    flops: float | None
    params: float | None
    masked_vs_pruned_max_abs: float | None

    @classmethod
    def read(cls, fields: Fields) -> "NetworkFigures":
        return cls(
            predicted_ms=fields.number("predicted_ms"),
            measured_ms=fields.number("measured_ms"),
            ci95_ms=fields.interval("ci95_ms"),
            accuracy=fields.number("accuracy"),
            flops=fields.number("flops"),
            params=fields.number("params"),
            masked_vs_pruned_max_abs=fields.number("masked_vs_pruned_max_abs"),
        )


@dataclass(frozen=True, slots=True)
class GroupWidth:
    """A coupled group's widths; ``keep_ratio`` is the one DSA learned, in (0, 1]."""

    name: str
    dense_width: float
    width: float
    step: float | None
    keep_ratio: float | None
    members: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LayerCost:
    """One layer's predicted milliseconds before and after; ``shapes`` are (cin, cout)."""

    name: str
    op: str | None
    dense_shape: tuple[float | None, float | None]
    pruned_shape: tuple[float | None, float | None]
    dense_ms: float
    pruned_ms: float


@dataclass(frozen=True, slots=True)
class CalibrationNetwork:
    predicted_ms: float
    measured_ms: float
    ci95_ms: Interval | None
    held_out: bool


@dataclass(frozen=True, slots=True)
class Calibration:
    networks: tuple[CalibrationNetwork, ...]
    heldout_mape_pct: float | None
    heldout_max_pct: float | None
    constant_ms: float | None
    scales: dict[str, float]


@dataclass(frozen=True, slots=True)
class ClosedLoopRound:
    round: float | None
    predicted_ms: float | None
    measured_ms: float | None
    ci95_ms: Interval | None
    target_ms: float | None
    correction: float | None


@dataclass(frozen=True, slots=True)
class TableUse:
    path: str | None
    entries: float | None
    measured: float | None
    reused: float | None


@dataclass(frozen=True, slots=True)
class SearchStep:
    step: float
    phase: str | None
    loss: float | None
    validation_loss: float | None
    inexactness_beta2: float | None
    keep_ratios: tuple[float, ...]
    costs: dict[str, float]
    targets: dict[str, float]


@dataclass(frozen=True, slots=True)
class EpochPoint:
    stage: str
    epoch: float
    train_loss: float | None
    accuracy: float | None


@dataclass(frozen=True, slots=True)
class RunLog:
    """The parts of ``log.jsonl`` that the page shows."""

    steps: tuple[SearchStep, ...] = ()
    epochs: tuple[EpochPoint, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class NextStep:
    """The cheapest step up of one group that did not fit.

    Args:
        extra: what it would cost, as a part of the latency target.
    """

    group: str
    width: float | None
    next_width: float | None
    extra: float


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A run folder. ``problems`` lists what could not be read and was left out."""

    folder: str
    setting: Setting
    seed: str | None
    verdict: str | None
    verdict_reason: str | None
    headroom: float | None
    next_step: NextStep | None
    target_ms: float | None
    dense: NetworkFigures
    pruned: NetworkFigures
    seconds: tuple[tuple[str, float | None], ...]
    removed_branches: tuple[str, ...]
    groups: tuple[GroupWidth, ...]
    layers: tuple[LayerCost, ...]
    calibration: Calibration | None
    closed_loop: tuple[ClosedLoopRound, ...]
    environment: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...] | None
    table: TableUse | None
    log: RunLog
    config_text: str | None
    problems: tuple[str, ...]


def read_run(run_dir: Path) -> RunRecord:
    """Read ``result.json``, ``log.jsonl`` and ``config.yaml`` from a run folder.

    Raises:
        ReportInputError: ``result.json`` is missing or is not a JSON object.
    """
    result = read_object(run_dir / "result.json")
    log = _read_log(run_dir / "log.jsonl", result.problems)
    return RunRecord(
        folder=run_dir.resolve().name,
        setting=Setting.read(result),
        seed=result.shown("seed"),
        verdict=_read_verdict(result),
        verdict_reason=result.text("verdict_reason"),
        headroom=_read_headroom(result),
        next_step=_read_next_step(result),
        target_ms=result.number("target_ms"),
        dense=NetworkFigures.read(result.object("dense") or Fields({})),
        pruned=NetworkFigures.read(result.object("pruned") or Fields({})),
        seconds=_read_seconds(result),
        removed_branches=result.texts("removed_branches") or (),
        groups=_read_groups(result),
        layers=_read_layers(result),
        calibration=_read_calibration(result),
        closed_loop=_read_closed_loop(result),
        environment=result.texts_of("environment"),
        warnings=_read_warnings(result, log),
        table=_read_table_use(result),
        log=log,
        config_text=read_text(run_dir / "config.yaml"),
        problems=tuple(result.problems),
    )


def _read_verdict(result: Fields) -> str | None:
    """``met``, ``missed`` or ``undecided``; older runs say only whether it was met."""
    verdict, met = result.text("verdict"), result.flag("met")
    if verdict in ("met", "missed", "undecided"):
        return verdict
    return None if met is None else "met" if met else "missed"


def _read_headroom(result: Fields) -> float | None:
    """The part of the latency target that is left."""
    headroom = result.object("headroom")
    return None if headroom is None else headroom.number("latency")


def _read_next_step(result: Fields) -> NextStep | None:
    step = result.object("next_step")
    if step is None:
        return None
    extra = (step.object("extra") or Fields({})).number("latency")
    group = step.text("group")
    if extra is None or group is None:
        return None
    return NextStep(group, step.number("width"), step.number("next_width"), extra)


def _read_seconds(result: Fields) -> tuple[tuple[str, float | None], ...]:
    seconds = result.object("seconds")
    if seconds is None:
        return ()
    return tuple((stage, seconds.number(stage)) for stage in seconds.values)


def _read_groups(result: Fields) -> tuple[GroupWidth, ...]:
    found = []
    for item in result.objects("groups") or ():
        dense_width, width = item.number("dense_width"), item.number("width")
        if dense_width is None or width is None:
            result.problems.append(f"{item.where}dense_width or width is missing: group left out")
            continue
        found.append(
            GroupWidth(
                name=item.text("name") or "(unnamed)",
                dense_width=dense_width,
                width=width,
                step=item.number("step"),
                keep_ratio=item.number("keep_ratio"),
                members=item.texts("members") or (),
            )
        )
    return tuple(found)


def _read_layers(result: Fields) -> tuple[LayerCost, ...]:
    found = []
    for item in result.objects("layers") or ():
        dense_ms, pruned_ms = item.number("dense_ms"), item.number("pruned_ms")
        if dense_ms is None or pruned_ms is None:
            result.problems.append(f"{item.where}dense_ms or pruned_ms is missing: layer left out")
            continue
        found.append(
            LayerCost(
                name=item.text("name") or "(unnamed)",
                op=item.text("op"),
                dense_shape=(item.number("cin_dense"), item.number("cout_dense")),
                pruned_shape=(item.number("cin"), item.number("cout")),
                dense_ms=dense_ms,
                pruned_ms=pruned_ms,
            )
        )
    return tuple(found)


def _read_calibration(result: Fields) -> Calibration | None:
    fields = result.object("calibration")
    if fields is None:
        return None
    networks = []
    for item in fields.objects("networks") or ():
        predicted_ms, measured_ms = item.number("predicted_ms"), item.number("measured_ms")
        if predicted_ms is not None and measured_ms is not None:
            held_out = item.flag("held_out") or False
            networks.append(
                CalibrationNetwork(predicted_ms, measured_ms, item.interval("ci95_ms"), held_out)
            )
    return Calibration(
        networks=tuple(networks),
        heldout_mape_pct=fields.number("heldout_mape_pct"),
        heldout_max_pct=fields.number("heldout_max_pct"),
        constant_ms=fields.number("constant_ms"),
        scales=(fields.object("scales") or Fields({})).flat_numbers(),
    )


def _read_closed_loop(result: Fields) -> tuple[ClosedLoopRound, ...]:
    return tuple(
        ClosedLoopRound(
            round=item.number("round"),
            predicted_ms=item.number("predicted_ms"),
            measured_ms=item.number("measured_ms"),
            ci95_ms=item.interval("ci95_ms"),
            target_ms=item.number("target_ms"),
            correction=item.number("correction"),
        )
        for item in result.objects("closed_loop") or ()
    )


def _read_warnings(result: Fields, log: RunLog) -> tuple[str, ...] | None:
    """The warnings of the result, then those only the log has; None if neither says."""
    recorded = result.texts("warnings")
    if recorded is None and not log.warnings:
        return None
    return tuple(dict.fromkeys((*(recorded or ()), *log.warnings)))


def _read_table_use(result: Fields) -> TableUse | None:
    table = result.object("table")
    if table is None:
        return None
    return TableUse(
        path=table.text("path"),
        entries=table.number("entries"),
        measured=table.number("measured"),
        reused=table.number("reused"),
    )


def _read_log(path: Path, problems: list[str]) -> RunLog:
    """Read the log; a step or epoch logged twice (a resumed run) counts as last written."""
    if not path.is_file():
        return RunLog()
    steps: dict[float, SearchStep] = {}
    epochs: dict[tuple[str, float], EpochPoint] = {}
    warnings: dict[str, None] = {}
    for fields in read_json_lines(path, problems):
        event = fields.values.get("event")
        if event == "search_step" and (step := _read_step(fields)):
            steps[step.step] = step
        elif event == "epoch" and (epoch := _read_epoch(fields)):
            epochs[epoch.stage, epoch.epoch] = epoch
        elif event == "warning" and (message := fields.text("message")):
            warnings[message] = None
    return RunLog(
        steps=tuple(steps[number] for number in sorted(steps)),
        epochs=tuple(epochs.values()),
        warnings=tuple(warnings),
    )


def _read_step(fields: Fields) -> SearchStep | None:
    step = fields.number("step")
    if step is None:
        return None
    return SearchStep(
        step=step,
        phase=fields.text("phase"),
        loss=fields.number("loss"),
        validation_loss=fields.number("validation_loss"),
        inexactness_beta2=fields.number("inexactness_beta2"),
        keep_ratios=fields.numbers("keep_ratios") or (),
        costs=(fields.object("costs") or Fields({})).flat_numbers(),
        targets=(fields.object("targets") or Fields({})).flat_numbers(),
    )


def _read_epoch(fields: Fields) -> EpochPoint | None:
    stage, epoch = fields.text("stage"), fields.number("epoch")
    if stage is None or epoch is None:
        return None
    return EpochPoint(stage, epoch, fields.number("train_loss"), fields.number("accuracy"))

"""``python -m dsa_hw.validate``: time an exported network, beside its prediction and target."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dsa_hw.runs.config import ValidateConfig
from dsa_hw.runs.options import run_command

if TYPE_CHECKING:
    from profilers.backends import Backend
    from profilers.timing import Measurement


AUTO = ValidateConfig.device


def _run(config: ValidateConfig) -> int:
    from dsa_hw.errors import UserError

    if (config.run is None) == (config.onnx is None):
        raise UserError("give one of --run FOLDER and --onnx FILE")
    if config.run is not None:
        _validate_run(config, Path(config.run))
    else:
        _validate_file(config, Path(config.onnx or ""))
    return 0


def _validate_file(config: ValidateConfig, path: Path) -> None:
    import dataclasses

    from dsa_hw.deployment.timing import time_networks
    from dsa_hw.pipeline.opening import configured_backend

    _need_file(path)
    device = "cpu" if config.device == AUTO else config.device
    backend = configured_backend(dataclasses.replace(config, device=device))
    found = time_networks(backend, {"network": path}, time_limit_s=config.measure_seconds)
    _print_measured(found["network"])
    _print_card(backend, path)


def _validate_run(config: ValidateConfig, path: Path) -> None:
    import dataclasses

    from dsa_hw.allocation.target_loop import verdict_sentence
    from dsa_hw.deployment.finished_run import validate_run
    from dsa_hw.deployment.timing import Target
    from dsa_hw.errors import UserError
    from dsa_hw.pipeline.finished_result import finished_result, names_code
    from dsa_hw.pipeline.finished_search import config_of
    from dsa_hw.pipeline.opening import configured_backend, dense_of_run
    from dsa_hw.runs.folder import CONFIG_FILE, ONNX_FILE, RESULT_FILE, RunFolder
    from profilers.speed import Speed

    folder = RunFolder(path)
    result = finished_result(folder)
    if result is None or "infeasible" in result:
        raise UserError(f"{path} holds no finished run ({RESULT_FILE} is missing)")
    _need_file(path / ONNX_FILE)
    if not (path / CONFIG_FILE).is_file():
        raise UserError(f"{path} does not say how it was made ({CONFIG_FILE} is missing); time its "
                        f"{ONNX_FILE} by itself: --onnx")  # fmt: skip
    asked = config_of(folder)
    code = names_code(asked.model, asked.data)
    if code is not None and result["target_ratio"] is not None and not config.trust_run:
        raise UserError(
            f"the run in {path} names code of its own ({code}), which timing its dense network "
            "would import and run; if you trust the folder: --trust-run true. To time its "
            f"network alone: --onnx {path / ONNX_FILE}"
        )
    dense = None if result["target_ratio"] is None else dense_of_run(folder, result)
    same_device = config.device in (AUTO, asked.device)
    backend = configured_backend(
        dataclasses.replace(
            config, device=asked.device if same_device else config.device,
            backend=config.backend or (asked.backend if same_device else None),
            include_copies=config.include_copies or asked.include_copies,
            batch_size=result["batch_size"], precision=result["precision"],
            threads=config.threads or result["threads"],
        )
    )  # fmt: skip
    ratio, target_ms = result["target_ratio"], result["target_ms"]
    target = None if target_ms is None else Target(None if ratio is not None else target_ms, ratio)
    state = result.get("fast_state")
    same_machine = backend.provenance()["device"] == result["device"]
    found = validate_run(
        backend, path / ONNX_FILE, dense, target=target, time_limit_s=config.measure_seconds,
        fast=Speed(**state) if state and same_machine else None,
    )  # fmt: skip
    _print_measured(found.pruned)
    _print_card(backend, path / ONNX_FILE)
    before = result["pruned"]
    print(f"at pruning: {before['measured_ms']:.4g} ms, predicted {before['predicted_ms']:.4g}")
    if found.dense_ms is not None:
        then = result["dense"]["measured_ms"]
        print(f"dense:     {found.dense_ms:.4g} ms, timed in turn with it; {then:.4g} at pruning")
        print(
            f"ratio:     {found.pruned.median_ms / found.dense_ms:.3f} of dense; "
            f"{result['ratio']['measured']:.3f} at pruning, target {result['target_ratio']:.3f}"
        )
    if found.timed is not None:
        print(f"target:    {found.timed.target_ms:.4g} ms; measured is "
              f"{100 * found.timed.use:.1f}% of it")  # fmt: skip
        print(f"verdict:   {verdict_sentence(found.timed)}")


def _need_file(path: Path) -> None:
    from dsa_hw.errors import UserError

    if not path.is_file():
        raise UserError(f"there is no ONNX file at {path}")


def _print_measured(measured: Measurement) -> None:
    low, high = measured.ci95_ms
    print(f"measured:  {measured.median_ms:.4g} ms (95% interval {low:.4g} to {high:.4g})")
    if measured.warning:
        print(f"warning:   {measured.warning}")


def _print_card(backend: Backend, network: Path) -> None:
    """What the card says of itself: energy, and what disturbed it."""
    from profilers.backends import CountsEnergy

    energy = backend.energy_mj(network) if isinstance(backend, CountsEnergy) else None
    if energy is not None:
        print(f"energy:    {energy:.4g} mJ a run, of the whole card")
    for observation in backend.observations():
        print(f"note:      {observation}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command("validate", ValidateConfig, _run, argv)


if __name__ == "__main__":
    sys.exit(main())

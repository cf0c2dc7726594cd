"""``python -m dsa_hw.validate``: time an exported network, beside its prediction and target."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from dsa_hw.cli import run_command
from dsa_hw.config import ValidateConfig


def _run(config: ValidateConfig) -> int:
    import dataclasses
    import json

    from dsa_hw.errors import UserError
    from dsa_hw.pipeline import configured_backend
    from dsa_hw.validation import time_networks

    if (config.run is None) == (config.onnx is None):
        raise UserError("give one of --run FOLDER and --onnx FILE")
    result = None
    path = Path(config.onnx or "")
    if config.run is not None:
        path = Path(config.run) / "model.onnx"
        result_path = Path(config.run) / "result.json"
        if not result_path.is_file():
            raise UserError(f"{config.run} holds no finished run (result.json is missing)")
        result = json.loads(result_path.read_text(encoding="utf-8"))
        config = dataclasses.replace(
            config, batch_size=result["batch_size"], precision=result["precision"],
            threads=config.threads or result["threads"],
        )  # fmt: skip
    if not path.is_file():
        raise UserError(f"there is no ONNX file at {path}")
    backend = configured_backend(config)
    measured = time_networks(backend, {"network": path}, time_limit_s=config.measure_seconds)[
        "network"
    ]
    low, high = measured.ci95_ms
    print(f"measured:  {measured.median_ms:.4g} ms (95% interval {low:.4g} to {high:.4g})")
    if measured.warning:
        print(f"warning:   {measured.warning}")
    if result is not None:
        pruned = result["pruned"]
        print(f"at pruning: {pruned['measured_ms']:.4g} ms, predicted {pruned['predicted_ms']:.4g}")
        if result["target_ms"] is not None:
            share = measured.median_ms / result["target_ms"]
            print(f"target:    {result['target_ms']:.4g} ms; measured is {100 * share:.1f}% of it")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command("validate", ValidateConfig, _run, argv)


if __name__ == "__main__":
    sys.exit(main())

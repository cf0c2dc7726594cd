"""``python -m dsa_hw.report``: draw the report of a run, a comparison or a latency table."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from dsa_hw.runs.config import ReportConfig
from dsa_hw.runs.options import run_command


def _run(config: ReportConfig) -> int:
    from dsa_hw.errors import UserError
    from dsa_hw.reports import write_comparison_report, write_run_report, write_table_report

    source = Path(config.source)
    out = Path(config.out) if config.out else None
    if source.is_dir():
        if not (source / "result.json").is_file():
            raise UserError(f"{source} holds no finished run (result.json is missing)")
        is_sweep = (source / "cells").is_dir()
        print((write_comparison_report if is_sweep else write_run_report)(source, out))
    elif source.is_file():
        print(write_table_report(source, out or source.with_suffix(".html")))
    else:
        raise UserError(f"there is no run folder or latency table at {source}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command("report", ReportConfig, _run, argv)


if __name__ == "__main__":
    sys.exit(main())

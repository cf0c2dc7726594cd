"""``python -m dsa_hw.compare``: what a latency budget buys, against everyone else."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from dsa_hw.runs.config import CompareConfig
from dsa_hw.runs.options import run_command


def _run(config: CompareConfig) -> int:
    from dsa_hw.comparison import compare
    from dsa_hw.errors import UserError
    from dsa_hw.runs.console import Progress, counted, print_comparison

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "the processes of a comparison work on runs of their own, and need no launcher: start "
            "the same command several times instead"
        )
    result = compare(config, Progress())
    print_comparison(result, config.out)
    if result["failed"]:
        name, problem = next(iter(result["failed"].items()))
        raise UserError(
            f"{counted(len(result['failed']), 'run')} failed ({name}: {problem}); the same command "
            f"tries them again. Where it happened: {config.out}/cells/*.error"
        )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command("compare", CompareConfig, _run, argv)


if __name__ == "__main__":
    sys.exit(main())

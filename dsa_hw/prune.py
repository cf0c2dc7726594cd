"""``python -m dsa_hw.prune``: a network and a target in, a measured smaller network out."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dsa_hw.runs.config import PruneConfig
from dsa_hw.runs.options import run_command


def _run(config: PruneConfig) -> int:
    from dsa_hw.pipeline.stages import prune
    from dsa_hw.runs.console import Progress, print_result
    from dsa_hw.runs.processes import Processes, trains_on_cpu

    with Processes(trains_on_cpu(config)) as processes:
        result = prune(config, Progress(silent=not processes.is_main), processes)
        if processes.is_main:
            print_result(result, config.out)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command("prune", PruneConfig, _run, argv)


if __name__ == "__main__":
    sys.exit(main())

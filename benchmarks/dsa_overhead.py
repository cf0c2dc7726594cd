"""What DSA adds to a training step: the same step with and without, in turn, in one run.

Two ratios a network: while masks are live and keep ratios stand still, and with the validation
passes at the default cadence, spread over the steps between them. Steps of the three sides
alternate in blocks of one cadence, in shuffled order; a ratio is taken within a turn.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from rich.table import Table
from torch import Tensor, nn

from benchmarks import harness
from dsa_hw.cost.counted import FlopsBudget
from dsa_hw.models.cifar import cifar_resnet56
from dsa_hw.pipeline.pruner import DSAPruner
from dsa_hw.search.settings import SearchSettings

NAME = "dsa_overhead"
LIMITS = {"without_validation": 1.05, "with_validation": 1.15}
NEVER = 10**9


@dataclass(frozen=True)
class Case:
    """A network and the batches it is trained on."""

    name: str
    build: Callable[[], nn.Module]
    size: int
    batch: int
    classes: int


CASES = (
    Case("cifar_resnet56", cifar_resnet56, 32, 64, 10),
    Case("resnet50", torchvision.models.resnet50, 224, 4, 1000),
)


class Side:
    """One network, its optimizer, and DSA if it has one."""

    def __init__(self, case: Case, device: torch.device, settings: SearchSettings | None) -> None:
        torch.manual_seed(0)
        self.model = case.build().to(device)
        example = torch.zeros(1, 3, case.size, case.size, device=device)
        self.pruner = None
        if settings is not None:
            self.pruner = DSAPruner(
                self.model, example, FlopsBudget(0.5, step=8), NEVER, settings=settings
            )
        self.optimizer = torch.optim.SGD(self.model.parameters(), 1e-3, momentum=0.9)
        generator = torch.Generator().manual_seed(0)
        shape = (case.batch, 3, case.size, case.size)
        self.x = torch.randn(shape, generator=generator).to(device)
        self.y = torch.randint(case.classes, (case.batch,), generator=generator).to(device)

    def loss(self) -> Tensor:
        """On the one batch that all sides share."""
        return nn.functional.cross_entropy(self.model(self.x), self.y)

    def steps(self, count: int) -> float:
        """Seconds of so many steps."""
        start = time.perf_counter()
        for _ in range(count):
            self.loss().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.pruner is not None:
                self.pruner.step(self.loss)
        if self.x.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start


def measure(case: Case, device: torch.device, turns: int) -> dict[str, Any]:
    """Ratios of the sides' times, turn by turn."""
    cadence = SearchSettings().validation_every
    started = SearchSettings(warmup=(0.0, 0.0))
    sides = {
        "plain": Side(case, device, None),
        "without_validation": Side(case, device, started),
        "with_validation": Side(case, device, started),
    }
    # The search begins at the first step. After that the one without validation never gets a turn.
    for side in sides.values():
        side.steps(cadence)
    quiet = sides["without_validation"].pruner
    assert quiet is not None
    assert quiet.searching
    quiet.settings = SearchSettings(warmup=(0.0, 0.0), validation_every=NEVER)
    order = list(sides)
    shuffle = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(turns):
        shuffle.shuffle(order)
        for name in order:
            seconds[name].append(sides[name].steps(cadence) / cadence)
    ratios = {
        name: [a / b for a, b in zip(seconds[name], seconds["plain"], strict=True)]
        for name in LIMITS
    }
    return {
        "network": case.name,
        "batch": case.batch,
        "device": str(device),
        "plain_step_ms": 1e3 * statistics.median(seconds["plain"]),
        "turns": turns,
        **{name: statistics.median(found) for name, found in ratios.items()},
        **{f"{name}_quartiles": _quartiles(found) for name, found in ratios.items()},
    }


def _quartiles(values: list[float]) -> list[float]:
    first, _, third = statistics.quantiles(values, n=4)
    return [first, third]


def main() -> None:
    """Every network on the CPU, and on CUDA where there is one."""
    options = harness.parse(NAME, __doc__)
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda"))
    rows = []
    for device in devices:
        for case in CASES:
            print(f"{case.name} on {device}", file=sys.stderr)
            rows.append(measure(case, device, turns=5 if options.quick else 30))
    table = Table(title="a DSA training step over the same step without")
    for column in ("network", "device", "step ms", "without validation", "with validation"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row["network"], row["device"], f"{row['plain_step_ms']:.0f}",
            f"{row['without_validation']:.3f}", f"{row['with_validation']:.3f}",
        )  # fmt: skip
    figures = {
        "rows": rows,
        "limits": LIMITS,
        "validation_every": SearchSettings().validation_every,
        "met": {name: all(r[name] <= limit for r in rows) for name, limit in LIMITS.items()},
    }
    origin = harness.provenance({"threads": torch.get_num_threads()} | harness.machine())
    harness.finish(NAME, options, figures, origin, table)


if __name__ == "__main__":
    sys.exit(main())

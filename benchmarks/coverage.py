"""Which networks can be pruned, how much of each, and what is left alone and why.

Every builder of torchvision's classification, segmentation and detection models, and one model of
every model file of timm that takes an image, goes through the inventory (with its dry cut at two
random allocations: masked, removed, deployed and run in ONNX Runtime) with random weights, in a
process of its own on one thread. A network passes where it comes through within a minute and at
least 40% of its parameters are in layers that can lose channels; a refusal counts as right or wrong
only after somebody has read its reason, so it is listed.

``--quick`` takes one in ten of them. Stopped and called again, it goes on (``runs/coverage``).
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks import harness

NAME = "coverage"
ENOUGH = 0.4
"""Part of the parameters that are in layers which can lose channels."""
LIMIT_S = 60.0
AT_ONCE = 2
GIVEN_UP_S = 180.0
IMAGE = 224
WORK = Path("runs") / NAME


def main(argv: list[str] | None = None) -> None:
    """Every network, two at a time."""
    if argv is None and len(sys.argv) == 3 and sys.argv[1] == "--one":
        print(json.dumps(_one(sys.argv[2])))
        return
    options = harness.parse(NAME, __doc__, argv)
    names = listed()
    if options.quick:
        names = names[::10]
    WORK.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        rows = list(pool.map(_kept, names))
    outcomes = Counter(row["outcome"] for row in rows)
    figures = {
        "of": len(rows), "passed": outcomes["passed"], "outcomes": dict(outcomes),
        "passed_share": outcomes["passed"] / len(rows), "networks": rows,
    }  # fmt: skip
    harness.finish(NAME, options, figures, harness.provenance(harness.machine()), _table(rows))


def listed() -> list[str]:
    """Names of the networks, as ``--model`` has them."""
    import timm
    import torchvision

    found = [
        name
        for kind in (None, torchvision.models.segmentation, torchvision.models.detection)
        for name in torchvision.models.list_models(module=kind or torchvision.models)
    ]
    of_file: dict[str, str] = {}
    for name in timm.list_models():
        file = timm.models.model_entrypoint(name).__module__
        of_file.setdefault(file, f"timm:{name}")
    return [*found, *of_file.values()]


def _kept(name: str) -> dict[str, Any]:
    return harness.once(WORK / f"{name.replace(':', '_')}.json", lambda: _apart(name))


def _apart(name: str) -> dict[str, Any]:
    """A network in a process of its own: what hangs or takes all memory ends with it."""
    words = [sys.executable, "-m", "benchmarks.coverage", "--one", name]
    started = time.monotonic()
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=GIVEN_UP_S, check=False
        )
    except subprocess.TimeoutExpired:
        return {"name": name, "outcome": "no end", "seconds": GIVEN_UP_S}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["nothing said"])[-1]
        return {"name": name, "outcome": "crashed", "reason": last[:300],
                "seconds": time.monotonic() - started}  # fmt: skip
    return json.loads(lines[-1])


def _one(name: str) -> dict[str, Any]:
    """The inventory of one network."""
    import torch

    from dsa_hw.errors import UserError
    from dsa_hw.network.inventory import prunable_parameters, take_inventory

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, x = _network(name)
    model.eval()
    total = sum(p.numel() for p in model.parameters())
    started = time.monotonic()
    try:
        graph = take_inventory(model, x)
    except UserError as error:
        return {"name": name, "outcome": "refused", "reason": str(error)[:300],
                "seconds": time.monotonic() - started, "parameters": total}  # fmt: skip
    seconds = time.monotonic() - started
    groups = graph.coupling.groups
    share = prunable_parameters(model, graph.coupling) / total
    reasons = Counter(g.frozen for g in groups if g.frozen)
    slow = "slow" if seconds > LIMIT_S else "passed"
    return {
        "name": name, "outcome": slow if share >= ENOUGH else "little", "seconds": seconds,
        "parameters": total, "prunable_share": share, "groups": len(groups),
        "frozen": sum(reasons.values()), "reasons": dict(reasons.most_common(3)),
    }  # fmt: skip


def _network(name: str) -> tuple[Any, Any]:
    import torch

    if name.startswith("timm:"):
        import timm

        model: Any = timm.create_model(name.removeprefix("timm:"), pretrained=False)
        shape = model.default_cfg.get("input_size", (3, IMAGE, IMAGE))
        return model, torch.randn(1, *shape)
    import torchvision

    dense = name in torchvision.models.list_models(module=torchvision.models.segmentation)
    found = name in torchvision.models.list_models(module=torchvision.models.detection)
    own = {"weights_backbone": None} if dense or found else {}
    model = torchvision.models.get_model(name, weights=None, **own)
    return model, torch.randn(1, 3, IMAGE, IMAGE)


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table("network", "outcome", "prunable", "frozen", "seconds", "why")
    for row in rows:
        share = row.get("prunable_share")
        reasons = row.get("reason") or "; ".join(row.get("reasons", {}))
        table.add_row(
            row["name"], row["outcome"], "" if share is None else f"{100 * share:.0f}%",
            f"{row['frozen']} of {row['groups']}" if "groups" in row else "",
            f"{row['seconds']:.0f}", reasons[:90],
        )  # fmt: skip
    return table


if __name__ == "__main__":
    main()

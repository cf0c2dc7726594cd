"""Several processes learn the keep ratios of one with all the data, and hear of each other."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

import dsa_hw
from dsa_hw.errors import UserError
from dsa_hw.pipeline.pruner import DSAPruner
from dsa_hw.runs.processes import Processes
from dsa_hw.search.settings import SearchSettings

STEPS, BATCH = 16, 8
SETTINGS = SearchSettings(validation_every=2, warmup=(0.1, 0.2), log_every=4)


def network() -> nn.Module:
    """Without batch-norms, whose statistics would be those of each process's part of a batch."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 4),
    )  # fmt: skip


def batches(rank: int, world: int) -> list[tuple[Tensor, Tensor]]:
    """This process's part of every batch, training and validation in turn."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(2 * STEPS):
        y = torch.randint(4, (BATCH,), generator=generator)
        x = torch.randn(BATCH, 3, 8, 8, generator=generator) + y[:, None, None, None]
        found.append((x[rank::world], y[rank::world]))
    return found


def searched(rank: int, world: int, importance: str) -> Tensor:
    model = network()
    pruner = DSAPruner(
        model, torch.zeros(1, 3, 8, 8), dsa_hw.FlopsBudget(0.5), STEPS,
        settings=SETTINGS, importance=importance,
    )  # fmt: skip
    trained = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    loss = nn.CrossEntropyLoss()
    data = iter(batches(rank, world))
    for _ in range(STEPS):
        x, y = next(data)
        loss(trained(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        xv, yv = next(data)
        pruner.step(lambda xv=xv, yv=yv: loss(model(xv), yv))
    assert pruner.searching
    return pruner.keep_ratios.detach().clone()


def work(rank: int, world: int, port: int, importance: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    try:
        torch.save(searched(rank, world, importance), Path(folder, f"{rank}.pt"))
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        os.environ |= {k: str(v) for k, v in ranks.items()}
        Path(folder, f"{rank}.json").write_text(json.dumps(told(rank, Processes(cpu=True))))
    finally:
        dist.destroy_process_group()


def told(rank: int, processes: Processes) -> list[str]:
    """What becomes known in this process of what happens in the others."""

    def ask(how: Callable[[Callable[[], str]], str], make: Callable[[], str]) -> str:
        try:
            return how(make)
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    def nested() -> str:
        return processes.from_main(lambda: f"from {rank}")

    def fail(kind: type[Exception], where: int) -> str:
        if rank == where:
            raise kind("no")
        return "fine"

    return [
        ask(processes.from_main, lambda: f"from {rank}"),
        ask(processes.from_main, nested),
        ask(processes.from_main, lambda: fail(UserError, 0)),
        ask(processes.from_main, lambda: fail(ZeroDivisionError, 0)),
        ask(processes.together, lambda: f"from {rank}"),
        ask(processes.together, lambda: fail(UserError, 0)),
        ask(processes.together, lambda: fail(UserError, 1)),
    ]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """With Taylor scores, which come from each process's own gradients."""
    importance: str = "taylor"
    spawn(work, args=(2, free_port(), importance, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(first, second)
    alone = searched(0, 1, importance)
    assert float((alone - 1).abs().max()) > 0.05  # something was learned
    # Adam divides float32 gradients by their own size: rounding grows a little with each move
    torch.testing.assert_close(first, alone, atol=2e-3, rtol=0)

    heard = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    failure = "ZeroDivisionError: no"
    assert heard[0] == ["from 0", "from 0", "UserError: no", failure, "from 0", "UserError: no",
                        "UserError: in process 1: no"]  # fmt: skip
    elsewhere = f"MainProcessFailed: the main process failed ({failure})"
    assert heard[1] == ["from 0", "from 0", "UserError: no", elsewhere, "from 1", "UserError: no",
                        "UserError: in process 1: no"]  # fmt: skip


PATIENCE = timedelta(seconds=4)


def wait_for_main(rank: int, world: int, port: int, folder: str) -> None:
    """Twice: a main process that takes longer than ``PATIENCE``, and one that is stopped."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ |= {k: str(v) for k, v in ranks.items()}
    processes = Processes(cpu=True, patience=PATIENCE)

    def measure() -> int:
        time.sleep(1.5 * PATIENCE.total_seconds())
        return os.getpid()

    main = processes.from_main(measure)
    try:
        processes.from_main(lambda: os.kill(os.getpid(), signal.SIGSTOP))
        said = "nothing"
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    if rank:
        Path(folder, "said").write_text(said)
        os.kill(main, signal.SIGCONT)
    os._exit(0)  # the group is broken: there is no good order to part in


def test_a_stopped_main_process_is_not_waited_for_for_days(tmp_path: Path) -> None:
    spawn(wait_for_main, args=(2, free_port(), str(tmp_path)), nprocs=2)
    said = (tmp_path / "said").read_text()
    assert said.startswith("MainProcessFailed: nothing was heard of the main process for")
    assert "stopped or killed" in said

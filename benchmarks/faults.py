"""Everything that can go wrong around a run: no traceback, no hang, nothing lost.

Commands: two at once on one folder; a measuring process that is stopped, killed, killed each time;
a full disk; a torn log; another user's files; a run folder and a comparison from a stranger.
Damage: a table, a configuration and a run folder, 10,000 times each, as a bad disk, a crash or an
editor leaves them. Each case works, or ends in one clear message; a traceback, a hang and a loss
(damage that is believed, or a good file that is destroyed) are failures and counted.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import TimeoutExpired
from typing import Any

import yaml
from rich.table import Table

from benchmarks import fault_commands as commands
from benchmarks.harness import finish, machine, parse, provenance
from benchmarks.mutations import (
    HANG,
    LOSS,
    TRACEBACK,
    WORKS,
    Lost,
    Tally,
    judge,
    mutated_bytes,
    mutated_lines,
    mutated_value,
)

NAME = "faults"
CASES = {False: 10_000, True: 600}
WORKERS = 2
SKIPPED = "skipped"
TABLE_LINES = 40
"""Of a measured table: damage to one line is damage to any."""
DRAWN_EVERY = 100
"""A report takes a second to draw; every so many damaged runs one is."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns its exit code: 1 if anything failed."""
    options = parse(NAME, __doc__, argv)
    with tempfile.TemporaryDirectory(prefix="faults_") as temporary:
        parent = Path(temporary)
        made = commands.new_folder(parent, "made")
        words = commands.command("prune", *commands.PLAN, "--out", "run")
        done = commands.run(words, made)
        if done.returncode:
            raise RuntimeError(f"the run that is to be damaged failed: {done.stderr}")
        tallies = {"commands": run_commands(parent, made / "run")}
        for kind in ("table", "configuration", "run folder"):
            tallies[kind] = damage(kind, parent, made / "run", CASES[options.quick])
    figures: dict[str, Any] = {kind: tally.figures() for kind, tally in tallies.items()}
    for key in ("tried", "clear_errors", "tracebacks", "hangs", "losses"):
        figures[key] = sum(part.figures()[key] for part in tallies.values())
    finish(NAME, options, figures, provenance(machine()), shown(tallies))
    return 1 if figures["tracebacks"] + figures["hangs"] + figures["losses"] else 0


def shown(tallies: dict[str, Tally]) -> Table:
    """What became of the cases, a line a kind."""
    columns = ("tried", "works", "clear_errors", "tracebacks", "hangs", "losses")
    table = Table("faults", *(name.replace("_", " ") for name in columns))
    for kind, tally in tallies.items():
        table.add_row(kind, *(f"{tally.figures()[name]:,}" for name in columns))
    return table


# -- commands ----------------------------------------------------------------------------------


def run_commands(parent: Path, run_folder: Path) -> Tally:
    """Each case of ``fault_commands``, two at a time: nothing here is about time."""
    tally = Tally()
    with ThreadPoolExecutor(WORKERS) as pool:
        for case, (outcome, said) in zip(
            commands.CASES,
            pool.map(lambda case: try_command(case, parent, run_folder), commands.CASES),
            strict=True,
        ):
            if outcome != SKIPPED:
                tally.add(outcome, f"{case.__name__}: {said}")
    return tally


def try_command(
    case: Callable[[Path, Path], str | None], parent: Path, run_folder: Path
) -> tuple[str, str]:
    """What became of a case, and what is said of it."""
    started = time.perf_counter()
    try:
        problem = case(parent, run_folder)
        outcome, said = (WORKS, "as it should") if problem is None else (LOSS, problem)
        if said.startswith(TRACEBACK):
            outcome = TRACEBACK
    except commands.Skipped as skipped:
        outcome, said = SKIPPED, f"skipped: {skipped}"
    except TimeoutExpired:
        outcome, said = HANG, f"more than {commands.LIMIT_S:.0f} s"
    seconds = time.perf_counter() - started
    print(f"{case.__name__} ({seconds:.0f} s): {said}", file=sys.stderr, flush=True)
    return outcome, said


# -- damage ------------------------------------------------------------------------------------


def damage(kind: str, parent: Path, run_folder: Path, count: int) -> Tally:
    """``count`` cases of one kind, in two processes."""
    print(f"{count:,} damaged copies of a {kind}", file=sys.stderr, flush=True)
    jobs = [
        (kind, parent / f"{kind} {part}", run_folder, part, count // WORKERS)
        for part in range(WORKERS)
    ]
    with multiprocessing.get_context("spawn").Pool(WORKERS) as pool:
        parts = pool.starmap(damage_part, jobs)
    tally = Tally()
    for part in parts:
        tally.counts += part.counts
        tally.failures += part.failures
    return tally


def damage_part(kind: str, folder: Path, run_folder: Path, seed: int, count: int) -> Tally:
    """One process's cases; seeded, so that each can be made again."""
    warnings.simplefilter("ignore")  # a library's, about numbers that no run has
    folder.mkdir()
    rng, tally = random.Random(f"{kind} {seed}"), Tally()
    make = {"table": Tables, "configuration": Configurations, "run folder": RunFolders}[kind]
    subject = make(folder, run_folder)
    for number in range(count):
        subject.case(tally, rng, number)
    return tally


class Tables:
    """A measured table is read as far as it is whole, or refused; appending destroys nothing."""

    def __init__(self, folder: Path, run_folder: Path) -> None:
        from profilers.table import LatencyTable

        whole = (run_folder.parent / "table.jsonl").read_bytes().splitlines(keepends=True)
        self.content = b"".join(whole[:TABLE_LINES])
        self.path = folder / "table.jsonl"
        self.path.write_bytes(self.content)
        self.whole = LatencyTable.load(self.path)

    def case(self, tally: Tally, rng: random.Random, number: int) -> None:
        """Damage, load, and compare."""
        how = mutated_lines if number % 4 == 0 else mutated_bytes
        if number % 4 == 1:
            how = _mutated_row
        damaged = how(self.content, rng)
        self.path.write_bytes(damaged)
        judge(tally, f"table {number} ({how.__name__})", lambda: self._read(damaged))

    def _read(self, damaged: bytes) -> None:
        from profilers.table import LatencyTable

        table = LatencyTable.load(self.path)
        if table.provenance != self.whole.provenance:
            raise Lost("a changed header was believed")
        for key, rounds in table.rounds.items():
            if self.whole.rounds.get(key, [])[: len(rounds)] != rounds:
                raise Lost(f"a changed line was believed ({key})")
        if self.path.read_bytes() != damaged:
            raise Lost("reading changed the file")


def _mutated_row(content: bytes, rng: random.Random) -> bytes:
    """A line with another value in it, as valid JSON."""
    lines = content.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = json.dumps(mutated_value(json.loads(lines[at]), rng)).encode()
    return b"\n".join([*lines, b""])


class Configurations:
    """A YAML file gives a configuration of the right types, or one message."""

    def __init__(self, folder: Path, run_folder: Path) -> None:
        self.content = (run_folder / "config.yaml").read_bytes()
        self.path = folder / "config.yaml"

    def case(self, tally: Tally, rng: random.Random, number: int) -> None:
        """Damage, and parse."""
        self.path.write_bytes(mutated_yaml(self.content, rng))
        judge(tally, f"configuration {number}", self._read)

    def _read(self) -> None:
        from dsa_hw.runs.config import PruneConfig
        from dsa_hw.runs.options import parse as parsed
        from dsa_hw.runs.options import to_yaml

        config = parsed("prune", PruneConfig, ["--config", str(self.path)])
        for option in dataclasses.fields(PruneConfig):
            value, default = getattr(config, option.name), option.default
            alike = (float, int) if isinstance(default, float) else type(default)
            if default is not None and not isinstance(value, alike):
                raise Lost(f"{option.name} is {value!r:.100}")
        if yaml.safe_load(to_yaml(config)) is None:
            raise Lost("nothing is left of it")


def mutated_yaml(content: bytes, rng: random.Random) -> bytes:
    """Options with damage to bytes, lines, or values."""
    kind = rng.randrange(3)
    if kind == 0:
        return mutated_bytes(content, rng)
    if kind == 1:
        return mutated_lines(content, rng)
    changed = mutated_value(yaml.safe_load(content), rng)
    return yaml.safe_dump(changed, sort_keys=False, allow_unicode=False).encode()


class RunFolders:
    """A run that is gone on with, reported, or validated after damage to one of its files."""

    FILES = ("config.yaml", "result.json", "log.jsonl", "seconds.json", "stages.json",
             "checkpoints/pruned.pt")  # fmt: skip

    def __init__(self, folder: Path, run_folder: Path) -> None:
        from dsa_hw.pipeline.finished_search import config_of
        from dsa_hw.runs.folder import RunFolder

        self.path = folder / "run"
        shutil.copytree(run_folder, self.path)
        self.content = {
            name: (self.path / name).read_bytes()
            for name in self.FILES
            if (self.path / name).is_file()
        }
        if "checkpoints/pruned.pt" not in self.content:
            RunFolder(self.path).save_checkpoint("pruned", {"widths": [32, 48], "epoch": 3})
            sealed = (self.path / "checkpoints/pruned.pt").read_bytes()
            self.content["checkpoints/pruned.pt"] = sealed
        self.content.setdefault("log.jsonl", b'{"event": "warning", "message": "one"}\n' * 3)
        self.content.setdefault("stages.json", b'{\n  "search": 0\n}\n')
        for name, content in self.content.items():
            (self.path / name).write_bytes(content)
        self.config = config_of(RunFolder(self.path))
        self.state = RunFolder(self.path).load_checkpoint("pruned")

    def case(self, tally: Tally, rng: random.Random, number: int) -> None:
        """Damage one file, use it as the commands do, and put it back."""
        name = rng.choice(list(self.content))
        damaged = self._damaged(name, rng)
        (self.path / name).write_bytes(damaged)
        for read in self._readers(name, number):
            judge(tally, f"run folder {number} ({name})", read)
        if any((self.path / n).read_bytes() != c for n, c in self.content.items() if n != name):
            tally.add(LOSS, f"run folder {number} ({name}): another file was changed")
        for other, content in self.content.items():
            (self.path / other).write_bytes(content)

    def _damaged(self, name: str, rng: random.Random) -> bytes:
        content = self.content[name]
        if name.endswith(".yaml"):
            return mutated_yaml(content, rng)
        if name.endswith(".json") and rng.random() < 0.6:
            return json.dumps(mutated_value(json.loads(content), rng)).encode()
        return (mutated_lines if rng.random() < 0.2 else mutated_bytes)(content, rng)

    def _readers(self, name: str, number: int) -> list[Callable[[], object]]:
        """What the commands do with the file that was damaged: one of it a case."""
        from dsa_hw.pipeline.finished_result import finished_result
        from dsa_hw.pipeline.finished_search import config_of
        from dsa_hw.reports import write_run_report
        from dsa_hw.reports.run_record import read_run
        from dsa_hw.runs.folder import RunFolder, Stopwatch

        folder = RunFolder(self.path)
        if number % DRAWN_EVERY == 0:
            return [lambda: write_run_report(self.path)]
        readers: dict[str, list[Callable[[], object]]] = {
            "config.yaml": [
                lambda: config_of(folder), lambda: RunFolder.check(self.path, self.config)
            ],
            "result.json": [
                lambda: self._show(finished_result(folder)), lambda: read_run(self.path)
            ],
            "log.jsonl": [lambda: read_run(self.path), lambda: self._warnings(folder)],
            "seconds.json": [lambda: Stopwatch(folder)],
            "stages.json": [lambda: folder.resume_stage("other", 10**12)],
            "checkpoints/pruned.pt": [lambda: self._checkpoint(folder)],
        }  # fmt: skip
        return [readers[name][number % len(readers[name])]]

    def _show(self, result: dict[str, Any] | None) -> None:
        from contextlib import redirect_stdout
        from io import StringIO

        from dsa_hw.runs.console import print_result

        if result is not None and "infeasible" not in result:
            with redirect_stdout(StringIO()):
                print_result(result, "run")

    def _warnings(self, folder: Any) -> None:
        from dsa_hw.pipeline.record import logged_warnings

        logged_warnings(folder)

    def _checkpoint(self, folder: Any) -> None:
        if not _same(folder.load_checkpoint("pruned"), self.state):
            raise Lost("a changed checkpoint was believed")


def _same(one: Any, other: Any) -> bool:
    """Whether two states hold the same values."""
    import torch

    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(_same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


if __name__ == "__main__":
    sys.exit(main())

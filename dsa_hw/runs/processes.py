"""The processes that ``accelerate launch`` started for one run, and what they tell each other.

The main process measures, decides, writes and speaks. The others train beside it, each on its
part of every batch, and are told the rest; an error in one of them is an error in all.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType

from dsa_hw.errors import MainProcessFailed, UserError
from dsa_hw.runs.config import TrainingConfig
from profilers.errors import ProfilerError

T = TypeVar("T")

PATIENCE = timedelta(minutes=10)
"""The others wait for a main process that measures for hours, but not for one that was stopped: it
says that it lives much more often than this."""
SIGNS_OF_LIFE = 10
"""In the time of ``PATIENCE``; each is a message of a few bytes."""
STILL_AT_IT = "the main process is still at it"
PLAIN = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU")
"""Accelerate's kinds of processes that each hold the whole network."""


def trains_on_cpu(config: TrainingConfig) -> bool:
    """Where ``config`` trains: ``train_device``, or CUDA where there is one."""
    wanted = config.train_device or ("cuda" if torch.cuda.is_available() else "cpu")
    return wanted == "cpu"


class Processes:
    """All processes of a run. One alone is the usual case; nothing is sent then.

    What is told goes over a gloo group of its own: waiting on it costs no processor time, which
    on NCCL it would while the main process measures.

    Attributes:
        count: of them.
        is_main: whether this is the one that measures, writes and speaks.
    """

    def __init__(self, cpu: bool, patience: timedelta = PATIENCE) -> None:
        self._patience = patience
        state = PartialState(cpu=cpu)
        self.count, self._index = state.num_processes, state.process_index
        self.is_main = self._index == 0
        if state.distributed_type not in [getattr(DistributedType, name) for name in PLAIN]:
            raise UserError(
                f"processes of kind {state.distributed_type.value} split the network among them; "
                "pruning needs all of it in each: choose plain data-parallel training in "
                "accelerate config"
            )
        self._alone = self.count == 1
        self._group = None if self._alone else _own_group(patience)

    def from_main(self, make: Callable[[], T], *, told: Callable[[T], T] = lambda made: made) -> T:
        """What ``make`` returns in the main process, where alone it runs; in all of them.

        Args:
            make: whatever it asks of this object runs in the main process alone, too.
            told: what the others get of it (what cannot be sent left out).

        Raises:
            Exception: what ``make`` raises, in all processes if it is the user's to mend.
            MainProcessFailed: in the others, if it is not, or if the main process was stopped for
                longer than ``patience``.
        """
        if self._alone:
            return make()
        if not self.is_main:
            return self._hear()
        self._alone = True
        try:
            with self._signs_of_life():
                made = make()
        except BaseException as error:
            self._tell((None, _sendable(error)))
            raise
        finally:
            self._alone = False
        self._tell((told(made), None))
        return made

    @contextmanager
    def _signs_of_life(self) -> Iterator[None]:
        """Let the others know now and then, during the block, that this process is running."""
        over = threading.Event()
        every_s = self._patience.total_seconds() / SIGNS_OF_LIFE

        def say() -> None:
            with contextlib.suppress(RuntimeError):  # one has gone: the next word to it fails too
                while not over.wait(every_s):
                    self._tell(STILL_AT_IT)

        teller = threading.Thread(target=say, daemon=True)
        teller.start()
        try:
            yield
        finally:
            over.set()
            teller.join()

    def together(self, make: Callable[[], T]) -> T:
        """What ``make`` returns here, where it runs in every process.

        Raises:
            UserError: in all processes, if ``make`` raises one in any.
        """
        if self._alone:
            return make()
        made, failed = None, None
        try:
            made = make()
        except (UserError, ProfilerError) as error:
            failed = error
        errors: list[Exception | None] = [None] * self.count
        dist.all_gather_object(errors, failed, group=self._group)
        index = next((i for i, error in enumerate(errors) if error is not None), None)
        if index is None:
            return made  # pyright: ignore[reportReturnType]
        error = errors[index]
        assert error is not None
        raise error if index == 0 else type(error)(f"in process {index}: {error}")

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Part in good order; the others of a main process that failed wait to be ended."""
        if self.count > 1 and (kind is None or self.is_main):
            PartialState().destroy_process_group()

    def _tell(self, told: tuple[Any, Exception | None] | str) -> None:
        dist.broadcast_object_list([told], src=0, group=self._group)

    def _hear(self) -> Any:
        told: list[Any] = [STILL_AT_IT]
        while told[0] == STILL_AT_IT:
            try:
                dist.broadcast_object_list(told, src=0, group=self._group)
            except RuntimeError as error:  # gloo's, after ``patience`` or when the process has gone
                minutes = self._patience.total_seconds() / 60
                raise MainProcessFailed(
                    f"nothing was heard of the main process for {minutes:.3g} minutes, or it has "
                    "ended; it may have been stopped or killed. The same command goes on from "
                    "the last checkpoint"
                ) from error
        made, error = told[0]
        if error is not None:
            raise error
        return made


def _own_group(patience: timedelta) -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo", timeout=patience)
    assert isinstance(group, dist.ProcessGroup)  # all processes are members
    return group


def _sendable(error: BaseException) -> Exception:
    if isinstance(error, (UserError, ProfilerError)):
        return error
    return MainProcessFailed(f"the main process failed ({type(error).__name__}: {error})")

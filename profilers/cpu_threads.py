"""ONNX Runtime sessions on the CPU, and the cores that their threads are on."""

from __future__ import annotations

import os
from pathlib import Path

import onnxruntime as ort

from profilers.host import available_cpus, one_cpu_per_core


class CpuThreads:
    """A number of threads, and a core for each where the process is there for measuring alone.

    Two spinning threads that the system has put on one core may stay there for a whole round while
    another core is idle: 39% of 750 rounds on two idle cores lost more than ``timing.LOST`` of
    their time so, 4% with a core for each. Where there are cores to spare, the system finds one.

    Args:
        count: threads; None takes the cores that this process may use.
        kept: whether each stays on a core, where there are exactly as many.
    """

    def __init__(self, count: int | None = None, kept: bool = False) -> None:
        self.count = count or available_cpus()
        cpus = one_cpu_per_core() if kept else ()
        self._cpus = cpus if len(cpus) == self.count == available_cpus() else ()

    def options(self) -> ort.SessionOptions:
        """Options of a session on these threads."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.count
        options.log_severity_level = 3
        if len(self._cpus) > 1:
            others = ";".join(str(cpu + 1) for cpu in self._cpus[1:])  # it counts from 1
            options.add_session_config_entry("session.intra_op_thread_affinities", others)
        return options

    def session(self, model: bytes | Path, options: ort.SessionOptions) -> ort.InferenceSession:
        """A session on the CPU."""
        source = str(model) if isinstance(model, Path) else model
        if not self._cpus:
            return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        # a new thread begins where its creator may be, and would wait for it there
        os.sched_setaffinity(0, self._cpus)
        try:
            return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        finally:
            os.sched_setaffinity(0, self._cpus[:1])

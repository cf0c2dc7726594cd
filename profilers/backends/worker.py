"""The process in which models are timed: it imports a runtime and nothing else.

A process that has trained with PyTorch times ONNX Runtime half as fast as a deployed one would
run (1.5 to 1.7 times the latency was seen), so measuring happens in one of its own.

Protocol: one JSON object a line on standard input and output. The first line in is the backend's
arguments; then ``{"open": path, "layer": bool}``, ``{"round": plan}``, ``{"loops": n}``,
``{"close": true}`` in turn, each answered by one line.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

from profilers.timing import Runner, SamplePlan


def serve(requests: Iterator[str], answers: TextIO) -> None:
    """Answer requests until there are no more."""
    from profilers.backends.onnxruntime_cpu import OnnxRuntimeCpu

    backend = OnnxRuntimeCpu(**json.loads(next(requests)))
    opened = ExitStack()
    runner: Runner | None = None
    for line in requests:
        request = json.loads(line)
        try:
            if "open" in request:
                model = Path(request["open"])
                subject = (
                    backend.open_layer(model.read_bytes())
                    if request["layer"]
                    else backend.open(model)
                )
                runner = opened.enter_context(subject)
                answer: dict[str, Any] = {}
            elif "close" in request:
                runner = None
                opened.close()
                answer = {}
            elif "round" in request:
                assert runner is not None
                answer = dataclasses.asdict(runner.take_round(SamplePlan(**request["round"])))
            else:
                assert runner is not None
                answer = {"elapsed_ms": runner.elapsed_ms(request["loops"])}
        except Exception as error:  # told to the other side, which raises it
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the owner's business
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a runtime prints is not an answer
    serve(iter(sys.stdin.readline, ""), channel)

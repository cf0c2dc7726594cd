"""The CUDA backends without a card: clocks, choice, providers, several devices."""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import json
import subprocess
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import Residual, randomize_norms
from fake_device import FakeDevice, FakeRunner
from torch._subclasses.fake_tensor import FakeTensorMode

from dsa_hw import compare, profile, prune, validate
from dsa_hw.network.exported import export_onnx
from dsa_hw.network.forward import outputs_of
from profilers.backends import open_backend, selection
from profilers.backends.onnx_torch import OnnxModule
from profilers.backends.onnxruntime_cuda import (
    BoundSession,
    check_provider,
    open_session,
    refusal_to_be_captured,
)
from profilers.backends.selection import choose, preference, probe
from profilers.backends.torch_runtime import TorchRuntime
from profilers.cards.cuda_clock import (
    WARMUPS_BEFORE_CAPTURE,
    DeviceRunner,
    EventClock,
    HostClock,
    captured,
    with_copies,
)
from profilers.cards.kept import KeptModels
from profilers.collect import Request, call_requests, collect
from profilers.errors import BackendUnavailable
from profilers.layers.models import layer_model
from profilers.layers.spec import LayerSpec
from profilers.steps import find_steps, sweep_requests
from profilers.table import LatencyTable
from profilers.timing import Runner, SamplePlan
from profilers.workers.model_files import KEPT, ModelFiles, model_key
from profilers.workers.parallel import Parallel
from profilers.workers.process import Worker
from profilers.workers.server import Server

CONV = LayerSpec.parse("conv k3x3 s1x1 p1.1.1.1 d1x1 gdense 8x8 b1 fp32 +relu")


# -- the device's clock ----------------------------------------------------------------------


class FakeGpu:
    """Work is queued at once and takes device time; the host's clock does not move."""

    def __init__(self) -> None:
        self.queued_ms = 0.0

    def run(self, ms: float) -> None:
        self.queued_ms += ms

    def event(self, enable_timing: bool) -> SimpleNamespace:
        assert enable_timing
        event = SimpleNamespace(at_ms=None, waited=False)

        def record(stream: object) -> None:
            event.at_ms = self.queued_ms

        def synchronize() -> None:
            event.waited = True

        def elapsed_time(end: SimpleNamespace) -> float:
            assert end.waited, "the end must have happened before it is read"
            return end.at_ms - event.at_ms

        event.record, event.synchronize, event.elapsed_time = record, synchronize, elapsed_time
        return event


def test_events_time_the_device_and_not_the_host() -> None:
    gpu = FakeGpu()
    clock = EventClock("stream", gpu.event, lambda stream: contextlib.nullcontext())
    runner = DeviceRunner(lambda: gpu.run(0.25), clock)
    assert runner.elapsed_ms(8) == pytest.approx(2.0)
    taken = runner.take_round(SamplePlan(sample_ms=2.0, samples=3, warmup_ms=1.0))
    assert (taken.median_ms, taken.loops) == (pytest.approx(0.25), 8)


@pytest.mark.parametrize("loops", [1, 15, 16, 17, 160])
def test_a_graph_of_several_runs_counts_each(loops: int) -> None:
    gpu = FakeGpu()
    clock = EventClock("stream", gpu.event, lambda stream: contextlib.nullcontext())
    runner = DeviceRunner(lambda: gpu.run(16 * 0.01), clock, runs_per_call=16)
    assert runner.elapsed_ms(loops) == pytest.approx(0.01 * loops)


def test_a_host_clock_is_injected() -> None:
    times = iter([1.0, 1.5])
    assert HostClock(lambda: next(times)).elapsed_ms(lambda: None) == pytest.approx(500.0)


def test_a_captured_graph_keeps_what_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph knows addresses only; weights that nobody holds are handed to the next model."""

    class Graph:
        replays = 0

        def replay(self) -> None:
            self.replays += 1

    graph = Graph()
    stream: Any = SimpleNamespace(synchronize=lambda: None)
    modes: list[str] = []

    @contextmanager
    def capturing(graph: object, stream: object, capture_error_mode: str) -> Iterator[None]:
        modes.append(capture_error_mode)
        yield

    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", capturing)

    class Model:
        runs = 0

        def __call__(self) -> None:
            self.runs += 1

    model = Model()
    alive = weakref.ref(model)
    call = captured(model, stream, repeats=16, error_mode="relaxed")
    assert model.runs == WARMUPS_BEFORE_CAPTURE + 16
    del model
    gc.collect()
    assert alive() is not None
    call()
    assert (graph.replays, modes) == (1, ["relaxed"])
    del call
    gc.collect()
    assert alive() is None


def test_models_are_kept_ready_as_long_as_there_is_room() -> None:
    made: list[str] = []
    full = [False]
    freed: list[int] = []
    kept: KeptModels[str] = KeptModels(lambda: full[0] and len(freed) < 2, lambda: freed.append(1))

    def model(key: str) -> str:
        return kept.get(key, lambda: made.append(key) or key)  # pyright: ignore

    for key in "abcab":
        assert model(key) == key
    assert made == ["a", "b", "c"]
    full[0] = True
    model("d")  # makes room: the two that were not used for the longest go
    assert len(freed) == 2
    model("b")
    assert made == ["a", "b", "c", "d"]
    model("c")
    assert made[-1] == "c"


# -- ONNX in PyTorch -------------------------------------------------------------------------


def test_the_onnx_module_computes_what_the_model_does() -> None:
    model, x = randomize_norms(Residual()), torch.randn(2, 3, 16, 16)
    module = OnnxModule(export_onnx(model, x))
    with torch.inference_mode():
        found = module(x)
    # two orders of summation of the same float32 products
    assert torch.allclose(found, outputs_of(model, x), rtol=1e-4, atol=1e-5)


def test_the_onnx_module_knows_the_operators_of_a_common_network() -> None:
    import torchvision

    torch.manual_seed(0)
    model, x = torchvision.models.mobilenet_v3_small().eval(), torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        expected, found = model(x), OnnxModule(export_onnx(model, x))(x)
    assert float((expected - found).abs().max() / expected.abs().max()) < 1e-4


def test_the_onnx_module_stays_on_its_device() -> None:
    """On CUDA, shown by tensors of a CUDA device that need none: mixing devices raises."""
    import torchvision

    exported = export_onnx(
        torchvision.models.mobilenet_v3_small().eval(), torch.zeros(1, 3, 64, 64)
    )
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
        module = OnnxModule(exported, torch.float16, "cuda")
        found = module(torch.zeros(1, 3, 64, 64, device="cuda", dtype=torch.float16))
    assert (found.device.type, found.dtype) == ("cuda", torch.float16)
    weights = [t for t in module._constants.values() if isinstance(t, torch.Tensor)]
    assert {t.device.type for t in weights} == {"cuda"}
    kernels = [t for t in weights if t.dim() == 4]
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in kernels)


def test_every_model_is_compiled_and_none_runs_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    """More models than PyTorch recompiles the same code for before it gives up. The compiler
    itself is left out (it takes 30 s to start): what it is given is counted and run."""
    compiled: list[object] = []

    def count(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        compiled.append(graph)
        return graph.forward

    whole = functools.partial(torch.compile, backend=count)
    monkeypatch.setattr(torch, "compile", whole)
    runtime = TorchRuntime("cpu", "torch-compile")
    models = [layer_model(CONV, 8, width) for width in range(8, 8 * 13, 8)]
    models.append(export_onnx(Residual(), torch.zeros(1, 3, 16, 16)).SerializeToString())
    for number, model in enumerate(models, start=1):
        with runtime.open(model) as runner:
            assert runner.elapsed_ms(2) > 0
        assert len(compiled) == number
    for model in models:  # the next round
        with runtime.open(model) as runner:
            assert runner.elapsed_ms(1) > 0
    assert len(compiled) == len(models)
    assert runtime.layers_pay_call
    assert runtime.provenance()["provider"] == "torch.compile, channels-last"


def test_an_unknown_operator_is_named() -> None:
    exported = export_onnx(Residual(), torch.zeros(1, 3, 16, 16))
    exported.graph.node[0].op_type = "Erf"
    with pytest.raises(BackendUnavailable, match="Erf"):
        OnnxModule(exported)


def test_torch_in_a_worker_of_its_own() -> None:
    model, x = randomize_norms(Residual()), torch.randn(2, 3, 16, 16)
    exported = export_onnx(model, x).SerializeToString()
    backend = open_backend("cpu", backend="torch-eager", batch_size=2)
    found = backend.outputs(exported, x.numpy())
    assert np.allclose(found, outputs_of(model, x).numpy(), rtol=1e-4, atol=1e-5)
    assert backend.provenance()["runtime"] == "torch-eager"
    assert backend.layers_pay_call
    assert (backend.notes(), backend.observations()) == ((), ())
    with backend.open(exported) as runner:
        assert runner.take_round(SamplePlan(1.0, 2, 1.0)).median_ms > 0
    broken: Any = backend
    with pytest.raises(BackendUnavailable, match="has no profiler of layers"):
        broken.layer_times(exported)


# -- the process that measures ---------------------------------------------------------------


@pytest.fixture
def eager() -> Iterator[Any]:
    backend: Any = open_backend("cpu", backend="torch-eager")
    yield backend
    backend.close()


def test_a_worker_that_died_is_told_once_and_replaced(eager: Any) -> None:
    process = eager._worker
    assert process.ask({"describe": True})["uuid"] is None
    process.kill()
    process._process.wait()
    with pytest.raises(BackendUnavailable, match="ended unexpectedly"):
        process.ask({"describe": True})
    assert process.ask({"describe": True})["uuid"] is None


def test_letting_go_of_a_model_starts_no_process(eager: Any) -> None:
    """A process takes seconds to start, and would hide why the one before it ended."""
    with eager.open(layer_model(CONV, 8, 8)) as runner:
        eager.interrupt()
        with pytest.raises(BackendUnavailable, match="ended unexpectedly"):
            runner.elapsed_ms(1)
    assert eager._worker._process is None


def test_a_worker_whose_cuda_is_broken_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a kernel's bad access every call fails, whatever the model."""

    def failing(request: dict[str, Any]) -> dict[str, Any]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    server = Server({"device": "cpu"})
    monkeypatch.setattr(server, "_answer", failing)
    answer = server.answer({"open": "model.onnx", "layer": True})
    assert not answer["broken"]  # no card was used here: the model is to blame
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: failing({}))
    answer = server.answer({"open": "model.onnx", "layer": True})

    for broken in (False, True):
        worker: Any = Worker({})
        ended: list[str] = []
        worker._process = SimpleNamespace(
            stdin=io.StringIO(), stdout=io.StringIO(json.dumps(answer | {"broken": broken}) + "\n"),
            wait=lambda timeout, ended=ended: ended.append("waited for"),
        )  # fmt: skip
        with pytest.raises(BackendUnavailable, match=r"refused a model.*illegal memory access"):
            worker.ask({"open": "model.onnx", "layer": True})
        assert (worker._process is None, ended) == (broken, ["waited for"] * broken)


def test_a_worker_that_does_not_end_is_killed() -> None:
    said: list[str] = []

    def wait(timeout: float | None = None) -> None:
        said.append("wait")
        if timeout is not None:
            raise subprocess.TimeoutExpired("worker", timeout)

    worker: Any = Worker({})
    worker._process = SimpleNamespace(
        stdin=None, stdout=None, wait=wait, kill=lambda: said.append("kill")
    )
    worker.stop()
    assert (said, worker._process) == (["wait", "kill", "wait"], None)


def test_copies_stand_around_the_run_and_wait_for_nothing() -> None:
    log: list[str] = []

    def tensor(name: str) -> Any:
        def copy(source: Any, non_blocking: bool) -> None:
            assert non_blocking
            log.append(f"{source.name} to {name}")

        return SimpleNamespace(name=name, copy_=copy)

    x, host_x, y, host_y = map(tensor, ("x", "host x", "y", "host y"))
    with_copies(lambda: log.append("run"), [(x, host_x)], [(y, host_y)])()
    assert log == ["host x to x", "run", "y to host y"]


# -- models on their way ---------------------------------------------------------------------


def test_equal_models_share_a_file_and_old_ones_go(tmp_path: Path) -> None:
    files = ModelFiles(tmp_path)
    models = [bytes([i]) * 100 for i in range(KEPT + 2)]
    paths = [files.path(m) for m in models]
    assert files.path(bytes(models[-1])) == paths[-1]
    assert sorted(tmp_path.iterdir()) == sorted(paths[-KEPT:])
    assert model_key(paths[-1]) == model_key(models[-1])
    own = tmp_path / "mine.onnx"
    own.write_bytes(models[0])
    assert model_key(own) == model_key(models[0])
    assert files.path(own) == own


# -- which runtime ---------------------------------------------------------------------------


class Candidate(FakeDevice):
    """A runtime that works, or does not for a reason."""

    def __init__(self, name: str, trouble: str | None) -> None:
        super().__init__()
        self.name, self.trouble = name, trouble
        self.said: list[str] = []
        self.closed = False

    @contextmanager
    def open_layer(self, model: bytes) -> Iterator[Runner]:
        if self.trouble:
            raise BackendUnavailable(self.trouble)
        yield FakeRunner(1.0)

    def add_notes(self, notes: list[str]) -> None:
        self.said += notes

    def close(self) -> None:
        self.closed = True


def chosen_among(
    troubles: dict[str, str], monkeypatch: pytest.MonkeyPatch, wanted: str | None = None
) -> tuple[Candidate, dict[str, Candidate]]:
    monkeypatch.setattr(selection, "absent", lambda name: None)
    made: dict[str, Candidate] = {}

    def opened(name: str) -> Any:
        return made.setdefault(name, Candidate(name, troubles.get(name)))

    found: Any = choose(opened, wanted)
    return found, made


def test_the_best_runtime_that_really_runs_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    troubles = {"tensorrt": "libnvinfer.so.11 is missing", "tensorrt-rtx": "sm_90 is not served"}
    found, made = chosen_among(troubles, monkeypatch)
    assert found.name == "onnxruntime"
    assert list(made) == ["tensorrt", "tensorrt-rtx", "onnxruntime"]
    assert made["tensorrt"].closed
    text = "\n".join(found.said)
    for reason in troubles.values():
        assert reason in text


def test_a_runtime_that_hangs_is_given_up() -> None:
    class Hanging(Candidate):
        interrupted = threading.Event()

        @contextmanager
        def open_layer(self, model: bytes) -> Iterator[Runner]:
            assert self.interrupted.wait(timeout=30)
            raise BackendUnavailable("the measuring process ended unexpectedly (exit code -9)")
            yield

        def interrupt(self) -> None:
            self.interrupted.set()

    hanging: Any = Hanging("onnxruntime", None)
    with pytest.raises(BackendUnavailable, match="onnxruntime did not run one convolution within"):
        probe(hanging, limit_s=0.05)


def test_nothing_better_is_passed_over_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    found, made = chosen_among({}, monkeypatch)
    assert found.name == preference()[0]
    assert list(made) == [preference()[0]]


def test_a_wanted_runtime_is_never_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendUnavailable, match="broken"):
        chosen_among({"onnxruntime": "broken"}, monkeypatch, wanted="onnxruntime")


def test_when_none_runs_every_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    troubles = {name: f"reason {i}" for i, name in enumerate(preference())}
    with pytest.raises(BackendUnavailable) as caught:
        chosen_among(troubles, monkeypatch)
    assert all(reason in str(caught.value) for reason in troubles.values())


def test_the_installed_packages_are_looked_at_first() -> None:
    reason = selection.absent("onnxruntime")  # the CPU build is what the tests install
    assert reason is not None
    assert "onnxruntime-gpu" in reason
    assert "CPUExecutionProvider" in reason
    assert selection.absent("torch") is None


@pytest.mark.parametrize("device", ["cuda:0", "cuda", "cuda:0,cuda:1"])
@pytest.mark.parametrize("backend", [[], ["--backend", "tensorrt"], ["--precision", "fp16"]])
def test_a_machine_without_cuda_is_one_clear_sentence(
    device: str, backend: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert profile.main(["--device", device, *backend]) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    assert "finds no CUDA device" in said
    assert "install" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (prune, ["--model", "cifar_resnet20", "--target-ratio", "0.5", "--epochs", "0"]),
        (compare, ["--model", "glyphs_resnet", "--data", "glyphs", "--target-ratios", "0.5"]),
        (validate, ["--onnx", "model.onnx"]),
        (validate, ["--onnx", "model.onnx", "--device", "cuda:0,cuda:1"]),
    ],
    ids=["prune", "compare", "validate", "two cards"],
)
def test_every_command_says_so_at_once(
    command: Any, arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.onnx").write_bytes(layer_model(CONV, 8, 8))
    out = [] if command is validate else ["--out", str(tmp_path / "out")]
    assert command.main(["--device", "cuda:0", *arguments, *out]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "finds no CUDA device" in last
    assert "--device cpu" in last


def test_bad_devices_are_named() -> None:
    for device in ("cuda:x", "cuda0"):
        with pytest.raises(BackendUnavailable, match="unknown device"):
            open_backend(device)
    with pytest.raises(BackendUnavailable, match="twice"):
        open_backend("cuda:0,cuda:0")
    with pytest.raises(BackendUnavailable, match="unknown device 'cpu,cuda:0'"):
        open_backend("cpu,cuda:0")
    with pytest.raises(BackendUnavailable, match="--device cuda:0"):
        open_backend("cpu", precision="fp16")  # a run on a GPU, validated without naming it
    with pytest.raises(BackendUnavailable, match="tensorrt runs on cuda only"):
        open_backend("cpu", backend="tensorrt")


# -- ONNX Runtime's providers ----------------------------------------------------------------


def test_a_provider_that_the_build_lacks_is_refused() -> None:
    with pytest.raises(BackendUnavailable, match="has no CUDAExecutionProvider"):
        check_provider("CUDAExecutionProvider", onnxruntime)
    check_provider("CPUExecutionProvider", onnxruntime)


def test_a_bound_session_writes_where_it_was_told() -> None:
    """ONNX Runtime's real binding, on tensors of the CPU in place of the card's."""
    options = onnxruntime.SessionOptions()
    chosen = [("CPUExecutionProvider", {})]
    session = open_session(layer_model(CONV, 8, 16), options, chosen, onnxruntime)
    bound = BoundSession(session, torch.device("cpu"))
    for _ in range(2):
        bound.inputs[0].normal_()
        bound.run()
        feeds = {session.get_inputs()[0].name: bound.inputs[0].numpy()}
        (expected,) = session.run(None, feeds)
        np.testing.assert_array_equal(bound.outputs[0].numpy(), expected)


def fallen_back(said: bytes, raising: Exception | None = None) -> SimpleNamespace:
    """A runtime that writes to standard error as its C++ code does, and falls back to the CPU."""

    def session(model: bytes, options: object, providers: object, enable_fallback: int) -> Any:
        assert enable_fallback == 0
        import os

        os.write(2, said)
        if raising is not None:
            raise raising
        return SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])

    return SimpleNamespace(InferenceSession=session)


def test_a_provider_that_does_not_load_is_an_error_with_its_own_reason() -> None:
    said = (
        b"\x1b[1;31m2026-10-02 11:00:00.123 [E:onnxruntime:Default, provider_bridge_ort.cc:2251 "
        b"TryGetProviderInfo_CUDA] Failed to load library libonnxruntime_providers_cuda.so with "
        b"error: libcublasLt.so.12: cannot open shared object file\x1b[m\n"
    )
    with pytest.raises(BackendUnavailable) as caught:
        open_session(b"", None, [("CUDAExecutionProvider", {})], fallen_back(said))
    text = str(caught.value)
    assert text.startswith("ONNX Runtime could not load CUDAExecutionProvider: Failed to load")
    assert "libcublasLt.so.12: cannot open shared object file" in text
    assert "\x1b" not in text
    assert "provider_bridge" not in text


def test_an_exception_of_onnx_runtimes_is_told() -> None:
    runtime = fallen_back(b"", RuntimeError("CUDA failure 100: no CUDA-capable device"))
    with pytest.raises(BackendUnavailable, match=r"refused .*CUDA failure 100"):
        open_session(b"", None, [("CUDAExecutionProvider", {})], runtime)


def test_both_packages_over_each_other_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    both = [SimpleNamespace(metadata={"Name": n}) for n in ("onnxruntime", "onnxruntime_gpu")]
    monkeypatch.setattr("importlib.metadata.distributions", lambda: both)
    with pytest.raises(BackendUnavailable, match=r"both installed.*pip uninstall -y"):
        check_provider("CUDAExecutionProvider", onnxruntime)


class Bound:
    """A session whose runs write 7 into its output."""

    def __init__(self) -> None:
        self.outputs = [torch.zeros(3)]

    def run(self) -> None:
        self.outputs[0].fill_(7.0)


def test_a_capture_counts_only_if_its_replay_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def failing(run: Callable[[], object]) -> Callable[[], object]:
        raise RuntimeError("operation not permitted when stream is capturing")

    assert refusal_to_be_captured(Bound(), lambda run: run) is None
    reason = refusal_to_be_captured(Bound(), failing)
    assert reason is not None
    assert "not permitted when stream is capturing" in reason
    # work that went to another stream: the graph is empty
    reason = refusal_to_be_captured(Bound(), lambda run: lambda: None)
    assert reason is not None
    assert "did not compute" in reason


# -- several devices -------------------------------------------------------------------------


class Card(FakeDevice):
    """A fake device that notes which thread used it, and waits for its sibling once."""

    def __init__(self, meeting: threading.Barrier | None = None, **differing: Any) -> None:
        super().__init__()
        self.differing, self.meeting = differing, meeting

    def provenance(self) -> dict[str, str | int]:
        return super().provenance() | self.differing

    @contextmanager
    def open_layer(self, model: bytes) -> Iterator[Runner]:
        meeting, self.meeting = self.meeting, None
        if meeting is not None:
            meeting.wait(timeout=30)  # only passes if the other one is at work too
        with super().open_layer(model) as runner:
            yield runner


def test_devices_measure_at_the_same_time_into_one_table(tmp_path: Path) -> None:
    meeting = threading.Barrier(2)
    cards = [Card(meeting), Card(meeting)]
    both = Parallel(cards, ["cuda:0", "cuda:1"])
    requests = [Request.layer(CONV, 8, 8 * (i + 1)) for i in range(12)]
    header = both.provenance() | {"reference_ms": 1.0}
    table = LatencyTable.open(tmp_path / "both.jsonl", header)
    found = collect(table, both, requests, rounds=3)
    assert found.measured == 12
    alone = LatencyTable(header)
    collect(alone, FakeDevice(), requests, rounds=3)
    again = LatencyTable.load(tmp_path / "both.jsonl")  # the chain of checksums holds
    assert {k: again.measurement(k).median_ms for k in again.rounds} == pytest.approx(
        {k: alone.measurement(k).median_ms for k in alone.rounds}, rel=1e-5
    )


@pytest.mark.parametrize(
    "field", ["device", "driver", "runtime_version", "power_limit_w", "memory_mib"]
)
def test_devices_that_differ_are_refused_by_the_field(field: str) -> None:
    with pytest.raises(BackendUnavailable, match=rf"cuda:0 and cuda:1 differ in {field}"):
        Parallel([Card(), Card(None, **{field: "other"})], ["cuda:0", "cuda:1"])


def test_a_failing_device_ends_the_collection() -> None:
    class Broken(Card):
        @contextmanager
        def open_layer(self, model: bytes) -> Iterator[Runner]:
            raise BackendUnavailable("the card fell off the bus")
            yield

    both = Parallel([Card(), Broken()], ["cuda:0", "cuda:1"])
    table = LatencyTable(both.provenance() | {"reference_ms": 1.0})
    requests = [Request.layer(CONV, 8, 8 * (i + 1)) for i in range(50)]
    with pytest.raises(BackendUnavailable, match="off the bus"):
        collect(table, both, requests, rounds=2)


# -- what a table says of a GPU --------------------------------------------------------------


def test_layers_in_a_graph_pay_for_no_call() -> None:
    device = FakeDevice()
    device.layers_pay_call = False
    assert call_requests(device) == []
    device.layers_pay_call = True
    table = LatencyTable(device.provenance() | {"reference_ms": 1.0})
    assert table.call_ms == 0.0
    collect(table, device, call_requests(device), rounds=2)
    assert table.call_ms > 0.0  # there it is measured


def test_a_step_is_a_multiple_of_what_the_device_takes_at_once() -> None:
    device = FakeDevice()  # steps of 8
    for expected, step in ((1, 8), (8, 8), (32, 32)):
        header = device.provenance() | {"reference_ms": 1.0, "expected_step": expected}
        table = LatencyTable(header)
        collect(table, device, sweep_requests([CONV]), rounds=2)
        assert find_steps(table, [CONV]) == {"conv": step}

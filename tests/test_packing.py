"""Many layers in one build: what is packed stays what it was, and times go back to the layers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from fake_device import FakeDevice, network_ms
from hypothesis import given
from hypothesis import strategies as st

from profilers.backends import TimesPacks
from profilers.backends.packing import AmbiguousNames, pack_models, pack_size, split_times
from profilers.backends.tensorrt.packs import (
    AGREEMENT,
    RUNS,
    TRIAL_LAYERS,
    WORTH_S,
    PackingRefused,
    PackTimer,
    Profile,
    trial_model,
)
from profilers.cards.nvml import Watch
from profilers.collect import PACK_BYTES, Request, collect, packs_of
from profilers.errors import BackendUnavailable
from profilers.layers.models import layer_model
from profilers.layers.spec import LayerSpec
from profilers.table import LatencyTable, LayerKey, NetworkKey
from profilers.timing import Round, Runner
from profilers.workers.isolated import Isolated

SPECS = [
    ("conv k3x3 s1x1 p1.1.1.1 d1x1 gdense 8x8 b1 fp32 +relu", 8, 16),
    ("conv k3x3 s2x2 p1.1.1.1 d1x1 gdepthwise 8x8 b1 fp32 +clip", 16, 16),
    ("conv k1x1 s1x1 p0.0.0.0 d1x1 gdense 4x4 b1 fp32 +add+relu", 8, 24),
    ("gemm k1x1 s1x1 p0.0.0.0 d1x1 gdense 1x1 b1 fp32", 32, 8),
]
CONV = LayerSpec.parse(SPECS[0][0])


def models() -> list[bytes]:
    return [layer_model(LayerSpec.parse(t), i, o, seed=n) for n, (t, i, o) in enumerate(SPECS)]


def outputs(model: bytes, inputs: dict[str, np.ndarray]) -> list[Any]:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return list(session.run(None, inputs))


def random_inputs(model: bytes, rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {
        i.name: rng.standard_normal([d.dim_value for d in i.type.tensor_type.shape.dim], "float32")
        for i in onnx.load_from_string(model).graph.input
    }


# -- packing ---------------------------------------------------------------------------------


def test_each_model_computes_in_the_pack_what_it_computes_alone(rng: np.random.Generator) -> None:
    alone = models()
    packed = pack_models(alone)
    onnx.checker.check_model(onnx.load_from_string(packed), full_check=True)
    assert pack_size(packed) == len(alone)
    given_ = [random_inputs(model, rng) for model in alone]
    expected = [
        out for model, own in zip(alone, given_, strict=True) for out in outputs(model, own)
    ]
    joined = {f"pack{n}.{k}": v for n, own in enumerate(given_) for k, v in own.items()}
    found = outputs(packed, joined)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_models_of_other_opsets_are_not_packed() -> None:
    one, other = models()[0], onnx.load_from_string(models()[1])
    other.opset_import[0].version = 17
    with pytest.raises(ValueError, match="opsets"):
        pack_models([one, other.SerializeToString()])


# -- times back to the layers ----------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(0, 10)), min_size=1, max_size=30))
def test_no_time_is_lost_or_given_to_another(spent: list[tuple[int, float]]) -> None:
    members = 6
    every = [(n, 1.0) for n in range(members)] + spent
    shapes = ("pack{0}.node_of_layer + pack{0}.node_of_output", "pack{0}.node_of_layer_myl0_2",
              "PWN(pack{0}.node_of_output)", "Reformatting CopyNode for Input Tensor 0 to "
              "pack{0}.node_of_layer", "{{ForeignNode[pack{0}.weight...pack{0}.node_of_output]}}",
              "pack{0}.output copy")  # fmt: skip
    reported = [(shapes[i % len(shapes)].format(n), ms) for i, (n, ms) in enumerate(every)]
    found = split_times(reported, members)
    for member in range(members):
        own = sum(ms for n, ms in every if n == member)
        assert found[member] == pytest.approx(own, rel=1e-12)


def test_metadata_tells_kernels_apart() -> None:
    metadata = {"__myl_Relu_myl0_1": "[ONNX Layer: pack1.node_of_layer]\x1f[ONNX Layer: pack1.a]"}
    reported = [("__myl_Relu_myl0_1", 2.0), ("pack0.node_of_layer_myl0_0", 1.0)]
    assert split_times(reported, 2, metadata) == [1.0, 2.0]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("{ForeignNode[pack0.node_of_layer...pack2.node_of_output]}", "several layers"),
        ("pack0.node_of_layer || pack1.node_of_layer", "several layers"),
        ("__myl_ConvRelu_myl0_1", "no layer"),
        ("pack7.node_of_layer", "no layer|several"),
        ("pack0.node_of_layer", "no time for 2 of 3"),
    ],
)
def test_what_is_ambiguous_is_refused(name: str, reason: str) -> None:
    with pytest.raises(AmbiguousNames, match=reason):
        split_times([(name, 1.0)], 3)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_real_pack_builds_and_its_kernels_belong_to_one_layer_each(precision: str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx-cu13")
    from profilers.backends.tensorrt.build import EngineBuilder

    built = EngineBuilder("tensorrt-rtx", precision, compute_capability=86)
    engine = built.build(pack_models(models()), layer=True)
    # An engine's kernels carry the ONNX layers they compute in the clear.
    found = re.findall(rb' layers="((?:\[ONNX Layer: [^\]]+\][\x1e\x1f]?)+)"', engine)
    kernels = {f"__myl_kernel_myl0_{n}": text.decode() for n, text in enumerate(found)}
    assert len(kernels) >= len(SPECS)
    times = split_times([(name, 1.0) for name in kernels], len(SPECS), kernels)
    assert sum(times) == len(kernels)
    # Without a profiler that looks inside, all of it is one region, and that is refused.
    (region,) = set(re.findall(rb"\{ForeignNode\[[^\]]+\]\}", engine))
    with pytest.raises(AmbiguousNames, match="several layers"):
        split_times([(region.decode(), 1.0)], len(SPECS))


# -- whether to believe them -----------------------------------------------------------------


class FakeProfiler:
    """A runtime of formulas: a build's fixed cost, an event's cost, and a distortion."""

    def __init__(self, build_s: float = 1.0, event_ms: float = 0.005, factor: float = 1.0) -> None:
        self.build_s, self.event_ms, self.factor = build_s, event_ms, factor
        self.now = 0.0
        self.profiled: list[int] = []

    def profile(self, packed: bytes, runs: int) -> Profile:
        self.profiled.append(pack_size(packed))
        graph = onnx.load_from_string(packed).graph
        times = {}
        for number in range(pack_size(packed)):
            own = onnx.ModelProto()
            own.CopyFrom(onnx.load_from_string(packed))
            keep = f"pack{number}."
            del own.graph.node[:]
            own.graph.node.extend(n for n in graph.node if n.name.startswith(keep))
            del own.graph.output[:]
            own.graph.output.extend(o for o in graph.output if o.name.startswith(keep))
            ms = network_ms(own.SerializeToString())
            times[f"{keep}node_of_layer"] = self.event_ms + ms * self.factor**number
        return Profile([times] * runs, {})

    def alone(self, model: bytes) -> float:
        self.now += self.build_s
        return network_ms(model)

    def timer(self) -> PackTimer:
        return PackTimer(self.profile, self.alone, clock=lambda: self.now)


def test_the_events_cost_is_taken_off() -> None:
    fake = FakeProfiler()
    rounds = fake.timer().rounds(pack_models(models()))
    expected = [network_ms(model) for model in models()]
    assert [r.median_ms for r in rounds] == pytest.approx(expected)
    assert all(r.p10_ms <= r.median_ms <= r.p90_ms for r in rounds)
    assert rounds[0].samples == RUNS


def test_the_trial_is_made_once() -> None:
    fake = FakeProfiler()
    timer = fake.timer()
    for _ in range(3):
        timer.rounds(pack_models(models()))
    assert fake.profiled == [len(TRIAL_LAYERS), *[len(SPECS)] * 3]


def test_packing_is_refused_where_builds_are_cheap() -> None:
    with pytest.raises(PackingRefused, match="takes only"):
        FakeProfiler(build_s=WORTH_S / 2).timer().rounds(pack_models(models()))


def test_packing_is_refused_where_its_times_are_others() -> None:
    distorted = FakeProfiler(factor=1 + 2 * AGREEMENT)
    with pytest.raises(PackingRefused, match="differ from those of the same layers"):
        distorted.timer().rounds(pack_models(models()))


def test_the_trials_layers_have_the_tables_batch() -> None:
    shape = onnx.load_from_string(trial_model(0, 64)).graph.input[0].type.tensor_type.shape
    assert shape.dim[0].dim_value == 64


# -- in a collection -------------------------------------------------------------------------


class PackingDevice(FakeDevice):
    """Times packs by the same formula, until it refuses."""

    def __init__(self, size: int = 5, refuses_after: int | None = None) -> None:
        super().__init__()
        self._size, self.left = size, refuses_after
        self.packs: list[int] = []

    @property
    def layers_per_pack(self) -> int:
        return 1 if self.left == 0 else self._size

    def pack_rounds(self, models: Sequence[bytes]) -> list[Round] | None:
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                return None
        self.packs.append(len(models))
        return [Round(ms, ms, ms, 1, 1) for ms in map(network_ms, models)]

    @contextmanager
    def open_layer(self, model: bytes) -> Iterator[Runner]:
        with super().open_layer(model) as runner:
            yield runner


def requests(count: int = 12) -> list[Request]:
    return [Request.layer(CONV, 8, 8 * (n + 1)) for n in range(count)]


def collected(device: FakeDevice, rounds: int = 2) -> LatencyTable:
    table = LatencyTable(device.provenance() | {"reference_ms": 1.0})
    collect(table, device, requests(), rounds=rounds)
    return table


def times(table: LatencyTable) -> dict[Any, tuple[float, int]]:
    """Median and rounds; to 9 digits, as two rounds are added up in either order."""
    found = {key: table.measurement(key) for key in table.rounds}
    return {key: (float(f"{m.median_ms:.9g}"), m.rounds) for key, m in found.items()}


def test_a_packed_collection_measures_what_a_plain_one_does() -> None:
    device = PackingDevice()
    assert isinstance(device, TimesPacks)
    assert not isinstance(FakeDevice(), TimesPacks)
    assert times(collected(device)) == times(collected(FakeDevice()))
    assert sorted(device.packs) == [2, 2, 5, 5, 5, 5]  # 12 layers in packs of 5, two rounds


def test_after_a_refusal_layers_are_timed_one_by_one() -> None:
    device = PackingDevice(refuses_after=2)
    assert times(collected(device)) == times(collected(FakeDevice()))
    assert len(device.packs) == 1


def test_what_a_pack_already_has_gets_no_round_more() -> None:
    device = PackingDevice()
    table = LatencyTable(device.provenance() | {"reference_ms": 1.0})
    collect(table, device, requests()[:3], rounds=2)
    collect(table, device, requests(), rounds=2)
    assert {m[1] for m in times(table).values()} == {2}


def test_packs_are_the_same_for_the_same_requests_and_networks_stay_alone() -> None:
    network = Request(NetworkKey("digest", (8, 8)), lambda: b"")
    given_ = [*requests(7), network]
    packs = packs_of(given_, 3)
    assert packs == packs_of(given_[::-1], 3)
    assert {r.key for pack in packs for r in pack} == {r.key for r in given_}
    assert sorted(map(len, packs)) == [1, 1, 3, 3]
    assert all(len(pack) == 1 for pack in packs if network in pack)
    assert all(len(pack) == 1 for pack in packs_of(given_, 1))


def test_large_layers_are_not_packed_together() -> None:
    large = LayerSpec.parse("conv k3x3 s1x1 p1.1.1.1 d1x1 gdense 112x112 b64 fp32 +relu")
    given_ = [Request.layer(large, 64, width) for width in (8, 16, 24, 32)]
    for pack in packs_of(given_, 4):
        keys = [r.key for r in pack if isinstance(r.key, LayerKey)]
        size = sum(k.spec.bytes_moved(k.cin, k.cout) for k in keys)
        assert len(pack) == 1 or size <= PACK_BYTES


class PackWorker:
    """A worker whose answer to a pack is given."""

    def __init__(self, answer: dict[str, Any] | Exception) -> None:
        self.answer, self.asked, self.pid = answer, 0, None

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        self.asked += 1
        assert set(request) == {"pack"}
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def observations(self) -> tuple[str, ...]:
        return ()


def isolated(worker: Any) -> Isolated:
    backend: Any = Isolated("cuda:0", "tensorrt", "fp16")
    backend._worker, backend._watch = worker, Watch(None, lambda: set())
    return backend


@pytest.mark.parametrize(
    "answer",
    [{"refused": "a build takes only 0.1 s"}, BackendUnavailable("a build takes only 0.1 s")],
    ids=["refused", "failed"],
)
def test_a_refusal_is_said_and_not_asked_again(answer: Any) -> None:
    backend = isolated(PackWorker(answer))
    assert backend.layers_per_pack > 1
    assert backend.pack_rounds(models()) is None
    assert backend.layers_per_pack == 1
    (said,) = backend.observations()
    assert "one by one" in said
    assert "a build takes only 0.1 s" in said


def test_packed_rounds_come_from_the_worker_and_are_counted() -> None:
    row = {"median_ms": 1.0, "p10_ms": 1.0, "p90_ms": 1.0, "samples": 20, "loops": 1}
    backend = isolated(PackWorker({"rounds": [row] * len(SPECS)}))
    assert backend.pack_rounds(models()) == [Round(1.0, 1.0, 1.0, 20, 1)] * len(SPECS)
    assert backend.observations() == (f"{len(SPECS)} rounds of layers were timed in packs",)
    assert Isolated("cuda:0", "torch").layers_per_pack == 1

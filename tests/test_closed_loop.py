"""The closed loop against devices that disagree with the model, drift, or are disturbed."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from test_rounding import WIDE, chain_cost

from dsa_hw.allocation.allocate import CONFIRMATIONS, Refined, allocate
from dsa_hw.allocation.target_loop import (
    AIM,
    MARGINS,
    ROUNDS,
    LoopRound,
    TargetLoop,
    Timed,
    verdict_sentence,
)
from dsa_hw.comparison.methods import allocate_uniform
from dsa_hw.cost.choices import WidthChoices
from dsa_hw.cost.latency.budget import ModelledLatency
from dsa_hw.errors import InfeasibleBudget, UserError
from dsa_hw.worth.values import closeness


class ChainModel:
    """A latency model of the chain, for budgets."""

    def predict_ms(self, widths: torch.Tensor) -> torch.Tensor:
        return (widths[..., :-1] * widths[..., 1:]).sum(-1) + 10.0 * widths.sum(-1)

    staircase_ms = predict_ms


@pytest.mark.parametrize("bias", [0.8, 0.95, 1.0, 1.1, 1.3])
def test_the_loop_corrects_a_wrong_model(bias: float) -> None:
    budget = ModelledLatency(ChainModel(), 30_000.0)  # pyright: ignore[reportArgumentType]
    rng = np.random.default_rng(0)

    def measure(widths: np.ndarray) -> Timed:
        ms = bias * float(chain_cost(widths[None])[0]) * float(rng.normal(1.0, 0.002))
        return Timed(ms, (0.99 * ms, 1.01 * ms), 30_000.0)

    values = closeness(WIDE, np.full(6, 100.0))
    found = allocate(WIDE, values, [budget], measure)
    chosen = found.chosen
    assert chosen is not None
    assert 0.97 <= chosen.use <= 1.0
    assert len(found.rounds) <= ROUNDS


def test_the_loop_is_steadier_than_its_measurements() -> None:
    budget = ModelledLatency(ChainModel(), 30_000.0)  # pyright: ignore[reportArgumentType]
    values = closeness(WIDE, np.full(6, 100.0))
    noise, misses = 0.04, []
    for seed in range(12):
        rng = np.random.default_rng(seed)

        def measure(widths: np.ndarray, rng: np.random.Generator = rng) -> Timed:
            ms = 1.1 * float(chain_cost(widths[None])[0]) * float(np.exp(rng.normal(0.0, noise)))
            return Timed(ms, (0.99 * ms, 1.01 * ms), 30_000.0)

        found = allocate(WIDE, values, [budget], measure)
        misses.append(1.1 * float(chain_cost(found.widths[None])[0]) / 30_000.0 - AIM)
    # believing the last measurement alone would miss by as much as the noise
    assert float(np.sqrt(np.mean(np.square(misses)))) < 0.6 * noise


def test_the_last_measurement_joins_the_loop() -> None:
    """The rounds see a machine that is 10% faster than the last measurements do."""
    budget = ModelledLatency(ChainModel(), 30_000.0)  # pyright: ignore[reportArgumentType]
    values = closeness(WIDE, np.full(6, 100.0))
    confirmed: list[tuple[int, ...]] = []

    def timed(widths: np.ndarray, speed: float) -> Timed:
        ms = speed * float(chain_cost(widths[None])[0])
        return Timed(ms, (0.99 * ms, 1.01 * ms), 30_000.0)

    def confirm(widths: np.ndarray) -> Timed:
        confirmed.append(tuple(widths.tolist()))
        return timed(widths, 1.1)

    def measure(widths: np.ndarray) -> Timed:
        return timed(widths, 1.0)

    found = allocate(WIDE, values, [budget], measure, confirm)
    alone = allocate(WIDE, values, [budget], measure)
    chosen = found.chosen
    assert chosen is not None
    assert alone.chosen is not None
    assert 1.06 <= timed(alone.widths, 1.1).measured_ms / 30_000.0
    assert 2 <= len(set(confirmed)) == len(confirmed) <= CONFIRMATIONS
    assert chosen.widths in confirmed
    assert timed(found.widths, 1.1).measured_ms / 30_000.0 <= 1.04  # half of the miss is gone


@pytest.mark.parametrize("last_is_slow", [False, True])
def test_rounds_of_a_disturbed_machine_count_less(last_is_slow: bool) -> None:
    """At times all is slower by a quarter, and the pruned network by 15% more than the dense one.
    What it takes at the other times is what counts."""
    budget = ModelledLatency(ChainModel(), 30_000.0)  # pyright: ignore[reportArgumentType]
    slow = iter([True, False, True, False, True, last_is_slow, False])

    def measure(widths: np.ndarray) -> Timed:
        ms = float(chain_cost(widths[None])[0])
        if next(slow):
            return Timed(1.25 * 1.15 * ms, (0.0, np.inf), 1.25 * 30_000.0, dense_ms=75_000.0)
        return Timed(ms, (0.99 * ms, 1.01 * ms), 30_000.0, dense_ms=60_000.0)

    values = closeness(WIDE, np.full(6, 100.0))
    found = allocate(WIDE, values, [budget], measure)
    assert abs(float(chain_cost(found.widths[None])[0]) / 30_000.0 - AIM) < 0.03
    evenly = TargetLoop()
    for turn in found.rounds:
        evenly.add(dataclasses.replace(turn, timed=dataclasses.replace(turn.timed, dense_ms=None)))
    assert evenly.correction > 1.06  # what all rounds alike would have corrected by


def test_a_disturbed_last_measurement_is_taken_again() -> None:
    budget = ModelledLatency(ChainModel(), 30_000.0)  # pyright: ignore[reportArgumentType]
    slow = iter([True, False])
    confirmed: list[tuple[int, ...]] = []

    def measure(widths: np.ndarray) -> Timed:
        ms = float(chain_cost(widths[None])[0])
        return Timed(ms, (ms, ms), 30_000.0, dense_ms=60_000.0)

    def confirm(widths: np.ndarray) -> Timed:
        confirmed.append(tuple(widths.tolist()))
        found = measure(widths)
        if not next(slow):
            return found
        ms = 1.4 * 1.05 * found.measured_ms
        return Timed(ms, (ms, ms), 1.4 * 30_000.0, dense_ms=84_000.0)

    values = closeness(WIDE, np.full(6, 100.0))
    found = allocate(WIDE, values, [budget], measure, confirm)
    assert len(confirmed) == 2
    assert found.chosen is not None
    assert found.chosen.timed.dense_ms == 60_000.0
    assert 0.96 <= found.chosen.use <= 1.0


def test_what_the_last_measurement_proves_is_taken() -> None:
    """The loop believes the first network again once the second was measured; its own measurement
    did not, and that one is proven."""
    budget = ModelledLatency(ChainModel(), 30_000.0)  # pyright: ignore[reportArgumentType]
    uses = iter([0.979, 0.979, 0.979])
    last = iter([(1.015, 1.03, 1.045), (0.955, 0.97, 0.985)])

    def at(low: float, use: float, high: float) -> Timed:
        return Timed(use * 30_000.0, (low * 30_000.0, high * 30_000.0), 30_000.0)

    def measure(widths: np.ndarray) -> Timed:
        use = next(uses)
        return at(use, use, use)

    confirmed: list[tuple[int, ...]] = []

    def confirm(widths: np.ndarray) -> Timed:
        confirmed.append(tuple(widths.tolist()))
        return at(*next(last))

    values = closeness(WIDE, np.full(6, 100.0))
    found = allocate(WIDE, values, [budget], measure, confirm)
    assert len(confirmed) == 2
    assert tuple(found.widths.tolist()) == confirmed[1]


def test_corrections_that_rule_everything_out_end_with_the_best_there_is() -> None:
    """The device is 20% slower than the model: nothing is at the target, the least is nearest."""
    least = float(chain_cost(WIDE.least[None])[0])
    budget = ModelledLatency(ChainModel(), 1.01 * least)  # pyright: ignore[reportArgumentType]

    def measure(widths: np.ndarray) -> Timed:
        ms = 1.2 * float(chain_cost(widths[None])[0])
        return Timed(ms, (ms, ms), 1.01 * least)

    for confirm in (None, measure):
        values = closeness(WIDE, np.full(6, 100.0))
        found = allocate(WIDE, values, [budget], measure, confirm)
        assert found.widths.tolist() == WIDE.least.tolist()
    with pytest.raises(InfeasibleBudget):
        allocate(WIDE, values, [dataclasses.replace(budget, target=0.9 * least)], measure)


def test_without_noise_the_loop_ends_just_under_the_target() -> None:
    budget = ModelledLatency(ChainModel(), 30_000.0)  # pyright: ignore[reportArgumentType]
    confirmed: list[np.ndarray] = []

    def measure(widths: np.ndarray) -> Timed:
        ms = float(chain_cost(widths[None])[0])
        return Timed(ms, (ms, ms), 30_000.0)

    def confirm(widths: np.ndarray) -> Timed:
        confirmed.append(widths)
        return measure(widths)

    found = allocate(WIDE, closeness(WIDE, np.full(6, 100.0)), [budget], measure, confirm)
    assert confirmed[-1].tolist() == found.widths.tolist()
    assert len(confirmed) <= 2
    assert found.chosen is not None
    assert 0.98 <= found.chosen.use <= 1.0  # a device without noise: nearer than a noisy one's aim
    assert found.rounds[-1].widths == tuple(found.widths.tolist())


def test_the_loop_follows_a_target_that_drifts_with_the_machine() -> None:
    budget = ModelledLatency(ChainModel(), 30_000.0)  # pyright: ignore[reportArgumentType]

    def measure(widths: np.ndarray) -> Timed:
        ms = 1.25 * float(chain_cost(widths[None])[0])  # everything is 25% slower now,
        return Timed(ms, (ms, ms), 1.25 * 30_000.0)  # the dense network too

    found = allocate(WIDE, closeness(WIDE, np.full(6, 100.0)), [budget], measure)
    assert max(abs(r.log_error) for r in found.rounds) < 1e-9
    assert found.chosen is not None
    assert 0.97 <= found.chosen.use <= 1.0


def test_uniform_widths_are_near_one_keep_ratio() -> None:
    budget = ModelledLatency(ChainModel(), 30_000.0)  # pyright: ignore[reportArgumentType]
    found = allocate_uniform(WIDE, [budget])
    assert found.costs["latency"] <= 30_000.0
    assert found.widths.max() - found.widths.min() <= 16


def device(bias: float, target: float = 30_000.0, noise: float = 0.0, seed: int = 0):
    """A measurement on a device that is slower than its model by ``bias``."""
    rng = np.random.default_rng(seed)

    def measure(widths: np.ndarray) -> Timed:
        ms = bias * float(chain_cost(widths[None])[0]) * float(np.exp(rng.normal(0.0, noise)))
        return Timed(ms, (0.997 * ms, 1.003 * ms), target)

    return measure


@pytest.mark.parametrize("biases", [(1.25, 0.9), (0.9, 1.25)])
def test_every_latency_budget_is_measured_and_corrected(biases: tuple[float, float]) -> None:
    """Of two devices one is slower than its model says: its target holds too, wherever it stands
    among the budgets. When only the first was measured, the second was missed by 25%."""
    budgets = [
        ModelledLatency(ChainModel(), 30_000.0, name=name)  # pyright: ignore[reportArgumentType]
        for name in ("phone", "server")
    ]
    measures = {name: device(bias) for name, bias in zip(("phone", "server"), biases, strict=True)}
    values = closeness(WIDE, np.full(6, 100.0))
    for confirm in (None, measures):
        found = allocate(WIDE, values, budgets, measures, confirm)
        uses = [measures[name](found.widths).use for name in measures]
        assert max(uses) <= 1.0
        assert max(uses) >= 0.95  # steps of 8 channels: the tighter device's target is used
        assert {r.budget for r in found.rounds} == {"phone", "server"}
        for name, bias in zip(measures, biases, strict=True):
            assert found.costs[name] == pytest.approx(
                bias * float(chain_cost(found.widths[None])[0])
            )


def test_a_measurement_says_which_budget_it_is_of() -> None:
    budgets = [
        ModelledLatency(ChainModel(), 30_000.0, name=name)  # pyright: ignore[reportArgumentType]
        for name in ("phone", "server")
    ]
    values = closeness(WIDE, np.full(6, 100.0))
    with pytest.raises(UserError, match=r"2 budgets that can be measured \(phone, server\)"):
        allocate(WIDE, values, budgets, device(1.0))
    with pytest.raises(UserError, match="'fridge'; the budgets that can be measured are phone"):
        allocate(WIDE, values, budgets, {"fridge": device(1.0)})


def test_a_more_valuable_network_with_less_latency_is_chosen() -> None:
    """Two choices: the most valuable network uses 80% of the target, one of less value 99%. A loop
    that tries to use its target takes the second."""
    choices = WidthChoices(((16, 32, 48), (16, 32)), (16, 16))
    cost = {(48, 16): 0.99, (32, 32): 0.80, (48, 32): 1.2}

    class Told:
        def staircase_ms(self, widths: torch.Tensor) -> torch.Tensor:
            rows = widths.reshape(-1, 2).tolist()
            shares = [cost.get((int(a), int(b)), 0.5) for a, b in rows]
            return 30_000.0 * torch.tensor(shares).reshape(widths.shape[:-1])

        predict_ms = staircase_ms

    budget = ModelledLatency(Told(), 30_000.0)  # pyright: ignore[reportArgumentType]
    values = [np.array([-2.0, -0.2, 0.0]), np.array([-0.5, 0.0])]

    def measure(widths: np.ndarray) -> Timed:
        ms = float(Told().staircase_ms(torch.as_tensor(widths).float()))
        return Timed(ms, (0.999 * ms, 1.001 * ms), 30_000.0)

    for confirm in (None, measure):
        found = allocate(choices, values, [budget], measure, confirm)
        assert found.widths.tolist() == [32, 32]
        assert {r.widths for r in found.rounds} == {(32, 32)}
    # nothing to find out beyond the first rounds: two shorter measurements and the last one
    assert len(found.rounds) <= 4


def turn_of(use: float, dense_ms: float | None = None, settled: bool = True) -> LoopRound:
    """A round of one network whose prediction is its target."""
    timed = Timed(use, (use, use), 1.0, dense_ms=dense_ms, settled=settled)
    return LoopRound((8,), 1.0, 1.0, 1.0, timed)


def test_one_wrong_fast_round_does_not_devalue_the_others() -> None:
    """The dense network cannot take 0.8 of what it takes: that round was read wrongly. Against the
    fastest of all, the five others would count a seventh each."""
    loop = TargetLoop()
    for _ in range(5):
        loop.add(turn_of(1.0, dense_ms=10.0))
    loop.add(turn_of(1.2, dense_ms=8.0))
    assert [loop.trust(r) for r in loop.rounds] == [1.0] * 6
    assert loop.correction < 1.05


def test_disturbed_rounds_count_less() -> None:
    loop = TargetLoop()
    loop.add(turn_of(1.0))
    loop.add(turn_of(1.3, settled=False))
    assert loop.correction < 1.3**0.25


def test_the_margin_follows_the_scatter() -> None:
    """Of networks near the allocation as long as there are few rounds, of the rounds then."""
    assert TargetLoop().margin == MARGINS[1]
    assert TargetLoop(scatter=0.0).margin == MARGINS[0]
    assert TargetLoop(scatter=0.006).margin == pytest.approx(0.015)
    assert TargetLoop(scatter=0.1).margin == MARGINS[1]
    loop = TargetLoop(scatter=0.1)
    for use in (0.999, 1.0, 1.001, 1.0):
        loop.add(turn_of(use))
    assert loop.margin == MARGINS[0]


def test_a_refined_model_moves_the_allocation() -> None:
    """The device charges one group several times what the model does. A scale cannot say so; a
    model fitted around the allocation can, and takes the channels from there."""
    sold: list[tuple[int, ...]] = []

    class Dear(ChainModel):
        def predict_ms(self, widths: torch.Tensor) -> torch.Tensor:
            return super().predict_ms(widths) + 200.0 * widths[..., 0]

        staircase_ms = predict_ms

    budget = ModelledLatency(ChainModel(), 40_000.0)  # pyright: ignore[reportArgumentType]

    def measure(widths: np.ndarray) -> Timed:
        ms = float(Dear().predict_ms(torch.as_tensor(widths).float()))
        return Timed(ms, (0.998 * ms, 1.002 * ms), 40_000.0)

    def refine(widths: np.ndarray) -> Refined:
        sold.append(tuple(widths.tolist()))
        better = ModelledLatency(Dear(), 40_000.0)  # pyright: ignore[reportArgumentType]
        return Refined(better, scatter=0.001)

    values = closeness(WIDE, np.full(6, 100.0))
    scaled = allocate(WIDE, values, [budget], measure, measure)
    refined = allocate(WIDE, values, [budget], measure, measure, {"latency": refine})

    def value(widths: np.ndarray) -> float:
        rows = zip(values, WIDE.widths, widths.tolist(), strict=True)
        return sum(v[allowed.index(w)] for v, allowed, w in rows)

    assert len(sold) == 1
    assert measure(refined.widths).use <= 1.0
    assert value(refined.widths) > value(scaled.widths)
    assert len(refined.rounds) < len(scaled.rounds)  # and there is less left to correct


@pytest.mark.parametrize("noise", [0.003, 0.01])
def test_a_finished_network_is_between_95_and_100_per_cent_of_its_target(noise: float) -> None:
    """On fine steps, whatever the model's bias, by the true time. 0.95 to 1 is what an independent
    timer must find on a quiet machine; at 1% of noise a measurement, the margin of 2% is two
    standard deviations, which the pooled rounds halve."""
    budget = ModelledLatency(ChainModel(), 30_000.0)  # pyright: ignore[reportArgumentType]
    values = closeness(WIDE, np.full(6, 100.0))
    uses = []
    for seed, bias in enumerate((0.85, 0.95, 1.0, 1.05, 1.2, 1.3)):
        measure = device(bias, noise=noise, seed=seed)
        found = allocate(WIDE, values, [budget], measure, measure)
        uses.append(device(bias)(found.widths).use)
    assert min(uses) >= 0.95
    assert max(uses) <= 1.0


def test_an_undecided_plan_ends_with_a_network() -> None:
    """The machine stays disturbed: there is a network, and nothing is proven of it."""
    budget = ModelledLatency(ChainModel(), 30_000.0)  # pyright: ignore[reportArgumentType]

    def measure(widths: np.ndarray) -> Timed:
        return dataclasses.replace(
            device(1.05)(widths), settled=False, disturbed=7, rounds=2, taken=9, lost=0.4
        )

    found = allocate(WIDE, closeness(WIDE, np.full(6, 100.0)), [budget], measure, measure)
    assert found.chosen is not None
    assert found.chosen.timed.judged.verdict == "undecided"
    assert 0.94 <= device(1.05)(found.widths).use <= 1.0
    assert len(found.rounds) <= ROUNDS + CONFIRMATIONS
    words = verdict_sentence(found.chosen.timed)
    assert "in 7 of 9 rounds other programs had the processor, and they took 40%" in words

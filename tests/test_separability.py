"""Whether methods differ by more than runs do."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsa_hw.comparison.separability import separability
from dsa_hw.comparison.summary import accuracy_at, over_seeds


def test_against_the_hand_computed_table() -> None:
    """Three methods, three seeds; means 2, 3, 7 and 3, 4, 5; errors sum to 4 in squares.

    Sum of squares of methods 3 * (4 + 1 + 9) = 42 with 2 degrees of freedom, of errors 4 with 4:
    F = 21 / 1, and P(F(2, 4) > 21) = (1 + 2 * 21 / 4) ** -2.
    """
    points = np.array([[1.0, 1.0, 4.0], [2.0, 4.0, 3.0], [6.0, 7.0, 8.0]])
    found = separability(["a", "b", "c"], points / 100)
    assert found is not None
    assert (found.methods, found.seeds) == (("a", "b", "c"), 3)
    assert found.run_sd_points == pytest.approx(1.0)
    assert found.p_value == pytest.approx((1 + 2 * 21 / 4) ** -2)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6))
def test_a_seed_that_is_easier_for_all_changes_nothing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    points = rng.normal(0.7, 0.01, (4, 3))
    plain = separability("abcd", points)
    shifted = separability("abcd", points + rng.normal(0, 0.1, (1, 3)))
    assert plain is not None
    assert shifted is not None
    assert shifted.run_sd_points == pytest.approx(plain.run_sd_points, rel=1e-6)
    assert shifted.p_value == pytest.approx(plain.p_value, rel=1e-5)


def test_chance_alone_is_rarely_called_a_difference() -> None:
    """Of 400 sweeps in which all methods are alike, 20 are to be expected under p = 0.05; 99.5% of
    draws lie within three standard deviations of 4.4."""
    rng = np.random.default_rng(0)
    values = [separability("abcdefgh", rng.normal(0.7, 0.004, (8, 3))) for _ in range(400)]
    assert 7 <= sum(v is not None and v.p_value < 0.05 for v in values) <= 33


@pytest.mark.parametrize("shape", [(1, 3), (3, 1), (0, 3)])
def test_nothing_is_said_of_too_few(shape: tuple[int, int]) -> None:
    assert separability(["m"] * shape[0], np.ones(shape)) is None


@pytest.mark.parametrize(("second", "p_value"), [(0.5, 1.0), (0.6, 0.0)])
def test_runs_without_any_error(second: float, p_value: float) -> None:
    found = separability(["a", "b"], np.array([[0.5, 0.5], [second, second]]))
    assert found is not None
    assert (found.run_sd_points, found.p_value) == (pytest.approx(0.0, abs=1e-6), p_value)


def test_methods_that_miss_a_seed_are_left_out() -> None:
    accuracies = {
        ("uniform", 0): 0.70, ("uniform", 1): 0.71, ("mdp", 0): 0.60, ("mdp", 1): 0.62,
        ("taylor", 0): 0.5, ("taylor", 1): None,
    }  # fmt: skip
    unused = {
        "measured_ms": 1.0, "ratio": 0.5, "flops": 1.0, "params": 1.0, "target_ms": 1.0,
        "minutes": 1.0, "met": True,
    }  # fmt: skip
    records = [
        {"method": m, "target": "50%", "seed": seed, "accuracy": accuracy,
         "infeasible": None if accuracy else "no"} | unused
        for (m, seed), accuracy in accuracies.items()
    ]  # fmt: skip
    (spread,) = over_seeds(["uniform", "mdp", "taylor"], ["50%"], records)["spreads"]
    assert spread["methods"] == ("uniform", "mdp")
    assert spread["target"] == "50%"
    assert spread["run_sd_points"] == pytest.approx(0.5)  # errors of 0.25 points, 4 of them


def test_accuracy_at_a_latency_is_on_the_line_through_the_neighbours() -> None:
    front = {0.25: 0.5, 0.5: 0.6, 1.0: 0.8}
    assert [accuracy_at(r, front) for r in front] == pytest.approx([0.5, 0.6, 0.8])
    middle = 0.5**0.5  # between 0.5 and 1 in the logarithm
    assert accuracy_at(middle, front) == pytest.approx(0.7)
    assert accuracy_at(0.125, front) == pytest.approx(0.4)  # the line goes on
    assert accuracy_at(2.0, front) == pytest.approx(1.0)


def test_a_gain_at_the_others_latency_leaves_out_what_slower_networks_gain() -> None:
    """DSA halves the latency for 10 points; the other is 2 points behind at half of DSA's."""

    def cell(method: str, target: str, ratio: float, accuracy: float) -> dict:
        return {
            "method": method, "target": target, "seed": 0, "infeasible": None, "params": 1,
            "accuracy": accuracy, "ratio": ratio, "measured_ms": ratio, "flops": 1.0, "minutes": 1,
            "target_ms": 1.0, "met": True,
        }  # fmt: skip

    cells = [
        cell("dsa-latency", "60%", 0.6, 0.8), cell("dsa-latency", "30%", 0.3, 0.7),
        cell("halp", "60%", 0.3, 0.68), cell("halp", "30%", 0.3, 0.69),
    ]  # fmt: skip
    found = over_seeds(["dsa-latency", "halp"], ["60%", "30%"], cells)["gains"]
    assert [g["points"] for g in found] == pytest.approx([12.0, 1.0])
    assert [g["points_at_its_latency"] for g in found] == pytest.approx([2.0, 1.0])
    alone = over_seeds(["dsa-latency", "halp"], ["60%"], [c for c in cells if c["target"] == "60%"])
    assert alone["gains"][0]["points_at_its_latency"] is None
    slow = [cell("halp", "60%", 1.01, 0.7)]  # pruned, and slower than the dense network
    beyond = over_seeds(["dsa-latency", "halp"], ["60%"], [*cells[:2], *slow])
    assert beyond["gains"][0]["points_at_its_latency"] is None

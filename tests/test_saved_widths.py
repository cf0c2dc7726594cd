"""Whatever is in ``widths.json`` and in the weights: the network, or one clear error."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Residual
from safetensors.torch import load_file, save_file
from torch import nn

from dsa_hw.errors import UserError
from dsa_hw.network.coupling import find_coupling
from dsa_hw.network.forward import outputs_of
from dsa_hw.network.removal import remove_channels
from dsa_hw.surgery.saved import WEIGHTS_FILE, WIDTHS_FILE, load_pruned, save_pruned

Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def saved(residual: nn.Module, images: torch.Tensor, tmp_path: Path) -> Path:
    coupling = find_coupling(residual, images)
    keep = [
        np.ones(g.atoms, bool) if g.frozen else np.arange(g.atoms) % 2 == 0 for g in coupling.groups
    ]
    small = remove_channels(residual, coupling, keep)
    save_pruned(tmp_path, small, coupling, keep, images)
    assert torch.isfinite(outputs_of(load_pruned(Residual(), tmp_path), images)).all()
    return tmp_path


CHANGES: dict[str, Change] = {
    "no groups": lambda c: c.pop("groups"),
    "no shape": lambda c: c.pop("input_shape"),
    "no exclude": lambda c: c.pop("exclude"),
    "no kept": lambda c: c["groups"][0].pop("kept"),
    "a negative channel": lambda c: c["groups"][0]["kept"].__setitem__(0, -1),
    "a channel too far": lambda c: c["groups"][0]["kept"].append(10**6),
    "a channel twice": lambda c: c["groups"][0]["kept"].__setitem__(1, 0),
    "no channel": lambda c: c["groups"][0].update(kept=[]),
    "a channel as text": lambda c: c["groups"][0]["kept"].__setitem__(0, "0"),
    "a truth for a number": lambda c: c["groups"][0].update(dense_width=True),
    "terabytes of input": lambda c: c.update(input_shape=[1, 3, 10**6, 10**6]),
    "an input of nothing": lambda c: c.update(input_shape=[1, 3, 0, 8]),
    "a shape of another network": lambda c: c.update(input_shape=[2, 5, 16, 16]),
    "a nested shape": lambda c: c.update(input_shape=[[1], 3, 8, 8]),
    "an unknown owner": lambda c: c.update(
        removed_branches=[
            {"name": "x", "layers": ["y"], "groups": [], "owner": "no.such", "end": "z"}
        ]
    ),
    "a branch of nothing": lambda c: c.update(removed_branches=[{}]),
    "a branch that is a number": lambda c: c.update(removed_branches=[1]),
    "a branch of groups too far": lambda c: c.update(
        removed_branches=[{"name": "x", "layers": [], "groups": [99], "owner": "", "end": ""}]
    ),
    "another digest": lambda c: c.update(network="0" * 16),
    "a digest that is a list": lambda c: c.update(network=[]),
    "groups that are a text": lambda c: c.update(groups="abc"),
    "fewer groups": lambda c: c["groups"].pop(),
    "another name": lambda c: c["groups"][0].update(name="other"),
    "fewer channels than the weights": lambda c: c["groups"][0]["kept"].pop(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_damaged_file_is_one_clear_error(saved: Path, change: Change) -> None:
    content = json.loads((saved / WIDTHS_FILE).read_text())
    before = copy.deepcopy(content)
    change(content)
    assert content != before
    (saved / WIDTHS_FILE).write_text(json.dumps(content))
    with pytest.raises(UserError, match=str(saved)):
        load_pruned(Residual(), saved)


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{", "[" * 200_000, "\udcff", '{"groups": NaN}']
)
def test_what_is_no_json_of_ours_is_one_clear_error(saved: Path, text: str) -> None:
    (saved / WIDTHS_FILE).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match="widths"):
        load_pruned(Residual(), saved)


def test_a_large_batch_is_not_allocated(saved: Path, images: torch.Tensor) -> None:
    expected = outputs_of(load_pruned(Residual(), saved), images)
    content = json.loads((saved / WIDTHS_FILE).read_text())
    content["input_shape"][0] = 10**12
    (saved / WIDTHS_FILE).write_text(json.dumps(content))
    assert torch.equal(outputs_of(load_pruned(Residual(), saved), images), expected)


def test_weights_that_are_no_numbers_are_refused_by_name(saved: Path) -> None:
    weights = load_file(saved / WEIGHTS_FILE)
    weights["head.bias"][3] = float("nan")
    save_file(weights, saved / WEIGHTS_FILE)
    with pytest.raises(UserError, match=r"1 of the 10 values of head\.bias are NaN"):
        load_pruned(Residual(), saved)


def test_torn_weights_are_one_clear_error(saved: Path) -> None:
    (saved / WEIGHTS_FILE).write_bytes((saved / WEIGHTS_FILE).read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be loaded"):
        load_pruned(Residual(), saved)

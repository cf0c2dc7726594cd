"""Cut a network at random before anything is trained, and see that it computes what it should.

A *probe* is the network with random weights: structure alone decides what can be cut, and freshly
initialised or pretrained weights may hide it (a branch whose last batch-norm is zero computes
nothing). The probe is cut to random allocations. Each time the smaller network must compute what
the masked one computes, and the deployed graph at those widths must be that smaller network and run
in ONNX Runtime. Groups that are in the way are found by halving, and frozen with the reason.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from dsa_hw.errors import UnsupportedModel
from dsa_hw.network.coupling import Coupling
from dsa_hw.network.forward import (
    Inputs,
    arguments_of,
    as_float,
    map_inputs,
    noise_like,
    output_tensors,
)
from dsa_hw.network.graph import DeployedGraph
from dsa_hw.network.layer_modules import layer_types, norm_types, prunable_types, weight_axes
from dsa_hw.network.masks import ChannelMasks, hard_masks
from dsa_hw.network.removal import Keep, kept_widths, remove_channels

ALLOCATIONS = 2
KEPT = 0.6
"""Part of the atoms that a random allocation keeps on average."""
TOLERANCE = {torch.float32: 2e-3, torch.float64: 1e-6}
"""Largest difference of outputs, in standard deviations of them. Sums in another order differ by
about 1e-5 of it in float32 and 1e-13 in float64; a wrong channel by about 1e-2 and more."""
RUNTIME_TOLERANCE = 1e-2
"""The same between PyTorch and ONNX Runtime, which folds batch-norms and fuses: both float32."""
MOST_TRIES = 40
"""Of a check, to find the groups in the way: each is a network cut and run, up to a second or two.
A single culprit among a hundred groups is found in 15."""
SAMPLES = 4
"""At most so many samples go through PyTorch; the runtime takes the deployed batch."""

Check = Callable[[Keep], "str | None"]


@torch.no_grad()
def make_probe(model: nn.Module, example_inputs: Inputs) -> nn.Module:
    """A copy of ``model`` on the CPU, with random weights under which every layer matters.

    Convolutions and linear layers keep the variance of their inputs, and batch-norms normalise it
    as a whole, so that channels stay unlike each other.

    Args:
        example_inputs: (N, C, H, W), or a tensor for each argument.
    """
    probe = copy.deepcopy(model).cpu().float().eval()
    probe.to(memory_format=torch.contiguous_format)  # pyright: ignore: it is what is exported
    for parameter in probe.parameters():
        parameter.requires_grad_(True)  # masks read off gradients which norms follow a layer
    generator = torch.Generator().manual_seed(0)

    def uniform(tensor: Tensor, low: float, high: float) -> None:
        tensor.copy_(torch.empty_like(tensor).uniform_(low, high, generator=generator))

    for module in probe.modules():
        own = dict(module.named_parameters(recurse=False))
        if isinstance(module, layer_types()):
            if "weight" in own:
                one = own["weight"].select(weight_axes(module).out, 0)
                own["weight"].normal_(0.0, (2.0 / max(1, one.numel())) ** 0.5, generator=generator)
            if "bias" in own:
                own["bias"].normal_(0.0, 0.1, generator=generator)
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            for name, low, high in (("weight", 0.5, 1.5), ("bias", -0.5, 0.5)):
                if name in own:
                    uniform(own[name], low, high)
        elif isinstance(module, norm_types()):  # with buffers in place of parameters
            for name, low, high in (("weight", 0.5, 1.5), ("bias", -0.5, 0.5)):
                uniform(module.get_buffer(name), low, high)
        else:
            for parameter in own.values():
                uniform(parameter, 0.5, 1.5)
    few = map_inputs(lambda t: t.detach().cpu()[:SAMPLES], example_inputs)
    _normalise(probe, as_float(few), generator)
    return probe


def _normalise(probe: nn.Module, inputs: Inputs, generator: torch.Generator) -> None:
    """Set running statistics near those of ``inputs``, unlike for every channel."""

    def note(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        mean, variance = module.running_mean, module.running_var
        if not (isinstance(mean, Tensor) and isinstance(variance, Tensor)):
            return
        spread = arguments[0].std(correction=0).clamp_min(1e-6)
        noise = torch.rand(2, len(mean), generator=generator)
        mean.copy_(arguments[0].mean() + spread * (noise[0] - 0.5))
        variance.copy_(spread**2 * (0.5 + noise[1]))

    norms = [m for m in probe.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    hooks = [norm.register_forward_pre_hook(note) for norm in norms]
    try:
        probe(*arguments_of(inputs))
    finally:
        for hook in hooks:
            hook.remove()


class DryCut:
    """Cuts a probe, and says what is wrong with what comes out.

    Args:
        probe: see ``make_probe``.
        graph: its deployed graph, exported from the probe itself.
        example_inputs: (N, C, H, W), or a tensor for each argument, of the deployed batch size.
    """

    def __init__(self, probe: nn.Module, graph: DeployedGraph, example_inputs: Inputs) -> None:
        self._probe, self._graph = probe, graph
        generator = torch.Generator().manual_seed(1)
        self._batch = noise_like(example_inputs, generator)
        self._inputs = map_inputs(lambda t: t[:SAMPLES], self._batch)

    def checked(self) -> Coupling:
        """The graph's coupling, with the groups frozen that cannot be cut.

        Raises:
            UnsupportedModel: nothing is left that can be cut, or what is in the way is not found.
        """
        coupling = self._graph.coupling
        for check in (self._cut_is_masked, self._graph_is_cut):
            coupling = self._freeze_culprits(coupling, check)
        if all(group.frozen for group in coupling.groups):
            raise UnsupportedModel(
                f"{type(self._probe).__name__} has no channels that can be removed: "
                f"{frozen_summary(coupling)}{_other_kinds(self._probe)}"
            )
        return coupling

    def _freeze_culprits(self, coupling: Coupling, check: Check) -> Coupling:
        """Freeze groups until random allocations of the others pass."""
        for seed in range(ALLOCATIONS):
            keep = random_keep(coupling, np.random.default_rng(seed))
            if check(keep) is None:
                continue
            free = [i for i, group in enumerate(coupling.groups) if not group.frozen]
            # what fails has often the same name in every block: together it is found in fewer tries
            free.sort(key=lambda i: coupling.groups[i].name.rpartition(".")[2])
            coupling = coupling.frozen(_culprits(coupling, keep, free, check, MOST_TRIES))
            still = check(_only(coupling, keep, free))
            if still is not None:
                raise UnsupportedModel(
                    f"channels of {type(self._probe).__name__} cannot be removed: {still}; no "
                    "single group of channels is the cause, so that none can be left out"
                )
        return coupling

    # -- what must hold ----------------------------------------------------------------------

    def _cut_is_masked(self, keep: Keep) -> str | None:
        """What differs between the masked and the cut probe; None if nothing does."""
        said = self._difference(self._probe, keep, self._inputs)
        if said is not None and said.startswith(DIFFERENT):
            # float32 may not be enough where many channels cancel
            said = self._difference(
                copy.deepcopy(self._probe).double(), keep, _as_double(self._inputs)
            )
        return said

    def _difference(self, probe: nn.Module, keep: Keep, inputs: Inputs) -> str | None:
        coupling = self._graph.coupling
        masks = ChannelMasks(probe, coupling, inputs)
        dtype = next(probe.parameters()).dtype
        masks.set(hard_masks(coupling, (), keep)[0].to(dtype))
        masked = output_tensors(probe, inputs)
        masks.remove()
        try:
            cut = output_tensors(remove_channels(probe, coupling, keep), inputs)
        except Exception as error:  # the model's own code, on shapes that it was not written for
            return f"the network does not run without them ({_first_line(error)})"
        return _disagreement(masked, cut, TOLERANCE[dtype], "the masked network")

    def _graph_is_cut(self, keep: Keep) -> str | None:
        """What differs between the cut probe and the deployed graph at its widths."""
        graph = self._graph
        small = remove_channels(self._probe, graph.coupling, keep)
        try:
            shapes = graph.layer_shapes(kept_widths(graph.coupling, keep))
            model = graph.cut(keep)
        except ValueError as error:
            return f"the deployed graph cannot have these widths ({_first_line(error)})"
        for layer, shape in zip(graph.layers, shapes, strict=True):
            weight = small.get_submodule(layer.name).weight
            assert isinstance(weight, Tensor)
            if sorted(weight.shape) != sorted(shape):
                return (
                    f"{layer.name} has weights of shape {tuple(weight.shape)} after the cut, and "
                    f"{shape} in the deployed graph"
                )
        try:
            outputs = _run(model, self._batch)
        except Exception as error:  # of the runtime: its classes have no common one
            return f"ONNX Runtime does not run the network without them ({_first_line(error)})"
        expected = output_tensors(small, self._batch)
        got = [torch.from_numpy(output) for output in outputs]
        return _disagreement(expected, got, RUNTIME_TOLERANCE, "ONNX Runtime's")


DIFFERENT = "outputs differ"


def random_keep(coupling: Coupling, rng: np.random.Generator) -> list[np.ndarray]:
    """A random allocation: some atoms of every group that may shrink, all of the others."""
    keep = []
    for group in coupling.groups:
        kept = rng.random(group.atoms) < KEPT
        order = rng.permutation(group.atoms)
        kept[order[0]] = True
        if group.atoms > 1:
            kept[order[1]] = False
        keep.append(np.ones(group.atoms, bool) if group.frozen else kept)
    return keep


def _only(coupling: Coupling, keep: Keep, groups: Sequence[int]) -> list[np.ndarray]:
    """``keep`` in these groups where they are not frozen, everything elsewhere."""
    return [
        kept if index in groups and not group.frozen else np.ones(group.atoms, bool)
        for index, (group, kept) in enumerate(zip(coupling.groups, keep, strict=True))
    ]


def _culprits(
    coupling: Coupling, keep: Keep, groups: Sequence[int], check: Check, tries: int
) -> dict[int, str]:
    """Groups of ``groups`` that fail when they are cut, and why; found by halving.

    What fails is halved, the largest first, until single groups fail or ``tries`` checks were made:
    then the rest is not told apart, and all of it fails.
    """
    found: dict[int, str] = {}
    failing: deque[tuple[Sequence[int], str]] = deque()

    def test(part: Sequence[int]) -> bool:
        failed = check(_only(coupling, keep, part)) if part else None
        if failed is not None:
            failing.append((part, failed))
        return failed is not None

    test(groups)
    left = tries - 1
    while failing:
        part, failed = failing.popleft()
        if len(part) == 1:
            found[part[0]] = failed
        elif left < 2:
            among = f"{failed} (one or more of {len(part)} groups; not told apart)"
            found |= dict.fromkeys(part, among)
        else:
            left -= 2
            middle = len(part) // 2
            if not any([test(part[:middle]), test(part[middle:])]):
                found |= dict.fromkeys(part, failed)  # each half can be cut, and both cannot
    return found


def _other_kinds(model: nn.Module) -> str:
    """The kinds of modules with parameters that cannot be made smaller, each with an example."""
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        own = next(module.parameters(recurse=False), None) is not None
        if own and not isinstance(module, prunable_types()):
            found.setdefault(type(module).__name__, name or "the network itself")
    if not found:
        return ""
    kinds = ", ".join(f"{kind} ({name})" for kind, name in found.items())
    return f"; what cannot be made smaller yet: {kinds}"


def frozen_summary(coupling: Coupling) -> str:
    """The reasons for which groups are frozen, each with the groups that it holds for."""
    by_reason: dict[str, list[str]] = {}
    for group in coupling.groups:
        if group.frozen:
            by_reason.setdefault(group.frozen, []).append(group.name)
    return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in by_reason.items())


def _as_double(inputs: Inputs) -> Inputs:
    return map_inputs(lambda t: t.double() if t.is_floating_point() else t, inputs)


def _run(model: bytes, batch: Inputs) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4  # what is wrong comes as an exception
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    feeds = {n: t.numpy() for n, t in zip(names, arguments_of(batch), strict=True)}
    outputs = session.run(None, feeds)
    return [np.asarray(output) for output in outputs]


def _disagreement(
    expected: Sequence[Tensor], got: Sequence[Tensor], tolerance: float, whose: str
) -> str | None:
    if len(expected) != len(got):
        return f"there are {len(got)} outputs where {len(expected)} were expected"
    for one, other in zip(expected, got, strict=True):
        if one.shape != other.shape:
            return f"the outputs' shape changes from {tuple(one.shape)} to {tuple(other.shape)}"
        one, other = one.double(), other.double()
        spread = float(one.std(correction=0))
        difference = float((one - other).abs().max())
        if not difference <= tolerance * spread:
            return (
                f"{DIFFERENT} by {difference:.2g} from {whose} ({spread:.2g} is their standard "
                "deviation)"
            )
    return None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__

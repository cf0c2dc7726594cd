"""How far two networks that should compute the same are apart."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dsa_hw.errors import UnsupportedModel, UserError
from dsa_hw.network.forward import Inputs, batch_of, noise_like, output_tensors

LEAST_SAMPLES = 4
"""Inputs on which outputs are compared, at least: one may not reach what is wrong."""
AGREEMENT = {"fp32": 1e-3, "fp16": 6e-2}
"""Largest difference of outputs, in standard deviations of them. At float32 the order of sums alone
makes about 1e-5 of it. On CUDA the runtimes' and PyTorch's float32 is TF32 by default (10 bits of
mantissa, as float16): a hundredth of the outputs' largest, which lies at 3 to 4 deviations."""


def random_batches(example_inputs: Inputs, seed: int = 2) -> list[Inputs]:
    """Batches like ``example_inputs``, with ``LEAST_SAMPLES`` inputs or more in all.

    Returns:
        Seeded noise of unit variance, on the example's device and of its type.
    """
    generator = torch.Generator().manual_seed(seed)
    count = math.ceil(LEAST_SAMPLES / batch_of(example_inputs))
    return [noise_like(example_inputs, generator) for _ in range(count)]


def outputs_on(model: nn.Module, batches: Sequence[Inputs]) -> list[Tensor]:
    """All output tensors of all batches, one after the other, in evaluation mode."""
    return [one for batch in batches for one in output_tensors(model, batch)]


def disagreement(expected: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    """The largest absolute difference, over the standard deviation of what is expected.

    Relative to the spread and not to the size of the outputs: those of a softmax over 1,000 classes
    are about 1e-3, and so is each difference between them.

    Args:
        expected, got: outputs for the same batches, of equal shapes. Where all that is expected is
            one number, it stands for the deviation.
    """
    one = torch.cat([e.detach().double().cpu().flatten() for e in expected])
    other = torch.cat([g.detach().double().cpu().flatten() for g in got])
    spread = float(one.std(correction=0))
    scale = spread if spread > 0.0 else max(float(one.abs().max()), 1e-30)
    return float((one - other).abs().max()) / scale


def masked_and_cut_difference(masked: Sequence[Tensor], cut: Sequence[Tensor]) -> float:
    """The largest absolute difference between the masked and the cut network's outputs.

    Raises:
        UserError: the masked network's outputs are no numbers: training has diverged.
        UnsupportedModel: it is more than rounding explains: removing the channels did not do what
            masking them did, and what was learned under the masks does not hold for what is left.
    """
    if not all(bool(torch.isfinite(outputs).all()) for outputs in masked):
        raise UserError(
            "the network's outputs are NaN or infinite before its channels are removed: training "
            "has diverged; a lower --lr may help"
        )
    apart = disagreement(masked, cut)
    limit = AGREEMENT["fp16" if masked[0].is_cuda else "fp32"]
    if not apart <= limit:
        raise UnsupportedModel(
            f"the pruned network's outputs differ from the masked network's by {apart:.2g} of "
            f"their standard deviation (at most {limit:g} is expected): removing channels did not "
            "do what masking them did; --exclude the layers whose channels are used in another way"
        )
    pairs = zip(masked, cut, strict=True)
    return max(float((one - other).abs().max()) for one, other in pairs)

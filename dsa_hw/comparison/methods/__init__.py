"""What DSA is compared with, one method a file, all brought to the same measured target."""

from __future__ import annotations

from dsa_hw.comparison.methods.dsa import DsaFlops, DsaFlopsByEight
from dsa_hw.comparison.methods.halp import Halp
from dsa_hw.comparison.methods.mdp import Mdp
from dsa_hw.comparison.methods.method import Made, Method, Workbench
from dsa_hw.comparison.methods.netadapt import NetAdapt
from dsa_hw.comparison.methods.torch_pruning import Magnitude, Taylor
from dsa_hw.comparison.methods.uniform import Uniform, allocate_uniform, uniform_keep_ratio

__all__ = ["Made", "Method", "Workbench", "allocate_uniform", "find_method", "uniform_keep_ratio"]

LATENCY_DSA = "dsa-latency"
"""Not a ``Method``: it is what ``dsa_hw.pipeline.stages`` does anyway."""


def find_method(name: str) -> Method:
    """The method of that name (see ``CompareConfig.methods``)."""
    methods: dict[str, type[Method]] = {
        "dsa-flops": DsaFlops,
        "dsa-flops-by-8": DsaFlopsByEight,
        "uniform": Uniform,
        "magnitude": Magnitude,
        "taylor": Taylor,
        "halp": Halp,
        "mdp": Mdp,
        "netadapt": NetAdapt,
    }
    return methods[name]()

"""The methods of the benchmark that spend tokens on searching, as their authors have them or extended."""

from __future__ import annotations

from experiments.baselines.amq import amq
from experiments.baselines.evopress import evopress, evopress_joint
from experiments.baselines.method import Method
from experiments.baselines.optuna_samplers import gp, nsgaii, random, tpe
from experiments.baselines.rco import rco

_JOINT = "experts, top-k, types"

_ALL = (
    Method("evopress", evopress, "arXiv 2410.14649", True, "types", True),
    Method("evopress-joint", evopress_joint, "this project, after arXiv 2410.14649", True, _JOINT, False),
    Method("amq", amq, "arXiv 2509.12019", True, "types", True),
    Method("rco", rco, "arXiv 2605.00649", True, "types", True),
    Method("random", random, "Optuna, RandomSampler", True, _JOINT, True),
    Method("tpe", tpe, "Optuna, TPESampler", True, _JOINT, True),
    Method("nsgaii", nsgaii, "Optuna, NSGAIISampler", True, _JOINT, True),
    Method("gp", gp, "Optuna, GPSampler", True, _JOINT, True),
)

SEARCHES: dict[str, Method] = {method.name: method for method in _ALL}
"""By name."""

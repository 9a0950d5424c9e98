"""The methods of others that spend tokens on a search, at most adapted to this setting."""

from __future__ import annotations

from experiments.baselines.amq import amq
from experiments.baselines.evopress import evopress, evopress_joint
from experiments.baselines.method import Method

_ALL = (
    Method("evopress", evopress, "arXiv 2410.14649", True, "types", True),
    Method(
        "evopress-joint",
        evopress_joint,
        "our extension of arXiv 2410.14649",
        True,
        "experts, top-k, types",
        False,
    ),
    Method("amq", amq, "arXiv 2509.12019", True, "types", True),
)

SEARCHES: dict[str, Method] = {method.name: method for method in _ALL}
"""Name to method."""

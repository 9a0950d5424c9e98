"""What a study is about: the searched model, the target, the budget and the device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from compression.checkpoint import open_target
from spaces.budget import Budget, format_size
from spaces.carry import Carry
from spaces.devices import Device
from spaces.errors import UserError
from spaces.inventory import Inventory
from spaces.plan import Plan
from spaces.space import Space


@dataclass(frozen=True)
class Problem:
    """Source inventory, target inventory, budget and device."""

    source: Inventory
    target: Inventory
    budget: Budget
    device: Device
    context: int
    types: tuple[str, ...] = ()

    @cached_property
    def carry(self) -> Carry:
        return Carry(self.source, self.target)

    @cached_property
    def smallest(self) -> int:
        """Target bytes of the smallest config: fewest experts, fewest bits."""
        space = Space(self.source, {}, types=self.types)
        kept = space.kept_options[0]
        plan = Plan(
            kept=tuple((i, kept) for i in self.source.moe_layers),
            top_k=tuple((i, self.source.top_k) for i in self.source.moe_layers),
            types=tuple((t.name, min(space.ladder(t), key=t.bytes)) for t in self.source.quantizable),
        )
        return self.target.file_bytes(self.carry.plan(plan))


def make_problem(
    source: Inventory,
    model: Path,
    target: str,
    size: int,
    device: Device,
    context: int,
    types: tuple[str, ...] = (),
) -> Problem:
    """Puts a problem together and refuses what cannot be.

    Raises:
        UserError: The target is unknown, or the budget is above the model or the device, or below
            the smallest config.
    """
    same = target == str(model) or (Path(target).exists() and Path(target).resolve() == model.resolve())
    goal = source if same else open_target(target)
    whole = goal.file_bytes(goal.uniform_plan("BF16"))
    if size > whole:
        raise UserError(
            f"--budget {format_size(size)} is above the whole model: {goal.name} takes {format_size(whole)} "
            "in BF16, so nothing needs compressing; choose a smaller budget"
        )
    budget = Budget.on(device, goal, size, context)
    budget.check()
    problem = Problem(source, goal, budget, device, context, types)
    if problem.smallest > budget.limit:
        raise UserError(
            f"--budget {format_size(size)} is below the smallest possible config of {goal.name}, "
            f"{format_size(problem.smallest)}; raise --budget"
        )
    return problem

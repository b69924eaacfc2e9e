"""Any update rule, hand-made or learned, as a `torch.optim.Optimizer` for code that is not ours.

All parameters of a group are one row, so that what a rule knows of a whole network (the mean of all steps, how deep a
layer lies) it knows here too, and a step is a handful of operations however many tensors there are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from learned_rl import artifacts
from learned_rl.component import Component, UpdateRule
from learned_rl.layout import Layout, Part, StepContext, dormancy
from learned_rl.types import Tree, UserError, at_least, stream
from learned_rl.watcher import Watcher

#: What a copy or a saved optimizer keeps beside what torch keeps; whoever watched a module watches none then.
_KEPT = ("rule", "rows", "total_steps", "steps_per_update", "epochs", "seed", "_layouts")


class RuleOptimizer(torch.optim.Optimizer):
    """An update rule as a torch optimizer: `param_groups`, `state_dict`, closures and `zero_grad` as everywhere.

    The learning rate multiplies the rule's step and may be scheduled or written into `param_groups`. Gradients may be
    clipped before. A parameter without a gradient stays as it is, as does its part of the state.

    Args:
        params: parameters or groups, as for any torch optimizer; each group is a row of its own.
        rule:   an update rule, the registered name of one (with untrained weights), or a component file. Its weights
                stay as they are; parameters of another device or precision are moved by a copy.
        lr:     learning rate of the groups that name none; None: the one with which the rule was trained, or that
                suits it, or 1e-3.
        rows:   take a parameter's first axis as the lifetime axis, of the same size in all of a group; otherwise there
                is one lifetime.
        total_steps: steps of the whole training, for rules that ask how much of it is over.
        steps_per_update: steps on the same data (epochs x minibatches), of which `total_steps` is a multiple.
        epochs: passes over the same data.
        seed:   of the noise, for rules that draw; several optimizers of one training need several.

    Raises:
        UserError: no such rule, one that was made for other parameters, or numbers that cannot be.
    """

    def __init__(
        self,
        params: Iterable[Any],
        rule: UpdateRule | str | Path,
        lr: float | Tensor | None = None,
        rows: bool = False,
        total_steps: int | None = None,
        steps_per_update: int = 1,
        epochs: int = 1,
        seed: int = 0,
    ) -> None:
        at_least(1, total_steps=total_steps, steps_per_update=steps_per_update, epochs=epochs)
        if total_steps is not None and total_steps % steps_per_update:
            raise UserError(
                f"total_steps is {total_steps}: expected a multiple of steps_per_update, {steps_per_update}."
            )
        self.rule, self.rows = _rule(rule), rows
        lr = trained_rate(self.rule) if lr is None else lr
        if not isinstance(lr, int | float | Tensor) or float(lr) < 0:
            raise UserError(f"lr is {lr!r}: expected a number that is at least 0.")
        self.total_steps, self.steps_per_update, self.epochs, self.seed = total_steps, steps_per_update, epochs, seed
        self._watchers: list[Watcher] = []
        self._moved: tuple[Any, UpdateRule] | None = None
        super().__init__(params, {"lr": lr, "age": 0, "rule": self.rule.name})
        self._layouts = [self._laid_out(group["params"]) for group in self.param_groups]
        for layout in self._layouts:
            self.rule.fit_layout(layout)

    def watch(self, module: nn.Module, critic: Callable[[str], bool] = lambda name: False) -> None:
        """Tell the rule what a module is made of, and how active its units are in each forward pass (see `Watcher`).

        Several modules may be watched, one after the other.

        Args:
            critic: whether only the value depends on the layer of that name; those are a network of their own.

        Raises:
            UserError: parameters of many lifetimes, which no module of layers has.
        """
        if self.rows:
            raise UserError("rows is on: the parameters are those of many lifetimes, and no module of layers has them.")
        for watcher in self._watchers:
            if watcher.module() is module:
                watcher.remove()
        self._watchers = [w for w in self._watchers if w.module() is not module]
        others = {watcher.prefix for watcher in self._watchers}
        prefix = next(p for p in ("", *(f"{i}:" for i in range(1, len(others) + 2))) if p not in others)
        self._watchers.append(Watcher(module, prefix, critic, self.rule.reads_activity))
        self._layouts = [self._laid_out(group["params"]) for group in self.param_groups]

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {name: getattr(self, name) for name in _KEPT}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "rule" in state:  # else it is a state dict, of one that stays what it is
            self._watchers, self._moved = [], None
        super().__setstate__(state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            UserError: the state of another rule.
        """
        for group in state_dict["param_groups"]:
            if (name := group.get("rule")) != self.rule.name:
                raise UserError(f"The saved state is of the rule {name!r}: expected that of {self.rule.name!r}.")
        super().load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if hasattr(self, "_layouts"):  # later than at the beginning
            self._layouts.append(self._laid_out(self.param_groups[-1]["params"]))
            self.rule.fit_layout(self._layouts[-1])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for i, group in enumerate(self.param_groups):
            params: list[Tensor] = group["params"]
            grads = [p.grad for p in params]
            if all(g is None for g in grads):
                continue
            state, context = self.state[params[0]], self.context(i, group["age"], params[0])
            steps, after = self.moves(params, grads, state, group["lr"], context, self._rule_like(params[0]))
            self.state[params[0]] = after
            torch._foreach_add_(params, steps)
            group["age"] += 1
        return loss

    def moves(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        state: Tree,
        learning_rate: float | Tensor,
        context: StepContext,
        rule: UpdateRule | None = None,
    ) -> tuple[list[Tensor], Tree]:
        """What to add to each parameter, and the group's new state; a pure function, differentiable.

        Args:
            rule: in the place of the optimizer's own.
        """
        rule = self.rule if rule is None else rule
        lead = len(params[0]) if self.rows else 1
        row = lambda xs: torch.cat([x.reshape(lead, -1) for x in xs], 1) if len(xs) > 1 else xs[0].reshape(lead, -1)  # noqa: E731
        theta = row(params)
        grad = row([torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)])
        sizes = [p.numel() // lead for p in params]
        before = state or rule.initial_state(theta)
        step, after = rule.update(grad, before, theta, learning_rate, context)
        if any(g is None for g in grads):
            here = torch.cat([torch.full((n,), g is not None) for n, g in zip(sizes, grads, strict=True)]).to(
                theta.device
            )
            step = torch.where(here, step, torch.zeros_like(step))
            after = {k: _kept(here, v, before[k]) for k, v in after.items()}
        pieces = step.split(sizes, 1)
        return [piece.reshape(p.shape) for piece, p in zip(pieces, params, strict=True)], after

    def context(self, group: int, age: int, like: Tensor) -> StepContext:
        """What the rule may know of a group's step after `age` others."""
        layout, lead = self._layouts[group], len(like) if self.rows else 1
        update, within = divmod(age, self.steps_per_update)
        progress = 0.0
        if self.total_steps is not None:
            progress = min(update / max(self.total_steps // self.steps_per_update - 1, 1), 1.0)
        epoch = within * self.epochs // self.steps_per_update / max(self.epochs - 1, 1)
        activity = noise = None
        theta = like.new_empty(lead, len(layout))
        if self.rule.reads_activity:
            if not self._watchers:
                raise UserError(f"{self.rule.name!r} reads how active units are: call the optimizer's `watch(module)`.")
            units = {name: said for watcher in self._watchers for name, said in watcher.units.items()}
            activity = layout.spread(dormancy(units), theta)
        if self.rule.draws:
            draws = stream("noise", self.seed, group, age)  # by the step's number: a restored optimizer draws the same
            noise = torch.randn(theta.shape, generator=draws).to(theta)
        self._layouts[group] = layout = layout.to(like.device)
        return StepContext(layout, progress, epoch, activity, noise)

    def _laid_out(self, params: list[Tensor]) -> Layout:
        if self.rows and (len({p.shape[:1] for p in params}) > 1 or not params[0].dim()):
            shapes = ", ".join(str([*p.shape]) for p in params)
            raise UserError(f"rows is on, and parameters have shapes {shapes}: expected one first axis, of lifetimes.")
        lead = [p.shape[1:] if self.rows else p.shape for p in params]
        known = {p: part for watcher in self._watchers for p, part in watcher.parts.items()}
        unknown = [Part(f"parameter{i}", tuple(shape)) for i, shape in enumerate(lead)]
        return Layout([known.get(p, part) for p, part in zip(params, unknown, strict=True)])

    def _rule_like(self, like: Tensor) -> UpdateRule:
        """The rule, or a copy of the parameters' device and precision, made anew when its weights have changed."""
        weights = list(self.rule.parameters())
        if all(w.device == like.device and w.dtype == like.dtype for w in weights):
            return self.rule
        wanted = (like.device, like.dtype, sum(w._version for w in weights))
        if self._moved is None or self._moved[0] != wanted:
            self._moved = (wanted, copy.deepcopy(self.rule).to(like.device, like.dtype))
        return self._moved[1]


def _rule(rule: UpdateRule | str | Path) -> UpdateRule:
    found = artifacts.get(rule) if isinstance(rule, str | Path) else rule
    if isinstance(found, UpdateRule):
        return found
    if isinstance(found, type) and issubclass(found, UpdateRule):
        raise UserError(f"The rule is the class {found.__name__}: expected one that is made, {found.__name__}().")
    what = f"a component of the slot {found.slot!r}" if isinstance(found, Component) else "no component"
    raise UserError(f"{getattr(found, 'name', found)!r} is {what}: expected an optimizer.")


def trained_rate(rule: UpdateRule) -> float:
    """The learning rate with which a rule was meta-trained on networks, or that suits it, or 1e-3."""
    rate = rule.trained_rate(tabular=False)
    return 1e-3 if rate is None else rate


def _kept(here: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """State [P, ..., D] that moves only where `here [D]`; what belongs to the whole row, [P, 1], moves anyway."""
    return torch.where(here, new, old) if new.shape[-1] == len(here) else new

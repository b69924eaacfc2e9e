"""Any update rule, hand-made or learned, as a `torch.optim.Optimizer` for code that is not ours.

All parameters of a group are one row, so that what a rule knows of a whole network (the mean of all steps, how deep a
layer lies) it knows here too, and a step is a handful of operations however many tensors there are.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from learned_rl import artifacts
from learned_rl.component import UpdateRule
from learned_rl.layout import Layout, Part, StepContext, dormancy
from learned_rl.types import Tree, UserError, at_least, stream

_WATCHED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class RuleOptimizer(torch.optim.Optimizer):
    """An update rule as a torch optimizer: `param_groups`, `state_dict`, closures and `zero_grad` as everywhere.

    The learning rate multiplies the rule's step and may be scheduled or written into `param_groups`. Gradients may be
    clipped before. A parameter without a gradient stays as it is, as does its part of the state.

    Args:
        params: parameters or groups, as for any torch optimizer.
        rule:   an update rule, the registered name of one, or a component file. Its weights stay as they are.
        lr:     learning rate of the groups that name none; None: the one with which the rule was trained, or that
                suits it, or 1e-3.
        rows:   take a parameter's first axis as the lifetime axis, of the same size in all of a group; otherwise there
                is one lifetime.
        total_steps: steps of the whole training, for rules that ask how much of it is over.
        steps_per_update: steps on the same data (epochs x minibatches), of which `total_steps` has a multiple.
        epochs: passes over the same data.
        seed:   of the noise, for rules that draw.

    Raises:
        UserError: no such rule, or one that was made for other parameters.
    """

    def __init__(
        self,
        params: Iterable[Any],
        rule: UpdateRule | str | Path,
        lr: float | None = None,
        rows: bool = False,
        total_steps: int | None = None,
        steps_per_update: int = 1,
        epochs: int = 1,
        seed: int = 0,
    ) -> None:
        at_least(1, total_steps=total_steps, steps_per_update=steps_per_update, epochs=epochs)
        self.rule, self.rows = _rule(rule), rows
        self.total_steps, self.steps_per_update, self.epochs, self.seed = total_steps, steps_per_update, epochs, seed
        self._units: dict[str, Tensor] = {}
        self._hooks: list[Any] = []
        self._parts: dict[Tensor, Part] = {}
        super().__init__(params, {"lr": trained_rate(self.rule) if lr is None else lr, "age": 0})
        self._layouts = [self._laid_out(group["params"]) for group in self.param_groups]
        for layout in self._layouts:
            self.rule.fit_layout(layout)

    def watch(self, module: nn.Module, critic: Callable[[str], bool] = lambda name: False) -> None:
        """Tell the rule what the module is made of, and how active its units are in each forward pass.

        Linear and convolutional layers count, and their depth is their order in their network. Their units are seen
        where another layer reads them: what modules make of a layer's output is followed from one to the next, and
        where a function that is no module stands between, the layer before is taken, if it is as wide.

        Args:
            critic: whether only the value depends on the layer of that name; those are a network of their own.
        """
        for hook in self._hooks:
            hook.remove()
        names = [name for name, m in module.named_modules() if isinstance(m, _WATCHED)]
        apart = [n for n in names if not critic(n)], [n for n in names if critic(n)]
        depth = {n: i / max(len(apart[0]) - 1, 1) for i, n in enumerate(apart[0])}
        depth |= {n: i / (len(apart[1]) - 1) if len(apart[1]) > 1 else 1.0 for i, n in enumerate(apart[1])}
        self._parts, self._units = {}, {}
        for name in names:
            layer = module.get_submodule(name)
            for tensor, p in layer.named_parameters(recurse=False):
                self._parts[p] = Part(f"{name}.{tensor}", tuple(p.shape), depth[name], name in apart[1], name, 0)
        self._layouts = [self._laid_out(group["params"]) for group in self.param_groups]
        self._before: str | None = None
        self._axis: dict[str, int] = {}
        self._said: dict[str, tuple[weakref.ref[Tensor], str | None]] = {}
        self._hooks = []
        if self.rule.reads_activity:
            leaves = [(name, m) for name, m in module.named_modules() if next(m.children(), None) is None]
            self._hooks = [m.register_forward_hook(self._look(n, n in depth)) for n, m in leaves]
            self._hooks.append(module.register_forward_pre_hook(self._begin))

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
            state = self.state[params[0]]
            steps, after = self.moves(params, grads, state, group["lr"], self.context(i, group["age"], params[0]))
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
    ) -> tuple[list[Tensor], Tree]:
        """What to add to each parameter, and the group's new state; a pure function, differentiable."""
        lead = len(params[0]) if self.rows else 1
        row = lambda xs: torch.cat([x.reshape(lead, -1) for x in xs], 1) if len(xs) > 1 else xs[0].reshape(lead, -1)  # noqa: E731
        theta = row(params)
        grad = row([torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)])
        sizes = [p.numel() // lead for p in params]
        before = state or self.rule.initial_state(theta)
        step, after = self.rule.update(grad, before, theta, learning_rate, context)
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
            if not self._hooks:
                raise UserError(f"{self.rule.name!r} reads how active units are: call the optimizer's `watch(module)`.")
            activity = layout.spread(dormancy(self._units), theta)
        if self.rule.draws:
            draws = stream("noise", self.seed, age)  # by the step's number: a restored optimizer draws the same
            noise = torch.randn(theta.shape, generator=draws).to(theta)
        return StepContext(layout.to(like.device), progress, epoch, activity, noise)

    def _laid_out(self, params: list[Tensor]) -> Layout:
        lead = [p.shape[1:] if self.rows else p.shape for p in params]
        unknown = [Part(f"parameter{i}", tuple(shape)) for i, shape in enumerate(lead)]
        return Layout([self._parts.get(p, part) for p, part in zip(params, unknown, strict=True)])

    def _begin(self, module: nn.Module, inputs: Any) -> None:
        self._before = None

    def _look(self, name: str, watched: bool) -> Callable[[nn.Module, Any, Any], None]:
        """A forward hook: the units of a layer are what another one reads; its own, until then, what it says."""

        def look(module: nn.Module, inputs: tuple[Any, ...], said: Any) -> None:
            if not inputs or not isinstance(inputs[0], Tensor) or not isinstance(said, Tensor):
                return
            read = inputs[0]
            axis = _channels(module)
            source = self._source(read, axis)
            if source is not None and not watched and said.shape == read.shape:
                self._units[source] = _units(said, self._axis[source])  # an activation
            elif source is not None and watched and read.shape[axis] == self._units[source].shape[-1]:
                self._units[source] = _units(read, axis)
            if watched:
                self._units[name], self._axis[name] = _units(said, axis), axis
                self._before = name
            self._said[name] = (weakref.ref(said), name if watched else source)

        return look

    def _source(self, x: Tensor, axis: int) -> str | None:
        """The layer of whose units, along that axis, x is made; None: it is none's, such as an observation."""
        for said, source in self._said.values():
            if said() is x:
                return source
        if self._before is None or not x.dim() or x.shape[axis] != self._units[self._before].shape[-1]:
            return None
        return self._before


def _rule(rule: UpdateRule | str | Path) -> UpdateRule:
    found = artifacts.get(rule) if isinstance(rule, str | Path) else rule
    if not isinstance(found, UpdateRule):
        raise UserError(f"{found.name!r} is a component of the slot {found.slot!r}: expected an optimizer.")
    return found


def trained_rate(rule: UpdateRule) -> float:
    """The learning rate with which a rule was meta-trained, or that suits it, or 1e-3."""
    return 1e-3 if rule.rate is None else rule.rate


def _kept(here: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """State [P, ..., D] that moves only where `here [D]`; what belongs to the whole row, [P, 1], moves anyway."""
    return torch.where(here, new, old) if new.shape[-1] == len(here) else new


def _channels(module: nn.Module) -> int:
    """The axis along which a module's units are counted."""
    return 1 if isinstance(module, _WATCHED[1:]) else -1


def _units(x: Tensor, axis: int) -> Tensor:
    """[1, n, H] what H units said, from activations with the units along that axis."""
    return x.detach().movedim(axis, -1).reshape(1, -1, x.shape[axis])  # stop: a look

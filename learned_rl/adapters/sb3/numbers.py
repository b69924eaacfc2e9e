"""Numbers of the update, scheduled or learned, written at every place where Stable-Baselines3 reads them."""

# mypy: disable-error-code="type-abstract"

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.utils import FloatSchedule
from torch import Tensor

from learned_rl.adapters.common import find, frozen, nearest
from learned_rl.adapters.sb3.objective import LIBRARY, ObjectivePPO
from learned_rl.component import NUMBERS, Component, Context, Hyper, Hyperparameters
from learned_rl.trajectory import Trajectory
from learned_rl.types import UserError, at_least


def write_numbers(model: BaseAlgorithm, **numbers: float | int | None) -> None:
    """Writes numbers of a model at every place where it reads them.

    | number | places |
    |---|---|
    | gamma, gae_lambda | the model and its rollout buffer |
    | learning_rate | `lr_schedule`, which writes the optimizer's groups; `learning_rate`, which a file restores |
    | clip_range, clip_range_vf | constant schedules |
    | ent_coef, vf_coef, max_grad_norm, n_epochs | the model |

    Others of `Hyper` (pg_coef and so on) are `ObjectivePPO`'s.

    Raises:
        UserError: a number that the model does not have, or a value that the number cannot have.
    """
    known = [k for k in NUMBERS if hasattr(model, k) or isinstance(model, ObjectivePPO)]
    known += ["n_epochs"] if hasattr(model, "n_epochs") else []
    for name, value in numbers.items():
        if name not in known:
            near = nearest(name, dict.fromkeys(known))
            raise UserError(f"{type(model).__name__} has no {name!r}: the nearest that it has is {near!r}.")
        _check(name, value)
        if name == "learning_rate":
            model.lr_schedule, model.learning_rate = FloatSchedule(value), value  # type: ignore[arg-type, assignment]
        elif name in ("clip_range", "clip_range_vf"):
            setattr(model, name, None if value is None else FloatSchedule(value))
        elif hasattr(model, name):
            setattr(model, name, value)
        else:
            assert isinstance(model, ObjectivePPO)
            model.hyper = model.hyper.replace(**{name: value})  # type: ignore[arg-type]
        if name in ("gamma", "gae_lambda") and hasattr(model, "rollout_buffer"):
            setattr(model.rollout_buffer, name, value)


def _check(name: str, value: float | int | None) -> None:
    if value is None and name != "clip_range_vf":
        raise UserError(f"{name} is None: expected a number.")
    if value is not None and math.isnan(value):
        raise UserError(f"{name} is {value}: expected a number; what a component reads of the experience is not known.")
    if name == "n_epochs":
        at_least(1, n_epochs=value)
        if value != int(value or 0):
            raise UserError(f"n_epochs is {value}: expected a whole number.")
    else:
        Hyper().replace(**{name: value})


class HyperparameterCallback(BaseCallback):
    """Writes the numbers of each update when its rollout begins, at every place where PPO or A2C reads them.

    A component says them from the configured ones, which are remembered on the model when the callback first meets it
    (so that a saved model goes on from them), and from the share of the training that is over. Logged as `tuned/NAME`.

    Args:
        numbers: a component, a registered name, a component file, or a function of the share of the training that is
            over, from 0 to 1, that returns name -> value; of the numbers that `write_numbers` knows.

    Raises:
        UserError: no such component; one that carries a memory, reads the experience of the update, tells networks its
            numbers, or has several values of one; a number that the model does not have.
    """

    #: what stands for the experience of an update that is not collected yet: two steps of two environments
    unknown: ClassVar[Trajectory] = Trajectory(
        torch.full((3, 1, 2), math.nan),
        *(torch.full((2, 1, 2), math.nan) for _ in range(3)),
        *(torch.zeros(2, 1, 2, dtype=torch.bool) for _ in range(2)),
    )

    def __init__(
        self, numbers: Hyperparameters | str | Path | Callable[[float], Mapping[str, Any]], verbose: int = 0
    ) -> None:
        super().__init__(verbose)
        self.component: Hyperparameters | None = None
        if callable(numbers) and not isinstance(numbers, Component):
            self.function = numbers
            return
        self.component = component = frozen(find(numbers, Hyperparameters))  # type: ignore[arg-type]
        reason = "tells networks its numbers" if component.conditions else "carries a memory of the experience"
        if component.conditions or component.initial_memory(1):
            raise UserError(
                f"The component {component.name!r} {reason}, which {LIBRARY} has no place for: expected one that reads "
                "only how much of the training is over, such as a schedule."
            )

    def _init_callback(self) -> None:
        if not isinstance(self.model, OnPolicyAlgorithm):
            raise UserError(f"The algorithm is {type(self.model).__name__}: expected PPO or A2C.")
        self._written: set[str] = set()
        if not hasattr(self.model, "configured_numbers"):
            here = [k for k in NUMBERS if hasattr(self.model, k)]
            configured = {k: getattr(self.model, k) for k in here} | {"learning_rate": self.model.lr_schedule}
            self.model.configured_numbers = configured  # type: ignore[attr-defined]

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        model = self.model
        assert isinstance(model, OnPolicyAlgorithm)
        size = model.n_steps * model.n_envs
        age, horizon = model.num_timesteps // size, max(math.ceil(model._total_timesteps / size), 1)
        if self.component is None:
            numbers = dict(self.function(min(age / horizon, 1.0)))
        else:
            numbers = self._asked(self.component, age, horizon, 1 - (age + 1) * size / model._total_timesteps)
        write_numbers(model, **numbers)
        for name, value in numbers.items():
            self.logger.record(f"tuned/{name}", math.nan if value is None else value)

    def _asked(self, component: Hyperparameters, age: int, horizon: int, left: float) -> dict[str, float | None]:
        """What a component says, by name, of the numbers that it sets."""
        configured = self.model.configured_numbers  # type: ignore[attr-defined]
        own = self.model.hyper if isinstance(self.model, ObjectivePPO) else Hyper()
        base = own.replace(**{k: v(left) if callable(v) else v for k, v in configured.items()})
        with torch.no_grad():
            said, _ = component(
                base, self.unknown, Context(torch.full((1,), float(age)), torch.full((1,), float(horizon)), {})
            )
        for name in NUMBERS:
            value = getattr(said, name)
            if isinstance(value, Tensor) and value.numel() != 1:
                raise UserError(
                    f"The component {component.name!r} says {value.numel()} values of {name}, of layers or steps: "
                    f"{LIBRARY} has one."
                )
            if name in component.tuned or value is not getattr(base, name):
                self._written.add(name)
        return {k: None if (v := getattr(said, k)) is None else float(v) for k in NUMBERS if k in self._written}

"""Any family with its rewards paid late: collected in silence, handed out every so many steps.

The delayed tasks of Zheng, Oh and Singh, "On Learning Intrinsic Rewards for Policy Gradient Methods", NeurIPS 2018,
arXiv:1804.06459, who pay MuJoCo's rewards every 20 steps. What a step earns is added to what its copy is owed; the copy
is paid every `STEPS` environment steps, counted from the episode's beginning, and at the episode's end. Returns without
discount stay what they were, so best returns do too; only which action earned what is harder to tell.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import torch
from torch import Tensor

from learned_rl.registry import make_family
from learned_rl.streams import Streams
from learned_rl.tasks.base import LifetimeEnv, Split, TaskFamily
from learned_rl.types import Tasks, Tree, UserError


class DelayedFamily(TaskFamily):
    """Another family, `STEPS/FAMILY`: `20/CartPole-v1`, `10/grid/small`.

    Tasks, observations, actions and time limits are those of the other family.

    Raises:
        UserError: for a preset that is none, or a family that does not exist.
    """

    name: ClassVar[str] = "delayed"
    presets: ClassVar[tuple[str, ...]] = ("20/CartPole-v1", "20/control/pendulum-default", "10/grid/small")

    def __init__(self, preset: str = "20/CartPole-v1") -> None:
        named = re.fullmatch(r"0*([1-9]\d{0,11})/(.+)", preset)
        if named is None:
            raise UserError(
                f"unknown preset of the family delayed '{preset}': expected STEPS/FAMILY with at least 1 step, as in "
                f"'{self.presets[0]}'"
            )
        self.steps, self.inner = int(named[1]), make_family(named[2])
        self.observation_space, self.action_space = self.inner.observation_space, self.inner.action_space
        self.max_episode_steps, self.continuing = self.inner.max_episode_steps, self.inner.continuing

    def sample(self, n: int, generator: torch.Generator) -> Tasks:
        return self.inner.sample(n, generator)

    def sample_split(self, split: Split, n: int, seed: int = 0) -> Tasks:
        return self.inner.sample_split(split, n, seed)

    def make(
        self,
        tasks: Tasks,
        copies: int,
        seed: int,
        device: torch.device | str = "cpu",
        streams: Streams | None = None,
    ) -> DelayedEnv:
        shared = {} if streams is None else {"streams": streams}  # a family that knows none of them will do
        return DelayedEnv(self.inner.make(tasks, copies, seed, device, **shared), self.steps, copies, device)

    def optimal_return(self, tasks: Tasks) -> Tensor | None:
        return self.inner.optimal_return(tasks)


class DelayedEnv:
    """An environment over `N` copies that pays late; see `DelayedFamily`.

    State beyond the inner environment's: `owed [N]`, and `waited [N]` int64, steps since the last payment or beginning.

    Args:
        env:    the inner environment.
        steps:  environment steps between payments.
        copies: B, of each lifetime.
    """

    def __init__(self, env: LifetimeEnv, steps: int, copies: int, device: torch.device | str = "cpu") -> None:
        self.env, self.steps, self.copies, self.device = env, steps, copies, torch.device(device)
        self.task = env.task
        self._owe_nothing()

    def _owe_nothing(self) -> None:
        N = len(next(iter(self.task.values())))
        self.owed = torch.zeros(N, device=self.device)
        self.waited = torch.zeros(N, dtype=torch.int64, device=self.device)

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Tensor, dict[str, Any]]:
        self._owe_nothing()
        return self.env.reset(seed=seed, options=options)

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        obs, reward, terminated, truncated, info = self.env.step(actions)
        owed, waited = self.owed + reward, self.waited + 1
        waits = (waited < self.steps) & ~(terminated | truncated)
        self.owed, self.waited = torch.where(waits, owed, 0.0), waited * waits
        return obs, torch.where(waits, 0.0, owed), terminated, truncated, info

    def set_tasks(self, lifetimes: Tensor, tasks: Tasks) -> Tensor:
        obs = self.env.set_tasks(lifetimes, tasks)
        for kept in (self.owed, self.waited):
            kept.view(-1, self.copies)[lifetimes.to(self.device)] = 0
        return obs

    def state_dict(self) -> Tree:
        inner = {f"inner/{name}": value for name, value in self.env.state_dict().items()}
        return {"owed": self.owed.clone(), "waited": self.waited.clone(), **inner}

    def load_state_dict(self, state: Tree) -> Tensor | None:
        begun = self.env.load_state_dict({k.removeprefix("inner/"): v for k, v in state.items() if k[:6] == "inner/"})
        self.task = self.env.task
        self._owe_nothing()
        if begun is None:
            self.owed, self.waited = (state[name].clone().to(self.device) for name in ("owed", "waited"))
        return begun

    def close(self) -> None:
        self.env.close()

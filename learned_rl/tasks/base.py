"""What every task family and its vector environment have in common.

A family is a distribution over tasks. `make` turns `P` sampled tasks into one `gymnasium.vector.VectorEnv` with `B`
copies of each, whose observations, rewards and masks are torch tensors on one device. Episodes reset inside the step
(`AutoresetMode.SAME_STEP`): `obs` is the first observation of the next episode, `info["final_obs"]` the last one of
the episode that ended.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar, Literal, Protocol, get_args, get_origin, get_type_hints

import gymnasium
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from learned_rl.streams import Streams
from learned_rl.types import Tasks, Tree, UserError, stream, stream_seed

Split = Literal["train", "validation", "test"]


def unknown(what: str, value: str, choices: Iterable[str]) -> UserError:
    """The error to raise for a name that is none of `choices`: one sentence that proposes the nearest."""
    choices = sorted(choices)
    if not choices:
        return UserError(f"unknown {what} '{value}': there is none")
    nearest = difflib.get_close_matches(value, choices, n=1, cutoff=0.0)[0]
    listed = ", ".join(choices) if len(choices) <= 16 else f"{len(choices)} choices"
    return UserError(f"unknown {what} '{value}': the nearest of {listed} is '{nearest}'")


def check_choices(settings: object) -> None:
    """Checks every setting of a dataclass that is one of a few words.

    Raises:
        UserError: another word.
    """
    for name, kind in get_type_hints(type(settings)).items():
        if get_origin(kind) is Literal and (value := getattr(settings, name)) not in get_args(kind):
            raise unknown(name, str(value), get_args(kind))


class LifetimeEnv(Protocol):
    """What the core asks of a vector environment over [P lifetimes x B copies], beyond gymnasium's `VectorEnv`.

    Observations, rewards and masks are torch tensors `[N, ...]`; `step` puts the last observation of every episode
    that ended into `info["final_obs"] [N, ...]` (elsewhere the next observation).
    """

    task: Tasks

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Any, dict[str, Any]]: ...

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]: ...

    def set_tasks(self, lifetimes: Tensor, tasks: Tasks) -> Tensor:
        """New tasks and fresh episodes for some lifetimes; all observations `[N, ...]`.

        Possibly for none of them: then all that happens is what a restart draws, since lifetimes of another process
        restart.
        """

    def state_dict(self) -> Tree:
        """What the next steps depend on, by names such that the states of several processes can be joined.

        Each entry has the leading axis P or N, but for those without any axis and those whose name ends with
        `generator`, which are the same in all processes (see `learned_rl.streams`).
        """

    def load_state_dict(self, state: Tree) -> Tensor | None:
        """Go on from a saved state; where that cannot be, begin new episodes and return their observations."""

    def close(self) -> None: ...


class TaskFamily(ABC):
    """A distribution over tasks with one observation space and one action space.

    Attributes:
        observation_space: of one copy, without batch axes.
        action_space:      of one copy.
        max_episode_steps: upper bound on the length of an episode over all tasks, in environment steps.
        continuing:        episodes never end: what counts is the reward per environment step.
    """

    name: ClassVar[str]
    presets: ClassVar[tuple[str, ...]]
    observation_space: gymnasium.Space
    action_space: gymnasium.Space
    max_episode_steps: int
    continuing: bool = False

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator) -> Tasks:
        """Draw `n` tasks: a dictionary of tensors `[n, ...]` on the CPU."""

    def sample_split(self, split: Split, n: int, seed: int = 0) -> Tasks:
        """`n` tasks of the train, validation or test side; the sides draw from unrelated streams."""
        return self.sample(n, stream(split, seed))

    @abstractmethod
    def make(
        self,
        tasks: Tasks,
        copies: int,
        seed: int,
        device: torch.device | str = "cpu",
        streams: Streams | None = None,
    ) -> LifetimeEnv:
        """A vector environment over `N = P * copies` copies; `P` is the leading axis of `tasks`.

        Args:
            streams: which random stream each lifetime draws from; None: a stream for each. Lifetimes that share one see
                the same random numbers, copy by copy. (A family without this argument serves as long as all lifetimes
                have a stream of their own and live in one process.)
        """

    def optimal_return(self, tasks: Tasks) -> Tensor | None:
        """Exact best expected undiscounted return of one episode, `[n]`, where it can be computed; else None."""
        return None


class BuiltInFamily(TaskFamily):
    """A family of this package's kind: its environment is a `TaskVectorEnv`."""

    @property
    @abstractmethod
    def vector_env(self) -> type[TaskVectorEnv]:
        """The kind of its environment."""

    def check(self, tasks: Tasks) -> Tasks:
        """The tasks, if they are the family's own.

        Raises:
            UserError: they are another one's.
        """
        return tasks

    def make(
        self,
        tasks: Tasks,
        copies: int,
        seed: int,
        device: torch.device | str = "cpu",
        streams: Streams | None = None,
    ) -> TaskVectorEnv:
        self.check(tasks)
        return self.vector_env(self, tasks, copies, seed, device, streams)


class TaskVectorEnv(VectorEnv):
    """A vector environment of a built-in family: torch in, torch out, thousands of copies in one call.

    A subclass keeps the episode state in the tensors named by `state_names` (each `[N, ...]`), reads the task
    parameters from `self.task` (each `[N, ...]`: every task repeated for its copies), and defines three verbs:

    * `_begin(mask)`: write a fresh episode's state where `mask [N]` is true, leave the rest alone;
    * `_advance(action)`: move every copy by one step, return `(reward [N] float, terminated [N] bool)`;
    * `_observe()`: the observation `[N, ...]` of the present state.

    Random numbers come from `_uniform`, `_normal` and `_integers`, which know the streams. Draws always have the full
    size `[N, ...]`, so what one copy draws never depends on the others; new tasks draw from a generator of their own,
    so that the lifetimes that go on are not disturbed.
    """

    state_names: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        family: TaskFamily,
        tasks: Tasks,
        copies: int,
        seed: int,
        device: torch.device | str = "cpu",
        streams: Streams | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.lifetimes = len(next(iter(tasks.values())))
        self._streams = Streams.of(streams, self.lifetimes).copies(copies).to(self.device)
        self.copies = copies
        self.num_envs = self.lifetimes * copies
        self.single_observation_space = family.observation_space
        self.single_action_space = family.action_space
        self.observation_space = batch_space(family.observation_space, self.num_envs)
        self.action_space = batch_space(family.action_space, self.num_envs)
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self._restarts = torch.Generator(self.device).manual_seed(stream_seed("restarts", seed))
        self.task = {k: v.to(self.device).repeat_interleave(copies, 0) for k, v in tasks.items()}
        self.elapsed = torch.zeros(self.num_envs, dtype=torch.int64, device=self.device)
        self._everywhere = torch.ones(self.num_envs, dtype=torch.bool, device=self.device)
        self._allocate()

    # --- what a subclass defines -------------------------------------------------------------------------------

    @abstractmethod
    def _allocate(self) -> None:
        """Create the state tensors and whatever is derived from the tasks (called again when tasks change)."""

    @abstractmethod
    def _begin(self, mask: Tensor) -> None: ...

    @abstractmethod
    def _advance(self, action: Tensor) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def _observe(self) -> Tensor: ...

    @property
    @abstractmethod
    def time_limit(self) -> Tensor:
        """Steps after which an episode is truncated, `[N]` or a scalar tensor."""

    # --- gymnasium's interface ---------------------------------------------------------------------------------

    def reset(self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None):
        if isinstance(seed, int):
            self.generator.manual_seed(seed)
            self._restarts.manual_seed(stream_seed("restarts", seed))
        self.elapsed.zero_()
        self._begin(self._everywhere)
        return self._observe(), {}

    def step(self, actions: Tensor):
        reward, terminated = self._advance(actions)
        self.elapsed = self.elapsed + 1
        truncated = (self.elapsed >= self.time_limit) & ~terminated
        done = terminated | truncated
        final_obs = self._observe()
        self.elapsed = self.elapsed * ~done
        self._begin(done)  # always: what it draws must not depend on whether any copy is done
        obs = self._observe() if bool(done.any()) else final_obs
        return obs, reward, terminated, truncated, {"final_obs": final_obs}

    # --- beyond gymnasium --------------------------------------------------------------------------------------

    def set_tasks(self, lifetimes: Tensor, tasks: Tasks) -> Tensor:
        """Give the lifetimes `[k]` new tasks (leading axis `k`), begin fresh episodes there; all observations.

        With k = 0 nothing changes but the generator of restarts (see `LifetimeEnv`).
        """
        lifetimes = lifetimes.to(self.device)
        mask = torch.zeros(self.lifetimes, dtype=torch.bool, device=self.device)
        mask[lifetimes] = True
        copies = (lifetimes[:, None] * self.copies + torch.arange(self.copies, device=self.device)).flatten()
        for key, value in tasks.items():
            self.task[key][copies] = value.to(self.device).repeat_interleave(self.copies, 0)
        self._tasks_changed()
        restarted = mask.repeat_interleave(self.copies)
        self.elapsed = self.elapsed * ~restarted
        going_on, self.generator = self.generator, self._restarts
        self._begin(restarted)
        self.generator = going_on
        return self._observe()

    def _tasks_changed(self) -> None:
        """Refresh what was derived from the tasks; the state of running episodes stays."""

    def _uniform(self, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1) of a shape that begins with N; so do the other two."""
        return self._streams.uniform(shape, self.generator)

    def _normal(self, *shape: int) -> Tensor:
        return self._streams.normal(shape, self.generator)

    def _integers(self, high: int, *shape: int) -> Tensor:
        """From 0 to high - 1."""
        return self._streams.integers(high, shape, self.generator)

    def state_dict(self) -> Tree:
        """Everything that the next steps depend on; tensors only."""
        state = {f"state/{name}": getattr(self, name).clone() for name in (*self.state_names, "elapsed")}
        state |= {f"task/{name}": value.clone() for name, value in self.task.items()}
        return state | {"generator": self.generator.get_state(), "restart_generator": self._restarts.get_state()}

    def load_state_dict(self, state: Tree) -> Tensor | None:
        """Go on from a saved state."""
        self.task = {k.removeprefix("task/"): v.clone().to(self.device) for k, v in state.items() if k[:5] == "task/"}
        self._tasks_changed()
        for name in (*self.state_names, "elapsed"):
            setattr(self, name, state[f"state/{name}"].clone().to(self.device))
        self.generator.set_state(state["generator"].cpu())
        self._restarts.set_state(state["restart_generator"].cpu())
        return None

"""Any gymnasium environment, behind the interface of the built-in families.

Towers et al., "Gymnasium: A Standard Interface for Reinforcement Learning Environments", 2024, arXiv:2407.17032.
MinAtar: Young and Tian, "MinAtar: An Atari-Inspired Testbed for Thorough and Reproducible Reinforcement Learning
Experiments", 2019, arXiv:1903.03176. Environments run one after the other in this process
(`gymnasium.vector.SyncVectorEnv`) and only arrays cross into torch: prefer a built-in family where there is one.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any, ClassVar

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete, Space
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from learned_rl.streams import Streams
from learned_rl.tasks.base import TaskFamily, unknown
from learned_rl.types import Tasks, Tree, UserError

#: Time limit, in environment steps, where neither the registered environment nor the user sets one (MinAtar).
DEFAULT_TIME_LIMIT = 10_000


def _registered(env_id: str) -> str:
    """`env_id` once the module that registers it is imported; `UserError` if gymnasium does not know it."""
    module, _, name = env_id.rpartition(":")
    if module:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise UserError(f"gymnasium id '{env_id}' names the module '{module}', which is not installed") from error
    if name.startswith("MinAtar/"):
        _register_minatar(env_id)
    if name not in gymnasium.registry:
        raise unknown("gymnasium id", env_id, gymnasium.registry)
    return name


def _register_minatar(env_id: str) -> None:
    try:
        minatar = importlib.import_module("minatar.gym")
    except ImportError as error:
        raise UserError(f"'{env_id}' needs the optional extra minatar: pip install 'learned-rl[minatar]'") from error
    if "MinAtar/Breakout-v1" not in gymnasium.registry:
        minatar.register_envs()


def _brightest(space: Space) -> int:
    """By what observations are divided: agents read images of bytes as shares of full brightness."""
    return 255 if isinstance(space, Box) and space.dtype == np.uint8 and len(space.shape) == 3 else 1


def _is_planes(space: Space) -> bool:
    """Planes with channels last: boolean ones, as MinAtar observes, or an image of bytes.

    An image whose first axis is shorter than its last (stacked grey frames) has its channels first already.
    """
    if not isinstance(space, Box) or len(space.shape) != 3:
        return False
    return bool(space.dtype == np.bool_ or (space.dtype == np.uint8 and space.shape[2] <= space.shape[0]))


def _observation_space(space: Space, env_id: str) -> Space:
    """The space of what `GymVectorEnv` returns for one copy."""
    if isinstance(space, Discrete):
        return Discrete(int(space.n))
    if not isinstance(space, Box):
        raise UserError(
            f"'{env_id}' observes a {type(space).__name__} space where Box or Discrete was expected: "
            "register it wrapped in gymnasium.wrappers.FlattenObservation"
        )
    low, high = (bound.astype(np.float32) / np.float32(_brightest(space)) for bound in (space.low, space.high))
    return Box(low.transpose(2, 0, 1), high.transpose(2, 0, 1)) if _is_planes(space) else Box(low, high)


def _action_space(space: Space, env_id: str) -> Space:
    """The space of what `GymVectorEnv.step` takes for one copy."""
    if isinstance(space, Discrete):
        return Discrete(int(space.n))
    if not isinstance(space, Box):
        raise UserError(f"'{env_id}' acts in a {type(space).__name__} space where Box or Discrete was expected")
    return space


class GymFamily(TaskFamily):
    """A registered environment: `GymFamily("CartPole-v1")`, or `gym/CartPole-v1` where a family is named.

    Tasks are `{"seed": int64 [n]}`: only the random numbers differ between tasks. Observations: Box as float32 with
    unchanged values (boolean planes `[H, W, C]` become `[C, H, W]`; so do images of bytes, divided by 255), Discrete as
    int64 counted from 0. Actions: Box or Discrete counted from 0; Box actions are passed on unclipped.

    Args:
        preset:            a gymnasium id, `module:id`, or one of MinAtar's (`MinAtar/Breakout-v1`; optional extra).
        max_episode_steps: time limit instead of the registered one; 10,000 where neither is set.
        make_kwargs:       for `gymnasium.make`.

    Raises:
        UserError: for an unknown id, a missing dependency, or a space that is neither Box nor Discrete.
    """

    name: ClassVar[str] = "gym"
    presets: ClassVar[tuple[str, ...]] = ("CartPole-v1", "Acrobot-v1", "MountainCar-v0", "Pendulum-v1")

    def __init__(
        self, preset: str = "CartPole-v1", *, max_episode_steps: int | None = None, **make_kwargs: Any
    ) -> None:
        spec = gymnasium.spec(_registered(preset))
        self.env_id = spec.id
        self.max_episode_steps = max_episode_steps or spec.max_episode_steps or DEFAULT_TIME_LIMIT
        # The passive checker would be one more Python call at every step of every copy.
        self.make_kwargs = {"disable_env_checker": True, **make_kwargs, "max_episode_steps": self.max_episode_steps}
        try:
            env = gymnasium.make(self.env_id, **self.make_kwargs)
        except (gymnasium.error.Error, TypeError) as error:  # a missing dependency, a wrong keyword
            raise UserError(f"gymnasium cannot make '{preset}': {error}") from error
        self.observation_space = _observation_space(env.observation_space, preset)
        self.action_space = _action_space(env.action_space, preset)
        env.close()

    def sample(self, n: int, generator: torch.Generator) -> Tasks:
        return {"seed": torch.randint(2**31, (n,), generator=generator)}

    def make(
        self,
        tasks: Tasks,
        copies: int,
        seed: int,
        device: torch.device | str = "cpu",
        streams: Streams | None = None,
    ) -> GymVectorEnv:
        return GymVectorEnv(self, tasks, copies, seed, device, streams)


class GymVectorEnv(VectorEnv):
    """`N = P * copies` copies of a gymnasium environment with the interface of `TaskVectorEnv`.

    A copy on stream `i` of all N is seeded from `(seed, restarts, task seed, i)`: lifetimes on one task have randomness
    of their own unless they share a stream, and what one does never changes what another draws. A gymnasium environment
    cannot be saved in general: see `load_state_dict`.
    """

    def __init__(
        self,
        family: GymFamily,
        tasks: Tasks,
        copies: int,
        seed: int,
        device: torch.device | str = "cpu",
        streams: Streams | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.lifetimes = len(tasks["seed"])
        self.copies = copies
        self.num_envs = self.lifetimes * copies
        self._streams = Streams.of(streams, self.lifetimes).copies(copies).index.tolist()
        self.single_observation_space = family.observation_space
        self.single_action_space = family.action_space
        self.observation_space = batch_space(family.observation_space, self.num_envs)
        self.action_space = batch_space(family.action_space, self.num_envs)
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
        self.env = gymnasium.make_vec(
            family.env_id,
            num_envs=self.num_envs,
            vectorization_mode="sync",
            vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP, "copy": False},  # `_observed` copies
            **family.make_kwargs,
        )
        source, target = self.env.single_observation_space, self.env.single_action_space
        self._planes, self._brightest = _is_planes(source), _brightest(source)
        self._dtype = torch.int64 if isinstance(source, Discrete) else torch.float32
        self._first_observation = int(source.start) if isinstance(source, Discrete) else 0
        self._first_action = int(target.start) if isinstance(target, Discrete) else 0
        self._action_dtype = target.dtype
        self.task = {"seed": tasks["seed"].cpu().repeat_interleave(copies)}
        self.seed = seed
        self.restarts = 0
        self._begin(np.ones(self.num_envs, dtype=np.bool_))

    # --- between arrays and tensors ----------------------------------------------------------------------------

    def _observed(self, array: np.ndarray) -> Tensor:
        """A tensor of its own, since the vector environment reuses its array."""
        obs = torch.from_numpy(array).to(self.device, self._dtype, copy=True)
        if self._brightest > 1:
            obs /= self._brightest
        if self._planes:
            return obs.permute(0, 3, 1, 2).contiguous()
        return obs - self._first_observation if self._first_observation else obs

    def _tensor(self, array: np.ndarray, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(array).to(self.device, dtype)

    def _begin(self, mask: np.ndarray) -> Tensor:
        """Seed the copies in `mask [N]` anew and begin their episodes; all observations."""
        seeds: Any = [None] * self.num_envs
        for i in np.flatnonzero(mask):
            entropy = (self.seed, self.restarts, int(self.task["seed"][i]), self._streams[i])
            seeds[i] = int(np.random.SeedSequence(entropy).generate_state(1)[0])
        obs, _ = self.env.reset(seed=seeds, options={"reset_mask": mask})
        self._last = self._observed(obs)
        return self._last

    # --- gymnasium's interface ---------------------------------------------------------------------------------

    def reset(self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None):
        """Begin new episodes everywhere; with a seed, all random streams begin anew too."""
        if isinstance(seed, int):
            self.seed, self.restarts = seed, 0
            return self._begin(np.ones(self.num_envs, dtype=np.bool_)), {}
        obs, _ = self.env.reset(options=options)
        self._last = self._observed(obs)
        return self._last, {}

    def step(self, actions: Tensor):
        # stop: what environments take is data
        array = actions.detach().cpu().numpy().astype(self._action_dtype, copy=False)
        if self._first_action:
            array = array + self._first_action
        obs, reward, terminated, truncated, info = self.env.step(array)
        final_obs = self._last = self._observed(obs)
        if "final_obs" in info:  # only on steps that end an episode
            last = obs.copy()
            for i in np.flatnonzero(info["_final_obs"]):
                last[i] = info["final_obs"][i]
            final_obs = self._observed(last)
            truncated = truncated & ~terminated
        return (
            self._last,
            self._tensor(reward, torch.float32),
            self._tensor(terminated, torch.bool),
            self._tensor(truncated, torch.bool),
            {"final_obs": final_obs},
        )

    def close_extras(self, **kwargs: Any) -> None:
        self.env.close(**kwargs)

    # --- beyond gymnasium --------------------------------------------------------------------------------------

    def _observe(self) -> Tensor:
        """The present observations `[N, ...]`."""
        return self._last

    def set_tasks(self, lifetimes: Tensor, tasks: Tasks) -> Tensor:
        """Give the lifetimes `[k]` new tasks (leading axis `k`) and fresh episodes; returns all observations."""
        if not len(lifetimes):  # seeds are no draws: nothing to keep in step with other processes
            return self._last
        seeds = self.task["seed"].view(self.lifetimes, self.copies)  # a view: writes go through
        seeds[lifetimes.cpu()] = tasks["seed"].cpu()[:, None]
        mask = np.zeros((self.lifetimes, self.copies), dtype=np.bool_)
        mask[lifetimes.cpu().numpy()] = True
        return self._begin(mask.ravel())

    def state_dict(self) -> Tree:
        """The tasks and the seeds; not the episodes that are running, which gymnasium cannot save."""
        return {
            "task/seed": self.task["seed"].clone(),
            "seed": torch.tensor(self.seed),
            "restarts": torch.tensor(self.restarts),
        }

    def load_state_dict(self, state: Tree) -> Tensor:
        """Same tasks, new episodes: every copy is reset and warned about, with random numbers not used before."""
        warnings.warn(
            "a gymnasium environment cannot be restored in the middle of an episode: all copies begin new episodes",
            UserWarning,
            stacklevel=2,
        )
        self.task = {"seed": state["task/seed"].cpu().clone()}
        self.seed, self.restarts = int(state["seed"]), int(state["restarts"]) + 1
        return self._begin(np.ones(self.num_envs, dtype=np.bool_))

"""P agents with ages, tasks, optimizer state and environments: everything that lives through a lifetime.

`advance` is one agent update (collect, update, age), whoever drives it: plain training, a window of the outer loop,
or evaluation. Lifetimes restart alone, each from a random stream of its own, so that what one does never changes what
another draws. `state_dict` holds everything that the next update depends on.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from learned_rl.agents import Population
from learned_rl.architecture import AgentOutput
from learned_rl.component import Context, Hyper, finite
from learned_rl.distributions import Categorical, Distribution, stack
from learned_rl.inner_loop import GraphInner, Inner, PlainInner
from learned_rl.ppo import Algorithm, UpdateRecord
from learned_rl.replay import Replay
from learned_rl.streams import Streams
from learned_rl.tasks.base import LifetimeEnv, Split, TaskFamily
from learned_rl.trajectory import Trajectory
from learned_rl.types import Tasks, Tree, UserError, stream, stream_seed


@torch.no_grad()
def rollout(
    policy: Callable[[Tensor], AgentOutput],
    env: LifetimeEnv,
    obs: Tensor,
    steps: int,
    generator: torch.Generator,
    greedy: bool = False,
    streams: Streams | None = None,
) -> Trajectory:
    """Act for `steps` steps in every copy.

    Args:
        policy: outputs [P, B, ...] from observations [P, B, ...].
        env:    a vector environment over N = P * B copies (see `learned_rl.tasks.base`).
        obs:    [P, B, ...] where to begin.
        greedy: take the most likely action instead of a sample.
        streams: which stream each lifetime's actions are drawn from; None: its own.

    Returns:
        Experience [T, P, B]; its last row of observations is where the next rollout begins.
    """
    lead = obs.shape[:2]
    seen, actions, rewards, terminations, truncations, finals = [obs], [], [], [], [], []
    policies: list[Distribution] = []
    for _ in range(steps):
        distribution = policy(obs).policy
        action = distribution.mode() if greedy else distribution.sample(generator, streams)
        obs, reward, terminated, truncated, info = env.step(distribution.to_env(action).flatten(0, 1))
        obs = obs.unflatten(0, lead)
        seen.append(obs)
        policies.append(distribution)
        actions.append(action)
        rewards.append(reward)
        terminations.append(terminated)
        truncations.append(truncated)
        finals.append(info["final_obs"])
    action, acted = torch.stack(actions), stack(policies)
    truncated = torch.stack(truncations).unflatten(1, lead)
    return Trajectory(
        obs=torch.stack(seen),
        action=action,
        log_prob=acted.log_prob(action),
        reward=torch.stack(rewards).unflatten(1, lead),
        terminated=torch.stack(terminations).unflatten(1, lead),
        truncated=truncated,
        final_obs=torch.stack(finals).unflatten(1, lead) if bool(truncated.any()) else None,
        logits=acted.logits if isinstance(acted, Categorical) else None,
    )


@dataclass(frozen=True)
class Episodes:
    """Episodes that ended within a rollout, per lifetime.

    Attributes:
        count:   [P] how many.
        returns: [P] sum of their undiscounted returns.
        lengths: [P] sum of their lengths, in environment steps.
    """

    count: Tensor
    returns: Tensor
    lengths: Tensor


class EpisodeTracker:
    """Returns and lengths of episodes that may span many rollouts."""

    def __init__(self, lifetimes: int, copies: int, device: torch.device | str, dtype: torch.dtype) -> None:
        self.running = torch.zeros(2, lifetimes, copies, device=device, dtype=dtype)  # return so far, length so far

    def __call__(self, trajectory: Trajectory) -> Episodes:
        reward, done = trajectory.reward, trajectory.done
        T = len(reward)
        totals = torch.stack([reward, torch.ones_like(reward)]).cumsum(1) + self.running[:, None]  # [2, T, P, B]
        steps = torch.arange(T, device=reward.device)[:, None, None]
        last = torch.where(done, steps, -1).cummax(0).values  # latest episode end up to and including t
        # The total at the episode end before t is what earlier episodes of this copy had collected.
        before = torch.cat([torch.full_like(last[:1], -1), last[:-1]])
        base = torch.where(before >= 0, totals.gather(1, before.clamp(min=0).expand_as(totals)), 0)
        ended = ((totals - base) * done).sum((1, 3))
        tail = torch.where(last[-1] >= 0, totals.gather(1, last[-1:].clamp(min=0).expand(2, *last[-1:].shape))[:, 0], 0)
        self.running = totals[:, -1] - tail
        return Episodes(done.sum((0, 2)), ended[0], ended[1])

    def reset(self, lifetime: int) -> None:
        self.running[:, lifetime] = 0


class Lifetimes:
    """P lifetimes of one algorithm on one task family.

    Args:
        family:    where tasks come from.
        algorithm: the update; its components are shared by all lifetimes.
        lifetimes: P.
        horizon:   agent updates in a lifetime; a pair (low, high) draws each lifetime's log-uniformly.
        seed:      every random stream derives from it and from its own name.
        tasks:     the P tasks; None draws them, and draws a new one whenever a lifetime restarts.
        split:     the side of the family from which tasks are drawn.
        hyper:     configured numbers, each a float or [P, 1]; None: those of the algorithm's config.
        streams:   which random stream each lifetime draws from; None: a stream for each. Lifetimes that share one have
                   the same tasks, initial agents, horizons and luck. A process that holds some of many lifetimes names
                   theirs (see `learned_rl.streams`).

    Raises:
        UserError: tasks or streams for another number of lifetimes.
    """

    def __init__(
        self,
        family: TaskFamily,
        algorithm: Algorithm,
        lifetimes: int,
        horizon: int | tuple[int, int],
        seed: int,
        *,
        tasks: Tasks | None = None,
        split: Split = "train",
        hyper: Hyper | None = None,
        streams: Streams | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.family, self.algorithm, self.seed, self.split = family, algorithm, seed, split
        self.hyper = hyper or algorithm.config.hyper
        self.device, self.dtype = torch.device(device), dtype
        self.streams = Streams.of(streams, lifetimes).to(self.device)
        self._stream = self.streams.index.tolist()  # of each lifetime
        if tasks is not None and (given := len(next(iter(tasks.values())))) != lifetimes:
            raise UserError(f"{given} tasks were given for {lifetimes} lifetimes: expected one for each.")
        self.fixed_tasks = tasks is not None
        agent = algorithm.fit(family.observation_space, family.action_space)
        for _, component in algorithm.slots.items():
            component.to(self.device)
        self.population = Population(agent, lifetimes, dtype).to(device)
        # stop: initial state
        self.optimizer_state = algorithm.slots.optimizer.initial_state(self.population.theta.detach())
        self.age = torch.zeros(lifetimes, device=device)
        self.horizon = torch.zeros(lifetimes, device=device)
        self.horizon_range = horizon if isinstance(horizon, tuple) else (horizon, horizon)
        self.life = torch.zeros(lifetimes, dtype=torch.int64)
        self.generator = torch.Generator(self.device).manual_seed(stream_seed("policy", split, seed))
        self._shuffles = stream("minibatches", split, seed)
        tasks = tasks if tasks is not None else self._draw_tasks(range(lifetimes))
        env_seed = stream_seed("environment", split, seed) % 2**31
        shared = {} if self.streams.whole else {"streams": self.streams}  # a family that knows none of them will do
        self.env = family.make(tasks, algorithm.config.n_envs, env_seed, device, **shared)
        self.obs = self._shaped(self.env.reset(seed=env_seed)[0])
        self.earned = torch.zeros(lifetimes, dtype=torch.float64, device=device)
        self.paid_finite = torch.ones(lifetimes, dtype=torch.bool, device=device)  # in the latest rollout
        c = algorithm.config
        self.episodes = EpisodeTracker(lifetimes, c.n_envs, device, dtype)
        self.ended = torch.zeros(lifetimes, c.n_envs, dtype=torch.bool, device=device)  # by the step before `obs`
        self.replay = Replay(c.replay_capacity, c.replay_batch, lifetimes, device) if c.replay_capacity else None
        for p in range(lifetimes):
            self._fresh_agent(p)
        self.memory = self._fresh_memory()

    def __len__(self) -> int:
        return len(self.population.theta)

    # --- what happens in a lifetime ----------------------------------------------------------------------------

    def plain(self) -> PlainInner:
        """The population, to be moved in place."""
        return PlainInner(self.population, self.algorithm.slots.optimizer, self.optimizer_state)

    def window(self) -> GraphInner:
        """The population, to be moved in a graph from where it stands; `commit` makes the end of it the present."""
        return GraphInner(self.population, self.algorithm.slots.optimizer, self.optimizer_state)

    def collect(self, inner: Inner, steps: int | None = None) -> Trajectory:
        """Experience at the inner loop's present parameters; environments go on from where they were."""
        policy = self.population.bind(inner.theta.detach(), policy_only=True)  # stop: acting makes data
        steps = steps or self.algorithm.config.n_steps
        trajectory = rollout(policy, self.env, self.obs, steps, self.generator, streams=self.streams)
        done = trajectory.done
        trajectory = dataclasses.replace(trajectory, follows=torch.cat([self.ended[None], done[:-1]]))
        self.obs, self.ended = trajectory.obs[-1], done[-1]
        self.earned = self.earned + trajectory.reward.double().sum((0, 2))
        return trajectory if self.dtype == torch.float32 else _cast(trajectory, self.dtype)

    def shuffle(self) -> int:
        """A fresh seed for the minibatches of one update."""
        return int(torch.randint(2**31, (), generator=self._shuffles))

    def advance(self, inner: Inner, trajectory: Trajectory | None = None) -> tuple[UpdateRecord | None, Episodes]:
        """One agent update of every lifetime, on fresh experience, or on what its replay draws, unless some is given.

        Until its replay holds as much as it draws, a lifetime only collects; there is no record where all do.
        """
        fresh, ended, active = trajectory is None, Episodes(*[torch.zeros_like(self.age)] * 3), None
        if trajectory is None:
            trajectory = self.collect(inner)
            ended = self.episodes(trajectory)
        self.paid_finite = finite(trajectory.reward, 1)
        if fresh and self.replay is not None:
            self.replay.push(trajectory, self.paid_finite)  # what is not would be drawn again and again
            trajectory, active = self.replay.sample(self.generator, self.streams), self.replay.ready
        context = Context(self.age, self.horizon, self.memory)
        generator = torch.Generator(self.device).manual_seed(self.shuffle())
        self.age = self.age + 1
        if active is not None and not bool(active.any()):
            return None, ended
        record = self.algorithm.update(inner, trajectory, context, self.hyper, generator, self.streams, active)
        self.memory = record.memory
        if not inner.graph:
            self.optimizer_state = inner.state
            self.memory = {k: v.detach() for k, v in self.memory.items()}  # stop: nobody looks back
        if active is not None:
            record = dataclasses.replace(record, alive=record.alive & self.paid_finite)
        return record, ended

    @torch.no_grad()
    def commit(self, inner: GraphInner) -> None:
        """Make the end of a window the present, as constants."""
        theta, self.optimizer_state = inner.carry()
        self.population.theta.copy_(theta)
        self.memory = {k: v.detach() for k, v in self.memory.items()}  # stop: the window's end

    # --- restarts and copies -----------------------------------------------------------------------------------

    def finished(self) -> Tensor:
        """[P] bool: lifetimes whose updates are spent."""
        return self.age >= self.horizon

    def restart(self, which: Tensor, elsewhere: bool = False) -> None:
        """Fresh agents (and fresh tasks, unless they were given) for the lifetimes where `which [P]` is true.

        Those of one stream stay alike only if they restart together.

        Args:
            elsewhere: lifetimes of another process restart at this moment. All processes make the draws of a restart
                together, or those of the next one would differ from a single process's.
        """
        index = which.nonzero().flatten().cpu()
        if not len(index) and not elsewhere:
            return
        self.life[index] += 1
        present = {k: v[index] for k, v in self.tasks().items()}
        tasks = present if self.fixed_tasks or not len(index) else self._draw_tasks(index.tolist())
        obs = self.env.set_tasks(index, tasks)
        self.obs = torch.where(_rows(which, self.obs), self._shaped(obs), self.obs)
        self.age = torch.where(which, torch.zeros_like(self.age), self.age)
        self.earned = torch.where(which, torch.zeros_like(self.earned), self.earned)
        self.ended = self.ended & ~which[:, None]
        if self.replay is not None:
            self.replay.reset(which)
        for p in index.tolist():
            self._fresh_agent(p)
            self.episodes.reset(p)
        fresh_memory = self._fresh_memory()
        self.memory = {k: torch.where(_rows(which, v), fresh_memory[k], v) for k, v in self.memory.items()}

    def stagger(self, multiple: int = 1) -> None:
        """Let the first lifetimes end early, one after the other, so that ages spread over the horizon for good.

        The order is that of their streams, over all processes; those of one stream end together.

        Args:
            multiple: lifetimes last a multiple of this many updates (the outer loop's window).
        """
        share = (self.streams.index + 1) / self.streams.total
        self.horizon = (self.horizon * share / multiple).ceil().clamp(min=1) * multiple

    @torch.no_grad()
    def _fresh_agent(self, p: int) -> None:
        low, high = (math.log(h) for h in self.horizon_range)
        which = (self.split, self.seed, self._stream[p], int(self.life[p]))
        uniform = torch.rand((), generator=stream("horizon", *which)).item()
        self.horizon[p] = round(math.exp(low + (high - low) * uniform))
        row = self.population.initial(stream("agent", *which)).to(self.device)
        own = {k: v[p : p + 1] for k, v in vars(self.hyper).items() if isinstance(v, Tensor)}
        self.population.theta[p] = self.population.told(row.unsqueeze(0), self.hyper.replace(**own))
        fresh = self.algorithm.slots.optimizer.initial_state(self.population.theta[p : p + 1])
        for name, value in fresh.items():
            self.optimizer_state[name] = self.optimizer_state[name].clone()
            self.optimizer_state[name][p] = value[0]

    def _fresh_memory(self) -> Tree:
        """What lifetimes would carry if all began with the present parameters."""
        theta = self.population.theta.detach()  # stop: initial values
        memory = self.algorithm.initial_memory(theta).items()
        return {k: v.to(self.device, self.dtype if v.is_floating_point() else None) for k, v in memory}

    @torch.no_grad()
    def copy(self, source: Tensor, target: Tensor) -> None:
        """Let the agents at `target [k]` go on as copies of those at `source [k]`, all at once.

        A copy takes over weights, optimizer state, component memory, replay, age and horizon, and the rows [P, 1] of
        `hyper`. Task, environments, running episodes and random streams stay the target's own. Between updates only: a
        plain inner loop goes on from the copies, a window does not see them.

        Args:
            source, target: indices of lifetimes; the targets are distinct.
        """
        rows = torch.arange(len(self), device=self.device)
        rows[target.to(self.device)] = source.to(self.device)
        self.population.theta.copy_(self.population.theta[rows])
        for name, value in self.optimizer_state.items():
            self.optimizer_state[name] = value[rows]
        self.memory = {k: v[rows] for k, v in self.memory.items()}
        if self.replay is not None:
            self.replay.copy(rows)
        self.age, self.horizon = self.age[rows], self.horizon[rows]
        self.hyper = self.hyper.replace(**{k: v[rows] for k, v in vars(self.hyper).items() if isinstance(v, Tensor)})

    def _draw_tasks(self, lifetimes: Iterable[int]) -> Tasks:
        streams = (stream(self.split, self.seed, self._stream[p], int(self.life[p])) for p in lifetimes)
        draws = [self.family.sample(1, each) for each in streams]
        return {k: torch.cat([d[k] for d in draws]) for k in draws[0]}

    def tasks(self) -> Tasks:
        """The tasks of the P lifetimes, on the CPU."""
        return {k: v[:: self.algorithm.config.n_envs].cpu() for k, v in self.env.task.items()}

    def _shaped(self, obs: Tensor) -> Tensor:
        return obs.unflatten(0, (len(self.population.theta), -1))

    # --- save and resume ---------------------------------------------------------------------------------------

    def state_dict(self) -> Tree:
        """Tensors only; loading them continues to the same numbers.

        Every entry holds one row for each lifetime, `[P, ...]`, or for each of its environment copies, `[N, ...]`, but
        for

        * `running` [2, P, B], whose rows are on axis 1;
        * names that end with `generator`, and entries without any axis (the seed and the number of resumptions of a
          gymnasium environment): they are shared, the same in every process after the same update.

        `learned_rl.streams.join` makes one state of those of several processes by this rule, `part` the reverse.
        """
        # stop: saved values
        named = {"theta": self.population.theta.detach(), "obs": self.obs, "age": self.age, "life": self.life}
        named |= {"earned": self.earned, "ended": self.ended}
        named |= {"horizon": self.horizon, "running": self.episodes.running, "generator": self.generator.get_state()}
        named |= {"shuffle_generator": self._shuffles.get_state()}
        named |= {f"hyper/{k}": v for k, v in vars(self.hyper).items() if isinstance(v, Tensor)}
        for prefix, tree in (
            ("optimizer", self.optimizer_state),
            ("memory", self.memory),
            ("replay", {} if self.replay is None else self.replay.state_dict()),
            ("env", self.env.state_dict()),
        ):
            named |= {f"{prefix}/{k}": v for k, v in tree.items()}
        return {k: v.clone() for k, v in named.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Tree) -> None:
        """Continue from a saved state.

        Raises:
            UserError: a state of another number of lifetimes.
        """
        if (saved := len(state["theta"])) != len(self):
            raise UserError(f"a state of {saved} lifetimes was given: expected one of {len(self)}, as `part` takes it.")
        state = {k: v.to(self.device) if "generator" not in k else v for k, v in state.items()}
        self.population.theta.copy_(state["theta"])
        self.obs, self.age, self.horizon = state["obs"], state["age"], state["horizon"]
        self.life, self.episodes.running = state["life"].cpu(), state["running"]
        self.earned, self.ended = state["earned"], state["ended"]
        if self.replay is not None:
            self.replay.load_state_dict(under("replay", state))
        self.generator.set_state(state["generator"])
        self._shuffles.set_state(state["shuffle_generator"])
        self.hyper = self.hyper.replace(**under("hyper", state))
        self.optimizer_state, self.memory = under("optimizer", state), under("memory", state)
        begun_anew = self.env.load_state_dict(under("env", state))
        if begun_anew is not None:
            self.obs = self._shaped(begun_anew)
            self.ended = torch.zeros_like(self.ended)
            self.episodes.running.zero_()


def under(prefix: str, tree: Tree) -> Tree:
    """The branch of a flat tree whose names begin with `prefix/`, without it."""
    return {k.removeprefix(f"{prefix}/"): v for k, v in tree.items() if k.startswith(f"{prefix}/")}


def _rows(which: Tensor, like: Tensor) -> Tensor:
    return which.view(-1, *[1] * (like.dim() - 1))


def _cast(trajectory: Trajectory, dtype: torch.dtype) -> Trajectory:
    """Floating-point tensors in another precision (environments compute in float32)."""
    fields = {
        k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in vars(trajectory).items()
    }
    return Trajectory(**fields)

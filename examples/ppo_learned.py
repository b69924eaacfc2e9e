"""PPO in one file, with learned parts where hand-made ones usually stand: read it from top to bottom, and change it.

    python examples/ppo_learned.py --objective dpo
    python examples/ppo_learned.py --objective runs/lpo/component.safetensors --total-timesteps 500000
    python examples/ppo_learned.py --reward runs/lirpg/components/reward-0.safetensors --optimizer rmsprop

Three lines marked "learned" are all that differs from a loop of one's own: what is minimised, what is rewarded, how
parameters move. Shapes: T steps of B environments; components see one lifetime, an axis P of length 1, in the middle.
"""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
import tyro
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import Tensor, nn

from learned_rl import Hyper, UserError
from learned_rl.adapters.common import find, headless
from learned_rl.architecture import AgentOutput
from learned_rl.component import Context, Reward, UpdateRule
from learned_rl.distributions import Categorical
from learned_rl.rule_optimizer import RuleOptimizer, trained_rate
from learned_rl.trajectory import Trajectory, flatten_time


@dataclass(frozen=True)
class Args:
    env_id: str = "CartPole-v1"
    """gymnasium id; observations are vectors, actions discrete"""
    total_timesteps: int = 100_000
    """environment steps of the whole training, summed over environments"""
    seed: int = 1
    """of networks, actions and environments"""
    num_envs: int = 8
    """B: parallel environments"""
    num_steps: int = 128
    """T: steps of each environment between updates"""
    update_epochs: int = 4
    """passes over a rollout"""
    num_minibatches: int = 4
    """parts of a pass, each a gradient step"""
    objective: str = "ppo_clip"
    """what is minimised: name or file of an objective that needs policy and value alone"""
    reward: str | None = None
    """what is rewarded: name or file of a reward; none: what the environment pays"""
    optimizer: str = "adam"
    """how parameters move: name or file of an update rule"""
    learning_rate: float | None = None
    """what multiplies the rule's steps; none: what it was trained with, or what suits it"""
    anneal_lr: bool = True
    """let the learning rate fall linearly to zero"""
    gamma: float = 0.99
    """discount per environment step"""
    gae_lambda: float = 0.95
    """trace decay of advantages"""
    clip_coef: float = 0.2
    """how far the probability ratio may move, for objectives that clip"""
    ent_coef: float = 0.01
    """weight of the entropy"""
    vf_coef: float = 0.5
    """weight of the value loss"""
    max_grad_norm: float = 0.5
    """bound on the norm of the gradient"""
    csv: Path | None = None
    """where to write a row for each update"""


class Agent(nn.Module):
    """Two perceptrons: logits of the actions, and the value."""

    def __init__(self, inputs: int, actions: int) -> None:
        super().__init__()
        self.actor = nn.Sequential(layer(inputs, 64), nn.Tanh(), layer(64, 64), nn.Tanh(), layer(64, actions, 0.01))
        self.critic = nn.Sequential(layer(inputs, 64), nn.Tanh(), layer(64, 64), nn.Tanh(), layer(64, 1, 1.0))

    def forward(self, obs: Tensor) -> AgentOutput:
        """Policy and value [...] of observations [..., inputs]."""
        return AgentOutput(Categorical(self.actor(obs)), self.critic(obs).squeeze(-1))


def layer(inputs: int, outputs: int, gain: float = 2**0.5) -> nn.Linear:
    linear = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(linear.weight, gain)
    nn.init.zeros_(linear.bias)
    return linear


def finished(infos: dict[str, Any]) -> list[tuple[float, int]]:
    """(return, length) of each episode that a vector step ended, of whatever layout the statistics have.

    gymnasium 1 keeps arrays under "episode" with a mask "_episode", at the top or under "final_info", by the mode of
    resetting; before, "final_info" was a list of dictionaries, or None where no episode ended.
    """
    final = infos.get("final_info")
    if final is not None and not isinstance(final, dict):
        rows = [info["episode"] for info in final if info is not None and "episode" in info]
        return [(float(np.squeeze(e["r"])), int(np.squeeze(e["l"]))) for e in rows]
    known = infos if final is None else final
    if "episode" not in known:
        return []
    returns, lengths = (np.asarray(known["episode"][k]) for k in ("r", "l"))
    there = np.asarray(known.get("_episode", np.ones(returns.shape, bool)), bool)
    return [(float(r), int(n)) for r, n in zip(returns[there], lengths[there], strict=True)]


def final_observations(obs: np.ndarray, infos: dict[str, Any], done: np.ndarray) -> np.ndarray:
    """[B, ...] where each step led to, before any environment was reset."""
    final = obs.copy()
    last = infos.get("final_obs", infos.get("final_observation"))
    for i in np.flatnonzero(done):
        final[i] = last[i]
    return final


class Learner:
    """What is learned by: an agent, and the three parts that may themselves have been learned."""

    def __init__(self, args: Args, observation_space: gymnasium.Space, action_space: gymnasium.Space) -> None:
        if not isinstance(action_space, gymnasium.spaces.Discrete) or len(observation_space.shape or ()) != 1:
            raise UserError(f"{args.env_id} has {observation_space} and {action_space}: expected vectors and Discrete.")
        self.args, self.agent = args, Agent(observation_space.shape[0], int(action_space.n))
        self.objective = headless(args.objective, action_space, "this script").requires_grad_(False)  # learned
        self.reward = find(args.reward, Reward).requires_grad_(False) if args.reward else None  # learned
        rule = find(args.optimizer, UpdateRule).requires_grad_(False)  # learned
        self.memory = {"objective": self.objective.initial_memory(1), "reward": {}}
        if self.reward is not None:
            self.reward.fit(observation_space, action_space, ())
            self.memory["reward"] = self.reward.initial_memory(1)
        self.rate = trained_rate(rule) if args.learning_rate is None else args.learning_rate
        self.updates = max(args.total_timesteps // (args.num_envs * args.num_steps), 1)
        self.parts = 1 if self.objective.whole_rollouts else args.num_minibatches
        steps = args.update_epochs * self.parts
        self.optimizer = RuleOptimizer(
            self.agent.parameters(),
            rule,
            lr=self.rate,
            total_steps=self.updates * steps,
            steps_per_update=steps,
            epochs=args.update_epochs,
            seed=args.seed,
        )
        self.optimizer.watch(self.agent, critic=lambda name: name.startswith("critic"))

    def update(self, rollout: Trajectory, age: int) -> dict[str, float]:
        """Learns from a rollout; metrics by name."""
        args, left = self.args, 1 - age / self.updates
        rate = self.rate * (left if args.anneal_lr else 1.0)
        hyper = Hyper(rate, args.gamma, args.gae_lambda, clip_range=args.clip_coef, ent_coef=args.ent_coef)
        hyper = hyper.replace(vf_coef=args.vf_coef, max_grad_norm=args.max_grad_norm)
        self.optimizer.param_groups[0]["lr"] = rate
        told, rows = self.targets(rollout, hyper, age)
        for _ in range(args.update_epochs):
            for seen, part in minibatches(told.obs[:-1], rows, self.parts):
                loss, metrics = self.objective.loss(self.agent(seen), part, hyper)
                self.optimizer.zero_grad()
                loss.sum().backward()
                nn.utils.clip_grad_norm_(self.agent.parameters(), args.max_grad_norm)
                self.optimizer.step()
        paid = {"mean_reward": rollout.reward.mean().item(), "mean_paid": told.reward.mean().item()}
        return paid | {name: x.mean().item() for name, x in metrics.items()}

    @torch.no_grad()
    def targets(self, rollout: Trajectory, hyper: Hyper, age: int) -> tuple[Trajectory, dict[str, Tensor]]:
        """The rollout as it is rewarded, and what its minibatches are drawn from, name -> [T, 1, B, ...]."""
        where = torch.full((1,), float(age)), torch.full((1,), float(self.updates))
        if self.reward is not None:
            paid, self.memory["reward"] = self.reward(rollout, Context(*where, self.memory["reward"]))
            rollout = replace(rollout, reward=paid)
        out = self.agent(rollout.obs)
        next_value = rollout.next_value(out.value, lambda obs: self.agent(obs).value)
        context = Context(*where, self.memory["objective"])
        rows, self.memory["objective"] = self.objective.prepare(rollout, out, next_value, hyper, context)
        return rollout, {"action": rollout.action, "log_prob": rollout.log_prob} | rows


def main(args: Args) -> float:
    """Trains an agent; the mean return of its last 20 episodes."""
    torch.manual_seed(args.seed)
    make = lambda: gymnasium.wrappers.RecordEpisodeStatistics(gymnasium.make(args.env_id))  # noqa: E731
    envs = SyncVectorEnv([make] * args.num_envs, autoreset_mode=AutoresetMode.SAME_STEP)
    learner = Learner(args, envs.single_observation_space, envs.single_action_space)
    episodes: list[tuple[float, int]] = []
    table: list[dict[str, float]] = []
    obs, began = envs.reset(seed=args.seed)[0], time.perf_counter()
    for update in range(learner.updates):
        rollout, obs, ended = collect(envs, learner.agent, obs, args.num_steps)
        episodes += ended
        recent = float(np.mean([r for r, _ in episodes[-20:]])) if episodes else float("nan")
        step = (update + 1) * args.num_envs * args.num_steps
        table.append({"global_step": step, "episodic_return": recent} | learner.update(rollout, update))
        if update % max(learner.updates // 10, 1) == 0 or update == learner.updates - 1:
            speed = step / (time.perf_counter() - began)
            print(f"step {step}: return {recent:.1f}, {len(episodes)} episodes, {speed:.0f} steps/s")
    envs.close()
    if args.csv is not None:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, table[0].keys())
            writer.writeheader()
            writer.writerows(table)
    return table[-1]["episodic_return"]


@torch.no_grad()
def collect(
    envs: SyncVectorEnv, agent: Agent, obs: np.ndarray, num_steps: int
) -> tuple[Trajectory, np.ndarray, list[tuple[float, int]]]:
    """A rollout [T, 1, B], the observation after it, and the episodes that ended."""
    rows, episodes = [], []
    for _ in range(num_steps):
        seen = torch.as_tensor(obs, dtype=torch.float32)
        policy = agent(seen).policy
        action = policy.sample()
        obs, reward, terminated, truncated, infos = envs.step(action.numpy())
        final = final_observations(obs, infos, terminated | truncated)
        episodes += finished(infos)
        paid = torch.as_tensor(reward, dtype=torch.float32)
        ends = map(torch.as_tensor, (terminated, truncated))
        rows.append((seen, action, policy.log_prob(action), paid, *ends, torch.as_tensor(final, dtype=torch.float32)))
    seen, *rest = (torch.stack(x).unsqueeze(1) for x in zip(*rows, strict=True))
    last = torch.as_tensor(obs, dtype=torch.float32)[None, None]
    return Trajectory(torch.cat([seen, last]), *rest), obs, episodes


def minibatches(obs: Tensor, rows: dict[str, Tensor], parts: int) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """A pass over a rollout: everything in its order, or shuffled steps [1, n] in so many parts."""
    if parts == 1:
        yield obs, rows
        return
    flat = {k: flatten_time(x) for k, x in rows.items()}
    seen = flatten_time(obs)
    for index in torch.randperm(seen.shape[1]).tensor_split(parts):
        yield seen.index_select(1, index), {k: x.index_select(1, index) for k, x in flat.items()}


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except UserError as error:
        sys.exit(f"ppo_learned.py: {error}")

"""Disco103: learner steps at the sizes of the published evaluation, and meta-steps of the published meta-training.

A learner step is one update from a batch of trajectories that are there: outputs of the agent and of its target
network, the rule's targets, the gradient and Adam. The authors' code in JAX took, on one core of another machine of
this kind, least loaded: 1.43 learner steps a second at the large sizes (the whole loop 1.23), 3.7 at the small ones
while the machine was busy, 2.0 to 2.9 GB; 6.4 to 6.8 s a meta-step and 4.7 GB, after minutes of compilation.
"""

from __future__ import annotations

import resource
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from experiments.benchmarks.measure import Result, fresh, seconds
from experiments.recipes import get_recipe
from learned_rl import PPO, PPOConfig
from learned_rl.agents import AgentConfig
from learned_rl.component import Context
from learned_rl.registry import make_family
from meta_optimizers.trainer import MetaTrainer
from objectives.disco import Disco

PRODUCTS = ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::addmv_", "aten::mv")


@dataclass(frozen=True)
class Settings:
    """Sizes of the benchmark."""

    env: str = "catch/8x8"
    steps: int = 28
    """transitions of a trajectory: 29 observations"""
    repeats: int = 10
    """learner steps that are measured, and a quarter as many meta-steps"""
    warm_up: int = 2
    device: str = "cpu"


DEFAULT = Settings()
#: agent, trajectories of an update, published learner steps a second
SIZES = {
    "dense 512-512, batch 64": (AgentConfig("action_conditional", (512, 512), "relu"), 64, 1.43),
    "dense 256-256, batch 32": (
        AgentConfig("action_conditional", (256, 256), "relu", model=64, head_hidden=(64,)),
        32,
        3.7,
    ),
}
META_STEP = (6.4, 4.7)  # published seconds and GB


def _measured(s: Settings, work: Callable[[], object], repeats: int) -> tuple[float, float, float]:
    """Median seconds, the share of matrix products, and peak memory in GB."""
    for _ in range(s.warm_up):
        work()
    time = sorted(seconds(work, s.device) for _ in range(repeats))[repeats // 2]
    return time, _share_of_products(work, s.device), _gigabytes(s.device)


def _gigabytes(device: str) -> float:
    """The most memory that this process ever held, or, on a device, that tensors took there."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def _share_of_products(work: Callable[[], object], device: str) -> float:
    """Of the time in torch's operators, on a device in their kernels, that of matrix products."""
    cuda = torch.device(device).type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as seen:
        work()
    if cuda:  # kernels are listed beside the operators that start them
        times = {e.key: e.self_device_time_total for e in seen.key_averages() if e.key.startswith("aten::")}
    else:
        times = {e.key: e.self_cpu_time_total for e in seen.key_averages()}
    return sum(times.get(name, 0) for name in PRODUCTS) / sum(times.values())


def learner(s: Settings, agent: AgentConfig, batch: int) -> tuple[float, float, float]:
    """Seconds of a learner step, the share of its matrix products, and peak memory in GB."""
    torch.manual_seed(0)
    disco = Disco()
    settings = disco.settings(tabular=False) | {"n_envs": batch, "n_steps": s.steps, "replay_capacity": 0}
    ppo = PPO(s.env, PPOConfig(**settings | {"agent": agent}), objective=disco, device=s.device)
    lives, generator = ppo.lifetimes, torch.Generator(s.device)
    trajectory = lives.collect(lives.plain())
    context = Context(lives.age, lives.horizon, lives.memory)

    def step() -> None:
        ppo.algorithm.update(lives.plain(), trajectory, context, lives.hyper, generator)

    return _measured(s, step, s.repeats)


def meta_step(s: Settings) -> tuple[float, float, float]:
    """Seconds of a meta-step of the recipe, the share of its matrix products, and peak memory in GB."""
    recipe = get_recipe("disco-catch")
    torch.manual_seed(0)
    trainer = MetaTrainer(make_family(recipe.family), Disco(), recipe.train, 0, device=s.device)
    return _measured(s, trainer.step, max(s.repeats // 4, 3))


def measure(s: Settings = DEFAULT) -> list[Result]:
    """Each in a process of its own, so that memory is its own."""
    rows, threads = [], torch.get_num_threads()
    for name, (agent, batch, published) in SIZES.items():
        time, share, memory = fresh(threads, learner, s, agent, batch)
        note, peer = f"{share:.0%} in matrix products", "the authors' code, elsewhere"
        rate = 1 / time
        rows.append(Result("disco", name, rate, "learner steps/s", peer, rate / published, "ratio > 1", note))
        rows.append(Result("disco", f"{name}: memory", memory, "GB", target="< 2.0"))
    time, share, memory = fresh(threads, meta_step, s)
    slow, large = META_STEP
    note = f"{share:.0%} in matrix products"
    rows.append(Result("disco", "meta-step", time, "s", peer, time / slow, "ratio < 1", note))
    rows.append(Result("disco", "meta-step: memory", memory, "GB", peer, memory / large, "ratio < 1"))
    return rows

"""`learned-rl train ENV`: PPO with learned parts, any number of seeds side by side."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from experiments.interrupt import holding_interrupts
from experiments.options import usable_device
from experiments.report import append_scores, print_table, read_scores, summary_table, write_report
from experiments.runs import SCORES, Progress, Run, default_folder, sb3_tags
from learned_rl import PPO, PPOConfig, artifacts
from learned_rl.component import Objective
from learned_rl.evaluation import Curves
from learned_rl.registry import make_family
from learned_rl.tasks.base import unknown
from learned_rl.types import at_least


@dataclass(frozen=True)
class Train:
    """Train PPO, with whatever is plugged into its slots."""

    objective: str | None = None
    """component file, or a registered name such as dpo; default: PPO's own"""
    optimizer: str | None = None
    """component file or registered name for the optimizer slot; default: the config's rule"""
    preset: str | None = None
    """a2c for the settings of advantage actor-critic; default: what suits the objective"""
    steps: int = 100_000
    """environment steps of each seed, summed over its copies"""
    seeds: int = 1
    """agents that learn side by side"""
    seed: int = 0
    """of the first agent"""
    checkpoints: int = 20
    """points of the learning curve after the first"""
    episodes: int = 20
    """fresh episodes of each agent at each point"""
    out: Path | None = None
    """run folder; default: runs/ENV__seedN__TIME"""
    resume: bool = False
    """continue the run in --out from its checkpoint"""
    device: str = "cpu"
    """torch device"""
    config: PPOConfig = field(default_factory=PPOConfig)
    """settings of the algorithm; the defaults are what suits the objective"""

    def __post_init__(self) -> None:
        at_least(1, steps=self.steps, seeds=self.seeds, checkpoints=self.checkpoints, episodes=self.episodes)
        at_least(0, seed=self.seed)
        usable_device(self.device)


def train(env: str, args: Train, command: list[str]) -> Path:
    """Train, evaluate along the way, write the report; returns its path."""
    agent = PPO(
        env,
        args.config,
        objective=args.objective,
        optimizer=args.optimizer,
        seeds=args.seeds,
        seed=args.seed,
        device=args.device,
    )
    method = Path(args.objective).stem if args.objective else (args.preset or "ppo")
    out = args.out or default_folder("runs", f"{method}-{env.replace('/', '-')}", args.seed)
    settings = {"env": env} | {k: v for k, v in vars(args).items() if k not in ("out", "resume", "device")}
    run = Run.create(out, command=command, config=settings, seed=args.seed, resume=args.resume)
    per_update = args.config.n_steps * args.config.n_envs
    marks = np.unique(np.ceil(np.linspace(0, args.steps, args.checkpoints + 1) / per_update).astype(int)) * per_update
    steps: list[int] = []
    returns: list[np.ndarray] = []
    if args.resume:
        if (saved := run.load_checkpoint()) is not None:
            agent.load_state_dict({k[6:]: v for k, v in saved.items() if k.startswith("agent/")})  # type: ignore[misc]
            steps, returns = saved["steps"].tolist(), list(saved["returns"].numpy())  # type: ignore[union-attr]
        run.rewind(agent.steps if saved else -1)
    began, first = time.perf_counter(), agent.steps
    bar = Progress(args.steps, "environment steps", done=first)
    with run, holding_interrupts() as interrupted, bar as progress:

        def log(done: int, metrics: dict[str, float]) -> None:
            rate = (done - first) * args.seeds / (time.perf_counter() - began)
            mean = metrics.pop("return")
            run.log(done, {"rollout/ep_rew_mean": mean, "time/fps": rate} | sb3_tags(metrics))
            progress.update(min(done, args.steps), **{"return": mean, "steps/s": round(rate)})
            save_if_interrupted()

        def save_if_interrupted() -> None:
            if interrupted():
                _checkpoint(run, agent, steps, returns)
                raise KeyboardInterrupt(run.path)

        for mark in marks[len(steps) :]:
            agent.learn(int(mark), log, schedule=args.steps)
            scores = agent.evaluate(args.episodes)
            steps.append(agent.steps)
            returns.append(scores.cpu().double().numpy())
            run.log(agent.steps, {"eval/mean_reward": float(scores.mean())})
            _checkpoint(run, agent, steps, returns)
            save_if_interrupted()
    append_scores(run.path / SCORES, env, method, Curves(np.array(steps), np.stack(returns)[:, None]), None)
    print_table(summary_table(read_scores(run.path / SCORES)))
    return write_report([run.path], run.path / "report.html")


def _checkpoint(run: Run, agent: PPO, steps: list[int], returns: list[np.ndarray]) -> None:
    state = {f"agent/{k}": v for k, v in agent.state_dict().items()}
    state |= {"steps": torch.tensor(steps), "returns": torch.as_tensor(np.stack(returns))}
    run.save_checkpoint(state)


PRESETS = ("a2c",)


def suited(env: str, words: Sequence[str]) -> Train:
    """Defaults of the options: the settings that suit the objective or the preset that the words name.

    The settings decide what their own options' defaults are, so these two options are read first.
    """
    named = {}
    for option in ("--objective", "--preset"):
        for i, word in enumerate(words):
            if word == option and i + 1 < len(words):
                named[option] = words[i + 1]
            elif word.startswith(f"{option}="):
                named[option] = word.partition("=")[2]
    if "--preset" in named:
        if named["--preset"] not in PRESETS:
            raise unknown("preset", named["--preset"], PRESETS)
        return Train(config=PPOConfig.a2c())
    space = make_family(env).observation_space
    objective = artifacts.get(named["--objective"]) if "--objective" in named else None
    return Train(config=PPOConfig.suited(objective if isinstance(objective, Objective) else None, space))

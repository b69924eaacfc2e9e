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
from experiments.report import append_scores, conclude
from experiments.runs import SCORES, Progress, Run, default_folder, sb3_tags
from learned_rl import PPO, PPOConfig, artifacts
from learned_rl.component import SLOTS, Objective
from learned_rl.evaluation import Curves
from learned_rl.lifetimes import under
from learned_rl.registry import make_family
from learned_rl.tasks.base import unknown
from learned_rl.types import at_least

FIGURE = Path("figures") / "learning_curve.png"


@dataclass(frozen=True)
class Train:
    """Train PPO, with whatever is plugged into its slots. --config FILE takes settings from a file, such as
    the best.toml of `learned-rl tune`; options given beside it win."""

    objective: str | None = None
    """component file, or a registered name such as dpo; default: PPO's own"""
    reward: str | None = None
    """component file or registered name for the reward slot; default: the environment's reward"""
    hyperparameters: str | None = None
    """component file (such as a schedule) or registered name for the hyperparameters slot; default: constants"""
    auxiliary: str | None = None
    """component file or registered name for the auxiliary slot; default: nothing"""
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


class _Session:
    """A training run: the agents, the folder, the learning curve so far."""

    run: Run

    def __init__(self, env: str, args: Train) -> None:
        self.args = args
        plugs = {slot: getattr(args, slot) for slot in SLOTS}
        self.agent = PPO(env, args.config, **plugs, seeds=args.seeds, seed=args.seed, device=args.device)  # type: ignore[arg-type]
        self.steps: list[int] = []
        self.returns: list[np.ndarray] = []  # [seeds] at each of the steps
        self.began, self.first = time.perf_counter(), 0

    def marks(self) -> list[int]:
        """Environment steps at which the agents are still to be evaluated: at whole updates."""
        per_update = self.args.config.n_steps * self.args.config.n_envs
        even = np.linspace(0, self.args.steps, self.args.checkpoints + 1)
        return (np.unique(np.ceil(even / per_update).astype(int)) * per_update).tolist()[len(self.steps) :]

    def resume(self) -> None:
        """Continue from the checkpoint, or from the beginning where none was saved yet."""
        saved = self.run.load_checkpoint()
        if saved is not None:
            self.agent.load_state_dict(under("agent", saved))  # type: ignore[arg-type]
            self.steps, self.returns = saved["steps"].tolist(), list(saved["returns"].numpy())  # type: ignore[union-attr]
        self.first = self.agent.steps
        self.run.rewind(self.first if saved else -1)

    def checkpoint(self) -> None:
        state = {f"agent/{k}": v for k, v in self.agent.state_dict().items()}
        state |= {"steps": torch.tensor(self.steps), "returns": torch.as_tensor(np.stack(self.returns))}
        self.run.save_checkpoint(state)

    def log(self, done: int, metrics: dict[str, float]) -> dict[str, float | str]:
        """Record one update after which each seed has taken `done` environment steps; returns what to show of it."""
        config = self.args.config
        rate = (done - self.first) * self.args.seeds / (time.perf_counter() - self.began)
        passes = done // (config.n_steps * config.n_envs) * config.n_epochs  # over the data, as over there
        self.run.log(done, {"time/fps": rate, "train/n_updates": passes} | sb3_tags(metrics))
        return {"return": metrics["return"], "steps/s": round(rate)}

    def evaluate(self) -> None:
        """Add a point to the learning curve, and save it."""
        scores = self.agent.evaluate(self.args.episodes)
        self.steps.append(self.agent.steps)
        self.returns.append(scores.cpu().double().numpy())
        self.run.log(self.agent.steps, {"eval/mean_reward": float(scores.mean())})
        self.checkpoint()


def train(env: str, args: Train, command: list[str]) -> Path:
    """Train, evaluate along the way, write the report; returns its path."""
    session = _Session(env, args)  # before the folder: what cannot be built leaves none
    method = Path(args.objective).stem if args.objective else (args.preset or "ppo")
    out = args.out or default_folder("runs", f"{method}-{env.replace('/', '-')}", args.seed)
    settings = {"env": env} | {k: v for k, v in vars(args).items() if k not in ("out", "resume", "device")}
    run = session.run = Run.create(out, command=command, config=settings, seed=args.seed, resume=args.resume)
    if args.resume:
        session.resume()
    bar = Progress(args.steps, "environment steps", done=session.first)
    with run, holding_interrupts() as interrupted, bar as progress:

        def save_if_interrupted() -> None:
            if interrupted():
                session.checkpoint()
                raise KeyboardInterrupt(run.path)

        def log(done: int, metrics: dict[str, float]) -> None:
            progress.update(min(done, args.steps), **session.log(done, metrics))
            save_if_interrupted()

        for mark in session.marks():
            session.agent.learn(mark, log, schedule=args.steps)
            session.evaluate()
            save_if_interrupted()
    curves = Curves(np.array(session.steps), np.stack(session.returns)[:, None])
    append_scores(run.path / SCORES, env, method, curves, None)
    return conclude(run.path, FIGURE)


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

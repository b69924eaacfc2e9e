"""`learned-rl train ENV`: PPO with learned parts, any number of seeds side by side."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import Space

from experiments.config_file import early_option
from experiments.interrupt import holding_interrupts
from experiments.options import usable_device
from experiments.plugs import Plugged, check_settings, file_digests, plugs
from experiments.report import append_scores, conclude
from experiments.runs import ARTIFACT, SCORES, Progress, Run, default_folder, sb3_tags
from learned_rl import PPOConfig, __version__, artifacts
from learned_rl.component import SLOTS, Component, Objective, UpdateRule
from learned_rl.evaluation import Curves
from learned_rl.lifetimes import under
from learned_rl.registry import components, make_family
from learned_rl.tasks.base import unknown
from learned_rl.types import UserError, at_least
from meta_optimizers.self_tuning import SelfTuning, SelfTuningConfig

FIGURE = Path("figures") / "learning_curve.png"
ROWS = 2000  # records of a run's metrics, at most about
PARTS = "components"  # where what was learned online is saved


@dataclass(frozen=True)
class Train(Plugged):
    """Train PPO, with whatever is plugged into its slots. --config FILE takes settings from a file, such as
    the best.toml of `learned-rl tune`; options given beside it win."""

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
    label: str | None = None
    """name of the method in tables and figures; default: what is plugged in"""
    out: Path | None = None
    """run folder; default: runs/METHOD-ENV__seedN__DATE-TIME"""
    resume: bool = False
    """continue the run in --out from its checkpoint"""
    device: str = "cpu"
    """torch device"""
    config: PPOConfig = field(default_factory=PPOConfig)
    """settings of the algorithm; the defaults are what suits the objective and the optimizer"""
    outer: SelfTuningConfig = field(default_factory=SelfTuningConfig)
    """how parts are learned online; --estimator NAME chooses another estimator"""

    def __post_init__(self) -> None:
        at_least(1, steps=self.steps, seeds=self.seeds, checkpoints=self.checkpoints, episodes=self.episodes)
        at_least(0, seed=self.seed)
        usable_device(self.device)


class _Session:
    """A training run: the agents, the folder, the learning curve so far."""

    run: Run

    def __init__(self, env: str, args: Train) -> None:
        self.args, self.env = args, env
        plugged: dict[str, Any] = plugs(args, args.config.linear_decay)
        many = {"seeds": args.seeds, "seed": args.seed, "device": args.device}
        self.agent = SelfTuning(env, args.config, learned=args.learned, outer=args.outer, **many, **plugged)  # type: ignore[arg-type]
        self.agent.config.check_learns(math.ceil(args.steps / self.agent.per_update))
        taken = [slot for slot in SLOTS if plugged[slot] is not None]
        space = self.agent.family.observation_space
        slots = self.agent.algorithm.slots
        usual = usual_settings(args.preset, {slot: part for slot, part in slots.items() if slot in taken}, space)
        check_settings(args.config, usual, slots, taken, space)
        defaults = SelfTuningConfig(), SelfTuningConfig.suited(space)
        if not self.agent.learned and args.learned != [] and args.outer not in defaults:
            raise UserError(
                "--outer and --estimator say how parts are learned online, and none is: expected --self-tune, or a "
                "part that is made for it, such as --reward lirpg."
            )
        self.earned = self.agent.lifetimes.earned  # where the last point of the learning curve was
        self.steps: list[int] = []
        self.returns: list[np.ndarray] = []  # [seeds] at each of the steps
        self.began, self.first = time.perf_counter(), 0
        self.unlogged: list[dict[str, float]] = []  # metrics of each update since the last record
        self.logged = 0  # environment steps then

    def method(self) -> str:
        """Name of what runs: the objective or preset, and whatever is learned online."""
        base = self.args.preset or "ppo"
        parts = dict(self.agent.algorithm.slots.items())
        if (named := self.args.objective) is not None:
            path = Path(named)
            base = path.stem if path.name != ARTIFACT else f"{parts['objective'].name}-{path.resolve().parent.name}"
        if self.args.objective in components() and any(True for _ in parts["objective"].parameters()):
            base += "-untrained"  # by its name alone a learned objective has fresh weights
        return "+".join([base, *(parts[slot].name for slot in self.agent.learned if slot != "objective")])

    def marks(self) -> list[int]:
        """Environment steps at which the agents are still to be evaluated: at whole updates."""
        per_update = self.agent.per_update
        even = np.linspace(0, self.args.steps, self.args.checkpoints + 1)
        marks = (np.unique(np.ceil(even / per_update).astype(int)) * per_update).tolist()
        return [mark for mark in marks[self.agent.family.continuing :] if self.ahead(mark)]

    def ahead(self, mark: int) -> bool:
        """Whether the learning curve has not come so far; a window of several updates may pass a mark."""
        return not self.steps or self.steps[-1] < mark

    def resume(self) -> None:
        """Continue from the checkpoint, or from the beginning where none was saved yet."""
        saved = self.run.load_checkpoint()
        if saved is not None:
            self.agent.load_state_dict(under("agent", saved))  # type: ignore[arg-type]
            self.steps, self.returns = saved["steps"].tolist(), list(saved["returns"].numpy())  # type: ignore[union-attr]
            self.earned = saved["earned"]  # type: ignore[assignment]
        self.first = self.logged = self.agent.steps
        self.run.rewind(self.first if saved else -1)

    def checkpoint(self) -> None:
        state = {f"agent/{k}": v for k, v in self.agent.state_dict().items()}
        returns = np.stack(self.returns) if self.returns else np.empty((0, self.args.seeds))
        state |= {"steps": torch.tensor(self.steps), "returns": torch.as_tensor(returns), "earned": self.earned}
        self.run.save_checkpoint(state)

    def log(self, done: int, metrics: dict[str, float]) -> dict[str, float | str] | None:
        """Record one update after which each seed has taken `done` environment steps; what to show of it, if anything.

        A long run of short updates records means over several of them, `ROWS` in all.
        """
        self.unlogged.append(metrics)
        last = self.logged + self.args.steps // ROWS
        return self.flush(done) if done >= last else None

    def flush(self, done: int) -> dict[str, float | str] | None:
        """Record what was not yet, as means."""
        if not self.unlogged:
            return None
        rows, self.unlogged, self.logged = self.unlogged, [], done
        means = {}
        for name in dict.fromkeys(name for row in rows for name in row):
            known = [row[name] for row in rows if math.isfinite(row.get(name, math.nan))]
            means[name] = sum(known) / len(known) if known else math.nan
        named = {k: v for k, v in means.items() if "/" in k}  # by whoever logs it
        ours = sb3_tags({k: v for k, v in means.items() if k not in named})
        config = self.args.config
        rate = (done - self.first) * self.args.seeds / (time.perf_counter() - self.began)
        updates = max(done // self.agent.per_update - config.collects, 0)
        passes = updates * config.n_epochs  # over the data, as over there
        self.run.log(done, {"time/fps": rate, "train/n_updates": passes} | ours | named)
        shown = "reward" if self.agent.family.continuing else "return"
        return {shown: means[shown], "steps/s": round(rate)}

    def evaluate(self) -> None:
        """Add a point to the learning curve, and save it: returns of fresh episodes, or, where episodes do not end, the
        reward per environment step since the last point."""
        self.flush(self.agent.steps)
        if self.agent.family.continuing:
            since = self.steps[-1] if self.steps else 0
            scores = (self.agent.lifetimes.earned - self.earned) / (self.agent.steps - since)
            self.earned = self.agent.lifetimes.earned
        else:
            scores = self.agent.evaluate(self.args.episodes)
        self.steps.append(self.agent.steps)
        self.returns.append(scores.cpu().double().numpy())
        self.run.log(self.agent.steps, {"eval/mean_reward": float(scores.mean())})
        self.checkpoint()

    def save_parts(self) -> None:
        """Write what was learned online: a component file for each slot and seed."""
        for slot in self.agent.learned:
            for i in range(self.args.seeds):
                told = {"env": self.env, "environment_steps": self.agent.steps, "seed": self.args.seed, "agent": i}
                path = self.run.path / PARTS / f"{slot}-{i}{artifacts.SUFFIX}"
                artifacts.save(self.agent.component(slot, i), path, told | {"version": __version__})


def train(env: str, args: Train, command: list[str]) -> Path:
    """Train, evaluate along the way, write the report; returns its path.

    Raises:
        UserError: settings that cannot be, a folder that cannot be used, a run in which nothing that was to be learned
                   moved.
    """
    session = _Session(env, args)  # before the folder: what cannot be built leaves none
    method = args.label or session.method()
    out = args.out or default_folder("runs", f"{method}-{env.replace('/', '-')}", args.seed)
    settings = {"env": env} | {k: v for k, v in vars(args).items() if k not in ("out", "resume", "device", "label")}
    settings["sha256"] = file_digests(args)  # a file written anew is another part
    run = session.run = Run.create(out, command=command, config=settings, seed=args.seed, resume=args.resume)
    if args.resume:
        session.resume()
    bar = Progress(args.steps, "environment steps", done=session.first)
    with run, holding_interrupts() as interrupted, bar as progress:

        def save_if_interrupted() -> None:
            if interrupted():
                session.flush(session.agent.steps)
                session.checkpoint()
                raise KeyboardInterrupt(run.path)

        def log(done: int, metrics: dict[str, float]) -> None:
            if (fields := session.log(done, metrics)) is not None:
                progress.update(min(done, args.steps), **fields)
            save_if_interrupted()

        for mark in filter(session.ahead, session.marks()):
            session.agent.learn(mark, log, schedule=args.steps)
            session.evaluate()
            save_if_interrupted()
    session.save_parts()
    curves = Curves(np.array(session.steps), np.stack(session.returns)[:, None])
    suite = f"{env}, reward per step" if session.agent.family.continuing else env
    append_scores(run.path / SCORES, suite, method, curves, None)
    report = conclude(run.path, FIGURE)
    if session.agent.outer is not None:
        session.agent.outer.check_moved()
    return report


PRESETS = ("a2c",)


def suited(env: str, words: Sequence[str], estimator: str | None = None) -> Train:
    """Defaults of the options: the settings that suit the objective or the preset that the words name.

    The settings decide what their own options' defaults are, so these options are read first.
    """
    options = ("--preset", "--self-tune", "--learn", *(f"--{slot}" for slot in SLOTS))
    named = {option: early_option(option, "a value", words)[0] for option in options}
    space = make_family(env).observation_space
    if named["--self-tune"] is not None:
        named["--hyperparameters"] = named["--hyperparameters"] or "self_tuned"
    parts = {slot: artifacts.get(name) for slot in SLOTS if (name := named[f"--{slot}"]) is not None}
    chosen = Plugged(learn=named["--learn"]).learned
    rates = [p.outer_rate for slot, p in parts.items() if (p.online if chosen is None else slot in chosen)]
    outer = SelfTuningConfig.suited(space, estimator, min(rates, default=SelfTuningConfig.learning_rate))
    return Train(config=usual_settings(named["--preset"], parts, space), outer=outer)


def usual_settings(preset: str | None, parts: Mapping[str, Component], observation_space: Space) -> PPOConfig:
    """The settings for a user who names none beside these parts, slot -> component.

    Raises:
        UserError: no such preset.
    """
    if preset is not None:
        if preset not in PRESETS:
            raise unknown("preset", preset, PRESETS)
        return PPOConfig.a2c()
    objective, rule = parts.get("objective"), parts.get("optimizer")
    return PPOConfig.suited(
        objective if isinstance(objective, Objective) else None,
        observation_space,
        rule if isinstance(rule, UpdateRule) else None,
    )

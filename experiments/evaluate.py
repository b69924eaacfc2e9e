"""`learned-rl evaluate FILE --family NAME`: a learned objective beside hand-made ones, on tasks nobody trained on.

Every method gets agents of the same architecture, the same environment steps in each lifetime, and the same number of
tuning trials on validation tasks.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gymnasium.spaces import Discrete

from experiments.options import usable_device
from experiments.report import Unit, append_scores, print_table, read_scores, summary_table, write_report
from experiments.runs import SCORES, Progress, Run, default_folder
from experiments.scores import Scorer
from experiments.tuning import Tuned, tune
from learned_rl import artifacts
from learned_rl.component import Hyper, Objective
from learned_rl.evaluation import learning_curves
from learned_rl.ppo import Algorithm, PPOConfig, Slots
from learned_rl.registry import components, make_family
from learned_rl.tasks.base import TaskFamily, unknown
from learned_rl.types import UserError, at_least
from objectives.dpo import DPO

BASELINES = ("a2c", "a2c-norm", "ppo", "dpo", "untrained")


@dataclass(frozen=True)
class Evaluate:
    """Compare a learned objective with hand-made ones on held-out tasks."""

    family: str | None = None
    """task family as `name/preset`, or a gymnasium id; default: the one the file was trained on"""
    baselines: str = "a2c,ppo,untrained"
    """comma-separated: a2c, a2c-norm (a2c with normalised advantages), ppo, dpo, untrained"""
    tasks: int = 64
    """held-out tasks"""
    seeds: int = 4
    """agents on each task"""
    updates: int | None = None
    """agent updates of the learned method in a lifetime; default: as in meta-training. Others get as many environment
    steps"""
    trials: int = 48
    """Optuna trials for each method that is tuned; 0: default settings"""
    tune_learned: bool = True
    """whether the learned method has as many trials as the others, for its agents' step size and prediction weight"""
    tuning_tasks: int = 32
    """validation tasks on which trials are scored"""
    checkpoints: int = 10
    """points of a learning curve after the first"""
    episodes: int = 32
    """fresh episodes of each agent at each point"""
    out: Path | None = None
    """run folder; default: runs/evaluate-FAMILY__seedN__TIME"""
    seed: int = 0
    """of tasks and agents"""
    device: str = "cpu"
    """torch device"""

    def __post_init__(self) -> None:
        names = ("tasks", "seeds", "updates", "tuning_tasks", "checkpoints", "episodes")
        at_least(1, **{name: getattr(self, name) for name in names})
        at_least(0, trials=self.trials, seed=self.seed)
        usable_device(self.device)


@dataclass(frozen=True)
class Method:
    """A competitor: its algorithm, its lifetime, and whether its numbers are searched for."""

    name: str
    config: PPOConfig
    objective: Objective | None
    horizon: int
    tuned: bool

    def algorithm(self, **numbers: float) -> Algorithm:
        config = dataclasses.replace(self.config, hyper=self.config.hyper.replace(**numbers))
        return Algorithm(config, Slots.fill(config, objective=self.objective))


def _methods(path: Path, family: TaskFamily, args: Evaluate) -> list[Method]:
    header = artifacts.read_header(path)
    learned = artifacts.load(path)
    if not isinstance(learned, Objective):
        raise UserError(f"{path} holds a component of the slot {learned.slot!r}: evaluate expects an objective.")
    provenance = header["provenance"]
    tabular = isinstance(family.observation_space, Discrete)
    config = PPOConfig.suited(learned, family.observation_space)
    updates = args.updates or _default_updates(provenance, config)
    budget = updates * config.n_envs * config.n_steps
    optimizer = "sgd" if tabular else "adam"
    a2c = PPOConfig.a2c(n_envs=config.n_envs, n_steps=config.n_steps, optimizer=optimizer)
    ppo = PPOConfig(n_envs=config.n_envs, n_steps=config.n_steps, hyper=Hyper(learning_rate=0.05 if tabular else 3e-4))
    a2c = dataclasses.replace(a2c, hyper=a2c.hyper.replace(learning_rate=80.0)) if tabular else a2c
    untrained = components()[header["component"]].from_config(header["config"])
    assert isinstance(untrained, Objective)
    known = {
        "a2c": (a2c, None),
        "a2c-norm": (dataclasses.replace(a2c, normalize_advantage=True), None),
        "ppo": (ppo, None),
        "dpo": (ppo, DPO()),
        "untrained": (config, untrained),
    }
    chosen = [Method(learned.name, config, learned, updates, args.tune_learned)]
    for name in filter(None, args.baselines.split(",")):
        if name not in known:
            raise unknown("baseline", name, known)
        settings, objective = known[name]
        chosen.append(Method(name, settings, objective, budget // (settings.n_envs * settings.n_steps), True))
    return chosen


def _default_updates(provenance: dict[str, Any], config: PPOConfig) -> int:
    horizon = provenance.get("horizon", 100)
    return int(horizon[1] if isinstance(horizon, list) else horizon)


def evaluate(path: Path, args: Evaluate, command: list[str]) -> Path:
    """Run the comparison; returns the run folder with scores, tables and report."""
    header = artifacts.read_header(path)
    name = args.family or header["provenance"].get("family")
    if name is None:
        raise UserError(f"{path} does not say on which family it was trained: name one with --family.")
    family = make_family(name)
    torch.manual_seed(args.seed)  # initial weights of the untrained component
    methods = _methods(path, family, args)
    out = args.out or default_folder("runs", f"evaluate-{name.replace('/', '-')}", args.seed)
    settings = dataclasses.asdict(args) | {"file": str(path), "component": header["component"]}
    run = Run.create(out, command=command, config=settings, seed=args.seed)
    scorer = Scorer(family, "test", args.tasks, args.seed)
    with run:
        if args.trials:
            tuned = _tune_all(family, methods, args)
            run.write_json("tuned.json", {k: dataclasses.asdict(v) for k, v in tuned.items()})
        else:
            tuned = {}
        total = sum(m.horizon for m in methods)
        with Progress(total, "updates") as progress:
            done = 0
            for method in methods:
                numbers = tuned[method.name].hyper if method.name in tuned else {}

                def show(update: int, horizon: int, done: int = done, method: Method = method) -> None:
                    progress.update(done + update, method=method.name)

                curves = learning_curves(
                    family,
                    method.algorithm(**numbers),
                    method.horizon,
                    tasks=args.tasks,
                    seeds=args.seeds,
                    seed=args.seed,
                    checkpoints=args.checkpoints,
                    episodes=args.episodes,
                    device=args.device,
                    progress=show,
                )
                done += method.horizon
                scored = (scorer(curves), scorer.kept) if scorer.exact else (None, None)
                append_scores(run.path / SCORES, name, method.name, curves, *scored)
    baseline = methods[1].name if len(methods) > 1 else None
    scores = read_scores(run.path / SCORES)
    unit: Unit = "score" if scorer.exact else "return"
    print_table(summary_table(scores, baseline, unit), baseline, unit)
    return write_report([run.path], run.path / "report.html", baseline)


def _tune_all(family: TaskFamily, methods: list[Method], args: Evaluate) -> dict[str, Tuned]:
    """Search the numbers of every method that is tuned, each with the same number of trials."""
    scorer = Scorer(family, "validation", args.tuning_tasks, args.seed)
    found: dict[str, Tuned] = {}
    to_tune = [m for m in methods if m.tuned]
    with Progress(args.trials * len(to_tune), "trials") as progress:
        for i, method in enumerate(to_tune):

            def show(done: int, total: int, i: int = i, method: Method = method) -> None:
                progress.update(i * args.trials + done, tuning=method.name)

            found[method.name] = tune(
                family,
                method.algorithm(),
                method.horizon,
                scorer.final,
                trials=args.trials,
                tasks=args.tuning_tasks,
                seed=args.seed,
                progress=show,
            )
    return found

"""`learned-rl meta-train RECIPE`: meta-train a component, keep the best by validation, leave a folder that resumes.

Under `torchrun` each process trains its share of the lifetimes. Only the first one has the run folder: it logs,
validates, saves, and decides when to stop; the others follow.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gymnasium.spaces import Discrete
from rich.console import Console

from experiments.figures import save_figure
from experiments.interrupt import holding_interrupts
from experiments.options import usable_device
from experiments.recipes import Recipe
from experiments.report import metrics_figure
from experiments.runs import ARTIFACT, Checkpoint, Progress, Run, default_folder, plain
from experiments.scores import Scorer
from learned_rl import __version__, artifacts
from learned_rl.evaluation import Curves, iqm, learning_curves
from learned_rl.lifetimes import under
from learned_rl.registry import make_family
from learned_rl.tasks.base import Split, TaskFamily
from learned_rl.types import Tree, at_least
from meta_optimizers.group import Group, Processes
from meta_optimizers.trainer import MetaTrainer

FIGURE = Path("figures") / "training.png"
FIRST_FIGURE = 20  # meta-steps: something to look at long before the first validation
EXTENSIBLE = ("minutes", "meta_steps", "checkpoint_every")  # when to stop and to save: nothing that is learned


@dataclass(frozen=True)
class MetaTrain:
    """Meta-train a component on a task family. --config FILE takes settings from a file, such as
    the best.toml of `learned-rl tune`; options given beside it win."""

    recipe: Recipe
    """what to meta-train, on what, with which settings"""
    out: Path | None = None
    """run folder; default: runs/RECIPE__seedN__TIME"""
    seed: int = 0
    """from which every random stream derives"""
    resume: bool = False
    """continue the run in --out from its checkpoint"""
    device: str = "cpu"
    """torch device"""

    def __post_init__(self) -> None:
        at_least(0, seed=self.seed)
        usable_device(self.device)


class _Session:
    """A meta-training run: trainer, the best component so far, and in the first process the folder."""

    run: Run

    def __init__(self, args: MetaTrain, group: Group) -> None:
        self.recipe, self.seed = args.recipe, args.seed
        self.family = make_family(args.recipe.family)
        torch.manual_seed(args.seed)  # initial weights of the component; everything else has streams of its own
        component = args.recipe.make_component()
        device, self.group = group.device(args.device), group
        self.trainer = MetaTrainer(self.family, component, args.recipe.train, args.seed, device, group=group)
        self.scorer = Scorer(self.family, "validation", args.recipe.validation_tasks)
        self.best, self.validated = float("-inf"), -1
        self.elapsed, self.began = 0.0, time.monotonic()

    @property
    def seconds(self) -> float:
        """Wall time of this run, over all its starts."""
        return self.elapsed + time.monotonic() - self.began

    def step(self) -> dict[str, float | str]:
        """One meta-step, logged; returns what to show of it."""
        before, tick = self.trainer.environment_steps, time.perf_counter()
        metrics = self.trainer.step()
        rate = (self.trainer.environment_steps - before) / (time.perf_counter() - tick)
        if self.group.first:
            self.run.log(self.trainer.steps, _tags(metrics))
        loss = metrics.get("loss", float("nan"))
        return {"return": metrics["return"], "meta_loss": loss, "steps/s": round(rate)}

    def validate(self) -> float:
        """Let fresh agents live on validation tasks; save the component if none so far was better.

        Returns their score at the end of life; not a number but in the first process, where alone they live.
        """
        trainer, recipe = self.trainer, self.recipe
        self.validated = trainer.steps
        if not self.group.first:
            return float("nan")
        scored = self.scorer(fresh_lives(recipe, self.family, trainer, "validation", recipe.validation_tasks))
        final, area = iqm(scored.final), iqm(scored.area)
        score = (final + area) / 2
        if score >= self.best or not (self.run.path / ARTIFACT).exists():
            self.best = score if np.isfinite(score) else self.best
            artifacts.save(self.trainer.component, self.run.path / ARTIFACT, self._provenance(final, area))
        self.run.log(trainer.steps, {"meta/heldout_return": final, "meta/heldout_area": area} | self._spent())
        self.draw()
        return final

    def _spent(self) -> dict[str, float]:
        """What the component has cost so far."""
        return {"meta/environment_steps": float(self.trainer.environment_steps), "meta/minutes": self.seconds / 60}

    def draw(self) -> None:
        """Training curves so far."""
        if self.group.first:
            save_figure(metrics_figure(self.run.path), self.run.path / FIGURE)

    def _provenance(self, final: float, area: float) -> dict[str, object]:
        recipe = self.recipe
        values = {
            "recipe": recipe.name,
            "family": recipe.family,
            "horizon": recipe.train.horizon,
            "agent": recipe.train.agent,
            "tabular": isinstance(self.family.observation_space, Discrete),
            "meta_steps": self.trainer.steps,
            "environment_steps": self.trainer.environment_steps,
            "minutes": round(self.seconds / 60, 2),
            "seed": self.seed,
            "validation": {
                "final": final,
                "area": area,
                "tasks": recipe.validation_tasks,
                "updates": recipe.validation_updates or self.trainer.lifetimes.horizon_range[1],
            },
            "version": __version__,
        }
        if earlier := self.trainer.component.provenance:
            values["continues"] = {"file": recipe.component} | earlier
        return plain(values)

    def checkpoint(self) -> None:
        """Save the state of all processes; each of them must come here."""
        state: Tree = {f"trainer/{k}": v for k, v in self.trainer.state_dict().items()}
        own: Checkpoint = {"best": self.best, "validated": self.validated, "elapsed": self.seconds}
        if self.group.first:
            self.run.save_checkpoint({**state, **own})

    def open(self, args: MetaTrain, command: list[str]) -> tuple[Path, Checkpoint | None]:
        """Begin the run in its folder, or find it there; the folder, and the checkpoint if one was saved yet."""
        folder = args.out or default_folder("runs", self.recipe.name, self.seed)
        config = plain(self.recipe)
        config["train"]["estimator"]["name"] = self.trainer.estimator.name  # two may have the same settings
        self.run = Run.create(
            folder, command=command, config=config, seed=self.seed, resume=args.resume, free=EXTENSIBLE
        )
        saved = self.run.load_checkpoint() if args.resume else None
        if args.resume:
            self.run.rewind(int(saved["trainer/steps"]) if saved else -1)
        return self.run.path, saved

    def resume(self, saved: Checkpoint) -> None:
        """Continue from a checkpoint."""
        self.trainer.load_state_dict(under("trainer", saved))  # type: ignore[arg-type]
        self.best, self.validated = float(saved["best"]), int(saved["validated"])
        self.elapsed = float(saved["elapsed"])


def fresh_lives(
    recipe: Recipe, family: TaskFamily, trainer: MetaTrainer, split: Split, tasks: int, seed: int = 0
) -> Curves:
    """One fresh agent on each of some held-out tasks, with the component as it is now, to the end of its life."""
    return learning_curves(
        family,
        trainer.algorithm,
        recipe.validation_updates or trainer.lifetimes.horizon_range[1],
        tasks=tasks,
        seeds=1,
        split=split,
        seed=seed,
        checkpoints=5,
        episodes=8,
        device=trainer.lifetimes.device,
    )


def meta_train(args: MetaTrain, command: list[str], group: Group | None = None) -> Path:
    """Run the recipe to its end; returns the component's file.

    Args:
        group: the processes over which the lifetimes are spread; each of them must come here.

    Raises:
        UserError: settings that cannot be, a folder that cannot be used, a process that is lost, a run in which no
                   meta-gradient was finite.
        KeyboardInterrupt: it was interrupted, and saved; in processes that follow another, SystemExit.
    """
    recipe, group = args.recipe, group or Group()
    session = group.together(lambda: _Session(args, group))  # before the folder: what cannot be built leaves none
    folder, saved = group.told(lambda: session.open(args, command))
    if saved is not None:
        session.resume(saved)
    trainer = session.trainer
    console = Console(quiet=not group.first)
    bar = Progress(recipe.meta_steps, "meta-steps", done=trainer.steps, console=console)
    with session.run if group.first else nullcontext(), _interrupts(group) as interrupted, bar as progress:
        fields: dict[str, float | str] = {}
        if session.validated < 0:
            fields["held_out"] = session.validate()  # what fresh weights do
        while trainer.steps < recipe.meta_steps and not group.agreed(session.seconds >= recipe.minutes * 60):
            fields |= session.step()
            if trainer.steps % recipe.validate_every == 0 or trainer.steps == recipe.meta_steps:
                fields["held_out"] = session.validate()
            elif trainer.steps == FIRST_FIGURE:
                session.draw()
            if trainer.steps % recipe.checkpoint_every == 0:
                session.checkpoint()
            progress.update(trainer.steps, **fields)
            if group.agreed(interrupted()):
                session.checkpoint()
                raise KeyboardInterrupt(folder) if group.first else SystemExit(130)
        if session.validated != trainer.steps:
            session.validate()
        session.checkpoint()
    trainer.check_moved()
    if group.first:
        kept = artifacts.read_header(folder / ARTIFACT)["provenance"]["meta_steps"]
        console.print(f"best on validation tasks: after {kept} meta-steps")
    return folder / ARTIFACT


def _interrupts(group: Group) -> AbstractContextManager[Callable[[], bool]]:
    """Whether somebody wants this process to end."""
    return nullcontext(group.asked) if isinstance(group, Processes) else holding_interrupts()


def _tags(metrics: dict[str, float]) -> dict[str, float]:
    """Outer-loop numbers under meta/, what the agents score and do under inner/, learned numbers by their own names."""
    named = {k.replace("agent/", "inner/"): v for k, v in metrics.items() if "/" in k}
    inner = {"return", "final_return"}
    return {f"{'inner' if k in inner else 'meta'}/{k}": v for k, v in metrics.items() if "/" not in k} | named

"""`learned-rl pbt ALGORITHM`: population based training; leaves a schedule that `train --hyperparameters` replays."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments.config_file import write_config
from experiments.figures import COLOURS, count_axis, panels, save_figure
from experiments.options import listed, usable_device
from experiments.report import append_scores, conclude
from experiments.runs import CONFIG, SCORES, Progress, Run, default_folder, plain
from experiments.tuning.agents import AgentStudy, check_read
from experiments.tuning.pbt import PBTConfig, PBTResult, population_based_training
from learned_rl import artifacts
from learned_rl.component import NUMBERS
from learned_rl.files import replacing
from learned_rl.ppo import Algorithm, Slots
from learned_rl.spaces import LogNegative, LogOneMinus, LogUniform, Space
from learned_rl.types import UserError, at_least

LOGARITHMIC = (LogUniform, LogOneMinus, LogNegative)
SHAPE = ("tasks", "seeds", "episodes", "test_tasks", "test_seeds")
CONFIGURED, REPLAYED = "configured", "schedule"
SCHEDULE, CONFIGURATION, HISTORY = "schedule.safetensors", "config.toml", "population.csv"
FIGURE, CURVES = Path("figures") / "study_schedule.png", Path("figures") / "learning_curves.png"


@dataclass(frozen=True)
class Pbt:
    """Agents learn side by side; the worst go on as copies of the best, with their numbers perturbed."""

    env: str | None = None
    """gymnasium id or task family"""
    steps: int | None = None
    """environment steps of each agent's life; default: 50000"""
    parameters: str | None = None
    """comma-separated numbers to schedule, such as learning_rate,ent_coef; default: all that the algorithm reads"""
    population: PBTConfig = field(default_factory=PBTConfig)
    """how members are selected"""
    tasks: int | None = None
    """validation tasks; default: 32 of a family, 1 of a gymnasium id"""
    seeds: int | None = None
    """agents of each member on each task; default: 1, on a gymnasium id 8"""
    episodes: int | None = None
    """fresh episodes of each agent at each selection; default: 8"""
    test_tasks: int | None = None
    """test tasks for the schedule and for the configured numbers; default: 64 of a family, 1 of a gymnasium id"""
    test_seeds: int | None = None
    """agents on each; default: 4, on a gymnasium id 32"""
    out: Path | None = None
    """run folder; default: runs/pbt-ALGORITHM-ENV__seedN__TIME"""
    seed: int = 0
    """of tasks, agents and selection"""
    device: str = "cpu"
    """torch device"""

    def __post_init__(self) -> None:
        numbers = {name: getattr(self, name) for name in (*SHAPE, "steps")}
        at_least(1, **numbers)
        usable_device(self.device)


def pbt(algorithm: str, args: Pbt, command: list[str]) -> Path:
    """Train the population, replay its schedule on test tasks beside the configured numbers; returns the report."""
    if args.env is None:
        raise UserError(f"pbt {algorithm} needs an environment: name a gymnasium id or task family with --env.")
    shape = {name: value for name in SHAPE if (value := getattr(args, name)) is not None}
    agents = AgentStudy.of(algorithm, args.env, args.steps, args.device, seed=args.seed, **shape)
    spaces = _numbers(agents, args)
    out = args.out or default_folder("runs", f"pbt-{Path(algorithm).stem}-{args.env}", args.seed)
    if (out / CONFIG).exists():
        raise UserError(f"{out} already holds a run, and a population is not continued: choose another --out.")
    config = {"algorithm": algorithm, "settings": agents.settings, "spaces": {k: repr(v) for k, v in spaces.items()}}
    config |= {k: v for k, v in vars(args).items() if k not in ("out", "device")}
    with Run.create(out, command=command, config=config, seed=args.seed) as run:
        result = _train(agents, spaces, args)
        schedule = result.component()
        artifacts.save(schedule, out / SCHEDULE, _provenance(agents, args, result))
        write_config(
            out / CONFIGURATION, agents.settings, f"what {SCHEDULE} was found with, and is to be replayed with"
        )
        _write_history(result, out / HISTORY)
        save_figure(schedule_figure(result, spaces), out / FIGURE)
        for step, scores in zip(result.steps, result.scores, strict=True):
            run.log(int(step), {"pbt/best": np.nanmax(scores), "pbt/median": np.nanmedian(scores)})
        for method, plugged in ((CONFIGURED, {}), (REPLAYED, {"hyperparameters": schedule})):
            print(f"test: {method} numbers on unseen tasks and seeds", flush=True)
            tested = agents.test(agents.settings, **plugged)
            append_scores(out / SCORES, args.env, method, tested.returns, tested.scores, tested.kept)
    return conclude(out, CURVES, CONFIGURED)


def _numbers(agents: AgentStudy, args: Pbt) -> dict[str, Space]:
    """Name of each scheduled number -> its space."""
    study = agents.study(str(args.env))
    chosen = study.select(listed(args.parameters)) if args.parameters else study.spaces
    check_read(chosen, agents.settings.config, agents.objective, agents.family.observation_space)
    numbers = {path.rpartition(".")[2]: space for path, space in chosen.items() if path.startswith("config.hyper.")}
    for path in chosen:
        if args.parameters and not path.startswith("config.hyper."):
            raise UserError(f"{path} cannot change while agents learn: choose from {', '.join(NUMBERS)}.")
    return numbers


def _train(agents: AgentStudy, spaces: dict[str, Space], args: Pbt) -> PBTResult:
    config = agents.settings.config
    algorithm = Algorithm(config, Slots.fill(config, objective=agents.objective))
    horizon = agents.settings.horizon
    with Progress(horizon, "updates") as bar:

        def show(update: int, total: int) -> None:
            bar.update(update)

        return population_based_training(
            agents.family,
            algorithm,
            horizon,
            spaces,
            args.population,
            tasks=agents.tasks,
            seeds=agents.seeds,
            seed=args.seed,
            episodes=agents.episodes,
            device=args.device,
            progress=show,
        )


def _provenance(agents: AgentStudy, args: Pbt, result: PBTResult) -> dict[str, object]:
    return {
        "family": args.env,
        "algorithm": agents.algorithm,
        "horizon": agents.settings.horizon,
        "environment_steps": result.total_steps,
        "evaluation_episodes": result.evaluation_episodes,
        "population": plain(args.population),
        "seed": args.seed,
    }


def _write_history(result: PBTResult, path: Path) -> None:
    """A row for each member in each interval: environment steps, member, parent, score, numbers."""
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["step", "member", "parent", "score", *result.numbers])
    for (i, m), score in np.ndenumerate(result.scores):
        numbers = [repr(float(values[i, m])) for values in result.numbers.values()]
        rows.writerow([int(result.steps[i]), m, int(result.parents[i, m]), repr(float(score)), *numbers])
    with replacing(path) as file:
        file.write(table.getvalue().encode())


def schedule_figure(result: PBTResult, spaces: dict[str, Space]) -> Figure:
    """A panel for each number, in the coordinate that was searched, and one for the score: the best member's lineage
    over all other members."""
    names, schedule, edges = list(spaces), result.schedule(), np.concatenate([[0], result.steps])
    figure, axes = panels(len(names) + 1)
    at = result.lineage()
    for ax, name in zip(axes[:-1], names, strict=True):
        space = spaces[name]
        every = np.vectorize(space.encode)(result.numbers[name])
        mine = np.vectorize(space.encode)(schedule[name])
        for member in every.T:
            ax.stairs(member, edges, baseline=None, color="#9aa5b1", alpha=0.35, lw=0.8)
        ax.stairs(mine, edges, baseline=None, color=COLOURS[1], lw=2)
        ax.set(
            title=space.key(name),
            yscale="log" if isinstance(space, LOGARITHMIC) else "linear",
            xlabel="environment steps",
        )
    axes[-1].plot(result.steps, result.scores, color="#9aa5b1", alpha=0.35, lw=0.8)
    lineage = result.scores[np.arange(len(at)), at]
    axes[-1].plot(result.steps, lineage, color=COLOURS[1], lw=2, label="best member and its ancestors")
    axes[-1].set(title="score", xlabel="environment steps of one lifetime")
    for ax in axes:
        count_axis(ax)
    figure.legend(loc="outside lower center", frameon=False)
    return figure

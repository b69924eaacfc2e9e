"""`learned-rl evaluate FILE --family NAME`: a learned objective or optimizer beside hand-made ones, on held-out tasks.

Every method gets agents of the same architecture, the same environment steps in each lifetime, and the same number of
tuning trials on validation tasks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import optuna
import torch
from gymnasium.spaces import Discrete

from experiments.config_file import read_config, write_config
from experiments.options import listed, usable_device
from experiments.plugs import check_settings
from experiments.report import Scores, Unit, append_scores, conclude, read_scores
from experiments.runs import SCORES, Progress, Run, default_folder
from experiments.scores import Scorer
from experiments.tuning.agents import HAND_MADE, OF_EVALUATION, AgentSettings, AgentStudy, agent_space, competitor
from experiments.tuning.samplers import SearchConfig
from experiments.tuning.study import Search
from learned_rl import artifacts
from learned_rl.component import Component, Objective, UpdateRule
from learned_rl.evaluation import iqm, learning_curves
from learned_rl.ppo import Algorithm, PPOConfig, Slots
from learned_rl.registry import components, make_family
from learned_rl.tasks.base import TaskFamily, unknown
from learned_rl.types import UserError, at_least
from learned_rl.update_rules import RULES

TUNED = "tuned"  # folder of each method's best settings, as `train --config` takes them
STUDIES = "studies.db"
FIGURE = Path("figures") / "learning_curves.png"
UNTRAINED = "untrained"
BASELINES = (*HAND_MADE, UNTRAINED)
#: What each kind of component is compared with unless told otherwise.
BASELINES_OF = {"objective": "a2c,ppo,untrained", "optimizer": "adam,rmsprop,untrained"}


@dataclass(frozen=True)
class Evaluate:
    """Compare a learned objective or optimizer with hand-made ones on held-out tasks."""

    family: str | None = None
    """task family as `name/preset`, or a gymnasium id; default: the one the file was trained on"""
    baselines: str | None = None
    """comma-separated. Of an objective: a2c, a2c-norm (a2c with normalised advantages), ppo, dpo, untrained, files of
    other objectives; default: a2c,ppo,untrained. Of an optimizer, which moves the same agents: sgd, momentum, rmsprop,
    adam, untrained, files of other learned optimizers; default: adam,rmsprop,untrained"""
    tasks: int = 64
    """held-out tasks"""
    seeds: int = 4
    """agents on each task"""
    updates: int | None = None
    """agent updates of the learned method in a lifetime; default: as in meta-training, where the file tells. Others get
    as many environment steps"""
    n_envs: int | None = None
    """parallel copies of the environment in each lifetime; default: as in meta-training"""
    baseline_envs: int | None = None
    """copies of the environment for an objective's baselines other than untrained, where theirs should be others: who
    updates from fewer copies updates more often on as many environment steps"""
    config: Path | None = None
    """file whose config table has settings of the learned method's agents, as the best.toml of `learned-rl tune`;
    default: those that suit it"""
    trials: int = 48
    """Optuna trials for each method that is tuned; 0: default settings"""
    tune_learned: bool = True
    """whether the learned method has as many trials as the others, for those numbers of theirs that it reads"""
    tuning_tasks: int = 32
    """validation tasks on which trials are scored"""
    checkpoints: int = 10
    """points of a learning curve after the first"""
    episodes: int = 32
    """fresh episodes of each agent at each point"""
    out: Path | None = None
    """run folder; default: runs/evaluate-FAMILY__seedN__TIME"""
    resume: bool = False
    """continue the run in --out: methods that are tuned or evaluated already are left as they are"""
    seed: int = 0
    """of tasks and agents"""
    device: str = "cpu"
    """torch device"""

    def __post_init__(self) -> None:
        names = ("tasks", "seeds", "updates", "n_envs", "baseline_envs", "tuning_tasks", "checkpoints", "episodes")
        at_least(1, **{name: getattr(self, name) for name in names})
        at_least(0, trials=self.trials, seed=self.seed)
        usable_device(self.device)


@dataclass(frozen=True)
class Method:
    """A competitor: its algorithm, its lifetime, and whether its numbers are searched for.

    Attributes:
        parts:   slot -> what is plugged into it.
        sources: slot -> name or file of it, where it has one.
        around:  whether its learning rate is searched around the configured one.
    """

    name: str
    config: PPOConfig
    parts: Mapping[str, Component]
    sources: Mapping[str, str]
    horizon: int
    tuned: bool
    around: bool = False

    @property
    def objective(self) -> Objective | None:
        """The plugged one, None for PPO's own."""
        return part if isinstance(part := self.parts.get("objective"), Objective) else None

    @property
    def rule(self) -> UpdateRule | None:
        """The plugged one, None for the config's."""
        return part if isinstance(part := self.parts.get("optimizer"), UpdateRule) else None


def _learned(path: Path) -> Objective | UpdateRule:
    """The learned component in a file."""
    learned = artifacts.load(path)
    if not isinstance(learned, Objective | UpdateRule):
        slots = "expected an objective or an optimizer"
        raise UserError(f"{path} holds a component of the slot {learned.slot!r}: {slots}.")
    return learned


def _methods(learned: Objective | UpdateRule, path: Path, family: TaskFamily, args: Evaluate) -> list[Method]:
    """The competitors, the learned one first."""
    rivals = _of_objectives if isinstance(learned, Objective) else _of_optimizers
    updates = args.updates or _default_updates(learned, path)
    names = args.baselines if args.baselines is not None else BASELINES_OF[learned.slot]
    config = _suited(learned, family)
    if args.config is not None:
        given = read_config(args.config, AgentSettings(config)).config
        slots = Slots.fill(given, **{learned.slot: learned})
        check_settings(given, config, slots, [learned.slot], family.observation_space)
        config = given
    config = dataclasses.replace(config, n_envs=args.n_envs or config.n_envs)
    first = Method(learned.name, config, {learned.slot: learned}, {learned.slot: str(path)}, updates, args.tune_learned)
    chosen = [dataclasses.replace(first, around=isinstance(learned, UpdateRule))]
    for name in dict.fromkeys(listed(names) if names else []):
        if name == UNTRAINED:
            parts = _untrained(learned)
            chosen.append(dataclasses.replace(chosen[0], name=name, parts=parts, sources={}, tuned=True))
        else:
            chosen.append(rivals(name, chosen[0], family, args.baseline_envs))
        if chosen[-1].name in [method.name for method in chosen[:-1]]:
            raise UserError(f"Two methods are called {chosen[-1].name!r}: expected each once.")
    for method in chosen:
        method.config.check_learns(method.horizon)
        if method.horizon < args.checkpoints:
            raise UserError(
                f"{method.name!r} lives for {method.horizon} updates, too few for {args.checkpoints} checkpoints: "
                "expected more --updates, or fewer --checkpoints."
            )
    return chosen


def _suited(learned: Objective | UpdateRule, family: TaskFamily) -> PPOConfig:
    """The settings of its agents."""
    space = family.observation_space
    if isinstance(learned, Objective):
        return PPOConfig.suited(learned, space)
    return PPOConfig.suited(None, space, learned)


def _of_objectives(name: str, first: Method, family: TaskFamily, copies: int | None) -> Method:
    """A baseline of a learned objective: another algorithm, with as many environment steps."""
    if name not in BASELINES and not name.endswith(artifacts.SUFFIX):
        raise unknown("baseline", name, [*BASELINES, f"the {artifacts.SUFFIX} file of another objective"])
    settings, objective = competitor(name, family.observation_space)
    n_envs, updates = copies or first.config.n_envs, first.horizon * first.config.n_envs
    settings = dataclasses.replace(settings, n_envs=n_envs, n_steps=first.config.n_steps)
    if updates % n_envs:
        raise UserError(
            f"baseline_envs is {n_envs}, which does not divide the {first.horizon} updates x {first.config.n_envs} "
            f"copies of {first.name!r}: expected a divisor of {updates}, or another number of updates."
        )
    horizon = updates // n_envs
    if objective is None:
        return Method(name, settings, {}, {}, horizon, True)
    called = name if name == "dpo" else _called(objective, name, first)
    return Method(called, settings, {"objective": objective}, {"objective": name}, horizon, True)


def _of_optimizers(name: str, first: Method, family: TaskFamily, copies: int | None) -> Method:
    """A baseline of a learned optimizer: the same algorithm moved by another rule, hand-made or of another file."""
    if copies is not None:
        raise UserError(f"baseline_envs is {copies}, but an optimizer's baselines move the same agents: expected none.")
    tabular = isinstance(family.observation_space, Discrete)
    if name in RULES:
        networks = {"sgd": 0.1, "momentum": 0.1}.get(name, 1e-3)
        hyper = first.config.hyper.replace(learning_rate={"sgd": 80.0}.get(name, 0.05) if tabular else networks)
        config = dataclasses.replace(first.config, optimizer=name, hyper=hyper)
        return Method(name, config, {}, {}, first.horizon, True, around=True)
    if not name.endswith(artifacts.SUFFIX):
        raise unknown("baseline", name, [*RULES, UNTRAINED, f"the {artifacts.SUFFIX} file of another optimizer"])
    other = _learned(Path(name))
    if not isinstance(other, UpdateRule):
        raise UserError(f"{name} holds a component of the slot {other.slot!r}: expected an optimizer.")
    rate = other.trained_rate(tabular) or first.config.hyper.learning_rate
    config = dataclasses.replace(first.config, hyper=first.config.hyper.replace(learning_rate=rate))
    called = _called(other, name, first)
    return Method(called, config, {"optimizer": other}, {"optimizer": name}, first.horizon, True, around=True)


def _called(other: Component, file: str, first: Method) -> str:
    """Name of the component in a file: its own, beside one of the same kind with that of its folder."""
    return other.name if other.name != first.name else f"{other.name}-{Path(file).resolve().parent.name}"


def _untrained(learned: Component) -> dict[str, Component]:
    """The same component with fresh weights, in its slot."""
    return {learned.slot: components()[learned.name].from_config(vars(learned.config))}


def _default_updates(learned: Component, path: Path) -> int:
    """The longest lifetime of its meta-training."""
    horizon = learned.provenance.get("horizon")
    if horizon is None:
        raise UserError(f"{path} does not say how long lifetimes were in its training: say how many --updates.")
    return int(horizon[1] if isinstance(horizon, list) else horizon)


def evaluate(path: Path, args: Evaluate, command: list[str]) -> Path:
    """Run the comparison; returns the report, beside which lie scores, figure and table."""
    learned = _learned(path)
    name = args.family or learned.provenance.get("family")
    if name is None:
        raise UserError(f"{path} does not say on which family it was trained: name one with --family.")
    family = make_family(name)
    torch.manual_seed(args.seed)  # initial weights of the untrained component
    methods = _methods(learned, path, family, args)
    out = args.out or default_folder("runs", f"evaluate-{name.replace('/', '-')}", args.seed)
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "resume", "device")}
    settings |= {"family": name, "file": str(path), "component": learned.name}
    settings["sha256"] = artifacts.read_header(path)["sha256"]  # a file written anew is another method
    run = Run.create(out, command=command, config=settings, seed=args.seed, resume=args.resume)
    session = _Session(run, name, family, args)
    try:
        with run:
            session.compare(methods, session.tune(methods))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(run.path) from None  # what is finished was saved
    return conclude(out, FIGURE, methods[1].name if len(methods) > 1 else None, session.unit)


class _Session:
    """An evaluation: the folder, the family, what every method is scored on."""

    def __init__(self, run: Run, suite: str, family: TaskFamily, args: Evaluate) -> None:
        self.run, self.suite, self.family, self.args = run, suite, family, args
        self.scorer = Scorer(family, "test", args.tasks, args.seed)
        self.unit: Unit = "score" if self.scorer.exact and self.scorer.kept.any() else "return"

    @property
    def scores(self) -> list[Scores]:
        """Of the methods that are finished."""
        path = self.run.path / SCORES
        return read_scores(path) if path.exists() else []

    def tune(self, methods: list[Method]) -> dict[str, PPOConfig]:
        """Search the numbers of every method that is tuned, each with the same number of trials on the same tasks."""
        args = self.args
        chosen = [method for method in methods if method.tuned and args.trials]
        found = {}
        with Progress(args.trials * len(chosen), "trials") as progress:
            for i, method in enumerate(chosen):

                def show(study: optuna.Study, before: int = i * args.trials, name: str = method.name) -> None:
                    progress.update(before + len(study.get_trials(deepcopy=False)), tuning=name)

                search = self._search(method)
                search.run(show)
                found[method.name] = search.best_settings().config
                if method.name != "untrained":  # whose random weights no file holds
                    about = f"{method.name} on {self.suite}: trial {search.best().number} of {args.trials}"
                    write_config(self.run.path / TUNED / f"{method.name}.toml", search.best_settings(), about)
        return found

    def _search(self, method: Method) -> Search:
        """A method's study: its lives as long as those that are compared, its score what is compared at their end."""
        args, space = self.args, self.family.observation_space
        per_update = method.config.n_envs * method.config.n_steps
        settings = AgentSettings(method.config, method.horizon * per_update, **method.sources)
        agents = AgentStudy(
            self.family,
            method.name,
            method.objective,
            settings,
            tasks=args.tuning_tasks,
            checkpoints=1,
            episodes=8,
            seed=args.seed,
            device=args.device,
            optimizer=method.rule,
        )
        # Optimizers have step sizes of scales of their own: each is searched as widely around its own.
        number = method.config.hyper.learning_rate
        rate = number if method.around and isinstance(number, float) else None
        searched = agent_space(settings, method.objective, space, OF_EVALUATION, rate)
        study = agents.study(self.suite, searched, test=False)
        config = SearchConfig(trials=args.trials, pruner="none", seed=args.seed)
        return Search(study, f"sqlite:///{self.run.path / STUDIES}", method.name, config)

    def compare(self, methods: list[Method], tuned: dict[str, PPOConfig]) -> None:
        """Let every method's agents live, but for those whose scores are there already."""
        self.run.rewind(-1)  # a killed run may have saved scores without logging them
        for each in self.scores:
            self._log(each)
        finished = {each.method for each in self.scores}
        done = sum(m.horizon for m in methods if m.name in finished)
        with Progress(sum(m.horizon for m in methods), "updates", done=done) as progress:
            for method in methods:
                if method.name not in finished:
                    self._evaluate(method, tuned.get(method.name, method.config), progress, done)
                    done += method.horizon

    def _evaluate(self, method: Method, config: PPOConfig, progress: Progress, done: int) -> None:
        """Let one method's agents live, and save their scores."""

        def show(update: int, horizon: int) -> None:
            progress.update(done + update, method=method.name)

        args, scorer = self.args, self.scorer
        curves = learning_curves(
            self.family,
            Algorithm(config, Slots.fill(config, **method.parts)),
            method.horizon,
            tasks=args.tasks,
            seeds=args.seeds,
            seed=args.seed,
            checkpoints=args.checkpoints,
            episodes=args.episodes,
            device=args.device,
            progress=show,
        )
        scored = (scorer(curves), scorer.kept) if scorer.exact else (None, None)
        append_scores(self.run.path / SCORES, self.suite, method.name, curves, *scored)
        self._log(self.scores[-1])

    def _log(self, each: Scores) -> None:
        """The curve that the figure shows, as metrics."""
        curves = each.curves(self.unit)
        assert curves is not None
        for step, values in zip(curves.steps, curves.returns, strict=True):
            self.run.log(int(step), {f"eval/{each.method}": iqm(values)})

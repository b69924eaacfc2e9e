"""`learned-rl tune STUDY`: search the numbers of an algorithm, of a recipe's outer loop, or of a study of your own."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState
from rich.console import Console

from experiments.config_file import read_config, write_config
from experiments.options import listed, usable_device
from experiments.recipes import get_recipe, recipes
from experiments.report import BEST, TRIALS, append_scores, conclude, read_scores, write_report
from experiments.runs import SCORES, Progress, Run, flatten, plain, read_json
from experiments.threads import set_threads
from experiments.tuning.agents import AgentStudy, algorithms, check_read
from experiments.tuning.outer import OuterStudy, outer_settings
from experiments.tuning.outputs import save_figures, write_trials
from experiments.tuning.samplers import Pruner, Sampler, SearchConfig
from experiments.tuning.storage import masked, open_storage, place_of, speaking_storage
from experiments.tuning.study import COSTS, FINISHED, Direction, Pruned, Search, Study, check
from learned_rl import artifacts
from learned_rl.files import replacing, speaking
from learned_rl.tasks.base import unknown
from learned_rl.types import UserError, at_least

FRONT, FIGURE = "pareto", Path("figures") / "learning_curves.png"
TESTED = "tested.json"  # which trial the scores in the folder are of, and on what it was tested
PATIENCE = 5.0  # seconds that other workers have to give their trials back
AGENT_ONLY = ("env", "steps", "tasks", "episodes")
OUTER_ONLY = ("meta_steps",)
EVALUATION = ("config", "seeds", "checkpoints", "test_tasks", "test_seeds", "parameters", "metrics", "device")


@dataclass(frozen=True)
class Tune:
    """Search settings with Optuna; workers join by running the same command, and so does whoever continues."""

    env: str | None = None
    """gymnasium id or task family, where the study is of an algorithm"""
    config: Path | None = None
    """file such as best.toml with the settings to begin from, of which those that are not searched stay; default: those
    of the algorithm or recipe"""
    steps: int | None = None
    """environment steps of each agent's life; default: 50000"""
    meta_steps: int | None = None
    """length of a trial where the study is of a recipe, in meta-steps of the recipe as it is; default: 200"""
    trials: int = 64
    """finished trials that the study is to have, over all workers, pruned ones included"""
    timeout: float | None = None
    """minutes after which this command begins no new trial"""
    jobs: int = 1
    """worker processes of this command"""
    storage: str | None = None
    """sqlite:///FILE.db, FILE.log (a journal, best for several processes), or postgresql://USER@HOST/NAME (several
    machines); default: study.db in the run folder"""
    study_name: str | None = None
    """name in the storage; default: STUDY-ENV"""
    sampler: Sampler = "tpe"
    """who proposes: tpe, gp (Gaussian process), cmaes, random"""
    pruner: Pruner | None = None
    """who ends trials early: median, hyperband, wilcoxon (seed by seed against the best), none; default: median, or
    none with several metrics"""
    startup_trials: int = 10
    """random trials before the sampler models anything and the median pruner prunes"""
    parameters: str | None = None
    """comma-separated settings to search, such as learning_rate,gamma; default: what the algorithm or recipe reads"""
    metrics: str | None = None
    """score; score,seconds or score,environment_steps to trade it against cost; default: score"""
    tasks: int | None = None
    """validation tasks of a trial; default: 32 of a family, 1 of a gymnasium id"""
    seeds: int | None = None
    """agents on each task, or meta-training seeds; default: 1, on a gymnasium id 8"""
    checkpoints: int | None = None
    """reports of a trial, the last at its end; default: 6, of a recipe 4"""
    episodes: int | None = None
    """fresh episodes of each agent at each; default: 8"""
    test_tasks: int | None = None
    """test tasks for the winner and the defaults; default: 64 of a family, 1 of a gymnasium id"""
    test_seeds: int | None = None
    """agents on each, or meta-training seeds; default: 4, on a gymnasium id 32, of a recipe 3"""
    test: bool = True
    """whether winner and defaults are run on test tasks and seeds in the end"""
    warm_start: str | None = None
    """study whose best points are tried first: a name in the same storage, or STORAGE#NAME"""
    enqueue: tuple[Path, ...] = ()
    """files such as best.toml whose settings are tried first"""
    out: Path | None = None
    """run folder; default: runs/tune-NAME"""
    seed: int = 0
    """of tasks, agents and sampler"""
    device: str | None = None
    """torch device; default: cpu"""

    def __post_init__(self) -> None:
        at_least(1, jobs=self.jobs, trials=self.trials)
        for name in ("steps", "meta_steps", "tasks", "seeds", "checkpoints", "episodes", "test_tasks", "test_seeds"):
            at_least(1, **{name: getattr(self, name)})
        usable_device(self.device or "cpu")

    def given(self, names: Sequence[str]) -> dict[str, Any]:
        """Those of some options that were given."""
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def search_config(self, study: Study) -> SearchConfig:
        pruner = self.pruner or ("median" if len(study.metrics) == 1 else "none")
        return SearchConfig(self.trials, self.timeout, self.sampler, pruner, self.startup_trials, self.seed)


# --- which study -----------------------------------------------------------------------------------------------------


def studies() -> list[str]:
    """What can be tuned by name: algorithms, objectives, recipes."""
    return [*algorithms(), *recipes()]


def make_study(what: str, args: Tune) -> tuple[Study, str]:
    """The study that the command names, and its default name in a storage.

    Raises:
        UserError: no such study, or an option that means nothing to it.
    """
    if what.endswith(".py"):
        _refuse(what, args, (*AGENT_ONLY, *OUTER_ONLY, *EVALUATION), "a study of your own, which sets it itself")
        own = _own(Path(what))
        return own if args.test else replace(own, test=None), Path(what).stem
    if what in recipes():
        _refuse(what, args, AGENT_ONLY, "a recipe")
        return _outer(what, args), what
    if what.endswith(artifacts.SUFFIX):
        artifacts.read_header(what)  # says what is nearest where there is no such file
    elif what not in studies() and not Path(what).exists():
        raise unknown("study", what, studies())
    _refuse(what, args, OUTER_ONLY, "an algorithm")
    if args.env is None:
        raise UserError(f"A study of {what} needs an environment: name a gymnasium id or task family with --env.")
    return _agents(what, args.env, args), f"{Path(what).stem}-{args.env.replace('/', '-')}"


def _refuse(what: str, args: Tune, names: Sequence[str], kind: str) -> None:
    for name in args.given(names):
        raise UserError(f"--{name.replace('_', '-')} means nothing to {what}, which is {kind}: leave it out.")


def _agents(algorithm: str, env: str, args: Tune) -> Study:
    shape = args.given(("tasks", "episodes", "seeds", "checkpoints", "test_tasks", "test_seeds"))
    steps = args.steps if args.config is None else None
    agents = AgentStudy.of(algorithm, env, steps, args.device or "cpu", seed=args.seed, **shape)
    if args.config is not None:
        settings = read_config(args.config, agents.settings)
        if settings.objective != agents.settings.objective:
            raise UserError(f"{args.config} is of the objective {settings.objective!r}, and the study of {algorithm}.")
        if settings.optimizer is not None:
            plugged = f"the optimizer {settings.optimizer!r}, which a study of {algorithm} does not plug in"
            raise UserError(f"{args.config} has {plugged}: leave it out.")
        agents = replace(agents, settings=replace(settings, **args.given(["steps"])))
    study = agents.study(env, metrics=_metrics(args), test=args.test)
    if args.parameters is None:
        return study
    chosen = study.select(listed(args.parameters))
    check_read(chosen, agents.settings.config, agents.objective, agents.family.observation_space)
    traded = {path: space for path, space in study.spaces.items() if path == "steps"}  # what a metric asks for
    return replace(study, space=chosen | traded)


def _outer(name: str, args: Tune) -> Study:
    metrics = _metrics(args)
    if "environment_steps" in metrics:
        raise UserError(f"metrics has environment_steps, which are the same in every trial of {name}: leave them out.")
    settings = outer_settings(get_recipe(name))
    if args.config is not None:
        settings = read_config(args.config, settings)
    shape = args.given(("meta_steps", "seeds", "checkpoints", "test_tasks", "test_seeds"))
    outer = OuterStudy(settings, **shape, seed=args.seed, device=args.device or "cpu")
    return outer.study(listed(args.parameters) if args.parameters else None, metrics, args.test)


def _own(path: Path) -> Study:
    """The `STUDY` that a Python file defines."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.exists():
        raise UserError(f"{path} does not exist: expected a Python file that defines STUDY, or one of {studies()}.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    study = getattr(module, "STUDY", None)
    if not isinstance(study, Study):
        raise UserError(f"{path} defines no STUDY: expected an experiments.tuning.study.Study of that name.")
    return study


def _metrics(args: Tune) -> dict[str, Direction]:
    names = listed(args.metrics or "score")
    known: dict[str, Direction] = {"score": "maximize", **COSTS}
    for name in names:
        if name not in known:
            raise unknown("metric", name, known)
    if names[0] != "score":
        raise UserError(f"metrics begin with {names[0]!r}: expected score first, then what it is traded against.")
    return {name: known[name] for name in names}


# --- the command -----------------------------------------------------------------------------------------------------


def tune(what: str, args: Tune, command: list[str]) -> Path:
    """Search until the study has its trials, test the winner, write the report; returns its path."""
    study, usual = make_study(what, args)
    name = args.study_name or usual
    out = args.out or Path("runs") / f"tune-{name}"
    url = args.storage or f"sqlite:///{out / 'study.db'}"
    known = {path.name: read_config(path, study.settings) for path in args.enqueue}
    check(study, args.search_config(study))  # before the folder: what cannot be searched leaves none
    if args.storage is None:
        with speaking(out):
            out.mkdir(parents=True, exist_ok=True)
    search = Search(study, url, name, args.search_config(study), out)
    config = {"name": name, "storage": masked(url), **study.definition()}
    run = Run.create(out, command=command, config=config, seed=args.seed, resume=(out / "config.json").exists())
    for note, settings in known.items():
        search.enqueue(settings, note)
    if args.warm_start:
        _warm_start(search, args.warm_start, url)
    try:
        with _others(what, args, url, name, out), _progress(search) as show:
            search.run(show)
    except KeyboardInterrupt:
        with _alone(out):
            write_outputs(search, out)
        raise KeyboardInterrupt("the same command continues the study") from None
    return finish(search, run)


@contextmanager
def _others(what: str, args: Tune, url: str, name: str, out: Path) -> Iterator[None]:
    """The other worker processes of this command, while this one works; waits for their last trials."""
    spawn = multiprocessing.get_context("spawn")
    mine = replace(args, jobs=1, storage=url, study_name=name, out=out)
    others = [spawn.Process(target=join, args=(what, mine), daemon=True) for _ in range(args.jobs - 1)]
    for other in others:
        other.start()
    try:
        yield
    except BaseException:  # whatever ended this one; the others heard of a Ctrl-C, and give their trials back
        for other in others:
            other.join(PATIENCE)
            other.terminate()
        raise
    finally:
        for other in others:
            other.join()


def join(what: str, args: Tune) -> None:
    """One more worker on a study that exists, without a word, for as long as the process lives that started it."""
    assert args.storage and args.study_name
    set_threads()
    study, _ = make_study(what, args)

    def stop_with_parent(_: optuna.Study) -> None:
        if (parent := multiprocessing.parent_process()) is not None and not parent.is_alive():
            sys.exit(1)

    try:
        Search(study, args.storage, args.study_name, args.search_config(study), args.out).run(stop_with_parent)
    except UserError as error:
        print(f"worker: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


@contextmanager
def _progress(search: Search) -> Iterator[Any]:
    """Trials that are finished, over all workers."""

    def finished(study: optuna.Study) -> list[Any]:
        return [t for t in study.get_trials(deepcopy=False) if t.state in FINISHED]

    done = len(finished(search.optuna))
    with Progress(search.config.trials, "trials", done=done) as bar:

        def show(study: optuna.Study) -> None:
            ended = finished(study)
            pruned = sum(t.state == TrialState.PRUNED for t in ended)
            fields: dict[str, float | str] = {"pruned": pruned}
            if pruned < len(ended):
                best = search.best()
                fields |= {"best": best.values[0], "trial": best.number}
            bar.update(min(len(ended), search.config.trials), **fields)

        yield show


def _warm_start(search: Search, source: str, url: str) -> None:
    """Try the best points of another study first."""
    where, _, name = source.rpartition("#")
    where = where or url
    if (place := place_of(where)) is not None and not place[1].exists():
        raise UserError(f"{masked(where)} holds no study to start from: the file does not exist.")
    with speaking_storage(where):
        storage = open_storage(where)
        known = optuna.get_all_study_names(storage)
        if name not in known:
            raise unknown(f"study in {masked(where)}", name, known)
        search.warm_start(optuna.load_study(study_name=name, storage=storage))


# --- what it leaves --------------------------------------------------------------------------------------------------


def finish(search: Search, run: Run) -> Path:
    """Write everything, test the winner beside the defaults, print and report; one worker at a time in one folder."""
    with speaking_storage(search.url), _alone(run.path):
        best = write_outputs(search, run.path)
        if best is None:
            search.best()  # says why there is none
        console = Console()
        print_best(search, console)
        print(f"best: {run.path / BEST}")
        if search.study.test is None:
            return write_report([run.path], run.path / "report.html")
        _test(search, run.path)
        return conclude(run.path, FIGURE, "default")


def write_outputs(search: Search, out: Path) -> Path | None:
    """The table of trials, the figures, and the best settings as a file; returns that file if there is a best trial."""
    write_trials(search.optuna, out / TRIALS)
    complete = [t for t in search.optuna.get_trials(deepcopy=False) if t.state == TrialState.COMPLETE]
    if not complete:
        return None
    save_figures(search.optuna, out)
    front = search.optuna.best_trials if len(search.study.metrics) > 1 else []
    files = {out / FRONT / f"trial-{trial.number}.toml": trial for trial in front}
    for old in set((out / FRONT).glob("*.toml")) - set(files):
        old.unlink()
    for path, trial in files.items():
        _write_settings(search, trial, path)
    return _write_settings(search, search.best(), out / BEST)


def _write_settings(search: Search, trial: Any, path: Path) -> Path:
    values = ", ".join(f"{k} {v:.6g}" for k, v in zip(search.study.metrics, trial.values, strict=True))
    about = f"{search.study.name}: trial {trial.number} of study {search.name}, {values} (where it was tuned)"
    return write_config(path, search.study.decode(trial.params), about)


def print_best(search: Search, console: Console) -> None:
    """What the winner changed."""
    best, names = search.best(), search.study.names()
    values = "  ".join(f"{k} {v:.4g}" for k, v in zip(search.study.metrics, best.values, strict=True))
    finished = sum(t.state in FINISHED for t in search.optuna.get_trials(deepcopy=False))
    console.print(f"best of {finished} trials: trial {best.number}, {values}", highlight=False)
    before, after = (flatten(plain(x)) for x in (search.study.settings, search.best_settings()))
    for path in search.study.spaces:
        console.print(f"  {names[path]}: {_short(before[path])} -> {_short(after[path])}", highlight=False)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _test(search: Search, out: Path) -> None:
    """Score winner and defaults where no trial lived, unless the folder holds these scores."""
    best, path, study = search.best(), out / SCORES, search.study
    assert study.test is not None
    held = {each.method for each in read_scores(path)} if path.exists() else set()
    before = read_json(out / TESTED) if (out / TESTED).exists() else {}
    valid = held if before.get("on") == study.tested_on else set()
    if before.get("trial") != best.number:
        valid -= {"tuned"}
    for method, settings in (("default", study.settings), ("tuned", search.best_settings())):
        if method not in valid:
            print(f"test: {method} settings on unseen tasks and seeds", flush=True)
            try:
                tested = study.test(settings)
            except Pruned as reason:
                raise UserError(f"The {method} settings cannot be tested: {reason}.") from reason
            append_scores(path, study.suite, method, tested.returns, tested.scores, tested.kept)
    with replacing(out / TESTED) as file:
        file.write(json.dumps({"trial": best.number, "on": dict(study.tested_on)}).encode())


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Only one process at a time writes what a study leaves; others wait."""
    with speaking(folder), (folder / ".finish").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield

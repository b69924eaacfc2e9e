"""The command line: `learned-rl COMMAND ...`. Commands are typed dataclasses; their fields are the options.

A user's mistake is one sentence on standard error and exit code 2.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from experiments.benchmarks import DEFAULT_OUT
from experiments.options import parse
from learned_rl.types import UserError

if TYPE_CHECKING:
    from experiments.meta_train import MetaTrain
    from meta_optimizers.group import Group

USAGE = """learned-rl: meta-learn the parts of a reinforcement-learning algorithm and plug them into PPO.

  learned-rl meta-train RECIPE      meta-train a component on a task family
  learned-rl train ENV              train PPO with learned parts, any number of seeds at once
  learned-rl tune STUDY             search settings with Optuna, by any number of workers
  learned-rl pbt ALGORITHM          population based training: a schedule in place of constants
  learned-rl evaluate FILE          a component beside tuned baselines on held-out tasks
  learned-rl report RUN...          tables and figures of finished runs, as one HTML page
  learned-rl convert KIND FILE      weights that others published, as a component file
  learned-rl show FILE              what a component is, what it was trained on, a picture of what it learned
  learned-rl list                   recipes, task families, components
  learned-rl bench [GROUP...]       speed and memory, beside peers

Every command explains its options with --help.
"""


def _operand(
    command: str, what: str, words: list[str], choices: Callable[[], Any] | None = None
) -> tuple[str, list[str]]:
    """The command's first word, which must not be an option."""
    if words and not words[0].startswith("-"):
        return words[0], words[1:]
    if "-h" in words or "--help" in words:
        return "", words
    known = f" (one of: {', '.join(choices())})" if choices else ""
    raise UserError(f"{command} needs a {what}{known} before its options; see `learned-rl {command} --help`.")


def _meta_train(words: list[str], command: list[str], group: Group | None = None) -> None:
    from experiments.meta_train import meta_train

    args = group.together(lambda: _meta_train_settings(words)) if group else _meta_train_settings(words)
    component = meta_train(args, command, group)
    if group is None or group.first:
        print(f"component: {component}")


def _meta_train_settings(words: list[str]) -> MetaTrain:
    from experiments.config_file import config_option, early_option, read_config
    from experiments.meta_train import MetaTrain
    from experiments.recipes import get_recipe, recipes

    name, rest = _operand("meta-train", "recipe", words, recipes)
    recipe = get_recipe(name) if name else next(iter(recipes().values()))
    estimator, rest = early_option("--estimator", "a name, such as 'rematerialised'", rest)
    recipe = recipe.estimated_by(estimator) if estimator else recipe
    file, rest = config_option(rest)
    defaults = read_config(file, MetaTrain(recipe)) if file else MetaTrain(recipe)
    return parse(MetaTrain, f"meta-train {name or 'RECIPE'}", rest, defaults)


def _train(words: list[str], command: list[str]) -> None:
    from experiments.config_file import config_option, early_option, read_config
    from experiments.recipes import online_recipes
    from experiments.train import Train, suited, train

    env, rest = _operand("train", "gymnasium id, task family or recipe", words)
    estimator, rest = early_option("--estimator", "a name, such as 'bmg'", rest)
    file, rest = config_option(rest)
    if (recipe := online_recipes().get(env)) is not None:
        recipe = recipe.estimated_by(estimator) if estimator else recipe
        env, defaults = recipe.env, recipe.train
    else:
        defaults = suited(env, rest, estimator) if env else Train()
    args = parse(Train, f"train {env or 'ENV'}", rest, read_config(file, defaults) if file else defaults)
    print(f"report: {train(env, args, command)}")


def _tune(words: list[str], command: list[str]) -> None:
    from experiments.tune import Tune, studies, tune

    what, rest = _operand("tune", "study", words, studies)
    args = parse(Tune, f"tune {what or 'STUDY'}", rest)
    print(f"report: {tune(what, args, command)}")


def _pbt(words: list[str], command: list[str]) -> None:
    from experiments.pbt import Pbt, pbt
    from experiments.tuning.agents import algorithms

    algorithm, rest = _operand("pbt", "algorithm", words, algorithms)
    args = parse(Pbt, f"pbt {algorithm or 'ALGORITHM'}", rest)
    print(f"report: {pbt(algorithm, args, command)}")


def _evaluate(words: list[str], command: list[str]) -> None:
    from experiments.evaluate import Evaluate, evaluate

    path, rest = _operand("evaluate", "component file", words)
    args = parse(Evaluate, f"evaluate {path or 'FILE'}", rest)
    print(f"report: {evaluate(Path(path), args, command)}")


@dataclasses.dataclass(frozen=True)
class Report:
    """Tables and figures of finished runs, as one HTML page."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """run folders"""
    baseline: str | None = None
    """method to whose numbers the others' are related; default: a2c where it was measured"""
    out: Path = Path("report.html")
    """the page"""


def _report(words: list[str], command: list[str]) -> None:
    from experiments.report import write_report

    args = parse(Report, "report", words)
    if not args.runs:
        raise UserError("learned-rl report needs at least one run folder.")
    print(f"report: {write_report(args.runs, args.out, args.baseline)}")


@dataclasses.dataclass(frozen=True)
class Convert:
    """Weights that others published, as a component file for every slot and command."""

    kind: tyro.conf.Positional[str]
    """whose they are: disco103"""
    file: tyro.conf.Positional[Path]
    """your download of them"""
    out: Path | None = None
    """the component file; default: KIND.safetensors here"""


def _convert(words: list[str], command: list[str]) -> None:
    from experiments.convert import convert

    args = parse(Convert, "convert", words)
    print(f"component: {convert(args.kind, args.file, args.out)}")


@dataclasses.dataclass(frozen=True)
class Show:
    """What a component is, what it was trained on, and a picture of what it learned."""

    file: tyro.conf.Positional[str]
    """component file, or a registered name"""
    out: Path | None = None
    """the picture; default: beside the file, or NAME.png here"""


def _show(words: list[str], command: list[str]) -> None:
    from experiments.show import show

    args = parse(Show, "show", words)
    picture = show(args.file, args.out)
    drawn = "pictures are of objectives, tables of rewards, and optimizers that have met their agents"
    print(f"picture: {picture}" if picture else f"There is no picture of {args.file}: {drawn}.")


@dataclasses.dataclass(frozen=True)
class List:
    """Recipes, task families with their presets, components."""


def _list(words: list[str], command: list[str]) -> None:
    from experiments.show import print_catalogue

    parse(List, "list", words)
    print_catalogue()


@dataclasses.dataclass(frozen=True)
class Bench:
    """Speed and memory, each figure beside a peer measured in the same run where there is one."""

    groups: tyro.conf.Positional[tuple[str, ...]] = ()
    """groups to run; default: all but `learning`"""
    out: Path = DEFAULT_OUT
    """where the figures go, as JSON"""


def _bench(words: list[str], command: list[str]) -> None:
    from experiments.bench import run

    args = parse(Bench, "bench", words)
    run(args.groups, args.out)


COMMANDS: dict[str, Callable[[list[str], list[str]], None]] = {
    "meta-train": _meta_train,
    "train": _train,
    "tune": _tune,
    "pbt": _pbt,
    "evaluate": _evaluate,
    "report": _report,
    "convert": _convert,
    "show": _show,
    "list": _list,
    "bench": _bench,
}


@contextmanager
def speaking(program: str, saved: str = "the same command with --out {path} --resume continues") -> Iterator[None]:
    """Ends the program after a user's mistake or Ctrl-C with one sentence and an exit code.

    Args:
        saved: what to say of an interrupted run whose folder is {path}, unless the interrupt brings its own words.
    """
    try:
        yield
    except UserError as error:
        print(f"{program}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        then = [f" and saved; {x if isinstance(x, str) else saved.format(path=x)}" for x in interrupt.args]
        print(f"{program}: interrupted{''.join(then)}.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # whoever read our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter's last flush fails as well
        sys.exit(1)


def _known(command: str, processes: int) -> None:
    """Checks that there is such a command for so many processes."""
    from learned_rl.tasks.base import unknown

    if command not in COMMANDS:
        raise unknown("command", command, COMMANDS)
    if processes > 1 and command != "meta-train":
        raise UserError(f"{command} runs in one process, not in {processes}: torchrun is for meta-train alone.")


def main() -> None:
    """Entry point of `learned-rl`."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, end="")
        sys.exit(0)
    with speaking("learned-rl"):
        from experiments.threads import set_threads
        from meta_optimizers.group import joined, started

        set_threads()
        if started() == 1:
            _known(words[0], 1)
            COMMANDS[words[0]](words[1:], ["learned-rl", *words])
            return
        with joined() as group:
            group.together(lambda: _known(words[0], group.size))
            _meta_train(words[1:], [*group.launcher(), "learned-rl", *words], group)

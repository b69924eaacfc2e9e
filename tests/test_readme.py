"""The documentation does what it says: its code runs, its commands and options exist, its links lead somewhere.

The pages also have to be complete: every setting of a documented method, and everything that it logs, is explained.
"""

import contextlib
import dataclasses
import importlib
import io
import math
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from experiments import cli
from experiments.evaluate import Evaluate
from experiments.meta_train import _tags
from experiments.pbt import Pbt
from experiments.recipes import get_recipe, online_recipes, recipes
from experiments.runs import sb3_tags
from experiments.train import Train
from experiments.tune import Tune
from experiments.tuning.agents import AgentSettings, AgentStudy, unread
from experiments.tuning.outer import OuterStudy, outer_settings, outer_space
from experiments.tuning.pbt import PBTConfig
from learned_rl import PPO, PPOConfig, artifacts, make_family
from learned_rl import spaces as spaces_module
from learned_rl.component import Hyper, Objective
from learned_rl.defaults import PPOClipConfig
from learned_rl.registry import components, families
from learned_rl.spaces import get, spaces
from meta_optimizers.agent_bandit import AgentBanditConfig
from meta_optimizers.black_box import BlackBoxConfig
from meta_optimizers.bootstrapped import BootstrappedConfig
from meta_optimizers.corrections import CorrectionConfig
from meta_optimizers.estimators import ESTIMATORS, estimator_config, make_estimator
from meta_optimizers.evolution import EvolutionConfig
from meta_optimizers.first_order import FirstOrderConfig
from meta_optimizers.forward_mode import ForwardConfig
from meta_optimizers.l2l import L2LConfig
from meta_optimizers.learned_adam import LearnedAdamConfig
from meta_optimizers.learning import OuterLossConfig
from meta_optimizers.meta_sgd import MetaSGDConfig
from meta_optimizers.mlp_optimizer import MLPOptimizerConfig
from meta_optimizers.open import OPENConfig
from meta_optimizers.optim4rl import Optim4RLConfig
from meta_optimizers.outer_critic import OuterCriticConfig
from meta_optimizers.persistent import NoiseReuseConfig, PersistentConfig
from meta_optimizers.rematerialised import RematerialisedConfig
from meta_optimizers.self_tuning import SelfTuning, SelfTuningConfig
from meta_optimizers.trainer import MetaTrainConfig, MetaTrainer
from meta_optimizers.truncated import TruncatedConfig
from objectives.contextual import ContextualConfig
from objectives.dice import LoadedDiCEConfig
from objectives.disco import DiscoConfig
from objectives.dpo import DPOConfig
from objectives.impala import ImpalaConfig
from objectives.lirpg import LIRPGConfig
from objectives.lpg import LPG, LPGConfig
from objectives.lpo import LPO, LPOConfig
from objectives.mgrl import MGRLConfig
from objectives.schedule import ScheduleConfig
from objectives.self_tuned import SelfTunedConfig
from objectives.stac import STACConfig
from objectives.stacx import STACXConfig

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text, language):
    """Content of the fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def without_code(text):
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


# --- the code of the README ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_readme_runs_as_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    meta_train, use, one_lifetime, own_component, own_loop, objective_in_it = blocks(read("README.md"), "python")
    said = {}

    torch.manual_seed(0)
    fresh = LPG(predictions=8, width=32, core="gru", stop_inputs=False).state_dict()
    torch.manual_seed(0)
    exec(meta_train, said)
    trainer = said["trainer"]
    assert trainer.steps == 20 and trainer.problem.broken == 0
    assert all(map(math.isfinite, said["metrics"].values()))
    saved = artifacts.load(tmp_path / "lpg.safetensors").state_dict()
    assert all(not torch.equal(value, fresh[name]) for name, value in saved.items())
    provenance = artifacts.read_header(tmp_path / "lpg.safetensors")["provenance"]
    assert provenance == {"family": "grid/small", "meta_steps": 20}

    exec(use, said)
    agent = said["agent"]
    assert 20_000 <= agent.steps < 20_000 + 64 * 20
    assert agent.algorithm.slots.objective.name == "lpg"
    assert said["returns"].shape == (2,) and bool((said["returns"] > 5).all())

    exec(one_lifetime, said)
    assert said["agent"].steps == 5 * 1024 and len(said["course"]) == 4  # the first window takes two rollouts
    assert said["course"][0] == pytest.approx(0.99) and said["course"][-1] != said["course"][0]
    assert all(p.item() for p in said["numbers"].parameters())

    exec(own_component, said)
    assert said["trainer"].steps == 5
    assert bool(((said["widths"] - 1).abs() > 1e-3).all())
    plugged = PPO("CartPole-v1", objective=said["soft_clip"])
    before = plugged.lifetimes.population.theta.clone()
    plugged.learn(1024)
    assert not torch.equal(plugged.lifetimes.population.theta, before)

    exec(own_loop, said)
    episodes = said["episodes"]
    assert len(episodes) == 15 and sum(episodes[-3:]) < sum(episodes[:3]) / 3  # they last three times as long

    weights = said["policy"][0].weight.detach().clone()
    exec(objective_in_it, said)
    assert said["loss"].shape == (1,) and bool(said["loss"].isfinite().all())
    assert not torch.equal(said["policy"][0].weight, weights)
    assert all(bool(p.grad.abs().sum() > 0) for p in said["prediction"].parameters())


# --- the code of the page about tuning -------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_study_of_ones_own_runs_as_printed(tmp_path, monkeypatch):
    own, from_python, other_settings = blocks(read("docs/tuning.md"), "python")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert "16_384" in own and "trials=24" in from_python
    (tmp_path / "drift.py").write_text(own.replace("16_384", "4_096"))  # four updates in place of sixteen

    cli.COMMANDS["tune"](["drift.py", "--trials", "2"], ["learned-rl", "tune"])  # printed: twenty trials
    assert {"best.toml", "trials.csv", "report.html"} <= {path.name for path in Path("runs/tune-drift").iterdir()}

    said = {}
    importlib.invalidate_caches()
    try:
        exec(from_python.replace("trials=24", "trials=3"), said)
    finally:
        sys.modules.pop("drift", None)
    trials = said["trials"]
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 3
    assert trials[0].params == {"alpha": 2.0, "beta": 0.6}  # the first trial are the defaults
    best = max(trials, key=lambda trial: trial.value)
    assert (said["score"], said["alpha"]) == (best.value, best.params["alpha"])

    exec(other_settings, said)
    study = said["STUDY"]
    assert (study.settings.config.n_envs, study.settings.config.linear_decay) == (16, True)
    assert study.about["seeds"] == 4 and study.test is not None


# --- the code of the page about the outer loop ----------------------------------------------------------------------


def test_the_problem_and_the_estimator_of_ones_own_run_as_printed():
    problem, estimator = blocks(read("docs/meta_optimizers/README.md"), "python")
    said = {}
    exec(problem, said)
    assert set(said["found"]) == {"truncated", "nres"}
    for rate in said["found"].values():  # the mean loss of a lifetime is least at -2.2, and twice as large at -1.1
        assert -2.7 < rate < -1.7
    exec(estimator, said)
    config = TruncatedConfig(window=1)
    expected = make_estimator(config)(said["Quadratic"](), said["Quadratic"].eta())
    for name, g in expected.grads.items():
        torch.testing.assert_close(said["estimate"].grads[name], g)


# --- the code of the page about one lifetime, and examples -----------------------------------------------------------


@pytest.mark.slow
def test_one_lifetime_runs_as_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    course, settings, reuse = blocks(read("docs/self_tuning.md"), "python")
    said = {}
    exec(course, said)
    steps, gamma = zip(*said["course"], strict=True)
    assert steps == (2048, 3072, 4096, 5120) and gamma[0] != gamma[-1] and said["returns"].shape == (2,)
    first, second = (dict(said["agent"].component("hyperparameters", i).named_parameters()) for i in range(2))
    assert all(not torch.equal(first[k], second[k]) for k in first)
    assert all(torch.equal(v, second[k]) for k, v in said["numbers"].named_parameters())

    exec(settings, said)
    assert said["agent"].learned == ["hyperparameters", "auxiliary"] and said["agent"].steps >= 2_000

    exec(reuse, said)
    (slot,) = [c for s, c in said["again"].algorithm.slots.items() if s == "reward"]
    saved = said["agent"].component("reward", 1).state_dict()
    assert all(torch.equal(v, saved[k]) for k, v in slot.state_dict().items())


METHODS = re.compile("docs/(objectives|families|optimizers)/")
EXAMPLES = [name for name in NAMES if METHODS.match(name) and blocks(read(name), "python")]


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run_as_printed_but_shorter(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = {}
    for block in blocks(read(name), "python"):
        shorter = re.sub(r"learn\([\d_]+\)", "learn(100)", block)
        exec(re.sub(r"seeds=\d+", "seeds=1", shorter), said)
    assert said


# --- commands and options --------------------------------------------------------------------------------------------


def commands():
    """(page, line) of every `learned-rl` command that a page shows in a block of shell."""
    for name in NAMES:
        for block in blocks(read(name), "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith("learned-rl "):
                    yield name, line


@pytest.mark.parametrize("page, line", sorted(set(commands())))
def test_printed_commands_and_their_options_exist(page, line):
    _, command, *words = shlex.split(line, comments=True)
    operands = [word for word in words[:1] if not word.startswith("-")]
    if command == "meta-train":
        if operands == ["RECIPE"]:
            operands = ["lpg-gridworld"]
        assert operands[0] in recipes()
    if "--estimator" in words:  # on which the other options depend
        operands += ["--estimator", words[words.index("--estimator") + 1]]
    help_text = _help(command, *operands)
    for word in words:
        if word.startswith("--"):
            option = word.partition("=")[0]
            assert re.search(rf"{re.escape(option)}[ ,\n]", help_text), f"{page}: {line}"


def _help(command, *operands):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit) as end:
        cli.COMMANDS[command]([*operands, "--help"], ["learned-rl"])
    assert end.value.code == 0
    return said.getvalue()


def test_every_command_is_on_its_page():
    page = read("docs/cli.md")
    for command in cli.COMMANDS:
        assert f"learned-rl {command}" in page


def test_every_recipe_is_on_the_page():
    page = read("docs/cli.md")
    for name in [*recipes(), *online_recipes()]:
        assert f"`{name}`" in page


@pytest.mark.parametrize("page, least", [("docs/cli.md", 50), ("docs/tuning.md", 25), ("docs/self_tuning.md", 15)])
def test_options_in_the_text_of_the_pages_exist(page, least):
    shown = [
        ["meta-train", "lpg-gridworld"],
        ["train", "CartPole-v1"],
        ["train", "CartPole-v1", "--estimator", "bmg"],
        ["tune", "ppo"],
        ["pbt", "ppo"],
        ["evaluate", "FILE"],
        ["report"],
        ["show"],
        ["bench"],
    ]
    everything = "".join(_help(*words) for words in shown)
    ours, _, others = without_code(read(page)).partition("## For users of rl-zoo")
    text = ours + re.sub(r"^\|.*? \|", "|", others, flags=re.MULTILINE)  # that table's first column is rl-zoo's
    options = set(re.findall(r"`(--[a-z][a-z.-]*)", text))
    assert len(options) > least
    for option in options:
        end = "" if option.endswith(".") else "[ ,\n]"  # `--config.*` stands for many
        assert re.search(re.escape(option) + end, everything), option


@pytest.mark.parametrize("command", [Train, Tune, Pbt, Evaluate])
def test_every_option_is_on_the_page(command):
    page = read("docs/cli.md")
    for option in dataclasses.fields(command):
        name = option.name.replace("_", "-")
        assert re.search(rf"`--(no-)?{name}[`. ]", page), f"docs/cli.md does not explain --{name}"


# --- links and tables ------------------------------------------------------------------------------------------------


def anchors(text):
    """The names that a page's headings get."""
    headings = re.findall(r"^#+ (.*)$", without_code(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("name", NAMES)
def test_relative_links_lead_somewhere(name):
    page = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(read(name))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{name} links to {target}"
        if anchor:
            assert anchor in anchors(there.read_text(encoding="utf-8")), f"{name} links to {target}"


@pytest.mark.parametrize("name", NAMES)
def test_markers_of_results_come_in_pairs(name):
    marks = re.findall(r"^<!-- (results:[a-z0-9-]+|/results) -->$", read(name), flags=re.MULTILINE)
    assert [m.startswith("results:") for m in marks] == [True, False] * (len(marks) // 2)


def test_the_readme_lists_every_component_and_family():
    text = read("README.md")
    for name in [*components(), *families()]:
        assert f"`{name}`" in text


# --- every setting and every metric is explained ---------------------------------------------------------------------


SETTINGS = {
    "docs/objectives/lpg.md": [LPGConfig],
    "docs/objectives/dpo.md": [DPOConfig],
    "docs/objectives/ppo_clip.md": [PPOClipConfig, PPOConfig, Hyper],
    "docs/objectives/schedule.md": [ScheduleConfig, PBTConfig],
    "docs/objectives/lpo.md": [LPOConfig],
    "docs/objectives/dice.md": [LoadedDiCEConfig],
    "docs/objectives/disco103.md": [DiscoConfig],
    "docs/objectives/impala.md": [ImpalaConfig],
    "docs/objectives/self_tuned.md": [SelfTunedConfig],
    "docs/objectives/mgrl.md": [MGRLConfig],
    "docs/objectives/stac.md": [STACConfig],
    "docs/objectives/contextual.md": [ContextualConfig],
    "docs/objectives/lirpg.md": [LIRPGConfig],
    "docs/objectives/stacx.md": [STACXConfig],
    "docs/self_tuning.md": [SelfTuningConfig],
    "docs/optimizers/meta_sgd.md": [MetaSGDConfig],
    "docs/optimizers/learned_adam.md": [LearnedAdamConfig],
    "docs/optimizers/l2l.md": [L2LConfig],
    "docs/optimizers/optim4rl.md": [Optim4RLConfig],
    "docs/optimizers/open.md": [OPENConfig],
    "docs/optimizers/mlp_optimizer.md": [MLPOptimizerConfig],
    "docs/meta_optimizers/truncated.md": [TruncatedConfig],
    "docs/meta_optimizers/corrections.md": [CorrectionConfig],
    "docs/meta_optimizers/rematerialised.md": [RematerialisedConfig],
    "docs/meta_optimizers/first_order.md": [FirstOrderConfig],
    "docs/meta_optimizers/forward.md": [ForwardConfig],
    "docs/meta_optimizers/bootstrapped.md": [BootstrappedConfig],
    "docs/meta_optimizers/evolution.md": [EvolutionConfig],
    "docs/meta_optimizers/persistent.md": [PersistentConfig, NoiseReuseConfig],
    "docs/meta_optimizers/black_box.md": [BlackBoxConfig],
    "docs/meta_optimizers/README.md": [MetaTrainConfig, OuterLossConfig, OuterCriticConfig, AgentBanditConfig],
}


@pytest.mark.parametrize("page", SETTINGS)
def test_every_setting_is_on_its_page(page):
    text = read(page)
    for config in SETTINGS[page]:
        for setting in dataclasses.fields(config):
            assert f"`{setting.name}`" in text, f"{page} does not explain {config.__name__}.{setting.name}"


@pytest.mark.parametrize("objective", ["lpg", "dpo", "ppo_clip", "impala"])
def test_everything_that_training_logs_is_on_the_page(objective):
    logged = {}
    PPO("bandit/bernoulli-5", objective=objective).learn(1, log=lambda steps, metrics: logged.update(metrics))
    text = read(f"docs/objectives/{objective}.md")
    for metric in set(logged) - {"return", "length"}:
        assert f"`train/{metric}`" in text


def test_everything_that_one_lifetime_logs_is_explained():
    outer = SelfTuningConfig(loss=OuterLossConfig(value=1.0, kl=1.0))
    logged = {}
    numbers = {"hyperparameters": "self_tuned", "reward": "lirpg"}
    agent = SelfTuning("control/cartpole", PPOConfig.a2c(n_envs=2), outer=outer, **numbers)
    agent.learn(100, log=lambda steps, metrics: logged.update(metrics))
    ours = {k for k in logged if "/" in k}
    tuned = {k for k in ours if k.startswith("tuned/")}
    assert tuned == {"tuned/gamma", "tuned/gamma_low", "tuned/gamma_high"} and "meta/critic_loss" in ours
    text, cli_page, outer_page = (read(f"docs/{n}.md") for n in ("self_tuning", "cli", "meta_optimizers/README"))
    for tag in {k.replace("gamma", "NAME") for k in tuned}:
        assert f"`{tag}`" in text and f"`{tag}`" in cli_page
    for tag in ours - tuned - {"meta/window"}:
        assert f"`{tag}`" in text
    for tag in ours - tuned:
        assert f"`{tag}`" in outer_page
    for tag in sb3_tags({k: v for k, v in logged.items() if k not in ours}):
        assert f"`{tag}`" in cli_page


def logs_everything(name):
    """Settings with which an estimator logs all that it can, windows of 2 updates, and a component for it."""
    config = estimator_config(name)
    known = {"window": 2, "every": 2, "most": 100, "diagnose_every": 1, "kl": 1.0, "parameters": 1.0}
    fields = {f.name for f in dataclasses.fields(config)}
    component = LPO(LPOConfig(width=2)) if name == "forward" else LPG(predictions=3, width=4)
    return dataclasses.replace(config, **{k: v for k, v in known.items() if k in fields}), component


@pytest.mark.parametrize("name", ESTIMATORS)
def test_everything_that_meta_training_logs_is_explained(name):
    estimator, component = logs_everything(name)
    agent = PPOConfig(n_envs=2, n_steps=2, n_epochs=1, n_minibatches=1)
    config = MetaTrainConfig(lifetimes=4, horizon=2, agent=agent, estimator=estimator)
    trainer = MetaTrainer(make_family("bandit/bernoulli-5"), component, config)
    logged = {tag for _ in range(2) for tag in _tags(trainer.step())}
    text = read("docs/meta_optimizers/README.md")
    assert {"meta/loss", "meta/skipped", "inner/return", "inner/final_return"} <= logged
    of_agents = {
        tag for tag in logged if tag.startswith("inner/") and tag not in ("inner/return", "inner/final_return")
    }
    assert of_agents and "`inner/NAME`" in text
    for tag in of_agents:
        assert f"`train/{tag.removeprefix('inner/')}`" in read(f"docs/objectives/{component.name}.md")
    logged -= of_agents
    validated = {"heldout_return", "heldout_area", "environment_steps", "minutes"}
    for tag in logged | {f"meta/{k}" for k in validated} | {"meta/match_value"}:
        assert f"`{tag}`" in text


def test_every_estimator_is_listed_and_has_a_page():
    for page in ("README.md", "docs/cli.md", "docs/meta_optimizers/README.md"):
        for name in ESTIMATORS:
            assert f"`{name}`" in read(page), f"{page} does not name {name}"
    for name, estimator in ESTIMATORS.items():
        (page,) = [p for p, configs in SETTINGS.items() if estimator.Config in configs]
        first = read(page).partition("\n")[0]
        assert f"`{name}`" in first, f"{page} is not headed {name}"


# --- every search space is in a table --------------------------------------------------------------------------------


def table(first):
    """Field -> other cells of its row, for the rows of docs/tuning.md whose field begins with a word."""
    rows = re.findall(rf"^\| `({first}\.[^|]*?) \| (.*) \|$", read("docs/tuning.md"), flags=re.MULTILINE)
    return {field.replace("`", ""): cells.split(" | ") for field, cells in rows}


def printed(cell, **names):
    """The spaces that a cell shows as code."""
    kinds = {k: v for k, v in vars(spaces_module).items() if isinstance(v, type)}
    return [eval(code, kinds | names | {"max": max}) for code in re.findall(r"`([A-Z][^`]*)`", cell)]


def test_every_searched_field_of_agents_is_in_the_table_with_its_space():
    shown, known = table("config"), spaces(AgentSettings())
    assert list(shown) and set(shown) == set(known)
    for field, (space, parameter, _) in shown.items():
        assert printed(space)[0] == known[field], field
        assert parameter.startswith(f"`{known[field].key(field.rpartition('.')[2])}`"), field
    of_tables = printed(shown["config.hyper.learning_rate"][0])[1:]
    studies = [AgentStudy.of(algorithm, "grid/small").study("grid/small") for algorithm in ("a2c", "ppo")]
    assert of_tables == [study.spaces["config.hyper.learning_rate"] for study in studies]


@pytest.mark.parametrize("algorithm", ["ppo", "dpo", "a2c", "lpg", "disco103"])
def test_the_table_says_for_which_algorithms_a_field_is_searched(algorithm):
    searched = AgentStudy.of(algorithm, "CartPole-v1").study("CartPole-v1").spaces
    assert set(searched) == {field for field, cells in table("config").items() if algorithm in cells[2].split(", ")}


def in_the_table_of_agents(field):
    """What the table of agents calls a field of a recipe's agents, or of its critic's network."""
    field = re.sub(r"^recipe\.train\.agent\.", "config.", field)
    return re.sub(r"^recipe\.train\.critic\.agent\.", "config.agent.", field)


def is_read(recipe, field):
    """Whether a field means anything to a recipe's agents and estimator."""
    if field.startswith("recipe.train.loss."):
        return not make_estimator(recipe.train.estimator).stacked
    observations = make_family(recipe.family).observation_space
    component = recipe.make_component()
    objective = component if isinstance(component, Objective) else None
    return field.rpartition(".")[2] not in unread(recipe.train.agent, objective, observations)


@pytest.mark.parametrize("recipe", recipes())
def test_every_searched_field_of_a_recipe_is_in_the_table_with_its_space(recipe):
    settings, agents, shown = outer_settings(get_recipe(recipe)), table("config"), table("recipe")
    study = OuterStudy(settings).study()
    for field, space in outer_space(settings).items():
        value, row = get(settings, field), field
        if field.startswith("recipe.train.loss.regularisers."):
            row = f"recipe.train.loss.regularisers.*, w {'>' if value > 0 else '<'} 0"
        if row not in shown:
            assert printed(agents[in_the_table_of_agents(field)][0])[0] == space, field
            assert field not in study.spaces
            continue
        cell, parameter, searched = shown[row]
        assert space in printed(cell, w=value), field
        assert (searched == "yes" or (searched == "where read" and is_read(settings.recipe, field))) == (
            field in study.spaces
        ), field
        name = dataclasses.replace(study, space={**study.spaces, field: space}).names()[field]
        assert "*" in row or parameter.startswith(f"`{space.key(name)}`"), field


def test_the_table_of_recipes_has_no_field_that_none_of_them_has():
    known = {field for name in recipes() for field in outer_space(outer_settings(get_recipe(name)))}
    assert {field for field in table("recipe") if "*" not in field} <= known

"""The documentation does what it says: its code runs, its commands and options exist, its links lead somewhere.

The pages also have to be complete: every setting of a documented method, and everything that it logs, is explained.
"""

import contextlib
import dataclasses
import io
import math
import re
import shlex
from pathlib import Path

import pytest
import torch

from experiments import cli
from experiments.recipes import recipes
from learned_rl import PPO, PPOConfig, artifacts
from learned_rl.component import Hyper
from learned_rl.defaults import PPOClipConfig
from learned_rl.registry import components, families
from meta_optimizers.agent_bandit import AgentBanditConfig
from meta_optimizers.outer_critic import OuterCriticConfig
from meta_optimizers.trainer import MetaTrainConfig
from meta_optimizers.truncated import TruncatedConfig
from objectives.dpo import DPOConfig
from objectives.lpg import LPG, LPGConfig

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
    meta_train, use, own_component, own_loop, objective_in_it = blocks(read("README.md"), "python")
    said = {}

    torch.manual_seed(0)
    fresh = LPG(predictions=8, width=32, core="gru", stop_inputs=False).state_dict()
    torch.manual_seed(0)
    exec(meta_train, said)
    trainer = said["trainer"]
    assert trainer.steps == 20 and trainer.broken == 0
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
        assert operands[0] in recipes()
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


def test_options_in_the_text_of_the_page_exist():
    shown = [
        ["meta-train", "lpg-gridworld"],
        ["train", "CartPole-v1"],
        ["evaluate", "FILE"],
        ["report"],
        ["show"],
        ["bench"],
    ]
    everything = "".join(_help(*words) for words in shown)
    options = set(re.findall(r"`(--[a-z][a-z.-]*)", without_code(read("docs/cli.md"))))
    assert len(options) > 20
    for option in options:
        end = "" if option.endswith(".") else "[ ,\n]"  # `--config.*` stands for many
        assert re.search(re.escape(option) + end, everything), option


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
    "docs/meta_optimizers/truncated.md": [MetaTrainConfig, TruncatedConfig, OuterCriticConfig, AgentBanditConfig],
}


@pytest.mark.parametrize("page", SETTINGS)
def test_every_setting_is_on_its_page(page):
    text = read(page)
    for config in SETTINGS[page]:
        for setting in dataclasses.fields(config):
            assert f"`{setting.name}`" in text, f"{page} does not explain {config.__name__}.{setting.name}"


@pytest.mark.parametrize("objective", ["lpg", "dpo", "ppo_clip"])
def test_everything_that_training_logs_is_on_the_page(objective):
    logged = {}
    PPO("bandit/bernoulli-5", objective=objective).learn(1, log=lambda steps, metrics: logged.update(metrics))
    text = read(f"docs/objectives/{objective}.md")
    for metric in set(logged) - {"return", "length"}:
        assert f"`train/{metric}`" in text


def test_everything_that_meta_training_logs_is_explained():
    from experiments.meta_train import _tags
    from learned_rl import make_family
    from meta_optimizers.trainer import MetaTrainer

    config = MetaTrainConfig(lifetimes=2, horizon=1, agent=PPOConfig(n_envs=2, n_steps=2, n_epochs=1, n_minibatches=1))
    trainer = MetaTrainer(make_family("bandit/bernoulli-5"), LPG(predictions=3, width=4), config)
    logged = {tag for _ in range(2) for tag in _tags(trainer.step())}
    text = read("docs/meta_optimizers/truncated.md")
    assert {"meta/loss", "inner/return", "inner/final_return"} <= logged
    for tag in logged | {"meta/heldout_return", "meta/heldout_area"}:
        assert f"`{tag}`" in text

"""Settings as TOML: what is written is read back, what is wrong is one sentence, what the command line says wins."""

from __future__ import annotations

import dataclasses
import math
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import experiments.meta_train
import experiments.train
from experiments.cli import main
from experiments.config_file import config_option, read_config, write_config
from experiments.meta_train import MetaTrain
from experiments.recipes import Recipe, get_recipe
from experiments.runs import flatten, plain
from experiments.train import Train
from experiments.tuning.agents import AgentSettings
from experiments.tuning.outer import OuterSettings, outer_settings
from learned_rl.agents import AgentConfig
from learned_rl.component import Hyper
from learned_rl.ppo import PPOConfig
from learned_rl.spaces import replaced
from learned_rl.types import UserError
from meta_optimizers.agent_bandit import AgentBanditConfig
from meta_optimizers.trainer import MetaTrainConfig

ODD = PPOConfig(
    n_envs=3,
    linear_decay=True,
    normalize_advantage=False,
    target_kl=0.1,
    hyper=Hyper(learning_rate=1 / 3, gamma=1.0, clip_range=math.inf, clip_range_vf=0.3, max_grad_norm=math.inf),
    agent=AgentConfig(hidden=(7,), activation="relu"),
)


OUTER = replaced(outer_settings(get_recipe("lpg-gridworld")), {"recipe.train.loss.entropy_half_life": 700.0})


@pytest.fixture
def file(tmp_path):
    """Writes a file with some lines; returns its path."""

    def write(text: str) -> Path:
        path = tmp_path / "settings.toml"
        path.write_text(text)
        return path

    return write


# --- there and back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "defaults"),
    [
        (PPOConfig(), ODD),
        (ODD, PPOConfig()),
        (PPOConfig.a2c(), PPOConfig()),
        (AgentSettings(ODD, 123), AgentSettings()),
        (MetaTrainConfig(horizon=(5, 50), bandit=AgentBanditConfig(learning_rates=(1.0, 0.25))), MetaTrainConfig()),
        (OUTER, OuterSettings(get_recipe("lpg-gridworld"))),
    ],
)
def test_what_is_written_is_read_back(tmp_path, settings, defaults):
    if settings == PPOConfig():  # TOML has no word for None: there the default stays
        defaults = dataclasses.replace(defaults, target_kl=None, hyper=defaults.hyper.replace(clip_range_vf=None))
    path = write_config(tmp_path / "deep" / "settings.toml", settings, "one line\nand another")
    back = read_config(path, defaults)
    assert back == settings
    kinds = [{k: type(v) for k, v in flatten(plain(x)).items()} for x in (back, settings)]
    assert kinds[0] == kinds[1], "each value is of its own kind again"
    lines = path.read_text().splitlines()
    assert lines[:3] == ["# one line", "# and another", ""]
    assert "None" not in path.read_text() and tomllib.loads(path.read_text())


def test_the_tables_are_the_options(file):
    path = file("steps = 5\n[config]\nn_envs = 2\n[config.hyper]\ngamma = 1\n[config.agent]\nhidden = [3, 4]\n")
    found = read_config(path, Train())
    assert found == Train(steps=5, config=PPOConfig(n_envs=2, hyper=Hyper(gamma=1.0), agent=AgentConfig(hidden=(3, 4))))
    assert type(found.config.hyper.gamma) is float, "a whole number where a float belongs"


def test_what_the_file_leaves_out_stays(file):
    assert read_config(file(""), Train(steps=7)) == Train(steps=7)
    assert read_config(file("[config]\nn_envs = 2"), Train(config=ODD)).config == dataclasses.replace(ODD, n_envs=2)


def test_all_values_are_checked_together(file):
    """Neither fits the defaults without the other."""
    found = read_config(file("n_envs = 1\nn_steps = 16\nn_minibatches = 16"), PPOConfig(n_minibatches=1024))
    assert (found.n_envs, found.n_steps, found.n_minibatches) == (1, 16, 16)


def test_a_component_checks_its_own_settings(file):
    recipe = get_recipe("lpg-gridworld")
    found = read_config(file("[recipe.settings]\nwidth = 8\nembedding = 4"), MetaTrain(recipe)).recipe
    assert found.settings == recipe.settings | {"width": 8, "embedding": 4}
    with pytest.raises(UserError, match="no setting 'widht'"):
        read_config(file("[recipe.settings]\nwidht = 8"), MetaTrain(recipe)).recipe.make_component()


@dataclass
class Own:
    """Settings of a study of someone's own, whose module need not postpone its annotations."""

    rate: float = 0.1
    note: str | None = None
    size: int | None = None
    weights: dict = field(default_factory=dict)


Own.__dataclass_fields__["rate"].type = float  # as without `from __future__ import annotations`


def test_settings_of_someone_elses(file):
    text = 'rate = 1\nnote = "n"\nsize = 3\n[weights]\na = 0.5'
    assert read_config(file(text), Own()) == Own(1.0, "n", 3, {"a": 0.5})


# --- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("step = 5", ["unknown setting 'step'", "is 'steps'"]),
        ("[config]\nn_env = 5", ["unknown setting 'config.n_env'", "is 'config.n_envs'"]),
        ("[config.hyper]\ngama = 0.9", ["unknown setting 'config.hyper.gama'", "is 'config.hyper.gamma'"]),
        ("[config.hypre]\ngamma = 0.9", ["unknown setting 'config.hypre'", "is 'config.hyper'"]),
        ("steps = 5.0", ["steps is 5.0", "expected"]),
        ("steps = true", ["steps is True", "expected"]),
        ('steps = "many"', ["steps is 'many'", "expected"]),
        ("steps = [5]", ["steps is [5]", "expected"]),
        ("[steps]\nx = 5", ["steps is {'x': 5}", "expected"]),
        ("resume = 1", ["resume is 1", "expected"]),
        ("config = 3", ["config is 3", "expected"]),
        ('[config.hyper]\ngamma = "high"', ["config.hyper.gamma is 'high'", "expected"]),
        ("[config.hyper]\ngamma = true", ["config.hyper.gamma is True"]),
        ("[config.hyper]\ngamma = 1.5", ["gamma is 1.5", "at most 1"]),
        ("[config]\nlinear_decay = 1", ["config.linear_decay is 1", "expected"]),
        ("[config]\noptimizer = 3", ["config.optimizer is 3", "expected"]),
        ('[config]\noptimizer = "sdg"', ["optimizer is 'sdg'", "sgd"]),
        ("[config.agent]\nhidden = 64", ["config.agent.hidden is 64", "(64, 64)"]),
        ('[config.agent]\nhidden = ["wide"]', ["config.agent.hidden is", "'wide'"]),
        ("[config.agent]\nhidden = [64.5]", ["config.agent.hidden is", "64.5"]),
        ('[config.agent]\nkind = "cnov"', ["config.agent.kind", "'cnov'", "conv"]),
        ('[config.agent]\nactivation = "rleu"', ["config.agent.activation", "'rleu'", "relu"]),
        ("steps = 0", ["steps is 0", "at least 1"]),
        ("steps =", ["is no TOML file"]),
        ("steps = 1\nsteps = 2", ["is no TOML file"]),
    ],
)
def test_a_mistake_is_one_sentence(file, text, said):
    path = file(text)
    with pytest.raises(UserError) as error:
        read_config(path, Train())
    sentence = str(error.value)
    assert sentence.startswith(str(path)) and "\n" not in sentence
    for part in said:
        assert part in sentence


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[recipe.train.loss]\nregularisers = 0.5", "recipe.train.loss.regularisers is 0.5"),
        ('[recipe]\nsettings = "wide"', "recipe.settings is 'wide'"),
        ('[recipe.train]\nhorizon = "long"', "recipe.train.horizon is 'long'"),
        ("[recipe.train.bandit]\nlearning_rates = 0.5", "recipe.train.bandit.learning_rates is 0.5"),
        ("[recipe.train.bandit]\nlearning_rates = [true]", "recipe.train.bandit.learning_rates is"),
        ('[recipe.train.estimator]\nouter_terms = "lats"', "recipe.train.estimator.outer_terms"),
    ],
)
def test_a_number_in_place_of_many_is_a_mistake(file, text, said):
    with pytest.raises(UserError, match=said):
        read_config(file(text), MetaTrain(get_recipe("lpg-gridworld")))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"Cannot read .*none\.toml: No such file"):
        read_config(tmp_path / "none.toml", Train())
    with pytest.raises(UserError, match=r"Cannot read .*: Is a directory"):
        read_config(tmp_path, Train())
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="binary is no TOML file"):
        read_config(tmp_path / "binary", Train())


def test_a_file_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write"):
        write_config(tmp_path / "file" / "below.toml", PPOConfig(), "")


# --- on the command line --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "file", "rest"),
    [
        ("", None, ""),
        ("--steps 3", None, "--steps 3"),
        ("--config a.toml", "a.toml", ""),
        ("--steps 3 --config a.toml --seed 1", "a.toml", "--steps 3 --seed 1"),
        ("--config=a.toml --seed 1", "a.toml", "--seed 1"),
        ("--config.n-envs 3 --config a.toml", "a.toml", "--config.n-envs 3"),
        ("--config.n-envs=3", None, "--config.n-envs=3"),
    ],
)
def test_the_option_that_names_the_file(words, file, rest):
    assert config_option(words.split()) == (file and Path(file), rest.split())


@pytest.mark.parametrize("words", [["--config"], ["--config", "--steps", "3"], ["--steps", "3", "--config"]])
def test_the_option_without_a_file(words):
    with pytest.raises(UserError, match="--config needs a file"):
        config_option(words)


@pytest.fixture
def parsed(monkeypatch, tmp_path):
    """What `train` and `meta-train` are called with, in place of what they do."""
    monkeypatch.chdir(tmp_path)
    found: list = []
    monkeypatch.setattr(experiments.train, "train", lambda env, args, command: found.append(args))
    monkeypatch.setattr(experiments.meta_train, "meta_train", lambda args, command, group: found.append(args))

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["learned-rl", *map(str, words)])
        main()
        return found.pop()

    return run


def test_train_takes_the_file(parsed, tmp_path):
    path = write_config(tmp_path / "best.toml", AgentSettings(ODD, 4321), "best")
    assert parsed("train", "CartPole-v1", "--config", path) == Train(steps=4321, config=ODD)
    assert parsed("train", "CartPole-v1", f"--config={path}") == Train(steps=4321, config=ODD)


def test_what_is_said_beside_the_file_wins(parsed, tmp_path):
    path = write_config(tmp_path / "best.toml", AgentSettings(ODD, 4321), "best")
    for words in (["--config", path, "--config.hyper.gamma", "0.5"], ["--config.hyper.gamma", "0.5", "--config", path]):
        found = parsed("train", "CartPole-v1", *words, "--config.n-epochs", "9", "--seeds", "2")
        assert found.config == dataclasses.replace(ODD, n_epochs=9, hyper=ODD.hyper.replace(gamma=0.5))
        assert (found.steps, found.seeds) == (4321, 2)


def test_the_file_wins_over_what_suits_the_objective(parsed, file):
    path = file("[config]\nn_envs = 2\n[config.hyper]\nlearning_rate = 0.5")
    plain = parsed("train", "CartPole-v1", "--objective", "lpg").config
    found = parsed("train", "CartPole-v1", "--objective", "lpg", "--config", path).config
    assert plain.n_envs == 64 and plain.n_epochs == 1
    assert found == dataclasses.replace(plain, n_envs=2, hyper=plain.hyper.replace(learning_rate=0.5))


def test_meta_train_takes_the_file(parsed, tmp_path):
    settings = outer_settings(get_recipe("lpg-gridworld"))
    train = dataclasses.replace(settings.recipe.train, learning_rate=0.002, max_grad_norm=math.inf)
    other = {"prediction_entropy": -0.5, "pi_hat_square": 0.25, "y_hat_square": 0.125}
    train = dataclasses.replace(train, estimator=dataclasses.replace(train.estimator, window=3))
    train = dataclasses.replace(train, loss=dataclasses.replace(train.loss, regularisers=other))
    changed: Recipe = dataclasses.replace(
        settings.recipe, train=train, settings=settings.recipe.settings | {"width": 8}
    )
    path = write_config(tmp_path / "best.toml", OuterSettings(changed), "best")
    found = parsed("meta-train", "lpg-gridworld", "--config", path, "--seed", "3")
    assert found == MetaTrain(changed, seed=3)
    found = parsed("meta-train", "lpg-gridworld", "--config", path, "--recipe.train.estimator.window", "7").recipe
    assert found.train.estimator == dataclasses.replace(train.estimator, window=7)


@pytest.mark.parametrize("command", ["train CartPole-v1", "meta-train lpg-gridworld"])
@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--config", "--config needs a file"),
        ("--config none.toml", "Cannot read none.toml: No such file or directory."),
        ("--config bad.toml", "bad.toml: unknown setting 'deed': the nearest of"),
    ],
)
def test_a_wrong_file_ends_the_command(monkeypatch, capsys, tmp_path, command, option, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.toml").write_text("deed = 3")
    monkeypatch.setattr(sys, "argv", ["learned-rl", *command.split(), *option.split()])
    with pytest.raises(SystemExit) as end:
        main()
    sentence = capsys.readouterr().err
    assert end.value.code == 2 and sentence.startswith(f"learned-rl: {said}") and sentence.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["bad.toml"]

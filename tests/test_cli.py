"""The command line in process: mistakes are one sentence and exit code 2, help names every field, commands chain."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import shlex
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch

from experiments.cli import COMMANDS, Bench, Report, Show
from experiments.evaluate import BASELINES, Evaluate
from experiments.interrupt import holding_interrupts
from experiments.meta_train import MetaTrain
from experiments.options import parse
from experiments.recipes import get_recipe, recipes
from experiments.runs import ARTIFACT, CHECKPOINT, CONFIG, METRICS, SCORES, read_metrics
from experiments.train import Train
from learned_rl import PPO, artifacts
from learned_rl.lifetimes import Lifetimes
from learned_rl.registry import components, families
from learned_rl.types import UserError
from meta_optimizers.trainer import MetaTrainer
from objectives.lpg import LPG

TINY = shlex.split(
    "meta-train lpg-gridworld --recipe.family grid/small --recipe.train.lifetimes 4 --recipe.train.horizon 10 "
    "--recipe.train.agent.n-envs 2 --recipe.train.agent.n-steps 5 --recipe.train.estimator.window 2 "
    "--recipe.meta-steps 4 --recipe.validate-every 2 --recipe.validation-tasks 4 --recipe.checkpoint-every 2"
)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "component.safetensors"
    artifacts.save(LPG(predictions=3, width=4, core="gru"), path, {"family": "grid/small"})
    return path


# --- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("meta-trian lpg-gridworld", ["'meta-trian'", "'meta-train'"]),
        ("meta-train lpg-girdworld", ["'lpg-girdworld'", "'lpg-gridworld'"]),
        ("meta-train", ["recipe", "lpg-gridworld"]),
        ("meta-train --seed 3", ["recipe", "before its options"]),
        ("meta-train lpg-gridworld --recipe.family gird/small", ["'gird/small'", "'grid/small'"]),
        ("meta-train lpg-gridworld --recipe.family grid/smal", ["'smal'", "'small'"]),
        ("meta-train lpg-gridworld --recipe.component lpgg", ["'lpgg'", "'lpg'"]),
        ("meta-train lpg-gridworld --recipe.component adam", ["'adam'"]),
        ("meta-train lpg-gridworld --recipe.meta-step 3", ["'--recipe.meta-step'", "'--recipe.meta-steps'"]),
        ("meta-train lpg-gridworld --recipe.meta-steps 0", ["meta_steps is 0", "at least 1"]),
        ("meta-train lpg-gridworld --recipe.minutes nan", ["minutes is nan"]),
        ("meta-train lpg-gridworld --recipe.train.lifetimes 0", ["lifetimes is 0", "at least 1"]),
        ("meta-train lpg-gridworld --recipe.train.horizon 0", ["horizon is 0", "at least 1"]),
        ("meta-train lpg-gridworld --recipe.train.horizon 9 5", ["horizon is 5", "at least 9"]),
        ("meta-train lpg-gridworld --recipe.train.estimator.window 0", ["window is 0"]),
        ("meta-train lpg-gridworld --recipe.train.agent.optimizer sdg", ["'sdg'", "sgd"]),
        ("train", ["gymnasium id, task family or recipe"]),
        ("train CartPol-v1", ["'CartPol-v1'", "'CartPole-v1'"]),
        ("train grid/smal", ["'smal'", "'small'"]),
        ("train Blackjack-v1", ["Blackjack-v1", "Tuple"]),
        ("train CartPole-v1 --objective dpoo", ["'dpoo'", "'dpo'"]),
        ("train CartPole-v1 --objective adam", ["'adam'", "'optimizer'", "'objective'"]),
        ("train CartPole-v1 --optimizer adm", ["'adm'", "'adam'"]),
        ("train CartPole-v1 --objective none.safetensors", ["'none.safetensors'"]),
        ("train CartPole-v1 --preset a3c", ["'a3c'", "'a2c'"]),
        ("train CartPole-v1 --preset=a3c", ["'a3c'", "'a2c'"]),
        ("train CartPole-v1 --stepz 3", ["'--stepz'", "'--steps'"]),
        ("train CartPole-v1 --config.n-env=3", ["'--config.n-env'", "'--config.n-envs'"]),
        ("train CartPole-v1 --steps many", ["--steps", "'many'", "expected --steps INT"]),
        ("train CartPole-v1 --steps", ["--steps"]),
        ("train CartPole-v1 --steps 0", ["steps is 0", "at least 1"]),
        ("train CartPole-v1 --episodes 0", ["episodes is 0"]),
        ("train CartPole-v1 --checkpoints 0", ["checkpoints is 0"]),
        ("train CartPole-v1 --seeds 0", ["seeds is 0"]),
        ("train CartPole-v1 --seed -1", ["seed is -1", "at least 0"]),
        ("train CartPole-v1 --config.n-envs 0", ["n_envs is 0"]),
        ("train CartPole-v1 --config.hyper.gamma x", ["--config.hyper.gamma", "'x'", "FLOAT"]),
        ("train CartPole-v1 --config.agent.kind cnov", ["'cnov'", "nearest is 'conv'"]),
        ("train CartPole-v1 --config.agent.kind conv", ["'conv'", "kind='auto'"]),
        ("train CartPole-v1 --config.optimizer adamm", ["'adamm'", "adam"]),
        ("train CartPole-v1 --device nowhere", ["'nowhere'", "cpu"]),
        ("train CartPole-v1 Acrobot-v1", ["'Acrobot-v1'"]),
        ("train two-colour-bmg", ["'two-colour-bmg'"]),
        ("train CartPole-v1 --self-tune gama", ["'gama'", "'gamma'"]),
        ("train CartPole-v1 --self-tune gamma,", ["number ''"]),
        ("train CartPole-v1 --self-tune gamma,gamma", ["gamma", "twice"]),
        ("train CartPole-v1 --self-tune gamma=1", ["'gamma=1'", "NAME=LOW:HIGH"]),
        ("train CartPole-v1 --self-tune gamma=0.9:0.8", ["0.9", "0.8"]),
        ("train CartPole-v1 --self-tune gamma --hyperparameters schedule", ["'schedule'", "self_tuned"]),
        ("train CartPole-v1 --self-tune clip_range", ["clip_range", "'ppo_clip'", "'ppo_soft_clip'"]),
        ("train CartPole-v1 --self-tune gamma --estimator es", ["'es'", "'truncated'"]),
        ("train CartPole-v1 --self-tune gamma --estimator bgm", ["'bgm'", "'bmg'"]),
        ("train CartPole-v1 --self-tune gamma --outer.critic.source own2", ["source", "'own2'"]),
        ("train CartPole-v1 --learn reward", ["reward", "'environment'", "no parameters"]),
        ("train CartPole-v1 --learn rewards", ["'rewards'", "'reward'"]),
        ("train CartPole-v1 --set reward.scale=1", ["reward", "default"]),
        ("train CartPole-v1 --reward lirpg --set reward.scal=1", ["'scal'", "scale"]),
        ("train CartPole-v1 --objective component.safetensors --set objective.widht=4", ["'widht'", "'width'"]),
        ("train CartPole-v1 --objective component.safetensors --set objective.width=5", ["has shape", "expected"]),
        ("train CartPole-v1 --objective lgp --set objective.width=4", ["component", "'lgp'"]),
        ("train CartPole-v1 --reward lirpg --set reward.scale=big", ["scale is 'big'", "float"]),
        ("train CartPole-v1 --reward lirpg --set reward.hidden=[3.5]", ["hidden is [3.5]", "int"]),
        ("train CartPole-v1 --reward lirpg --set reward.action=-4", ["action is -4", "at least 1"]),
        ("train CartPole-v1 --self-tune gamma --set hyperparameters.per_layer=no", ["per_layer is 'no'", "bool"]),
        ('train CartPole-v1 --self-tune gamma --set hyperparameters.numbers=["lr"]', ["--set", "numbers"]),
        ("train CartPole-v1 --reward lirpg --set reward=1", ["'reward=1'", "SLOT.NAME=VALUE"]),
        ("train CartPole-v1 --reward lirpg --set rewrad.scale=1", ["'rewrad'", "'reward'"]),
        ("train Pendulum-v1 --auxiliary stacx", ["stacx"]),
        ("train grid/small --hyperparameters mgrl", ["tabular", "gamma"]),
        ("evaluate", ["component file"]),
        ("evaluate none.safetensors", ["'none.safetensors'", "'component.safetensors'"]),
        ("evaluate component.safetensors --family gird/small", ["'gird/small'", "'grid/small'"]),
        ("evaluate component.safetensors --updates 9 --checkpoints 3 --baselines a2c,pop", ["'pop'", "'ppo'"]),
        ("evaluate component.safetensors --tasks 0", ["tasks is 0"]),
        ("evaluate component.safetensors --trials -1", ["trials is -1", "at least 0"]),
        ("evaluate component.safetensors --updates 0", ["updates is 0"]),
        ("evaluate component.safetensors --updates few", ["--updates", "few"]),
        ("report", ["at least one run folder"]),
        ("report nowhere", ["nowhere holds no run"]),
        ("report nowhere --outt x", ["'--outt'", "'--out'"]),
        ("show", ["component file"]),
        ("show lpgg", ["'lpgg'", "'lpg'"]),
        ("show ./x.safetensors", ["There is no component file"]),
        ("show lpg dpo", ["'dpo'"]),
        ("list everything", ["'everything'"]),
        ("list --al", ["'--al'", "'--help'"]),
        ("bench gird", ["'gird'", "'grid'"]),
    ],
)
def test_a_mistake_is_one_sentence(refused, file, tmp_path, words, said):
    sentence = refused(*shlex.split(words))
    for part in said:
        assert part in sentence
    assert [p.name for p in tmp_path.iterdir()] == [file.name], "a refused command leaves nothing behind"


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_the_terminal_changes_no_sentence(monkeypatch, encoding):
    """tyro draws its boxes with other characters in each."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    expected = {
        "--steps many": "Error parsing --steps: invalid literal for int() with base 10: 'many'; expected --steps INT",
        "--steps": "Missing value for argument '--steps'. Expected 1 values",
    }
    for words, said in expected.items():
        with pytest.raises(UserError) as error:
            parse(Train, "train X", words.split())
        assert str(error.value) == f"{said}; see `learned-rl train X --help`."


def test_no_gpu_is_one_sentence(refused):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    assert "device is 'cuda'" in refused("train", "CartPole-v1", "--device", "cuda")


@pytest.mark.parametrize(
    "command", ["train CartPole-v1", "evaluate component.safetensors --updates 10", shlex.join(TINY)]
)
def test_a_run_folder_that_is_used_or_cannot_be_written(refused, file, tmp_path, command):
    words = shlex.split(command)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / CONFIG).write_text("{}")
    assert "used already holds a run" in refused(*words, "--out", "used")
    assert f"Cannot write {file}/below" in refused(*words, "--out", file / "below")
    if "evaluate" not in command:
        assert "holds no run that --resume could continue" in refused(*words, "--out", "new", "--resume")
    assert {p.name for p in tmp_path.iterdir()} == {file.name, "used"}


def test_a_damaged_component_is_one_sentence(refused, file):
    file.write_bytes(file.read_bytes()[:-3])
    for words in (["evaluate", file], ["show", file], ["train", "CartPole-v1", "--objective", file]):
        assert "damaged" in refused(*words)


def test_outputs_that_cannot_be_written(refused, file):
    assert "Cannot write" in refused("show", file, "--out", file / "x.png")


def test_threads_are_a_number(refused, monkeypatch):
    monkeypatch.setenv("LEARNED_RL_THREADS", "two")
    assert "LEARNED_RL_THREADS is 'two'" in refused("list")


# --- help and catalogue -------------------------------------------------------------------------------------------


def fields(settings, prefix=""):
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name, None)
        nested = dataclasses.is_dataclass(value)
        yield from fields(value, f"{prefix}{f.name}.") if nested else [f"{prefix}{f.name}".replace("_", "-")]


@pytest.mark.parametrize(
    ("command", "settings"),
    [
        ("meta-train", MetaTrain(get_recipe("lpg-gridworld"))),
        ("meta-train lpg-gridworld", MetaTrain(get_recipe("lpg-gridworld"))),
        ("train", Train()),
        ("train CartPole-v1", Train()),
        ("train grid/small --objective lpg", Train()),
        ("evaluate", Evaluate()),
        ("report", Report),
        ("show", Show),
        ("bench", Bench),
        ("list", None),
    ],
)
def test_help_names_every_option(say, command, settings):
    code, out, err = say(*command.split(), "--help")
    assert code == 0 and not err and "usage: learned-rl " + command.split()[0] in out
    positional = {"runs": "PATH", "file": "STR", "groups": "STR"}
    for name in fields(settings) if settings else ():
        assert f"--{name} " in out or f"--{name}, " in out or positional.get(name, "--") in out, name


def test_help_shows_the_defaults_that_suit_the_objective(say, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")  # wider ones set groups of options side by side

    def default(out):
        words = " ".join(out.replace("│", " ").split())  # wherever a line is broken
        return words.split("copies of the environment in one lifetime (default: ")[1].split(")")[0]

    assert default(say("train", "CartPole-v1", "--help")[1]) == "8"
    assert default(say("train", "CartPole-v1", "--objective", "lpg", "--help")[1]) == "64"


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_usage_names_every_command(say, words):
    code, out, err = say(*words)
    assert code == 0 and not err
    for command in COMMANDS:
        assert f"learned-rl {command}" in out


def test_list_lists_everything(say):
    code, out, _ = say("list")
    assert code == 0
    presets = [preset for family in families().values() for preset in family.presets]
    for name in [*recipes(), *families(), *presets, *components()]:
        assert name in out, name


@pytest.mark.parametrize(
    ("name", "picture"),
    [
        ("lpg", "lpg-untrained.png"),
        ("dpo", "dpo.png"),
        ("ppo_clip", "ppo_clip.png"),
        ("adam", "adam.png"),
        ("open", "open-untrained.png"),
    ],
)
def test_show_draws_a_registered_component(say, tmp_path, name, picture):
    code, out, _ = say("show", name)
    assert code == 0 and name in out and f"picture: {picture}" in out
    assert is_picture(tmp_path / picture)


def test_a_picture_of_another_kind_is_refused(refused, tmp_path):
    assert "--out is x.gif: the picture is a PNG, expected a name such as x.png." in refused(
        "show", "dpo", "--out", "x.gif"
    )
    assert not (tmp_path / "x.gif").exists()


def test_ctrl_c_while_libraries_are_imported(monkeypatch, capsys):
    class Interrupted:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == "experiments.cli":
                raise KeyboardInterrupt

    from experiments.__main__ import main

    monkeypatch.delitem(sys.modules, "experiments.cli")
    monkeypatch.setattr(sys, "meta_path", [Interrupted, *sys.meta_path])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 130 and capsys.readouterr().err == "learned-rl: interrupted.\n"


def test_show_describes_what_it_cannot_draw(say, tmp_path):
    for name, said in {"stac": "numbers", "meta_sgd": "per"}.items():  # the latter takes the size of its agents first
        code, out, _ = say("show", name)
        assert code == 0 and said in out and f"no picture of {name}" in out and not [*tmp_path.iterdir()]


def test_show_draws_the_step_sizes_of_an_optimizer_that_has_met_its_agents(say, tmp_path):
    rule = PPO("bandit/bernoulli-5", optimizer="meta_sgd").algorithm.slots.optimizer
    artifacts.save(rule, tmp_path / "rates.safetensors")
    assert say("show", "rates.safetensors")[0] == 0 and is_picture(tmp_path / "rates.png")


def test_show_draws_a_file_beside_it(say, file, tmp_path):
    code, out, _ = say("show", file)
    assert code == 0 and "grid/small" in out
    assert is_picture(file.with_suffix(".png"))
    assert say("show", file, "--out", "deep/er.png")[0] == 0 and is_picture(tmp_path / "deep" / "er.png")


def is_picture(path: Path) -> bool:
    data = path.read_bytes()
    return data.startswith(b"\x89PNG") and data.endswith(b"IEND\xaeB`\x82") and len(data) > 5000


# --- the whole way ------------------------------------------------------------------------------------------------


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as f:
        return list(csv.DictReader(f))


def check_scores(path: Path, suite: str, methods: set[str], steps: int, runs: int, scored: bool) -> None:
    found = rows(path)
    assert list(found[0]) == ["suite", "method", "task", "seed", "step", "return", "score"]
    assert {r["suite"] for r in found} == {suite} and {r["method"] for r in found} == methods
    assert len(found) == len(methods) * steps * runs
    for r in found:
        assert int(r["task"]) >= 0 and int(r["seed"]) >= 0 and int(r["step"]) >= 0
        assert abs(float(r["return"])) < 1e6
        assert scored or r["score"] == ""
    assert not scored or any(float(r["score"]) > 0 for r in found if r["score"])


@pytest.mark.slow
def test_from_meta_training_to_the_report(say, refused, tmp_path):
    code, out, err = say(*TINY, "--out", "meta")
    assert code == 0 and "component: meta/component.safetensors" in out, err
    meta = tmp_path / "meta"
    expected = {CONFIG, METRICS, CHECKPOINT, ARTIFACT, "command.txt", "git.txt", "seed", "versions.json", "tensorboard"}
    assert {p.name for p in meta.iterdir()} == expected | {"figures"}
    logged = read_metrics(meta)
    assert logged["meta/grad_norm"][0].tolist() == [1, 2, 3, 4] and all(logged["meta/grad_norm"][1] > 0)
    assert logged["meta/heldout_return"][0].tolist() == [0, 2, 4]
    assert is_picture(meta / "figures" / "training.png")
    header = artifacts.read_header(meta / ARTIFACT)
    assert header["provenance"]["family"] == "grid/small" and header["provenance"]["meta_steps"] in (0, 2, 4)
    assert "meta already holds a run" in refused(*TINY, "--out", "meta")

    code, out, err = say(*TINY, "--recipe.component", meta / ARTIFACT, "--recipe.minutes", "0", "--out", "further")
    assert code == 0, err  # no time for a single step: what was validated and saved is what it began with
    earlier, later = (artifacts.load(tmp_path / x / ARTIFACT) for x in ("meta", "further"))
    assert all(torch.equal(v, earlier.state_dict()[k]) for k, v in later.state_dict().items())
    assert later.provenance["continues"] == {"file": str(meta / ARTIFACT)} | header["provenance"]
    assert later.provenance["meta_steps"] == 0
    said = refused(*TINY, "--recipe.component", meta / ARTIFACT, "--recipe.settings.predictions", "7")
    assert "settings.predictions is 7" in said and "made with 8" in said and "'lpg'" in said

    words = "--tasks 3 --seeds 2 --trials 2 --tuning-tasks 2 --episodes 2 --updates 4 --checkpoints 2 --out held-out"
    code, out, err = say("evaluate", meta / ARTIFACT, "--baselines", ",".join(BASELINES), *words.split())
    assert code == 0, err
    held_out = tmp_path / "held-out"
    check_scores(held_out / SCORES, "grid/small", {"lpg", *BASELINES}, steps=3, runs=3 * 2, scored=True)
    assert {path.stem for path in (held_out / "tuned").iterdir()} == {"lpg", *BASELINES} - {"untrained"}
    assert (held_out / "report.html").stat().st_size > 10_000
    assert "held-out already holds a run" in refused("evaluate", meta / ARTIFACT, "--out", "held-out")

    words = "--steps 3000 --seeds 2 --checkpoints 3 --episodes 2 --out unseen"
    code, out, err = say("train", "CartPole-v1", "--objective", meta / ARTIFACT, *words.split())
    assert code == 0 and "CartPole-v1" in out, err
    check_scores(tmp_path / "unseen" / SCORES, "CartPole-v1", {"lpg-meta"}, steps=4, runs=2, scored=False)
    updates = sorted({int(r["step"]) for r in rows(tmp_path / "unseen" / METRICS)})
    assert updates == [0, 1280, 2560, 3840]

    code, out, err = say("report", "meta", "held-out", "unseen", "--out", "all.html")
    page = (tmp_path / "all.html").read_text()
    assert code == 0 and page.count("data:image/png;base64,") >= 3, err
    for part in ("grid/small", "CartPole-v1", "untrained", "lpg-gridworld", "learned-rl meta-train"):
        assert part in page


def test_train_in_a_folder_of_its_own(say, tmp_path):
    """More points of the curve than updates, so that several fall on one; the default folder; a preset."""
    words = "--preset a2c --steps 300 --episodes 1 --config.agent.hidden 4"
    assert say("train", "CartPole-v1", *words.split())[0] == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("a2c-CartPole-v1__seed0__")
    assert [int(r["step"]) for r in rows(folder / SCORES)] == [0, 160, 320]
    assert json.loads((folder / CONFIG).read_text())["config"]["agent"]["hidden"] == [4]


# --- Ctrl-C -------------------------------------------------------------------------------------------------------


def without_clock(folder: Path) -> list[dict[str, str]]:
    return [r for r in rows(folder / METRICS) if not r["tag"].startswith("time/") and r["tag"] != "meta/minutes"]


@pytest.mark.slow
def test_an_interrupted_meta_training_goes_on_where_it_was(say, refused, tmp_path, monkeypatch):
    assert say(*TINY, "--out", "whole")[0] == 0
    step = MetaTrainer.step

    def interrupted(self):
        if self.steps == 2:
            os.kill(os.getpid(), signal.SIGINT)  # in the middle of the third step, after the checkpoint of the second
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(MetaTrainer, "step", interrupted)
        code, _, err = say(*TINY, "--out", "broken")
    assert code == 130 and "interrupted and saved" in err and "--out broken --resume" in err and "Traceback" not in err
    assert {int(r["step"]) for r in rows(tmp_path / "broken" / METRICS)} == {0, 1, 2, 3}
    assert "already holds a run" in refused(*TINY, "--out", "broken")
    assert say(*TINY, "--out", "broken", "--resume")[0] == 0
    assert without_clock(tmp_path / "broken") == without_clock(tmp_path / "whole")
    ours, theirs = (artifacts.load(tmp_path / run / ARTIFACT).state_dict() for run in ("broken", "whole"))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_an_interrupted_training_goes_on_where_it_was(say, tmp_path, monkeypatch):
    words = shlex.split(
        "train control/cartpole --steps 1000 --seeds 2 --checkpoints 2 --episodes 1 --config.n-steps 16 "
        "--config.agent.hidden 4"
    )
    assert say(*words, "--out", "whole")[0] == 0
    advance, calls = Lifetimes.advance, []

    def interrupted(self, inner):
        calls.append(1)
        if len(calls) == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return advance(self, inner)

    with monkeypatch.context() as patch:
        patch.setattr(Lifetimes, "advance", interrupted)
        code, _, err = say(*words, "--out", "broken")
    assert code == 130 and "--out broken --resume" in err
    assert len(calls) == 6 and max(int(r["step"]) for r in rows(tmp_path / "broken" / METRICS)) == 6 * 16 * 8
    assert say(*words, "--out", "broken", "--resume")[0] == 0
    for name in (METRICS, SCORES):
        ours, theirs = rows(tmp_path / "broken" / name), rows(tmp_path / "whole" / name)
        assert [r for r in ours if r.get("tag") != "time/fps"] == [r for r in theirs if r.get("tag") != "time/fps"]


def test_an_interrupt_elsewhere_says_so(say, monkeypatch):
    def stop(words, command):
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, "list", stop)
    assert say("list") == (130, "", "learned-rl: interrupted.\n")


@pytest.fixture
def interrupts():
    """Python's own handler of Ctrl-C, also where the tests run in the background with Ctrl-C ignored."""
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, inherited)


def test_the_second_interrupt_is_not_held_back(interrupts):
    with pytest.raises(KeyboardInterrupt), holding_interrupts() as asked:
        assert not asked()
        os.kill(os.getpid(), signal.SIGINT)
        assert asked()
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second interrupt was held back")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_interrupts_are_left_alone_outside_the_main_thread():
    found = []

    def work():
        with holding_interrupts() as asked:
            found.append(asked())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]

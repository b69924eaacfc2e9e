"""Two processes do what one does: the same meta-parameters to rounding, the same checkpoints, one voice."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from example_components import RunningReward

from experiments.benchmarks.measure import processes
from experiments.benchmarks.scaling import free_port
from experiments.runs import ARTIFACT, CHECKPOINT, METRICS, read_metrics
from learned_rl import artifacts
from learned_rl.component import Hyper
from learned_rl.ppo import PPOConfig
from learned_rl.registry import make_family
from learned_rl.types import UserError
from meta_optimizers import group as groups
from meta_optimizers.bootstrapped import BootstrappedConfig
from meta_optimizers.estimators import ESTIMATORS, estimator_config
from meta_optimizers.forward_mode import ForwardConfig
from meta_optimizers.group import Group, Processes, joined
from meta_optimizers.trainer import MetaTrainConfig, MetaTrainer
from objectives.lpg import LPG

LIFETIMES, HORIZON, BEFORE, AFTER, BROKEN = 6, 24, 3, 3, 3
CARRIES = {"truncated", "rematerialised", "first_order", "bmg", "forward", "es", "pes", "nres", "cma"}
WHOLE = {"es", "cma"}  # lifetimes begin and end together

TINY = shlex.split(
    "meta-train lpg-gridworld --seed 3 --recipe.family grid/small --recipe.train.lifetimes 4 --recipe.train.horizon 6 "
    "--recipe.train.agent.n-envs 2 --recipe.train.agent.n-steps 5 --recipe.train.estimator.window 2 "
    "--recipe.validate-every 500 --recipe.validation-tasks 2 --recipe.checkpoint-every 3"
)
RESUMED = "the same command with --resume goes on from the last checkpoint"


# --- the same numbers ------------------------------------------------------------------------------------------------


def config(name):
    """Settings under which the estimator carries something from call to call, where it can."""
    c = estimator_config(name)
    if isinstance(c, ForwardConfig):
        return replace(c, every=2)
    if isinstance(c, BootstrappedConfig):
        return replace(c, window=2, bootstrap=3, continue_from="window", outer_data="fresh_reuse")
    if hasattr(c, "outer_data"):
        return replace(c, window=2, outer_data="fresh_reuse")
    return replace(c, window=HORIZON // 2 if name in WHOLE else 2)


class Watched(Processes):
    """Notes how many numbers each exchange of a step gives away."""

    given: list[int]

    def sum(self, x):
        self.given.append(x.numel())
        return super().sum(x)

    def gather(self, x):
        self.given.append(x.numel())
        return super().gather(x)


def trainer(name, group=None):
    torch.manual_seed(0)
    tabular = {"n_envs": 2, "n_steps": 5, "n_epochs": 1, "n_minibatches": 1, "optimizer": "adam"}
    agent = PPOConfig(**tabular, hyper=Hyper(learning_rate=0.1))
    component = RunningReward() if name == "forward" else LPG(predictions=3, width=4, core="gru")
    c = MetaTrainConfig(lifetimes=LIFETIMES, horizon=HORIZON, agent=agent, estimator=config(name))
    return MetaTrainer(make_family("grid/small"), component, c, seed=1, dtype=torch.float64, group=group)


def steps(trainer, count):
    """Meta-steps, with one lifetime that breaks before the second; eta after them."""
    for _ in range(count):
        if trainer.steps == 1:
            rows = trainer.problem.group.own(torch.arange(LIFETIMES)) == BROKEN
            with torch.no_grad():
                trainer.lifetimes.population.theta[rows] = float("nan")
        metrics = trainer.step()
        assert metrics["skipped"] == 0
    return torch.cat([p.detach().flatten() for p in trainer.eta.values()])


@cache
def alone(name):
    """The state after the first steps, eta after all of them, and how many lifetimes restarted."""
    one = trainer(name)
    steps(one, BEFORE)
    state = one.state_dict()
    return state, steps(one, AFTER), one.problem.restarts


def in_two(work, *args):
    """What work(rank, *args) returns in each of two processes that find each other."""
    port = free_port()
    with processes(2) as pool:
        return [job.result() for job in [pool.submit(ranked, work, rank, port, *args) for rank in range(2)]]


def ranked(work, rank, port, *args):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return work(rank, *args)


def member(rank, states):
    """One of two processes: everything that the tests compare, for each estimator."""
    found = {}
    with joined() as group:
        group.__class__, group.given = Watched, []
        for name, state in states.items():
            group.given.clear()
            two = trainer(name, group)
            steps(two, BEFORE)
            given, saved = max(group.given), two.state_dict()
            resumed = trainer(name, group)
            resumed.load_state_dict(state)
            found[name] = saved, steps(two, AFTER), steps(resumed, AFTER), given
    return found


@pytest.fixture(scope="module")
def together():
    """What two processes found."""
    first, second = in_two(member, {name: alone(name)[0] for name in ESTIMATORS})
    for name in ESTIMATORS:
        assert second[name][0] == {}  # only the first one saves
        assert all(torch.equal(a, b) for a, b in zip(first[name][1:3], second[name][1:3], strict=True))
    return first


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9, equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ESTIMATORS)
def test_two_processes_find_the_same_meta_parameters(together, name):
    _, expected, restarts = alone(name)
    assert restarts >= 2 and not torch.equal(expected, steps(trainer(name), 0))
    close(together[name][1], expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_checkpoint_of_two_processes_is_that_of_one(together, name):
    expected, found = alone(name)[0], together[name][0]
    assert any(k.startswith("estimator/") for k in expected) == (name in CARRIES)
    assert found.keys() ^ expected.keys() <= {"estimator/pending/final_obs"}  # no process knows of the other's
    for k in expected.keys() & found.keys():
        close(found[k], expected[k])


@pytest.mark.slow
@pytest.mark.parametrize("name", ESTIMATORS)
def test_resuming_on_another_number_of_processes(together, name):
    saved, _, from_one, _ = together[name]
    expected = alone(name)[1]
    close(from_one, expected)
    one = trainer(name)
    one.load_state_dict(saved)
    close(steps(one, AFTER), expected)
    forgetful = trainer(name)
    forgetful.load_state_dict({k: v for k, v in saved.items() if not k.startswith("estimator/")})
    assert torch.equal(steps(forgetful, AFTER), steps_again(name, saved)) == (name not in CARRIES)


def steps_again(name, saved):
    one = trainer(name)
    one.load_state_dict(saved)
    return steps(one, AFTER)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["es", "pes", "nres", "cma"])
def test_evolution_exchanges_costs_not_gradients(together, name):
    size = len(alone(name)[1])
    assert together[name][3] <= 4 * LIFETIMES < size  # what is told of each lifetime that may begin anew: 4 numbers
    assert together["truncated"][3] >= 48  # a gradient's largest tensor is seen


# --- parting ---------------------------------------------------------------------------------------------------------


def leaver(rank, folder, late, patience):
    """One of two processes that part; returns whether the second, up to so many seconds late, has ended its group."""
    left, destroy = folder / "left0", dist.destroy_process_group

    def end():
        until = time.monotonic() + late
        while rank == 1 and time.monotonic() < until and not left.exists():
            time.sleep(0.05)
        destroy()
        folder.joinpath(f"ended{rank}").touch()

    farewell = patch.object(groups, "FAREWELL", timedelta(seconds=patience))
    with farewell, patch.object(dist, "destroy_process_group", end), joined():
        pass
    found = folder.joinpath("ended1").exists()
    folder.joinpath(f"left{rank}").touch()
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("late", "patience"), [(1, 60), (60, 1)])
def test_the_first_process_leaves_last_if_the_others_take_not_too_long(tmp_path, late, patience):
    first, _ = in_two(leaver, tmp_path, late, patience)
    assert first == (late < patience)


def threads(rank):
    """Those of one of two processes after they parted, and whether gloo had some before."""
    with joined() as group:
        import torch.distributed._shard.sharded_tensor

        group.sum(torch.ones(1))
        before = running()
    return "pt_gloo_runloop" in before, running()


def running():
    """The names of this process's threads."""
    return [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds threads in /proc")
def test_no_thread_outlives_the_group():
    """It would abort the process if it still held a tensor when the interpreter ends."""
    for before, after in in_two(threads):
        assert before and not [name for name in after if "gloo" in name]


# --- one process is a group ------------------------------------------------------------------------------------------


def test_one_process_decides_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined() as group:
        assert type(group) is Group and group.first and group.size == 1 and group.launcher() == []
        assert group.agreed(True) and not group.agreed(False)
        assert group.told(lambda: 3) == group.together(lambda: 3) == 3 and group.device("cuda") == "cuda"
        with pytest.raises(UserError, match="no"):
            group.told(mistaken)


def mistaken():
    raise UserError("no")


def test_lifetimes_that_cannot_be_spread():
    group = Group()
    group.size = 4
    with pytest.raises(UserError, match=r"6 lifetimes on 4 processes: expected a multiple of 4, such as 8\."):
        trainer("truncated", group)
    group.rank, group.size = 1, 3
    assert group.own(torch.arange(6)).tolist() == [2, 3]


def test_a_problem_that_knows_no_processes_says_so():
    from experiments.oracles.quadratic import Quadratic

    problem = Quadratic(2)
    assert problem.join([{"a": torch.ones(2)}])["a"].tolist() == [1, 1]
    with pytest.raises(UserError, match="Quadratic runs in one process"):
        problem.join([{}, {}])


# --- the command line ------------------------------------------------------------------------------------------------


def spoken(*words):
    """Exit codes and standard errors of two processes started as torchrun would."""
    env = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "experiments", *map(str, words)]
    ranks = [env | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    started = [subprocess.Popen(command, env=each, stderr=subprocess.PIPE, text=True) for each in ranks]
    said = [p.communicate(timeout=200)[1] for p in started]
    return [p.returncode for p in started], said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["train", "CartPole-v1"], "train runs in one process, not in 2: torchrun is for meta-train alone."),
        ([*TINY, "--recipe.train.lifetimes", "5"], "5 lifetimes on 2 processes: expected a multiple of 2, such as 4."),
        (["meta-train", "lpg-gridworld", "--recipe.meta-steps", "0"], "meta_steps is 0: expected at least 1."),
        ([*TINY, "--resume"], "holds no run that --resume could continue"),
    ],
)
def test_a_mistake_is_said_once(tmp_path, words, sentence):
    codes, (first, second) = spoken(*words, *(["--out", tmp_path / "x"] if "meta-train" in words else []))
    assert codes == [2, 2] and second == "" and not (tmp_path / "x").exists()
    assert first.startswith("learned-rl: ") and sentence in first and first.count("\n") == 1


class Launch:
    """A run under torchrun, with a log for each process."""

    def __init__(self, folder: Path, *words: str, entry=("-m", "experiments")) -> None:
        self.logs = folder.with_suffix(".logs")
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        torchrun += ["--log-dir", str(self.logs), "--redirects", "3"]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        with folder.with_suffix(".log").open("w") as log:
            self.process = subprocess.Popen(
                [*torchrun, *entry, *words, "--out", str(folder)], env=env, stdout=log, stderr=log
            )
        self.folder = folder

    def said(self, stream="stderr") -> list[str]:
        """What each process wrote, in the order of their ranks."""
        return [p.read_text() for p in sorted(self.logs.glob(f"*/attempt_0/*/{stream}.log"))]

    def wait_for_step(self, step: int) -> None:
        end = time.monotonic() + 120
        while (self.folder / METRICS).exists() is False or self.steps() < step or not self.saved():
            assert self.process.poll() is None and time.monotonic() < end, self.said()
            time.sleep(0.02)

    def steps(self) -> int:
        return max((int(x[0][-1]) for x in read_metrics(self.folder).values()), default=0)

    def saved(self) -> bool:
        return (self.folder / CHECKPOINT).exists()

    def member(self, rank: int) -> int:
        """The process of that rank."""
        for path in Path("/proc").glob("[0-9]*"):
            try:
                parent = path.joinpath("stat").read_text().rpartition(")")[2].split()[1]
                words = path.joinpath("environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if int(parent) == self.process.pid and b"RANK=%d" % rank in words:
                return int(path.name)
        raise AssertionError(f"no process of rank {rank}")


def saved_steps(folder: Path) -> int:
    return int(torch.load(folder / CHECKPOINT, weights_only=True)["trainer/steps"])


@pytest.mark.slow
def test_torchrun_leaves_the_folder_of_one_process(say, tmp_path):
    words = [*TINY, "--recipe.meta-steps", "7"]
    run = Launch(tmp_path / "two", *words)
    assert run.process.wait(200) == 0, run.said()
    assert say(*words, "--out", tmp_path / "one")[0] == 0
    assert run.said() == ["", ""]
    first, second = run.said("stdout")
    assert f"component: {tmp_path / 'two' / ARTIFACT}" in first and "7/7 meta-steps" in first and second == ""
    names = {folder: {p.name for p in (tmp_path / folder).iterdir()} for folder in ("one", "two")}
    assert names["one"] == names["two"]
    command = (tmp_path / "two" / "command.txt").read_text()
    assert command.startswith("torchrun --nproc-per-node=2 --no-python learned-rl meta-train")
    one, two = (read_metrics(tmp_path / folder) for folder in ("one", "two"))
    for tag in ("meta/loss", "inner/return", "meta/grad_norm", "meta/heldout_return"):
        assert len(one[tag][0]) > 0
        np.testing.assert_allclose(two[tag][1], one[tag][1], rtol=1e-4, atol=1e-5)  # no episode may have ended: nan
    ours, theirs = (artifacts.load(tmp_path / x / ARTIFACT).state_dict() for x in ("two", "one"))
    for k in theirs:
        torch.testing.assert_close(ours[k], theirs[k], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others_and_the_run_resumes(say, tmp_path, victim):
    folder, words = tmp_path / "x", [*TINY, "--recipe.meta-steps", "5000"]
    run = Launch(folder, *words)
    run.wait_for_step(4)
    os.kill(run.member(victim), signal.SIGKILL)
    assert run.process.wait(60) != 0
    said = run.said()
    assert said[victim] == ""
    assert said[1 - victim].startswith(f"learned-rl: Process {1 - victim} of 2 lost another one"), said
    assert said[1 - victim].rstrip().endswith(f"{RESUMED}.") and said[1 - victim].count("\n") == 1
    assert not list(folder.glob(".*.part"))
    at = saved_steps(folder)
    assert at >= 3
    words[-1] = str(at + 2)
    if victim == 0:
        code, _, err = say(*words, "--out", folder, "--resume")  # by one process
        assert code == 0, err
    else:
        assert Launch(folder, *words, "--resume").process.wait(200) == 0
    assert saved_steps(folder) == at + 2 and (folder / ARTIFACT).exists()
    steps = read_metrics(folder)["inner/return"][0]
    assert steps.tolist() == list(range(1, at + 3))


@pytest.mark.slow
def test_ctrl_c_saves_and_ends_all(tmp_path):
    folder, words = tmp_path / "x", [*TINY, "--recipe.meta-steps", "5000"]
    run = Launch(folder, *words, entry=("--no-python", str(Path(sys.executable).with_name("learned-rl"))))
    run.wait_for_step(4)
    before = run.steps()
    os.kill(run.process.pid, signal.SIGINT)
    assert run.process.wait(60) != 0
    first, second = run.said()
    assert first == (f"learned-rl: interrupted and saved; the same command with --out {folder} --resume continues.\n")
    assert second == ""
    assert saved_steps(folder) == run.steps() >= before


@pytest.mark.slow
def test_a_slow_clock_decides_for_nobody_but_the_first(tmp_path):
    """The time is over at once for the first process only, if each looks at a clock of its own."""
    words = [*TINY, "--recipe.minutes", "0", "--out", tmp_path / "x"]
    codes, said = spoken(*words)
    assert codes == [0, 0] and said == ["", ""] and saved_steps(tmp_path / "x") == 0

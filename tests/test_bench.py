"""Benchmarks at toy size: what they measure is what they say; how fast it is, is not asserted."""

import csv
import json

import numpy as np
import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from experiments import bench
from experiments.benchmarks import disco, gpu, grid, learning, lpg, memory, optimizers, ppo, scaling, threads
from experiments.benchmarks.cleanrl_style import CleanRLStyle
from experiments.benchmarks.contenders import NO_SB3, SB3, PPOSettings, has_sb3, ours, sb3
from experiments.benchmarks.measure import Result, Rounds, fresh
from experiments.recipes import get_recipe
from learned_rl.agents import AgentConfig
from learned_rl.returns import gae
from learned_rl.types import UserError
from objectives.disco import Disco

LPG = lpg.Settings(lifetimes=2, copies=3, steps=4, window=2, predictions=5, widths=(256, 8), warm_up=1, repeats=3)
TOY_PPO = PPOSettings(n_envs=2, n_steps=16, n_epochs=2, batch_size=16, hidden=(8, 8))

needs_sb3 = pytest.mark.skipif(not has_sb3(), reason=NO_SB3)


# --- measuring ---------------------------------------------------------------------------------------------------


def test_rounds_take_turns_and_compare_within_a_round():
    calls = []
    times = {"a": iter([1.0, 20.0, 3.0]), "b": iter([2.0, 10.0, 1.0])}

    def contender(name):
        return lambda: calls.append(name) or next(times[name])

    rounds = Rounds({name: contender(name) for name in times}, 3)
    assert calls == ["a", "b"] * 3
    assert rounds.median("a") == 3.0
    assert rounds.ratio("a", "b") == 2.0  # of 0.5, 2, 3; the ratio of the medians would be 1.5
    assert rounds.spread("a") == "3 rounds, max/min 20.00"
    with pytest.raises(ValueError, match="at least 3"):
        Rounds({}, 2)


def test_a_fresh_process_has_the_threads_asked_for():
    assert fresh(2, torch.get_num_threads) == 2


# --- groups ------------------------------------------------------------------------------------------------------


def test_lpg_counts_steps():
    rows = lpg.measure(LPG)
    assert [r.target for r in rows[::3]] == [lpg.TARGETS[256], ""]
    for learned, every, step in (rows[:3], rows[3:]):
        assert learned.value == pytest.approx(2 * 2 * 3 * 4 / step.value)
        assert every.value == pytest.approx(learned.value * 3 / 2)
        assert step.ratio > 0 and step.peer == "its matrix products alone"


def test_lpg_trainer_collects_what_is_counted():
    trainer, _ = lpg.make_trainer(LPG, 8)
    trainer.step()
    assert trainer.environment_steps == LPG.agent_steps * (LPG.window + 1) / LPG.window


def test_matrix_products_are_those_of_a_meta_step():
    s = lpg.Settings(lifetimes=2, copies=8, steps=5, window=3, predictions=6)
    trainer, objective = lpg.make_trainer(s, 64)
    products = lpg.matrix_products(s, objective)
    in_place = {torch.ops.aten.addmm_: lambda a, left, right, **_: 2 * left[0] * left[1] * right[1]}
    counted = []
    for work in (trainer.step, products):
        with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
            work()
        counted.append(counter.get_total_flops())
    step, alone = counted
    assert 0.95 * step < alone <= step  # what is left out: the embedding of y


def test_grid_steps_every_copy():
    rows = grid.measure(grid.Settings(tasks=2, copies=3, steps=4, repeats=3))
    assert [r.name for r in rows] == [f"{f}, {kind} observations, 6 copies" for f, kind in grid.FAMILIES.items()]
    assert all(r.value > 0 and r.unit == "env steps/s" for r in rows)


def test_memory_reports_the_largest_look():
    rows = memory.measure(memory.Settings(lpg=LPG, width=4, every=1, looks=3))
    for r, unit in zip(rows, ("tensors", "MiB"), strict=True):
        seen = [float(x) for x in r.note.split(", ")]
        assert len(seen) == 3 and r.unit == unit
        assert r.value == pytest.approx(max(seen), rel=1e-5) and r.ratio == pytest.approx(max(seen) / seen[0], rel=1e-5)


def test_live_tensors_sees_a_new_one():
    before = memory.live_tensors()
    held = torch.zeros(3)
    assert memory.live_tensors() == before + 1
    del held


def test_gpu_says_when_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.measure() == [Result("gpu", "no CUDA device is present", None, "")]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is present")
def test_gpu_runs_its_groups():
    few = grid.Settings(tasks=2, copies=3, steps=4, repeats=3), disco.Settings(steps=4, repeats=3, warm_up=0)
    rows = gpu.measure(gpu.Settings(LPG, *few))
    assert len(rows) == 15 and all(r.group == "gpu" and r.value > 0 for r in rows)


def test_disco_measures_learner_steps_and_meta_steps(monkeypatch):
    name, (_, batch, published) = next(iter(disco.SIZES.items()))
    tiny = AgentConfig("action_conditional", (8,), "relu", model=4, head_hidden=(4,))
    monkeypatch.setattr(disco, "Disco", lambda: Disco(predictions=4, support=1, width=4, lifetime_width=4))
    monkeypatch.setattr(disco, "SIZES", {name: (tiny, batch, published)})
    monkeypatch.setattr(disco, "get_recipe", lambda name: get_recipe(f"{name}-small"))
    monkeypatch.setattr(disco, "fresh", lambda n, function, *args: function(*args))
    rate, memory, step, most = disco.measure(disco.Settings(steps=3, repeats=3, warm_up=0))
    assert rate.ratio == pytest.approx(rate.value / published) and step.ratio == pytest.approx(step.value / 6.4)
    assert 0.1 < memory.value <= most.value and most.ratio == pytest.approx(most.value / 4.7)  # of one process
    assert all(0 < int(r.note.split("%")[0]) < 100 for r in (rate, step))


def test_threads_compare_one_with_two(monkeypatch):
    asked = []
    monkeypatch.setattr(threads, "fresh", lambda n, function, *args: asked.append(n) or function(*args))
    s = threads.Settings(lpg=lpg.Settings(2, 2, 2, 2, 5, widths=(4,)), ppo=TOY_PPO, warm_up=1, repeats=3)
    rows = threads.measure(s)
    assert asked == [1, 2] * 4 and sum("busy" in r.name for r in rows) == 2
    for r in rows:
        assert r.ratio == pytest.approx(r.value / float(r.note.split()[2]), rel=1e-3)


SCALING = scaling.Settings(LPG, width=8, meta_steps=2, rounds=3)


def test_scaling_counts_the_updates_of_all_processes(monkeypatch):
    asked = []
    monkeypatch.setattr(scaling, "spent", lambda s, size: asked.append(size) or {1: 4.0, 2: 2.5}[size])
    one, two = scaling.measure(SCALING)
    assert asked == [1, 2] * 3
    assert (one.value, two.value, two.ratio, two.target) == (2 * 2 * 2 / 4, 2 * 2 * 2 / 2.5, 1.6, scaling.TARGET)


@pytest.mark.slow
def test_scaling_runs_one_and_two_processes():
    assert all(scaling.spent(SCALING, size) > 0 for size in (1, 2))


# --- PPO beside others -------------------------------------------------------------------------------------------

PPO_TOY = ppo.Settings(ppo=TOY_PPO, warm_up=1, updates=2, seeds=3, calls=2, repeats=3)


@needs_sb3
def test_ppo_rows():
    rows = ppo.measure(PPO_TOY)
    assert [r.peer for r in rows] == [SB3, ppo.CLEANRL, SB3, "", "", "PPO", "PPO"]
    assert all(r.value > 0 for r in rows)
    assert all((r.ratio is not None) == bool(r.peer) for r in rows)
    assert rows[0].value == rows[1].value != rows[2].value


def test_ppo_without_the_optional_peer(monkeypatch):
    monkeypatch.setattr(ppo, "has_sb3", lambda: False)
    rows = ppo.measure(PPO_TOY)
    assert [(r.ratio, r.note) for r in rows if r.peer == SB3] == [(None, NO_SB3)] * 2
    assert [r.peer for r in rows if r.ratio is not None] == [ppo.CLEANRL, "PPO", "PPO"]


@needs_sb3
def test_contenders_have_equal_settings():
    s = PPOSettings()
    mine, peer, loop = ours("CartPole-v1", s, 0), sb3("CartPole-v1", s, 0), CleanRLStyle("CartPole-v1", s, 0)
    size = mine.lifetimes.population.theta.shape[1]
    assert sum(p.numel() for p in peer.policy.parameters()) == size
    assert sum(p.numel() for p in loop.agent.parameters()) == size
    c, h = mine.config, mine.config.hyper
    assert (peer.n_envs, peer.n_steps, peer.n_epochs) == (c.n_envs, c.n_steps, c.n_epochs) == (8, 128, 4)
    assert peer.batch_size * c.n_minibatches == c.n_envs * c.n_steps
    assert (peer.gamma, peer.gae_lambda, peer.ent_coef, peer.vf_coef) == (h.gamma, h.gae_lambda, h.ent_coef, h.vf_coef)
    assert (peer.learning_rate, peer.clip_range(1.0), peer.max_grad_norm) == (
        h.learning_rate,
        h.clip_range,
        h.max_grad_norm,
    )
    eps = mine.algorithm.slots.optimizer.config.eps
    assert eps == peer.policy.optimizer.param_groups[0]["eps"] == loop.optimizer.param_groups[0]["eps"]


def test_cleanrl_style_advantages():
    loop = CleanRLStyle("CartPole-v1", PPOSettings(n_envs=2, n_steps=40), 0)
    loop._collect()
    assert loop.dones.any()
    with torch.no_grad():
        following = torch.cat([loop.values[1:], loop.agent.value(loop.next_obs)[None]])
    done = loop.dones.bool()
    expected = gae(loop.rewards, loop.values, following, done, torch.zeros_like(done), 0.99, 0.95)
    torch.testing.assert_close(loop._advantages(), expected)


@pytest.mark.slow
def test_cleanrl_style_learns():
    loop = CleanRLStyle("CartPole-v1", PPOSettings(), 0)
    loop.learn(1024)
    early = loop.dones.mean()
    loop.learn(30 * 1024)
    assert loop.dones.mean() < early / 3  # episodes became at least three times as long


# --- learning curves ---------------------------------------------------------------------------------------------

CURVES = learning.Settings(steps={"CartPole-v1": 3072}, bin=1024, seeds=2, ppo=PPOSettings(), workers=1)


def test_bins_average_the_episodes_that_ended():
    bins = learning._Bins(2, 30, 10)
    bins.add(10, np.array([3.0, 0.0]), np.array([2, 0]))
    bins.add(5, np.array([3.0, 0.0]), np.array([1, 0]))
    bins.add(33, np.array([8.0, 4.0]), np.array([2, 1]))  # the last update overshoots into the last bin
    np.testing.assert_array_equal(bins.means(), [[2, np.nan, 4], [np.nan, np.nan, 4]])


def test_our_curves_are_returns_of_episodes():
    curves = learning.our_curves("CartPole-v1", "ppo_clip", CURVES)
    assert curves.shape == (2, 3)
    assert (curves[:, 0] > 12).all() and (curves[:, 0] < 40).all()  # a random policy makes about 22
    assert curves[0, 0] != curves[1, 0]


@needs_sb3
def test_peer_curves_are_returns_of_episodes():
    curve = learning.sb3_curve("CartPole-v1", 0, CURVES)
    assert curve.shape == (1, 3)
    assert 12 < curve[0, 0] < 40


def test_scores_take_the_last_tenth():
    curves = np.tile(np.arange(20.0), (4, 1))
    found = learning.scores(curves)
    assert found["the last tenth"].point == 18.5 and found["the whole run"].point == 9.5


@pytest.mark.slow
def test_learning_writes_curves_and_figure(tmp_path):
    rows = learning.measure(tmp_path, CURVES)
    methods = learning.METHODS if has_sb3() else tuple(learning.OURS)
    scored = [r for r in rows if r.value is not None]
    assert len(scored) == 2 * len(methods) and all(r.value > 10 for r in scored)
    with (tmp_path / f"{learning.NAME}.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(methods) * 2 * 3
    assert {r["method"] for r in table} == set(methods) and {r["step"] for r in table} == {"1024", "2048", "3072"}
    assert (tmp_path / f"{learning.NAME}.png").read_bytes()[1:4] == b"PNG"


# --- the runner --------------------------------------------------------------------------------------------------


def test_unknown_group_names_the_nearest(tmp_path):
    with pytest.raises(UserError, match=r"'lpgg'.*'lpg'"):
        bench.run(["lpgg"], tmp_path / "bench.json")
    assert not list(tmp_path.iterdir())


def test_only_slow_groups_must_be_asked_for():
    assert [name for name, group in bench.GROUPS.items() if not group.default] == ["learning"]


def test_run_records_and_prints(monkeypatch, tmp_path):
    out = tmp_path / "results" / "bench.json"
    row = Result("toy", "a toy's speed", 1.0, "laps", note="a note")
    folders = []
    toys = {
        "toy": bench.Group(lambda: [row], "a toy"),
        "files": bench.Group(lambda folder: folders.append(folder) or [], "files", default=False, files=True),
        "gpu": bench.GROUPS["gpu"],
    }
    threads_asked = []
    monkeypatch.setattr(bench, "GROUPS", toys)
    monkeypatch.setattr(bench, "fresh", lambda n, function, *args: threads_asked.append(n) or function(*args))
    out.parent.mkdir()
    out.write_text('{"gpu": "of an earlier run", "toy": "too"}')
    console = Console(record=True, width=200)
    assert bench.run(["toy", "files", "toy"], out, console) == [row]
    assert "a note" in console.export_text()
    assert threads_asked == [1, 1] and folders == [out.parent]
    report = json.loads(out.read_text())
    assert report["gpu"] == "of an earlier run"
    assert report["toy"]["results"][0]["value"] == 1.0
    assert {"cpu", "cores", "threads", "load_average", "versions"} <= set(report["toy"]["machine"])
    assert report["toy"]["machine"]["versions"]["torch"].startswith(torch.__version__.partition("+")[0])


def test_run_refuses_a_file_of_something_else(tmp_path):
    out = tmp_path / "bench.json"
    out.write_text("[1, 2]")
    with pytest.raises(UserError, match="no benchmark report"):
        bench.run(["gpu"], out)
    assert out.read_text() == "[1, 2]"


def test_numbers_for_reading():
    assert [bench.number(x) for x in (None, 1234567.8, 0.012345, 2.0)] == ["", "1,234,568", "0.0123", "2"]


def test_steps_of_learned_optimizers_are_compared_with_adam():
    """Every case has Adam's time and each rule's; the tensors are those of the settings."""
    small = optimizers.Settings(
        agents=2, observations=3, actions=2, width=4, large=(3, 5, 2), batch=2, rules=("meta_sgd", "open"), steps=1,
        rounds=3,
    )  # fmt: skip
    rows = optimizers.measure(small)
    assert [r.name.partition(":")[0] for r in rows] == [optimizers.ADAM, "meta_sgd", "open"] * 4
    assert all(r.value > 0 and (r.peer == optimizers.ADAM) == (r.ratio is not None) for r in rows)
    policy, value = 3 * 4 + 4 + 4 * 4 + 4 + 4 * 2 + 2, 3 * 4 + 4 + 4 * 4 + 4 + 4 + 1
    assert f"2 agents of {policy + value} parameters" in rows[0].name
    assert f"{3 * 5 + 5 + 5 * 2 + 2} parameters" in rows[3].name

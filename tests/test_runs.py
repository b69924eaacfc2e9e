"""The run folder: what it records, what it refuses, and that a resumed run's numbers equal an uninterrupted one's."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from experiments.runs import (
    CHECKPOINT,
    CONFIG,
    METRICS,
    Progress,
    Run,
    default_folder,
    flatten,
    git_revision,
    plain,
    read_metrics,
    sb3_tags,
)
from learned_rl.files import replacing
from learned_rl.types import UserError

COMMAND = ["learned-rl", "train", "--name", "a b"]


@dataclass(frozen=True)
class Inner:
    clip: float = math.inf
    sizes: tuple[int, ...] = (64, 64)


@dataclass(frozen=True)
class Config:
    rate: float = 1e-3
    low: float = -math.inf
    hole: float = math.nan
    nothing: None = None
    inner: Inner = field(default_factory=Inner)


def begin(path: Path, config: object = Config(), resume: bool = False, seed: int = 3) -> Run:
    return Run.create(path, command=COMMAND, config=config, seed=seed, resume=resume)


def test_the_folder_explains_itself(tmp_path):
    begin(tmp_path / "deep" / "run").close()
    folder = tmp_path / "deep" / "run"
    assert {p.name for p in folder.iterdir()} == {CONFIG, "command.txt", "git.txt", "seed", "versions.json"}
    text = (folder / CONFIG).read_text()
    strict = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert strict == {
        "rate": 1e-3,
        "low": "-inf",
        "hole": "nan",
        "nothing": None,
        "inner": {"clip": "inf", "sizes": [64, 64]},
    }
    assert (folder / "command.txt").read_text() == "learned-rl train --name 'a b'\n"
    assert (folder / "seed").read_text() == "3\n"
    found = json.loads((folder / "versions.json").read_text())
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"numpy", "gymnasium", "higher", "learned-rl", "platform"} < set(found)


def test_git_revision_of_this_checkout_and_without_git(monkeypatch):
    here = Path(__file__).parent
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True)
    if head.returncode:
        pytest.skip("the tests do not run from a git checkout")
    assert git_revision().split()[0] == head.stdout.strip()
    monkeypatch.setenv("PATH", "")
    assert git_revision() == "not a git checkout"


def test_plain_refuses_what_is_not_plain():
    with pytest.raises(TypeError, match="Tensor"):
        plain({"a": [torch.zeros(2)]})
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1]}) == {"a.b": 1, "a.c": {}, "d": [1]}


def test_default_folder():
    assert default_folder("runs", "lpg/grid:dense", 7).name.startswith("lpg-grid-dense__seed7__")
    assert default_folder("runs", "lpg", 7).parent == Path("runs")


@pytest.mark.parametrize("left", [CONFIG, METRICS, CHECKPOINT])
def test_an_old_run_is_never_overwritten(tmp_path, left):
    (tmp_path / left).write_text("precious")
    with pytest.raises(UserError, match=f"{tmp_path}.*--resume.*--out"):
        begin(tmp_path)
    assert (tmp_path / left).read_text() == "precious"


def test_resume_needs_the_same_run(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        begin(tmp_path / "none", resume=True)
    assert not (tmp_path / "none").exists()
    begin(tmp_path / "run").close()
    begin(tmp_path / "run", resume=True).close()  # NaN and infinity equal themselves
    assert (tmp_path / "run" / "command.txt").read_text().count("learned-rl") == 2
    with pytest.raises(UserError, match=r"inner\.sizes was \[64, 64\] and is \[64\] now"):
        begin(tmp_path / "run", Config(inner=Inner(sizes=(64,))), resume=True)
    with pytest.raises(UserError, match=r"extra was 'absent' and is 1 now"):
        begin(tmp_path / "run", {**plain(Config()), "extra": 1}, resume=True)
    with pytest.raises(UserError, match=r"seed.* was 3 and is 4 now"):
        begin(tmp_path / "run", resume=True, seed=4)
    (tmp_path / "run" / CONFIG).write_text('{"rate": 0.0')
    with pytest.raises(UserError, match=r"config\.json"):
        begin(tmp_path / "run", resume=True)


def test_settings_that_only_say_when_to_stop_may_change(tmp_path):
    begin(tmp_path).close()
    longer = Config(rate=2.0, inner=Inner(clip=3.0))

    def again(*free: str) -> None:
        Run.create(tmp_path, command=COMMAND, config=longer, seed=3, resume=True, free=free).close()

    with pytest.raises(UserError, match=r"inner\.clip was 'inf' and is 3\.0 now"):
        again("rate")
    assert json.loads((tmp_path / CONFIG).read_text())["rate"] == 1e-3
    again("rate", "inner.clip")
    assert json.loads((tmp_path / CONFIG).read_text()) == plain(longer), "the folder says what holds now"


def test_unwritable_places_are_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match="Cannot write"):
            begin(place)


def test_metrics_return_exactly(tmp_path):
    with begin(tmp_path) as run:
        run.log(1, {"meta/loss": 0.1, "odd, tag": math.nan})
        run.log(2, {"meta/loss": torch.tensor(1 / 3, dtype=torch.float64), "other": -math.inf})
        found = read_metrics(tmp_path)  # while the run is still open
    assert set(found) == {"meta/loss", "odd, tag", "other"}
    np.testing.assert_array_equal(found["meta/loss"], ([1, 2], [0.1, 1 / 3]))
    assert math.isnan(found["odd, tag"][1][0]) and found["other"][1][0] == -math.inf


def tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_has_the_finite_numbers(tmp_path):
    with begin(tmp_path) as run:
        run.log(5, {"train/a": 0.5, "train/b": math.nan})
        run.log(6, {"train/a": 1.5, "train/b": 2.0})
    assert tensorboard(tmp_path) == {"train/a": [(5, 0.5), (6, 1.5)], "train/b": [(6, 2.0)]}


def live(run: Run, begin: int, end: int, state: float) -> None:
    for step in range(begin, end):
        state = math.sin(state + step)
        run.log(step, {"meta/loss": state} | ({"eval/mean_reward": state / 3} if step % 2 else {}))
        if step % 4 == 3:
            run.save_checkpoint({"step": step, "state": state})


@pytest.mark.parametrize("damage", [b"", b"9,meta/lo", b"\0\0\0\0\n"])
def test_a_killed_and_resumed_run_logs_the_same(tmp_path, damage):
    with begin(tmp_path / "whole") as run:
        live(run, 0, 12, 0.0)
    with begin(tmp_path / "killed") as run:
        live(run, 0, 10, 0.0)  # the last checkpoint is of step 7
    with (tmp_path / "killed" / METRICS).open("ab") as file:
        file.write(damage)
    with begin(tmp_path / "killed", resume=True) as run:
        saved = run.load_checkpoint()
        assert saved is not None and saved["step"] == 7
        run.rewind(saved["step"])
        live(run, 8, 12, saved["state"])
    assert (tmp_path / "killed" / METRICS).read_bytes() == (tmp_path / "whole" / METRICS).read_bytes()


def test_tensorboard_forgets_what_came_after_the_checkpoint(tmp_path):
    with begin(tmp_path) as run:
        for step in range(4):
            run.log(step, {"a": step})
    time.sleep(1.1)  # TensorBoard orders its files by the second in which they began
    with begin(tmp_path, resume=True) as run:
        run.rewind(1)
        run.log(3, {"a": 30.0})
    assert tensorboard(tmp_path) == {"a": [(0, 0.0), (1, 1.0), (3, 30.0)]}


def test_rewind_before_the_first_checkpoint_forgets_everything(tmp_path):
    with begin(tmp_path) as run:
        run.log(0, {"a": 1.0})
        assert run.load_checkpoint() is None
        run.rewind(-1)
        assert read_metrics(tmp_path) == {}
        run.log(0, {"a": 2.0})
    assert read_metrics(tmp_path)["a"][1].tolist() == [2.0]


def test_a_row_torn_by_a_kill_is_dropped_when_resumed(tmp_path):
    begin(tmp_path).close()
    (tmp_path / METRICS).write_text("step,tag,value\n1,a,0.5\n1,a,0.")
    assert read_metrics(tmp_path)["a"][1].tolist() == [0.5]
    with begin(tmp_path, resume=True) as run:
        run.log(2, {"a": 0.25})
    assert (tmp_path / METRICS).read_text() == "step,tag,value\n1,a,0.5\n2,a,0.25\n"


def test_checkpoint_round_trip(tmp_path):
    tree = {"theta": torch.randn(3, 4, dtype=torch.float64, requires_grad=True), "n": 7, "x": math.inf, "s": "text"}
    with begin(tmp_path) as run:
        run.save_checkpoint(tree)
        found = run.load_checkpoint()
        assert found is not None and found.keys() == tree.keys()
        assert torch.equal(found["theta"], tree["theta"]) and not found["theta"].requires_grad
        assert (found["n"], found["x"], found["s"]) == (7, math.inf, "text")
        with pytest.raises(TypeError, match="'bad' is list"):
            run.save_checkpoint({"bad": [1]})


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    with begin(tmp_path) as run:
        run.save_checkpoint({"n": 1})

        def full(obj, file):
            file.write(b"half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(torch, "save", full)
        with pytest.raises(UserError, match=r"Cannot write .*checkpoint\.pt: No space left"):
            run.save_checkpoint({"n": 2})
        assert run.load_checkpoint() == {"n": 1}
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".part")]


def test_replacing_is_all_or_nothing(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), replacing(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
        1 / 0  # noqa: B018
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "foreign"])
def test_a_damaged_checkpoint_is_one_sentence(tmp_path, damage):
    path = tmp_path / CHECKPOINT
    with begin(tmp_path) as run:
        run.save_checkpoint({"theta": torch.randn(1000)})
        data = bytearray(path.read_bytes())
        if damage == "flip":
            data[len(data) // 2] ^= 1
        damaged = {"truncate": data[: len(data) // 2], "flip": data, "empty": b"", "foreign": b"PK\x03\x04 hello"}
        path.write_bytes(damaged[damage])
        with pytest.raises(UserError, match=r"checkpoint\.pt is damaged"):
            run.load_checkpoint()


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "evil"),))

    with begin(tmp_path) as run:
        torch.save({"x": Evil()}, tmp_path / CHECKPOINT)
        with pytest.raises(UserError):
            run.load_checkpoint()
    assert not (tmp_path / "evil").exists()


def test_sb3_tags_give_entropy_both_signs():
    ours = {"policy_gradient_loss": 1.0, "value_loss": 2.0, "entropy": 3.0, "approx_kl": 4.0, "clip_fraction": 5.0}
    assert sb3_tags(ours) == {
        "train/policy_gradient_loss": 1.0,
        "train/value_loss": 2.0,
        "train/entropy": 3.0,
        "train/entropy_loss": -3.0,
        "train/approx_kl": 4.0,
        "train/clip_fraction": 5.0,
    }
    assert sb3_tags({"kl": 1.0}) == {"train/kl": 1.0}
    assert sb3_tags({"return": 1.0, "length": 2.0}) == {"rollout/ep_rew_mean": 1.0, "rollout/ep_len_mean": 2.0}


def test_progress_off_a_terminal_prints_first_last_and_every_so_often(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("experiments.runs.time.monotonic", lambda: now[0])
    out = io.StringIO()
    with Progress(40, done=10, console=Console(file=out, width=200)) as progress:
        for done in range(11, 41):
            now[0] += 1.0
            progress.update(done, meta_loss=0.123456, envs=4096, task="[grid]")
    lines = out.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["11/40", "21/40", "31/40", "40/40"]
    assert lines[1] == "21/40 updates  0:00:11 elapsed, 0:00:19 left  meta loss 0.1235  envs 4,096  task [grid]"


def test_progress_on_a_terminal_draws_a_bar_and_a_line():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, color_system=None)
    with Progress(8, unit="meta-updates", console=console) as progress:
        progress.update(8, ret=1.5)
    shown = out.getvalue()
    assert "━" in shown and "8/8 meta-updates" in shown and "ret 1.5" in shown

"""The folder that a run leaves behind, and what is seen of the run while it lasts.

| file | holds |
|---|---|
| `config.json` | every setting; infinities and NaN as the strings "inf", "-inf", "nan" |
| `command.txt`, `git.txt` | the command and the revision of the code, one line for each start of the run |
| `seed`, `versions.json` | the seed; the software of the latest start |
| `metrics.csv` | step, tag, value: one row for each number, readable at any moment |
| `tensorboard/` | the same numbers as TensorBoard events |
| `checkpoint.pt` | all that the run needs to continue |
| `scores.csv` | evaluations, see `experiments.report` |
"""

from __future__ import annotations

import csv
import dataclasses
import importlib.metadata
import io
import json
import math
import os
import pickle
import platform
import shlex
import subprocess
import time
import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TextIO

import numpy as np
import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text
from torch import Tensor

from learned_rl.files import replacing, speaking
from learned_rl.types import UserError

CONFIG, METRICS, CHECKPOINT, SCORES = "config.json", "metrics.csv", "checkpoint.pt", "scores.csv"
ARTIFACT = "component.safetensors"  # what meta-training leaves
HEADER = "step,tag,value\n"
PACKAGES = ("learned-rl", "torch", "numpy", "gymnasium", "higher")

#: Stable-Baselines3's names for the mean return and length (environment steps) of recent training episodes.
EPISODES = {"return": "rollout/ep_rew_mean", "length": "rollout/ep_len_mean"}

Checkpoint = dict[str, Tensor | int | float | str]


def plain(value: object) -> Any:
    """Nested dataclasses, mappings and sequences as dictionaries and lists of values that JSON knows.

    Raises:
        TypeError: a value that is not plain.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Path):
        return value.as_posix()
    raise TypeError(f"a config holds plain values, not {type(value).__name__}")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return flat


def versions() -> dict[str, str]:
    """Python, platform and the packages that a run's numbers depend on."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    return found | {package: importlib.metadata.version(package) for package in PACKAGES}


def git_revision() -> str:
    """Revision of the checkout that this code runs from, and whether its tracked files were modified."""

    def git(*words: str) -> str:
        here = Path(__file__).resolve()
        done = subprocess.run(["git", *words], cwd=here.parent, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # installed inside somebody else's checkout: not ours
        modified = git("status", "--porcelain", "--untracked-files=no")
        return f"{git('rev-parse', 'HEAD')} {'with modified files' if modified else 'clean'}"
    except (OSError, subprocess.CalledProcessError):
        return "not a git checkout"


def default_folder(root: Path | str, name: str, seed: int) -> Path:
    """`root/{name}__seed{n}__{date}-{time}`; slashes and colons in the name become dashes."""
    name = name.replace("/", "-").replace(":", "-")
    return Path(root) / f"{name}__seed{seed}__{time.strftime('%Y%m%d-%H%M%S')}"


def sb3_tags(metrics: Mapping[str, float]) -> dict[str, float]:
    """Names under which Stable-Baselines3's users look for PPO's metrics: of episodes `rollout/`, else `train/<name>`.

    Entropy (nats) appears twice: `train/entropy`, and `train/entropy_loss`, which over there is *minus* the entropy.
    """
    tags = {EPISODES.get(name, f"train/{name}"): value for name, value in metrics.items()}
    if "entropy" in metrics:
        tags["train/entropy_loss"] = -metrics["entropy"]
    return tags


def read_json(path: Path) -> Any:
    """Content of a JSON file (a bare number is one too).

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"Cannot read {path}, expected JSON as a run writes it: {error}.") from error


def read_metrics(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Tag -> (steps [n], values [n]) of a run's metrics.csv, in the order written; empty if nothing was logged."""
    path = folder / METRICS
    if not path.exists():
        return {}
    columns: dict[str, tuple[list[int], list[float]]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        whole = (line for i, line in enumerate(file) if i and line.endswith("\n"))
        for step, tag, value in csv.reader(whole):
            steps, values = columns.setdefault(tag, ([], []))
            steps.append(int(step))
            values.append(float(value))
    return {tag: (np.array(steps), np.array(values)) for tag, (steps, values) in columns.items()}


class Run:
    """A folder that explains itself; made by `Run.create`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._csv: TextIO | None = None
        self._events: Any = None
        self._purge: int | None = None

    @classmethod
    def create(
        cls,
        path: Path | str,
        *,
        command: Sequence[str],
        config: object,
        seed: int,
        resume: bool = False,
        free: Collection[str] = (),
    ) -> Self:
        """Begin a run in `path`, or continue the one that is there.

        Args:
            command: words of the command line.
            config:  a dataclass or dictionary of plain values: all that the run's numbers depend on.
            free:    dotted names of settings that may change when the run continues, such as when it ends.

        Raises:
            UserError: a run is there already (or none, to resume), it had another config, or nothing can be written.
        """
        path, values = Path(path), plain(config)
        held = (path / CONFIG).exists()
        if not resume and any((path / name).exists() for name in (CONFIG, METRICS, CHECKPOINT, SCORES)):
            raise UserError(f"{path} already holds a run: pass --resume to continue it, or another --out.")
        if resume and not held:
            raise UserError(f"{path} holds no run that --resume could continue: leave --resume out, or correct --out.")
        if held:
            _same_config(path, values, seed, free)
        with speaking(path):
            path.mkdir(parents=True, exist_ok=True)
            mode = "a" if held else "w"
            for name, line in (("command.txt", shlex.join(command)), ("git.txt", git_revision())):
                with (path / name).open(mode, encoding="utf-8") as file:
                    file.write(line + "\n")
            (path / "seed").write_text(f"{seed}\n", encoding="utf-8")
        run = cls(path)
        run.write_json("versions.json", versions())
        run.write_json(CONFIG, values)  # last: a folder with a config is a run
        run._keep_rows(math.inf)  # a killed run may have left half a row
        return run

    def write_json(self, name: str, values: object) -> None:
        """Write plain values into a file of the folder."""
        with replacing(self.path / name) as file:
            file.write((json.dumps(plain(values), indent=2) + "\n").encode())

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers by tag; NaN and infinities go to metrics.csv only. Log a step before its checkpoint is saved.

        Raises:
            UserError: the folder cannot be written any more.
        """
        rows = io.StringIO()
        scalars = {tag: float(value) for tag, value in values.items()}
        csv.writer(rows, lineterminator="\n").writerows((int(step), tag, repr(x)) for tag, x in scalars.items())
        with speaking(self.path):
            if self._csv is None:
                self._csv = (self.path / METRICS).open("a", encoding="utf-8", newline="")
                if self._csv.tell() == 0:
                    self._csv.write(HEADER)
            self._csv.write(rows.getvalue())
            self._csv.flush()
            if self._events is None:
                from torch.utils.tensorboard import SummaryWriter  # slow to import, and not every command logs

                self._events = SummaryWriter(str(self.path / "tensorboard"), purge_step=self._purge, flush_secs=10)
            for tag, x in scalars.items():
                if math.isfinite(x):
                    self._events.add_scalar(tag, x, int(step))

    def rewind(self, step: int) -> None:
        """Forget what was logged after `step`, the checkpoint's; -1 where no checkpoint was saved yet."""
        self._keep_rows(step)
        self._purge = step + 1

    def _keep_rows(self, step: float) -> None:
        """Keep the complete rows of metrics.csv up to `step`."""
        self.close()
        path = self.path / METRICS
        if not path.exists():
            return
        lines = path.read_bytes().splitlines(keepends=True)
        steps = (line.partition(b",")[0] if line.endswith(b"\n") else b"" for line in lines[1:])
        kept = [line for line, s in zip(lines[1:], steps, strict=True) if s.isdigit() and int(s) <= step]
        if len(kept) + 1 != len(lines):
            with replacing(path) as file:
                file.writelines([HEADER.encode(), *kept])

    def save_checkpoint(self, tree: Mapping[str, Tensor | int | float | str]) -> None:
        """Replace the checkpoint in one step; whoever is killed meanwhile finds the one before.

        Raises:
            UserError: it cannot be written.
        """
        for name, value in tree.items():
            if not isinstance(value, Tensor | int | float | str):
                raise TypeError(
                    f"checkpoint entry {name!r} is {type(value).__name__}: expected a tensor, number or text"
                )
        with speaking(self.path):
            if self._csv is not None:  # a checkpoint must not outlive the rows before it
                os.fsync(self._csv.fileno())
        with replacing(self.path / CHECKPOINT) as file:
            # stop: saved values
            torch.save({k: v.detach().cpu() if isinstance(v, Tensor) else v for k, v in tree.items()}, file)

    def load_checkpoint(self) -> Checkpoint | None:
        """The last checkpoint, on the CPU; None if none was saved yet.

        Raises:
            UserError: the file is damaged.
        """
        path = self.path / CHECKPOINT
        if not path.exists():
            return None
        try:
            with zipfile.ZipFile(path) as archive:  # torch.load itself does not verify the checksums
                if archive.testzip() is not None:
                    raise zipfile.BadZipFile("bad checksum")
            return torch.load(path, map_location="cpu", weights_only=True)
        except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
            raise UserError(
                f"Checkpoint {path} is damaged or no checkpoint of a run: delete it to start over with --resume."
            ) from error

    def close(self) -> None:
        """Write out what is buffered; the run may still be logged to."""
        for file in (self._csv, self._events):
            if file is not None:
                file.close()
        self._csv = self._events = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _same_config(path: Path, values: dict[str, Any], seed: int, free: Collection[str]) -> None:
    """Refuse to continue with other settings, but for those that are free."""
    old = {**flatten(read_json(path / CONFIG)), "seed (of the run)": read_json(path / "seed")}
    new = {**flatten(values), "seed (of the run)": seed}
    for name in (name for name in {**old, **new} if name not in free):
        before, now = old.get(name, "absent"), new.get(name, "absent")
        if before != now:
            raise UserError(
                f"Cannot resume {path}: {name} was {before!r} and is {now!r} now; repeat the old value or choose "
                "another --out."
            )


class Progress:
    """Progress on the console: a bar with the time left above a line of numbers, or plain lines in a log file.

    Args:
        total:   amount of work, in `unit`s.
        done:    what a resumed run had done already.
        every:   seconds between plain lines where the console is no terminal.
        console: standard output by default.
    """

    def __init__(
        self, total: int, unit: str = "updates", *, done: int = 0, every: float = 10.0, console: Console | None = None
    ) -> None:
        self.total, self.unit, self.every = total, unit, every
        self.console = console or Console()
        self._first = self._done = self._shown = done
        self._fields = Text(style="cyan")
        self._begin = time.monotonic()
        self._printed = -math.inf
        self._live: Live | None = None
        if self.console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeElapsedColumn())
            self._bar = Bar(*columns, TextColumn("left"), TimeRemainingColumn(), console=self.console)
            self._task = self._bar.add_task("", total=total, completed=done)
            self._live = Live(Group(self._bar, self._fields), console=self.console, refresh_per_second=4)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def update(self, done: int, **fields: float | str) -> None:
        """Show that `done` units are done, and the latest numbers (underscores in names become spaces)."""
        self._done = done
        self._fields.plain = "  ".join(f"{name.replace('_', ' ')} {_short(x)}" for name, x in fields.items())
        if self._live is not None:
            self._bar.update(self._task, completed=done)
            return
        if time.monotonic() - self._printed >= self.every:
            self._print()

    def _print(self) -> None:
        elapsed = time.monotonic() - self._begin
        fresh = self._done - self._first
        left = _clock(elapsed / fresh * (self.total - self._done)) if fresh > 0 else "?"
        line = f"{self._done}/{self.total} {self.unit}  {_clock(elapsed)} elapsed, {left} left  {self._fields.plain}"
        self.console.print(line.rstrip(), soft_wrap=True, highlight=False, markup=False)
        self._printed, self._shown = time.monotonic(), self._done

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
        elif self._shown != self._done:
            self._print()


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _clock(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{s:02}"

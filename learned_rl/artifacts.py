"""One component, one file: `.safetensors` weights with config and provenance in the header.

Nothing in the file is executed when it is read. It names its component by its registered name, never by an import
path, and carries the version of the component's contract, so that weights never meet a meaning they were not trained
for.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise

from learned_rl.component import Component
from learned_rl.files import replacing
from learned_rl.registry import components, make_component
from learned_rl.tasks.base import unknown
from learned_rl.types import UserError

FORMAT = "learned-rl/1"
SUFFIX = ".safetensors"


def save(component: Component, path: Path | str, provenance: dict[str, Any] | None = None) -> None:
    """Write a component; the file appears whole or not at all.

    Args:
        provenance: plain values to keep with it: what it was trained on, by which command, how it scored.

    Raises:
        UserError: the file cannot be written.
    """
    header = {
        "format": FORMAT,
        "component": component.name,
        "contract": str(component.contract),
        "config": json.dumps(dataclasses.asdict(component.config)),
        "provenance": json.dumps(provenance or {}),
    }
    # stop: saved values; cloned, since the format has no tensors that share memory
    weights = {k: v.detach().cpu().contiguous().clone() for k, v in component.state_dict().items()}
    header["sha256"] = _digest(header, weights)
    with replacing(Path(path)) as file:
        file.write(serialise(weights, header))


def read_header(path: Path | str) -> dict[str, Any]:
    """Component, contract, config and provenance of a file.

    Raises:
        UserError: the file is missing, damaged, or not one of ours.
    """
    return _open(Path(path))[0]


def load(path: Path | str, **changes: Any) -> Component:
    """The component in a file, ready to plug in.

    Args:
        changes: settings in place of the file's, where its weights fit them too.

    Raises:
        UserError: the file is missing, damaged or not one of ours; its component is not registered, speaks another
            contract, or its tensors do not fit.
    """
    path = Path(path)
    header, tensors = _open(path)
    name = header["component"]
    if name not in components():
        raise unknown(f"component of {path}", name, components())
    kind = components()[name]
    if header["contract"] != kind.contract:
        raise UserError(
            f"{path} holds {name!r} with contract version {header['contract']}, but this version of learned-rl "
            f"speaks {kind.contract}: use the release that wrote it."
        )
    try:
        component = kind.from_config(header["config"] | changes)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (TypeError, ValueError, AttributeError, LookupError, RuntimeError) as error:
        raise UserError(f"{path} holds settings of which no component {name!r} can be built.") from error
    _fit(path, component, tensors)
    component.provenance = header["provenance"]
    return component


def _digest(header: dict[str, str], tensors: dict[str, torch.Tensor]) -> str:
    """A checksum of everything that the file says."""
    digest = hashlib.sha256(json.dumps({k: v for k, v in sorted(header.items()) if k != "sha256"}).encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name}{list(value.shape)}{value.dtype}".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _open(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    if not os.path.isfile(path):  # Path.is_file raises where a name is too long or a folder closed
        raise _missing(path)
    try:
        with safe_open(path, framework="pt") as file:
            header = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if header.get("format") != FORMAT:
            raise UserError(f"{path} is a safetensors file, but not a component saved by learned-rl.")
        if header["sha256"] != _digest(header, tensors):
            raise UserError(f"{path} is damaged: its content does not match its checksum; fetch or write it again.")
        plain = {key: json.loads(header[key]) for key in ("contract", "config", "provenance")}
        plain["component"] = header["component"]
    except (SafetensorError, ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise UserError(
            f"{path} is not a component file, or it is damaged: expected the .safetensors that `meta-train` or "
            "`convert` writes."
        ) from error
    return header | plain, tensors


def get(name_or_path: str | Path) -> Component:
    """A registered component by its name (fresh, default settings), or the component in a file.

    Raises:
        UserError: neither exists, or the file is no good.
    """
    text = str(name_or_path)
    is_file = text.endswith(SUFFIX) or os.sep in text or os.path.isfile(text)
    return load(text) if is_file and text not in components() else make_component(text)


def _missing(path: Path) -> UserError:
    """What to say where there is no file, with the nearest one beside it."""
    if os.path.isdir(path):
        return UserError(f"{path} is a folder: expected a component file such as {path / ('component' + SUFFIX)}.")
    try:
        others = [p.name for p in path.parent.iterdir() if p.suffix == SUFFIX]
    except OSError:
        others = []
    near = difflib.get_close_matches(path.name, others, n=1, cutoff=0.0)
    hint = f"the nearest there is {str(path.parent / near[0])!r}" if near else f"expected the {SUFFIX} of a component"
    return UserError(f"There is no component file {str(path)!r}: {hint}.")


def _fit(path: Path, component: Component, tensors: dict[str, torch.Tensor]) -> None:
    """Copy tensors in after checking every name, shape, type and value."""
    own = component.state_dict()
    if missing := sorted(set(own) - set(tensors)):
        raise UserError(f"{path} lacks the tensor {missing[0]!r} of component {component.name!r}.")
    if extra := sorted(set(tensors) - set(own)):
        raise UserError(f"{path} has a tensor {extra[0]!r} that component {component.name!r} does not know.")
    for name, value in tensors.items():
        mine = own[name]
        if value.shape != mine.shape:
            shapes = f"{list(value.shape)}, expected {list(mine.shape)}"
            raise UserError(f"{path}: tensor {name!r} has shape {shapes}.")
        both_real = value.is_floating_point() and mine.is_floating_point()  # their precision may differ
        if value.dtype != mine.dtype and not both_real:
            raise UserError(f"{path}: tensor {name!r} holds {value.dtype}, expected {mine.dtype}.")
        if not bool(value.isfinite().all()):
            raise UserError(f"{path}: tensor {name!r} holds values that are not finite numbers.")
        if value.dtype == torch.float64:
            component.double()
    component.load_state_dict(tensors)

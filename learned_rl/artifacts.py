"""One component, one file: `.safetensors` weights with config and provenance in the header.

Nothing in the file is executed when it is read. It names its component by its registered name, never by an import
path, and carries the version of the component's contract, so that weights never meet a meaning they were not trained
for.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from learned_rl.component import Component
from learned_rl.registry import components, make_component
from learned_rl.tasks.base import unknown
from learned_rl.types import UserError

FORMAT = "learned-rl/1"


def save(component: Component, path: Path | str, provenance: dict[str, Any] | None = None) -> None:
    """Write a component; the file appears whole or not at all.

    Args:
        provenance: plain values to keep with it: what it was trained on, by which command, how it scored.
    """
    header = {
        "format": FORMAT,
        "component": component.name,
        "contract": str(component.contract),
        "config": json.dumps(dataclasses.asdict(component.config)),
        "provenance": json.dumps(provenance or {}),
    }
    path = Path(path)
    weights = {k: v.detach().cpu().contiguous() for k, v in component.state_dict().items()}  # stop: saved values
    header["sha256"] = _digest(header, weights)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
        os.close(handle)
        save_file(weights, temporary, metadata=header)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror or error}.") from error


def read_header(path: Path | str) -> dict[str, Any]:
    """Component, contract, config and provenance of a file.

    Raises:
        UserError: the file is missing, damaged, or not one of ours.
    """
    return _open(Path(path))[0]


def load(path: Path | str) -> Component:
    """The component in a file, ready to plug in.

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
    component = kind.from_config(header["config"])
    _fit(path, component, tensors)
    return component


def _digest(header: dict[str, str], tensors: dict[str, torch.Tensor]) -> str:
    """A checksum of everything that the file says."""
    digest = hashlib.sha256(json.dumps({k: v for k, v in sorted(header.items()) if k != "sha256"}).encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name}{list(value.shape)}{value.dtype}".encode())
        digest.update(value.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _open(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    if not path.is_file():
        raise UserError(f"There is no component file {str(path)!r}.")
    try:
        with safe_open(path, framework="pt") as file:
            header = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if header.get("format") != FORMAT:
            raise UserError(f"{path} is a safetensors file, but not a component saved by learned-rl.")
        if header["sha256"] != _digest(header, tensors):
            raise UserError(f"{path} is damaged: its content does not match its checksum; fetch or write it again.")
        plain = {key: json.loads(header[key]) for key in ("contract", "config", "provenance")}
    except (SafetensorError, json.JSONDecodeError, KeyError, OSError) as error:
        raise UserError(
            f"{path} is not a component file, or it is damaged: expected the .safetensors that `meta-train` writes."
        ) from error
    return header | plain, tensors


def get(name_or_path: str | Path) -> Component:
    """A registered component by its name (fresh, default settings), or the component in a file."""
    text = str(name_or_path)
    return load(text) if text.endswith(".safetensors") or os.sep in text else make_component(text)


def _fit(path: Path, component: Component, tensors: dict[str, torch.Tensor]) -> None:
    """Copy tensors in after checking every name, shape, type and value."""
    own = component.state_dict()
    if missing := sorted(set(own) - set(tensors)):
        raise UserError(f"{path} lacks the tensor {missing[0]!r} of component {component.name!r}.")
    if extra := sorted(set(tensors) - set(own)):
        raise UserError(f"{path} has a tensor {extra[0]!r} that component {component.name!r} does not know.")
    for name, value in tensors.items():
        if value.shape != own[name].shape:
            shapes = f"{list(value.shape)}, expected {list(own[name].shape)}"
            raise UserError(f"{path}: tensor {name!r} has shape {shapes}.")
        if not value.is_floating_point() or not bool(value.isfinite().all()):
            raise UserError(f"{path}: tensor {name!r} holds values that are not finite numbers.")
        if value.dtype == torch.float64:
            component.double()
    component.load_state_dict(tensors)

"""`learned-rl convert KIND FILE`: weights that others published, as a component file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from learned_rl import artifacts
from learned_rl.component import Component
from learned_rl.tasks.base import unknown
from learned_rl.types import UserError
from objectives import disco_weights

#: Name of what was published -> reads its file.
PUBLISHED: dict[str, Callable[[Path], Component]] = {"disco103": disco_weights.read}


def convert(kind: str, path: Path, out: Path | None) -> Path:
    """Write the component file, by default into the present folder; returns where it is.

    Raises:
        UserError: weights that nobody knows, a file that does not hold them, or another file in the way.
    """
    if kind not in PUBLISHED:
        raise unknown("kind of published weights", kind, PUBLISHED)
    component, out = PUBLISHED[kind](path), out or Path(f"{kind}{artifacts.SUFFIX}")
    if out.suffix != artifacts.SUFFIX:
        raise UserError(
            f"The component file is called {str(out)!r}: expected a name that ends with {artifacts.SUFFIX}."
        )
    if out.exists():
        raise UserError(f"There is a file {str(out)!r} already: move it away, or name another with --out.")
    artifacts.save(component, out, component.provenance)
    return out

"""Ctrl-C, held back until what is in progress can be saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def holding_interrupts() -> Iterator[Callable[[], bool]]:
    """Within it the first Ctrl-C only makes the yielded function true, so that a step ends whole; a second one stops.

    Whoever asks raises `KeyboardInterrupt(run_folder)` once all is saved. Outside the main thread, where Python
    delivers no signals, nothing changes.
    """
    asked = False
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def note(signum: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)

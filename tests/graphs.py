"""How much autograd keeps in mind: the tensors that its graphs hold, counted while something runs."""

import gc
import weakref
from contextlib import contextmanager

import torch


class Box:
    """One tensor that a graph holds; gone when the graph is."""

    def __init__(self, tensor):
        self.tensor = tensor


class Held:
    """The tensors that graphs hold at this moment (`boxes`), and the most of them at once (`most`)."""

    def __init__(self):
        self.boxes, self.most = weakref.WeakSet(), 0

    def pack(self, tensor):
        self.boxes.add(box := Box(tensor))
        self.most = max(self.most, len(self.boxes))
        return box


@contextmanager
def held_by_graphs():
    """Counts what the graphs made inside hold."""
    gc.collect()
    held = Held()
    with torch.autograd.graph.saved_tensors_hooks(held.pack, lambda box: box.tensor):
        yield held

"""How many sequences each step of a run takes: the global batch size may change on a resume."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

from litgpt_moe.files import fits


@dataclass(frozen=True)
class BatchSizes:
    """The sequences in each step, over all devices, and with them the position of each step in the data."""

    changes: tuple[tuple[int, int], ...]
    """(steps done, sequences in each step after them), in order, the first with 0 steps done."""

    @classmethod
    def constant(cls, size: int) -> Self:
        """Return those of a run whose steps all take `size` sequences."""
        return cls(((0, size),))

    @classmethod
    def from_state(cls, state: dict[str, Any], size: int) -> Self:
        """Return those in a checkpoint's `state`; without a record (earlier versions) all are `size`."""
        run = state.get("run")
        recorded = run.get("batch_sizes") if isinstance(run, dict) else None
        is_absent = recorded is None or (isinstance(recorded, list) and not recorded)
        return cls.constant(size) if is_absent else cls.from_list(recorded)

    @classmethod
    def from_list(cls, value: Any) -> Self:
        """Return those of the list in a checkpoint; ValueError if it makes no sense."""
        if fits(value, [[0]]) and value and all(len(change) == 2 for change in value):
            starts, sizes = zip(*value, strict=True)
            if starts[0] == 0 and min(sizes) > 0 and all(one < next_ for one, next_ in pairwise(starts)):
                return cls(tuple(zip(starts, sizes, strict=True)))
        raise ValueError(f"run.batch_sizes is {value!r:.60}")

    def to_list(self) -> list[list[int]]:
        """Return what a checkpoint records."""
        return [list(change) for change in self.changes]

    def changed(self, n_steps: int, size: int) -> Self:
        """Return those of a run that goes on after `n_steps` with `size` sequences in a step."""
        kept = tuple(change for change in self.changes if change[0] < n_steps)
        is_same = bool(kept) and kept[-1][1] == size
        return type(self)(kept if is_same else (*kept, (n_steps, size)))

    def size(self, step: int) -> int:
        """Return the sequences in step `step`, of which 1 is the first."""
        return next(size for start, size in reversed(self.changes) if start < step)

    def sequences(self, n_steps: int) -> int:
        """Return the sequences in the first `n_steps` steps."""
        pieces = pairwise([*self.changes, (n_steps, 0)])
        return sum(max(0, min(end, n_steps) - start) * size for (start, size), (end, _) in pieces)

    def steps(self, n_sequences: int) -> int:
        """Return how many whole steps `n_sequences` fill."""
        for start, size in reversed(self.changes):
            if (n_before := self.sequences(start)) <= n_sequences:
                return start + (n_sequences - n_before) // size
        return 0

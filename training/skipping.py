"""Decide whether a step is taken: --skip_bad_steps and --skip_spikes.

The decision needs the loss and the norm of the gradients on the host before the weights are stepped, so that
each step waits for the device. A run without these options does not wait, and has none of this.
"""

import math
from dataclasses import dataclass
from statistics import median

from training.skip_options import SkipOptions
from training.steps import Progress

TAKEN, BAD, SPIKE, FATAL = 0, 1, 2, 3  # outcomes; of several processes the largest counts
NAMES = {BAD: "bad", SPIKE: "spike"}  # in the history
WINDOW = 100  # norms of taken steps that the median is of
LEAST = 20  # of them, before any step is a spike
MOST_SPIKES = 20  # in a row; more of them are no spikes


def describe_skip(
    outcome: int, loss: float, norm: float, limit: float | None, is_new_level: bool = False
) -> str:
    """Return why a step is left out, as sentences. limit: of the norm. is_new_level: as `Skipping.note`."""
    if outcome == BAD:
        return f"the loss is {loss:.4g}, the gradient norm {norm:.4g}."
    text = f"the gradient norm is {norm:.4g}"
    if limit is not None:
        text += f", above the limit of {limit:.4g} that --skip_spikes sets"
    if is_new_level:
        text += f". {MOST_SPIKES} in a row are no spikes: steps are taken again, and the median begins anew"
    return f"{text}."


@dataclass(frozen=True)
class Skipping:
    """Judge the steps of a run by its options. What it remembers is part of the run's progress.

    Steps of one kind are compared with each other: those of each transformer, and those with and without
    sound, have norms of their own size.
    """

    options: SkipOptions
    progress: Progress
    has_scaler: bool  # of fp16: a norm that is not finite is the scaler's matter, which lowers its scale

    def judge(self, loss: float, norm: float, kind: str) -> int:
        """Return what becomes of a step. loss: its mean. norm: of its gradients, before clipping.

        Changes nothing: see `note`.
        """
        is_finite = math.isfinite(loss) and (math.isfinite(norm) or self.has_scaler)
        if not is_finite:
            is_allowed = self.progress.bad_in_a_row < (self.options.skip_bad_steps or 0)
            return BAD if is_allowed else FATAL
        limit = self.limit(kind)
        return SPIKE if limit is not None and math.isfinite(norm) and norm > limit else TAKEN

    def limit(self, kind: str) -> float | None:
        """Return the norm above which a step of a kind is a spike; None if none is yet."""
        factor = self.options.skip_spikes
        norms = self.progress.norms.get(kind, [])
        if factor is None or len(norms) < LEAST:
            return None
        return factor * median(norms)

    def note(self, outcome: int, norm: float, kind: str) -> bool:
        """Remember what has become of a step: taken, bad or a spike.

        Returns whether this is the last spike in a row that is left out: from the next step on the median
        begins anew, because so many are a new level of the norms.
        """
        progress = self.progress
        progress.bad_in_a_row = progress.bad_in_a_row + 1 if outcome == BAD else 0
        if outcome != TAKEN:
            progress.skipped += 1
        if self.options.skip_spikes is None or outcome == BAD or not math.isfinite(norm):
            return False
        if outcome == TAKEN:
            progress.spikes_in_a_row[kind] = 0
            norms = progress.norms.setdefault(kind, [])
            norms.append(norm)
            del norms[:-WINDOW]
            return False
        count = progress.spikes_in_a_row.get(kind, 0) + 1
        is_level = count >= MOST_SPIKES
        progress.spikes_in_a_row[kind] = 0 if is_level else count
        if is_level:
            progress.norms[kind] = []
        return is_level

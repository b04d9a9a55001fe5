"""What a run learns towards besides the clip, and the passes that this takes. Standard library only."""

from dataclasses import dataclass

# time of a pass without gradients as a share of one with: a LoRA's backward pass takes as long as the forward
# pass; with checkpointed blocks, or if the model itself learns, twice as long
SHARES = 1 / 3, 1 / 2


@dataclass(frozen=True)
class StepPasses:
    """Upper bounds for the passes of a micro-batch."""

    with_gradients: int = 1
    without: int = 0
    size: int = 1  # of a pass, in micro-batches

    def plus(self, further: "StepPasses") -> "StepPasses":
        """Add the passes of another target; the factors on the batch size are multiplied."""
        return StepPasses(
            with_gradients=self.with_gradients + further.with_gradients,
            without=self.without + further.without,
            size=self.size * further.size,
        )

    @property
    def words(self) -> str:
        """Describe the passes, and the time of a step relative to that of a plain one."""
        low, high = (self.size * (self.with_gradients + share * self.without) for share in SHARES)
        size = " of batches twice as large" if self.size > 1 else ""
        counts = f"{self.with_gradients} with gradients, {self.without} without{size}"
        return f"{counts}: about {low:.1f} to {high:.1f} times a plain step"


@dataclass(frozen=True)
class StepTarget:
    """A target of the training apart from the clip."""

    option: str  # that asks for it, as it is typed
    words: str  # its line among the targets in the box at the start of a run
    passes: StepPasses  # in addition to the usual ones
    replaces_clip: bool = False  # it says what to learn in place of the clip, which only one target may
    # why no other target goes with it: its passes with gradients then are in place of the usual one
    alone: str = ""
    keeps_guidance: bool = False  # it teaches the guidance that the model was distilled with
    joins_streams: bool = False  # its passes have one loss of image and sound

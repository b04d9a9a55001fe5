"""Targets of a run in addition to the clip, and the passes that they need. Standard library only."""

from dataclasses import dataclass

# time of a pass without gradients, as a fraction of a pass with gradients. The backward pass of a LoRA takes
# as long as the forward pass (1/2); with checkpointing, or for a full model, it takes twice as long (1/3)
SHARES = 1 / 3, 1 / 2


@dataclass(frozen=True)
class PassCounts:
    """Upper bounds on the number of forward passes that a micro-batch needs."""

    with_gradients: int = 1
    without_gradients: int = 0
    batch_factor: int = 1  # batch size of a pass, in micro-batches

    def plus(self, further: "PassCounts") -> "PassCounts":
        """Return the combined counts of two targets: passes are added, batch size factors multiplied."""
        return PassCounts(
            with_gradients=self.with_gradients + further.with_gradients,
            without_gradients=self.without_gradients + further.without_gradients,
            batch_factor=self.batch_factor * further.batch_factor,
        )

    @property
    def description(self) -> str:
        """Describe the passes, and the time of a step relative to a plain step."""
        low, high = (
            self.batch_factor * (self.with_gradients + share * self.without_gradients) for share in SHARES
        )
        size = " of batches twice as large" if self.batch_factor > 1 else ""
        counts = f"{self.with_gradients} with gradients, {self.without_gradients} without{size}"
        return f"{counts}: about {low:.1f} to {high:.1f} times a plain step"


@dataclass(frozen=True)
class StepTarget:
    """A training target that a feature adds to, or uses instead of, the velocity of the clip."""

    option: str  # option that adds the target, as it is typed
    description: str  # its line in the box at the start of a run
    passes: PassCounts  # in addition to the usual ones
    replaces_velocity: bool = False  # the target replaces the clip; only one target of a run may do so
    # why the target excludes all others; if not "", its passes with gradients replace the usual one
    reason_to_exclude_others: str = ""
    keeps_guidance: bool = False  # the target teaches the guidance that was distilled into the model
    has_joint_audio_loss: bool = False  # its passes have a single loss for images and audio

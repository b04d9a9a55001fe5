"""Where a training run stands."""

from dataclasses import dataclass, field


@dataclass
class Progress:
    """Where a run stands. The one record of it that changes."""

    seed: int
    session_id: int
    started_at: float  # unix seconds
    step: int = 0  # optimizer steps done
    epoch: int = 0  # epochs done
    position: int = 0  # micro-batches done of the epoch that is under way
    sample_pending: str = ""  # mark of the samples that were due when the state was saved, not made yet
    sampled_step: int = -1  # of the last samples
    losses: list[float] = field(default_factory=list)  # of the last steps, up to an epoch's length

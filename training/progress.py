"""Where a training run stands."""

from dataclasses import dataclass, field


@dataclass
class Progress:
    """Hold where a run stands: the only record of it that changes."""

    seed: int
    session_id: int
    started_at: float  # unix seconds
    step: int = 0  # optimizer steps done
    epoch: int = 0  # epochs done
    position: int = 0  # micro-batches done in the current epoch
    sample_pending: str = ""  # mark of samples that are due and not made yet
    sampled_step: int = -1  # step of the last samples
    losses: list[float] = field(default_factory=list)  # of the last steps, up to an epoch's length
    # where the present plan of steps began: --resume_changed may change the clips or the size of a step
    plan_epoch: int = 0
    plan_position: int = 0
    plan_step: int = 0
    changes: list[str] = field(default_factory=list)  # what --resume_changed changed, in words

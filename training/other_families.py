"""Models that a run loads besides the one that it trains."""

from dataclasses import dataclass

from contract.family import Family


@dataclass(frozen=True)
class OtherFamilies:
    """Hold the models of a run besides the trained one."""

    sampling: Family | None = None  # that samples are made with, if it has transformers that are not trained
    teacher: Family | None = None  # of --teacher_dit


NO_OTHERS = OtherFamilies()

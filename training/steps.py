"""Plan which micro-batches form which optimizer step, and which process works on which. Integers only.

An epoch has the micro-batches 0 .. num_batches - 1. An optimizer step takes the next `processes *
accumulation` of them; the last step of an epoch takes the rest. Process r of P works on micro-batches whose
index is r modulo P. If processes share the tokens of a clip, a group of them counts as one process here. So
two processes take the same steps as one process with twice the accumulation. Processes in lockstep, which
share a model, run equal passes: a process without a micro-batch in the last step of an epoch repeats the
step's last micro-batch with weight 0. `Progress` records how far a run has come in its plan.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from modules.integers import ceil_div

T = TypeVar("T")


@dataclass
class Progress:
    """Progress of a training run, such as its step and epoch: its only mutable part, saved in states."""

    seed: int
    session_id: int
    started_at: float  # unix seconds
    step: int = 0  # optimizer steps done
    epoch: int = 0  # epochs done
    position: int = 0  # micro-batches done in the current epoch
    sample_pending: str = ""  # step label of samples that are due and not made yet
    sampled_step: int = -1  # step of the last samples
    losses: list[float] = field(default_factory=list)  # losses of the last steps, at most one epoch
    # where the current plan of steps began: --resume_changed may change the clips or the size of a step
    plan_epoch: int = 0
    plan_position: int = 0
    plan_step: int = 0
    changes: list[str] = field(default_factory=list)  # what --resume_changed changed, in words
    skipped: int = 0  # steps that were not taken
    feature_states: dict[Any, Any] = field(default_factory=dict)  # state of each feature, by its dataclass
    unclaimed: dict[str, Any] = field(default_factory=dict)  # saved values that no feature has taken yet

    @classmethod
    def from_state(cls, values: Mapping[str, Any]) -> "Progress":
        """Restore a state from `as_state`; values of features stay in `unclaimed` until `feature_state`."""
        own = {field.name for field in fields(cls)} - {"feature_states", "unclaimed"}
        progress = cls(**{name: value for name, value in values.items() if name in own})
        progress.unclaimed |= {name: value for name, value in values.items() if name not in own}
        return progress

    def as_state(self) -> dict[str, Any]:
        """Return the fields of the run and of its features as plain values for a saved state."""
        values = asdict(replace(self, feature_states={}, unclaimed={})) | self.unclaimed
        del values["feature_states"], values["unclaimed"]
        for record in self.feature_states.values():
            values |= asdict(record)
        return values

    def feature_state(self, kind: type[T]) -> T:
        """Return a feature's state of the dataclass `kind`: restored from a saved state, or new.

        Raises:
            TypeError: If a restored value has the wrong type.
        """
        if kind not in self.feature_states:
            names = [name for name in get_type_hints(kind) if name in self.unclaimed]
            record = kind(**{name: self.unclaimed.pop(name) for name in names})
            check_types(record)
            self.feature_states[kind] = record
        return self.feature_states[kind]

    def go_back_to(self, earlier: "Progress", kept: Collection[type] = ()) -> None:
        """Take the values of an earlier state of the same run, except those of some features.

        Args:
            earlier: Progress of the state.
            kept: Dataclasses whose values stay as they are.
        """
        for own in fields(self):
            if own.name not in {"feature_states", "unclaimed"}:
                setattr(self, own.name, getattr(earlier, own.name))
        for kind, record in self.feature_states.items():
            if kind not in kept:  # features may hold the record, so it is changed in place
                vars(record).update(vars(earlier.feature_state(kind)))


def check_types(record: Any) -> None:
    """Raise TypeError if a dataclass field has a value of the wrong type, as in a manually edited state."""
    for name, hint in get_type_hints(type(record)).items():
        hints = get_args(hint) if type(None) in get_args(hint) else [hint]
        kinds = [get_origin(item) or item for item in hints]
        if float in kinds:
            kinds.append(int)
        value = getattr(record, name)
        if Any not in kinds and not isinstance(value, tuple(kinds)):
            raise TypeError(f"{name} is of the type {type(value).__name__}")


@dataclass
class StepPlan:
    """Number and order of a run's steps and epochs; `total_steps` includes steps before a resume."""

    num_batches: int  # micro-batches of an epoch
    # number of processes, or of groups of processes, that read their own micro-batches
    data_parallel_size: int
    accumulation_steps: int  # micro-batches of an optimizer step in each of them
    total_steps: int
    # where this plan began: earlier steps may have had other clips or another size
    first_epoch: int = 0
    first_position: int = 0
    first_step: int = 0
    # processes share the transformer, so that all take equally many micro-batches in a step
    in_lockstep: bool = False
    processes_per_batch: int = 1  # size of a group of processes that share each micro-batch

    # derived from the fields above
    num_processes: int = field(init=False)  # all processes, including those that share a micro-batch
    works_together: bool = field(init=False)  # no process can do a pass without the others
    batches_per_step: int = field(init=False)  # micro-batches of an optimizer step in all processes
    steps_per_epoch: int = field(init=False)
    num_epochs: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_processes = self.data_parallel_size * self.processes_per_batch
        self.works_together = self.in_lockstep or self.processes_per_batch > 1
        self.batches_per_step = self.data_parallel_size * self.accumulation_steps
        self.steps_per_epoch = ceil_div(self.num_batches, self.batches_per_step)
        later_steps = self.total_steps - self.steps_until(self.first_epoch + 1)
        self.num_epochs = self.first_epoch + 1 + max(0, ceil_div(later_steps, self.steps_per_epoch))

    def steps_until(self, epoch: int, position: int = 0) -> int:
        """Return the number of optimizer steps before micro-batch `position` of epoch `epoch` (from 0)."""
        if (epoch, position) <= (self.first_epoch, self.first_position):
            return self.first_step
        if epoch == self.first_epoch:
            return self.first_step + ceil_div(position - self.first_position, self.batches_per_step)
        steps_in_first_epoch = ceil_div(self.num_batches - self.first_position, self.batches_per_step)
        steps_between = (epoch - self.first_epoch - 1) * self.steps_per_epoch
        steps_in_epoch = ceil_div(position, self.batches_per_step)
        return self.first_step + steps_in_first_epoch + steps_between + steps_in_epoch

    def step_of(self, epoch: int, index: int) -> int:
        """Return the step, from 0, that micro-batch `index` of epoch `epoch` belongs to."""
        # the plan may begin within an epoch, so steps do not start at multiples of `batches_per_step`
        return self.steps_until(epoch, index + 1) - 1

    def batches_by_step(self, epoch: int, position: int = 0) -> Iterator[range]:
        """Yield the micro-batches of each optimizer step of epoch `epoch` (from 0).

        Starts at micro-batch `position` and stops at the end of the run.
        """
        done = self.steps_until(epoch, position)
        starts = range(position, self.num_batches, self.batches_per_step)
        for start in starts[: max(0, self.total_steps - done)]:
            yield range(start, min(start + self.batches_per_step, self.num_batches))

    def list_process_batches(self, step_batches: range, process: int) -> list[int]:
        """Return the micro-batches of a step that process number `process` works on.

        The list may be empty in the last step of an epoch. In lockstep it never is: a process without a
        micro-batch of its own repeats the last one of the step.
        """
        batches = [index for index in step_batches if index % self.data_parallel_size == process]
        lacks_batch = self.in_lockstep and len(batches) * self.data_parallel_size < len(step_batches)
        return [*batches, step_batches[-1]] if lacks_batch else batches

    def keys(
        self, process: int, epoch: int, position: int, num_epochs: int | None = None
    ) -> Iterator[tuple[int, int]]:
        """Yield (epoch, index) of the micro-batches that a process works on, in their order.

        Args:
            process: Index of this process.
            epoch: First epoch.
            position: First micro-batch.
            num_epochs: Number of epochs after which to stop.
        """
        end_epoch = self.num_epochs if num_epochs is None else min(epoch + num_epochs, self.num_epochs)
        for current_epoch in range(epoch, end_epoch):
            start = position if current_epoch == epoch else 0
            for step_batches in self.batches_by_step(current_epoch, start):
                yield from (
                    (current_epoch, index) for index in self.list_process_batches(step_batches, process)
                )

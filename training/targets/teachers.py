"""Another frozen model as a teacher: --teacher dit."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from training.loss import NoisyBatch, Trains
from training.targets.passes import TrainingPasses

if TYPE_CHECKING:  # only with LoRA files
    from networks.added import AddedLoras


@dataclass(frozen=True)
class TeacherModel:
    """A transformer with the LoRAs whose effect is taught. It may be the trained one, without its network."""

    family: Trains
    dit: nn.Module
    loras: "AddedLoras"  # switched off
    adapters: "Sequence[AddedLoras]" = ()  # of the trained transformer; the teacher is without them
    is_trained_one: bool = False

    def predict(self, passes: TrainingPasses, noisy_batch: NoisyBatch, has_loras: bool) -> Tensor:
        """Return the prediction for a batch, without gradients. has_loras: whether the LoRAs are on."""
        own_passes = replace(passes, family=self.family, dit=self.dit)
        with self.loras.switched_to(has_loras), self._without_adapters():
            if self.is_trained_one:
                return own_passes.base(noisy_batch)
            return own_passes.frozen(noisy_batch)

    @contextlib.contextmanager
    def _without_adapters(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for adapter in self.adapters:
                stack.enter_context(adapter.switched_to(is_on=False))
            yield


def teach_as_model(teacher: TeacherModel, passes: TrainingPasses, noisy_batch: NoisyBatch) -> Tensor:
    """Return the prediction of the teacher with its LoRAs."""
    return teacher.predict(passes, noisy_batch, has_loras=True)


def teach_change(teacher: TeacherModel, passes: TrainingPasses, noisy_batch: NoisyBatch) -> Tensor:
    """Return b + T' - T: what the trained model predicts without its network, with the change that the LoRAs
    make in the teacher. So only what they change is taught, not the teacher's own way to a picture.
    """
    changed = teacher.predict(passes, noisy_batch, has_loras=True)
    change = changed - teacher.predict(passes, noisy_batch, has_loras=False)
    return passes.base(noisy_batch) + change


def rehearse_change(passes: TrainingPasses, noisy_batch: NoisyBatch) -> Tensor:
    """Run the passes of `teach_change` with one model, on tensors without content: for their memory."""
    with torch.no_grad():
        return passes.base(noisy_batch) + (passes.frozen(noisy_batch) - passes.frozen(noisy_batch))

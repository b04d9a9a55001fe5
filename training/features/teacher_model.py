"""Another frozen model as a teacher: --teacher dit."""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from modules.console import quiet
from modules.errors import CheckpointError, OptionError
from protocols.family import Family, Trains
from training.features.hooks import FrozenNetwork, HookedModel
from training.features.teacher_options import TeacherOptions
from training.features.teacher_passes import TeacherComparison
from training.loss import NoisyBatch
from training.other_models import OtherFamilies, require_equal_shapes
from training.targets.passes import TrainingPasses

if TYPE_CHECKING:  # only with LoRA files
    from networks.gated_loras import AddedLoras


@dataclass(frozen=True)
class TeacherModel:
    """A teacher for the trained network: a transformer with the LoRAs of --teacher_lora."""

    family: Trains
    dit: nn.Module
    loras: "AddedLoras"  # disabled outside `predict`
    # the trained model if its transformer teaches, without the trained network and the adapters; else None
    trained_model: HookedModel | None = None

    def predict(self, passes: TrainingPasses, noisy_batch: NoisyBatch, has_loras: bool) -> Tensor:
        """Return the teacher's prediction for a batch, without gradients.

        Args:
            passes: Passes of the network in a training step.
            noisy_batch: Batch with noise and timesteps.
            has_loras: Whether the LoRAs are active.
        """
        teacher_passes = replace(passes, family=self.family, dit=self.dit)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.loras.switched_to(has_loras))
            if self.trained_model is None:  # the teacher is another transformer
                return teacher_passes.predict_without_gradients(noisy_batch)
            # the teacher is the trained DiT itself, without the trained LoRA and the training adapters
            for adapter in self.trained_model.adapters:
                stack.enter_context(adapter.switched_to(is_on=False))
            return teacher_passes.predict_base_model(noisy_batch)

    def predict_with_loras(self, passes: TrainingPasses, noisy_batch: NoisyBatch) -> Tensor:
        """Return the prediction of the teacher model with its LoRAs enabled."""
        return self.predict(passes, noisy_batch, has_loras=True)

    def predict_base_plus_lora_effect(self, passes: TrainingPasses, noisy_batch: NoisyBatch) -> Tensor:
        """Return the target b + T' - T, which teaches only the effect of the teacher's LoRAs.

        b is the trained model's prediction without the trained network; T' and T are the teacher's
        predictions with and without its LoRAs. Other differences between teacher and model cancel out.
        """
        changed = self.predict(passes, noisy_batch, has_loras=True)
        change = changed - self.predict(passes, noisy_batch, has_loras=False)
        return passes.predict_base_model(noisy_batch) + change


@dataclass
class OtherTeacher:
    """Load a second DiT for --teacher dit and use it as the teacher."""

    options: TeacherOptions
    comparison: TeacherComparison
    is_compiled: bool
    loras: "list[AddedLoras]" = field(default_factory=list)  # in the trained transformer, if it teaches

    def add_loras_if_own_teacher(self, network: FrozenNetwork) -> None:
        """Add the teacher's LoRAs to the trained transformer if that acts as the teacher."""
        if self.options.teacher_dit is None:
            self.loras.append(self._add_loras(network))

    def load(self, model: HookedModel) -> None:
        """Let `comparison` get its targets from the teacher, now that the networks are loaded.

        The teacher is the transformer of --teacher_dit, or else the trained transformer without its trained
        LoRA. Either has the LoRAs of --teacher_lora.
        """
        if self.options.teacher_dit is None:
            teacher = TeacherModel(
                model.plan.family,
                model.networks[0],
                loras=self.loras[0],
                trained_model=model,
            )
        else:
            teacher = self._load_teacher(self.options.teacher_dit, model)
        teacher.loras.place_on(model.plan.accelerator.device, model.compute_dtype)
        if self.options.teacher_delta:
            self.comparison.predict_target = teacher.predict_base_plus_lora_effect
        else:
            self.comparison.predict_target = teacher.predict_with_loras

    def _load_teacher(self, path: Path, model: HookedModel) -> TeacherModel:
        """Load the transformer of --teacher_dit with its LoRAs, frozen and in evaluation mode."""
        family = model.plan.other_families.with_dit(path)
        network = model.loader.load(family, 0)
        loras = self._add_loras(network)
        model.loader.set_up_blocks(network)
        network.dit.eval()
        return TeacherModel(family, network.dit, loras)

    def _add_loras(self, network: FrozenNetwork) -> "AddedLoras":
        from networks.gated_loras import add_loras  # only with such a teacher
        from networks.loading import read_weighted_lora

        uses = [
            read_weighted_lora(path, network.expert.name, multiplier)
            for path, multiplier in self.options.loras()
        ]
        return add_loras(network.dit, uses, self.is_compiled, "--teacher_lora")


def check_other_teacher(options: TeacherOptions, family: Family, others: OtherFamilies) -> None:
    """Raise UserError if the model of --teacher dit cannot teach the trained one.

    Loads nothing.

    Args:
        options: Options of the run.
        family: Family of the trained model.
        others: Makes the family of --teacher_dit.
    """
    if len(family.experts) > 1:
        raise OptionError(
            "--teacher dit: two transformers are trained, and one teacher cannot teach both. Train them one "
            "at a time, each with its own teacher"
        )
    if options.teacher_dit is None:
        _check_loras(family, options)
        return
    name = f"--teacher_dit {options.teacher_dit}"
    teacher = others.with_dit(options.teacher_dit)
    with _renaming_dit_option("--teacher_dit"):  # errors name this option instead of --dit
        files = set(teacher.dit_files)
        teacher.check_named_files()
    if files & set(family.dit_files):
        raise OptionError(
            f"{name}: this is the transformer that is trained. Omit it: --teacher dit with "
            "--teacher_lora alone learns from the trained one"
        )
    if teacher.latent != family.latent:
        raise OptionError(
            f"{name}: its latents are not those of the trained transformer, so it cannot teach it. Pass the "
            "model that the trained one was made from"
        )
    with _renaming_dit_option("--teacher_dit"):
        require_equal_shapes(teacher, family, name, "caches of one cannot be used for the other")
    _check_loras(teacher, options)


@contextlib.contextmanager
def _renaming_dit_option(option: str) -> Iterator[None]:
    """Replace --dit by `option` in the messages of CheckpointErrors during the block."""
    try:
        yield
    except CheckpointError as error:
        text = re.sub(r"--dit\b(?!_)", option, str(error))
        raise CheckpointError(text, error.path) from None


def _check_loras(model: Family, options: TeacherOptions) -> None:
    """Raise CheckpointError if a file of --teacher_lora is not a LoRA for the teacher's model."""
    if not options.loras():
        return
    from networks.apply import check_loras_fit
    from networks.gated_loras import reject_magnitudes  # only with LoRA files
    from networks.loading import read_weighted_lora

    (expert,) = model.experts
    with quiet():  # adding the LoRAs logs all warnings again
        weighted_loras = [
            read_weighted_lora(path, expert.name, multiplier) for path, multiplier in options.loras()
        ]
        for weighted_lora in weighted_loras:
            reject_magnitudes(weighted_lora.lora, "--teacher_lora")
        if model.dit_files:
            file = model.dit_files[0]
            check_loras_fit(file, weighted_loras, model.file_beside(file))

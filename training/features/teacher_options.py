"""Options of --teacher: a frozen model whose predictions the network learns from."""

from pathlib import Path

from modules.errors import OptionError
from modules.options import HABIT, HABIT_BY_NAME, option
from networks.multipliers import files_with_multipliers
from protocols.inputs import CLIP, FIRST_LAST, INPUTS, SUBJECT
from training.features.contract import AT_NETWORK, FeatureOptions

BASE, OTHER_DIT = "base", "dit"
NUM_TIMESTEPS = 1000


class TeacherOptions(FeatureOptions, title="teacher", at=AT_NETWORK):
    """Options of learning from a teacher: the frozen model, its noise levels, and the error terms."""

    teacher: str | None = option(
        "add a loss against the prediction of a frozen model, which sees the full conditions, "
        "including dropped captions and, if the model takes one, the first frame. base: the model "
        "without the network; dit: the model of --teacher_dit. Adds passes without gradients to each "
        "step",
        choices=(BASE, OTHER_DIT),
        known_as=("teacher_matching", "h3_teacher_matching"),
        facts=HABIT,
    )
    teacher_weight: float = option(
        "weight W of --teacher in the loss: (1 - W) * the default loss + W * the loss against the teacher",
        default=0.5,
        above=0,
        maximum=1,
        needs="teacher",
        hint="1 leaves nothing of the usual loss",
        facts=HABIT,
    )
    teacher_dit: Path | None = option(
        "transformer of --teacher dit, such as the base model of a distilled one; without it the trained "
        "transformer itself, without --training_adapter",
        place="there",
        needs="teacher",
        facts=HABIT_BY_NAME,
    )
    teacher_lora: tuple[Path, ...] | None = option(
        "LoRA files that are applied to the teacher of --teacher dit, for the network to learn",
        metavar="FILE[:MULTIPLIER]",
        needs="teacher",
        facts=HABIT_BY_NAME,
    )
    teacher_delta: bool = option(
        "teach only what --teacher_lora changes in the teacher: the target is the prediction of the "
        "trained model without the network, plus that change. Adds three passes to each step instead "
        "of one",
        needs="teacher_lora",
        facts=HABIT,
    )
    teacher_min_timestep: int = option(
        "noise level, in thousandths, from which the teacher sees more than the network; below it, "
        "both see the same (the anchor)",
        default=0,
        minimum=0,
        maximum=NUM_TIMESTEPS,
        needs="teacher",
        hint="0 is no lower bound",
        known_as=("h3_teacher_condition_sigma_min",),
        facts=HABIT,
    )
    teacher_max_timestep: int = option(
        "noise level, in thousandths, up to which the teacher sees more than the network; above it is "
        "the anchor",
        default=NUM_TIMESTEPS,
        minimum=0,
        maximum=NUM_TIMESTEPS,
        needs="teacher",
        hint="1000 is no upper bound, 750 is usual for a teacher that knows more",
        known_as=("h3_teacher_condition_sigma_max",),
        facts=HABIT,
    )
    teacher_anchor_weight: float = option(
        "factor on the teacher's loss outside --teacher_min_timestep..--teacher_max_timestep",
        default=1.0,
        minimum=0,
        maximum=1000,
        needs=("teacher_min_timestep", "teacher_max_timestep"),
        hint="1 is usual",
        known_as=("h3_teacher_preservation_weight",),
        facts=HABIT,
    )
    teacher_split: bool = option(
        "compare magnitude and direction of the teacher's prediction separately, each with its own weight",
        needs="teacher",
        facts=HABIT,
    )
    teacher_size_weight: float = option(
        "weight of the magnitude with --teacher_split",
        default=1.0,
        minimum=0,
        maximum=100,
        needs="teacher_split",
        hint="0.25 to 1 are usual",
        known_as=("h3_teacher_loss_mag_weight",),
        facts=HABIT,
    )
    teacher_colour_weight: float = option(
        "weight of the mean difference of each latent channel, mostly brightness and color, with "
        "--teacher_split",
        default=1.0,
        minimum=0,
        maximum=100,
        needs="teacher_split",
        hint="0.3 is usual",
        known_as=("h3_teacher_loss_dc_weight",),
        facts=HABIT,
    )
    teacher_sees: str = option(
        "what the teacher sees: inputs (all conditions of the caches); first_last, clip and subject "
        "are for models that take the first and last frame, the clip itself or other images of its "
        "subject",
        default=INPUTS,
        choices=(INPUTS, FIRST_LAST, CLIP, SUBJECT),
        needs="teacher",
        known_as=("h3_teacher_conditions",),
        facts=HABIT,
    )

    def check(self) -> None:
        """Raise OptionError for options that conflict with each other."""
        if self.teacher_min_timestep >= self.teacher_max_timestep:
            raise OptionError(
                f"--teacher_min_timestep {self.teacher_min_timestep} --teacher_max_timestep "
                f"{self.teacher_max_timestep}: the first has to be the lower one"
            )
        needs_files = self.teacher == OTHER_DIT
        files = {"--teacher_dit": self.teacher_dit, "--teacher_lora": self.teacher_lora}
        for name, value in files.items():
            if value is not None and not needs_files:
                raise OptionError(f"{name} is for --teacher {OTHER_DIT}. Pass that, or omit {name}")
        if needs_files and not any(files.values()):
            raise OptionError(
                f"--teacher {OTHER_DIT}: pass the transformer to learn from (--teacher_dit FILE), the LoRA "
                "whose effect is to be learned (--teacher_lora FILE), or both"
            )
        self.loras()  # raises for a wrong number of multipliers

    @property
    def condition_set(self) -> str:
        """Name of the conditions that only the teacher gets, such as a fuller caption; "" for none."""
        return "" if self.teacher is None or self.teacher_sees == INPUTS else self.teacher_sees

    def loras(self) -> list[tuple[Path, float]]:
        """Return the files of --teacher_lora with their multipliers.

        Raises:
            OptionError: If a multiplier is missing.
        """
        return files_with_multipliers("--teacher_lora", self.teacher_lora or ())

    @property
    def band(self) -> tuple[int, int] | None:
        """Return the noise levels, in thousandths, where the teacher gets additional inputs; None for all."""
        band = (self.teacher_min_timestep, self.teacher_max_timestep)
        return None if self.teacher is None or band == (0, NUM_TIMESTEPS) else band

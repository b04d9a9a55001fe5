"""Learn from a frozen model: --teacher.

`teacher_passes.py` compares with its predictions, `teacher_errors.py` measures errors of magnitude and
direction, and `teacher_model.py` loads another model as the teacher.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from modules.console import format_count
from modules.errors import OptionError
from protocols.inputs import INPUTS
from runtime.ways.contract import FurtherModel
from training.features.contract import DROPPED_CAPTIONS, Feature, given_values
from training.features.hooks import RunFeatures
from training.features.step_targets import PassCounts, StepTarget
from training.features.teacher_options import BASE, OTHER_DIT, TeacherOptions

if TYPE_CHECKING:
    from protocols.family import Family
    from training.data.live import LiveTextEncoders
    from training.other_models import OtherFamilies


def _check(options: TeacherOptions, family: "Family", counts: Sequence[int]) -> None:
    """Raise OptionError if the family lacks the --teacher_sees condition, or any teacher-only input."""
    if options.teacher_sees not in (INPUTS, *family.abilities.views):
        raise OptionError(
            f"--teacher_sees {options.teacher_sees}: the model {family.name} takes no such condition. Omit "
            "it: the teacher then knows all conditions of the caches"
        )
    if not family.teacher_only_conditions and options.teacher == BASE:
        raise OptionError(
            f"--teacher {options.teacher}: the model {family.name} takes no additional conditions, so the "
            "teacher would know no more than the network. Omit it"
        )


def _check_files(options: TeacherOptions, family: "Family", others: "OtherFamilies") -> None:
    from training.features.teacher_model import check_other_teacher  # torch: only with --teacher dit

    check_other_teacher(options, family, others)


def _reject_live_encoders(options: TeacherOptions, live_encoders: "LiveTextEncoders | None") -> None:
    """Raise OptionError if captions are encoded during training instead of read from caches."""
    if live_encoders is not None:
        names = " and ".join(encoder.name for encoder in live_encoders.encoders)
        alone = (
            ", train the transformer alone (--network_train_unet_only)"
            if live_encoders.trained_encoders
            else ""
        )
        raise OptionError(
            f"--teacher {options.teacher}: captions are encoded while training here, by {names}, and the "
            f"teacher's come from caches. Cache them (--cache_text_encoder_outputs){alone}, or omit --teacher"
        )


def _describe(options: TeacherOptions) -> str:
    """Describe the teacher, the loss weight of its predictions, and its noise levels."""
    name = "the model without the network"
    if options.teacher != BASE:
        model = options.teacher_dit.name if options.teacher_dit is not None else "the model itself"
        loras = format_count(len(options.loras()), "LoRA")
        name = f"{model} with {loras}" if options.loras() else model
        if options.teacher_delta:
            name = f"the change by {loras} in {model}"
    band = ""
    if options.band is not None:
        low, high = options.band
        band = f", which knows more from {low} to {high} thousandths of noise"
    return f"{options.teacher_weight:g} of the loss from {name}{band}"


def _start(options: TeacherOptions, run: RunFeatures) -> None:
    """Install the teacher; with --teacher dit, it is loaded once the trained networks are loaded."""
    from training.features.teacher_passes import install_teacher  # torch: only with --teacher

    comparison = install_teacher(run, options)
    if options.teacher == OTHER_DIT:
        from training.features.teacher_model import OtherTeacher  # only with another model

        other_teacher = OtherTeacher(options, comparison, run.options.speed.compilation.choice is not None)
        run.on.before_setup.append(other_teacher.add_loras_if_own_teacher)
        run.on.after_load.append(other_teacher.load)


def _join(run: RunFeatures, options: TeacherOptions) -> None:
    """Register --teacher: a run learns from predictions of a frozen model, mixed with the clips or alone."""
    options.check()
    loss_type = run.options.loss.loss_type
    if options.teacher_split and loss_type != "l2":
        raise OptionError(
            f"--teacher_split with --loss_type {loss_type}: size and direction are those of squared "
            "differences. Use --loss_type l2, or omit --teacher_split"
        )
    target = StepTarget(
        option=f"--teacher {options.teacher}",
        description=_describe(options),
        passes=PassCounts(with_gradients=0, without_gradients=3 if options.teacher_delta else 1),
        replaces_velocity=True,
    )
    run.targets.append(target)
    # a model distilled for few steps keeps this ability while it follows a teacher, so no warning is needed
    if options.teacher == OTHER_DIT or options.teacher_weight == 1:
        run.keeps_few_step_ability = True
    run.needs.add(DROPPED_CAPTIONS)  # the teacher reads the captions before dropout
    run.condition_set = options.condition_set  # conditions that only the teacher gets
    # metadata of the saved files
    run.info.in_files |= {**given_values(options), "teacher_weight": options.teacher_weight}
    if options.teacher_dit is not None:
        model = FurtherModel("the teacher", f"--teacher_dit {options.teacher_dit}")
        run.further_models.append(model)
    run.on.check.append(partial(_check, options))
    run.on.on_text_encoders.append(partial(_reject_live_encoders, options))
    if options.teacher == OTHER_DIT:
        run.on.check_files.append(partial(_check_files, options))
    run.on.start.append(partial(_start, options))


TEACHER = Feature(
    name="teacher",
    options=TeacherOptions,
    is_on=lambda options: options.teacher is not None,
    join=_join,
)

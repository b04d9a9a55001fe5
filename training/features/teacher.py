"""Learn from a frozen model: --teacher.

The comparison with it is in `teacher_passes.py`, its errors of size and direction are in `teacher_errors.py`,
another model as a teacher is in `teacher_model.py`.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from contract.inputs import INPUTS
from modules.console import count_of
from modules.errors import OptionError
from running.ways.contract import FurtherModel
from training.features.contract import AT_NETWORK, DROPPED_CAPTIONS, Feature, StepPasses, given_values
from training.features.teacher_options import BASE, OTHER_DIT, TeacherOptions

if TYPE_CHECKING:
    from contract.family import Family
    from training.data.live import LiveTexts
    from training.features.hooks import Hooks, OptionsOfRun
    from training.other_families import OtherFamilies
    from training.steps import Progress


def _refuse(options: "OptionsOfRun") -> None:
    loss_type = options.loss.loss_type
    if options.of(TeacherOptions).teacher_split and loss_type != "l2":
        raise OptionError(
            f"--teacher_split with --loss_type {loss_type}: size and direction are those of squared "
            "differences. Use --loss_type l2, or leave out --teacher_split"
        )


def _check(options: TeacherOptions, family: "Family", counts: Sequence[int]) -> None:
    """Raise OptionError if the family has no extra inputs for --teacher."""
    if options.teacher_sees not in (INPUTS, *family.can.views):
        raise OptionError(
            f"--teacher_sees {options.teacher_sees}: the model {family.name} takes no such condition. Leave "
            "it out: the teacher then knows all conditions of the caches"
        )
    if not family.fuller and options.teacher == BASE:
        raise OptionError(
            f"--teacher {options.teacher}: the model {family.name} takes no further conditions, so the "
            "teacher would know no more than the network. Leave it out"
        )


def _check_files(options: "OptionsOfRun", family: "Family", others: "OtherFamilies") -> None:
    values = options.of(TeacherOptions)
    if values.teacher == OTHER_DIT:
        from training.features.teacher_model import check_other_teacher  # torch: only with --teacher dit

        check_other_teacher(values, family, others)


def _find_model(options: TeacherOptions) -> FurtherModel | None:
    if options.teacher_dit is None:
        return None
    return FurtherModel("the teacher", f"--teacher_dit {options.teacher_dit}")


def _check_texts(options: TeacherOptions, texts: "LiveTexts | None") -> None:
    """Raise OptionError if texts are not cached."""
    if texts is not None:
        names = " and ".join(encoder.name for encoder in texts.encoders)
        raise OptionError(
            f"--teacher {options.teacher}: captions are encoded while training here, by {names}, and the "
            "teacher's come from caches. Cache them (--cache_text_encoder_outputs), train the transformer "
            "alone (--network_train_unet_only), or leave --teacher out"
        )


def _describe(options: TeacherOptions) -> str:
    """Return whom the network learns from, how much of the loss that is, and at which noise."""
    name = "the model without the network"
    if options.teacher != BASE:
        model = options.teacher_dit.name if options.teacher_dit is not None else "the model itself"
        loras = count_of(len(options.loras()), "LoRA")
        name = f"{model} with {loras}" if options.loras() else model
        if options.teacher_delta:
            name = f"the change by {loras} in {model}"
    band = ""
    if options.band is not None:
        low, high = options.band
        band = f", which knows more from {low} to {high} thousandths of noise"
    return f"{options.teacher_weight:g} of the loss from {name}{band}"


def _metadata(options: TeacherOptions, progress: "Progress") -> Mapping[str, Any]:
    return {**given_values(options), "teacher_weight": options.teacher_weight}


def _install(hooks: "Hooks", options: "OptionsOfRun", progress: "Progress") -> None:
    from training.features.teacher_passes import install_teacher  # torch: only with --teacher

    values = options.of(TeacherOptions)
    teaching = install_teacher(hooks, values)
    if values.teacher == OTHER_DIT:
        from training.features.teacher_model import OtherTeacher  # only with another one

        other = OtherTeacher(values, teaching, options.speed.compilation.choice is not None)
        hooks.before_dress.append(other.add_to_trained)
        hooks.after_load.append(other.load)


TEACHER = Feature(
    name="teacher",
    options=TeacherOptions,
    place=AT_NETWORK,
    is_on=lambda options: options.teacher is not None,
    refuse=_refuse,
    check=_check,
    check_files=_check_files,
    target=lambda options: f"--teacher {options.teacher}",
    replaces_clip=True,
    passes=lambda options: StepPasses(with_gradients=0, without=3 if options.teacher_delta else 1),
    keeps_steps=lambda options: options.teacher == OTHER_DIT or options.teacher_weight == 1,
    needs=(DROPPED_CAPTIONS,),
    view=lambda options: options.view,
    check_texts=_check_texts,
    further_model=_find_model,
    describe=_describe,
    metadata=_metadata,
    install=_install,
)

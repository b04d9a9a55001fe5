"""Slide between captions: --slider.

At strength 1 the network acts like the positive caption, at -1 like the negative one. The file of captions
is read in `slider_file.py`, the passes are in `slider_passes.py`.
"""

import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from modules.errors import OptionError
from modules.options import HABIT, HABIT_BY_NAME, option
from training.features.contract import AT_NETWORK, Feature, FeatureOptions, given_values
from training.features.hooks import HookedModel, PlannedRun, RunFeatures
from training.features.phases import LOSS
from training.features.slider_file import SliderFile, read_sliders
from training.features.step_targets import PassCounts, StepTarget
from training.learning_options import PRESERVE_OUTPUT

if TYPE_CHECKING:
    from training.data.live import LiveTextEncoders

logger = logging.getLogger(__name__)


class SliderOptions(FeatureOptions, title="slider", at=AT_NETWORK, facts=HABIT):
    """Options for training a slider LoRA with the captions of a --slider file."""

    slider: Path | None = option(
        "TOML file with captions: at strength 1, the network moves the result of a neutral caption "
        "toward the positive one, at -1 toward the negative one. Captions of the dataset are not used. "
        "Adds three passes without gradients and one with gradients to each step",
        place="there",
        often=False,
        facts=HABIT_BY_NAME,
        known_as=("slider_config", "leco", "concept_slider"),
    )

    @property
    def path(self) -> Path:
        """Path of --slider, for code that runs only if the option is set."""
        assert self.slider is not None  # the feature is on
        return self.slider


def _check_tables(run: RunFeatures, path: Path) -> None:
    """Raise OptionError if a dataset table asks for output preservation, or sets its own network strength."""
    # A slider learns from the captions of its own file, at its own strengths.
    for table in run.tables:
        if PRESERVE_OUTPUT in table.learning.attributes:
            raise OptionError(
                f"{table.name}: {PRESERVE_OUTPUT} cannot be used with --slider {path}, which learns "
                "the captions of its own file, not those of the table. Omit it; an anchor in that file "
                "preserves the output for a caption"
            )
        if table.learning.network_multiplier != 1:
            raise OptionError(
                f"{table.name}: network_multiplier cannot be used with --slider {path}, which learns at the "
                "strengths 1 and -1. Omit one of the two"
            )


def _reject_trained_encoders(path: Path, live_encoders: "LiveTextEncoders | None") -> None:
    """Raise OptionError if text encoders are trained, because a slider's captions are encoded only once."""
    if live_encoders is not None and live_encoders.trained_encoders:
        names = " and ".join(encoder.name for encoder in live_encoders.trained_encoders)
        raise OptionError(
            f"--slider {path}: its captions are encoded before the training, and here {names} "
            "learns. Train the transformer alone (--network_train_unet_only)"
        )
    logger.info("The captions of the dataset are not used: --slider %s has its own.", path)


def _prepare_passes(run: RunFeatures, file: SliderFile, plan: PlannedRun) -> None:
    """Encode the slider's captions now, and add its forward passes once the transformer is loaded."""
    from training.features.slider_passes import encode_sliders, slider_passes  # torch: only with --slider

    target = encode_sliders(plan.family, file, plan.accelerator.device)

    def add_passes(model: HookedModel) -> None:
        run.around(LOSS, partial(slider_passes, target, model.trainable.at_strength))

    run.on.after_load.append(add_passes)


def _join(run: RunFeatures, options: SliderOptions) -> None:
    """Register --slider: a run learns to move toward one caption at strength 1, and away from it at -1."""
    path = options.path
    if run.options.is_fused:
        raise OptionError(
            "--slider with --fused_backward_pass: the gradients of its two strengths are added up, but fused "
            "gradients are freed immediately. Omit one of the two"
        )
    _check_tables(run, path)
    file = read_sliders(path)
    # beyond the usual pass: with gradients, neutral (and anchor) at two strengths, minus the usual pass;
    # without gradients, the base model for positive, negative and neutral (and anchor)
    passes = PassCounts(with_gradients=1, without_gradients=3)
    if file.has_anchors:
        passes = PassCounts(with_gradients=3, without_gradients=4)
    target = StepTarget(
        option=f"--slider {path}",
        description=f"captions of {path} at strength 1 and -1",
        passes=passes,
        reason_to_exclude_others="a slider learns from its captions alone",
    )
    run.targets.append(target)
    run.keeps_few_step_ability = True  # a slider does not undo a distillation for few steps
    run.info.in_files |= given_values(options)
    run.on.on_text_encoders.append(partial(_reject_trained_encoders, path))
    run.on.plan.append(partial(_prepare_passes, run, file))


SLIDER = Feature(
    name="slider",
    options=SliderOptions,
    is_on=lambda options: options.slider is not None,
    join=_join,
)

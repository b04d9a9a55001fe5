"""Slide between captions: --slider.

At strength 1 the network acts like the positive caption, at -1 like the negative one. The file of captions
and the passes are in `slider_passes.py`.
"""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from modules.errors import OptionError
from modules.options import HABIT, Options, option
from training.features.contract import AT_NETWORK, KEPT, Feature, StepPasses, given_values

if TYPE_CHECKING:
    from dataset.table import DatasetTable
    from training.data.live import LiveTexts
    from training.features.hooks import HookedModel, Hooks, OptionsOfRun, PlannedRun
    from training.steps import Progress

logger = logging.getLogger(__name__)


class SliderOptions(Options, title="slider"):
    """Which captions a slider moves between."""

    slider: Path | None = option(
        "TOML file with captions: at strength 1 the network moves a neutral caption's result towards the "
        "positive one, at -1 towards the negative one. Captions of the dataset are not used. Three more "
        "passes in each step without gradients, and one more with gradients",
        place="there",
        often=False,
        known_as=("slider_config", "leco", "concept_slider"),
        facts=HABIT,
    )

    @property
    def path(self) -> Path:
        assert self.slider is not None  # the feature is on
        return self.slider


def _refuse(options: "OptionsOfRun") -> None:
    targets = options.typed_targets
    if targets:
        raise OptionError(
            f"--slider {options.of(SliderOptions).slider} with {targets[0]}: a slider learns from its "
            "captions alone. Leave out one of the two"
        )
    if options.is_fused:
        raise OptionError(
            "--slider with --fused_backward_pass: the gradients of its two strengths are added, and fused "
            "gradients are freed at once. Leave out one of the two"
        )


def _check_tables(options: "OptionsOfRun", tables: "Sequence[DatasetTable]") -> None:
    """Raise OptionError for tables that ask for another target or strength."""
    path = options.of(SliderOptions).slider
    for table in tables:
        if KEPT in table.attributes:
            raise OptionError(
                f"{table.name}: {KEPT} cannot be had with --slider {path}, which learns "
                "its own captions and not those of the table. Leave it out; an anchor in the slider's file "
                "keeps what a caption makes"
            )
    for table in tables:
        if table.network_multiplier != 1:
            raise OptionError(
                f"{table.name}: network_multiplier cannot be had with --slider {path}, which learns at the "
                "strengths 1 and -1. Leave out one of the two"
            )


def _check_texts(options: SliderOptions, texts: "LiveTexts | None") -> None:
    """Raise OptionError if the file of captions cannot be read, or if text encoders learn."""
    from training.features.slider_passes import read_sliders  # torch: only with --slider

    read_sliders(options.path)
    if texts is not None and texts.changing:
        names = " and ".join(encoder.name for encoder in texts.changing)
        raise OptionError(
            f"--slider {options.slider}: its captions are encoded before the training, and here {names} "
            "learns. Train the transformer alone (--network_train_unet_only)"
        )
    logger.info("The captions of the dataset are not used: --slider %s has its own.", options.slider)


def _count_passes(options: SliderOptions) -> StepPasses:
    """Return the passes besides the usual one. Raises OptionError for a file with faults."""
    from training.features.slider_passes import read_sliders

    has_anchors = read_sliders(options.path).has_anchors
    return StepPasses(with_gradients=3, without=4) if has_anchors else StepPasses(1, without=3)


def _encode(hooks: "Hooks", plan: "PlannedRun") -> None:
    """Encode the captions while there is no transformer, and have its passes replace the usual one."""
    from training.features.slider_passes import encode_sliders, read_sliders, slider_passes

    file = read_sliders(plan.options.of(SliderOptions).path)
    target = encode_sliders(plan.family, file, plan.accelerator.device)

    def learn(model: "HookedModel") -> None:
        hooks.other_passes.append(partial(slider_passes, target, model.trainable.at_strength))

    hooks.after_load.append(learn)


def _install(hooks: "Hooks", options: "OptionsOfRun", progress: "Progress") -> None:
    hooks.before_load.append(partial(_encode, hooks))


SLIDER = Feature(
    name="slider",
    options=SliderOptions,
    place=AT_NETWORK,
    is_on=lambda options: options.slider is not None,
    facts=HABIT,
    refuse=_refuse,
    check_tables=_check_tables,
    check_texts=_check_texts,
    passes=_count_passes,
    keeps_steps=lambda options: True,
    describe=lambda options: f"captions of {options.slider} at strength 1 and -1",
    metadata=lambda options, progress: given_values(options),
    install=_install,
)

"""Create the training scripts of a family: read the options, then start the training."""

import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from modules.command import begin_loading, name_as_typed
from modules.errors import UserError
from modules.installation import TELLS_UNUSED, import_own
from modules.options import Options, option_values
from modules.speed_options import reject_for_full
from protocols.families import FAMILIES, Script
from training.features.composing import options_by_expert
from training.learning_options import ExpertTrainingOptions, FullDitOptions
from training.noise_options import SAMPLERS
from training.options import (
    NO_CHANGES,
    ScriptOption,
    TrainedNetworkOptions,
    TrainerChanges,
    TrainingOptions,
    read_training,
)

if TYPE_CHECKING:
    from training.image_options import ImageTrainerDefaults

logger = logging.getLogger(__name__)


def training_script(
    family: str,
    about: str | None,
    *,
    full_dit: bool = False,
    script: str = "",
    kind: str = "Training",
    images: "ImageTrainerDefaults | None" = None,
    extra_options: Sequence[type[Options]] = (),
    check: Callable[[Any], None] = lambda options: None,
    samplers: Sequence[str] = SAMPLERS,
    changes: TrainerChanges = NO_CHANGES,
) -> Script:
    """Return the script that trains a LoRA for a family, or its transformer with `full_dit`.

    The script's function takes an optional second argument, a function that gets the options that were read
    and is called instead of training; it returns an exit code.

    Args:
        family: Name of the family.
        about: The script's docstring.
        full_dit: Whether the whole transformer is trained.
        script: File of the script, if it is not the family's default one.
        kind: Kind of the family's options: a family may have several records for different scripts.
        images: Differences between image families; None for video.
        extra_options: Records of options in addition to the family's.
        check: Raises OptionError if the family's options conflict.
        samplers: Choices of --timestep_sampling for video.
        changes: Changes to shared options, and options of the family that are rejected.
    """
    entry = FAMILIES[family]
    if ExpertTrainingOptions in extra_options:
        extra_options = [*extra_options, *options_by_expert()]
    trained_options = FullDitOptions if full_dit else TrainedNetworkOptions
    sampling_settings = {"choices": samplers, **changes.settings.get("timestep_sampling", {})}
    changes = replace(changes, settings={**changes.settings, "timestep_sampling": sampling_settings})

    def train(argv: Sequence[str] | None = None, start: Callable[..., int] | None = None) -> None:
        """Read the options in `argv` (None: the command line) and train; exit with the code of an error.

        `start` replaces the training, for other tools.
        """
        record = entry.options_record(kind)
        if images is None:
            options, family_options, script_options = read_training(
                about, record, argv, trained_options=trained_options, shared=extra_options, changes=changes
            )
        else:
            from training.image_options import read_image_training  # only for image models

            options, family_options, script_options = read_image_training(
                about, record, images, argv, trained_options=trained_options
            )
        with name_as_typed(options.typed_names):
            if full_dit:
                reject_for_full(option_values(family_options).get("dit_dtype"))
            check(family_options)
            if os.environ.get(TELLS_UNUSED):
                _warn_of_unused_options(options, family_options)
            default_script = f"{entry.script}_train.py" if full_dit else f"{entry.training_script}.py"
            exit_code = (start or _start_training)(
                family, script or default_script, options, family_options, script_options
            )
        if exit_code:
            raise SystemExit(exit_code)

    return Script.for_family(family, train)


def _start_training(
    family: str,
    script: str,
    options: TrainingOptions,
    family_options: Any,
    script_options: Sequence[ScriptOption],
) -> int:
    """Load torch, build the model family, and train; return the exit code."""
    entry = FAMILIES[family]
    if entry.notice:
        entry.log_notice()
    begin_loading()
    # torch loads here, after every option has been read
    from training.next_commands import TrainingCommand
    from training.other_models import OtherFamilies
    from training.run import train_network

    model = entry.make_family("training", family_options)
    command = TrainingCommand(
        script, script_options, family_entry=entry, family_options=family_options, family=family
    )
    # the family that generates samples, if an option names transformers that only samples use
    sampling: Any = None
    sampling_dit_option: str = model.abilities.sampling_dit_option
    if option_values(family_options).get(sampling_dit_option.removeprefix("--")) is not None:
        sampling = import_own(f"{entry.room}.family").family_for_samples(family_options)

    @cache  # so that making the same model again logs nothing
    def with_other_dit(dit: Any) -> Any:
        return entry.make_family("training", replace(family_options, dit=dit))

    return train_network(model, options, command, others=OtherFamilies(sampling, with_other_dit))


def _warn_of_unused_options(options: TrainingOptions, family_options: Any) -> None:
    """Warn about options that have no effect in this run, and about unread keys of its dataset file."""
    from dataset.config import load_dataset_config
    from training.unused_options import list_without_effect

    if options.loop.dataset_config is not None:
        with contextlib.suppress(UserError):  # errors of the dataset are reported by another check
            load_dataset_config(options.loop.dataset_config, options.subset)
    for line in list_without_effect(options, family_options):
        logger.warning(line)

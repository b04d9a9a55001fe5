"""Train a LoRA for Lumina-Image-2.0. All options: python lumina_train_network.py --help"""

from collections.abc import Sequence
from functools import partial

import modules.interpreter  # noqa: F401
from families import identify
from lumina.options import (
    LuminaTrainingOptions,
    caching_commands,
    generation_words,
    translate_training,
)
from modules.command import command_line
from modules.parser import declare
from training.image_options import ImageTrainerDefaults, image_training_parser, read_image_training

DEFAULTS = ImageTrainerDefaults(
    timestep_sampling="shift",
    discrete_flow_shift=6.0,
    model_prediction_type="raw",
    samplers=("sigma", "uniform", "sigmoid", "shift", "nextdit_shift", "flux_shift"),
    translate=translate_training,
)


def main(argv: Sequence[str] | None = None) -> None:
    options, lumina_options = read_image_training(__doc__, LuminaTrainingOptions, DEFAULTS, argv)

    from dataset.batches.finding import CachingCommands
    from lumina.family import family_for_training
    from training.following import FamilyScripts
    from training.run import train_network  # torch loads here, after every option has been read

    commands = CachingCommands(*caching_commands(options.loop.dataset_config, lumina_options))
    scripts = FamilyScripts(
        "lumina_train_network.py",
        declare(LuminaTrainingOptions),
        partial(generation_words, lumina_options),
        make_parser=partial(image_training_parser, None, DEFAULTS),
    )
    code = train_network(family_for_training(lumina_options), options, commands, scripts)
    if code:
        raise SystemExit(code)


if __name__ == "__main__":
    command_line(main, explain=identify)

"""Train a LoRA for HunyuanImage-2.1. All options: python hunyuan_image_train_network.py --help"""

from collections.abc import Sequence
from functools import partial

import modules.interpreter  # noqa: F401
from families import identify
from hunyuan_image.options import (
    HunyuanImageTrainingOptions,
    caching_commands,
    generation_words,
    translate_training,
)
from modules.command import command_line
from modules.parser import declare
from training.image_options import ImageTrainerDefaults, image_training_parser, read_image_training

DEFAULTS = ImageTrainerDefaults(
    timestep_sampling="sigma",
    discrete_flow_shift=5.0,
    model_prediction_type="raw",
    translate=translate_training,
)


def main(argv: Sequence[str] | None = None) -> None:
    options, own_options = read_image_training(__doc__, HunyuanImageTrainingOptions, DEFAULTS, argv)

    from dataset.batches.finding import CachingCommands
    from hunyuan_image.family import family_for_training
    from training.following import FamilyScripts
    from training.run import train_network  # torch loads here, after every option has been read

    commands = CachingCommands(*caching_commands(options.loop.dataset_config, own_options))
    scripts = FamilyScripts(
        "hunyuan_image_train_network.py",
        declare(HunyuanImageTrainingOptions),
        partial(generation_words, own_options),
        make_parser=partial(image_training_parser, None, DEFAULTS),
    )
    code = train_network(family_for_training(own_options), options, commands, scripts)
    if code:
        raise SystemExit(code)


if __name__ == "__main__":
    command_line(main, explain=identify)

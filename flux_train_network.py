"""Train a LoRA for FLUX.1 and Chroma. All options: python flux_train_network.py --help"""

from collections.abc import Sequence
from functools import partial

import modules.interpreter  # noqa: F401
from families import identify
from flux.options import (
    USUAL_GUIDANCE,
    FluxTrainingOptions,
    caching_commands,
    generation_words,
)
from modules.command import command_line
from modules.parser import declare
from modules.vae_options import take_ae
from training.image_options import ImageTrainerDefaults, image_training_parser, read_image_training

DEFAULTS = ImageTrainerDefaults(
    timestep_sampling="sigma",
    discrete_flow_shift=3.0,
    model_prediction_type="sigma_scaled",
    guidance_scale=USUAL_GUIDANCE,
    translate=take_ae,
)


def main(argv: Sequence[str] | None = None) -> None:
    options, flux_options = read_image_training(__doc__, FluxTrainingOptions, DEFAULTS, argv)

    from dataset.batches.finding import CachingCommands
    from flux.family import family_for_training
    from training.following import FamilyScripts
    from training.run import train_network  # torch loads here, after every option has been read

    commands = CachingCommands(*caching_commands(options.loop.dataset_config, flux_options))
    scripts = FamilyScripts(
        "flux_train_network.py",
        declare(FluxTrainingOptions),
        partial(generation_words, flux_options),
        make_parser=partial(image_training_parser, None, DEFAULTS),
    )
    code = train_network(family_for_training(flux_options), options, commands, scripts)
    if code:
        raise SystemExit(code)


if __name__ == "__main__":
    command_line(main, explain=identify)

"""Train a LoRA for Wan2.1 and Wan2.2. All options: python wan_train_network.py --help"""

import argparse
from collections.abc import Sequence
from functools import partial

import modules.interpreter  # noqa: F401
from families import identify
from modules.command import command_line
from modules.parser import add_options
from training.expert_options import add_expert_training_arguments
from training.options import read_training
from wan.options import WanTrainingOptions, caching_commands, generation_words


def main(argv: Sequence[str] | None = None) -> None:
    options, wan_options = read_training(
        __doc__, WanTrainingOptions, argv, add_more=add_expert_training_arguments
    )

    from dataset.batches.finding import CachingCommands
    from training.following import FamilyScripts
    from training.run import train_network  # torch loads here, after every option has been read
    from wan.family import family_for_samples, family_for_training

    commands = CachingCommands(*caching_commands(options.loop.dataset_config, wan_options))
    scripts = FamilyScripts("wan_train_network.py", _add_arguments, partial(generation_words, wan_options))
    sampling = family_for_samples(wan_options)
    code = train_network(family_for_training(wan_options), options, commands, scripts, sampling)
    if code:
        raise SystemExit(code)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, WanTrainingOptions)
    add_expert_training_arguments(parser)


if __name__ == "__main__":
    command_line(main, explain=identify)

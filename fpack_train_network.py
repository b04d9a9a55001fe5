"""Train a LoRA for FramePack and FramePack-F1. All options: python fpack_train_network.py --help"""

from collections.abc import Sequence
from functools import partial

import modules.interpreter  # noqa: F401
from families import identify
from frame_pack.options import (
    FramePackTrainingOptions,
    caching_commands,
    generation_words,
)
from modules.command import command_line
from modules.parser import declare
from training.options import read_training


def main(argv: Sequence[str] | None = None) -> None:
    options, fpack_options = read_training(__doc__, FramePackTrainingOptions, argv)

    from dataset.batches.finding import CachingCommands
    from frame_pack.family import family_for_training
    from training.following import FamilyScripts
    from training.run import train_network  # torch loads here, after every option has been read

    family = family_for_training(fpack_options)
    commands = CachingCommands(
        *caching_commands(options.loop.dataset_config, fpack_options, family.caching_switches)
    )
    scripts = FamilyScripts(
        "fpack_train_network.py", declare(FramePackTrainingOptions), partial(generation_words, fpack_options)
    )
    code = train_network(family, options, commands, scripts)
    if code:
        raise SystemExit(code)


if __name__ == "__main__":
    command_line(main, explain=identify)

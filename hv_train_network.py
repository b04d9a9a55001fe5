"""Train a LoRA for HunyuanVideo and SkyReels V1. All options: python hv_train_network.py --help"""

from collections.abc import Sequence
from functools import partial

import modules.interpreter  # noqa: F401
from families import identify
from hunyuan_model.options import (
    HunyuanTrainingOptions,
    caching_commands,
    generation_words,
)
from modules.command import command_line
from modules.parser import declare
from training.options import read_training


def main(argv: Sequence[str] | None = None) -> None:
    options, hunyuan_options = read_training(__doc__, HunyuanTrainingOptions, argv)

    from dataset.batches.finding import CachingCommands
    from hunyuan_model.family import family_for_training
    from training.following import FamilyScripts
    from training.run import train_network  # torch loads here, after every option has been read

    family = family_for_training(hunyuan_options)
    commands = CachingCommands(
        *caching_commands(options.loop.dataset_config, hunyuan_options, family.caching_switches)
    )
    scripts = FamilyScripts(
        "hv_train_network.py", declare(HunyuanTrainingOptions), partial(generation_words, hunyuan_options)
    )
    code = train_network(family, options, commands, scripts)
    if code:
        raise SystemExit(code)


if __name__ == "__main__":
    command_line(main, explain=identify)

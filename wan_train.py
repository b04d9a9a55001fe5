"""Fine-tune the whole transformer of Wan2.1. All options: python wan_train.py --help"""

from collections.abc import Sequence
from functools import partial

import modules.interpreter  # noqa: F401
from families import identify
from modules.command import command_line
from modules.dit_options import refuse_for_whole
from modules.errors import OptionError
from modules.parser import declare
from training.options import read_training
from training.whole_dit_options import add_whole_dit_arguments
from wan.options import WanTrainingOptions, caching_commands, generation_words


def main(argv: Sequence[str] | None = None) -> None:
    options, wan_options = read_training(
        __doc__, WanTrainingOptions, argv, add_learner=add_whole_dit_arguments
    )
    refuse_for_whole(wan_options.dit_dtype)
    if wan_options.mixed_precision_transformer:
        raise OptionError(
            "--mixed_precision_transformer: trained weights are kept in float32, or in bfloat16 with "
            "--full_bf16; leave it out"
        )
    if wan_options.sample_dit_other is not None:
        raise OptionError(
            "--sample_dit_other: a transformer that is trained as a whole cannot leave the device for "
            "another. Leave it out: samples are made with the trained one alone"
        )

    from dataset.batches.finding import CachingCommands
    from training.following import FamilyScripts
    from training.run import train_network  # torch loads here, after every option has been read
    from wan.family import family_for_training

    commands = CachingCommands(*caching_commands(options.loop.dataset_config, wan_options))
    scripts = FamilyScripts(
        "wan_train.py",
        declare(WanTrainingOptions),
        partial(generation_words, wan_options),
        add_whole_dit_arguments,
    )
    code = train_network(family_for_training(wan_options), options, commands, scripts)
    if code:
        raise SystemExit(code)


if __name__ == "__main__":
    command_line(main, explain=identify)

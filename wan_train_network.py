"""Train a LoRA for Wan2.1. All options: python wan_train_network.py --help"""

from collections.abc import Sequence

from families import identify
from modules.command import command_line
from training.options import read_training
from wan.options import WanTrainingOptions, add_training_arguments, caching_commands, generation_command


def main(argv: Sequence[str] | None = None) -> None:
    options, wan_options = read_training(__doc__, add_training_arguments, WanTrainingOptions, argv)

    from dataset.batches.finding import CachingCommands
    from training.run import train_network  # torch loads here, after every option has been read
    from wan.family import family_for_training

    commands = CachingCommands(*caching_commands(options.loop.dataset_config, wan_options))
    generate = generation_command(wan_options, options.saving.result)
    code = train_network(family_for_training(wan_options), options, commands, generate)
    if code:
        raise SystemExit(code)


if __name__ == "__main__":
    command_line(main, explain=identify)

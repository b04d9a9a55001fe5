"""Merge LoRAs into a model file, one tensor at a time. All options: python merge_lora.py --help"""

from collections.abc import Sequence

import modules.interpreter  # noqa: F401
from modules.command import command_line
from modules.families import identify
from modules.parser import parse_options
from networks.tool_options import MERGE_CHANNELS_UNCHECKED, MergeOptions


def main(argv: Sequence[str] | None = None) -> None:
    (options,) = parse_options(__doc__, argv, MergeOptions)

    from modules.devices import choose_device
    from networks.loading import lora_uses
    from networks.merging import merge_into_file
    from networks.metadata import expert_of_model

    expert = options.expert or expert_of_model(options.dit)
    merge_into_file(
        options.dit,
        [use.for_expert(expert) for use in lora_uses(options.lora, with_texts=True)],
        options.save_merged_model,
        choose_device(options.device),
        None if options.dit_in_channels == MERGE_CHANNELS_UNCHECKED else options.dit_in_channels,
    )


if __name__ == "__main__":
    command_line(main, explain=identify)

"""Compare LoRA files and strengths: one model, one prompt file, a grid of clips with a column for each.

    python compare.py --lora my_lora-*.safetensors --lora_multiplier 0.6 0.8 1.0 --from_file prompts.txt ...

All other options are those of the family's generation script, such as wan_generate_video.py --help: the
model's files, --from_file or --prompt, sizes, steps, --save_path.
"""

import argparse
import sys
from collections.abc import Sequence

import modules.interpreter  # noqa: F401
from families import GENERATION_SCRIPTS, identify
from generation.compare_options import CompareOptions, add_compare_arguments, expand_patterns, family_of
from modules.command import Parser, command_line
from modules.installation import import_own
from modules.options import read_options


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__, allow_abbrev=False)
    families = list(GENERATION_SCRIPTS)
    add_compare_arguments(parser, families)
    args, others = parser.parse_known_args(sys.argv[1:] if argv is None else list(argv))
    loras = expand_patterns(read_options(CompareOptions, args).lora)
    asked = read_options(CompareOptions, argparse.Namespace(**{**vars(args), "lora": loras}))
    if any(word.partition("=")[0] == "--lora_weight" for word in others):
        parser.error("--lora_weight: give the files to --lora, which makes a column of each")
    script = import_own(GENERATION_SCRIPTS[asked.family or family_of(loras[0], families)])
    others += ["--lora_weight", *map(str, loras)]

    def make(family: object, options: object) -> None:
        from generation.comparing import compare  # torch is loaded by now

        compare(family, options, asked)  # type: ignore[arg-type]

    script.main(others, make)


if __name__ == "__main__":
    command_line(main, explain=identify)

"""Compare LoRA files and strengths: one model, one prompt file, a grid of clips with a column for each.

    python tools/compare.py --lora my-*.safetensors --lora_multiplier 0.6 0.8 1.0 --from_file prompts.txt ...

All other options are those of the family's generation script, such as wan_generate_video.py --help: the
model's files, --from_file or --prompt, sizes, steps, --save_path.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file: then Python looks for modules in its folder
    _FOLDER = Path(__file__).resolve().parent
    sys.path[:] = [str(_FOLDER.parent), *(path for path in sys.path if Path(path).resolve() != _FOLDER)]

import modules.interpreter  # noqa: F401
from generation.grid_options import CompareOptions, expand_patterns, family_of
from modules.command import command_line
from modules.families import identify, with_scripts
from modules.installation import import_own
from modules.options import read_options
from modules.parser import Parser, add_options


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__, allow_abbrev=False)
    families = {name: entry.others for name, entry in with_scripts().items()}
    add_options(parser, CompareOptions, settings={"family": {"choices": list(families)}})
    words = sys.argv[1:] if argv is None else list(argv)
    files = list(itertools.takewhile(lambda word: not word.startswith("-"), words))  # before all options
    args, others = parser.parse_known_args(["--lora", *words] if files else words)
    loras = expand_patterns(tuple(map(Path, args.lora)))
    high = expand_patterns(tuple(map(Path, args.lora_high_noise or ())), "--lora_high_noise") or None
    given = {**vars(args), "lora": loras, "lora_high_noise": high}
    asked = read_options(CompareOptions, argparse.Namespace(**given))
    given_words = {word.partition("=")[0] for word in others}
    for option in ("--lora", "--lora_high_noise"):
        taken = option.replace("lora", "lora_weight")
        if taken in given_words:
            parser.error(f"{taken}: give the files to {option}, which makes a column of each")
    if "--lora_multiplier_high_noise" in given_words:
        parser.error(
            "--lora_multiplier_high_noise: both LoRAs of a column have its strength, --lora_multiplier"
        )
    script = import_own(with_scripts()[asked.family or family_of(loras[0], families)].generation_script)
    others += ["--lora_weight", *map(str, loras)]
    others += ["--lora_weight_high_noise", *map(str, high)] if high else []

    def make(family: object, options: object) -> None:
        from generation.comparing import compare  # torch is loaded by now

        compare(family, options, asked)  # type: ignore[arg-type]

    script.main(others, make)


if __name__ == "__main__":
    command_line(main, explain=identify)

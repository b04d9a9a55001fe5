"""Compare LoRA files and strengths: one model, one prompt file, a grid of clips with a column for each.

    python tools/compare.py --lora my-*.safetensors --lora_multiplier 0.6 0.8 1.0 --from_file prompts.txt ...

All other options are those of the family's generation script, such as wan_generate_video.py --help: the
model's files, --from_file or --prompt, sizes, steps, --save_path.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file: then Python looks for modules in its folder
    _FOLDER = Path(__file__).resolve().parent
    sys.path[:] = [str(_FOLDER.parent), *(path for path in sys.path if Path(path).resolve() != _FOLDER)]

import modules.interpreter  # noqa: F401
from generation.grid_options import (
    CompareOptions,
    expand_patterns,
    explain_rejected_option,
    list_lora_arguments,
    read_lora_family,
)
from modules.command import command_line
from modules.installation import import_own
from modules.options import read_options
from modules.parser import Parser, add_options
from protocols.families import identify, with_scripts


def main(argv: Sequence[str] | None = None) -> None:
    """Generate a clip for each combination of prompt, LoRA file and strength, and join them in a grid.

    Options that this command does not know are passed to the family's generation script.
    """
    parser = Parser(description=__doc__, allow_abbrev=False)
    entries = with_scripts()
    families = {name: entry.further_models for name, entry in entries.items()}
    add_options(parser, CompareOptions, settings={"family": {"choices": list(families)}})
    argv = sys.argv[1:] if argv is None else list(argv)
    # Insert --lora before command-line arguments that begin with files
    begins_with_file = bool(argv) and not argv[0].startswith("-")
    args, generation_argv = parser.parse_known_args(["--lora", *argv] if begins_with_file else argv)
    args.lora = _expand(args.lora, "--lora")
    args.lora_high_noise = _expand(args.lora_high_noise, "--lora_high_noise") or None
    options = read_options(CompareOptions, args)
    rejection = explain_rejected_option(generation_argv)
    if rejection is not None:
        parser.error(rejection)
    family_name = options.family or read_lora_family(options.lora[0], families)

    # the generation script calls this instead of generating one clip
    def make(family: object, generation_options: object) -> None:
        """Generate the clips with the family of the generation script, and join them."""
        from generation.comparing import compare  # torch is loaded by now

        compare(family, generation_options, options)  # type: ignore[arg-type]

    script = import_own(entries[family_name].generation_script)
    script.main([*generation_argv, *list_lora_arguments(options)], make)


def _expand(patterns: Sequence[str] | None, option: str) -> tuple[Path, ...]:
    """Return the files that match an option's glob patterns."""
    return expand_patterns(tuple(map(Path, patterns or ())), option)


if __name__ == "__main__":
    command_line(main, explain=identify)

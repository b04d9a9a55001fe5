"""Judge LoRA files: too weak, right, overcooked, or leaking into other words; and name the one to take.

    python tools/judge_loras.py --lora my-*.safetensors --trigger_word zwolf --class_word dog \
        --dataset_config dataset.toml --prompt "a photo of zwolf in a park" --save_path judged ...

Each prompt is generated with the trigger word, without it, and with the class word in its place. All other
options are those of tools/compare.py: the model's files, --from_file or --prompt, sizes, steps, --save_path.
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
from training.scoring.judging import JudgeOptions, judge_loras


def main(argv: Sequence[str] | None = None) -> None:
    """Generate each prompt in three ways with each LoRA and strength, and judge the results.

    Options that this command does not know are passed to the family's generation script.
    """
    parser = Parser(description=__doc__, allow_abbrev=False)
    entries = with_scripts()
    families = {name: entry.further_models for name, entry in entries.items()}
    add_options(parser, CompareOptions, settings={"family": {"choices": list(families)}})
    add_options(parser, JudgeOptions)
    args, generation_argv = parser.parse_known_args(sys.argv[1:] if argv is None else list(argv))
    for name in ("lora", "lora_high_noise"):
        files = expand_patterns(tuple(map(Path, getattr(args, name) or ())), f"--{name}")
        setattr(args, name, files or None)
    comparison, judging = read_options(CompareOptions, args), read_options(JudgeOptions, args)
    rejection = explain_rejected_option(generation_argv)
    if rejection is not None:
        parser.error(rejection)
    entry = entries[comparison.family or read_lora_family(comparison.lora[0], families)]

    # the generation script calls this instead of generating one clip
    def make(family: object, generation_options: object) -> None:
        """Judge the files with the family of the generation script."""
        judge_loras(family, generation_options, comparison, judging)  # type: ignore[arg-type]

    script = import_own(entry.generation_script)
    script.main([*generation_argv, *list_lora_arguments(comparison)], make)


if __name__ == "__main__":
    command_line(main, explain=identify)

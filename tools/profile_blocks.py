"""Measure what each block of a LoRA does to the prediction, by noise level and frame.

    python tools/profile_blocks.py --lora my_lora.safetensors --prompt "a cat" --infer_steps 20 ...

All other options are those of the family's generation script, such as wan_generate_video.py --help: the
model's files, --from_file or --prompt, sizes, steps. At six steps of each prompt, every block is left out in
turn. No clip or image is written.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file: then Python looks for modules in its folder
    _FOLDER = Path(__file__).resolve().parent
    sys.path[:] = [str(_FOLDER.parent), *(path for path in sys.path if Path(path).resolve() != _FOLDER)]

import modules.interpreter  # noqa: F401
from generation.block_profile import ProfileOptions, profile_blocks
from generation.grid_options import read_lora_family
from modules.command import command_line
from modules.installation import import_own
from modules.options import read_options
from modules.parser import Parser, add_options
from protocols.families import identify, with_scripts


def main(argv: Sequence[str] | None = None) -> None:
    """Denoise the prompts with the LoRA, and print what each of its blocks does.

    Options that this command does not know are passed to the family's generation script.
    """
    parser = Parser(description=__doc__, allow_abbrev=False)
    entries = with_scripts()
    families = {name: entry.further_models for name, entry in entries.items()}
    add_options(parser, ProfileOptions, settings={"family": {"choices": list(families)}})
    args, generation_argv = parser.parse_known_args(sys.argv[1:] if argv is None else list(argv))
    options = read_options(ProfileOptions, args)
    typed = {word.partition("=")[0] for word in generation_argv}
    for name in ("--lora_weight", "--lora_weight_high_noise", "--lora_multiplier_high_noise", "--save_path"):
        if name in typed:
            parser.error(
                f"{name} has no meaning for a profile: pass --lora and --lora_multiplier, and omit it"
            )
    multiplier = str(options.lora_multiplier)
    lora_argv = ["--lora_weight", str(options.lora), "--lora_multiplier", multiplier]
    if options.lora_high_noise is not None:
        lora_argv += ["--lora_weight_high_noise", str(options.lora_high_noise)]
        lora_argv += ["--lora_multiplier_high_noise", multiplier]
    entry = entries[options.family or read_lora_family(options.lora, families)]

    # the generation script calls this instead of generating
    def make(family: object, generation_options: object) -> None:
        """Measure the blocks with the family of the generation script."""
        profile_blocks(family, generation_options, options)  # type: ignore[arg-type]

    script = import_own(entry.generation_script)
    # a generation needs a folder to write into; a profile writes nothing there
    script.main([*generation_argv, *lora_argv, "--save_path", "."], make)


if __name__ == "__main__":
    command_line(main, explain=identify)

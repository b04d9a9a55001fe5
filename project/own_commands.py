"""Commands for a training adapter: its length, and a model's own images from a folder's captions."""

import shlex
from collections.abc import Mapping, Sequence

from downloads.catalogue import ModelSet
from project import describing
from project.describing import RunSetup
from project.kinds.adapter import ADAPTER
from project.new_options import NewOptions
from project.options import own_command, typed_in
from project.own_samples import OWN_FOLDER, OWN_PROMPTS
from project.prompt_lines import plain

# of the adapter for MiniMax-H3-Image; those for Qwen-Image-2.1 took 1,000, then 30,000
TYPICAL_STEPS = 4000
SINGLE_RESULT_OPTIONS = {"--prompt", "--seed", "--save_path"}  # options for a single result


def list_distinct_captions(setup: RunSetup) -> list[str]:
    """Return the distinct captions of the media."""
    return list(dict.fromkeys(plain(item.caption) for item in setup.media if item.caption))


def write_prompts(captions: Sequence[str]) -> str:
    """Return the captions as lines of a prompt file, each with a seed of its own."""
    return "".join(f"{caption} --d {seed}\n" for seed, caption in enumerate(captions, start=1))


def describe_length(setup: RunSetup) -> list[str]:
    """Return lines about how long to train an adapter, and how to tell that it is finished."""
    lines = []
    steps = setup.options.max_train_steps
    if steps < TYPICAL_STEPS:
        lines.append(
            f"{steps:,} steps: published adapters took {TYPICAL_STEPS:,} to 30,000, because 1,000 undid "
            f"little of the distillation. --max_train_steps {TYPICAL_STEPS} --overwrite"
        )
    if len(setup.media) < describing.MIN_FILES_FOR_VALIDATION or not setup.may_hold_out_validation:
        lines.append(
            f"With {describing.MIN_FILES_FOR_VALIDATION} files or more, a tenth is held out: the adapter is "
            "finished when their loss, the validation loss, no longer falls"
        )
    else:
        lines.append(
            "It is finished when the validation loss no longer falls: then the run ends by itself "
            "(early_stopping_patience), and its page names the file with the lowest loss. Few-step samples "
            "are blurred by then, as intended"
        )
    return lines


def describe_own_images_commands(options: NewOptions, model: ModelSet, files: Mapping[str, str]) -> list[str]:
    """Return lines with the commands that generate images with the model, and then describe their folder.

    `files` maps options to the model's files.
    """
    paths = {f"{{{name}}}": path for name, path in files.items()}
    argv: list[str] = []
    is_dropped = False  # the options, and their values, that make it write a single result
    for word in shlex.split(model.commands["generate"]):
        if word.startswith("--"):
            is_dropped = word in SINGLE_RESULT_OPTIONS
        if not is_dropped:
            argv.append(paths.get(word, word))
    argv += ["--from_file", OWN_PROMPTS, "--save_path", OWN_FOLDER]
    again = options.make_argv(
        options.folder / OWN_FOLDER,
        family=model.family,
        task=model.task,
        train=ADAPTER.name,
        overwrite=False,
    )
    return [
        f"An adapter trained on the model's own images keeps the model's look. {OWN_PROMPTS} contains "
        f"these captions. In the folder {options.folder}, once the model is there, this makes the images:",
        f"  {typed_in(argv, options.folder)}",
        "and this writes their training files, with the prompts as captions:",
        f"  {own_command(*again)}",
    ]

"""Write dataset.toml, prompts.txt and run.toml into a folder, and report what was found and chosen."""

import shutil
import subprocess
from pathlib import Path

from downloads.listing import gigabytes, print_lines, total_bytes
from modules.atomic_write import write_text
from modules.command import as_typed
from modules.console import count_of
from modules.errors import OutputError
from modules.installation import PREFIX
from modules.options import option_values
from modules.text_files import real_path
from project import describing
from project.choosing import ask_family, choose_model, describe_fit, describe_makes, needs_picture
from project.media import WRITTEN, look_at, name_some
from project.options import RUN_FILE, NewOptions, find_models
from project.running import WRITE_CAPTIONS, typed_in


def write_project(options: NewOptions) -> None:
    """Write the three files; print found and chosen files, and the commands that use them.

    Raises OutputError if one of the files exists.
    """
    paths = [options.folder / name for name in WRITTEN]
    there = [path for path in paths if path.exists()]
    if there and not options.overwrite:
        raise OutputError(f"{there[0]} is there already. Edit it, or give --overwrite to replace all three.")
    memory = find_memory() if options.memory is None else options.memory
    model, trigger = choose_model(options, memory)
    if 0 < memory < describing.SMALL:
        encoders = {(one.family, one.task): one for one in find_models(fp8_encoders=True)}
        model = encoders[model.family, model.task]
    files = describing.name_files(options, model)
    facts = ask_family(model, files)
    others = [one for one in find_models() if one.family == model.family and needs_picture(one)]
    edits = "".join(f", --task {one.task} does" for one in others[:1])
    found = look_at(options.folder, facts, f"{model.family} {model.task}", edits)
    size = describing.choose_size(model, found.media)
    frames = describing.choose_frames(model, found.media, memory)
    choice = describing.Choice(options, model, facts, found, memory, size, frames, files, trigger)
    dataset, samples = describing.describe_dataset(choice), describing.describe_samples(choice)
    commands = describing.list_commands(choice)
    for path, text in zip(paths, (dataset, samples, describing.describe_run(choice, commands)), strict=True):
        write_text(path, text)
    run = [*(["reelsmith"] if PREFIX else ["python", "reelsmith.py"]), "run", str(options.folder)]
    is_usual = real_path(options.models) == real_path(NewOptions(folder=options.folder).models)
    download = ["--download", *([] if is_usual else ["--models", str(options.models)])]
    print_lines(
        [
            *_tell(choice),
            *found.lines,
            *_tell_captions(choice),
            f"written: {', '.join(map(str, paths))}",
            f"{as_typed(run)} checks, caches and trains, with {as_typed(download)} it downloads the model "
            "first",
        ]
    )


def find_memory() -> float:
    """Return the GiB of this machine's smallest NVIDIA card, from the driver; 0 if there is none."""
    program = shutil.which("nvidia-smi")
    words = [program or "", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    said = subprocess.run(words, capture_output=True, text=True).stdout if program else ""
    return min((int(line) / 1024 for line in said.split() if line.isdecimal()), default=0.0)


def _tell(choice: describing.Choice) -> list[str]:
    model, media, frames = choice.model, choice.media, choice.frames
    clips = [one for one in media if one.is_clip]
    kinds = (len(clips), "clip"), (len(media) - len(clips), "picture")
    shown = (
        f"{choice.size[0]}x{choice.size[1]}, {frames} frames" if frames > 1 else "{}x{}".format(*choice.size)
    )
    card = f"a card of {choice.memory:.0f} GiB" if choice.memory else "a CPU (--memory 12: a card of 12 GiB)"
    there = {f"--{name}" for name, path in choice.files.items() if Path(path).exists()}
    size = total_bytes(part for part in model.components if part.option and part.option not in there)
    size_told = f"{gigabytes(size)} to download" if size else "its files are there"
    lines = [
        f"{choice.options.folder}: {' and '.join(count_of(*each) for each in kinds if each[0])}. "
        f"{model.family} {model.task} at {shown}, on {card}",
        f"{model.family} {model.task} makes {describe_makes(model, choice.facts)}; {size_told}. "
        f"{'Its transformer: ' if choice.memory else ''}{describe_fit(model, choice.memory)}",
    ]
    if choice.facts.few_steps is not None:
        lines.append(
            f"{model.family} {model.task} was distilled to few steps, and training it as it is unlearns "
            f"them. {choice.facts.few_steps}. Options are keys of [training] in {RUN_FILE}"
        )
    lines += [f"{place}: made from {source}" for place, source in choice.found.references.items()]
    rate = model.data.get("fps")
    told = {
        f"shorter than {frames} frames (at {rate} a second)": (
            one.path
            for one in clips
            if frames > 1 and one.seconds is not None and describing.count_frames(one, model) < frames
        ),
        "clips of which this model takes the first frame": (one.path for one in clips if frames == 1),
        "pictures, of which this model learns nothing": (
            one.path for one in media if not one.is_clip and model.data.get("from_image")
        ),
    }
    return lines + [f"{name_some(found)}: {what}" for what, each in told.items() if (found := list(each))]


def _tell_captions(choice: describing.Choice) -> list[str]:
    """Return lines about media without captions: what replaces these, or two ways to get some."""
    bare, kind = [one.path for one in choice.media if one.caption is None], choice.found.captions
    empty = [one.path for one in choice.media if one.caption == "" and not choice.trigger]
    told = [f"{name_some(empty)}: an empty caption, from which nothing is learned by name"] if empty else []
    if not bare:
        return told
    if choice.trigger:
        return [
            f"{name_some(bare)}: no caption in a {kind} file; {choice.trigger} (class_tokens) stands for it"
        ]
    return [
        *told,
        f"{name_some(bare)}: without a caption in a {kind} file beside it, which `run` refuses. A model "
        f"writes them, in the folder {choice.folder}:",
        f"  {typed_in(WRITE_CAPTIONS, choice.folder)}",
        "or name what they show by a made-up word alone:",
        f"  {as_typed(_with_word(choice))}",
    ]


def _with_word(choice: describing.Choice) -> list[str]:
    """Return the command of this description again, with a trigger word."""
    model, words = choice.model, ["python", "reelsmith.py", "new", str(choice.options.folder)]
    chosen = {"family": model.family, "task": model.task, "trigger_word": "WORD", "overwrite": True}
    usual = option_values(NewOptions(folder=choice.options.folder))
    for name, value in (option_values(choice.options) | chosen).items():
        if value != usual[name]:
            for each in value if isinstance(value, tuple) else (value,):
                text = f"{each:g}" if isinstance(each, float) else str(each)
                words += [f"--{name}", *([] if each is True else [text])]
    return words

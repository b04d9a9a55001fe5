"""Write dataset.toml, prompts.txt and run.toml into a folder, and report what was found and chosen."""

import contextlib
import shutil
import subprocess
from pathlib import Path

from dataset.config import for_family, load_dataset_config
from dataset.sources.listing import find_sources
from dataset.sources.media_source import LISTED, Fault, MediaSource, list_faults
from downloads.catalogue import ModelSet
from downloads.listing import gigabytes, print_lines, total_bytes
from modules.atomic_write import write_text
from modules.console import count_of, quiet
from modules.errors import DatasetError, OutputError
from modules.media.reading import first_frame
from modules.media.writing import write_png
from modules.options import option_values
from modules.text_files import real_path
from project import describing
from project.choosing import (
    ModelFacts,
    ask_family,
    check_model_files,
    choose_model,
    describe_fit,
    describe_makes,
    needs_picture,
)
from project.media import WRITTEN, Found, look_at, name_some
from project.options import RUN_FILE, NewOptions, find_models, own_command
from project.running import CAPTION_MODEL, CAPTION_MODEL_SIZE, WRITE_CAPTIONS, typed_in

# kind of a fault
DAMAGED = "cannot be read and have no caption, which ends a run: delete each, or move it away"


def write_project(options: NewOptions) -> None:
    """Write the three files; print found and chosen files, and the commands that use them.

    Also writes captions that lists have into caption files, and the first frames of clips for a model that
    learns pictures. Raises OutputError if one of the three files exists.
    """
    paths = [options.folder / name for name in WRITTEN]
    existing = [path for path in paths if path.exists()]
    if existing and not options.overwrite:
        raise OutputError(
            f"{existing[0]} is there already. Edit it, or give --overwrite to replace all three."
        )
    memory = find_memory() if options.memory is None else options.memory
    chosen = choose_model(options, memory)
    model = chosen.model
    if 0 < memory < describing.SMALL:
        encoders = {(one.family, one.task): one for one in find_models(fp8_encoders=True)}
        model = encoders[model.family, model.task]
    files = describing.name_files(options, model)
    facts = ask_family(model, files)
    check_model_files(model, {name: files[name] for name in describing.typed_files(options)})
    found = _look_at(options, model, facts)
    choice = describing.Choice(
        options=options,
        model=model,
        facts=facts,
        found=found,
        memory=memory,
        size=describing.choose_size(model, found.media),
        frames=describing.choose_frames(model, found.media, memory),
        files=files,
        trigger=chosen.trigger,
    )
    dataset = describing.describe_dataset(choice)
    _write_found(found)
    samples, commands = describing.describe_samples(choice), describing.list_commands(choice)
    for path, text in zip(paths, (dataset, samples, describing.describe_run(choice, commands)), strict=True):
        write_text(path, text)
    problems = find_problems(choice)
    print_lines(
        [
            *_tell(choice, chosen.remarks),
            *_tell_captions(choice),
            *problems,
            f"written: {', '.join(map(str, paths))}",
            _tell_next(choice, bool(problems)),
        ]
    )


def _look_at(options: NewOptions, model: ModelSet, facts: ModelFacts) -> Found:
    name, models = f"{model.family} {model.task}", find_models()
    edits = [one.task for one in models if one.family == model.family and needs_picture(one)]
    hearing = dict.fromkeys(one.family for one in models if "sound_alone" in one.data)
    others = [one for one in models if one.family == model.family and facts.hears]
    silent = [one.task for one in others if not ask_family(one).hears]
    return look_at(
        folder=options.folder,
        facts=facts,
        name=name,
        edits="".join(f", --task {task} does" for task in edits[:1]),
        hearing=" or ".join(f"--family {family}" for family in hearing),
        silent=silent[0] if silent else "",
    )


def _write_found(found: Found) -> None:
    """Write the first frames of clips, and captions that lists have. Caption files that exist stay."""
    for picture, clip in found.first_frames.items():
        picture.parent.mkdir(parents=True, exist_ok=True)
        write_png(picture, first_frame(clip))
    for path, text in found.new_captions.items():
        if not path.exists() or path.with_suffix(".png") in found.first_frames:
            write_text(path, f"{text}\n")


def find_problems(choice: describing.Choice) -> list[str]:
    """Return what ends a run, of the files that dataset.toml names: found as `run` finds it.

    Captions that are missing are no part of it, except those of files that cannot be read either: other lines
    are about them.
    """
    family, step = choice.facts.family, choice.model.data.get("frame_step", 4)
    damaged = {path.name for path in choice.found.unreadable}
    problems: list[Fault] = []
    with contextlib.chdir(choice.options.folder), quiet():
        config = load_dataset_config(Path(WRITTEN[0]))
        config = for_family(config, family.references, step, True, family.can.references)
        for table in config.datasets:
            faults: list[Fault] = []
            sources: list[MediaSource] = []
            try:
                sources = find_sources(table, faults=faults)
            except DatasetError as error:
                faults.append(Fault("tables cannot be used", str(error)))
            problems += [fault for fault in faults if fault.ends_run]
            bare = [one for one in sources if one.caption is None and one.path.name in damaged]
            problems += [Fault(DAMAGED, str(one.path)) for one in bare]
    return list_faults(problems, LISTED)


def _tell_next(choice: describing.Choice, has_problems: bool) -> str:
    """Return the line about the command that trains, and what has to be done before it."""
    missing = [path for path in choice.files.values() if not Path(path).exists()]
    models = choice.options.models
    is_usual = real_path(models) == real_path(NewOptions(folder=choice.options.folder).models)
    download = ["--download", *([] if is_usual else ["--models", str(models)])]
    words = own_command("run", str(choice.options.folder), *(download if missing else []))
    does = f"{words} {'downloads the model, ' if missing else ''}checks, caches and trains"
    first = []
    if has_problems:
        first.append("correct what is listed above")
    if _find_bare(choice):
        first.append("give captions or a trigger word as above")
    return f"First {', and '.join(first)}. Then {does}" if first else does


def find_memory() -> float:
    """Return the GiB of this machine's smallest NVIDIA card, from the driver; 0 if there is none."""
    program = shutil.which("nvidia-smi")
    words = [program or "", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    said = subprocess.run(words, capture_output=True, text=True).stdout if program else ""
    return min((int(line) / 1024 for line in said.split() if line.isdecimal()), default=0.0)


def _tell(choice: describing.Choice, remarks: list[str]) -> list[str]:
    model, media, frames = choice.model, choice.media, choice.frames
    kinds = {"video": "clip", "image": "picture", "audio": "sound"}
    counts = [(sum(one.kind == kind for one in media), word) for kind, word in kinds.items()]
    size = f" at {choice.size[0]}x{choice.size[1]}" if not choice.is_of_sound else ""
    size += f", {frames} frames" if frames > 1 else ""
    card = f"a card of {choice.memory:.0f} GiB" if choice.memory else "a CPU (--memory 12: a card of 12 GiB)"
    existing = {f"--{name}" for name, path in choice.files.items() if Path(path).exists()}
    missing = total_bytes(part for part in model.components if part.option and part.option not in existing)
    download = f"{gigabytes(missing)} to download" if missing else "its files are there"
    reason = describing.explain_size(model, media)
    lines = [
        f"{choice.options.folder}: {' and '.join(count_of(*each) for each in counts if each[0])}. "
        f"{model.family} {model.task}{size}, on {card}",
        *choice.found.lines,
        *remarks,
        *([f"{choice.size[0]}x{choice.size[1]}: {reason}"] if reason else []),
        f"{model.family} {model.task} makes {describe_makes(model, choice.facts)}; {download}. "
        f"{'Its transformer: ' if choice.memory else ''}{describe_fit(model, choice.memory)}",
    ]
    lines += [choice.facts.contradiction] if choice.facts.contradiction else []
    if choice.facts.few_steps is not None:
        subject = "It" if choice.facts.contradiction else f"{model.family} {model.task}"
        lines.append(
            f"{subject} was distilled to few steps, and training it as it is unlearns them. "
            f"{choice.facts.few_steps}. Options are keys of [training] in {RUN_FILE}"
        )
    lines += [f"{place}: made from {source}" for place, source in choice.found.references.items()]
    return lines + _tell_lengths(choice)


def _tell_lengths(choice: describing.Choice) -> list[str]:
    """Return lines about clips that are too short, and pictures that the model does not learn."""
    model, media, frames = choice.model, choice.media, choice.frames
    clips = [one for one in media if one.is_clip]
    told = {
        f"shorter than {frames} frames (at {model.data.get('fps')} a second)": (
            one.path
            for one in clips
            if frames > 1 and one.seconds is not None and describing.count_frames(one, model) < frames
        ),
        "too short for a clip of this model, which learns their first frame": (
            one.path for one in clips if frames == 1
        ),
        "pictures, of which this model learns nothing": (
            one.path for one in media if one.kind == "image" and model.data.get("from_image")
        ),
    }
    return [f"{name_some(paths)}: {what}" for what, each in told.items() if (paths := list(each))]


def _find_bare(choice: describing.Choice) -> list[Path]:
    """Return media for which no caption, trigger word or name of a folder stands."""
    if choice.trigger:
        return []
    replaced, bad = choice.found.names, choice.found.bad_captions
    lacking = [one.path for one in choice.media if one.caption is None]
    return [path for path in lacking if path.parent not in replaced and path not in bad]


def _tell_captions(choice: describing.Choice) -> list[str]:
    """Return lines about media without captions: what replaces these, or two ways to get some."""
    kind, names = choice.found.captions, choice.found.names
    empty = [one.path for one in choice.media if one.caption == ""]
    meaning = f"{choice.trigger} alone is learned of them" if choice.trigger else "nothing is learned by name"
    lines = [f"{name_some(empty)}: an empty caption: {meaning}"] if empty else []
    bare = _find_bare(choice)
    bad = choice.found.bad_captions
    replaced = [one for one in choice.media if one.caption is None and one.path not in {*bare, *bad}]
    plain = [one.path for one in replaced if one.path.parent not in names]
    if plain:
        lines.append(
            f"{name_some(plain)}: no caption in a {kind} file; {choice.trigger} (class_tokens) stands for it"
        )
    if not bare:
        return lines
    return [
        *lines,
        f"{name_some(bare)}: without a caption in a {kind} file beside it, which `run` refuses. A model "
        f"({CAPTION_MODEL}, {CAPTION_MODEL_SIZE} to download) writes them, in the folder {choice.folder}:",
        f"  {typed_in(WRITE_CAPTIONS, choice.folder)}",
        "or name what they show by a made-up word alone:",
        f"  {own_command(*_with_word(choice))}",
    ]


def _with_word(choice: describing.Choice) -> list[str]:
    """Return the words of the command for this description again, with a trigger word."""
    model, words = choice.model, ["new", str(choice.options.folder)]
    chosen = {"family": model.family, "task": model.task, "trigger_word": "WORD", "overwrite": True}
    usual = option_values(NewOptions(folder=choice.options.folder))
    for name, value in (option_values(choice.options) | chosen).items():
        if value != usual[name]:
            for each in value if isinstance(value, tuple) else (value,):
                text = f"{each:g}" if isinstance(each, float) else str(each)
                words += [f"--{name}", *([] if each is True else [text])]
    return words

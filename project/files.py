"""Write dataset.toml, prompts.txt and run.toml for a folder: values that fit its media, model and card."""

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import sqrt
from pathlib import Path
from typing import Any

from dataset.sources.captions import add_trigger, caption_path, read_caption
from downloads.catalogue import ModelSet
from downloads.listing import print_lines
from modules.atomic_write import write_text
from modules.command import as_typed
from modules.errors import DatasetError, MediaError, OptionError, OutputError
from modules.installation import PREFIX
from modules.media.decoding import ANIMATION_SUFFIXES, is_animation
from modules.media.reading import VIDEO_SUFFIXES, first_frame, image_size, image_suffixes
from modules.media.streams import source_info
from modules.media.writing import write_png
from modules.text_files import real_path
from project.options import RUN_FILE, NewOptions, choose_model, find_models
from training.config_options import OTHERS_TABLE, toml_value

SMALL, LARGE = 16, 40  # GiB: below, text encoders have 8 bits; from here on, clips are twice as long
MOST_SAMPLED = 480 * 320  # pixels of a frame of a sample: samples are made often
OTHER = "a dog runs on a beach"  # a sample that shows what else the LoRA changes
SHOWN = 3  # names in a line
CAPTIONS = ".txt"
# sub-folders of a training's own, and of what belongs to media
NOT_MEDIA = {"cache", "output", "control", "mask", "masks"}


@dataclass(frozen=True)
class Media:
    """A clip or a picture."""

    path: Path
    is_clip: bool
    size: tuple[int, int]  # width, height
    seconds: Fraction | None  # None: a picture, or a clip whose file does not say
    caption: str | None  # on one line; None: there is none


@dataclass(frozen=True)
class Choice:
    """The chosen model and its material."""

    options: NewOptions
    model: ModelSet
    media: list[Media]
    memory: float  # GiB; 0: the CPU
    size: tuple[int, int]  # width, height
    frames: int  # of a clip; 1: pictures only
    files: dict[str, str]  # of the model, by option

    @property
    def folder(self) -> Path:
        return real_path(self.options.folder)


def write_project(options: NewOptions) -> None:
    """Write the three files; print found and chosen files, and the commands that use them.

    Raises OutputError if one of the files exists.
    """
    paths = [options.folder / name for name in ("dataset.toml", "prompts.txt", RUN_FILE)]
    there = [path for path in paths if path.exists()]
    if there and not options.overwrite:
        raise OutputError(f"{there[0]} is there already. Edit it, or give --overwrite to replace all three.")
    model, lines = choose_model(options.family, options.task), list[str]()
    memory = find_memory() if options.memory is None else options.memory
    if 0 < memory < SMALL:
        encoders = {(one.family, one.task): one for one in find_models(fp8_encoders=True)}
        model = encoders[model.family, model.task]
    media = look_at(options.folder, lines)
    frames = choose_frames(model, media, memory)
    choice = Choice(
        options, model, media, memory, choose_size(model, media), frames, name_files(options, model)
    )
    dataset, samples = describe_dataset(choice), describe_samples(choice)
    commands = list_commands(choice)
    for path, text in zip(paths, (dataset, samples, describe_run(choice, commands)), strict=True):
        write_text(path, text)
    run = [*(["reelsmith"] if PREFIX else ["python", "reelsmith.py"]), "run", str(options.folder)]
    print_lines(
        [
            *lines,
            *_tell(choice),
            f"written: {', '.join(map(str, paths))}",
            f"{as_typed(run)} runs these commands, with --download the first one too:",
            *(f"  {as_typed(words)}" for words in commands),
        ]
    )


def look_at(folder: Path, problems: list[str]) -> list[Media]:
    """Return the media of a folder and of its sub-folders; an unreadable file becomes a problem.

    Raises DatasetError if there are none.
    """
    places = [path for path in sorted(folder.iterdir()) if path.is_dir() and path.name[0] != "."]
    suffixes = VIDEO_SUFFIXES | image_suffixes() | ANIMATION_SUFFIXES
    media = []
    for place in (folder, *(path for path in places if path.name.lower() not in NOT_MEDIA)):
        for path in sorted(place.iterdir()):
            if path.suffix.lower() in suffixes and path.name[0] != "." and path.is_file():
                try:
                    media.append(_measure(path))
                except (MediaError, DatasetError) as error:
                    problems.append(str(error))
    if not media:
        raise DatasetError(f"{folder} has no clip and no picture that can be read. Give a folder that has.")
    return media


def _measure(path: Path) -> Media:
    text = read_caption(caption_path(path, CAPTIONS))
    caption = None if text is None else " ".join(text.split())
    if path.suffix.lower() not in VIDEO_SUFFIXES and not is_animation(path):
        return Media(path, False, image_size(path), None, caption)
    info = source_info(path)
    seconds = None if info.frames is None else info.frames / info.rate
    return Media(path, True, (info.width, info.height), seconds, caption)


def find_memory() -> float:
    """Return the GiB of this machine's smallest NVIDIA card, as its driver says; 0 if there is none."""
    program = shutil.which("nvidia-smi")
    words = [program or "", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    said = subprocess.run(words, capture_output=True, text=True).stdout if program else ""
    return min((int(line) / 1024 for line in said.split() if line.isdecimal()), default=0.0)


def choose_size(model: ModelSet, media: list[Media]) -> tuple[int, int]:
    """Return width and height to train at: the usual area, or less, in the shape of the middle one."""
    sizes = sorted((one.size for one in media), key=lambda size: size[0] * size[1])
    usual = model.data["resolution"]
    return _within(sizes[len(sizes) // 2], usual[0] * usual[1])


def _within(size: tuple[int, int], area: int) -> tuple[int, int]:
    """Return a size of the same shape with about so many pixels, or fewer, in steps that all models take."""
    factor = sqrt(area / (size[0] * size[1]))
    near = round if factor < 1 else int
    width, height = (max(32, near(side * min(factor, 1) / 32) * 32) for side in size)
    return width, height


def choose_frames(model: ModelSet, media: list[Media], memory: float) -> int:
    """Return how many frames to take of each clip: the usual number, or one that three of four clips have."""
    usual, step = model.data["frames"], model.data.get("frame_step", 4)
    timed = [one for one in media if one.seconds is not None and usual > 1]
    counts = sorted(_count(one, model) for one in timed)
    if not counts or counts[-1] < 1 + step:
        return 1
    most = 2 * usual - 1 if memory >= LARGE and step == 4 else usual
    return max((min(most, counts[len(counts) // 4]) - 1) // step, 1) * step + 1


def _count(clip: Media, model: ModelSet) -> int:
    return int((clip.seconds or 0) * model.data["fps"])


def name_files(options: NewOptions, model: ModelSet) -> dict[str, str]:
    """Return the path of each file of the model by its option.

    Raises OptionError if a file is given for an option that there is not.
    """
    parts = {(part.option or "").lstrip("-"): options.models / part.path for part in model.components}
    files = {name: path for name, path in parts.items() if name}
    for given in options.model_files:
        name, _, text = given.partition("=")
        if name not in files or not text:
            raise OptionError(f"--model_file {given}: give NAME=PATH with one of {', '.join(files)}")
        files[name] = Path(text).expanduser()
    return {name: real_path(path).as_posix() for name, path in files.items()}


def describe_dataset(choice: Choice) -> str:
    """Return dataset.toml: for each folder a table of its clips and one of its pictures."""
    data, frames, trigger = choice.model.data, choice.frames, choice.options.trigger_word
    from_image = data.get("from_image", False)
    general = {"resolution": choice.size, "caption_extension": CAPTIONS, "enable_bucket": True}
    lines = _table("[general]", general | ({"trigger_word": trigger} if trigger else {}))
    cut = {
        "target_frames": [frames] if from_image or frames == 1 else [1, frames],
        "frame_extraction": "head",
    }
    cut |= {"source_fps": "auto"} if frames > 1 else {}
    tables = dict.fromkeys((one.path.parent, one.is_clip) for one in choice.media)
    for place, is_clip in tables:
        if from_image and (not is_clip or frames == 1):
            continue
        kind = "video" if is_clip else "image"
        cache = choice.folder / "cache" / f"{kind}s" / real_path(place).relative_to(choice.folder)
        keys = {f"{kind}_directory": real_path(place).as_posix(), "cache_directory": cache.as_posix()}
        lines += ["", *_table("[[datasets]]", {**keys, **(cut if is_clip else {})})]
    if "[[datasets]]" not in lines:
        least = (1 + data.get("frame_step", 4)) / data["fps"]
        raise OptionError(
            f"--task {choice.model.task} learns from clips of at least {least:.1f} seconds, and "
            f"{choice.options.folder} has none. Choose another --family or --task."
        )
    return "\n".join([*lines, ""])


def describe_samples(choice: Choice) -> str:
    """Return prompts.txt: two captions of the folder, and something else."""
    captions = [one.caption or "" for one in choice.media]
    texts = [add_trigger(text, choice.options.trigger_word or "") for text in (captions[0], captions[-1])]
    width, height = _within(choice.size, MOST_SAMPLED) if choice.frames > 1 else choice.size
    line = f"--w {width} --h {height} --f {choice.frames} {choice.model.data.get('line', '')}"
    if choice.model.data.get("from_image"):
        image = choice.folder / "output" / "start.png"
        image.parent.mkdir(exist_ok=True)
        write_png(image, first_frame(next(one.path for one in choice.media if one.is_clip)))
        line = f"{line.format(image=image.as_posix())} --i {image.as_posix()}"
    prompts = dict.fromkeys(text.replace(" --", " ").lstrip("#- ") for text in (*texts, OTHER))
    return "".join(
        f"{text} {line.rstrip()} --d {place}\n" for place, text in enumerate(filter(None, prompts), 1)
    )


def list_commands(choice: Choice) -> list[list[str]]:
    """Return the commands of a run: download, check, latents, texts, training."""
    model, folder = choice.model, choice.folder
    paths = {f"{{{name}}}": path for name, path in choice.files.items()}
    paths["dataset.toml"] = (folder / "dataset.toml").as_posix()
    latents, texts = (
        [paths.get(word, word) for word in shlex.split(model.commands[step])] for step in ("latents", "texts")
    )
    fp8 = ["--fp8_encoders"] if model not in find_models() else []
    names = ["--family", model.family, "--task", model.task, *fp8, "--to", real_path(choice.options.models)]
    script = next(word for word in shlex.split(model.commands["train"]) if word.endswith(".py"))
    train = ["python", script, "--config_file", (folder / RUN_FILE).as_posix()]
    return [["python", "tools/download.py", *map(str, names)], [*texts, "--check"], latents, texts, train]


def describe_run(choice: Choice, commands: list[list[str]]) -> str:
    """Return run.toml: the training's options, as its --config_file takes them, and the commands."""
    options, files = choice.options, choice.files
    words = shlex.split(choice.model.commands["train"])
    start = next(index for index, word in enumerate(words) if word.endswith(".py")) + 1
    words = [*words[start:], *shlex.split(choice.model.data.get("train", ""))]
    parts = [part for part in choice.model.components if (part.option or "").startswith("--dit")]
    size_bytes = sum(part.size_bytes or 0 for part in parts)
    if choice.memory and size_bytes > choice.memory / 2 * 2**30:
        words += shlex.split(choice.model.data["fp8"])
        is_small = choice.memory <= SMALL and choice.frames > 1
        words += ["--gradient_checkpointing_cpu_offload"] if is_small else []
    # how many is found when the training starts
    words += ["--blocks_to_swap", "auto"] if choice.memory else []
    values: dict[str, Any] = {}
    for word in words:
        if word.startswith("--"):
            name, values[word.lstrip("-")] = word.lstrip("-"), True
        else:
            number = re.fullmatch(r"\d+(\.\d+)?(e-?\d+)?", word)
            kind = str if number is None else float if number[1] or number[2] else int
            values[name] = kind(files.get(word.strip("{}"), word))
    values = {name: value for name, value in values.items() if "epoch" not in name}
    if not choice.memory and values["optimizer_type"] == "adamw8bit":
        values["optimizer_type"] = "adamw"  # 8 bits need a GPU
    every = max(options.max_train_steps // 10, min(options.max_train_steps, 50))
    own_name = re.sub(r"[^\w.-]+", "_", choice.folder.name).strip("._")
    values |= {name: path for name, path in files.items() if name != "dit"}
    values |= {
        "dataset_config": (choice.folder / "dataset.toml").as_posix(),
        "max_train_steps": options.max_train_steps,
        **{"save_every_n_steps": every, "save_state": True, "save_last_n_steps_state": every},
        **{"sample_prompts": (choice.folder / "prompts.txt").as_posix(), "sample_every_n_steps": every},
        **{
            "output_dir": (choice.folder / "output").as_posix(),
            "output_name": options.output_name or own_name,
        },
    }
    others = {"files": list(files.values()), "commands": commands}
    lines = [
        *_table("[training]", values),
        "",
        "# what `run` looks for and runs; the training leaves it alone",
    ]
    return "\n".join([*lines, *_table(f"[{OTHERS_TABLE}]", others), ""])


def _table(head: str, values: Mapping[str, Any]) -> list[str]:
    return [head, *(f"{name} = {toml_value(value)}" for name, value in values.items())]


def _tell(choice: Choice) -> list[str]:
    """Return a report of found, chosen and missing files."""
    model, media, frames = choice.model, choice.media, choice.frames
    clips = [one for one in media if one.is_clip]
    shown = (
        f"{choice.size[0]}x{choice.size[1]}, {frames} frames" if frames > 1 else "{}x{}".format(*choice.size)
    )
    card = f"a card of {choice.memory:.0f} GiB" if choice.memory else "a CPU (--memory 12: a card of 12 GiB)"
    lines = [
        f"{choice.options.folder}: {len(clips)} clips and {len(media) - len(clips)} pictures. {model.family} "
        f"{model.task} at {shown}, on {card}"
    ]
    told = {
        f"shorter than {frames} frames": (
            one for one in clips if frames > 1 and one.seconds is not None and _count(one, model) < frames
        ),
        "clips of which this model takes the first frame": (one for one in clips if frames == 1),
        "pictures, of which this model learns nothing": (
            one for one in media if not one.is_clip and model.data.get("from_image")
        ),
        "without a caption in a .txt file beside it; tools/caption_dataset.py can write them": (
            one for one in media if one.caption is None
        ),
    }
    return lines + [f"{_names(found)}: {what}" for what, each in told.items() if (found := list(each))]


def _names(media: Iterable[Media]) -> str:
    names = [one.path.name for one in media]
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")

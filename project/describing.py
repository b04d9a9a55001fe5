"""The text of dataset.toml, prompts.txt and run.toml: values that fit the media, the model and the card.

All paths below the folder are relative to it, so that it can be moved; `run` works in it.
"""

import itertools
import os
import re
import shlex
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

from downloads.catalogue import ModelSet
from modules.checkpoints.opening import checkpoint_paths
from modules.contract.requests import COUNTS, VALUES
from modules.control_codes import drop_control_codes
from modules.errors import OptionError
from modules.media.reading import first_frame, video_frames
from modules.media.writing import write_png
from modules.paths import explain_missing, path_from
from modules.text_files import real_path
from project.choosing import ModelFacts, is_small
from project.media import CHECK_PAGE, Found, Media, reference_of, why_unread
from project.options import RUN_FILE, NewOptions, find_models
from training.config_options import OTHERS_TABLE, toml_value

SMALL, LARGE = 16, 40  # GiB: below, text encoders have 8 bits; from here on, clips are twice as long
MOST_SAMPLED = 480 * 320  # pixels of a frame of a sample: samples are made often
OTHER = "a dog runs on a beach"  # a sample that shows whether the LoRA changes other subjects
OTHER_EDIT = "make it a pencil drawing"
# a word of captions -> a situation that no such caption has
SITUATIONS = {
    "snow": "in falling snow",
    "market": "in a market street at night",
    "desert": "in a desert at noon",
    "kitchen": "in a kitchen",
    "forest": "in a forest in the rain",
    "boat": "on a boat",
}
ENOUGH = 10  # files, of which a tenth is held back for validation
MOST_READ = 240  # frames; the last of them is the end image of a sample
MOST_OF_SUBJECT = 80  # characters of a caption in a prompt
SOUND_FRAMES = 121  # length of a sample of sound alone: five seconds


@dataclass(frozen=True)
class Choice:
    """The chosen model and its material."""

    options: NewOptions
    model: ModelSet
    facts: ModelFacts
    found: Found
    memory: float  # GiB; 0: the CPU
    size: tuple[int, int]  # width, height
    frames: int  # of a clip; 1: pictures only
    files: dict[str, str]  # of the model, by option
    trigger: str | None

    @property
    def folder(self) -> Path:
        return real_path(self.options.folder)

    @property
    def media(self) -> list[Media]:
        return self.found.media

    @property
    def is_of_sound(self) -> bool:
        return self.media[0].kind == "audio"

    def inside(self, path: Path) -> str:
        return Path(path_from(self.folder, real_path(path))).as_posix()


def choose_size(model: ModelSet, media: list[Media]) -> tuple[int, int]:
    """Return width and height: those of the file in the middle by area, or less to keep the usual area."""
    usual = model.data["resolution"]
    middle = _middle_by_area(model, media)
    return tuple(usual) if middle is None else _within(middle.size, usual[0] * usual[1])


def explain_size(model: ModelSet, media: list[Media]) -> str:
    """Return why `choose_size` chooses its size; "" for sounds, which have none."""
    middle = _middle_by_area(model, media)
    if middle is None:
        return ""
    usual, area = model.data["resolution"], middle.size[0] * middle.size[1]
    sizes = sorted({one.size for one in _learned(model, media)}, key=lambda size: size[0] * size[1])
    span = f" of files from {_sides(sizes[0])} to {_sides(sizes[-1])}" if len(sizes) > 1 else ""
    most = (
        f", reduced to the area of {_sides(usual)} that the model's page has"
        if area > usual[0] * usual[1]
        else ""
    )
    return (
        f"the shape of {middle.path.name} ({_sides(middle.size)}), the middle one by area{span}{most}, in "
        "steps of 32. Every file is fitted to this area in its own shape (resolution in dataset.toml)"
    )


def _sides(size: Sequence[int]) -> str:
    return f"{size[0]}x{size[1]}"


def _learned(model: ModelSet, media: list[Media]) -> list[Media]:
    """Return the clips and pictures that a model learns from."""
    seen = [one for one in media if one.kind != "audio"]
    return [one for one in seen if one.is_clip] or seen if model.data.get("from_image") else seen


def _middle_by_area(model: ModelSet, media: list[Media]) -> Media | None:
    ranked = sorted(_learned(model, media), key=lambda one: one.size[0] * one.size[1])
    return ranked[len(ranked) // 2] if ranked else None


def _within(size: tuple[int, int], area: int) -> tuple[int, int]:
    factor = sqrt(area / (size[0] * size[1]))
    near = round if factor < 1 else int
    width, height = (max(32, near(side * min(factor, 1) / 32) * 32) for side in size)
    return width, height


def choose_frames(model: ModelSet, media: list[Media], memory: float) -> int:
    """Return how many frames to take of each clip: the usual number, or one that 3 of 4 clips reach."""
    usual, step = model.data["frames"], model.data.get("frame_step", 4)
    timed = [one for one in media if one.seconds is not None and usual > 1]
    counts = sorted(count_frames(one, model) for one in timed)
    if not counts or counts[-1] < 1 + step:
        return 1
    most = 2 * usual - 1 if memory >= LARGE and step == 4 else usual
    return max((min(most, counts[len(counts) // 4]) - 1) // step, 1) * step + 1


def count_frames(clip: Media, model: ModelSet) -> int:
    return int((clip.seconds or 0) * model.data["fps"])


def typed_files(options: NewOptions) -> dict[str, str]:
    """Return the paths that --model_file gives, as typed, by option."""
    pairs = (given.partition("=") for given in options.model_files)
    return {name: text.strip() for name, _, text in pairs}


def name_files(options: NewOptions, model: ModelSet) -> dict[str, str]:
    """Return the path of each file of the model by its option.

    Raises OptionError if a file is given for an unknown option, or does not exist.
    """
    parts = {(part.option or "").lstrip("-"): options.models / part.path for part in model.components}
    files = {name: path for name, path in parts.items() if name}
    for name, text in typed_files(options).items():
        given = f"{name}={text}"
        if name not in files or not text:
            raise OptionError(f"--model_file {given}: give NAME=PATH with one of {', '.join(files)}")
        files[name] = Path(text).expanduser()
        if not files[name].exists():
            missing = explain_missing(files[name])
            raise OptionError(
                f"--model_file {given}: there is no such file.{missing} Correct the path, or leave it out to "
                "take the file that tools/download.py brings"
            )
        if files[name].is_dir() and not any(files[name].glob("*/*.safetensors")):
            checkpoint_paths(files[name])  # raises if no file of it is the one
    # links are not followed: in the hub's cache the name that says what a file is belongs to the link
    return {name: path.absolute().as_posix() for name, path in files.items()}


def describe_dataset(choice: Choice) -> str:
    """Return dataset.toml: for each folder a table of its clips, one of its pictures or one of its sounds."""
    data, frames, trigger = choice.model.data, choice.frames, choice.trigger
    from_image = data.get("from_image", False)
    general = {"resolution": choice.size, "caption_extension": choice.found.captions, "enable_bucket": True}
    if choice.is_of_sound:
        general = {"caption_extension": choice.found.captions}
    lines = _table("[general]", general | ({"trigger_word": trigger} if trigger else {}))
    lengths = [frames] if from_image or frames == 1 else [1, frames]
    cut = {"target_frames": lengths, "frame_extraction": "head"}
    cut |= {"source_fps": "auto"} if frames > 1 else {}
    for place, kind in dict.fromkeys((one.path.parent, one.kind) for one in choice.media):
        if from_image and (kind != "video" or frames == 1):
            continue
        keys = {**_folder_keys(choice, place, kind), **(cut if kind == "video" else {})}
        lines += ["", *_table("[[datasets]]", keys)]
    if "[[datasets]]" not in lines:
        least = (1 + data.get("frame_step", 4)) / data["fps"]
        raise OptionError(
            f"--task {choice.model.task} learns from clips of at least {least:.1f} seconds, and "
            f"{choice.options.folder} has none. Choose another --family or --task."
        )
    return "\n".join([*lines, ""])


def _folder_keys(choice: Choice, place: Path, kind: str) -> dict[str, Any]:
    """Return the keys of the table for the files of one kind in a folder."""
    found, inside = choice.found, choice.inside(place)
    keys: dict[str, Any] = {f"{kind}_directory": inside}
    # by the name in this folder: a link leads elsewhere, where `run` writes nothing
    name_here = place.relative_to(choice.options.folder)
    keys["cache_directory"] = (Path("cache") / f"{kind}s" / name_here).as_posix()
    source = found.references.get(place) if kind == "image" else None
    if source is not None:
        keys["control_directory"] = choice.inside(source)
        keys |= {"control_resolution": choice.size} if choice.model.data.get("sizes_references") else {}
    name = found.names.get(place)
    if name is not None and name.repeats > 1:
        keys["num_repeats"] = name.repeats
    words = choice.trigger if name is None else name.words
    same = (one for one in choice.media if one.path.parent == place and one.kind == kind)
    # a run without a file that cannot be read asks for its caption too
    is_damaged = any(path.parent == place for path in found.unreadable)
    if words and (is_damaged or any(one.caption is None for one in same)):
        keys["class_tokens"] = words
    return keys


def describe_samples(choice: Choice) -> str:
    """Return prompts.txt: the subject in two situations that no caption has, and a prompt without it."""
    captions = [one.caption.lower() for one in choice.media if one.caption]
    new = [text for word, text in SITUATIONS.items() if not any(word in each for each in captions)]
    situations = (new if len(new) > 1 else [*SITUATIONS.values()])[:2]
    texts = [one.caption for one in choice.media if one.caption]
    texts = texts or [name.words for name in choice.found.names.values()]
    subject = _plain(choice.trigger or _find_subject(texts))
    other = OTHER_EDIT if choice.facts.needs_reference else OTHER
    width, height = _within(choice.size, MOST_SAMPLED) if choice.frames > 1 else choice.size
    size = f"--w {width} --h {height} --f {choice.frames}"
    if choice.is_of_sound:
        size = f"--f {SOUND_FRAMES}"
    values, lines = _released_values(choice.model), ""
    prompts = [*(f"{subject}, {text}" for text in situations), other]
    for index, (text, media) in enumerate(zip(prompts, itertools.cycle(_sample_media(choice)), strict=False)):
        lines += " ".join(filter(None, (text, size, values, media, f"--d {index + 1}"))) + "\n"
    return lines


def _find_subject(captions: Sequence[str]) -> str:
    """Return the words that all captions begin with, else the first part of the shortest one."""
    words = [text.split() for text in captions if text]
    same = os.path.commonprefix(words) if len(words) > 1 else []
    found = " ".join(same)
    if all(word.lower() in {"a", "an", "the"} for word in same):
        found = min((text for text in captions if text), key=len, default="")
    return re.split(r"[,.;:]", found)[0][:MOST_OF_SUBJECT].strip() or "a person"


def _plain(text: str) -> str:
    return re.sub(r"(^|\s)-+", r"\1", " ".join(drop_control_codes(text).split())).lstrip("#").strip()


def _released_values(model: ModelSet) -> str:
    """Return sample options from the model's command to generate: steps, guidance, shift, negative prompt.

    All other values are the family's defaults, which samples and generation share.
    """
    shared = {**COUNTS, **VALUES}
    names = "steps", "guidance_scale", "embedded_guidance", "flow_shift"
    letters = {shared[name][0]: shared[name][1] for name in names} | {"--negative_prompt": "n"}
    words = shlex.split(model.commands["generate"])
    found = [(letters[word], value) for word, value in zip(words, words[1:], strict=False) if word in letters]
    return " ".join(f"--{letter} {value}" for letter, value in found)


def _sample_media(choice: Choice) -> list[str]:
    """Return the media options of each sample: a first and last frame, or pictures to edit."""
    edited = [
        one for one in choice.media if one.path.parent in choice.found.references and one.kind == "image"
    ]
    lines = []
    for one in edited:
        sources = reference_of(one, choice.found.references[one.path.parent])[: choice.facts.references]
        if sources and not any(map(why_unread, sources)):
            lines.append(" ".join(f"--ci {choice.inside(path)}" for path in sources))
    if not choice.model.data.get("from_image"):
        return lines[:3] or [""]
    clip = next(one.path for one in choice.media if one.is_clip)
    start, end = (choice.folder / "output" / f"{name}.png" for name in ("start", "end"))
    start.parent.mkdir(exist_ok=True)
    write_png(start, first_frame(clip))
    if "--end_image_path" not in choice.model.commands["generate"]:
        return [f"--i {choice.inside(start)}"]
    (last,) = deque(itertools.islice(video_frames(clip), MOST_READ), maxlen=1)
    write_png(end, last)
    return [f"--i {choice.inside(start)} --ei {choice.inside(end)}"]


def list_commands(choice: Choice) -> list[list[str]]:
    """Return the commands of a run, in the folder: download, two checks, latents, texts, training."""
    model = choice.model
    paths = {f"{{{name}}}": path for name, path in choice.files.items()}
    latents, texts = (
        [paths.get(word, word) for word in _words_of(choice, step)] for step in ("latents", "texts")
    )
    fp8 = [] if model in find_models() else ["--fp8_encoders"]
    names = ["--family", model.family, "--task", model.task, *fp8, "--to", real_path(choice.options.models)]
    script = next(word for word in shlex.split(model.commands["train"]) if word.endswith(".py"))
    return [
        ["python", "tools/download.py", *map(str, names)],
        [*latents, "--check", "--html", CHECK_PAGE],
        [*texts, "--check"],
        latents,
        texts,
        ["python", script, "--config_file", RUN_FILE],
    ]


def _words_of(choice: Choice, step: str) -> list[str]:
    """Return the words of a model's command, with the option of sounds alone if there are only sounds."""
    words = shlex.split(choice.model.commands[step])
    if choice.is_of_sound:
        option, value = choice.model.data["sound_alone"].split()
        if option in words:
            words[words.index(option) + 1] = value
        else:
            words += [option, value]
    return words


def describe_run(choice: Choice, commands: list[list[str]]) -> str:
    """Return run.toml: the training's options, as its --config_file takes them, and the commands."""
    options, files = choice.options, choice.files
    words = _words_of(choice, "train")
    start = next(index for index, word in enumerate(words) if word.endswith(".py")) + 1
    words = [*words[start:], *shlex.split(choice.model.data.get("train", ""))]
    if choice.memory and not is_small(choice.model, choice.memory):
        words += shlex.split(choice.model.data["fp8"])
        has_clips = choice.memory <= SMALL and choice.frames > 1
        words += ["--gradient_checkpointing_cpu_offload"] if has_clips else []
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
    if not choice.memory:  # forms of weights and optimizers for a card
        for word in shlex.split(choice.model.data["fp8"]):
            values.pop(word.lstrip("-"), None)
        if values["optimizer_type"] == "adamw8bit":
            values["optimizer_type"] = "adamw"
    every = max(options.max_train_steps // 10, min(options.max_train_steps, 50))
    own_name = re.sub(r"[^\w.-]+", "_", choice.folder.name).strip("._")[:MOST_OF_SUBJECT] or "lora"
    values |= {name: path for name, path in files.items() if name != "dit"}
    values |= {
        "dataset_config": "dataset.toml",
        "max_train_steps": options.max_train_steps,
        **{"save_every_n_steps": every, "save_state": True, "save_last_n_steps_state": every},
        **{"sample_prompts": "prompts.txt", "sample_every_n_steps": every},
        **{"sample_at_first": True, "sample_now": True},
        **({"validation_split": 0.1} if len(choice.media) >= ENOUGH else {}),
        **{"output_dir": "output", "output_name": options.output_name or own_name},
    }
    others = {"files": list(files.values()), "commands": commands}
    lines = [
        "# Paths are relative to this folder, in which `run` works; it can be moved.",
        *_table("[training]", values),
        "",
        "# what `run` looks for and runs; the training leaves it alone",
    ]
    return "\n".join([*lines, *_table(f"[{OTHERS_TABLE}]", others), ""])


def _table(head: str, values: Mapping[str, Any]) -> list[str]:
    return [head, *(f"{name} = {toml_value(value)}" for name, value in values.items())]

"""Write the texts of dataset.toml, prompts.txt and run.toml for the media, the model and the card.

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

from dataset.sources.captions import add_trigger, find_text
from downloads.catalogue import ModelSet
from modules.control_codes import drop_control_codes
from modules.devices import emulates_bfloat16
from modules.errors import OptionError
from modules.integers import round_up
from modules.media.lengths import DEFAULT_LENGTHS, ClipLengths
from modules.media.reading import first_frame, video_frames
from modules.media.writing import write_png
from modules.option_values import format_shape
from modules.output_files import is_windows_device
from modules.paths import parse_path
from modules.text_files import real_path
from project.foreign.places import needs_subsets
from project.foreign.settling import VARYING_TEXTS
from project.kinds.adapter import NAMED
from project.kinds.contract import RunKind
from project.kinds.whole_model import derive_times
from project.media import CHECK_PAGE, FolderContent, Media, is_narrow, reference_of, why_unused
from project.model_choice import ModelInfo
from project.model_sizes import FP8, is_small, weight_options
from project.new_options import NewOptions
from project.options import RUN_FILE
from project.own_samples import find_origin
from project.tags import TagLists, as_words
from protocols.requests import COUNTS, VALUES
from runtime.machine import lacks_bfloat16
from training.config_options import PROJECT_TABLE, toml_value

DEFAULT_SIDE, SIDE_STEP = 256, 64  # subsets: minimum side of images, step of sides
SUBSET_KEYS = {"image_directory": "image_dir", "control_directory": "conditioning_data_dir"}  # in subsets
FLOAT32 = "float32"
PATIENCE = 5  # validations without improvement before early stopping
SMALL = 16  # GiB; with less, text encoders are used in 8 bits
LARGE = 40  # GiB; from this size on, clips are twice as long
MAX_SAMPLED = 480 * 320  # pixels of a sample's frame; small, because samples are frequent
OTHER = "a dog runs on a beach"  # sample that shows whether the LoRA affects other subjects
OTHER_EDIT = "make it a pencil drawing"
# word in captions -> a situation that captions without this word do not describe
SITUATIONS = {
    "snow": "in falling snow",
    "market": "in a market street at night",
    "desert": "in a desert at noon",
    "kitchen": "in a kitchen",
    "forest": "in a forest in the rain",
    "boat": "on a boat",
}
ENOUGH = 10  # minimum number of files for holding out a tenth for validation
MAX_READ = 240  # maximum frames read of a clip to find a sample's end image
MAX_OF_SUBJECT = 80  # maximum characters of a caption used in a prompt
AUDIO_FRAMES = 121  # length of an audio sample in frames: five seconds


@dataclass(frozen=True)
class Choice:
    """All choices on which run.toml, dataset.toml and prompts.txt depend."""

    options: NewOptions
    model: ModelSet
    kind: RunKind  # kind of run
    model_info: ModelInfo
    content: FolderContent
    memory: float  # GiB; 0: the CPU
    size: tuple[int, int]  # width, height
    frames: int  # frames of each clip; 1 if there are only images
    files: dict[str, str]  # files of the model, by option
    embedded_files: Mapping[str, str]  # option of a network -> the user's file that contains it
    provided: Sequence[str]  # options of files that need no download
    trigger: str | None
    tags: TagLists | None  # captions that are lists of tags, if the model was trained on such lists
    data: Mapping[str, Any]  # keys of [general] from another trainer's project
    folder_keys: Mapping[Path, Mapping[str, Any]]  # folder -> keys of its table, from that project
    training: Mapping[str, Any]  # keys of run.toml that set options of the training
    holds_back: bool  # hold out files for validation if there are enough

    @property
    def folder(self) -> Path:
        """Path of the dataset folder, with links resolved."""
        return real_path(self.options.folder)

    @property
    def media(self) -> list[Media]:
        """Clips, images or audio files of the folder."""
        return self.content.media

    @property
    def model_name(self) -> str:
        """Model family and task, joined for messages."""
        return f"{self.model.family} {self.model.task}"

    @property
    def is_of_audio(self) -> bool:
        """Whether the folder holds audio files to learn from, without images or clips."""
        return self.media[0].kind == "audio"

    @property
    def has_subsets(self) -> bool:
        """Return whether dataset.toml uses [[datasets.subsets]], as image trainers do."""
        asked = needs_subsets(self.data) or any(map(needs_subsets, self.folder_keys.values()))
        return bool(self.content.regularization) or self.tags is not None or asked

    @property
    def varies_texts(self) -> bool:
        """Return whether captions are encoded at each step: they vary, or a text encoder is trained."""
        varied = VARYING_TEXTS & self.data.keys() or any(
            VARYING_TEXTS & keys.keys() for keys in self.folder_keys.values()
        )
        learns = (
            self.training.get("network_train_unet_only") is False or "train_text_encoder" in self.training
        )
        return self.tags is not None or self.kind.learns_word or learns or bool(varied)

    @property
    def has_small_encoders(self) -> bool:
        """Whether the text encoders are loaded in 8 bits."""
        return 0 < self.memory < SMALL

    @property
    def needs_float32(self) -> bool:
        """Return whether the run uses a CPU on which bfloat16 is many times slower than float32."""
        return not self.memory and emulates_bfloat16()

    @property
    def needs_float16(self) -> bool:
        """Return whether the run uses a GPU of this machine that does not support bfloat16."""
        return bool(self.memory) and not self.kind.needs_bfloat16 and lacks_bfloat16()

    def inside(self, path: Path) -> str:
        """Return a path relative to the dataset folder, with forward slashes."""
        return Path(parse_path(self.folder, real_path(path))).as_posix()


@dataclass(frozen=True)
class Edit:
    """An image edit from the dataset that serves as a sample prompt."""

    instruction: str  # the caption; "" if there is none
    images: str  # prompt options for its input images


def select_size(model: ModelSet, media: list[Media]) -> tuple[int, int]:
    """Return the width and height of the file with the median area, reduced to the model's default area."""
    default_width, default_height = model.data["resolution"]
    middle = _find_middle_by_area(model, media)
    if middle is None:
        return default_width, default_height
    return _shrink_to_area(middle.size, default_width * default_height)


def explain_size(model: ModelSet, media: list[Media]) -> str:
    """Return why `select_size` has chosen its size; "" for audio, which has none."""
    typical = _find_middle_by_area(model, media)  # the file of median area, whose size was chosen
    if typical is None:
        return ""
    sizes = sorted({item.size for item in _learned(model, media)}, key=_area)
    span = ""
    if len(sizes) > 1:
        span = f", of files from {format_shape(sizes[0])} to {format_shape(sizes[-1])}"
    default = model.data["resolution"]
    reduced = ""
    if _area(typical.size) > _area(default):
        reduced = f", reduced to the area of {format_shape(default)} that the model's page has"
    return (
        f"the size of a typical file, {typical.path.name} ({format_shape(typical.size)}){span}{reduced}. "
        "Every "
        "file keeps its own shape, at this area (resolution in dataset.toml)"
    )


def _area(size: Sequence[int]) -> int:
    return size[0] * size[1]


def _learned(model: ModelSet, media: list[Media]) -> list[Media]:
    """Return those clips and images of a folder that a model is trained on."""
    visible = [item for item in media if item.kind != "audio"]
    if not learns_stills_of_clips(model):
        visible = [item for item in visible if not is_too_short(item, model)] or visible
    if model.data.get("from_image"):
        return [item for item in visible if item.is_clip] or visible
    return visible


def _find_middle_by_area(model: ModelSet, media: list[Media]) -> Media | None:
    learned = _learned(model, media)
    # the median is taken by area so that the size keeps the shape of an actual file
    typical = [item for item in learned if not is_narrow(item)] or learned
    ranked = sorted(typical, key=lambda item: _area(item.size))
    return ranked[len(ranked) // 2] if ranked else None


def _shrink_to_area(size: tuple[int, int], area: int) -> tuple[int, int]:
    """Reduce a size to an area if it is larger, with its aspect ratio, in steps of 32 pixels."""
    factor = sqrt(area / _area(size))
    near = round if factor < 1 else int
    width, height = (max(32, near(side * min(factor, 1) / 32) * 32) for side in size)
    return width, height


def select_frames(model: ModelSet, media: list[Media], memory: float) -> int:
    """Return the number of frames per clip: the default, or fewer if over a quarter of clips are shorter."""
    default = model.data["frames"]
    lengths = lengths_of(model)
    timed = [item for item in media if item.seconds is not None and default > 1]
    counts = sorted(count_frames(clip, model) for clip in timed)
    if not counts or counts[-1] < shortest_clip(model):
        return 1
    maximum = default
    if memory >= LARGE and lengths == DEFAULT_LENGTHS:
        maximum = 2 * default - 1
    reached = min(maximum, counts[len(counts) // 4])
    return max(lengths.fit(reached), shortest_clip(model))


def lengths_of(model: ModelSet) -> ClipLengths:
    """Return the frame counts that a model accepts for a clip."""
    return ClipLengths(model.data.get("frame_step", 4), model.data.get("first_frames", 1))


def shortest_clip(model: ModelSet) -> int:
    """Return the smallest number of frames of a clip that a model can be trained on."""
    return int(model.data.get("least_frames", lengths_of(model).shortest))


def learns_stills_of_clips(model: ModelSet) -> bool:
    """Return whether the model is trained on single frames of clips as images."""
    return not model.data.get("from_image", False) and "least_frames" not in model.data


def is_too_short(item: Media, model: ModelSet) -> bool:
    """Return whether an item is a clip with fewer frames than the model needs."""
    return item.seconds is not None and count_frames(item, model) < shortest_clip(model)


def count_frames(clip: Media, model: ModelSet) -> int:
    """Return how many frames a clip has at the model's frame rate, rounded down."""
    return int((clip.seconds or 0) * model.data["fps"])


def describe_dataset(choice: Choice) -> str:
    """Return the text of dataset.toml: a table for each folder and kind of media, or subsets of one table."""
    data = choice.model.data
    from_image = data.get("from_image", False)
    lines = _format_toml_table("[general]", _make_general_keys(choice))
    if choice.has_subsets:
        return "\n".join([*lines, *_describe_subsets(choice), ""])
    clip_keys = _clip_keys(choice)
    folders_and_kinds = dict.fromkeys((item.path.parent, item.kind) for item in choice.media)
    for folder, kind in folders_and_kinds:
        # an image-to-video model takes the first frames from the clips
        if from_image and kind != "video":
            continue
        # clips are no material for a run that learns single frames
        if kind == "video" and choice.frames == 1 and not learns_stills_of_clips(choice.model):
            continue
        keys = _make_folder_keys(choice, folder, kind)
        if kind == "video":
            keys |= clip_keys
        lines += ["", *_format_toml_table("[[datasets]]", keys)]
    if "[[datasets]]" not in lines:
        minimum = shortest_clip(choice.model) / data["fps"]
        raise OptionError(
            f"--task {choice.model.task} learns from clips of at least {minimum:.1f} seconds, and "
            f"{choice.options.folder} has none. Choose another --family or --task."
        )
    return "\n".join([*lines, ""])


def _describe_subsets(choice: Choice) -> list[str]:
    """Return the tables of dataset.toml with [[datasets.subsets]].

    Only this layout has regularization images and shuffled tags.
    """
    shortest = min(choice.size)
    if shortest >= SIDE_STEP:  # bucket sides are multiples of SIDE_STEP
        shortest = shortest // SIDE_STEP * SIDE_STEP
    smallest = min(DEFAULT_SIDE, shortest)
    # leaves room for the long side of an image with an extreme aspect ratio
    largest = round_up(2 * max(choice.size), SIDE_STEP)
    sides = {"min_bucket_reso": smallest, "max_bucket_reso": largest}
    # the [general] table already holds the keys in choice.data
    dataset_keys = {name: side for name, side in sides.items() if name not in choice.data}
    lines = ["", *_format_toml_table("[[datasets]]", dataset_keys)]
    for folder in dict.fromkeys(item.path.parent for item in choice.media):
        keys = _make_folder_keys(choice, folder, "image")
        # subsets have sd-scripts' names for some keys
        keys = {SUBSET_KEYS.get(name, name): value for name, value in keys.items()}
        lines += ["", *_format_toml_table("[[datasets.subsets]]", keys)]
    for folder in choice.content.regularization:
        cache = Path("cache", "images", folder.parent.name, folder.name).as_posix()
        keys = {"image_dir": choice.inside(folder), "cache_directory": cache, "is_reg": True}
        name = choice.content.names.get(folder)
        if name is not None:
            if name.repeats > 1:
                keys["num_repeats"] = name.repeats
            keys["class_tokens"] = name.words
        if choice.trigger:
            keys["trigger_word"] = ""  # images of the class must not contain it
        lines += ["", *_format_toml_table("[[datasets.subsets]]", keys)]
    return lines


def _make_general_keys(choice: Choice) -> dict[str, Any]:
    """Return the keys of the [general] table of dataset.toml."""
    keys: dict[str, Any] = {}
    if not choice.is_of_audio:
        keys["resolution"] = choice.size
    keys["caption_extension"] = choice.content.captions
    if not choice.is_of_audio:
        keys["enable_bucket"] = True
    if choice.trigger:
        keys["trigger_word"] = choice.trigger
    if choice.tags is not None:
        keys |= choice.tags.make_keys(choice.trigger)
    return keys | {name: value for name, value in choice.data.items() if name != "resolution"}


def _clip_keys(choice: Choice) -> dict[str, Any]:
    """Return the dataset.toml keys that select frames of clips."""
    frames = choice.frames
    single_length = frames == 1 or not learns_stills_of_clips(choice.model)
    keys: dict[str, Any] = {
        "target_frames": [frames] if single_length else [1, frames],
        "frame_extraction": "head",
    }
    if frames > 1:
        keys["source_fps"] = "auto"
    return keys


def _make_folder_keys(choice: Choice, folder: Path, kind: str) -> dict[str, Any]:
    """Return the keys of a folder's table in dataset.toml, for its files of one kind."""
    content = choice.content
    keys: dict[str, Any] = {f"{kind}_directory": choice.inside(folder)}
    # links are not followed: `run` writes nothing outside the described folder
    name_here = folder.relative_to(choice.options.folder)
    keys["cache_directory"] = (Path("cache") / f"{kind}s" / name_here).as_posix()
    # references of an editing model, and control images of a control network, share a key
    source = content.references.get(folder) if kind == "image" else None
    if source is not None:
        keys["control_directory"] = choice.inside(source)
        if choice.model.data.get("sizes_references"):
            keys["control_resolution"] = choice.size
    if content.layers:
        keys["multiple_target"] = True
    if folder in content.controls:
        keys["control_directory"] = choice.inside(content.controls[folder])
    if real_path(folder) in content.masks:
        keys["mask_directory"] = choice.inside(content.masks[real_path(folder)])
    name = content.names.get(folder)
    if name is not None and name.repeats > 1:
        keys["num_repeats"] = name.repeats
    # the repeats that balance real and generated files have precedence
    if folder in content.repeats:
        keys["num_repeats"] = content.repeats[folder]
    # `name` is parsed from a folder name such as 10_cat: repeats and class
    class_tokens = choice.trigger if name is None else name.words
    if class_tokens and _lacks_captions(choice, folder, kind):
        keys["class_tokens"] = class_tokens
    return keys | dict(choice.folder_keys.get(folder, {}))


def _lacks_captions(choice: Choice, place: Path, kind: str) -> bool:
    """Return whether any file of a kind in a folder lacks a caption."""
    # unreadable files count too: the run requires captions for all files
    if any(path.parent == place for path in choice.content.unreadable):
        return True
    of_kind = [item for item in choice.media if item.path.parent == place and item.kind == kind]
    return any(item.caption is None for item in of_kind)


def describe_samples(choice: Choice) -> str:
    """Return the text of prompts.txt: prompts for sample images, with the options of each prompt.

    The prompts show the subject in two situations that no caption mentions; one more has no subject.
    For a network with control images, the prompts are captions together with their control images. For
    edits, they are the instructions of the dataset with the images that they change, and another instruction.
    """
    released_values = _released_values(choice.model)
    if choice.content.controls:
        return _describe_control_samples(choice, released_values)
    if choice.content.layers:
        return _describe_layer_samples(choice, released_values)
    edits = _list_edits(choice)
    if edits:
        return _describe_edit_samples(choice, edits, released_values)
    captions = [find_text(item.caption) for item in choice.media if item.caption]
    # names of regularization folders are left out: they contain only the class
    learned = {item.path.parent for item in choice.media}
    names = [name.words for folder, name in choice.content.names.items() if folder in learned]
    subject = plain(choice.trigger or _find_subject(captions or names))
    if choice.tags is not None:
        subject = plain(_join_shared_tags(choice.tags, choice.trigger) or as_words(subject))
    prompts = [f"{subject}, {situation}" for situation in _select_situations(captions)]
    if not choice.kind.learns_word:
        prompts.append(OTHER_EDIT if choice.model_info.needs_reference else OTHER)
    quality = choice.model.data.get("tags")
    if quality:
        prompts = [f"{quality}, {prompt}" for prompt in prompts]
    size = _sample_size(choice)
    start = _write_start_options(choice)
    lines = ""
    for seed, prompt in enumerate(prompts, start=1):
        parts = [prompt, size, released_values, start, f"--d {seed}"]
        lines += " ".join(filter(None, parts)) + "\n"
    return lines


def _describe_edit_samples(choice: Choice, edits: Sequence[Edit], released_values: str) -> str:
    """Return prompt lines for the first and a middle edit of the dataset, and for a new edit."""
    shown = [edits[0], *([edits[len(edits) // 2]] if len(edits) > 1 else [])]
    samples = [edit for edit in shown if edit.instruction]
    if not samples or not choice.kind.learns_word:
        samples.append(Edit(OTHER_EDIT, edits[-1].images))
    lines = ""
    for seed, edit in enumerate(samples, start=1):
        parts = [edit.instruction, _sample_size(choice), released_values, edit.images, f"--d {seed}"]
        lines += " ".join(filter(None, parts)) + "\n"
    return lines


def _describe_control_samples(choice: Choice, released_values: str) -> str:
    """Return prompt lines for the first, a middle and the last control pair of the dataset."""
    pairs = [item for item in choice.media if item.path.parent in choice.content.controls]
    pairs = [item for item in pairs if reference_of(item, choice.content.controls[item.path.parent])]
    lines = ""
    for seed, index in enumerate(dict.fromkeys((0, len(pairs) // 2, len(pairs) - 1)), start=1):
        item = pairs[index]
        width, height = _shrink_to_area(item.size, _area(choice.size))
        control = reference_of(item, choice.content.controls[item.path.parent])[0]
        prompt = plain(item.caption or choice.trigger or "") or OTHER
        parts = [prompt, f"--w {width} --h {height}", released_values, f"--cn {choice.inside(control)}"]
        lines += " ".join([*filter(None, parts), f"--d {seed}"]) + "\n"
    return lines


def _describe_layer_samples(choice: Choice, released_values: str) -> str:
    """Return prompt lines for the first, a middle and the last layered image."""
    images = [item for item in choice.media if item.path in choice.content.layers]
    lines = ""
    for seed, index in enumerate(dict.fromkeys((0, len(images) // 2, len(images) - 1)), start=1):
        item = images[index]
        width, height = _shrink_to_area(item.size, _area(choice.size))
        prompt = plain(item.caption or choice.trigger or "") or OTHER
        image = f"--ci {choice.inside(item.path)} --f {len(choice.content.layers[item.path])}"
        lines += f"{prompt} --w {width} --h {height} {released_values} {image} --d {seed}\n"
    return lines


def _select_situations(captions: Sequence[str]) -> list[str]:
    """Return two situations that no caption mentions, or the first two if fewer are left."""
    lower = [caption.lower() for caption in captions]
    new = [text for word, text in SITUATIONS.items() if not any(word in caption for caption in lower)]
    return (new if len(new) > 1 else list(SITUATIONS.values()))[:2]


def _sample_size(choice: Choice) -> str:
    """Return the size options of a sample prompt: --w, --h and --f.

    Audio only has a length (--f); image models have no --f.
    """
    if choice.is_of_audio:
        return f"--f {AUDIO_FRAMES}"
    width, height = choice.size
    if choice.frames > 1:
        width, height = _shrink_to_area(choice.size, MAX_SAMPLED)
    frames = f" --f {choice.frames}" if choice.model.data["frames"] > 1 else ""
    return f"--w {width} --h {height}{frames}"


def _find_subject(captions: Sequence[str]) -> str:
    """Return the words that all captions start with; otherwise the start of the shortest caption."""
    words = [text.split() for text in captions if text]
    common = os.path.commonprefix(words) if len(words) > 1 else []
    subject = " ".join(common)
    if all(word.lower() in {"a", "an", "the"} for word in common):
        subject = min((text for text in captions if text), key=len, default="")
    return re.split(r"[,.;:]", subject)[0][:MAX_OF_SUBJECT].strip() or "a person"


def _join_shared_tags(tags: TagLists, trigger: str | None) -> str:
    """Return the trigger word and the tags that all captions share, in prompt form."""
    words = [] if trigger is None or trigger in tags.shared else [trigger]
    length = 0
    for tag in map(as_words, tags.shared):
        length += len(tag)
        if length <= MAX_OF_SUBJECT:
            words.append(tag)
    return ", ".join(words)


def plain(text: str) -> str:
    """Return a prompt in one line and without characters that prompts.txt reads as options or a comment."""
    on_one_line = " ".join(drop_control_codes(text).split())
    return re.sub(r"(^|\s)-+", r"\1", on_one_line).lstrip("#").strip()


def _released_values(model: ModelSet) -> str:
    """Return the model's released sample options (steps, guidance, ...) as options of a prompt line.

    All other values default to the family's, for samples as for generation.
    """
    characters = {"--negative_prompt": "n"}
    # sample values of prompt lines: each with its option and its one-letter name
    shared = {**COUNTS, **VALUES}
    for name in ("steps", "guidance_scale", "embedded_guidance", "flow_shift"):
        option, character, _ = shared[name]
        characters[option] = character
    options = []
    # each word of the command together with the one after it
    for option, value in itertools.pairwise(shlex.split(model.commands["generate"])):
        if option in characters:
            options.append(f"--{characters[option]} {value}")
    return " ".join(options)


def _write_start_options(choice: Choice) -> str:
    """Return the prompt options for first and last frames, if the model starts from frames."""
    return _write_frames(choice) if choice.model.data.get("from_image") else ""


def _list_edits(choice: Choice) -> list[Edit]:
    """Return the edits in the dataset whose reference images can all be read."""
    references = choice.content.references
    edits = []
    for item in choice.media:
        if item.kind != "image" or item.path.parent not in references:
            continue
        sources = reference_of(item, references[item.path.parent])[: choice.model_info.references]
        if sources and not any(map(why_unused, sources)):
            images = " ".join(f"--ci {choice.inside(path)}" for path in sources)
            instruction = add_trigger(find_text(item.caption or ""), choice.trigger or "")
            edits.append(Edit(plain(instruction), images))
    return edits


def _write_frames(choice: Choice) -> str:
    """Write the first frame of a clip, and the last if the model takes one; return their prompt options.

    With --dry_run nothing is written.
    """
    clip = next(item.path for item in choice.media if item.is_clip)
    folder = choice.folder / "output"
    start = folder / "start.png"
    writes = not choice.options.dry_run
    if writes:
        folder.mkdir(exist_ok=True)
        write_png(start, first_frame(clip))
    words = shlex.split(choice.model.commands["generate"])
    if not {"--end_image_path", "--last_frame"}.intersection(words):
        return f"--i {choice.inside(start)}"  # --i: first frame of a sample; --ei: last frame
    end = folder / "end.png"
    if writes:
        # a deque of length 1 keeps only the last frame that was read
        (last,) = deque(itertools.islice(video_frames(clip), MAX_READ), maxlen=1)
        write_png(end, last)
    return f"--i {choice.inside(start)} --ei {choice.inside(end)}"


def list_commands(choice: Choice) -> list[list[str]]:
    """Return the commands of a run: download, two checks, caching of latents and texts, training.

    Captions that vary from step to step are not cached: the training encodes them.
    """
    model = choice.model
    paths = {f"{{{name}}}": path for name, path in choice.files.items()}  # by placeholder, such as {vae}
    latents = [paths.get(word, word) for word in _words_of(choice, "latents")]
    texts = [paths.get(word, word) for word in _words_of(choice, "texts")]
    if choice.needs_float32:
        for name in choice.model_info.dtypes["LatentCaching"]:
            latents += [f"--{name}", FLOAT32]
        for name in choice.model_info.dtypes["TextCaching"]:
            texts += [f"--{name}", FLOAT32]
    if choice.model_info.few_steps is not None:  # cache what each recommended training target needs
        for target in choice.model_info.few_steps.targets:
            texts += shlex.split(target.caching)
    download = ["python", "tools/download.py", "--family", model.family, "--task", model.task]
    if choice.has_small_encoders:
        download.append("--fp8_encoders")
    if choice.provided:
        download += ["--without", *choice.provided]
    download += ["--to", str(real_path(choice.options.models))]
    check = [*latents, "--check", "--html", CHECK_PAGE]
    script, *own_options = choice.kind.find_words(model)
    train = ["python", script, "--config_file", RUN_FILE]
    train += [word for word in own_options if word == choice.kind.switch]  # run.toml has all other options
    if choice.varies_texts:
        return [download, check, latents, train]
    return [download, check, [*texts, "--check"], latents, texts, train]


def _words_of(choice: Choice, step: str) -> list[str]:
    """Return the arguments of a model's command; audio-only folders get the option for audio alone."""
    words = shlex.split(choice.model.commands[step])
    if choice.is_of_audio:
        option, value = choice.model.data["sound_alone"].split()
        if option in words:
            words[words.index(option) + 1] = value
        else:
            words += [option, value]
    return words


def describe_run(choice: Choice, commands: list[list[str]]) -> str:
    """Return the text of run.toml: the training options and the commands of the run."""
    # later values replace earlier ones; `choice.training` is from another trainer's project or a recipe
    values = choice.kind.change(_model_values(choice), choice.memory)
    # the switch selects the kind of run on the command line, so it is not in run.toml
    # [1:]: without the name of the script
    own_options = [word for word in choice.kind.find_words(choice.model)[1:] if word != choice.kind.switch]
    values |= _read_options(own_options, {"word": choice.trigger or ""})
    values |= _run_values(choice)
    values |= choice.training
    values = {name: value for name, value in values.items() if value is not None}
    project = {"files": list(choice.files.values()), "commands": commands}
    lines = [
        "# Paths are relative to this folder, in which `run` works; it can be moved.",
        *_format_toml_table("[training]", values),
        *_describe_targets(choice),
        "",
        "# what `run` looks for and runs; the training leaves it alone",
    ]
    return "\n".join([*lines, *_format_toml_table(f"[{PROJECT_TABLE}]", project), ""])


def _describe_targets(choice: Choice) -> list[str]:
    """Return commented-out keys with the options that preserve the few steps of a distilled model."""
    few_steps = choice.model_info.few_steps
    if few_steps is None or not choice.kind.has_targets:
        return []
    lines = [
        "",
        f"# This model {few_steps.distilled}. Plain training unlearns {few_steps.lost}: see docs/targets.md.",
    ]
    for target in few_steps.targets:
        lines.append(f"# To {target.about}:")
        values = _read_options(shlex.split(target.options), {})
        lines += [f"# {line}" for line in _format_toml_lines(values)]
    return lines


def _model_values(choice: Choice) -> dict[str, Any]:
    """Return the training options that depend on the model and the graphics card, with the model files."""
    values = _read_options(_training_words(choice), choice.files)
    # the length of a run is set in steps
    values = {name: value for name, value in values.items() if "epoch" not in name}
    if not choice.memory:  # a CPU uses no GPU-only weight formats and optimizers
        for word in shlex.split(choice.model.data["fp8"]):
            values.pop(word.lstrip("-"), None)
        if values["optimizer_type"] == "adamw8bit":
            values["optimizer_type"] = "adamw"
    if choice.needs_float32:
        values["mixed_precision"] = "no"
        values |= dict.fromkeys(choice.model_info.dtypes["Training"], FLOAT32)
    elif choice.needs_float16:
        values["mixed_precision"] = "fp16"
    # files of the command are {name} in it and already among the values; the others are added
    named_in_command = {word.strip("{}") for word in shlex.split(choice.model.commands["train"])}
    return values | {name: path for name, path in choice.files.items() if name not in named_in_command}


def _training_words(choice: Choice) -> list[str]:
    """Return the arguments of the training script, adapted to the graphics card."""
    data = choice.model.data
    words = _words_of(choice, "train")
    script = next(index for index, word in enumerate(words) if word.endswith(".py"))
    words = [*words[script + 1 :], *shlex.split(data.get("train", ""))]
    if choice.memory and not is_small(choice.model, choice.memory):
        words = [word for word in words if word not in FP8]  # the command in the docs may contain it
        words += weight_options(choice.model, choice.memory)
        if choice.memory <= SMALL and choice.frames > 1:
            words.append("--gradient_checkpointing_cpu_offload")
    if choice.memory and data.get("swaps", True):
        words += ["--blocks_to_swap", "auto"]  # the training determines the number
    return words


def _read_options(words: Sequence[str], files: Mapping[str, str]) -> dict[str, Any]:
    """Return the values of a command's options by option name.

    `files` maps placeholders such as {vae} to paths. A flag without a value is True.
    """
    values: dict[str, Any] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name = word.lstrip("-")
            values[name] = True
        else:
            values[name] = files.get(word.strip("{}"), _read_number(word))
    return values


def _read_number(word: str) -> int | float | str:
    """Convert a word to a number if possible; otherwise return it unchanged."""
    number = re.fullmatch(r"\d+(\.\d+)?(e-?\d+)?", word)
    if number is None:
        return word
    return float(word) if number[1] or number[2] else int(word)


def _run_values(choice: Choice) -> dict[str, Any]:
    """Return the [training] options for length, saving, samples and validation."""
    steps = choice.options.max_train_steps
    intervals = derive_times(steps, choice.kind.saves_models)
    values: dict[str, Any] = {
        "dataset_config": "dataset.toml",
        "max_train_steps": steps,
        "save_state": True,
        "sample_prompts": "prompts.txt",
        **intervals,
        "sample_at_first": True,
        "sample_now": True,
    }
    if len(choice.media) >= ENOUGH and choice.holds_back:
        values["validation_split"] = 0.1
    folder_name = re.sub(r"[^\w.-]+", "_", choice.folder.name).strip("._")[:MAX_OF_SUBJECT]
    values["output_dir"] = "output"
    # names such as CON or NUL, which cannot be file names on Windows
    if is_windows_device(folder_name):
        folder_name = f"lora_{folder_name}"
    values["output_name"] = choice.options.output_name or folder_name or "lora"
    if choice.kind.makes_adapter:
        if "validation_split" in values:
            values["early_stopping_patience"] = PATIENCE
        values["make_adapter"] = find_origin(choice.content)
        if choice.options.output_name is None:
            values["output_name"] += NAMED
    if choice.kind.learns_word:
        # prompts use an embedding by its file name
        values["output_name"] = choice.options.output_name or choice.trigger
    return values


def _format_toml_table(head: str, values: Mapping[str, Any]) -> list[str]:
    return [head, *_format_toml_lines(values)]


def _format_toml_lines(values: Mapping[str, Any]) -> list[str]:
    return [f"{name} = {toml_value(value)}" for name, value in values.items()]

"""Write the contents of dataset.toml, prompts.txt and run.toml for the media, the model and the GPU.

All paths below the folder are relative to it, so that it can be moved; `run` works in it.
"""

import contextlib
import itertools
import os
import re
import shlex
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from typing import Any

from dataset.sources.captions import add_trigger, find_text
from downloads.catalogue import ModelSet
from modules.devices import emulates_bfloat16
from modules.errors import OptionError, UserError
from modules.integers import round_up
from modules.media.lengths import DEFAULT_LENGTHS, ClipLengths
from modules.media.reading import first_frame, video_frames
from modules.media.writing import write_png
from modules.option_values import format_shape
from modules.output_files import is_windows_device
from modules.paths import parse_path
from modules.text_files import real_path
from project.foreign.places import needs_subsets
from project.foreign.sample_prompts import ForeignSample
from project.foreign.settling import VARYING_TEXTS
from project.kinds.adapter import ADAPTER_NAME_SUFFIX
from project.kinds.contract import RunKind
from project.kinds.whole_model import derive_intervals
from project.media import CHECK_PAGE, FolderContent, Media, find_references, is_narrow, why_unused
from project.model_choice import ModelInfo
from project.model_sizes import FP8, is_small, weight_options
from project.new_options import NewOptions
from project.options import RUN_FILE
from project.own_samples import find_origin
from project.prompt_lines import format_options, plain
from project.tags import TagLists, as_words
from protocols.requests import COUNTS, VALUES
from runtime.machine import lacks_bfloat16
from training.config_options import PROJECT_TABLE, toml_value

DEFAULT_SIDE, SIDE_STEP = 256, 64  # for subsets: minimum side of images, step of sides
SUBSET_KEYS = {"image_directory": "image_dir", "control_directory": "conditioning_data_dir"}  # in subsets
FLOAT32 = "float32"
EARLY_STOPPING_PATIENCE = 5  # validations without improvement before early stopping
SMALL_CARD_GIB = 16  # GiB; with less, text encoders are used in 8 bits
LARGE_CARD_GIB = 40  # GiB; clips are twice as long if there is at least this much
MAX_SAMPLE_AREA = 480 * 320  # pixels of a sample's frame; small, because samples are frequent
PROMPT_WITHOUT_SUBJECT = "a dog runs on a beach"  # sample that shows whether the LoRA affects other subjects
EDIT_INSTRUCTION = "make it a pencil drawing"
# word in captions -> a situation that captions without this word do not describe
SITUATIONS = {
    "snow": "in falling snow",
    "market": "in a market street at night",
    "desert": "in a desert at noon",
    "kitchen": "in a kitchen",
    "forest": "in a forest in the rain",
    "boat": "on a boat",
}
MIN_FILES_FOR_VALIDATION = 10  # minimum number of files for holding out a tenth for validation
MAX_FRAMES_READ = 240  # maximum frames read of a clip to find a sample's end image
MAX_SUBJECT_LENGTH = 80  # maximum characters of a caption used in a prompt
AUDIO_FRAMES = 121  # length of an audio sample in frames: five seconds


@dataclass(frozen=True)
class RunSetup:
    """All choices that determine run.toml, dataset.toml and prompts.txt."""

    options: NewOptions
    model: ModelSet
    kind: RunKind  # kind of run
    model_info: ModelInfo
    content: FolderContent
    memory: float  # GiB; 0: the CPU
    target_size: tuple[int, int]  # width, height
    frames: int  # frames of each clip; 1 if there are only images
    model_files: dict[str, str]  # files of the model, by option
    embedded_model_files: Mapping[str, str]  # option of a network -> the user's file that contains it
    options_without_download: Sequence[str]  # options of files that need no download
    trigger_word: str | None
    tags: TagLists | None  # captions that are lists of tags, if the model was trained on such lists
    general_keys: Mapping[str, Any]  # keys of [general] from another trainer's project
    table_keys_by_folder: Mapping[Path, Mapping[str, Any]]  # folder -> keys of its table, from that project
    training_options: Mapping[str, Any]  # keys of run.toml that set training options
    may_hold_out_validation: bool  # hold out files for validation if there are enough
    foreign_samples: Sequence[ForeignSample] = ()  # samples of another trainer's project

    @property
    def folder(self) -> Path:
        """Path of the dataset folder, with symbolic links resolved."""
        return real_path(self.options.folder)

    @property
    def media(self) -> list[Media]:
        """All clips, images and audio files of the folder."""
        return self.content.media

    @property
    def model_name(self) -> str:
        """Model family and task, joined for messages."""
        return f"{self.model.family} {self.model.task}"

    @property
    def has_text_samples(self) -> bool:
        """Whether samples are made from prompts alone, without images of the folder."""
        content = self.content
        needs_images = content.control_folders or content.layers_by_image or _list_edits(self)
        return not (needs_images or self.model.properties.get("from_image"))

    @property
    def has_only_audio(self) -> bool:
        """Whether the folder contains only audio files, without images or clips."""
        return self.media[0].kind == "audio"

    @property
    def has_subsets(self) -> bool:
        """Return whether dataset.toml has [[datasets.subsets]], as for sd-scripts."""
        asked = needs_subsets(self.general_keys) or any(
            map(needs_subsets, self.table_keys_by_folder.values())
        )
        return bool(self.content.regularization_folders) or self.tags is not None or asked

    @property
    def encodes_captions_each_step(self) -> bool:
        """Return whether captions are encoded in every step: they vary, or a text encoder is trained."""
        varied = VARYING_TEXTS & self.general_keys.keys() or any(
            VARYING_TEXTS & keys.keys() for keys in self.table_keys_by_folder.values()
        )
        learns = (
            self.training_options.get("network_train_unet_only") is False
            or "train_text_encoder" in self.training_options
        )
        return self.tags is not None or self.kind.trains_embedding or learns or bool(varied)

    @property
    def needs_float32(self) -> bool:
        """Whether the run uses a CPU on which bfloat16 is many times slower than float32."""
        return not self.memory and emulates_bfloat16()

    @property
    def needs_float16(self) -> bool:
        """Whether the run uses a GPU of this machine without bfloat16 support."""
        return bool(self.memory) and not self.kind.needs_bfloat16 and lacks_bfloat16()

    def relative_path(self, path: Path) -> str:
        """Return a path relative to the dataset folder, with forward slashes on all systems."""
        return Path(parse_path(self.folder, real_path(path))).as_posix()


@dataclass(frozen=True)
class Edit:
    """An image edit from the dataset that is used as a sample prompt."""

    instruction: str  # the caption; "" if there is none
    images: str  # prompt options for its input images


def select_size(model: ModelSet, media: list[Media]) -> tuple[int, int]:
    """Return the training size: the size of the file with the median area, at most the model's area.

    The default size is returned if no file has a size.
    """
    default_width, default_height = model.properties["resolution"]
    middle = _find_median_area_media(model, media)
    if middle is None:
        return default_width, default_height
    return _shrink_to_area(middle.size, default_width * default_height)


def explain_size(model: ModelSet, media: list[Media]) -> str:
    """Return why `select_size` has chosen its size; "" for audio, which has none."""
    typical = _find_median_area_media(model, media)  # the file of median area, whose size was chosen
    if typical is None:
        return ""
    sizes = sorted({item.size for item in _list_trained_media(model, media)}, key=_area)
    size_range = ""
    if len(sizes) > 1:
        size_range = f", of files from {format_shape(sizes[0])} to {format_shape(sizes[-1])}"
    default = model.properties["resolution"]
    reduced = ""
    if _area(typical.size) > _area(default):
        reduced = f", reduced to the area of {format_shape(default)} that the model's page has"
    return (
        f"the size of a typical file, {typical.path.name} ({format_shape(typical.size)}){size_range}"
        f"{reduced}. Every file keeps its own shape, at this area (resolution in dataset.toml)"
    )


def _area(size: Sequence[int]) -> int:
    return size[0] * size[1]


def _list_trained_media(model: ModelSet, media: list[Media]) -> list[Media]:
    """Return the clips and images of a folder that the model can be trained on."""
    visible = [item for item in media if item.kind != "audio"]
    if not can_train_single_frames(model):
        visible = [item for item in visible if not is_too_short(item, model)] or visible
    if model.properties.get("from_image"):
        return [item for item in visible if item.is_clip] or visible
    return visible


def _find_median_area_media(model: ModelSet, media: list[Media]) -> Media | None:
    learned = _list_trained_media(model, media)
    # the median is taken by area so that the size keeps the shape of an actual file
    typical = [item for item in learned if not is_narrow(item)] or learned
    ranked = sorted(typical, key=lambda item: _area(item.size))
    return ranked[len(ranked) // 2] if ranked else None


def _shrink_to_area(size: tuple[int, int], area: int) -> tuple[int, int]:
    """Shrink a size to at most `area` pixels, keeping its aspect ratio, in steps of 32 pixels."""
    factor = sqrt(area / _area(size))
    near = round if factor < 1 else int
    width, height = (max(32, near(side * min(factor, 1) / 32) * 32) for side in size)
    return width, height


def select_frames(model: ModelSet, media: list[Media], memory: float) -> int:
    """Return the number of frames per clip: at most the default, or nearly twice that on a large GPU.

    It is reduced to a length that three quarters of the clips have. Returns 1 if all clips are too short.
    """
    default = model.properties["frames"]
    lengths = get_clip_lengths(model)
    timed = [item for item in media if item.seconds is not None and default > 1]
    counts = sorted(count_frames(clip, model) for clip in timed)
    if not counts or counts[-1] < min_clip_frames(model):
        return 1
    maximum = default
    if memory >= LARGE_CARD_GIB and lengths == DEFAULT_LENGTHS:
        maximum = 2 * default - 1
    # the counts ascend, so three quarters of the clips have at least this many frames
    typical_length = min(maximum, counts[len(counts) // 4])
    return max(lengths.fit(typical_length), min_clip_frames(model))


def get_clip_lengths(model: ModelSet) -> ClipLengths:
    """Return the frame counts that a model accepts for a training clip."""
    return ClipLengths(model.properties.get("frame_step", 4), model.properties.get("first_frames", 1))


def list_clip_lengths(model: ModelSet, media: Sequence[Media]) -> list[int]:
    """Return the frame counts, in ascending order, at which a model can learn some clip of these files.

    The list is empty without clips and for models of images.
    """
    counts = [count_frames(item, model) for item in media if item.is_clip and item.seconds is not None]
    if not counts or model.properties["frames"] == 1:
        return []
    lengths = range(min_clip_frames(model), max(counts) + 1, get_clip_lengths(model).step)
    return [1, *lengths] if can_train_single_frames(model) else [*lengths]


def min_clip_frames(model: ModelSet) -> int:
    """Return the smallest frame count of clips that a model can be trained on."""
    return int(model.properties.get("least_frames", get_clip_lengths(model).shortest))


def can_train_single_frames(model: ModelSet) -> bool:
    """Return whether the model can be trained on single frames of clips, as images."""
    return not model.properties.get("from_image", False) and "least_frames" not in model.properties


def is_too_short(item: Media, model: ModelSet) -> bool:
    """Return whether a clip has fewer frames than the model needs; False for other files."""
    return item.seconds is not None and count_frames(item, model) < min_clip_frames(model)


def count_frames(clip: Media, model: ModelSet) -> int:
    """Return a clip's duration as a number of frames at the model's frame rate, rounded down."""
    return int((clip.seconds or 0) * model.properties["fps"])


def describe_dataset(setup: RunSetup) -> str:
    """Return the text of dataset.toml: a table for each folder and kind of media, or subsets of one table."""
    lines = _format_toml_table("[general]", _make_general_keys(setup))
    if setup.has_subsets:
        return "\n".join([*lines, *_describe_subsets(setup), ""])
    clip_keys = _make_clip_keys(setup)
    folders_and_kinds = dict.fromkeys((item.path.parent, item.kind) for item in setup.media)
    for folder, kind in folders_and_kinds:
        if not _trains_on(setup, kind):
            continue
        # audio has no size
        for size in _list_sizes(setup, folder) if kind != "audio" else [setup.target_size]:
            keys = _make_folder_keys(setup, folder, kind)
            if kind == "video":
                keys = clip_keys | keys
            else:
                keys.pop("target_frames", None)
            if size != setup.target_size:
                keys |= {"resolution": size, "cache_directory": _name_cache(keys, size)}
            lines += ["", *_format_toml_table("[[datasets]]", keys)]
    if "[[datasets]]" not in lines:
        minimum = min_clip_frames(setup.model) / setup.model.properties["fps"]
        raise OptionError(
            f"--task {setup.model.task} learns from clips of at least {minimum:.1f} seconds, and "
            f"{setup.options.folder} has none. Choose another --family or --task."
        )
    return "\n".join([*lines, ""])


def _trains_on(setup: RunSetup, kind: str) -> bool:
    """Return whether a run trains on this kind of media: "video", "image" or "audio"."""
    if kind != "video":
        # an image-to-video model takes its start images from the clips
        return not setup.model.properties.get("from_image", False)
    # a run with single frames needs a model that trains on single frames of clips
    return setup.frames > 1 or can_train_single_frames(setup.model)


def _list_sizes(setup: RunSetup, folder: Path) -> Sequence[tuple[int, int]]:
    """Return the sizes at which the files of a folder are trained: one, or those of another's project."""
    own_sizes = setup.table_keys_by_folder.get(folder, {}).get("resolution")
    return own_sizes or setup.general_keys.get("resolution") or [setup.target_size]


def _name_cache(keys: Mapping[str, Any], size: tuple[int, int]) -> str:
    """Return the cache folder of a table for a size other than that of [general]: tables cannot share one."""
    return f"{keys['cache_directory']}_{format_shape(size)}"


def _describe_subsets(setup: RunSetup) -> list[str]:
    """Return the tables of dataset.toml with [[datasets.subsets]], for each size of another's project."""
    # Only this layout has regularization images and shuffled tags.
    general_keys = setup.general_keys
    uses_limits = general_keys.get("enable_bucket", True) and not general_keys.get("bucket_no_upscale")
    lines = []
    for size in general_keys.get("resolution") or [setup.target_size]:
        dataset_keys: dict[str, Any] = {} if size == setup.target_size else {"resolution": size}
        if uses_limits:
            # the [general] table already has the keys of another trainer's project
            # min_bucket_reso and max_bucket_reso, in steps of SIDE_STEP
            shortest = min(size)
            if shortest >= SIDE_STEP:
                shortest = shortest // SIDE_STEP * SIDE_STEP
            # leaves room for the long side of an image with an extreme aspect ratio
            largest = round_up(2 * max(size), SIDE_STEP)
            sides = {"min_bucket_reso": min(DEFAULT_SIDE, shortest), "max_bucket_reso": largest}
            dataset_keys |= {name: side for name, side in sides.items() if name not in general_keys}
        lines += ["", *_format_toml_table("[[datasets]]", dataset_keys)]
        for subset_keys in _list_subsets(setup):
            if size != setup.target_size:
                subset_keys["cache_directory"] = _name_cache(subset_keys, size)
            lines += ["", *_format_toml_table("[[datasets.subsets]]", subset_keys)]
    return lines


def _list_subsets(setup: RunSetup) -> list[dict[str, Any]]:
    """Return the keys of a [[datasets.subsets]] for each folder of images and of regularization images."""
    subsets = []
    for folder in dict.fromkeys(item.path.parent for item in setup.media):
        table_keys = _make_folder_keys(setup, folder, "image")
        # subsets have sd-scripts' names for some keys
        subsets.append({SUBSET_KEYS.get(name, name): value for name, value in table_keys.items()})
    for folder in setup.content.regularization_folders:
        # The dataset.toml keys of the subset for a folder of regularization images.
        cache = Path("cache", "images", folder.parent.name, folder.name).as_posix()
        keys: dict[str, Any] = {
            "image_dir": setup.relative_path(folder),
            "cache_directory": cache,
            "is_reg": True,
        }
        name = setup.content.parsed_folder_names.get(folder)
        if name is not None:
            if name.repeats > 1:
                keys["num_repeats"] = name.repeats
            keys["class_tokens"] = name.class_tokens
        if setup.trigger_word:
            keys["trigger_word"] = ""  # images of the class must not contain it
        subsets.append(keys)
    return subsets


def _make_general_keys(setup: RunSetup) -> dict[str, Any]:
    """Return the keys of the [general] table of dataset.toml."""
    keys: dict[str, Any] = {}
    if not setup.has_only_audio:
        keys["resolution"] = setup.target_size
    keys["caption_extension"] = setup.content.caption_suffix
    if not setup.has_only_audio:
        keys["enable_bucket"] = True
    if setup.trigger_word:
        keys["trigger_word"] = setup.trigger_word
    if setup.tags is not None:
        keys |= setup.tags.make_keys(setup.trigger_word)
    # lengths of clips are in the tables of clips
    others = setup.general_keys.items()
    return keys | {name: value for name, value in others if name not in {"resolution", "target_frames"}}


def _make_clip_keys(setup: RunSetup) -> dict[str, Any]:
    """Return the dataset.toml keys that select which frames of clips are trained."""
    frames = setup.frames
    single_length = frames == 1 or not can_train_single_frames(setup.model)
    lengths = [frames] if single_length else [1, frames]
    keys: dict[str, Any] = {
        "target_frames": setup.general_keys.get("target_frames", lengths),
        "frame_extraction": "head",
    }
    if frames > 1:
        keys["source_fps"] = "auto"
    return keys


def _make_folder_keys(setup: RunSetup, folder: Path, kind: str) -> dict[str, Any]:
    """Return the dataset.toml keys of a folder's table, for its files of one kind."""
    content = setup.content
    keys: dict[str, Any] = {f"{kind}_directory": setup.relative_path(folder)}
    # links are not followed: `run` writes nothing outside the described folder
    name_here = folder.relative_to(setup.options.folder)
    keys["cache_directory"] = (Path("cache") / f"{kind}s" / name_here).as_posix()
    keys |= _make_condition_keys(setup, folder, kind)
    folder_name = content.parsed_folder_names.get(folder)  # of a folder such as 10_cat: repeats and class
    if folder in content.repeats_by_folder:  # balances real and generated files
        keys["num_repeats"] = content.repeats_by_folder[folder]
    elif folder_name is not None and folder_name.repeats > 1:
        keys["num_repeats"] = folder_name.repeats
    class_tokens = setup.trigger_word if folder_name is None else folder_name.class_tokens
    if class_tokens and _lacks_captions(setup, folder, kind):
        keys["class_tokens"] = class_tokens
    project_keys = setup.table_keys_by_folder.get(folder, {})
    # sizes make several tables
    return keys | {name: value for name, value in project_keys.items() if name != "resolution"}


def _make_condition_keys(setup: RunSetup, folder: Path, kind: str) -> dict[str, Any]:
    """Return the keys that name a folder's references, control images, layers and masks."""
    content = setup.content
    keys: dict[str, Any] = {}
    # references of an editing model, and control images of a control network, share a key
    reference_folder = content.reference_folders.get(folder) if kind == "image" else None
    if reference_folder is not None:
        keys["control_directory"] = setup.relative_path(reference_folder)
        if setup.model.properties.get("sizes_references"):
            keys["control_resolution"] = setup.target_size
    if content.layers_by_image:
        keys["multiple_target"] = True
    if folder in content.control_folders:
        keys["control_directory"] = setup.relative_path(content.control_folders[folder])
    if real_path(folder) in content.mask_folders:
        keys["mask_directory"] = setup.relative_path(content.mask_folders[real_path(folder)])
    return keys


def _lacks_captions(setup: RunSetup, folder: Path, kind: str) -> bool:
    """Return whether any image, clip or audio file (`kind`) in a folder has no caption."""
    # unreadable files count too: the run requires captions for all files
    if any(path.parent == folder for path in setup.content.unreadable_media):
        return True
    items_of_kind = [item for item in setup.media if item.path.parent == folder and item.kind == kind]
    return any(item.caption is None for item in items_of_kind)


def describe_samples(setup: RunSetup) -> str:
    """Return the text of prompts.txt: prompts for sample images, with the options of each prompt.

    Two prompts show the subject in situations that no caption mentions; a third one has no subject.
    For a network with control images, the prompts are captions together with their control images. For
    edits, they are the instructions of the dataset with the images that they change, and another instruction.
    """
    released_values = format_options(_released_values(setup.model))
    if setup.content.control_folders:
        return _describe_control_samples(setup, released_values)
    if setup.content.layers_by_image:
        return _describe_layer_samples(setup, released_values)
    edits = _list_edits(setup)
    if edits:
        return _describe_edit_samples(setup, edits, released_values)
    start_options = _write_start_frames(setup) if setup.model.properties.get("from_image") else ""
    lines = ""
    if setup.foreign_samples:
        return _describe_foreign_samples(setup)
    size = format_options(_sample_size(setup))
    for seed, prompt in enumerate(_make_sample_prompts(setup), start=1):
        parts = [prompt, size, released_values, start_options, f"--d {seed}"]
        lines += " ".join(filter(None, parts)) + "\n"
    return lines


def _describe_foreign_samples(setup: RunSetup) -> str:
    """Return the samples of another trainer's project as lines of prompts.txt."""
    released_values = _released_values(setup.model)
    # one number is the guidance there: that of models with embedded guidance is the embedded one
    has_embedded = False
    with contextlib.suppress(UserError):  # Stable Diffusion reads its file, and has no embedded guidance
        has_embedded = setup.model_info.family.defaults.embedded_guidance is not None
    guidance_letter = "g" if has_embedded and "l" not in released_values else "l"
    default_options = _sample_size(setup) | released_values
    lines = ""
    for sample in setup.foreign_samples:
        if sample.frames is not None:
            sample = replace(sample, frames=get_clip_lengths(setup.model).fit(sample.frames))
        lines += sample.format_line(setup.trigger_word, default_options, guidance_letter) + "\n"
    return lines


def _make_sample_prompts(setup: RunSetup) -> list[str]:
    """Return sample prompts: two with the subject in different situations, and one without it."""
    captions = [find_text(item.caption) for item in setup.media if item.caption]
    subject = _find_sample_subject(setup, captions)
    # two situations, if possible ones that no caption mentions
    lower = [caption.lower() for caption in captions]
    new = [text for word, text in SITUATIONS.items() if not any(word in caption for caption in lower)]
    situations = (new if len(new) > 1 else list(SITUATIONS.values()))[:2]
    prompts = [f"{subject}, {situation}" for situation in situations]
    if not setup.kind.trains_embedding:
        prompts.append(EDIT_INSTRUCTION if setup.model_info.needs_reference else PROMPT_WITHOUT_SUBJECT)
    quality_tags = setup.model.properties.get("tags")
    if quality_tags:
        prompts = [f"{quality_tags}, {prompt}" for prompt in prompts]
    return prompts


def _find_sample_subject(setup: RunSetup, captions: Sequence[str]) -> str:
    """Return the subject of sample prompts, from the trigger word, the captions or the folder names."""
    training_folders = {item.path.parent for item in setup.media}
    class_names = []
    for folder, name in setup.content.parsed_folder_names.items():
        if folder in training_folders:  # folders of regularization images are left out
            class_names.append(name.class_tokens)
    subject = plain(setup.trigger_word or _find_subject(captions or class_names))
    if setup.tags is None:
        return subject
    # the trigger word and the tags that all captions share
    words = (
        []
        if setup.trigger_word is None or setup.trigger_word in setup.tags.shared_tags
        else [setup.trigger_word]
    )
    length = 0
    for tag in map(as_words, setup.tags.shared_tags):
        length += len(tag)
        if length <= MAX_SUBJECT_LENGTH:
            words.append(tag)
    shared = ", ".join(words)
    return plain(shared or as_words(subject))


def _describe_edit_samples(setup: RunSetup, edits: Sequence[Edit], released_values: str) -> str:
    """Return sample prompts for the first and a middle edit of the dataset, and for a new one."""
    shown = [edits[0], *([edits[len(edits) // 2]] if len(edits) > 1 else [])]
    samples = [edit for edit in shown if edit.instruction]
    if not samples or not setup.kind.trains_embedding:
        samples.append(Edit(EDIT_INSTRUCTION, edits[-1].images))
    lines = ""
    for seed, edit in enumerate(samples, start=1):
        size = format_options(_sample_size(setup))
        parts = [edit.instruction, size, released_values, edit.images, f"--d {seed}"]
        lines += " ".join(filter(None, parts)) + "\n"
    return lines


def _describe_control_samples(setup: RunSetup, released_values: str) -> str:
    """Return sample prompts for the first, a middle and the last control pair of the dataset."""
    control_image_by_path: dict[Path, Path] = {}
    images = []
    for item in setup.media:
        control_folder = setup.content.control_folders.get(item.path.parent)
        control_images = () if control_folder is None else find_references(item, control_folder)
        if control_images:
            control_image_by_path[item.path] = control_images[0]
            images.append(item)
    lines = ""
    for seed, item in enumerate(_select_first_middle_last(images), start=1):
        width, height = _shrink_to_area(item.size, _area(setup.target_size))
        control = control_image_by_path[item.path]
        prompt = plain(item.caption or setup.trigger_word or "") or PROMPT_WITHOUT_SUBJECT
        parts = [prompt, f"--w {width} --h {height}", released_values, f"--cn {setup.relative_path(control)}"]
        lines += " ".join([*filter(None, parts), f"--d {seed}"]) + "\n"
    return lines


def _select_first_middle_last(items: Sequence[Media]) -> list[Media]:
    """Return the first, the middle and the last item, each once."""
    indices = dict.fromkeys((0, len(items) // 2, len(items) - 1))
    return [items[index] for index in indices]


def _describe_layer_samples(setup: RunSetup, released_values: str) -> str:
    """Return sample prompts that use the first, a middle and the last layered image."""
    images = [item for item in setup.media if item.path in setup.content.layers_by_image]
    lines = ""
    for seed, item in enumerate(_select_first_middle_last(images), start=1):
        width, height = _shrink_to_area(item.size, _area(setup.target_size))
        prompt = plain(item.caption or setup.trigger_word or "") or PROMPT_WITHOUT_SUBJECT
        image = f"--ci {setup.relative_path(item.path)} --f {len(setup.content.layers_by_image[item.path])}"
        lines += f"{prompt} --w {width} --h {height} {released_values} {image} --d {seed}\n"
    return lines


def _sample_size(setup: RunSetup) -> dict[str, Any]:
    """Return the size of a sample by the letters of its options: w, h and f (frames)."""
    # Audio models have only f, image models have no f.
    if setup.has_only_audio:
        return {"f": AUDIO_FRAMES}
    width, height = setup.target_size
    if setup.frames > 1:
        width, height = _shrink_to_area(setup.target_size, MAX_SAMPLE_AREA)
    frames = {"f": setup.frames} if setup.model.properties["frames"] > 1 else {}
    return {"w": width, "h": height, **frames}


def _find_subject(captions: Sequence[str]) -> str:
    """Return the words that all captions start with, without what follows a comma."""
    # If these are only articles, or none, the shortest caption is used; without captions, "a person".
    words = [text.split() for text in captions if text]
    common = os.path.commonprefix(words) if len(words) > 1 else []
    subject = " ".join(common)
    if all(word.lower() in {"a", "an", "the"} for word in common):
        subject = min((text for text in captions if text), key=len, default="")
    return re.split(r"[,.;:]", subject)[0][:MAX_SUBJECT_LENGTH].strip() or "a person"


def _released_values(model: ModelSet) -> dict[str, Any]:
    """Return steps, guidance and flow shift of the model's generation command by their option letters."""
    # All other values default to the family's, for samples as for generation.
    letter_by_option = {"--negative_prompt": "n"}
    for name in ("steps", "guidance_scale", "embedded_guidance", "flow_shift"):
        option, letter, _ = {**COUNTS, **VALUES}[name]
        letter_by_option[option] = letter
    options = {}
    # each word of the command together with the one after it
    for option, value in itertools.pairwise(shlex.split(model.commands["generate"])):
        if option in letter_by_option:
            options[letter_by_option[option]] = value
    return options


def _list_edits(setup: RunSetup) -> list[Edit]:
    """Return the image edits of the dataset whose reference images are all readable."""
    references = setup.content.reference_folders
    edits = []
    for item in setup.media:
        if item.kind != "image" or item.path.parent not in references:
            continue
        sources = find_references(item, references[item.path.parent])[: setup.model_info.max_references]
        if sources and not any(map(why_unused, sources)):
            images = " ".join(f"--ci {setup.relative_path(path)}" for path in sources)
            instruction = add_trigger(find_text(item.caption or ""), setup.trigger_word or "")
            edits.append(Edit(plain(instruction), images))
    return edits


def _write_start_frames(setup: RunSetup) -> str:
    """Write the first frame of a clip, and the last if the model takes one; return their prompt options."""
    # The options are --i for the first frame and --ei for the last. With --dry_run nothing is written.
    clip = next(item.path for item in setup.media if item.is_clip)
    folder = setup.folder / "output"
    start, end = folder / "start.png", folder / "end.png"
    argv = shlex.split(setup.model.commands["generate"])
    takes_last_frame = not {"--end_image_path", "--last_frame"}.isdisjoint(argv)
    if not setup.options.dry_run:
        folder.mkdir(exist_ok=True)
        write_png(start, first_frame(clip))
        if takes_last_frame:
            # a deque of length 1 keeps only the last frame
            (last_frame,) = deque(itertools.islice(video_frames(clip), MAX_FRAMES_READ), maxlen=1)
            write_png(end, last_frame)
    options = f"--i {setup.relative_path(start)}"
    return f"{options} --ei {setup.relative_path(end)}" if takes_last_frame else options


def list_commands(setup: RunSetup) -> list[list[str]]:
    """Return the commands of a run: download, two checks, caching of latents and text embeddings, training.

    Captions that vary from step to step are not cached: the training script encodes them.
    """
    model = setup.model
    download = ["python", "tools/download.py", "--family", model.family, "--task", model.task]
    # a small card loads its text encoders in 8 bits
    if 0 < setup.memory < SMALL_CARD_GIB:
        download.append("--fp8_encoders")
    if setup.options_without_download:
        download += ["--without", *setup.options_without_download]
    download = [*download, "--to", str(real_path(setup.options.models))]
    command = _fill_placeholders(setup, _list_arguments(setup, "latents"))
    if setup.needs_float32:
        command += _list_float32_options(setup, "LatentCaching")
    cache_latents = command
    # The command that caches text embeddings, and what the recommended targets need of them
    # The targets keep a distilled model's ability to sample in few steps. The user may choose one afterwards
    # in run.toml, without caching again.
    command = _fill_placeholders(setup, _list_arguments(setup, "texts"))
    if setup.needs_float32:
        command += _list_float32_options(setup, "TextCaching")
    few_steps = setup.model_info.few_step_advice
    for target in () if few_steps is None else few_steps.targets:
        command += shlex.split(target.caching)
    cache_texts = command
    check_media = [*cache_latents, "--check", "--html", CHECK_PAGE]
    check_texts = [*cache_texts, "--check"]
    # The training command, whose options are in run.toml except the switch for the kind of run.
    script, *kind_options = setup.kind.find_training_command(setup.model)
    switches = [option for option in kind_options if option == setup.kind.switch]
    train = ["python", script, "--config_file", RUN_FILE, *switches]
    if setup.encodes_captions_each_step:
        return [download, check_media, cache_latents, train]
    return [download, check_media, check_texts, cache_latents, cache_texts, train]


def _fill_placeholders(setup: RunSetup, words: Sequence[str]) -> list[str]:
    """Replace placeholders in a command, such as {vae}, with the paths of the model's files."""
    path_by_placeholder = {f"{{{name}}}": path for name, path in setup.model_files.items()}
    return [path_by_placeholder.get(word, word) for word in words]


def _list_float32_options(setup: RunSetup, command_title: str) -> list[str]:
    """Return the options with which a command computes in float32."""
    options = []
    for name in setup.model_info.dtype_options[command_title]:
        options += [f"--{name}", FLOAT32]
    return options


def _list_arguments(setup: RunSetup, step: str) -> list[str]:
    """Return the arguments of a model's script for a step, such as "latents" or "train"."""
    # For a folder with only audio files, this includes the option that trains the model on audio alone.
    argv = shlex.split(setup.model.commands[step])
    if setup.has_only_audio:
        option, value = setup.model.properties["sound_alone"].split()
        if option in argv:
            argv[argv.index(option) + 1] = value
        else:
            argv += [option, value]
    return argv


def describe_run(setup: RunSetup, commands: list[list[str]]) -> str:
    """Return the text of run.toml: the training options and the commands of the run.

    Later values override earlier ones: first the model's options, then those of the kind of run, then its
    length and saving, then those of another trainer's project or a recipe.
    """
    values = setup.kind.adapt_options(_model_values(setup), setup.memory)
    _, *kind_argv = setup.kind.find_training_command(setup.model)  # without the script
    # the switch selects the kind of run on the command line, so it is not in run.toml
    kind_options = [word for word in kind_argv if word != setup.kind.switch]
    values |= _read_options(kind_options, {"word": setup.trigger_word or ""})
    values |= _run_values(setup)
    values |= setup.training_options
    values = {name: value for name, value in values.items() if value is not None}
    project_table = {"files": list(setup.model_files.values()), "commands": commands}
    lines = [
        "# Paths are relative to this folder, in which `run` works; it can be moved.",
        *_format_toml_table("[training]", values),
        *_describe_targets(setup),
        "",
        "# what `run` looks for and runs; the training leaves it alone",
        *_format_toml_table(f"[{PROJECT_TABLE}]", project_table),
        "",
    ]
    return "\n".join(lines)


def _describe_targets(setup: RunSetup) -> list[str]:
    """Return commented-out keys for options that keep a distilled model's ability to sample in few steps."""
    few_steps = setup.model_info.few_step_advice
    if few_steps is None or not setup.kind.supports_few_step_targets:
        return []
    lines = [
        "",
        f"# This model {few_steps.distillation_clause}. Plain training unlearns "
        f"{few_steps.unlearned_pronoun}: see docs/targets.md.",
    ]
    for target in few_steps.targets:
        lines.append(f"# To {target.about}:")
        values = _read_options(shlex.split(target.options), {})
        lines += [f"# {line}" for line in _format_toml_lines(values)]
    return lines


def _model_values(setup: RunSetup) -> dict[str, Any]:
    """Return the training options that depend on the model and the GPU, including the model files."""
    values = _read_options(_list_training_arguments(setup), setup.model_files)
    # the length of a run is set in steps
    values = {name: value for name, value in values.items() if "epoch" not in name}
    if not setup.memory:  # a CPU uses no GPU-only weight formats and optimizers
        for gpu_option in shlex.split(setup.model.properties["fp8"]):
            values.pop(gpu_option.lstrip("-"), None)
        if values["optimizer_type"] == "adamw8bit":
            values["optimizer_type"] = "adamw"
    if setup.needs_float32:
        values["mixed_precision"] = "no"
        values |= dict.fromkeys(setup.model_info.dtype_options["Training"], FLOAT32)
    elif setup.needs_float16:
        values["mixed_precision"] = "fp16"
    # files with a placeholder in the command, such as {vae}, are among the values already
    placeholders = {word.strip("{}") for word in shlex.split(setup.model.commands["train"])}
    other_files = {name: path for name, path in setup.model_files.items() if name not in placeholders}
    return values | other_files


def _list_training_arguments(setup: RunSetup) -> list[str]:
    """Return the training script's arguments, adapted to the GPU."""
    data = setup.model.properties
    words = _list_arguments(setup, "train")
    script = next(index for index, word in enumerate(words) if word.endswith(".py"))
    words = [*words[script + 1 :], *shlex.split(data.get("train", ""))]
    if setup.memory and not is_small(setup.model, setup.memory):
        words = [word for word in words if word not in FP8]  # the command in the docs may contain it
        words += weight_options(setup.model, setup.memory)
        if setup.memory <= SMALL_CARD_GIB and setup.frames > 1:
            words.append("--gradient_checkpointing_cpu_offload")
    if setup.memory and data.get("swaps", True):
        words += ["--blocks_to_swap", "auto"]  # the training script determines the number
    return words


def _read_options(words: Sequence[str], files: Mapping[str, str]) -> dict[str, Any]:
    """Return the values in a command, by option name."""
    # `files` maps placeholders such as {vae} to paths. A flag without a value is True.
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


def _run_values(setup: RunSetup) -> dict[str, Any]:
    """Return the [training] options for length, saving, samples and validation."""
    steps = setup.options.max_train_steps
    intervals = derive_intervals(steps, setup.kind.saves_large_files)
    values: dict[str, Any] = {
        "dataset_config": "dataset.toml",
        "max_train_steps": steps,
        "save_state": True,
        "sample_prompts": "prompts.txt",
        **intervals,
        "sample_at_first": True,
        "sample_now": True,
    }
    if len(setup.media) >= MIN_FILES_FOR_VALIDATION and setup.may_hold_out_validation:
        values["validation_split"] = 0.1
    values["output_dir"] = "output"
    values["output_name"] = setup.options.output_name or _make_output_name(setup)
    if setup.kind.makes_training_adapter:
        if "validation_split" in values:
            values["early_stopping_patience"] = EARLY_STOPPING_PATIENCE
        values["make_adapter"] = find_origin(setup.content)
    return values


def _make_output_name(setup: RunSetup) -> str | None:
    """Return the name of the trained files: the folder's name; for an embedding, the trigger word."""
    if setup.kind.trains_embedding:
        return setup.trigger_word  # prompts use an embedding by its file name
    name = re.sub(r"[^\w.-]+", "_", setup.folder.name).strip("._")[:MAX_SUBJECT_LENGTH]
    if is_windows_device(name):  # such as CON or NUL, which cannot be a file name
        name = f"lora_{name}"
    name = name or "lora"
    return name + ADAPTER_NAME_SUFFIX if setup.kind.makes_training_adapter else name


def _format_toml_table(head: str, values: Mapping[str, Any]) -> list[str]:
    return [head, *_format_toml_lines(values)]


def _format_toml_lines(values: Mapping[str, Any]) -> list[str]:
    return [f"{name} = {toml_value(value)}" for name, value in values.items()]

"""Options of the parts of clips that training gives to the model without noise. Standard library only."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modules.errors import OptionError
from modules.options import FREE, HABIT, Options, option
from modules.text_files import parse_toml, read_text

_CROP, _MASK, _SOUND_MASK = "ltx2_spatial_crop", "ltx2_inpaint_mask", "ltx2_audio_inpaint_mask"
_ANCHORS, _KEYFRAMES = "video_anchor_training", "keyframe_endpoint_training"
STRATEGIES = ("endpoints", "random", "endpoints_random")


def _chance(text: str, default: float | None, **relations: Any) -> Any:
    return option(text, default=default, minimum=0, maximum=1, facts=HABIT, **relations)


def _frames(text: str) -> Any:
    return option(text, default=0, minimum=0, facts=HABIT)


def _both_ends(kind: str) -> Any:
    first, last = f"ltx2_{kind}extend_prefix_frames", f"ltx2_{kind}extend_suffix_frames"
    return _chance(
        f"fraction of clips with --{first} and --{last}: one draw for both ends",
        1.0,
        acts_if={
            f"neither --{first} nor --{last} is given": (
                lambda options: bool(getattr(options, first) or getattr(options, last))
            )
        },
    )


def _one_end(kind: str, end: str) -> Any:
    name = f"ltx2_{kind}extend_{end}_frames"
    text = f"fraction of clips with --{name}, drawn separately; default: --ltx2_{kind}extend_p"
    return _chance(text, None, ignored_without=name)


class Ltx2GivenParts(Options, title="given parts of clips"):
    """Parts of clips that are given in training (kept at time 0, excluded from the loss)."""

    ltx2_extend_prefix_frames: int = _frames(
        "latent frames at the start of clips that are given: a LoRA that continues clips; "
        "1 + 8 (n - 1) frames"
    )
    ltx2_extend_suffix_frames: int = _frames(
        "latent frames at the end of clips that are given: a LoRA that generates what came before; 8 n frames"
    )
    ltx2_extend_p: float = _both_ends("")
    ltx2_extend_prefix_p: float | None = _one_end("", "prefix")
    ltx2_extend_suffix_p: float | None = _one_end("", "suffix")
    ltx2_spatial_crop: bool = option(
        "a rectangle of the clips is given, spatial_crop_region of their table: a LoRA for outpainting",
        facts=HABIT,
    )
    ltx2_spatial_crop_p: float = _chance("fraction of clips in which it is given", 0.0, ignored_without=_CROP)
    ltx2_spatial_crop_invert: bool = option(
        "the outside of the rectangle is given instead", ignored_without=_CROP, facts=HABIT
    )
    ltx2_inpaint_mask: bool = option(
        "the white parts of the masks of mask_directory are given, and these masks do not weight the loss: a "
        "LoRA for inpainting",
        facts=HABIT,
    )
    ltx2_inpaint_mask_p: float = _chance("fraction of clips in which it is given", 0.0, ignored_without=_MASK)
    ltx2_inpaint_mask_invert: bool = option("give what is black", ignored_without=_MASK, facts=HABIT)
    ltx2_inpaint_mask_threshold: float = _chance(
        "a latent is given if the mean of the mask over its pixels is above this", 0.5, ignored_without=_MASK
    )
    ltx2_audio_extend_prefix_frames: int = _frames(
        "latents at the start of the audio that are given; 25 are a second"
    )
    ltx2_audio_extend_suffix_frames: int = _frames("latents at the end of the audio that are given")
    ltx2_audio_extend_p: float = _both_ends("audio_")
    ltx2_audio_extend_prefix_p: float | None = _one_end("audio_", "prefix")
    ltx2_audio_extend_suffix_p: float | None = _one_end("audio_", "suffix")
    ltx2_audio_inpaint_mask: bool = option(
        "intervals of the audio are given, as listed in the files of audio_cond_mask_directory", facts=HABIT
    )
    ltx2_audio_inpaint_mask_p: float = _chance(
        "fraction of clips in which they are given", 0.0, ignored_without=_SOUND_MASK
    )
    ltx2_audio_inpaint_mask_invert: bool = option(
        "the audio outside of the intervals is given instead", ignored_without=_SOUND_MASK, facts=HABIT
    )
    ltx2_audio_inpaint_mask_threshold: float = _chance(
        "a latent is given if intervals cover more than this fraction of its time",
        0.5,
        ignored_without=_SOUND_MASK,
    )
    video_anchor_training: bool = option("give whole latent frames of clips", facts=HABIT)
    video_anchor_probability: float = _chance(
        "fraction of clips in which frames are given", 0.5, ignored_without=_ANCHORS
    )
    video_anchor_strategy: str = option(
        "endpoints: the first and the last latent frame; random: --video_anchor_count of all; "
        "endpoints_random: the ends, and as many of those between them",
        default="endpoints_random",
        choices=STRATEGIES,
        ignored_without=_ANCHORS,
        facts=HABIT,
    )
    video_anchor_count: int = option(
        "how many latent frames are drawn", default=1, minimum=0, ignored_without=_ANCHORS, facts=HABIT
    )
    video_anchor_strength: float = _chance(
        "how clean they are; below 1 with --ltx2_graded_conditioning", 1.0, ignored_without=_ANCHORS
    )
    ltx2_graded_conditioning: bool = option(
        "allow --video_anchor_strength below 1: these frames then have less noise and a lower timestep "
        "than the others",
        ignored_without=_ANCHORS,
        facts=HABIT,
    )
    keyframe_endpoint_training: bool = option(
        "add latent frames of clips as keyframes, as --keyframe adds images: a LoRA that interpolates "
        "between them. They are drawn for each clip",
        facts=HABIT,
    )
    keyframe_first_frame_p: float = _chance(
        "fraction of clips with the first latent frame as a keyframe", 1.0, ignored_without=_KEYFRAMES
    )
    keyframe_last_frame_p: float = _chance(
        "fraction of clips with the last one", 1.0, ignored_without=_KEYFRAMES
    )
    keyframe_random_interior_p: float = _chance(
        "fraction of clips with random ones in between", 0.0, ignored_without=_KEYFRAMES
    )
    keyframe_max_random_interior: int = option(
        "how many of them at most", default=0, minimum=0, ignored_without=_KEYFRAMES, facts=HABIT
    )
    ltx2_conditioning_config: Path | None = option(
        "TOML file that sets these options, --ltx2_train_direction, --ltx2_first_frame_conditioning_p and "
        "--ic_lora_ref_probability",
        facts=FREE,  # the options that it sets are compared
        place="there",
    )

    @property
    def gives_images(self) -> bool:
        """Return whether any part of the images is given rather than generated."""
        ends = self.ltx2_extend_prefix_frames or self.ltx2_extend_suffix_frames
        masks = self.ltx2_spatial_crop or self.ltx2_inpaint_mask
        return bool(ends or masks or self.video_anchor_training or self.keyframe_endpoint_training)

    @property
    def gives_audio(self) -> bool:
        """Return whether any audio is given rather than generated."""
        ends = self.ltx2_audio_extend_prefix_frames or self.ltx2_audio_extend_suffix_frames
        return bool(ends or self.ltx2_audio_inpaint_mask)

    def __post_init__(self) -> None:
        """Raise OptionError for options of given frames that have no effect or lack another option."""
        draws_none = self.video_anchor_strategy == "random" and not self.video_anchor_count
        if self.video_anchor_training and draws_none:
            raise OptionError("--video_anchor_strategy random: pass --video_anchor_count 1 or more")
        interior_p, max_interior = self.keyframe_random_interior_p, self.keyframe_max_random_interior
        if bool(interior_p) != bool(max_interior):
            raise OptionError(
                f"--keyframe_random_interior_p {interior_p:g} and --keyframe_max_random_interior "
                f"{max_interior}: pass both above 0, or neither"
            )
        has_keyframes = self.keyframe_first_frame_p or self.keyframe_last_frame_p or interior_p
        if self.keyframe_endpoint_training and not has_keyframes:
            raise OptionError(
                "--keyframe_endpoint_training with --keyframe_first_frame_p 0 and --keyframe_last_frame_p 0: "
                "there would be no keyframes. Pass one above 0"
            )
        if self.video_anchor_strength < 1 and not self.ltx2_graded_conditioning:
            raise OptionError(
                f"--video_anchor_strength {self.video_anchor_strength:g}: partly clean frames need "
                "--ltx2_graded_conditioning"
            )


def _extension_names(kind: str) -> dict[str, str]:
    start = f"ltx2_{kind}extend"
    return {
        "probability": f"{start}_p",
        "prefix": f"{start}_prefix_frames",
        "suffix": f"{start}_suffix_frames",
        "prefix_p": f"{start}_prefix_p",
        "suffix_p": f"{start}_suffix_p",
    }


def _mask_names(switch: str) -> dict[str, str]:
    names = {"": switch, "probability": f"{switch}_p", "invert": f"{switch}_invert"}
    return names if switch == _CROP else {**names, "threshold": f"{switch}_threshold"}


FIRST, REFERENCES = "ltx2_first_frame_conditioning_p", "ic_lora_ref_probability"
DIRECTION = "ltx2_train_direction"
# by stream and type of a condition: its keys -> options; the option at "" switches the type on
CONDITION_OPTIONS: Mapping[tuple[str, str], Mapping[str, str]] = {
    ("video", "first_frame"): {"probability": FIRST},
    ("video", "reference"): {"probability": REFERENCES},
    ("video", "spatial_crop"): _mask_names(_CROP),
    ("video", "extend"): _extension_names(""),
    ("audio", "extend"): _extension_names("audio_"),
    ("video", "inpaint"): _mask_names(_MASK),
    ("video", "mask"): _mask_names(_MASK),
    ("audio", "inpaint"): _mask_names(_SOUND_MASK),
    ("audio", "mask"): _mask_names(_SOUND_MASK),
}
# by which streams are generated: video, audio
_DIRECTIONS = {(True, True): "joint", (True, False): "a2v", (False, True): "v2a"}


def read_conditioning_config(path: Path, streams: tuple[str, ...]) -> dict[str, Any]:
    """Return the option values that a --ltx2_conditioning_config file sets, by option name.

    The file has a table for each stream: whether it is generated, and which parts of it are given.

    `streams` are the streams of --ltx2_mode.

    Raises:
        OptionError: If the file cannot be read, or has other keys or values.
    """
    source = f"--ltx2_conditioning_config {path}"
    try:
        content = parse_toml(read_text(path))
    except (OSError, ValueError) as error:
        raise OptionError(f"{source} cannot be read: {error}") from None
    tables = ", ".join(f"[{stream}]" for stream in streams)
    hint = (
        f". It has a table for each stream of --ltx2_mode, {tables}, with is_generated and conditions: "
        "docs/ltx2.md"
    )
    _check_keys(content, {"video", "audio"}, source, hint)
    values: dict[str, Any] = {}
    is_generated = {}
    for stream in ("video", "audio"):
        if (stream in content) != (stream in streams):
            raise OptionError(
                f"{source}: [{stream}] and --ltx2_mode do not match: the mode has "
                f"{' and '.join(streams)}. Pass the mode of the file's streams"
            )
        if stream in content:
            table = content[stream]
            _check_keys(table, {"is_generated", "conditions"}, f"{source}: [{stream}]")
            is_generated[stream] = table.get("is_generated", True)
            for condition in table.get("conditions", ()):
                values |= _read_condition(condition, stream, f"{source}: [[{stream}.conditions]]")
    if len(is_generated) == 2:  # with one stream there is no direction to set
        # The training direction in which these streams are generated, the other one being given
        direction = _DIRECTIONS.get((is_generated["video"], is_generated["audio"]))
        if direction is None:
            raise OptionError(f"{source}: is_generated = false for both streams: nothing would be learned")
        values[DIRECTION] = direction
    return values


def _read_condition(condition: Any, stream: str, source: str) -> dict[str, Any]:
    """Return the option values of one condition in a --ltx2_conditioning_config file."""
    # `stream` is video or audio; `source` describes the condition's position in the file, for messages.
    kind = condition.get("type") if isinstance(condition, dict) else None
    option_names = CONDITION_OPTIONS.get((stream, str(kind)))
    if option_names is None:
        known = [known for known_stream, known in CONDITION_OPTIONS if known_stream == stream]
        raise OptionError(f"{source}: type {kind!r} is not known here, only {', '.join(known)}")
    settings = {key: value for key, value in condition.items() if key != "type"}
    if "p" in settings and "probability" in settings:
        raise OptionError(f"{source}: p and probability mean the same. Set one of them")
    if "p" in settings:
        settings["probability"] = settings.pop("p")
    _check_keys(settings, set(option_names) - {""}, source)
    settings.setdefault("probability", 1.0)  # without one, the condition applies to all clips
    values = {option_names[key]: value for key, value in settings.items()}
    if "" in option_names:  # the switch of this type of condition
        values[option_names[""]] = True
    return values


def _check_keys(table: Any, known: set[str], source: str, hint: str = "") -> None:
    if not isinstance(table, dict):
        raise OptionError(f"{source} has to be a table")
    unknown = [key for key in table if key not in known]
    if unknown:
        raise OptionError(f"{source}: unknown key {unknown[0]!r}. Keys are {', '.join(sorted(known))}{hint}")


def check_value(name: str, value: Any, source: str) -> Any:
    """Check a value of the conditioning file against its option's type, and return it.

    `name` is the option, `source` the start of the message.

    Raises:
        OptionError: If the type or range is wrong.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # the option's name tells its type: a fraction, a count, the direction or a switch
    if name.endswith(("_p", "probability", "threshold")):
        fits = is_number and 0 <= value <= 1
        value = float(value) if fits else value
    elif name.endswith("_frames"):
        fits = is_number and isinstance(value, int) and value >= 0
    else:
        fits = isinstance(value, str if name == DIRECTION else bool)
    if not fits:
        raise OptionError(f"{source}: {value!r} is not a value of --{name}")
    return value

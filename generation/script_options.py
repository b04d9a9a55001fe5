"""Options of each video and of output files, and their form in one family's script. Standard library only."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from blissful_tuner.options import NAG, RIFLEX
from blissful_tuner.video_to_video_options import SourceDefaults, SourceOptions
from generation.prompt_lines import GENERATION_OPTIONS, MAX_FPS, SOLVERS, LineOption
from modules.errors import OptionError
from modules.media.lengths import DEFAULT_LENGTHS, ClipLengths
from modules.media.options import FormatOptions
from modules.option_values import HEIGHT_WIDTH, check_path
from modules.options import DECODING_SETTING, NO_PIXELS, SETTING, WRITES, Options, option
from modules.output_files import check_place

MEDIA = ("image_path", "end_image_path", "control_path", "control_image_path")


class RequestOptions(Options, title="what to make"):
    """Command-line options of each video or image, which a prompt line can override.

    None means the task's default.
    """

    prompt: str | None = option("what to show; @caption.json reads a JSON object from a file", often=True)
    nag_prompt: str | None = option("what to steer away from; default: the negative prompt", title=NAG)
    prompt_2: str | None = option("prompt for the second text encoder, CLIP; default: --prompt")
    negative_prompt: str | None = option(
        "what to avoid; default: the text of the model's release, if any", often=True
    )
    video_size: tuple[int, ...] | None = option(
        "size in pixels", default=(256, 256), nargs=2, metavar=HEIGHT_WIDTH, often=True
    )
    video_length: int | None = option("number of frames: 4n + 1, of LTX-2 8n + 1; {default}", often=True)
    fps: float | None = option("frames per second of the video file", type=int, above=0, maximum=MAX_FPS)
    infer_steps: int | None = option("number of denoising steps; {default}", often=True)
    seed: str | None = option(
        "a number or any text; default: a random seed for each video", type=str, often=True
    )
    guidance_scale: float | None = option("weight of the prompt; 1 turns guidance off; {default}", often=True)
    # of the expert for much noise
    guidance_scale_high_noise: float | None = option("the same for --dit_high_noise; default: the task's")
    cfg_schedule: str | None = option(
        "steps with guidance, counted from 1: numbers, ranges, every n-th, with their own scale, or "
        "excluded, e.g. '1-10, e~3:6.5, !7'",
        title="guidance",
    )
    flow_shift: float | None = option("time shift of the schedule; {default}", often=True)
    sample_solver: str = option(  # a name of SOLVERS
        "stepping rule; vanilla is Euler, dpm++sde adds fresh noise in each step, lcm is for distilled "
        "models and LCM LoRAs (4 to 8 steps, no guidance)",
        default="unipc",
        choices=tuple(SOLVERS),
        facts=SETTING,
    )
    image_path: Path | None = option("first image, for image-to-video", often=True)
    end_image_path: Path | None = option("last image")
    control_path: Path | None = option("control video or folder of images; VACE changes or follows it")
    control_image_path: tuple[str, ...] | None = option("reference images for the result")
    source: SourceOptions
    embedded_guidance: float | None = option(
        "guidance scale that the distilled model takes as an input; needs no second pass",
        name="embedded_cfg_scale",
        often=True,
    )
    # options of the family: their names in Request.extra -> their values
    extras: Mapping[str, tuple[str, Any]] = option(default={})
    solvers: Mapping[str, str] = option(default=SOLVERS)  # of the script, see `ScriptDefaults.solvers`


NOTHING = "nothing"  # of a process that makes what another one writes; not to be typed
# values of --output_type, of which latents and PNG files are written, and of which nothing is decoded
LATENT_OUTPUTS = ("latent", "both", "latent_images")
IMAGE_OUTPUTS = ("images", "latent_images")
UNDECODED = ("latent", NOTHING)
OUTPUT_TYPES = {
    "video": "a video",
    "images": "PNG files",
    "latent": "latents to decode later",
    "both": "latents and a video",
    "latent_images": "latents and PNG files",
}


# paths with these suffixes are files, not folders
WRITABLE_SUFFIXES = {".mp4", ".mkv", ".png", ".wav"}
_IMAGE_SUFFIXES = {".gif", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".tif", ".tiff"}
_AUDIO_SUFFIXES = {".mp3", ".flac", ".ogg", ".opus", ".m4a", ".aac"}
_MORE_SUFFIXES = {".mov", ".webm", ".avi", ".m4v", ".safetensors"}
RESULT_SUFFIXES = WRITABLE_SUFFIXES | _IMAGE_SUFFIXES | _AUDIO_SUFFIXES | _MORE_SUFFIXES


class OutputOptions(Options, title="output"):
    """Format and location of output files."""

    save_path: Path = option(
        "output folder, created if missing; or the file of a single video or image, such as cat.mp4",
        required=True,
        facts=WRITES,
    )
    output_type: str = option("what is written", often=True)
    no_metadata: bool = option("do not write the prompt, seed and settings into the files")
    trim_tail_frames: int = option(
        "number of frames to cut off the end, e.g. 3 frames that an end image has degraded",
        default=0,
        minimum=0,
        facts=DECODING_SETTING,
    )
    no_progressive_save: bool = option(
        "do not write NAME_progress.mp4, a preview updated after each section and removed when the video is "
        "finished; it makes the VAE decode about two more sections for each one. There is none with a tool "
        "of --post that hides something"
    )
    prompt_in_name: bool = option(
        "add the first words of the prompt to the file's name, after time and seed", facts=NO_PIXELS
    )
    save_last_frame: bool = option(
        "also write the last frame of each video as NAME_last.png, to continue from"
    )
    save_audio: str | None = option(
        "also write the audio of each video as NAME.wav, 16 bits a sample and as long as it was made",
        choices=("wav",),
    )
    bell: bool = option(
        "ring the terminal bell when everything is finished or has failed; with --interactive, after "
        "each prompt"
    )
    format: FormatOptions
    # what the script has; no options
    numbers_single: bool = option(default=False)  # a single image is NAME_000.png, never in a folder
    # only such are made: NAME.png with --output_type images too
    pictures: bool = option(default=False, facts=NO_PIXELS)
    # how files are called: "" TIME_SEED, "released" TIME_seedSEED_PROMPT, "time" TIME alone
    naming: str = option(default="", facts=NO_PIXELS)
    name_start: str = option(default="", facts=NO_PIXELS)  # before the time
    file_name: str = option(default="", facts=NO_PIXELS)  # of the one result, if --save_path names a file

    def __post_init__(self) -> None:
        """Raise OptionError if the output cannot be written, or if it lacks frames or audio to save."""
        if self.save_last_frame and self.output_type in UNDECODED:
            raise OptionError(
                "--save_last_frame with --output_type latent: no frames are decoded. Use --output_type both, "
                "or pass --save_last_frame when the latents are decoded (--latent_path)"
            )
        if self.save_audio and self.output_type in UNDECODED:
            raise OptionError(
                "--save_audio with --output_type latent: no sound is decoded. Use --output_type both, or "
                "pass --save_audio when the latents are decoded (--latent_path)"
            )
        if self.names_file:
            # Raise OptionError if --save_path is a file that cannot be written
            check_place("--save_path", self.save_path)
            if self.save_path.exists():
                raise OptionError(
                    f"--save_path {self.save_path} already exists and is not overwritten. Pass another name, "
                    "or a folder, in which results get their own names"
                )
            if self.output_type in UNDECODED:
                raise OptionError(
                    f"--save_path {self.save_path} with --output_type {self.output_type}: latents get their "
                    f"own names. Pass a folder for them, such as {self.save_path.with_suffix('')}"
                )
            suffix = self.save_path.suffix.lower()
            if suffix in _AUDIO_SUFFIXES:
                raise OptionError(
                    f"--save_path {self.save_path}: files of this type are not written. Sound alone is "
                    f"written as WAV: pass {self.save_path.with_suffix('.wav')}"
                )
            if suffix not in WRITABLE_SUFFIXES:
                default = self.save_path.with_suffix(".png" if self.pictures else self.format.suffix)
                raise OptionError(
                    f"--save_path {self.save_path}: files of this type are not written. Pass {default}"
                )
        else:
            check_path("--save_path", self.save_path, "new folder", "")

    @property
    def names_file(self) -> bool:
        """Whether --save_path is a file: it has the suffix of an output file and is not a folder."""
        return self.save_path.suffix.lower() in RESULT_SUFFIXES and not self.save_path.is_dir()

    def in_folder(self) -> "OutputOptions":
        """Return the options with a --save_path that is a file split into its folder and its name."""
        return replace(self, save_path=self.save_path.parent, file_name=self.save_path.name)

    def is_image(self, is_single: bool) -> bool:
        """Return whether a result is written as a single image file.

        With --output_type images it is a folder of images, unless the script generates only images or
        numbers its images, or the file name is given.

        Args:
            is_single: Whether the result has one frame.
        """
        return is_single and (
            self.pictures
            or self.numbers_single
            or bool(self.file_name)
            or self.output_type not in IMAGE_OUTPUTS
        )

    def check_file_name(self, frames: int) -> None:
        """Raise OptionError if `file_name` does not fit a result of this many frames.

        Args:
            frames: Number of frames; below 1 for audio alone.
        """
        path = self.save_path / self.file_name
        reason = "the result is a video"
        suffix = self.format.suffix
        if frames < 1:
            reason = "the result is sound alone"
            suffix = ".wav"
        elif self.is_image(frames - self.trim_tail_frames <= 1):
            reason = "the result is an image"
            suffix = ".png"
        elif self.output_type in IMAGE_OUTPUTS:
            raise OptionError(
                f"--save_path {path} with --output_type {self.output_type}: the result is {frames} "
                f"images. Pass a folder for them, such as {path.with_suffix('')}"
            )
        if path.suffix.lower() != suffix:
            raise OptionError(f"--save_path {path}: {reason}. Pass {path.with_suffix(suffix)}")

    @property
    def shows_progress(self) -> bool:
        """Whether a video made in sections is written again after each section, to show progress."""
        return self.output_type not in UNDECODED and not self.no_progressive_save

    @property
    def writes_audio(self) -> bool:
        """Whether the script writes audio, as part of a video or as a separate file."""
        return self.output_type not in UNDECODED and (
            self.save_audio is not None or self.output_type not in IMAGE_OUTPUTS
        )


def as_typed(preset: Mapping[str, Any], name: str) -> str:
    """Return a preset's value of an option, as the user would type the option."""
    return f"--{name}" if preset[name] is True else f"--{name} {preset[name]}"


NO_VIDEOS = "this script makes images, and an image has one frame. Omit it"
# what a script of images refuses
VIDEO_ONLY_OPTIONS = (
    "video_length",
    "fps",
    "trim_tail_frames",
    "save_last_frame",
    "keep_pngs",
    "codec",
    "container",
)
EXPERTS = ("lora_weight_high_noise", "lora_multiplier_high_noise", "offload_inactive_dit", "lazy_loading")
OPTIMIZED = (
    "faster settings: {}; options that you pass take precedence, and unsupported ones are skipped with a "
    "warning"
)

PICTURE_OUTPUTS = ("images", "latent", "latent_images")  # output types of a script that makes images
IMAGE_FPS = 1  # what stands where a video has its rate
# --optimized, of every family
FASTER: Mapping[str, Any] = {"attn_mode": "sageattn", "compile": True, "fp8_scaled": True}


@dataclass(frozen=True)
class ScriptDefaults:
    """Defaults of the shared generation options for one model family's script, and which options it lacks.

    None means the task's default, unless the field says otherwise.
    """

    fps: int
    guidance_scale: float | None = None
    video_length: int | None = None
    infer_steps: int | None = None
    flow_shift: float | None = None
    sample_solver: str = "unipc"
    solvers: Mapping[str, str] = field(default_factory=lambda: SOLVERS)  # --sample_solver -> `Request.solver`
    solver_help: str = ""  # of --sample_solver; "": as it is declared
    # names of --scheduler -> those of --sample_solver; empty: there is no --scheduler
    solver_names: Mapping[str, str] = field(default_factory=dict)
    embedded_guidance: float | None = None  # None: no such option
    # the image and video inputs that the script accepts
    media: frozenset[str] = frozenset({"image_path", "end_image_path", "control_path"})
    source: SourceDefaults = SourceDefaults()  # of video-to-video
    # guidance is distilled into the model: there is no pass with a negative prompt
    builds_in_guidance: bool = False
    joins_guidance: bool = False  # the passes of guidance are one batch, unless --split_uncond
    blocks_to_swap: int | None = 0
    splits_attention: bool = False  # whether there is a --split_attn
    has_second_prompt: bool = False  # whether there is a --prompt_2
    size: tuple[int, int] = (256, 256)  # height, width
    # as the family's `LatentSpec` has them, for forms, which load no torch; a task may have its own
    side_step: int = 16
    lengths: ClipLengths = DEFAULT_LENGTHS
    pictures: bool = False  # the script makes single images; what only videos have is refused by name
    has_experts: bool = False  # whether there are models with two experts, and options for them
    # options, also of the family, that are None unless given, because their default depends on the model or
    # because it matters whether they were given -> their help; "": as declared
    defaults_from_model: Mapping[str, str] = field(default_factory=dict)
    has_sound: bool = False  # whether videos can have sound, and there is a --save_audio
    noise_on_cpu: bool = False  # always, so that there is no --cpu_noise
    # options of a prompt line, by letter
    line_options: Mapping[str, LineOption] = field(default_factory=lambda: GENERATION_OPTIONS)
    output_types: tuple[str, ...] = ("video", "images", "latent", "both")  # the first is the default
    # rotary frequencies of the frames that --riflex_index counts; None: no such option
    riflex_frequencies: int | None = None
    riflex_beyond: int = 0  # videos of at most this many frames are not changed
    # videos are made section by section and can be watched while they grow; there is no --video_length
    in_sections: bool = False
    numbers_single: bool = False  # a single image is NAME_000.png, never in a folder
    # shared option -> other flags for it, the usual one first
    spellings: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    # shared options that the model has no use for: there are none, or they are refused for this reason
    without: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    # what --optimized turns on
    optimized: Mapping[str, Any] = field(default_factory=lambda: {**FASTER, "fp8_fast": True})

    @property
    def flags_by_option(self) -> Mapping[str, tuple[str, ...]]:
        """Flags of options that this script (or all image scripts) names differently; the main flag first."""
        if not self.pictures:
            return dict(self.spellings)
        return {"video_size": ("--image_size",), "num_videos": ("--num_images",), **self.spellings}

    def declared(self) -> dict[str, Any]:
        """Return this script's changes to `GenerationOptions`, as keyword arguments of `add_options`."""
        source = self.source.declared()
        rejected_videos = dict.fromkeys(VIDEO_ONLY_OPTIONS, NO_VIDEOS) if self.pictures else {}
        # The names of shared options that this script lacks
        absent = {
            "prompt_2": not self.has_second_prompt,
            "video_length": self.in_sections,
            "guidance_scale_high_noise": not self.has_experts,
            "embedded_cfg_scale": self.embedded_guidance is None,
            "disable_embedded_for_cfg": self.embedded_guidance is None,
            "riflex_index": self.riflex_frequencies is None,
            "no_progressive_save": not self.in_sections,
            "split_attn": not self.splits_attention,
            "split_uncond": not self.joins_guidance,
            "cpu_noise": self.noise_on_cpu,
            "scheduler": not self.solver_names,
            "save_audio": not self.has_sound,
            **{name: name not in self.media for name in MEDIA},
            **dict.fromkeys(EXPERTS, not self.has_experts),
            **dict.fromkeys(self.without, True),
        }
        return {
            "without": {*source["without"], *([name for name, is_absent in absent.items() if is_absent])},
            "defaults": {
                **{
                    "video_size": list(self.size),
                    "video_length": 1 if self.pictures else self.video_length,
                    "fps": self.fps,
                    "infer_steps": self.infer_steps,
                    "guidance_scale": self.guidance_scale,
                    "flow_shift": self.flow_shift,
                    "sample_solver": self.sample_solver,
                    "embedded_cfg_scale": self.embedded_guidance,
                    "output_type": self.output_types[0],
                    "blocks_to_swap": self.blocks_to_swap,
                    "cpu_noise": self.noise_on_cpu,
                    "split_uncond": not self.joins_guidance,
                    "lora_multiplier_high_noise": 1.0,
                },
                **source["defaults"],
            },
            "settings": self._settings(source["settings"]),
            "refused": {**source["refused"], **rejected_videos, **self.refused},
        }

    def _settings(self, source_settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Return the family's changes to shared options, by name: choices, help texts and flags."""
        # The parser settings of options whose choices or help text differ in this script
        output_types = ", ".join(f"{name} ({OUTPUT_TYPES[name]})" for name in self.output_types)
        solvers = ", ".join(f"{name} is {solver}" for name, solver in self.solver_names.items())
        preset = " ".join(as_typed(self.optimized, name) for name in self.optimized)
        lengths = f" of more than {self.riflex_beyond} frames" if self.riflex_beyond else ""
        height, width = self.size
        solver_settings: dict[str, Any] = {"choices": list(self.solvers)}
        if self.solver_help:
            solver_settings["help"] = self.solver_help
        settings = {
            "sample_solver": solver_settings,
            "output_type": {
                "choices": list(self.output_types),
                "help": f"what to write: {output_types}",
                "refused": {},  # the types that this script lacks are no longer among the choices
            },
            "scheduler": {
                "choices": list(self.solver_names),
                "help": f"another spelling of --sample_solver: {solvers}",
            },
            "optimized": {"help": OPTIMIZED.format(preset)},
            "riflex_index": {"help": RIFLEX.format(lengths, self.riflex_frequencies)},
            "video_size": {"help": f"size in pixels; default {height} {width}"},
        }
        if self.pictures:
            settings["output_type"]["refused"] = dict.fromkeys(("video", "both"), NO_VIDEOS)
        for name, help_text in self.defaults_from_model.items():
            if help_text:
                settings[name] = {"help": help_text}
        settings_with_flags = {}
        for name, flags in self.flags_by_option.items():
            settings_with_flags[name] = {**settings.get(name, {}), "flags": flags}
        return {**settings, **source_settings, **settings_with_flags}

"""Options of videos that start from another video, an image or saved latents. Standard library only."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modules.errors import OptionError
from modules.options import Options, option
from protocols.inputs import IMAGE, LATENTS, SOURCES, VIDEO

DENOISE_OPTIONS = ("strength", "v2v_denoise")  # names of one option; each script uses one of them
SPELLINGS = ("--strength", "--v2v_denoise", "--denoise_strength")
MAX_NOISE = 10
DEFAULT_NOISE = "0.01 to 0.05 are usual"
_SHARE = "how much is regenerated: fraction of the steps that run; 1 replaces it completely"
_PAD = "how a video that is too short is padded: repeat its first or its last frame"
_NO_IMAGE = "this model makes single images with --one_frame_inference and --control_image_path"
_NO_VIDEO = "this script makes images. Pass one to --i2i_path"
USED_WITH = {  # options that only apply to some sources
    "v2v_extra_noise": {VIDEO, LATENTS},
    "v2v_pad_mode": {VIDEO},
    "i2_extra_noise": {IMAGE},
}


# options whose defaults differ between scripts: `SourceOptions.script_defaults`
SCRIPT_DEPENDENT_OPTIONS = (
    *DENOISE_OPTIONS,
    "v2v_noise_mode",
    "v2v_pad_mode",
    "v2v_extra_noise",
    "i2_extra_noise",
)


@dataclass(frozen=True)
class SourceDefaults:
    """Per-family defaults of the options for starting from a video or an image."""

    denoise_option: str = "v2v_denoise"  # of DENOISE_OPTIONS: the name that the script's users know
    denoise: float = 0.5
    pad_mode: str | None = "end"  # None: a short video is refused
    takes_image: bool = True  # whether there is an --i2i_path
    takes_video: bool = True  # whether there is a --video_path

    def declared(self) -> dict[str, Any]:
        """Return keyword arguments for `add_options`, which fit `SourceOptions` to what a script can do."""
        refused = {} if self.takes_image else {"i2i_path": _NO_IMAGE}
        refused |= {} if self.takes_video else dict.fromkeys(("video_path", "v2v_pad_mode"), _NO_VIDEO)
        denoise_flags = tuple(dict.fromkeys((f"--{self.denoise_option}", *SPELLINGS)))
        unused_denoise_option = next(name for name in DENOISE_OPTIONS if name != self.denoise_option)
        rejected_if_short = {"v2v_pad_mode": {"help": f"{_PAD}; default: it is refused"}}
        defaults = {
            self.denoise_option: self.denoise,
            "v2v_pad_mode": self.pad_mode if self.takes_video else None,
        }
        return {
            "refused": refused,
            "settings": {
                self.denoise_option: {"flags": denoise_flags},
                **({} if self.pad_mode else rejected_if_short),
            },
            "defaults": defaults,
            "without": (unused_denoise_option,)
            if self.takes_image
            else (unused_denoise_option, "i2_extra_noise"),
        }


class SourceOptions(Options, title="video or image to start from"):
    """Options for the video or image that generation starts from; a prompt line can override them."""

    video_path: Path | None = option(
        "video, or folder of images, to start from instead of noise",
        excludes=("i2i_path", "from_latent"),
    )
    i2i_path: Path | None = option("image to make another image from", excludes="from_latent")
    from_latent: Path | None = option(
        "latent file of an earlier run (--output_type latent or both) to start from"
    )
    # None: the script has the other of DENOISE_OPTIONS
    strength: float | None = option(_SHARE, minimum=0, maximum=1, hint="a fraction of the steps")
    v2v_denoise: float | None = option(_SHARE, minimum=0, maximum=1, hint="a fraction of the steps")
    v2v_noise_mode: str = option(
        "traditional: the value is a fraction of the steps; direct: it is the noise level of the first step",
        default="traditional",
        choices=("traditional", "direct"),
        flags=("--v2v_noise_mode", "--noise_mode"),
    )
    v2v_pad_mode: str | None = option(
        _PAD,
        choices=("front", "end"),
    )
    v2v_extra_noise: float | None = option(
        "noise added to the noisy video, for more change",
        flags=("--v2v_extra_noise", "--v2_extra_noise"),
        minimum=0,
        maximum=MAX_NOISE,
        hint=DEFAULT_NOISE,
    )
    i2_extra_noise: float | None = option(
        "noise added to the noisy image of --i2i_path", minimum=0, maximum=MAX_NOISE, hint=DEFAULT_NOISE
    )
    # the script's defaults, by option
    script_defaults: Mapping[str, Any] = option(name="usual_sources", default={})

    @property
    def denoise_option(self) -> str:
        """Name of the denoising strength option for a source."""
        return "v2v_denoise" if self.strength is None else "strength"

    @property
    def denoise(self) -> float:
        """Return the denoising strength, 0 to 1; the default is 1."""
        strength = getattr(self, self.denoise_option)
        return 1.0 if strength is None else strength


def check_one_source(paths: Mapping[str, object]) -> None:
    """Raise OptionError if more than one of the options in SOURCES is set."""
    typed_flags = [f"--{name} {paths[name]}" for name in SOURCES if paths.get(name)]
    if len(typed_flags) > 1:
        raise OptionError(f"{' and '.join(typed_flags)}: a video starts from one of them. Omit the others")


def check_denoise(option: str, denoise: float) -> None:
    """Raise OptionError unless `denoise`, the value of `option`, is between 0 and 1."""
    if not 0 <= denoise <= 1:
        raise OptionError(f"{option} {denoise:g}: pass a fraction of the steps, from 0 to 1")

"""Options of references (IC-LoRA): clips and images that a clip is made from. Standard library only."""

from pathlib import Path

from modules.errors import OptionError
from modules.option_values import to_path
from modules.options import HABIT, REQUEST_SETTING, Options, option

MAX_REFERENCES = 8  # references of a clip
# keys in the metadata of a LoRA, the newer name last. Source: the trainer of LTX-2
FRAMES = "reference_frames"  # in options, and in the metadata of our LoRAs
SIZE_FACTOR = ("reference_downscale_factor", "reference_spatial_scale_factor")
TIME_FACTOR = ("reference_temporal_scale_factor",)


class Ltx2ReferenceOptions(Options, title="references (IC-LoRA)"):
    """Reduction of the size of references, in caching and training."""

    reference_downscale: int = option(
        "factor by which the sides of references are smaller than their clip's",
        default=1,
        minimum=1,
        facts=HABIT,
    )
    reference_temporal_scale: int = option(
        "take the first frame of references, and then every Nth", default=1, minimum=1, facts=HABIT
    )
    reference_frames: int | None = option(
        "frames of a reference at most, made 8n + 1; 1: its first; default: those of its clip",
        minimum=1,
        facts=HABIT,
    )

    def command_options(self) -> dict[str, int | None]:
        """Return these options by command-line name; those with default values are None."""
        size, time = self.reference_downscale, self.reference_temporal_scale
        return {
            "--reference_downscale": size if size > 1 else None,
            "--reference_temporal_scale": time if time > 1 else None,
            "--reference_frames": self.reference_frames,
        }


class Ltx2GivenReferences(Options, title="references (IC-LoRA)"):
    """IC-LoRA references of a generation."""

    reference_video: Path | None = option(
        "reference clip, folder of images or image for the video, with an IC-LoRA",
        flags=("--reference-video",),
        place="there",
        facts=REQUEST_SETTING,
    )
    reference_videos: tuple[Path, ...] | None = option(
        "several of them, for a LoRA that was trained with several",
        place="there",
        facts=REQUEST_SETTING,
        nargs="+",
    )
    reference_downscale: int | None = option(
        "factor by which their sides are smaller; default: as the LoRA's metadata says, else 1",
        minimum=1,
    )
    reference_temporal_scale: int | None = option(
        "take their first frame, and then every Nth; default: the same", minimum=1
    )
    reference_frames: int | None = option(
        "frames of a reference at most; default: as the LoRA's metadata says, else those of the video",
        minimum=1,
    )
    reference_strength: float = option(
        "1: references stay clean; below 1: only this fraction of them is kept, and they are denoised with "
        "the video",
        default=1.0,
        minimum=0,
        maximum=1,
        facts=REQUEST_SETTING,
    )
    video_conditioning: tuple[str, ...] | None = option(
        "FILE STRENGTH: as --reference_video with --reference_strength; may be given again",
        flags=("--video-conditioning",),
        action="extend",
        facts=REQUEST_SETTING,
    )
    conditioning_attention_mask: tuple[str, ...] | None = option(
        "[FILE] STRENGTH: how much video and references attend to each other, 0 to 1; a gray image or "
        "clip sets it by position: white is STRENGTH, black 0",
        flags=("--conditioning-attention-mask",),
        nargs="+",
        facts=REQUEST_SETTING,
    )

    @property
    def paths(self) -> tuple[Path, ...]:
        """Return the paths of all references, in the order of the options."""
        first = () if self.reference_video is None else (self.reference_video,)
        files = (self.video_conditioning or ())[::2]
        conditions = (to_path("--video-conditioning", file) for file in files)
        return (*first, *(self.reference_videos or ()), *conditions)

    @property
    def strength(self) -> float:
        """Return the strength that all references share; raise OptionError if strengths differ."""
        individual = self._individual_strengths()
        strengths = set(individual)
        # --reference_strength is for references without an individual strength
        all_have_strengths = individual and len(individual) == len(self.paths)
        if self.reference_strength != 1 or not all_have_strengths:
            strengths.add(self.reference_strength)
        if len(strengths) > 1:
            listed = " and ".join(f"{strength:g}" for strength in sorted(strengths))
            raise OptionError(
                f"references of strength {listed}: all references of a clip need the same strength"
            )
        return strengths.pop()

    def _individual_strengths(self) -> list[float]:
        """Return the strengths in --video-conditioning, in which files and strengths alternate."""
        words = self.video_conditioning or ()
        try:
            strengths = [float(text) for text in words[1::2]]
            if len(words) % 2 or not all(0 <= strength <= 1 for strength in strengths):
                raise ValueError
        except ValueError:
            typed = f"--video-conditioning {' '.join(words)}"
            raise OptionError(f"{typed}: pass a file and its strength, from 0 to 1") from None
        return strengths

    @property
    def attention(self) -> tuple[Path | None, float]:
        """Return the mask file, or None, and the strength of attention between video and references."""
        *file, number = self.conditioning_attention_mask or ("1",)
        try:
            strength = float(number)
            if len(file) > 1 or not 0 <= strength <= 1:
                raise ValueError
        except ValueError:
            typed = f"--conditioning-attention-mask {' '.join([*file, number])}"
            raise OptionError(f"{typed}: pass a strength from 0 to 1, and before it a file or none") from None
        return to_path("--conditioning-attention-mask", file[0]) if file else None, strength

    def __post_init__(self) -> None:
        _ = self.strength, self.attention
        if len(self.paths) > MAX_REFERENCES:
            raise OptionError(
                f"--reference_videos: {len(self.paths)} references, but at most {MAX_REFERENCES} are "
                "supported"
            )

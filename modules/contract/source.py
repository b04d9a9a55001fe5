"""Sources that denoising may start from instead of noise: another video, an image, or saved latents. Standard
library only.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

VIDEO, IMAGE, LATENTS = "video_path", "i2i_path", "from_latent"  # the options that name it
SOURCES = (VIDEO, IMAGE, LATENTS)  # a video starts from one of them at most


@dataclass(frozen=True)
class Source:
    """The source of a request, and how much of it is made anew."""

    option: str  # VIDEO, IMAGE or LATENTS
    path: Path
    denoise: float  # 0..1; 1 keeps nothing of it where the schedule begins with pure noise
    share: str = "strength"  # the option that says so, for messages and metadata
    # "traditional": `denoise` is a share of the steps; "direct": the noise level of the first step
    noise_mode: str = "traditional"
    pad_mode: str | None = None  # how a short video is filled up, "front" or "end"; None: it is refused
    extra_noise: float = 0.0  # added to the mixture with noise

    @property
    def extra_option(self) -> str:
        """The option of the extra noise."""
        return "i2_extra_noise" if self.option == IMAGE else "v2v_extra_noise"

    @property
    def needs_vae(self) -> bool:
        """Whether it has to be encoded."""
        return self.option != LATENTS

    def in_words(self) -> Mapping[str, object]:
        """Return its metadata for outputs, by the names of the options."""
        said: dict[str, object] = {self.option: self.path.name, self.share: self.denoise}
        said["v2v_noise_mode"] = self.noise_mode
        if self.option == VIDEO and self.pad_mode is not None:
            said["v2v_pad_mode"] = self.pad_mode
        if self.extra_noise:
            said[self.extra_option] = self.extra_noise
        return said


@dataclass(frozen=True)
class SourceRules:
    """How a family reads a video's source."""

    takes: tuple[str, ...]  # of VIDEO, IMAGE, LATENTS
    who: str  # that takes it, for messages: "--task t2v-14B"
    stretches: bool  # frames are stretched to the size, bicubic; else scaled to cover it, and cropped
    latents_of: frozenset[str]  # models, as outputs name them, whose latents are in the same space

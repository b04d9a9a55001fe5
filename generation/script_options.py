"""What the shared options are in one family's script. Standard library only."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from blissful_tuner.video_to_video_options import SourceDefaults
from generation.prompt_lines import GENERATION_OPTIONS, LineOption

PICTURE_OUTPUTS = ("images", "latent", "latent_images")  # output types of a script that makes pictures
PICTURE_FPS = 1  # what stands where a video has its rate
# --optimized, of every family
FASTER: Mapping[str, Any] = {"attn_mode": "sageattn", "compile": True, "fp8_scaled": True}


@dataclass(frozen=True)
class ScriptDefaults:
    """Defaults of the shared options in one family's script, and which of them the script has.

    None means the task's default, unless the field says otherwise.
    """

    fps: int
    guidance_scale: float | None = None
    video_length: int | None = None
    infer_steps: int | None = None
    flow_shift: float | None = None
    sample_solver: str = "unipc"
    # names of --scheduler -> those of --sample_solver; empty: there is no --scheduler
    solver_names: Mapping[str, str] = field(default_factory=dict)
    embedded_guidance: float | None = None  # None: no such option
    # the image and video inputs that the script accepts
    media: frozenset[str] = frozenset({"image_path", "end_image_path", "control_path"})
    source: SourceDefaults = SourceDefaults()  # of video-to-video
    joins_guidance: bool = False  # the passes of guidance are one batch, unless --split_uncond
    blocks_to_swap: int | None = 0
    has_second_prompt: bool = False  # whether there is a --prompt_2
    has_length: bool = True  # whether there is a --video_length
    size: tuple[int, int] = (256, 256)  # height, width
    pictures: bool = False  # the script makes single pictures; what only videos have is refused by name
    has_experts: bool = False  # whether there are models with two experts, and options for them
    noise_on_cpu: bool = False  # always, so that there is no --cpu_noise
    # options of the family -> their names in Request.extra
    extras: Mapping[str, str] = field(default_factory=dict)
    # options of a prompt line, by letter
    line_options: Mapping[str, LineOption] = field(default_factory=lambda: GENERATION_OPTIONS)
    output_types: tuple[str, ...] = ("video", "images", "latent", "both")  # the first is the default
    # rotary frequencies of the frames that --riflex_index counts; None: no such option
    riflex_frequencies: int | None = None
    riflex_beyond: int = 0  # frames: videos of up to so many are left as they are
    in_sections: bool = False  # videos are made section by section and can be watched while they grow
    numbers_single: bool = False  # a single picture is NAME_000.png, never in a folder
    # what --optimized turns on
    optimized: Mapping[str, Any] = field(default_factory=lambda: {**FASTER, "fp8_fast": True})

"""Options of LECO, which learns from prompts alone. Standard library only."""

from pathlib import Path

from modules.options import HABIT, HABIT_BY_NAME, option
from training.features.contract import AT_NETWORK, FeatureOptions


class LecoOptions(FeatureOptions, title="prompts in place of images (LECO)", at=AT_NETWORK, facts=HABIT):
    """Options of LECO: the prompts file, and how latents are denoised before each training step."""

    prompts_file: Path | None = option(
        "TOML or YAML file of prompts to erase, enhance or slide between, without images. Each step denoises "
        "noise up to a random step first",
        place="there",
        often=False,
        facts=HABIT_BY_NAME,
    )
    max_denoising_steps: int = option(
        "steps of the schedule by which latents are made",
        default=40,
        minimum=2,
        maximum=1000,
        needs="prompts_file",
    )
    leco_denoise_guidance_scale: float = option(
        "guidance scale while latents are made",
        default=3.0,
        minimum=0,
        maximum=100,
        needs="prompts_file",
        hint="3 is usual",
    )
    leco_walk_gradients: bool = option(
        "also learn through the steps that make the latents, as sd-scripts does; takes many times the memory",
        needs="prompts_file",
    )

    @property
    def path(self) -> Path:
        """Path of --prompts_file, for code that runs only if the option is set."""
        assert self.prompts_file is not None  # the feature is on
        return self.prompts_file

"""Options of making a clip in two stages. Standard library only."""

from pathlib import Path

from modules.errors import OptionError
from modules.option_values import to_path
from modules.options import REQUEST_SETTING, Options, option

_STAGES, _LORA = "sample_two_stage", "distilled_lora_path"


class Ltx2StageOptions(Options, title="two stages"):
    """Generate a small clip first; enlarge it with an upscaler and refine it in a few steps."""

    sample_two_stage: bool = option(
        "generate clips in two stages: smaller ones with all steps and guidance, whose latents are "
        "then enlarged and refined in a few steps without guidance. Size, length and rate are those of "
        "the result"
    )
    spatial_upsampler_path: Path | None = option(
        "latent upscaler of the video, such as ltx-2.3-spatial-upscaler-x2-1.1.safetensors",
        flags=("--spatial-upsampler-path",),
        place="there",
        ignored_without=_STAGES,
    )
    temporal_upsampler_path: Path | None = option(
        "latent upscaler that doubles the frames: the first stage then has half of them, at half the rate",
        place="there",
        ignored_without=_STAGES,
    )
    distilled_lora_path: Path | None = option(
        "LoRA for few steps, which the second stage uses", place="there", ignored_without=_STAGES
    )
    sample_stage2_steps: int = option(
        "steps of the second stage; 3 use the released noise levels, other numbers are spread along these",
        default=3,
        minimum=1,
        maximum=1000,
        ignored_without=_STAGES,
    )
    sample_stage1_distilled_lora_multiplier: float | None = option(
        f"strength of --{_LORA} in the first stage; default: 0", ignored_without=_LORA
    )
    sample_stage2_distilled_lora_multiplier: float | None = option(
        f"strength of --{_LORA} in the second stage; default: 1", ignored_without=_LORA
    )

    def __post_init__(self) -> None:
        if self.sample_two_stage and not (self.spatial_upsampler_path or self.temporal_upsampler_path):
            raise OptionError("--sample_two_stage: pass --spatial_upsampler_path, which enlarges clips")

    @property
    def lora(self) -> tuple[Path | None, float, float]:
        """Return the LoRA's path and its strength in each of the two stages."""
        second = self.sample_stage2_distilled_lora_multiplier
        first = self.sample_stage1_distilled_lora_multiplier or 0.0
        return self.distilled_lora_path, first, 1.0 if second is None else second


class Ltx2OfficialStages(Ltx2StageOptions, title="two stages"):
    """The options of the stages, also by their names in the official scripts."""

    distilled_lora: tuple[str, ...] | None = option(
        f"FILE [STRENGTH]: as --{_LORA} with --sample_stage2_distilled_lora_multiplier",
        flags=("--distilled-lora",),
        excludes=(_LORA, "sample_stage2_distilled_lora_multiplier"),
        ignored_without=_STAGES,
        facts=REQUEST_SETTING,
    )
    skip_stage_2: bool = option(
        "stop after the first stage", flags=("--skip-stage-2",), ignored_without=_STAGES
    )
    # files of --lora_weight that only the first stage has (IC-LoRAs), with their strengths
    first_loras: tuple[tuple[Path, float], ...] = option(default=())

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.lora

    @property
    def lora(self) -> tuple[Path | None, float, float]:
        """Return the LoRA and its strength in each stage; --distilled-lora sets only the second strength.

        Raises OptionError if --distilled-lora is invalid.
        """
        path, first_strength, second_strength = super().lora
        if self.distilled_lora is None:
            return path, first_strength, second_strength
        file, *strengths = self.distilled_lora
        try:
            (strength,) = map(float, strengths or ["1"])
        except ValueError:
            typed = " ".join(self.distilled_lora)
            raise OptionError(
                f"--distilled-lora {typed}: pass a file, and a strength if it is not 1"
            ) from None
        path = to_path("--distilled-lora", file)
        if not path.exists():
            raise OptionError(f"--distilled-lora {file}: no such file. Correct the path")
        return path, first_strength, strength

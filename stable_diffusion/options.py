"""All options of gen_img.py. Standard library only."""

from collections.abc import Sequence

from modules.console_options import ConsoleOptions
from modules.errors import OptionError
from modules.options import Options, option
from modules.parser import parse_options
from stable_diffusion.control_options import ControlOptions, GuideOptions, check_control
from stable_diffusion.model_options import ModelOptions
from stable_diffusion.network_options import AddedNetworkOptions
from stable_diffusion.prompt_options import PictureInputOptions, PictureOutputOptions, TextOptions
from stable_diffusion.sampling_options import SamplingOptions, check_sampler_steps
from stable_diffusion.shrink_options import DeepShrinkOptions, GradualLatentOptions, HighresOptions


class GenImgOptions(Options, title="run"):
    """All options of gen_img.py."""

    model: ModelOptions
    prompts: PictureInputOptions
    sampling: SamplingOptions
    output: PictureOutputOptions
    text: TextOptions
    networks: AddedNetworkOptions
    control: ControlOptions
    guides: GuideOptions
    highres: HighresOptions
    deep_shrink: DeepShrinkOptions
    gradual_latent: GradualLatentOptions
    console: ConsoleOptions
    device: str | None = option("cuda, cuda:1, mps or cpu; default: the best available")

    def __post_init__(self) -> None:
        if self.text.clip_vision_strength is not None and self.prompts.image_path is None:
            raise OptionError("--clip_vision_strength needs --image_path, the picture that CLIP sees")
        if self.output.use_original_file_name and self.prompts.image_path is None:
            raise OptionError("--use_original_file_name needs --image_path, whose names are used")
        if self.highres.highres_fix_scale is not None and self.prompts.image_path is not None:
            raise OptionError(
                "--highres_fix_scale makes pictures from text in two stages, --image_path makes them from a "
                "picture. Leave one out"
            )
        if self.networks.network_regional_mask_max_color_codes is not None and not self.prompts.mask_path:
            raise OptionError(
                "--network_regional_mask_max_color_codes needs --mask_path, whose colours it explains"
            )
        check_control(
            self.control,
            self.prompts.guide_image_path,
            shrinks=self.deep_shrink.ds_depth_1 is not None,
            compared_by=self.guides.picture_option,
        )
        if self.text.XTI_embeddings and self.control.uses:
            raise OptionError(
                f"--XTI_embeddings and {self.control.flag} do not work together: a ControlNet takes one "
                "text for all of its layers. Leave one of them out"
            )
        if self.guides.picture_option is not None and self.highres.highres_fix_disable_control_net:
            raise OptionError(
                f"--highres_fix_disable_control_net with {self.guides.picture_option}: there are no "
                "ControlNets to leave out. Leave it out"
            )
        if self.highres.highres_fix_scale is not None:
            check_sampler_steps("--highres_fix_steps", self.sampling.sampler, self.highres.highres_fix_steps)
        elif self.prompts.image_path is None:
            check_sampler_steps("--steps", self.sampling.sampler, self.sampling.steps)
        if self.gradual_latent.gradual_latent_timesteps is not None and not self.sampling.sampler.endswith(
            "euler_a"
        ):
            raise OptionError(
                f"--gradual_latent_timesteps with --sampler {self.sampling.sampler}: Gradual Latent works "
                "with --sampler euler_a only"
            )


def read_gen_img(description: str | None, argv: Sequence[str] | None) -> GenImgOptions:
    """Parse a command line of gen_img.py. Raises OptionError."""
    options: GenImgOptions
    (options,) = parse_options(description, argv, GenImgOptions)
    return options

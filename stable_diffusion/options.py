"""All options of gen_img.py. Standard library only."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from modules.console_options import ConsoleOptions
from modules.errors import OptionError
from modules.options import read_options
from modules.parser import Parser, add_options
from stable_diffusion.control_options import ControlOptions, add_control_arguments, check_control
from stable_diffusion.guide_options import GuideOptions, add_guide_arguments
from stable_diffusion.highres_options import HighresOptions, add_highres_arguments
from stable_diffusion.model_options import ModelOptions, add_model_arguments
from stable_diffusion.network_options import AddedNetworkOptions, add_network_arguments
from stable_diffusion.output_options import PictureOutputOptions, add_output_arguments
from stable_diffusion.prompt_options import PictureInputOptions, add_prompt_arguments
from stable_diffusion.sampling_options import SamplingOptions, add_sampling_arguments, check_sampler_steps
from stable_diffusion.shrink_options import DeepShrinkOptions, GradualLatentOptions, add_shrink_arguments
from stable_diffusion.text_options import TextOptions, add_text_arguments


@dataclass(frozen=True)
class GenImgOptions:
    """All options of gen_img.py."""

    model: ModelOptions
    prompts: PictureInputOptions
    sampling: SamplingOptions
    text: TextOptions
    networks: AddedNetworkOptions
    control: ControlOptions
    guides: GuideOptions
    highres: HighresOptions
    deep_shrink: DeepShrinkOptions
    gradual_latent: GradualLatentOptions
    output: PictureOutputOptions
    console: ConsoleOptions
    device: str | None

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
        if self.deep_shrink.ds_depth_1 is None and self.deep_shrink.ds_depth_2 is not None:
            raise OptionError("--ds_depth_2 is where Deep Shrink acts after --ds_depth_1, which is missing")
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
                f"--XTI_embeddings and {self.control.option} do not work together: a ControlNet takes one "
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


def gen_img_parser(description: str | None) -> argparse.ArgumentParser:
    """Return the parser of gen_img.py."""
    parser = Parser(description=description)
    add_model_arguments(parser)
    add_prompt_arguments(parser)
    add_sampling_arguments(parser)
    add_output_arguments(parser)
    add_text_arguments(parser)
    add_network_arguments(parser)
    add_control_arguments(parser)
    add_guide_arguments(parser)
    add_highres_arguments(parser)
    add_shrink_arguments(parser)
    add_options(parser, ConsoleOptions)
    group = parser.add_argument_group("run")
    group.add_argument("--device", help="cuda, cuda:1, mps or cpu; default: the best available")
    return parser


def read_gen_img(description: str | None, argv: Sequence[str] | None) -> GenImgOptions:
    """Parse a command line of gen_img.py. Raises OptionError."""
    parser = gen_img_parser(description)
    args = parser.parse_args(argv)
    return read_options(GenImgOptions, args)

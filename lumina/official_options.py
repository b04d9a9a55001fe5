"""The image guides' command line for Lumina-Image-2.0, in the words of lumina_generate_image.py.

Standard library only.
"""

from collections.abc import Sequence
from pathlib import Path

from lumina.options import CFG_TRUNC_RATIO, DEFAULT_TOKENS, RENORM_CFG, check_renorm, check_trunc_ratio
from modules.minimal_options import MAX_SIDE, MinimalLoraOptions
from modules.option_values import option_argv
from modules.options import Options, option
from modules.script_options import parse_options

SIZE_STEP = 16


class LuminaModelOptions(MinimalLoraOptions, title="model"):
    """The files of lumina_minimal_inference.py, and how they compute."""

    pretrained_model_name_or_path: Path = option("transformer checkpoint", required=True)
    gemma2_path: Path = option("Gemma 2 (2B) text encoder", required=True)
    ae_path: Path = option("the autoencoder, FLUX's", required=True)
    dtype: str = option("dtype of the transformer", default="bf16")
    gemma2_dtype: str = option("dtype of the text encoder", default="bf16")
    ae_dtype: str = option("dtype of the autoencoder", default="bf16")
    device: str | None = option("default: a GPU if there is one")
    use_flash_attn: bool = option("FlashAttention 2", excludes="use_sage_attn")
    use_sage_attn: bool = option("SageAttention")


class LuminaImageOptions(Options, title="what to make"):
    """The image that lumina_minimal_inference.py generates."""

    prompt: str = option("what the image shows", default="A beautiful sunset over the mountains")
    negative_prompt: str = option("what to avoid", default="")
    output_dir: Path = option("output folder", default=Path("outputs"))
    seed: int | None = option("default: a random one")
    steps: int = option("number of denoising steps", default=36)
    guidance_scale: float = option("1 turns guidance off", default=3.5)
    image_width: int = option(
        "in pixels; cut to a multiple of 16", default=1024, minimum=SIZE_STEP, maximum=MAX_SIDE
    )
    image_height: int = option(
        "in pixels; cut to a multiple of 16", default=1024, minimum=SIZE_STEP, maximum=MAX_SIDE
    )
    system_prompt: str = option("instruction before every prompt", default="")
    add_system_prompt_to_negative_prompt: bool = option("before negative prompts too")
    gemma2_max_token_length: int = option("tokens of a prompt that are read", default=DEFAULT_TOKENS)
    discrete_flow_shift: float = option("time shift of the schedule", default=6.0)
    cfg_trunc_ratio: float = option(
        "leave guidance out once the noisy image contains this share of data", default=CFG_TRUNC_RATIO
    )
    renorm_cfg: float = option("largest norm of a guided prediction; 0: no limit", default=RENORM_CFG)
    interactive: bool = option("ask for prompts; quit ends")

    def __post_init__(self) -> None:
        check_trunc_ratio(self.cfg_trunc_ratio, "--cfg_trunc_ratio")
        check_renorm(self.renorm_cfg, "--renorm_cfg")

    @property
    def size(self) -> tuple[int, int]:
        """Return height and width in pixels, rounded down to multiples of 16."""
        return self.image_height // SIZE_STEP * SIZE_STEP, self.image_width // SIZE_STEP * SIZE_STEP


class LuminaMinimalOptions(Options):
    """Options of lumina_minimal_inference.py."""

    model: LuminaModelOptions
    image: LuminaImageOptions


def read_minimal(description: str | None, argv: Sequence[str] | None) -> LuminaMinimalOptions:
    """Read the command line. Raises OptionError for options that are not supported."""
    (options,) = parse_options(description, argv, LuminaMinimalOptions)
    return options


# options of lumina_generate_image.py -> as they are typed here
TYPED = {
    "--gemma2": "--gemma2_path",
    "--ae": "--ae_path",
    "--save_path": "--output_dir",
    "--infer_steps": "--steps",
    "--flow_shift": "--discrete_flow_shift",
    "--dit_dtype": "--dtype",
    "--text_encoder_dtype": "--gemma2_dtype",
    "--vae_dtype": "--ae_dtype",
    "--image_size": "--image_height and --image_width,",
}


def translate_to_generation_argv(options: LuminaMinimalOptions) -> list[str]:
    """Return the arguments of lumina_generate_image.py that are equivalent to these options."""
    model, image = options.model, options.image
    values = {
        "--pretrained_model_name_or_path": model.pretrained_model_name_or_path,
        "--gemma2": model.gemma2_path,
        "--ae": model.ae_path,
        "--negative_prompt": image.negative_prompt,
        "--save_path": image.output_dir,
        "--infer_steps": image.steps,
        "--guidance_scale": image.guidance_scale,
        "--flow_shift": image.discrete_flow_shift,
        "--dit_dtype": model.dtype,
        "--text_encoder_dtype": model.gemma2_dtype,
        "--vae_dtype": model.ae_dtype,
        "--system_prompt": image.system_prompt,
        "--gemma2_max_token_length": image.gemma2_max_token_length,
        "--cfg_trunc_ratio": image.cfg_trunc_ratio,
        "--renorm_cfg": image.renorm_cfg,
        "--seed": image.seed,
        "--device": model.device,
        "--prompt": None if image.interactive else image.prompt,
        "--add_system_prompt_to_negative_prompt": image.add_system_prompt_to_negative_prompt,
        "--interactive": image.interactive,
        "--attn_mode=flash": model.use_flash_attn,
        "--attn_mode=sageattn": model.use_sage_attn,
        "--image_size": image.size,
        **model.lora_options,
    }
    return option_argv(values)

"""The image guides' command line for Lumina-Image-2.0, in the words of lumina_generate_image.py.

Standard library only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lumina.options import CFG_TRUNC_RATIO, MAX_TOKENS, RENORM_CFG, check_renorm, check_trunc_ratio
from modules.errors import OptionError
from modules.minimal_options import (
    add_lora_arguments,
    add_offload_argument,
    check_side,
    lora_words,
    option_words,
    read_minimal_options,
    read_strengths,
)
from modules.parser import Parser

SIZE_STEP = 16


@dataclass(frozen=True)
class LuminaMinimalOptions:
    """Options of lumina_minimal_inference.py."""

    pretrained_model_name_or_path: Path
    gemma2_path: Path
    ae_path: Path
    prompt: str
    negative_prompt: str
    output_dir: Path
    seed: int | None
    steps: int
    guidance_scale: float
    image_width: int
    image_height: int
    dtype: str
    gemma2_dtype: str
    ae_dtype: str
    device: str | None
    system_prompt: str
    add_system_prompt_to_negative_prompt: bool
    gemma2_max_token_length: int
    discrete_flow_shift: float
    cfg_trunc_ratio: float
    renorm_cfg: float
    use_flash_attn: bool
    use_sage_attn: bool
    lora_weights: tuple[str, ...]
    interactive: bool

    def __post_init__(self) -> None:
        for option, side in (("--image_width", self.image_width), ("--image_height", self.image_height)):
            check_side(option, side, least=SIZE_STEP)
        if self.use_flash_attn and self.use_sage_attn:
            raise OptionError(
                "--use_flash_attn and --use_sage_attn both choose the attention: give one of them"
            )
        check_trunc_ratio(self.cfg_trunc_ratio, "--cfg_trunc_ratio")
        check_renorm(self.renorm_cfg, "--renorm_cfg")
        _ = self.loras

    @property
    def loras(self) -> list[tuple[str, float]]:
        """Return path and strength of each LoRA, given as `path` or `path;strength`."""
        return read_strengths(self.lora_weights)

    @property
    def size(self) -> tuple[int, int]:
        """Return height and width, cut to what the model makes."""
        return self.image_height // SIZE_STEP * SIZE_STEP, self.image_width // SIZE_STEP * SIZE_STEP


def read_minimal(description: str | None, argv: Sequence[str] | None) -> LuminaMinimalOptions:
    """Read the command line. Raises OptionError for what does not work here."""
    parser = Parser(description=description)
    _add_model_arguments(parser)
    _add_picture_arguments(parser)
    return read_minimal_options(parser, LuminaMinimalOptions, argv)


def generation_words(options: LuminaMinimalOptions) -> list[str]:
    """Return the same command as options of lumina_generate_image.py."""
    height, width = options.size
    values = {
        "--pretrained_model_name_or_path": options.pretrained_model_name_or_path,
        "--gemma2": options.gemma2_path,
        "--ae": options.ae_path,
        "--negative_prompt": options.negative_prompt,
        "--save_path": options.output_dir,
        "--infer_steps": options.steps,
        "--guidance_scale": options.guidance_scale,
        "--flow_shift": options.discrete_flow_shift,
        "--dit_dtype": options.dtype,
        "--text_encoder_dtype": options.gemma2_dtype,
        "--vae_dtype": options.ae_dtype,
        "--system_prompt": options.system_prompt,
        "--gemma2_max_token_length": options.gemma2_max_token_length,
        "--cfg_trunc_ratio": options.cfg_trunc_ratio,
        "--renorm_cfg": options.renorm_cfg,
        "--seed": options.seed,
        "--device": options.device,
        "--prompt": None if options.interactive else options.prompt,
    }
    switches = {
        "--add_system_prompt_to_negative_prompt": options.add_system_prompt_to_negative_prompt,
        "--interactive": options.interactive,
        "--attn_mode=flash": options.use_flash_attn,
        "--attn_mode=sageattn": options.use_sage_attn,
    }
    size = ["--image_size", str(height), str(width)]
    return [*option_words(values, switches), *size, *lora_words(options.loras)]


def _add_model_arguments(parser: Parser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--pretrained_model_name_or_path", type=str, required=True, help="transformer checkpoint"
    )
    group.add_argument("--gemma2_path", type=str, required=True, help="Gemma 2 (2B) text encoder")
    group.add_argument("--ae_path", type=str, required=True, help="the autoencoder, FLUX's")
    for name, what in (("", "transformer"), ("gemma2_", "text encoder"), ("ae_", "autoencoder")):
        group.add_argument(f"--{name}dtype", type=str, default="bf16", help=f"dtype of the {what}")
    group.add_argument("--device", type=str, default=None, help="default: a GPU if there is one")
    add_offload_argument(group)
    group.add_argument("--use_flash_attn", action="store_true", help="FlashAttention 2")
    group.add_argument("--use_sage_attn", action="store_true", help="SageAttention")
    add_lora_arguments(group)


def _add_picture_arguments(parser: Parser) -> None:
    group = parser.add_argument_group("what to make")
    group.add_argument(
        "--prompt", type=str, default="A beautiful sunset over the mountains", help="what the picture shows"
    )
    group.add_argument("--negative_prompt", type=str, default="", help="what to avoid")
    group.add_argument("--output_dir", type=str, default="outputs", help="output folder")
    group.add_argument("--seed", type=int, default=None, help="default: a random one")
    group.add_argument("--steps", type=int, default=36, help="number of denoising steps")
    group.add_argument("--guidance_scale", type=float, default=3.5, help="1 turns guidance off")
    for side in ("width", "height"):
        group.add_argument(
            f"--image_{side}", type=int, default=1024, help="in pixels; cut to a multiple of 16"
        )
    group.add_argument("--system_prompt", type=str, default="", help="instruction before every prompt")
    group.add_argument(
        "--add_system_prompt_to_negative_prompt", action="store_true", help="before negative prompts too"
    )
    group.add_argument(
        "--gemma2_max_token_length", type=int, default=MAX_TOKENS, help="tokens of a prompt that are read"
    )
    group.add_argument("--discrete_flow_shift", type=float, default=6.0, help="time shift of the schedule")
    group.add_argument(
        "--cfg_trunc_ratio",
        type=float,
        default=CFG_TRUNC_RATIO,
        help="share of data in the noisy picture from which on guidance is left out",
    )
    group.add_argument(
        "--renorm_cfg",
        type=float,
        default=RENORM_CFG,
        help="largest norm of a guided prediction; 0: no limit",
    )
    group.add_argument("--interactive", action="store_true", help="ask for prompts; quit ends")

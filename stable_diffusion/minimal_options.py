"""The command line of inpainting_minimal_inference.py, translated to gen_img.py's. Standard library only."""

from collections.abc import Sequence
from pathlib import Path

from modules.minimal_options import MinimalLoraOptions
from modules.option_values import check_path, check_seed, option_argv
from modules.options import Options, option
from modules.script_options import parse_options
from stable_diffusion.sampling_options import LARGEST_SIDE, MAX_STEPS, STEPS_HINT

SIDE_STEP = 64  # pixels
# options of gen_img.py -> spelling in this script
TYPED = {
    "--ckpt": "--ckpt_path",
    "--image_path": "--image",
    "--mask_path": "--mask",
    "--outdir": "--output_dir",
    "--scale": "--guidance_scale",
    "--network_weights": "--lora_weights",
    "--W": "--width",
    "--H": "--height",
}


class InpaintingModelOptions(MinimalLoraOptions, title="model"):
    """Checkpoint and precision for inpainting_minimal_inference.py."""

    ckpt_path: Path = option("checkpoint of Stable Diffusion 1.x, 2.x or XL", required=True, place="there")
    sdxl: bool = option("the checkpoint is Stable Diffusion XL; read from the file if not given")
    tokenizer_cache_dir: Path | None = option("folder with the files of the tokenizers, as for gen_img.py")
    fp16: bool = option("compute in float16; else in float32", excludes="bf16")
    bf16: bool = option("compute in bfloat16; else in float32")


class InpaintingImageOptions(Options, title="what to make"):
    """Prompt, input image and mask of inpainting_minimal_inference.py."""

    image: Path = option("image to repaint", required=True)
    mask: Path | None = option(
        "image whose white parts are repainted; default: a wavy ellipse that the seed draws"
    )
    prompt: str = option("what the image shows; weights and options as in lines of gen_img.py", default="")
    negative_prompt: str = option("what to avoid", default="")
    width: int = option(
        "in pixels; cut to a multiple of 64", default=512, minimum=SIDE_STEP, maximum=LARGEST_SIDE
    )
    height: int = option(
        "in pixels; cut to a multiple of 64", default=512, minimum=SIDE_STEP, maximum=LARGEST_SIDE
    )
    steps: int = option(
        "number of denoising steps", default=30, minimum=1, maximum=MAX_STEPS, hint=STEPS_HINT
    )
    guidance_scale: float = option("how closely the prompt is followed", default=7.5)
    seed: int | None = option("default: a random one")
    output_dir: Path = option("output folder", default=Path(), place="new folder")

    def __post_init__(self) -> None:
        check_path("--image", self.image, "file", "an image")
        if self.mask is not None:
            check_path("--mask", self.mask, "file", "an image")
        check_seed("--seed", self.seed)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels, rounded down to multiples of 64."""
        return self.height // SIDE_STEP * SIDE_STEP, self.width // SIDE_STEP * SIDE_STEP


class MinimalInpaintingOptions(Options):
    """Options of inpainting_minimal_inference.py."""

    model: InpaintingModelOptions
    picture: InpaintingImageOptions


def read_minimal(description: str | None, argv: Sequence[str] | None) -> MinimalInpaintingOptions:
    """Parse the command line of inpainting_minimal_inference.py; raise OptionError for an invalid option."""
    (options,) = parse_options(description, argv, MinimalInpaintingOptions)
    return options


def gen_img_argv(options: MinimalInpaintingOptions, mask: Path, seed: int) -> list[str]:
    """Translate parsed options to a command line for gen_img.py.

    Args:
        options: The options.
        mask: File of the mask, at the size of the result.
        seed: Seed of the image.
    """
    model, image = options.model, options.picture
    height, width = image.size
    line = image.prompt
    if image.negative_prompt:
        line = f"{line} --n {image.negative_prompt}"
    arguments = {
        "--ckpt": model.ckpt_path,
        "--sdxl": model.sdxl,
        "--tokenizer_cache_dir": model.tokenizer_cache_dir,
        "--fp16": model.fp16,
        "--bf16": model.bf16,
        "--no_half_vae": model.fp16 or model.bf16,  # the VAE always computes in float32
        "--network_weights": [path for path, _ in model.loras],
        "--network_mul": [strength for _, strength in model.loras],
        "--image_path": image.image,
        "--mask_path": mask,
        "--strength": 1.0,
        "--W": width,
        "--H": height,
        "--steps": image.steps,
        "--scale": image.guidance_scale,
        "--sampler": "euler",
        "--seed": seed,
        "--outdir": image.output_dir,
    }
    # a single argument, because a prompt may begin with a dash
    return [*option_argv(arguments), f"--prompt={line}"]

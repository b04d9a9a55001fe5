"""Options of the scripts that train Stable Diffusion and cache for it. Standard library only."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modules.option_values import Placeholder
from modules.options import FREE, HABIT, IDENTITY, SAMPLES_ONLY, Options, not_needed, option
from stable_diffusion.sampling_options import SAMPLERS

CKPT = "--pretrained_model_name_or_path"
# messages about checkpoints name gen_img.py's option; the trainers' option is shown instead
SHOWN_AS = {"--ckpt": CKPT}
# likewise for files of ControlNets
SHOWN_AS_CONTROL_NET = {**SHOWN_AS, "--control_net_models": "--controlnet_model_name_or_path"}
CKPT_HELP = "checkpoint: a single file, a folder in the layout of diffusers, or owner/name of the hub"
VAE_HELP = "another VAE than that of the checkpoint: a single file, or a folder in the layout of diffusers"
TOKENIZERS_HELP = (
    "folder with openai_clip-vit-large-patch14 and laion_CLIP-ViT-bigG-14-laion2B-39B-b160k or "
    "stabilityai_stable-diffusion-2, the files of the tokenizers"
)
DEFAULT_SAMPLER = "ddim"  # default of known trainers
STEPS, GUIDANCE_SCALE = 30, 7.5  # defaults for images, as in the samples of known trainers
CHUNK = 75  # tokens that a text encoder reads at once


class VariedNoiseOptions(Options, title="noise"):
    """Options that modify the noise added to latents during training."""

    noise_offset: float | None = option(
        "add a random number times this to each channel of the noise, for darker and lighter images; "
        "0.05 is common",
        minimum=0,
        maximum=10,
        hint="0.05 is usual",
    )
    noise_offset_random_strength: bool = option(
        "draw the share of --noise_offset for each batch, from 0 to 1", needs="noise_offset"
    )
    adaptive_noise_scale: float | None = option(
        "add this times the mean of each channel of the latents to --noise_offset",
        minimum=-10,
        maximum=10,
        needs="noise_offset",
        hint="0.005 is usual",
    )
    multires_noise_iterations: int | None = option(
        "levels of coarser noise that are added (pyramid noise); 6 to 10 are common",
        minimum=0,
        maximum=100,
        hint="6 to 10 are usual",
    )
    multires_noise_discount: float = option(
        "factor on each coarser level",
        default=0.3,
        minimum=0,
        maximum=1,
        hint="0.1 to 0.8 are usual",
        acts_if={
            "there is no --multires_noise_iterations": lambda options: bool(options.multires_noise_iterations)
        },
    )


class LossWeightOptions(Options, title="loss"):
    """Factors on each timestep's loss by its signal-to-noise ratio (SNR); several factors multiply."""

    min_snr_gamma: float | None = option(
        "limit the weight of nearly clean samples: their SNR counts as this at most; 5 is common",
        minimum=0,
        hint="5 is usual",
    )
    scale_v_pred_loss_like_noise_pred: bool = option(
        "weight the loss of v as that of the noise would be; for models that predict v"
    )
    v_pred_like_loss: float | None = option(
        "add this times the loss that a model of v would have; for models that predict noise",
        minimum=0,
        hint="0.1 to 1 are usual",
    )
    debiased_estimation_loss: bool = option("weight the losses by 1 / sqrt(SNR), of v by 1 / (SNR + 1)")

    @property
    def has_any(self) -> bool:
        """Whether any loss factor is set."""
        return bool(
            self.min_snr_gamma
            or self.scale_v_pred_loss_like_noise_pred
            or self.v_pred_like_loss
            or self.debiased_estimation_loss
        )


class StableDiffusionTrainingOptions(Options, title="Stable Diffusion"):
    """Stable Diffusion options of the training scripts, in addition to those shared by all model families."""

    # resume compares its name
    ckpt: Path | None = option(name="pretrained_model_name_or_path", facts=FREE)
    vae: Path | None = option(name="vae", facts=FREE)
    tokenizer_cache_dir: Path | None = option(name="tokenizer_cache_dir", facts=FREE)
    mixed_precision: str = option(name="mixed_precision", default="no", facts=FREE)
    resolution: str | None = option(name="resolution", facts=FREE)
    v_parameterization: bool = option(
        "the model predicts v; not needed if the checkpoint says it", facts=IDENTITY
    )
    max_token_length: int | None = option(
        "tokens of a caption that are read, in chunks of 75; default: 75",
        choices=(75, 150, 225),
        facts=IDENTITY,
    )
    zero_terminal_snr: bool = option(
        "train the last timestep on pure noise; for models that predict v", facts=HABIT
    )
    sample_sampler: str = option(
        "sampler for samples, as gen_img.py --sampler",
        default=DEFAULT_SAMPLER,
        choices=SAMPLERS,
        facts={**FREE, **SAMPLES_ONLY},
    )
    varied_noise: VariedNoiseOptions = option(facts=HABIT)
    loss_weights: LossWeightOptions = option(facts=HABIT)
    no_half_vae = not_needed("the VAE always computes in float32.", "VAE in float32")

    @property
    def num_chunks(self) -> int:
        """Number of 75-token chunks to which captions are padded or cut."""
        return (self.max_token_length or CHUNK) // CHUNK

    # set for full training only

    @property
    def is_full(self) -> bool:
        """Whether the script trains all weights; true only for full fine-tuning."""
        return False

    @property
    def learns_in_bf16(self) -> bool:
        """Whether trained weights are stored in bf16; only full fine-tuning has an option for it."""
        return False

    @property
    def text_rates(self) -> Mapping[str, float | None]:
        """Return the learning rate of each trained text encoder by name; None means --learning_rate."""
        return {}

    @property
    def block_rates(self) -> tuple[float, ...]:
        """Return the learning rate of each U-Net block; () if all blocks use --learning_rate."""
        return ()

    @property
    def text_steps(self) -> int | None:
        """Return the number of steps during which text encoders are trained; None for all steps."""
        return None

    @property
    def pads_captions(self) -> bool:
        """Whether captions are padded to whole 75-token chunks."""
        return True


class LatentCachingOptions(Options, title="Stable Diffusion"):
    """Stable Diffusion options of latent caching scripts, in addition to those shared by all families."""

    ckpt: Path | None = option(CKPT_HELP, name="pretrained_model_name_or_path", flags=("--ckpt",), often=True)
    vae: Path | None = option(VAE_HELP, often=True)


class TextCachingOptions(Options, title="Stable Diffusion"):
    """Stable Diffusion options of text caching scripts, in addition to those shared by all families."""

    ckpt: Path = option(
        CKPT_HELP, name="pretrained_model_name_or_path", flags=("--ckpt",), often=True, required=True
    )
    tokenizer_cache_dir: Path | None = option(TOKENIZERS_HELP)
    max_token_length: int | None = option(
        "tokens of a caption that are read, in chunks of 75; default: 75", choices=(75, 150, 225)
    )
    text_encoder_dtype: str | None = option("dtype of the text encoders; default: float32")

    @property
    def num_chunks(self) -> int:
        """Number of 75-token chunks to which captions are padded or cut."""
        return (self.max_token_length or CHUNK) // CHUNK


def caching_options(options: StableDiffusionTrainingOptions) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options, by flag, of the latent and text caching scripts that match a training run."""
    ckpt = options.ckpt or Placeholder("CHECKPOINT")
    texts = {
        CKPT: ckpt,
        "--tokenizer_cache_dir": options.tokenizer_cache_dir,
        "--max_token_length": options.max_token_length,
    }
    return {CKPT: ckpt, "--vae": options.vae}, texts


def _inpainting_options(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options, by flag, for an image to repaint and its mask; {} if nothing is repainted."""
    path = sample.get("image_path")
    mask = (sample.get("extra") or {}).get("mask_path")
    if path is None and sample.get("takes_mask"):  # an image of the training, with a mask to be made
        path = sample["example"].image or Placeholder("IMAGE_FILE")
        mask = Placeholder("MASK_FILE")
    return {} if path is None else {"--i2i_path": path, "--strength": 1, "--mask_path": mask}


def generation_options(options: StableDiffusionTrainingOptions, sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return the command-line options, by flag, that generate with the model of a training run.

    Args:
        options: Options of the training run.
        sample: Values of a sample image, by the names of `Request`.
    """
    return {
        "--ckpt": options.ckpt or Placeholder("CHECKPOINT"),
        "--vae": options.vae,
        "--tokenizer_cache_dir": options.tokenizer_cache_dir,
        # like the samples during training; float32 would double the U-Net's size
        "--fp16": options.mixed_precision == "fp16",
        "--bf16": options.mixed_precision == "bf16",
        "--v_parameterization": options.v_parameterization,
        "--zero_terminal_snr": options.zero_terminal_snr,
        "--sampler": None if sample.get("solver") else options.sample_sampler,
        "--max_embeddings_multiples": options.num_chunks if options.num_chunks > 1 else None,
        **_inpainting_options(sample),
    }


def gen_img_options(options: StableDiffusionTrainingOptions, sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of gen_img.py, by flag, that generate with the model of a training run.

    Args:
        options: Options of the training run.
        sample: Values of a sample image, by the names of `Request`.
    """
    model = generation_options(options, sample)
    if "--i2i_path" in model:  # for an inpainting model
        model["--image_path"] = model.pop("--i2i_path")
    return {
        **model,
        "--clip_skip": vars(options).get("clip_skip"),  # a field for 1.x and 2.x only
        "--negative_prompt": sample.get("negative_prompt") or None,
        "--W": sample.get("width"),
        "--H": sample.get("height"),
        "--steps": sample.get("steps"),
        "--scale": sample.get("guidance_scale"),
        "--sampler": sample.get("solver") or options.sample_sampler,
        "--seed": sample.get("seed"),
    }

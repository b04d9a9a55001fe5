"""Options of the checkpoint and of how it is loaded. Standard library only."""

from pathlib import Path

from modules.options import Options, option

_SPEED = "precision, speed and memory"


class ModelOptions(Options, title="model"):
    """The checkpoint, and how its networks are loaded and computed."""

    ckpt: Path = option("checkpoint: a single file, or a folder in the layout of diffusers", required=True)
    vae: Path | None = option(
        "another VAE: a single file, or a folder in the layout of diffusers", often=True
    )
    tokenizer_cache_dir: Path | None = option(
        "folder with openai_clip-vit-large-patch14 and laion_CLIP-ViT-bigG-14-laion2B-39B-b160k, the files "
        "of the tokenizers"
    )
    # what the user says the file is; it is compared with its keys
    sdxl: bool = option(
        "the checkpoint is Stable Diffusion XL; read from the file if not given",
        excludes=("v1", "v2"),
        often=True,
    )
    v1: bool = option("it is Stable Diffusion 1.x; likewise", excludes="v2")
    v2: bool = option("it is Stable Diffusion 2.x; likewise")
    v_parameterization: bool = option(
        "the model predicts velocity (v-prediction), as Stable Diffusion 2.x of 768 pixels does"
    )
    fp16: bool = option("compute in float16; else in float32", title=_SPEED, excludes="bf16", often=True)
    bf16: bool = option("compute in bfloat16; else in float32", title=_SPEED, often=True)
    no_half_vae: bool = option("the VAE computes in float32", title=_SPEED)
    vae_slices: int | None = option("the VAE works in this many bands, to save memory", title=_SPEED, least=1)
    vae_batch_size: float | None = option(
        "pictures that the VAE takes at once; below 1: this share of --batch_size; usually all",
        title=_SPEED,
        above=0,
        hint="of pictures, or a share of the batch below 1, such as 0.5",
    )
    xformers: bool = option("attention by the package xformers", title=_SPEED, often=True)
    sdpa: bool = option(
        "attention by torch itself, which is usual",
        title=_SPEED,
        excludes=("xformers", "diffusers_xformers"),
        often=True,
    )
    diffusers_xformers: bool = option("attention by the package xformers, in the VAE too", title=_SPEED)
    opt_channels_last: bool = option("keep channels last in memory, faster on some GPUs", title=_SPEED)

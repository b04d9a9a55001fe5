"""Qwen-Image as data: dimensions of its transformer, its source, latents, noise, names of parts."""

from dataclasses import dataclass, replace

from protocols.data import LatentSpec
from protocols.family import DitSpec, NoiseSpec, count_image_tokens
from protocols.rules import ModelRelease
from qwen_image.options import EDIT, EDIT_2509, EDIT_2511
from wan.spec import PREVIEW_BIAS, PREVIEW_FACTORS

QWEN_IMAGE = ModelRelease(
    ("Qwen/Qwen-Image", "Qwen/Qwen-Image-2512"),
    "Apache-2.0",
    "apache-2.0",
    "https://www.apache.org/licenses/LICENSE-2.0",
)
EDIT_RELEASES = {
    name: replace(QWEN_IMAGE, repositories=(f"Qwen/Qwen-Image-{repository}",))
    for name, repository in {EDIT: "Edit", EDIT_2509: "Edit-2509", EDIT_2511: "Edit-2511"}.items()
}
QWEN_IMAGE_LAYERED = replace(QWEN_IMAGE, repositories=("Qwen/Qwen-Image-Layered",))
PATCH = 2  # latent pixels along each side of a token


@dataclass(frozen=True)
class QwenImageConfig:
    """Dimensions of a Qwen-Image transformer, read from a checkpoint's tensors."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    channels: int  # number of latent channels
    text_dim: int  # width of the language model's states
    freq_dim: int = 256
    rope_theta: float = 10000.0
    eps: float = 1e-6
    has_layers: bool = False  # whether the frames are an image followed by its layers

    kind = "t2i"


# the latents of Wan2.1's VAE for single frames
LATENT = LatentSpec(
    channels=16,
    stride=(1, 8, 8),
    pixel_step=16,
    frame_step=1,
    preview_factors=PREVIEW_FACTORS,
    preview_bias=PREVIEW_BIAS,
)
# statistics of Qwen-Image-Layered, whose VAE has an alpha channel
LAYERED_LATENT = replace(LATENT, has_alpha=True, has_layers=True)
NOISE = NoiseSpec(count_tokens=count_image_tokens)
DIT = DitSpec(
    block_lists=("transformer_blocks",),
    shared_inputs=(
        ("attn.to_q", "attn.to_k", "attn.to_v"),
        ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    ),
    fp8_exclude=("_mod.",),  # in 8 bits images are visibly worse
    # a third of the weights: 4 bits of the rest alone save little. Source: diffusers, Qwen-Image in nf4
    form_exclude={"nf4": ("transformer_blocks.0.img_mod.",)},
    lora_exclude=("_mod.",),  # as the known trainer
    input_layers=("img_in", "txt_in"),
    token_wise_methods=("feed_forward",),
    modulated_input="modulated_input",
    # they compute in float32; under 1 % of the model
    keep_float32=("time_text_embed.",),
)

"""HunyuanImage-2.1 as data: the dimensions of a transformer, and settings of its training and generation."""

from dataclasses import dataclass

from hunyuan_model.configs import JointConfig
from hunyuan_model.spec import DIT as HUNYUAN
from protocols.data import LatentSpec
from protocols.family import DitSpec, NoiseSpec, count_image_tokens
from protocols.rules import ModelRelease, NpzFormat

HUNYUAN_IMAGE = ModelRelease(
    ("tencent/HunyuanImage-2.1",),
    "Tencent Hunyuan Community",
    "other",
    "https://huggingface.co/tencent/HunyuanImage-2.1",
)
TEXT_TOKENS = 1024  # maximum length of a prompt; the rest is cut off
GLYPH_TOKENS = 128  # maximum length of the texts to write into the image


@dataclass(frozen=True, kw_only=True)
class HunyuanImageConfig(JointConfig):
    """Dimensions of a HunyuanImage transformer, read from a checkpoint's tensors."""

    glyph_dim: int  # width of the glyph encoder's states
    glyph_hidden: tuple[int, int]  # widths inside the layers that turn these into tokens

    @property
    def kind(self) -> str:
        """Always t2i: the model takes no other condition than text."""
        return "t2i"


SCALE = 0.75289  # scale factor of the released VAE; caches hold latents before scaling
STRIDE = 32  # pixels of one latent pixel along each side

LATENT = LatentSpec(
    channels=64,
    stride=(1, STRIDE, STRIDE),
    pixel_step=STRIDE,
    frame_step=1,
    scale=SCALE,
    npz=NpzFormat("_hi", "_hi_te", variable_length=frozenset({"vlm_embed", "vlm_mask"})),
)
# the shift by size counts tokens of halved sides, as in the known trainers, although patches are one pixel
NOISE = NoiseSpec(
    training_offset=0.0, integer_timesteps=True, table_is_shifted=True, count_tokens=count_image_tokens
)
DIT = DitSpec(
    block_lists=HUNYUAN.block_lists,
    fp8_exclude=("norm", "_emb"),
    input_layers=HUNYUAN.input_layers,
    token_wise_methods=HUNYUAN.token_wise_methods,
    modulated_input=HUNYUAN.modulated_input,
    # a single block is about half as large
    swap_counts=lambda blocks: (blocks // 2, (blocks - blocks // 2) * 2),
    # they compute in float32; under 1 % of the model
    keep_float32=("time_in.", "txt_in.t_embedder.", "txt_in.c_embedder."),
)

"""Facts about HunyuanImage-2.1 for code outside its models: latent space, noise, names in the transformer."""

from hunyuan_model.spec import DIT as HUNYUAN
from modules.contract.family import DitSpec, LatentSpec
from modules.contract.noise import NoiseSpec, count_picture_tokens
from modules.contract.npz import NpzFormat

SCALE = 0.75289  # of the released VAE; caches hold latents before it
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
    training_offset=0.0, whole_timesteps=True, table_is_shifted=True, tokens=count_picture_tokens
)
DIT = DitSpec(
    block_lists=HUNYUAN.block_lists,
    fp8_exclude=("norm", "_emb"),
    input_layers=HUNYUAN.input_layers,
    token_wise=HUNYUAN.token_wise,
    modulated_input=HUNYUAN.modulated_input,
    # a single block is about half as large
    swap_counts=lambda blocks: (blocks // 2, (blocks - blocks // 2) * 2),
    # as they compute so; under 1 % of the model
    keep_float32=("time_in.", "txt_in.t_embedder.", "txt_in.c_embedder."),
)

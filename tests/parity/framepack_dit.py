"""FramePack's transformer of PyPI's diffusers, loaded from the file that is given to our scripts."""

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import HunyuanVideoFramepackTransformer3DModel
from safetensors.torch import load_file
from torch import Tensor

# name in our caches and conditions -> argument there
TEXTS = {
    "llama_vec": "encoder_hidden_states",
    "llama_attention_mask": "encoder_attention_mask",
    "clip_l_pooler": "pooled_projections",
    "image_embeddings": "image_embeds",
}
KINDS = {
    "latents_clean": ("latents_clean", "clean_latent_indices", "indices_latents_clean"),
    "latents_clean_2x": ("latents_history_2x", "clean_latent_2x_indices", "indices_latents_history_2x"),
    "latents_clean_4x": ("latents_history_4x", "clean_latent_4x_indices", "indices_latents_history_4x"),
}


def load_dit(path: Path) -> HunyuanVideoFramepackTransformer3DModel:
    """A transformer of the published names, its sizes read off its tensors.

    Heads are 64 wide, as in all our tiny ones.
    """
    tensors = load_file(path)

    def count(start: str) -> int:
        return 1 + max(
            int(name.removeprefix(start + ".").split(".")[0])
            for name in tensors
            if name.startswith(start + ".")
        )

    dim, in_channels = tensors["x_embedder.proj.weight"].shape[:2]
    width = len(tensors["transformer_blocks.0.attn.norm_q.weight"])
    dit = HunyuanVideoFramepackTransformer3DModel(
        in_channels=in_channels,
        out_channels=len(tensors["proj_out.weight"]) // 4,
        num_attention_heads=dim // width,
        attention_head_dim=width,
        num_layers=count("transformer_blocks"),
        num_single_layers=count("single_transformer_blocks"),
        num_refiner_layers=count("context_embedder.token_refiner.refiner_blocks"),
        mlp_ratio=len(tensors["transformer_blocks.0.ff.net.0.proj.weight"]) / dim,
        text_embed_dim=tensors["context_embedder.proj_in.weight"].shape[1],
        pooled_projection_dim=tensors["time_text_embed.text_embedder.linear_1.weight"].shape[1],
        rope_axes_dim=(width // 8, width * 7 // 16, width * 7 // 16),
        has_image_proj=True,
        image_proj_dim=tensors["image_projection.up.weight"].shape[1],
        has_clean_x_embedder=True,
    )
    dit.load_state_dict(tensors)
    return dit.eval().requires_grad_(False)


def velocity(
    dit: HunyuanVideoFramepackTransformer3DModel,
    noisy: Tensor,
    timestep: Tensor,
    guidance: Tensor,
    given: Mapping[str, Tensor],
) -> Tensor:
    """1 16 F h w float32 of one sample. given: what caches and conditions hold of it, with batch dimension.

    All that a 16-bit transformer is given is rounded to 16 bits.

    It has no forward without one of the three kinds of finished latents, though the code that puts tokens in
    a row would leave one out: for a kind that is not there one black frame is embedded and then dropped at
    that place.
    """
    dtype = dit.x_embedder.proj.weight.dtype

    def rounded(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    arguments = {there: rounded(given[here]) for here, there in TEXTS.items()}
    missing = []
    for latents, (argument, places, there) in KINDS.items():
        black = noisy.new_zeros(1, 16, given[places].shape[1] if places in given else 1, *noisy.shape[3:])
        arguments[argument] = rounded(given.get(latents, black))
        arguments[there] = given[places][0] if places in given else torch.zeros(1, dtype=torch.int64)
        missing.append(places not in given)
    pack = dit._pack_history_states

    def packed(hidden: Tensor, *rest: object) -> object:
        kept = [None if is_missing else tokens for is_missing, tokens in zip(missing, rest, strict=False)]
        return pack(hidden, *kept, *rest[len(missing) :])

    try:
        dit._pack_history_states = packed
        indices = given["latent_indices"][0]
        return dit(
            rounded(noisy),
            rounded(timestep),
            guidance=rounded(guidance),
            indices_latents=indices,
            **arguments,
            return_dict=False,
        )[0].float()
    finally:
        del dit._pack_history_states

"""The HunyuanVideo transformer, also used by SkyReels V1. Module names follow the published checkpoints.

Source: the released model code and Kong et al. 2024, arXiv 2412.03603. `blocks.py` lists the steps in
float32.
"""
# Letters: B batch, L video tokens, T text tokens, N heads, D head width, C = N * D

import math
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from hunyuan_model.blocks import (
    EmbeddedText,
    HunyuanTokens,
    MMDoubleStreamBlock,
    MMSingleStreamBlock,
    apply_silu,
    join_tokens,
)
from hunyuan_model.configs import HunyuanVideoConfig
from hunyuan_model.spec import DIT
from hunyuan_model.token_refiner import ScalarEmbedding, TokenRefiner
from modules.attention.attend import SampleLengths, make_lengths
from modules.layers.modulation import modulate
from modules.layers.norms import Float32LayerNorm, TwoLayerMlp, activation_dtype, run_in_weight_dtype
from modules.layers.rope import GridTable, TokenGrid, bind_rotary_table, rotary_table
from modules.speed_options import SDPA, AttentionChoice
from protocols.steps import NO_OVERRIDES, Overrides
from runtime.run_blocks import BlockNetwork, Hidden

TWO_LAYERS = "in_layer out_layer"  # names of an embedding's layers in the files


class HunyuanFinalLayer(nn.Module):
    """Final norm, modulated by the embedding, and projection to the values of a patch."""

    def __init__(self, dim: int, patch: int, eps: float) -> None:
        super().__init__()
        self.norm_final = Float32LayerNorm(dim, eps)
        self.linear = nn.Linear(dim, patch)
        self.adaLN_modulation: Any = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, tokens: HunyuanTokens) -> Tensor:
        """Return the patches of the velocity for video tokens x, B L C to B L out_dim*4."""
        shift, scale = self.modulation(tokens.vector[:, :1])
        return run_in_weight_dtype(self.linear, modulate(self.norm_final(x), shift, scale, tokens.dtype))

    def modulation(self, vector: Tensor) -> tuple[Tensor, ...]:
        """Return shift and scale, each B 1 C float32."""
        return run_in_weight_dtype(self.adaLN_modulation[1], vector).float().chunk(2, dim=-1)


class HunyuanVideoModel(BlockNetwork):
    """Predict the velocity of noisy video latents from two text encodings.

    Variants also take guidance and a first frame. Simplified, without a second text and the code around the
    blocks:

        video = img_in(noisy)                                               # B L C
        text = txt_in(llama)                                                # B T C
        vector = time_in(timesteps) + vector_in(clip_l) + guidance_in(guidance)                # B C
        for block in double_blocks:
            rows, text_rows = block.img_mod(vector), block.txt_mod(vector)  # each 6: shifts, scales, gates
            branches = attention of modulated video and text to each other  # B L+T C
            video, text = each + gate * proj(its branch), then + gate * mlp(modulated)
        x = cat([video, text])
        for block in single_blocks:                  # attention and feed-forward in parallel
            x = x + gate * linear2(attention and gelu of linear1(modulated x))
        velocity = final_layer(x[:, :L], vector)     # B L out_dim*4, returned as B out_dim F H W
    """

    spec = DIT
    compute_dtype_parameter = "double_blocks.0.img_attn_proj.bias"

    def __init__(self, config: HunyuanVideoConfig, attention: AttentionChoice = SDPA) -> None:
        """Build the network without weights. `attention` is passed to `modules.attention.attend`."""
        super().__init__()
        self.config = config
        self.attention = attention
        dim = config.dim
        patches = nn.Conv3d(config.in_dim, dim, config.patch_size, config.patch_size)
        self.img_in = nn.ModuleDict({"proj": patches})
        self.txt_in = TokenRefiner(config)
        self.time_in = ScalarEmbedding(config.freq_dim, dim)
        # takes one vector per sample, the pooled output of the CLIP text encoder
        self.vector_in = TwoLayerMlp(TWO_LAYERS, (config.pooled_dim, dim, dim), in_float32=True)
        if config.has_guidance:
            self.guidance_in = ScalarEmbedding(config.freq_dim, dim)
        sizes = (dim, config.ffn_dim, config.num_heads, config.eps)
        self.double_blocks = nn.ModuleList(MMDoubleStreamBlock(*sizes) for _ in range(config.double_blocks))
        self.single_blocks = nn.ModuleList(MMSingleStreamBlock(*sizes) for _ in range(config.single_blocks))
        patch_numbers = math.prod(config.patch_size) * config.out_dim
        self.final_layer = HunyuanFinalLayer(dim, patch_numbers, config.eps)
        widths = rotary_widths(dim // config.num_heads)
        self._rotary = GridTable(bind_rotary_table(rotary_table, widths, config.rope_theta))

    def embed(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        llama: Tensor,
        llama_mask: Tensor,
        clip_l: Tensor,
        guidance: Tensor | None = None,
        overrides: Overrides = NO_OVERRIDES,
    ) -> Hidden:
        """Return video and text tokens, B L+T C, and the other inputs of the blocks.

        Args:
            noisy: B in_dim F H W. If the model takes an image, its latents are in frame 0 of the channels
                after the noisy ones, with zeros in the other frames.
            timesteps: B, 0..1000.
            llama: States of the language model, B T text_dim.
            llama_mask: B T, true or 1 for real tokens, which come first.
            clip_l: Pooled CLIP state, B pooled_dim.
            guidance: B, as in the model's training (1000 times the scale in generation); ignored by a model
                without guidance embedding.
            overrides: Changes to this call. For normalized attention guidance (NAG), they contain a second
                `llama`, `llama_mask` and `clip_l`, whose tokens follow the prompt's.

        Raises:
            ValueError: If sizes do not match.
        """
        if noisy.shape[1] != self.config.in_dim:
            raise ValueError(f"{noisy.shape[1]} input channels, the model takes {self.config.in_dim}")
        check_sizes(noisy, self.config.patch_size, llama, llama_mask)
        if self.config.has_guidance and guidance is None:
            raise ValueError("the model has a guidance embedding, but no guidance is given")
        dtype = activation_dtype(noisy.device, self.compute_dtype)
        patches = run_in_weight_dtype(self.img_in["proj"], noisy).to(dtype)  # B C f h w
        grid = (patches.shape[2], patches.shape[3], patches.shape[4])
        rotary = self._rotary.get_table(TokenGrid(grid, overrides.slow_frames), noisy.device)
        embedded_guidance = guidance if self.config.has_guidance and overrides.embedded_guidance else None
        # of the prompt and, if `overrides` have one, of the second text
        prompts = overrides.text_inputs(len(noisy), llama=llama, llama_mask=llama_mask, clip_l=clip_l)
        embedded_texts = [
            self._embed_text(timesteps, **prompt, guidance=embedded_guidance, num_video_tokens=len(rotary))
            for prompt in prompts
        ]
        video = rearrange(patches, "b c f h w -> b (f h w) c")
        return join_tokens(
            [video],
            embedded_texts,
            overrides.combine_attention,
            grid=grid,
            rotary=rotary,
            dtype=dtype,
            attention=self.attention,
        )

    def _embed_text(
        self,
        timesteps: Tensor,
        llama: Tensor,
        llama_mask: Tensor,
        clip_l: Tensor,
        guidance: Tensor | None,
        num_video_tokens: int,
    ) -> EmbeddedText:
        """Embed a text as tokens, B T C, with the vector from which modulations are computed, B 1 C."""
        # `guidance` is B; None leaves it out. Other arguments are those of `embed`.
        dtype = activation_dtype(timesteps.device, self.compute_dtype)
        # longest text of the batch, real tokens of each text, and of video and text together
        longest, counts, lengths = count_real_tokens(llama_mask, num_video_tokens, timesteps.device)
        text = self.txt_in(llama[:, :longest], timesteps, counts, dtype=dtype, attention=self.attention)
        vector = self.time_in(timesteps) + self.vector_in(clip_l)
        if guidance is not None:
            vector = vector + self.guidance_in(guidance)
        return EmbeddedText(text, lengths, apply_silu(vector.unsqueeze(1), dtype))

    def unembed(self, x: Tensor, tokens: HunyuanTokens) -> Tensor:
        """Turn tokens B L+T C into the velocity, B out_dim F H W in float32."""
        return from_patches(
            self.final_layer(x[:, : tokens.num_video_tokens], tokens).float(),
            tokens.grid,
            self.config.patch_size,
        )


def rotary_widths(head_width: int) -> tuple[int, int, int]:
    """Return how many channels of a head encode frames (an eighth), rows and columns (7/16 each)."""
    side = 7 * head_width // 16
    return head_width - 2 * side, side, side


def check_sizes(noisy: Tensor, patch_size: tuple[int, int, int], text: Tensor, mask: Tensor) -> None:
    """Raise ValueError if B C F H W latents are not whole patches or a B T mask does not fit the text."""
    if any(size % patch for size, patch in zip(noisy.shape[2:], patch_size, strict=True)):
        raise ValueError(f"latents of {tuple(noisy.shape[2:])} cannot be cut into patches of {patch_size}")
    if mask.shape != text.shape[:2]:
        raise ValueError(f"a text mask of {tuple(mask.shape)} for text of {tuple(text.shape[:2])}")


def from_patches(patches: Tensor, grid: tuple[int, int, int], patch_size: tuple[int, int, int]) -> Tensor:
    """Assemble patches, B L (C pf ph pw), to B C F H W; `grid` counts frames, rows and columns of tokens."""
    (frames, rows, columns), (pf, ph, pw) = grid, patch_size
    return rearrange(
        patches,
        "b (f h w) (c pf ph pw) -> b c (f pf) (h ph) (w pw)",
        f=frames,
        h=rows,
        w=columns,
        pf=pf,
        ph=ph,
        pw=pw,
    )


def count_real_tokens(
    mask: Tensor, num_tokens_before: int, device: torch.device
) -> tuple[int, list[int] | None, SampleLengths | None]:
    """Return the tokens of the longest text, the tokens of each text, and the lengths of whole sequences.

    The last two are None if all texts are equally long. A sequence has `num_tokens_before` tokens before
    the text.
    """
    longest, counts = real_tokens(mask)
    if counts is None:
        return longest, None, None
    return longest, counts, make_lengths([num_tokens_before + count for count in counts], device)


def real_tokens(mask: Tensor) -> tuple[int, list[int] | None]:
    """Return the number of real rows of the longest text, and of each sample (None if all are equal).

    `mask` is B T. Padding after the longest text is cut off instead of masked, because attention without a
    mask is faster and gives the same result. Raises ValueError if padding comes before a real token.
    """
    real = mask != 0
    positions = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    counted = torch.stack([real.sum(dim=1), (real * positions).amax(dim=1)])
    counts, ends = counted.tolist()  # a mask on the device would have the host wait for it
    if counts != ends:
        raise ValueError(f"a text mask has padding before real tokens: {counts} real tokens end at {ends}")
    longest = max(1, *counts)
    return longest, None if min(counts) == longest else counts

"""The FramePack transformer, also used by FramePack-F1. Module names follow the published checkpoints.

It is HunyuanVideo's transformer with finished latents before the noisy ones (older latents are coarser), and
image tokens before the text. Source: the released model code; Zhang and Agrawala 2025, arXiv 2504.12626.
`hunyuan_model.blocks` lists the steps in float32.

Rotary positions: the frame axis uses explicit indices, rows and columns are counted. A coarse token has the
mean of the rotations of the positions that it covers.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from frame_pack.blocks import (
    FramePackRefinerBlock,
    HunyuanVideoSingleTransformerBlock,
    HunyuanVideoTransformerBlock,
)
from frame_pack.configs import DIT, FramePackConfig
from hunyuan_model.blocks import EmbeddedText, HunyuanModulation, HunyuanTokens, apply_silu, join_tokens
from hunyuan_model.model import check_sizes, count_real_tokens, from_patches, rotary_widths
from hunyuan_model.token_refiner import mean_text, refine_tokens
from modules.devices import send_ahead
from modules.layers.modulation import modulate
from modules.layers.norms import (
    Float32LayerNorm,
    TwoLayerMlp,
    activation_dtype,
    run_float32,
    run_in_weight_dtype,
)
from modules.layers.rope import CPU, GridTable, cos_and_sin, rotation_angles, sinusoid, spread_over_grid
from modules.speed_options import SDPA, AttentionChoice
from protocols.steps import NO_OVERRIDES, Overrides
from runtime.run_blocks import BlockNetwork, Hidden


@dataclass(frozen=True)
class LatentGroup:
    """Consecutive latents of the sequence that have the same patch size."""

    # for each of the B samples: positions of its latents on the frame axis
    indices: tuple[tuple[int, ...], ...]
    downsampling: int  # number of patches that one token covers along each axis


@dataclass(frozen=True)
class WindowLayout:
    """Frame indices and token grid that determine a sequence's rotary table, as a cache key."""

    latent_groups: tuple[LatentGroup, ...]  # front to back
    rows: int  # patches, before any are joined into coarse tokens
    columns: int
    scale: float  # factor for positions along rows and columns


def position_scale(timesteps: Tensor, threshold: float | None, factor: float) -> float:
    """Return the factor for row and column positions: `factor` from timestep `threshold` up, else 1.

    At high noise the model lays out the image; closer positions then keep a model that was trained on small
    images from repeating itself in a large one.

    Args:
        timesteps: B, 0..1000; the noisiest decides for all.
        threshold: None always gives 1.
        factor: Factor at high noise.
    """
    return factor if threshold is not None and float(timesteps.max()) >= threshold else 1.0


def rotary_table(
    layout: WindowLayout, widths: Sequence[int], theta: float, device: torch.device = CPU
) -> Tensor:
    """Return the rotary table of a section with its history, (cosine, sine) pairs in float32 on `device`.

    The table is L 1 D/2 2 if all samples have the same indices, else B L 1 D/2 2.

    Args:
        layout: Layout of the sequence.
        widths: Channels for frames, rows and columns; they sum to D.
        theta: Base of the frequencies.
        device: Device of the result.
    """
    batch = len(layout.latent_groups[0].indices)
    # often equal in all samples, so equal ones are computed once
    sample_indices = [
        tuple(group.indices[sample] for group in layout.latent_groups) for sample in range(batch)
    ]
    tables = {}
    for indices in set(sample_indices):
        tables[indices] = _make_sample_table(layout, indices, widths, theta=theta, device=device)
    return (
        tables[sample_indices[0]]
        if len(tables) == 1
        else torch.stack([tables[indices] for indices in sample_indices])
    )


def _make_sample_table(
    layout: WindowLayout,
    indices: Sequence[Sequence[int]],
    widths: Sequence[int],
    theta: float,
    device: torch.device,
) -> Tensor:
    """Return one sample's rotary table, L 1 D/2 2, for all latents of its window."""
    # `indices` are the frame indices of each group of latents with one resolution.
    rows = torch.arange(layout.rows) * layout.scale
    columns = torch.arange(layout.columns) * layout.scale
    tables = []
    for group, frames in zip(layout.latent_groups, indices, strict=True):
        axes = []
        for positions, width in zip((torch.tensor(frames), rows, columns), widths, strict=True):
            axes.append(send_ahead(_average_rotations(positions, width, theta, group.downsampling), device))
        tables.append(spread_over_grid(axes))
    return torch.cat(tables).unsqueeze(1)


def _average_rotations(positions: Tensor, width: int, theta: float, downsampling: int) -> Tensor:
    """Average the rotations along one axis over cells: ceil(n / downsampling) x width/2 x 2 float32."""
    # Cosines and sines are averaged, not positions, as in training, so coarse rotations also shrink vectors.
    # The mean over a cell of the grid equals the mean along this axis, because an axis's rotations do not
    # depend on the other axes.
    pairs = cos_and_sin(rotation_angles(positions.double(), width, theta))
    missing = -len(pairs) % downsampling
    pairs = torch.cat([pairs, pairs[-1:].expand(missing, -1, -1)])
    return pairs.unflatten(0, (-1, downsampling)).mean(dim=1).float()


@dataclass(frozen=True)
class FramePackTokens(HunyuanTokens):
    """Inputs of the blocks; the noisy latents are the last tokens of the video, after clean context."""

    @property
    def first_noisy_token(self) -> int:
        """Return the index of the first token of the noisy latents."""
        return self.num_video_tokens - math.prod(self.grid)


class ConditionEmbedding(nn.Module):
    """Embed timestep, a text vector and optionally guidance as one vector: B C float32."""

    def __init__(self, config: FramePackConfig, text_dim: int, has_guidance: bool) -> None:
        super().__init__()
        self._freq_dim = config.freq_dim
        numbers, texts = ((width, config.dim, config.dim) for width in (config.freq_dim, text_dim))
        self.timestep_embedder = TwoLayerMlp("linear_1 linear_2", numbers, in_float32=True)
        if has_guidance:
            self.guidance_embedder = TwoLayerMlp("linear_1 linear_2", numbers, in_float32=True)
        self.text_embedder = TwoLayerMlp("linear_1 linear_2", texts, in_float32=True)

    def forward(self, timesteps: Tensor, text: Tensor, guidance: Tensor | None = None) -> Tensor:
        """Embed timesteps B, pooled text B text_dim and guidance B as one vector, B C float32."""
        # timesteps, guidance: B    text: B text_dim
        vector = self.timestep_embedder(
            sinusoid(timesteps, self._freq_dim, torch.float32)
        ) + self.text_embedder(text)
        return (
            vector
            if guidance is None
            else vector + self.guidance_embedder(sinusoid(guidance, self._freq_dim, torch.float32))
        )


class Refiner(nn.Module):
    """Container of the refiner's blocks, under the name that published checkpoints use."""

    def __init__(self, config: FramePackConfig) -> None:
        super().__init__()
        sizes = (config.dim, config.refiner_ffn_dim, config.num_heads, config.eps)
        self.refiner_blocks = nn.ModuleList(
            FramePackRefinerBlock(*sizes) for _ in range(config.refiner_blocks)
        )


class FramePackRefiner(nn.Module):
    """Refine the language model's states to text tokens, conditioned on the timestep."""

    def __init__(self, config: FramePackConfig) -> None:
        super().__init__()
        self.time_text_embed = ConditionEmbedding(config, config.text_dim, has_guidance=False)
        self.proj_in = nn.Linear(config.text_dim, config.dim)
        self.token_refiner = Refiner(config)

    def forward(
        self,
        text: Tensor,
        timesteps: Tensor,
        counts: Sequence[int] | None,
        dtype: torch.dtype,
        attention: AttentionChoice,
    ) -> Tensor:
        """Refine text states, B T text_dim, to tokens, B T C of `dtype`; `counts` are the texts' lengths."""
        vector = self.time_text_embed(timesteps, mean_text(text, counts))
        tokens = run_in_weight_dtype(self.proj_in, text).to(dtype)
        blocks = self.token_refiner.refiner_blocks
        return refine_tokens(tokens, blocks, vector, counts=counts, attention=attention)


class CleanEmbedding(nn.Module):
    """Embed clean latents in patches 1, 2 or 4 times as large as the noisy ones along each axis."""

    def __init__(self, config: FramePackConfig) -> None:
        super().__init__()

        def patches(downsampling: int) -> nn.Conv3d:
            frames, rows, columns = config.patch_size
            size = (downsampling * frames, downsampling * rows, downsampling * columns)
            return nn.Conv3d(config.in_dim, config.dim, size, size)

        self.proj, self.proj_2x, self.proj_4x = patches(1), patches(2), patches(4)

    def forward(self, latents: Tensor, downsampling: int) -> Tensor:
        """Embed latents, B in_dim F H W, as tokens, B l C; `downsampling` is 1, 2 or 4.

        Incomplete patches are padded with the border's values.
        """
        layer = {1: self.proj, 2: self.proj_2x, 4: self.proj_4x}[downsampling]
        frames, rows, columns = (
            -size % patch for size, patch in zip(latents.shape[2:], layer.kernel_size, strict=True)
        )
        padded = functional.pad(latents, (0, columns, 0, rows, 0, frames), mode="replicate")
        return run_in_weight_dtype(layer, padded).flatten(2).transpose(1, 2)


@dataclass(frozen=True)
class IndexedLatents:
    """Clean or noisy latents, B in_dim F H W, with their frame indices, B F."""

    name: str  # name of the argument of `FramePackModel.embed`
    latents: Tensor
    indices: Tensor
    downsampling: int  # number of patches of the noisy latents that one token covers along each axis


class FramePackModel(BlockNetwork):
    """Predict the velocity of noisy latents from finished latents, an image, and two text encodings.

    The finished latents come before or after the noisy ones. Simplified, without a second text and the code
    around the blocks:

        video = cat([clean_x_embedder(each finished latents), x_embedder(noisy)])                  # B L C
        text = cat([image_projection(image_embeddings), context_embedder(llama, timesteps)])       # B T C
        vector = time_text_embed(timesteps, clip_l, guidance)                                      # B C
        for block in transformer_blocks:
            branches = attention of modulated video and text to each other                         # B L+T C
            video, text = each + gate * proj(its branch), then + gate * ff(modulated)
        x = cat([video, text])
        for block in single_transformer_blocks:      # attention and feed-forward in parallel
            x = x + gate * proj_out(attention and gelu of layers of modulated x)
        velocity = proj_out(layer_norm(noisy tokens of x) * (1 + scale) + shift)     # B out_dim F H W
    """

    spec = DIT
    compute_dtype_parameter = "transformer_blocks.0.attn.to_add_out.bias"

    def __init__(self, config: FramePackConfig, attention: AttentionChoice = SDPA) -> None:
        """Build the network without weights; its modules are named as in the released files."""
        super().__init__()
        self.config = config
        self.attention = attention
        dim = config.dim
        patches = nn.Conv3d(config.in_dim, dim, config.patch_size, config.patch_size)
        self.x_embedder = nn.ModuleDict({"proj": patches})
        self.clean_x_embedder = CleanEmbedding(config)
        self.context_embedder = FramePackRefiner(config)
        self.image_projection = TwoLayerMlp("up down", (config.image_dim, config.image_hidden_dim, dim))
        self.time_text_embed = ConditionEmbedding(config, config.pooled_dim, has_guidance=True)
        sizes = (dim, config.ffn_dim, config.num_heads, config.eps)
        self.transformer_blocks = nn.ModuleList(
            HunyuanVideoTransformerBlock(*sizes) for _ in range(config.double_blocks)
        )
        self.single_transformer_blocks = nn.ModuleList(
            HunyuanVideoSingleTransformerBlock(*sizes) for _ in range(config.single_blocks)
        )
        self.layer_norm = Float32LayerNorm(dim, config.eps)
        self.norm_out = HunyuanModulation(dim, 2)
        self.proj_out = nn.Linear(dim, math.prod(config.patch_size) * config.out_dim)
        widths = rotary_widths(dim // config.num_heads)
        table = functools.partial(rotary_table, widths=widths, theta=config.rope_theta)
        self._rotary = GridTable[WindowLayout](table)

    def embed(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        llama: Tensor,
        llama_mask: Tensor,
        clip_l: Tensor,
        guidance: Tensor,
        image_embeddings: Tensor,
        latent_indices: Tensor,
        clean_latents: Tensor | None = None,
        clean_latent_indices: Tensor | None = None,
        clean_latents_2x: Tensor | None = None,
        clean_latent_2x_indices: Tensor | None = None,
        clean_latents_4x: Tensor | None = None,
        clean_latent_4x_indices: Tensor | None = None,
        position_scale: float = 1.0,
        overrides: Overrides = NO_OVERRIDES,
    ) -> Hidden:
        """Embed video and text as tokens, B L+T C; return them with the blocks' other inputs.

        The sequence is the history, coarsest first, the noisy latents, the image's tokens and the text.

        Args:
            noisy: B in_dim F H W.
            timesteps: B, 0..1000.
            llama: States of the language model, B T text_dim.
            llama_mask: B T, true or 1 for real tokens, which come first.
            clip_l: Pooled CLIP state, B pooled_dim.
            guidance: B, 1000 times the scale.
            image_embeddings: States of the image encoder, B S image_dim.
            latent_indices: Indices in time of the noisy latents, B F integers.
            clean_latents: Finished latents, B in_dim n H W; None if there are none.
            clean_latent_indices: Their indices, B n.
            clean_latents_2x: Finished latents to embed at half resolution.
            clean_latent_2x_indices: Their indices, B n.
            clean_latents_4x: Finished latents to embed at quarter resolution.
            clean_latent_4x_indices: Their indices, B n.
            position_scale: Factor for positions along rows and columns.
            overrides: Changes to this call; a NAG text has arguments named llama, llama_mask and
                clip_l.

        Raises:
            ValueError: If sizes do not match.
        """
        # in the order of the sequence: coarse history first, noisy latents last
        history = [
            *_pair_with_indices("clean_latents_4x", clean_latents_4x, clean_latent_4x_indices, 4),
            *_pair_with_indices("clean_latents_2x", clean_latents_2x, clean_latent_2x_indices, 2),
            *_pair_with_indices("clean_latents", clean_latents, clean_latent_indices, 1),
        ]
        groups = [*history, IndexedLatents("noisy", noisy, latent_indices, 1)]
        self._check(groups, llama, llama_mask)
        if overrides.slow_frames is not None:
            raise ValueError("sections keep the frames' positions within the trained range: none is slowed")
        dtype = activation_dtype(noisy.device, self.compute_dtype)
        patches = run_in_weight_dtype(self.x_embedder["proj"], noisy)  # B C f h w
        grid = (patches.shape[2], patches.shape[3], patches.shape[4])
        video = [self.clean_x_embedder(group.latents, group.downsampling).to(dtype) for group in history]
        video.append(patches.to(dtype).flatten(2).transpose(1, 2))
        rotary = self._rotary.get_table(_make_layout(groups, grid, position_scale), noisy.device)
        image = self.image_projection(image_embeddings).to(dtype)
        guidance_input = guidance if overrides.embedded_guidance else None
        num_video_tokens = rotary.shape[-4]
        texts = []
        for prompt in overrides.text_inputs(len(noisy), llama=llama, llama_mask=llama_mask, clip_l=clip_l):
            texts.append(self._embed_text(prompt, image, timesteps, guidance_input, num_video_tokens))
        return join_tokens(
            video,
            texts,
            overrides.combine_attention,
            FramePackTokens,
            grid=grid,
            rotary=rotary,
            dtype=dtype,
            attention=self.attention,
        )

    def _embed_text(
        self,
        prompt: Mapping[str, Tensor],
        image: Tensor,
        timesteps: Tensor,
        guidance: Tensor | None,
        num_video_tokens: int,
    ) -> EmbeddedText:
        """Embed a prompt's llama, llama_mask and clip_l; the image's tokens B S C go before its own."""
        dtype = image.dtype
        num_before_text = num_video_tokens + image.shape[1]
        longest, counts, lengths = count_real_tokens(prompt["llama_mask"], num_before_text, image.device)
        states = prompt["llama"][:, :longest]
        text = self.context_embedder(states, timesteps, counts, dtype=dtype, attention=self.attention)
        vector = self.time_text_embed(timesteps, prompt["clip_l"], guidance).unsqueeze(1)
        return EmbeddedText(torch.cat([image, text], dim=1), lengths, apply_silu(vector, dtype))

    def unembed(self, x: Tensor, tokens: HunyuanTokens) -> Tensor:
        """Project tokens B L+T C to the velocity of the noisy latents, B out_dim F H W float32."""
        frames, rows, columns = tokens.grid
        scale, shift = self.norm_out(tokens.vector[:, :1])
        end = tokens.num_video_tokens  # the noisy latents are the last of the video
        noisy = self.layer_norm(x[:, end - frames * rows * columns : end])
        return from_patches(
            run_float32(self.proj_out, modulate(noisy, shift, scale, torch.float32)),
            tokens.grid,
            self.config.patch_size,
        )

    def _check(self, groups: Sequence[IndexedLatents], llama: Tensor, llama_mask: Tensor) -> None:
        """Raise ValueError for shapes that do not fit the model or each other."""
        # `groups` are the latents with their frame indices: history, and last the noisy ones.
        noisy = groups[-1].latents
        check_sizes(noisy, self.config.patch_size, llama, llama_mask)
        for group in groups:
            batch, channels, frames, *area = group.latents.shape
            if channels != self.config.in_dim:
                raise ValueError(
                    f"{group.name} with {channels} channels, the model takes {self.config.in_dim}"
                )
            if batch != len(noisy) or area != list(noisy.shape[3:]):
                raise ValueError(
                    f"{group.name} of {tuple(group.latents.shape)} "
                    f"do not fit noisy latents of {tuple(noisy.shape)}"
                )
            if group.indices.shape != (batch, frames):
                raise ValueError(
                    f"indices of {tuple(group.indices.shape)} "
                    f"for {group.name} of {tuple(group.latents.shape)}"
                )


def _pair_with_indices(
    name: str, latents: Tensor | None, indices: Tensor | None, downsampling: int
) -> list[IndexedLatents]:
    """Return latents with their indices as a list of one, or an empty list if neither is given."""
    if latents is not None and indices is not None:
        return [IndexedLatents(name, latents, indices, downsampling)]
    if latents is None and indices is None:
        return []
    raise ValueError(f"{name} and their indices must be given together")


def _make_layout(groups: Sequence[IndexedLatents], grid: tuple[int, int, int], scale: float) -> WindowLayout:
    """Return all frame indices on the host, as a key for the rotary table."""
    # indices on the device would make the host wait for it; this waits once for all kinds
    rows: list[list[int]] = torch.cat([group.indices for group in groups], dim=1).tolist()
    latent_groups = []
    start = 0
    for group in groups:
        end = start + group.indices.shape[1]
        latent_groups.append(LatentGroup(tuple(tuple(row[start:end]) for row in rows), group.downsampling))
        start = end
    return WindowLayout(tuple(latent_groups), grid[1], grid[2], scale)

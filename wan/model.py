"""The transformer of Wan2.1 and Wan2.2.

Module names follow the published checkpoint, so official files load without renaming. Source: the released
model code and Wan Team 2025, arXiv 2503.20314. The residual stream, norms and the final layer are always
float32; rotary angles are float64. Time embedding, modulation and the rotation by position are float32 too,
unless `precision` says float16. All other layers compute in the dtype of their weights or of autocast.
"""
# Letters: B batch, L video tokens, S segments of them (2 with given frames), T text tokens, I image tokens,
# N heads, D head width, C = N * D

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as functional
from einops import rearrange
from torch import Tensor, nn

from modules.attention.attend import attend
from modules.layers.modulation import add_gated, modulate, split_segments
from modules.layers.norms import Float32LayerNorm, RMSNorm, activation_dtype, run_float32, run_in_weight_dtype
from modules.layers.rope import (
    TABLES,
    GridTable,
    SlowedFrequency,
    TokenGrid,
    bind_rotary_table,
    joined_tables,
    rotate,
    sinusoid,
)
from modules.speed_options import SDPA, AttentionChoice
from protocols.steps import NO_OVERRIDES, Overrides
from runtime.run_blocks import BlockNetwork, Hidden
from wan.configs import WanConfig
from wan.spec import DIT, SourceLatents, WanTokens, pad_texts

TEXT_ROWS_AS_IMAGE = 257  # number of text rows that older tools passed as image tokens by mistake
REF_CHANNELS = 16  # latent channels of the reference image that `ref_conv` takes


class SelfAttention(nn.Module):
    """Attention among the video tokens; q and k are normalized over all heads and rotated by position."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q = nn.Linear(config.dim, config.dim)
        self.k = nn.Linear(config.dim, config.dim)
        self.v = nn.Linear(config.dim, config.dim)
        self.o = nn.Linear(config.dim, config.dim)
        self.norm_q = RMSNorm(config.dim, config.eps)
        self.norm_k = RMSNorm(config.dim, config.eps)

    def forward(self, x: Tensor, tokens: WanTokens) -> Tensor:
        """Return the attention among video tokens x, B L C to B L C."""
        heads = (self.num_heads, -1)
        q = rotate(self.norm_q(run_in_weight_dtype(self.q, x)).unflatten(-1, heads), tokens.rotary)
        k = rotate(self.norm_k(run_in_weight_dtype(self.k, x)).unflatten(-1, heads), tokens.rotary)
        v = run_in_weight_dtype(self.v, x).unflatten(-1, heads)
        shard = tokens.shard
        if shard is not None:
            q, k, v = shard.gather_tokens(q, k, v)
        attended = _attend(q, k, v, tokens)  # B L N D
        attended = attended if shard is None else shard.gather_heads(attended)
        return run_in_weight_dtype(self.o, attended.flatten(2))


class CrossAttention(SelfAttention):
    """Attention to the text plus attention to the image, which has its own keys and values; no mask.

    The results for several texts are combined; then the attention to the image is added.
    """

    def __init__(self, config: WanConfig) -> None:
        super().__init__(config)
        if config.has_image:
            self.k_img = nn.Linear(config.dim, config.dim)
            self.v_img = nn.Linear(config.dim, config.dim)
            self.norm_k_img = RMSNorm(config.dim, config.eps)

    def forward(self, x: Tensor, tokens: WanTokens) -> Tensor:
        """Return the attention of video tokens x, B L C, to the texts and the image."""
        heads = (self.num_heads, -1)
        q = self.norm_q(run_in_weight_dtype(self.q, x)).unflatten(-1, heads)
        attended_texts = []
        for text, repeats in tokens.text_tokens:  # repeats: how many equal padding rows a row represents
            k = self.norm_k(run_in_weight_dtype(self.k, text)).unflatten(-1, heads)
            v = run_in_weight_dtype(self.v, text).unflatten(-1, heads)
            attended_texts.append(_attend(q, k, v, tokens, repeats=repeats))  # B L N D
        # a second text, for guidance in the attention (NAG), is combined with the first
        attended = attended_texts[0]
        if tokens.combine_attention is not None:
            attended = tokens.combine_attention(*attended_texts)
        del attended_texts, k, v  # large tensors: freed before the attention to the image
        if tokens.image_tokens is not None:
            k = self.norm_k_img(run_in_weight_dtype(self.k_img, tokens.image_tokens)).unflatten(-1, heads)
            v = run_in_weight_dtype(self.v_img, tokens.image_tokens).unflatten(-1, heads)
            attended = attended + _attend(q, k, v, tokens)
        return run_in_weight_dtype(self.o, attended.flatten(2))


class WanAttentionBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward.

    The time embedding modulates self-attention and feed-forward by shift, scale and gate.
    """

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.norm1 = Float32LayerNorm(config.dim, config.eps)
        self.self_attn = SelfAttention(config)
        # the norm before cross-attention; numbered as in the published checkpoints
        self.norm3 = Float32LayerNorm(config.dim, config.eps, affine=True)
        self.cross_attn = CrossAttention(config)
        self.norm2 = Float32LayerNorm(config.dim, config.eps)
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.ffn_dim, config.dim),
        )
        self.modulation = nn.Parameter(torch.zeros(1, 6, config.dim))

    def forward(self, x: Tensor, tokens: WanTokens) -> Tensor:
        """Apply the block to video tokens x, B L C float32."""
        # x: B L C float32, also between the branches
        dtype, split = tokens.dtype, tokens.num_clean_tokens
        table = self.modulation.to(tokens.modulation.dtype)
        shift, scale, gate, *feed_rows = (table + tokens.modulation).unbind(2)
        h = modulate(self.norm1(x), shift, scale, dtype, split=split)
        x = add_gated(x, gate, self.self_attn(h, tokens), split)
        x = x + self.cross_attn(self.norm3(x).to(dtype), tokens)
        parts = []
        for part, *rows in split_segments(split, feed_rows, x):
            # positional: code that computes it in pieces passes arguments by position
            parts.append(self.feed_forward(part, dtype, *rows))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def modulated_input(self, x: Tensor, tokens: WanTokens) -> Tensor:
        """Return the block's input x, B L C, normalized and modulated as self-attention takes it."""
        shift, scale, *_ = (self.modulation.float() + tokens.modulation).unbind(2)
        return modulate(self.norm1(x), shift, scale, tokens.dtype, split=tokens.num_clean_tokens)

    def feed_forward(
        self, x: Tensor, dtype: torch.dtype, shift: Tensor, scale: Tensor, gate: Tensor
    ) -> Tensor:
        """Add the feed-forward branch to a segment x, B L C float32. Modulation rows are B 1 C each."""
        h = modulate(self.norm2(x), shift, scale, dtype)
        h = run_in_weight_dtype(self.ffn[2], self.ffn[1](run_in_weight_dtype(self.ffn[0], h)))
        return add_gated(x, gate, h)


class Head(nn.Module):
    """Final norm, modulated by the time embedding, and projection to patches; float32 as released."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        frames, rows, columns = config.patch_size
        self.norm = Float32LayerNorm(config.dim, config.eps)
        self.head = nn.Linear(config.dim, frames * rows * columns * config.out_dim)
        self.modulation = nn.Parameter(torch.zeros(1, 2, config.dim))

    def forward(self, x: Tensor, tokens: WanTokens) -> Tensor:
        """Return the patches of the velocity for tokens x, B L C to B L out_dim*4 float32."""
        shift, scale = (self.modulation.float() + tokens.time.unsqueeze(2)).unbind(2)  # each B S C
        h = modulate(self.norm(x), shift, scale, torch.float32, split=tokens.num_clean_tokens)
        return run_float32(self.head, h)


class ImageEmbedding(nn.Module):
    """Project CLIP features to image tokens, B I image_dim to B I C.

    First-and-last-frame models first add learned positions, which distinguish the two images.
    """

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            Float32LayerNorm(config.image_dim, 1e-5, affine=True),
            nn.Linear(config.image_dim, config.image_dim),
            nn.GELU(),
            nn.Linear(config.image_dim, config.dim),
            Float32LayerNorm(config.dim, 1e-5, affine=True),
        )
        if config.image_positions:
            self.emb_pos = nn.Parameter(torch.zeros(1, config.image_positions, config.image_dim))

    def forward(self, features: Tensor) -> Tensor:
        """Return image tokens, B I C. Raises ValueError if the features are for another number of images."""
        if hasattr(self, "emb_pos"):
            if features.shape[1] != self.emb_pos.shape[1]:
                raise ValueError(
                    f"{features.shape[1]} image tokens, the model takes {self.emb_pos.shape[1]}: one image "
                    "and the other"
                )
            features = features.float() + self.emb_pos.float()
        norm1, linear1, gelu, linear2, norm2 = self.proj
        return norm2(run_in_weight_dtype(linear2, gelu(run_in_weight_dtype(linear1, norm1(features)))))


class WanModel(BlockNetwork):
    """Predict the velocity of noisy video latents from text and, in some variants, image features.

    Variants with conditions on images or control videos take these as additional input channels. Simplified,
    without a second text and the code around the blocks:

        x = patch_embedding(noisy)                                            # B L C float32
        text = text_embedding(text)                                           # B T C
        time = time_embedding(sinusoid(timesteps))                            # B C
        rows = time_projection(time)                                          # B 6 C
        for block in blocks:
            shift, scale, gate, shift2, scale2, gate2 = block.modulation + rows
            x = x + gate * self_attn(norm1(x) * (1 + scale) + shift)
            x = x + cross_attn(norm3(x), text) + attention to image_embeds
            x = x + gate2 * ffn(norm2(x) * (1 + scale2) + shift2)
        velocity = head(x, time)                                # B L out_dim*4, returned as B out_dim F H W
    """

    spec = DIT
    compute_dtype_parameter = "blocks.0.ffn.0.bias"

    def __init__(
        self,
        config: WanConfig,
        attention: AttentionChoice = SDPA,
        rope: str = "default",
        precision: torch.dtype = torch.float32,
    ) -> None:
        """Build the network without weights.

        Args:
            config: Dimensions.
            attention: Passed to `modules.attention.attend`.
            rope: Key of `modules.layers.rope.TABLES`.
            precision: Dtype of time embedding, modulation and the rotation by position; float16 takes less
                memory.
        """
        super().__init__()
        self.config = config
        self.attention = attention
        self._precision = precision
        dim = config.dim
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, config.patch_size, config.patch_size)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim),
            nn.GELU(approximate="tanh"),
            nn.Linear(dim, dim),
        )
        self.time_embedding = nn.Sequential(
            nn.Linear(config.freq_dim, dim),
            nn.SiLU(),
            nn.Linear(dim, dim),
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(WanAttentionBlock(config) for _ in range(config.num_layers))
        self.head = Head(config)
        if config.has_image:
            self.img_emb = ImageEmbedding(config)
        if config.has_ref_conv:
            # embeds a reference image; not called without one
            self.ref_conv = nn.Conv2d(REF_CHANNELS, dim, 2, 2)
        head_width = dim // config.num_heads
        # rows and columns get a third of the pairs each, rounded down; frames get the rest
        spatial_width = 2 * (head_width // 6)
        widths = (head_width - 2 * spatial_width, spatial_width, spatial_width)
        make_table = bind_rotary_table(TABLES[rope], widths, dtype=precision)
        self._rotary = GridTable(make_table)
        self._source_rotary = GridTable(joined_tables(make_table))

    def embed(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        text: Sequence[Tensor] | Tensor,
        image_embeds: Tensor | None = None,
        overrides: Overrides = NO_OVERRIDES,
        frame_positions: tuple[int, ...] = (),
        sources: Sequence[SourceLatents] = (),
    ) -> Hidden:
        """Embed latents as video tokens, B L C float32; return them with the blocks' other inputs.

        1. Cut the latents into patches, and embed the times.
        2. Embed the text, and a second text for guidance in the attention.
        3. Take the image tokens from `image_embeds`, or from the first rows of the text.

        Args:
            noisy: Latents, B in_dim F H W, with condition channels after the noisy ones.
            timesteps: B, 0..1000.
            text: For each sample n text_dim, at most text_len rows; or B n text_dim.
            image_embeds: Features of the image encoder, B I image_dim, for models with image attention. None
                uses the first 257 rows of the text instead, as older tools ran Fun-Control models; zeros
                stand for no image.
            overrides: Changes to this call: a second text for guidance in the attention (NAG), named "text",
                and clean frames at the beginning, whose time and velocity are 0.
            frame_positions: Positions in time of frames that are not consecutive.
            sources: Clean clips and images in front of the tokens, for Bernini, with the time of `noisy`.

        Raises:
            ValueError: If sizes do not match.
        """
        self._check(noisy, image_embeds)
        dtype = activation_dtype(noisy.device, self.compute_dtype)
        patches = run_in_weight_dtype(self.patch_embedding, noisy).float()  # B C f h w
        _, _, frames, rows, columns = patches.shape
        grid = (frames, rows, columns)
        time, modulation = self._embed_times(timesteps, overrides.num_clean_frames > 0)
        text_is_image = self.config.has_image and image_embeds is None
        # equal rows of padding may be merged, unless the first rows of the text stand for the image
        padding_attention = None if text_is_image else self.attention
        texts = [text] if overrides.nag is None else [text, overrides.nag.text["text"]]
        # for each text: its tokens, and how often a merged padding token stands for equal rows
        embedded = [self._embed_text(prompt, noisy, padding_attention, dtype) for prompt in texts]
        image_tokens = None
        if image_embeds is not None:
            image_tokens = self.img_emb(image_embeds).to(dtype)
        elif text_is_image:
            image_tokens, embedded = _take_image_rows(embedded)
        num_clean_patches = overrides.num_clean_frames // self.config.patch_size[0]
        tokens = WanTokens(
            grid,
            rotary=self._rotary.get_table(
                TokenGrid(grid, overrides.slow_frames, frame_positions=frame_positions), noisy.device
            ),
            text_tokens=tuple(embedded),
            image_tokens=image_tokens,
            time=time,
            modulation=modulation,
            num_clean_tokens=num_clean_patches * rows * columns,
            dtype=dtype,
            attention=self.attention,
            combine_attention=overrides.combine_attention,
        )
        hidden = Hidden(rearrange(patches, "b c f h w -> b (f h w) c").contiguous(), tokens)
        if sources:
            self._put_in_front(hidden, sources, overrides.slow_frames)
        return hidden

    def _put_in_front(
        self, hidden: Hidden, sources: Sequence[SourceLatents], slow_frames: SlowedFrequency | None
    ) -> None:
        """Add the tokens of sources in front of those of the noisy latents."""
        parts, grids = [], []
        for source in sources:
            patches = run_in_weight_dtype(self.patch_embedding, source.latents).float()
            # positions begin at 0 on the source's own grid, as those of the noisy latents do
            grids.append(TokenGrid(tuple(patches.shape[2:]), slow_frames, source=source.number))
            parts.append(rearrange(patches, "b c f h w -> b (f h w) c").expand(len(hidden.x), -1, -1))
        rotary = self._source_rotary.get_table(tuple(grids), hidden.x.device)
        hidden.tokens = replace(
            hidden.tokens,
            rotary=torch.cat([rotary, hidden.tokens.rotary]),
            num_source_tokens=len(rotary),
        )
        hidden.x = torch.cat([*parts, hidden.x], dim=1)

    def _check(self, noisy: Tensor, image_embeds: Tensor | None) -> None:
        if noisy.shape[1] != self.config.in_dim:
            raise ValueError(f"{noisy.shape[1]} input channels, the model takes {self.config.in_dim}")
        if any(size % patch for size, patch in zip(noisy.shape[2:], self.config.patch_size, strict=True)):
            raise ValueError(
                f"latents of {tuple(noisy.shape[2:])} cannot be cut into patches of {self.config.patch_size}"
            )
        if image_embeds is not None and not self.config.has_image:
            raise ValueError("image features are given, but the model has no image attention")

    def _embed_text(
        self,
        text: Sequence[Tensor] | Tensor,
        noisy: Tensor,
        padding_attention: AttentionChoice | None,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor | None]:
        """Return text tokens, B T C, and how many equal rows each of them represents, T; None: one each."""
        # `padding_attention` is the attention that may merge equal rows of padding; None if all are needed.
        samples = [rows.to(noisy.device) for rows in text]
        rows, repeats = pad_texts(samples, self.config.text_len, padding_attention)
        first, gelu, second = self.text_embedding
        embedded = run_in_weight_dtype(second, gelu(run_in_weight_dtype(first, rows))).to(dtype)
        # one text may serve all samples
        return embedded.expand(len(noisy), -1, -1), repeats

    def unembed(self, x: Tensor, tokens: WanTokens) -> Tensor:
        """Turn video tokens B L C into the velocity, B out_dim F H W float32; 0 for clean input frames.

        Sources, whose tokens come first, have no velocity.
        """
        x = x[:, tokens.num_source_tokens :]
        frames, rows, columns = tokens.grid
        pf, ph, pw = self.config.patch_size
        velocity = rearrange(
            self.head(x, tokens),
            "b (f h w) (pf ph pw c) -> b c (f pf) (h ph) (w pw)",
            f=frames,
            h=rows,
            w=columns,
            pf=pf,
            ph=ph,
            pw=pw,
        )
        if not tokens.num_clean_tokens:
            return velocity
        num_clean_frames = tokens.num_clean_tokens // (rows * columns) * pf  # these come first
        clean = torch.zeros_like(velocity[:, :, :num_clean_frames])
        return torch.cat([clean, velocity[:, :, num_clean_frames:]], dim=2)

    def _embed_times(self, timesteps: Tensor, has_clean_frames: bool) -> tuple[Tensor, Tensor]:
        """Return the embedded times, B S C, and their modulation, B S 6 C."""
        # S is 1, or 2 if there are clean frames, whose time 0 comes first. Each distinct time is embedded
        # once, not once for each token as in the released code.
        if has_clean_frames:
            timesteps = torch.cat([timesteps, timesteps.new_zeros(1)])  # B+1: time 0 is embedded once for all
        time = run_float32(self.time_embedding[0], sinusoid(timesteps, self.config.freq_dim))
        time = run_float32(self.time_embedding[2], functional.silu(time))
        modulation = run_float32(self.time_projection[1], functional.silu(time)).unflatten(1, (6, -1))
        time, modulation = time.to(self._precision), modulation.to(self._precision)
        if not has_clean_frames:
            return time.unsqueeze(1), modulation.unsqueeze(1)
        return _pair_with_last(time), _pair_with_last(modulation)


def _pair_with_last(rows: Tensor) -> Tensor:
    """Stack each of the first B rows with the last one, which comes first: B 2 ..."""
    last = rows[-1:]
    front = rows[:-1]
    return torch.stack([last.expand_as(front), front], dim=1)


def _take_image_rows(
    texts: Sequence[tuple[Tensor, Tensor | None]],
) -> tuple[Tensor, list[tuple[Tensor, Tensor | None]]]:
    """Return the first text's leading rows, which stand for the image, and all texts without these rows."""
    first, _ = texts[0]
    remaining = [(rows[:, TEXT_ROWS_AS_IMAGE:], repeats) for rows, repeats in texts]
    return first[:, :TEXT_ROWS_AS_IMAGE], remaining


def _attend(q: Tensor, k: Tensor, v: Tensor, tokens: WanTokens, repeats: Tensor | None = None) -> Tensor:
    """Compute attention in one dtype; q, k and v have different ones only in files with mixed dtypes."""
    dtype = tokens.dtype
    return attend(q.to(dtype), k.to(dtype), v.to(dtype), tokens.attention, repeats=repeats)

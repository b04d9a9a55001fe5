"""The transformer of MiniMax-H3: one sequence of frames, audio, conditions and text, one stack of blocks.

Module names are the released ones. The input and output layers of latents, the embedding of time, modulation
and rotary angles are always float32. Source: the released weights, and diffusers'
`MiniMaxH3Transformer3DModel`.

The release packs [text, conditions, audio, frames]. Attention sees all tokens and depends on positions only,
so here the noisy frames come first, then their audio, then conditions, then the text.
"""
# Letters: B batch, L all tokens, V of the learned images, M of their audio, T of the text, C their width,
# N heads, D head width, S segments of tokens that share timestep and modality, K timesteps, E their width,
# Z latents

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby

import torch
import torch.nn.functional as functional
from einops import rearrange
from torch import Tensor, nn

from minimax_h3.configs import AUDIO, DIT, IMAGE, NUM_MODALITIES, PATCH, TEXT, H3Config, choose_spec
from minimax_h3.positions import AudioPosition, ImageGrid, ImagePosition, token_positions
from minimax_h3.video_vae_blocks import rotate_first
from modules.attention.attend import attend
from modules.devices import send_ahead
from modules.layers.modulation import add_gated, modulate, split_segments
from modules.layers.norms import RMSNorm, activation_dtype, run_float32, run_in_weight_dtype
from modules.layers.rope import GridTable, cos_and_sin, sinusoid
from modules.speed_options import SDPA, AttentionChoice
from protocols.steps import NO_OVERRIDES, Overrides
from runtime.offload.context import TokenShard
from runtime.run_blocks import Hidden, run_blocks

MODULATION_VECTORS = 6  # of a block: shift, scale and gate of attention and of feed-forward
IMAGE_CLEAN_FRACTION = 0.999  # minimum time of image conditions, nearly clean


@dataclass(frozen=True)
class H3Condition:
    """Latents with their position: clean or slightly noised conditions, or the noisy latents."""

    latents: Tensor  # B Z F H W of images, B Z 2 A of audio
    position: ImagePosition | AudioPosition
    clean_fraction: float | None = None  # of the latents, which is its minimum time; None: as released

    @property
    def is_audio(self) -> bool:
        """Return whether the latents are audio."""
        return isinstance(self.position, AudioPosition)

    @property
    def modality(self) -> int:
        """Return the modality of the tokens, which selects their modulation."""
        return AUDIO if self.is_audio else IMAGE

    def timestep(self, image_timestep: float) -> float:
        """Return the condition's timestep, 0 for noise to 1 for clean.

        Images are never noisier than the denoised frames, which are at `image_timestep`.
        """
        if self.is_audio:
            return 1.0 if self.clean_fraction is None else self.clean_fraction
        fraction = IMAGE_CLEAN_FRACTION if self.clean_fraction is None else self.clean_fraction
        return max(image_timestep, fraction)


FRAME_TIMESTEP = 0  # index of the frames' timestep among those of a pass; text tokens have the same


@dataclass(frozen=True)
class TokenSegment:
    """Consecutive tokens with the same timestep and modality, and hence the same modulation."""

    num_tokens: int
    timestep_index: int  # among the timesteps of a pass
    modality: int

    @property
    def modulation_row(self) -> int:
        """Return the row of its modulation in a table of all timesteps and modalities, K * NUM_MODALITIES."""
        return NUM_MODALITIES * self.timestep_index + self.modality


@dataclass(frozen=True)
class H3Tokens:
    """Inputs of the blocks in addition to x, B L C; built once per forward pass."""

    grid: ImageGrid  # grid of the images to denoise, whose tokens come first
    num_audio_tokens: int  # number of audio tokens to denoise, M, which follow
    rotary_emb: Tensor  # of all tokens, L 1 D/2 2
    embedded_timesteps: Tensor  # K E float32; every block computes its modulation from them
    modulation_rows: tuple[int, ...]  # for each segment, its row among K * NUM_MODALITIES
    segment_starts: tuple[int, ...]  # index at which each segment after the first begins
    dtype: torch.dtype  # dtype of activations between layers
    attention: AttentionChoice
    token_range: TokenShard | None = None  # the tokens that this process has; None: all

    def cut(self, part: TokenShard) -> "H3Tokens":
        """Return the inputs for one process's tokens; `rotary_emb` still covers all tokens."""
        starts = tuple(part.count_among_first(start) for start in self.segment_starts)
        return replace(self, token_range=part, segment_starts=starts)

    @property
    def num_image_tokens(self) -> int:
        """Return V, the number of tokens of the noisy frames."""
        return self.grid.tokens


class H3Attention(nn.Module):
    """Self-attention over all tokens, whose heads together are wider than the tokens."""

    def __init__(self, config: H3Config) -> None:
        super().__init__()
        self.head_width = config.head_width
        self.qkv_proj = nn.Linear(config.dim, 3 * config.inner_dim, bias=False)
        self.q_norm = RMSNorm(config.head_width, config.eps)
        self.k_norm = RMSNorm(config.head_width, config.eps)
        self.out_proj = nn.Linear(config.inner_dim, config.dim, bias=False)

    def project_heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key and value heads, each B L N D; queries and keys are normalized."""
        query, key, value = (
            run_in_weight_dtype(self.qkv_proj, x).unflatten(-1, (3, -1, self.head_width)).unbind(2)
        )
        return self.q_norm(query), self.k_norm(key), value

    def forward(self, x: Tensor, tokens: H3Tokens) -> Tensor:
        """Return the self-attention of tokens x, B L C."""
        query, key, value = self.project_heads(x)
        if tokens.token_range is not None:
            query, key, value = tokens.token_range.gather_tokens(query, key, value)
        query = rotate_first(query, tokens.rotary_emb)
        key = rotate_first(key, tokens.rotary_emb)
        attended = attend(query, key, value, tokens.attention)
        if tokens.token_range is not None:
            attended = tokens.token_range.gather_heads(attended)
        return run_in_weight_dtype(self.out_proj, attended.flatten(2))

    def attend_text(self, x: Tensor, choice: AttentionChoice) -> Tensor:
        """Return the self-attention of text tokens x, B T C, without positions."""
        query, key, value = self.project_heads(x)
        return run_in_weight_dtype(self.out_proj, attend(query, key, value, choice).flatten(2))


class H3FeedForward(nn.Module):
    """Gated feed-forward fc2(silu(gate) * value). Source: Shazeer 2020, arXiv 2002.05202."""

    def __init__(self, config: H3Config) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.dim, 2 * config.ffn_dim, bias=False)
        self.fc2 = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the feed-forward to x, B L C."""
        gate, value = run_in_weight_dtype(self.fc1, x).chunk(2, dim=-1)
        return run_in_weight_dtype(self.fc2, functional.silu(gate) * value)


class H3StreamBlock(nn.Module):
    """Attention and feed-forward, each after a norm."""

    def __init__(self, config: H3Config) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.dim, config.eps)
        self.attn = H3Attention(config)
        self.norm2 = RMSNorm(config.dim, config.eps)
        self.mlp = H3FeedForward(config)


class H3RefinerBlock(H3StreamBlock):
    """Block over text tokens, without position or time embeddings."""

    def forward(self, x: Tensor, choice: AttentionChoice) -> Tensor:
        """Apply the block to text tokens x, B T C."""
        # x: B T C
        x = x + self.attn.attend_text(self.norm1(x), choice)
        output: Tensor = x + self.mlp(self.norm2(x))
        return output


class H3TokenRefiner(nn.Module):
    """Refines a text's tokens by self-attention."""

    def __init__(self, config: H3Config) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(H3RefinerBlock(config) for _ in range(config.refiner_layers))
        self.final_norm = RMSNorm(config.dim, config.eps)

    def forward(self, x: Tensor, choice: AttentionChoice) -> Tensor:
        """Refine text tokens, B T C."""
        for block in self.blocks:
            x = block(x, choice)
        normed: Tensor = self.final_norm(x)
        return normed


def _make_modulation(config: H3Config, num_vectors: int) -> nn.ModuleDict:
    """Return the layer that computes `num_vectors` modulation vectors from a time embedding."""
    return nn.ModuleDict({"linear": nn.Linear(config.time_dim, num_vectors * config.dim)})


class H3Block(H3StreamBlock):
    """Block with self-attention among all tokens, modulated by their timestep and their modality."""

    def __init__(self, config: H3Config) -> None:
        super().__init__(config)
        self.adaln_proj = _make_modulation(config, NUM_MODALITIES * MODULATION_VECTORS)

    def modulation(self, tokens: H3Tokens) -> tuple[Tensor, ...]:
        """Return shift, scale and gate for attention and for the feed-forward, each 1 S C float32."""
        projected = run_in_weight_dtype(self.adaln_proj["linear"], tokens.embedded_timesteps).float()
        table = projected.unflatten(-1, (NUM_MODALITIES, MODULATION_VECTORS, -1)).flatten(0, 1)
        # stacking rows: indexing with a list would copy the list to the device, and the host would wait
        by_segment = torch.stack([table[row] for row in tokens.modulation_rows])  # S 6 C
        return by_segment.unsqueeze(0).unbind(2)

    def forward(self, x: Tensor, tokens: H3Tokens) -> Tensor:
        """Apply the block to tokens x, B L C."""
        # x: B L C
        shift, scale, gate, *feed_forward_modulation = self.modulation(tokens)
        h = modulate(self.norm1(x), shift, scale, tokens.dtype, split=tokens.segment_starts)
        x = add_gated(x, gate, self.attn(h, tokens), tokens.segment_starts)
        # the feed-forward comes last: if it runs in pieces, recomputing the block can stop before it
        outputs = []
        for segment, *modulation in split_segments(tokens.segment_starts, feed_forward_modulation, x):
            # positional: code that computes it in pieces passes arguments by position
            outputs.append(self.feed_forward(segment, tokens.dtype, *modulation))
        return torch.cat(outputs, dim=1)

    def modulated_input(self, x: Tensor, tokens: H3Tokens) -> Tensor:
        """Return the modulated input of attention for the noisy frames, the first V tokens of x, B L C."""
        shift, scale, *_ = self.modulation(tokens)
        noisy_frames = x[:, : tokens.segment_starts[0]]
        return modulate(self.norm1(noisy_frames), shift[:, :1], scale[:, :1], tokens.dtype)

    def feed_forward(
        self, x: Tensor, dtype: torch.dtype, shift: Tensor, scale: Tensor, gate: Tensor
    ) -> Tensor:
        """Add the feed-forward branch to x, B L C; each token is processed independently."""
        return add_gated(x, gate, self.mlp(modulate(self.norm2(x), shift, scale, dtype)))


class FinalLayer(nn.Module):
    """Final norm modulated by the time, and projections to frame latents and audio latents."""

    def __init__(self, config: H3Config) -> None:
        super().__init__()
        self.norm = RMSNorm(config.dim, config.eps)
        self.adaln_proj = _make_modulation(config, 2)
        self.video_out = nn.Linear(config.dim, config.channels * PATCH**2)
        self.audio_out = nn.Linear(config.dim, config.audio_channels)

    def forward(self, x: Tensor, tokens: H3Tokens) -> tuple[Tensor, Tensor]:
        """Project the tokens of noisy frames and audio to outputs, B V Z*4 and B M Z', float32."""
        by_timestep = run_in_weight_dtype(
            self.adaln_proj["linear"], tokens.embedded_timesteps
        ).float()  # K 2C
        # the first two segments are the noisy frames and their audio
        timestep_indices = [row // NUM_MODALITIES for row in tokens.modulation_rows[:2]]
        modulation = torch.stack([by_timestep[index] for index in timestep_indices]).unsqueeze(0)  # 1 2 2C
        shift, scale = modulation.chunk(2, dim=-1)
        num_images = tokens.num_image_tokens
        images, audio = x[:, :num_images], x[:, num_images : num_images + tokens.num_audio_tokens]
        normed_images = modulate(self.norm(images), shift[:, :1], scale[:, :1], tokens.dtype)
        normed_audio = modulate(self.norm(audio), shift[:, 1:], scale[:, 1:], tokens.dtype)
        return run_float32(self.video_out, normed_images), run_float32(self.audio_out, normed_audio)


class H3Model(nn.Module):
    """Predicts the clean latents minus the noise of a video and of its audio.

    Simplified, without conditions and the code around the blocks:

        x = cat([video_patch_proj(patches of noisy), audio_patch_proj(audio), text])   # B V+M+T C
        text = token_refiner(condition_proj(text))                         # B T C
        time = silu(time_embedder(sinusoid(times)))                        # K E: of frames, of audio
        for block in blocks:
            shift, scale, gate, shift2, scale2, gate2 = block.adaln_proj(time) for time and kind of each token
            x = x + gate * attn(norm1(x) * (1 + scale) + shift)
            x = x + gate2 * mlp(norm2(x) * (1 + scale2) + shift2)
        shift, scale = final_layer.adaln_proj(time)
        h = final_layer.norm(x) * (1 + scale) + shift
        output = video_out(h[:, :V]), audio_out(h[:, V : V + M])
    """

    spec = DIT

    def __init__(self, config: H3Config, attention: AttentionChoice = SDPA) -> None:
        """Build the network without weights; video, audio and text have projections, and share blocks."""
        super().__init__()
        self.config = config
        self.spec = choose_spec(config)
        self.attention = attention
        dim = config.dim
        self.video_patch_proj = nn.Linear(config.channels * PATCH**2, dim)
        self.audio_patch_proj = nn.Linear(config.audio_channels, dim)
        self.condition_proj = nn.Linear(config.text_dim, dim)
        if config.table_rows:  # a pruned file has a table in place of the time embedder
            self.adaln_t_table = nn.Parameter(torch.zeros(config.table_rows, config.time_dim))
        else:
            layers = {
                "proj_in": nn.Linear(config.freq_dim, config.time_hidden),
                "proj_out": nn.Linear(config.time_hidden, config.time_dim),
            }
            self.time_embedder = nn.ModuleDict(layers)
        self.token_refiner = H3TokenRefiner(config)
        self.blocks = nn.ModuleList(H3Block(config) for _ in range(config.num_layers))
        self.final_layer = FinalLayer(config)
        self._rotary_table = GridTable[tuple[tuple[ImagePosition | AudioPosition, ...], int]](
            self._make_rotary_table
        )

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the norms, which shows the compute dtype even if other weights have 8 bits."""
        return self.get_parameter("blocks.0.norm1.weight").dtype

    def forward(
        self,
        noisy: Tensor,
        audio: Tensor,
        times: tuple[float, float],
        text: Tensor,
        is_image_token: Sequence[bool] = (),
        start: float | None = None,
        conditions: Sequence[H3Condition] = (),
        overrides: Overrides = NO_OVERRIDES,
    ) -> tuple[Tensor, Tensor]:
        """Return the predicted velocities of frames, B Z F H W, and of audio, B Z' 2 A.

        Args:
            noisy: B Z F H W.
            audio: B Z' 2 A, two channels.
            times: Times of frames and of audio, 0 for noise, 1 for clean.
            text: States of the language model, B T text_dim, without a mask.
            is_image_token: Whether each text token is the placeholder of an image part; () without images.
            start: Time position of the first latent; None places it after the text.
            conditions: Clean images, clips and audio, in the order of their time positions.
            overrides: Changes to this call.
        """
        hidden = self.embed(
            noisy,
            audio,
            times,
            text,
            is_image_token=is_image_token,
            start=start,
            conditions=conditions,
        )
        run_blocks(self, hidden, overrides)
        return self.unembed(hidden.x, hidden.tokens)

    def embed(
        self,
        noisy: Tensor,
        audio: Tensor,
        times: tuple[float, float],
        text: Tensor,
        is_image_token: Sequence[bool] = (),
        start: float | None = None,
        conditions: Sequence[H3Condition] = (),
    ) -> Hidden:
        """Return the tokens of frames, audio, conditions and text, and the other inputs of the blocks.

        Args:
            noisy: B Z F H W.
            audio: B Z' 2 A, two channels.
            times: Times of frames and of audio, 0 for noise, 1 for clean.
            text: States of the language model, B T text_dim, without a mask.
            is_image_token: Whether each text token is the placeholder of an image part; () without images.
            start: Time position of the first latent of `noisy` and `audio`; None places it after the text.
            conditions: Clean images, clips and audio, in the order of their time positions.

        Raises:
            ValueError: If sizes do not match.
        """
        self._check_sizes(noisy, audio)
        dtype = activation_dtype(noisy.device, self.compute_dtype)
        num_text = text.shape[1]
        start_time = float(num_text) if start is None else start
        grid = ImageGrid(noisy.shape[2], noisy.shape[3] // PATCH, noisy.shape[4] // PATCH)
        media = [
            H3Condition(noisy, ImagePosition(grid, start_time)),
            H3Condition(audio, AudioPosition(audio.shape[3], start_time, grid)),
            *conditions,
        ]
        embedded_media = [self._embed_medium(medium) for medium in media]
        timesteps, timestep_indices = _index_timesteps(times, conditions)
        segments = [
            TokenSegment(embedded.shape[1], index, medium.modality)
            for medium, embedded, index in zip(media, embedded_media, timestep_indices, strict=True)
        ]
        num_audio_tokens = segments[1].num_tokens
        # text with image placeholders is split into runs of text and of image tokens
        segments += _split_text(is_image_token, num_text)
        positions = tuple(medium.position for medium in media)
        tokens = H3Tokens(
            grid,
            num_audio_tokens=num_audio_tokens,
            rotary_emb=self._rotary_table.get_table((positions, num_text), noisy.device),
            embedded_timesteps=self._embed_timesteps(timesteps, noisy.device),
            modulation_rows=tuple(segment.modulation_row for segment in segments),
            segment_starts=tuple(accumulate(segment.num_tokens for segment in segments[:-1])),
            dtype=dtype,
            attention=self.attention,
        )
        embedded_tokens = [embedded.to(dtype) for embedded in embedded_media]
        embedded_tokens.append(self._embed_text(text.to(dtype)))
        return Hidden(torch.cat(embedded_tokens, dim=1), tokens)

    def _embed_medium(self, medium: H3Condition) -> Tensor:
        """Embed frames or audio as tokens, B L C."""
        if medium.is_audio:
            return self._embed_audio(medium.latents)
        return self._embed_images(medium.latents)

    def _check_sizes(self, noisy: Tensor, audio: Tensor) -> None:
        config = self.config
        _, channels, _, height, width = noisy.shape
        if channels != config.channels or height % PATCH or width % PATCH:
            raise ValueError(f"latents of {tuple(noisy.shape[1:])}: {config.channels} channels, even sides")
        if audio.shape[1] != config.audio_channels or audio.shape[2] != 2:
            raise ValueError(
                f"audio of {tuple(audio.shape[1:])}: width {config.audio_channels} and 2 channels "
                "are expected"
            )

    def _embed_images(self, latents: Tensor) -> Tensor:
        """Embed frames as tokens, B Z F H W to B L C."""
        patches = rearrange(latents, "b z f (h ph) (w pw) -> b (f h w) (z ph pw)", ph=PATCH, pw=PATCH)
        return run_float32(self.video_patch_proj, patches)

    def _embed_audio(self, latents: Tensor) -> Tensor:
        """Embed audio, B Z' 2 A, as tokens, B 2A C, with the left channel's tokens first."""
        return run_float32(self.audio_patch_proj, latents.flatten(2).mT)

    def _embed_text(self, text: Tensor) -> Tensor:
        embedded: Tensor = self.token_refiner(run_in_weight_dtype(self.condition_proj, text), self.attention)
        return embedded

    def _embed_timesteps(self, timesteps: Sequence[float], device: torch.device) -> Tensor:
        """Return the time embeddings that the blocks project to their modulation, K E float32."""
        on_device = send_ahead(torch.tensor(timesteps, dtype=torch.float32), device)
        if self.config.table_rows:
            return self._look_up_embeddings(on_device)
        sinusoids = sinusoid(on_device, self.config.freq_dim, torch.float32)
        hidden = functional.silu(run_float32(self.time_embedder["proj_in"], sinusoids))
        return functional.silu(run_float32(self.time_embedder["proj_out"], hidden))

    def _look_up_embeddings(self, timesteps: Tensor) -> Tensor:
        """Interpolate the table of time embeddings of a pruned file linearly at `timesteps`, K E."""
        table = self.adaln_t_table.float()
        positions = timesteps.clamp(0, 1) * (len(table) - 1)
        lower = positions.floor().long().clamp(max=len(table) - 2)
        return table[lower].lerp(table[lower + 1], (positions - lower)[:, None])

    def unembed(self, x: Tensor, tokens: H3Tokens) -> tuple[Tensor, Tensor]:
        """Project tokens to the outputs of frames, B Z F H W, and audio, B Z' 2 A, in float32."""
        patches, audio = self.final_layer(x, tokens)
        images = rearrange(
            patches,
            "b (f h w) (z ph pw) -> b z f (h ph) (w pw)",
            f=tokens.grid.frames,
            h=tokens.grid.rows,
            ph=PATCH,
            pw=PATCH,
        )
        return images, audio.mT.unflatten(2, (2, -1))

    def _make_rotary_table(
        self, layout: tuple[tuple[ImagePosition | AudioPosition, ...], int], /, *, device: torch.device
    ) -> Tensor:
        """Return the rotary table, (cosine, sine) pairs L 1 3K 2 float32, with K frequencies on each axis."""
        media, num_text = layout
        positions = token_positions(media, num_text).float()
        # float32, as in training
        exponents = torch.arange(0, 2 * self.config.frequencies, 2, dtype=torch.float32)
        frequencies = 1 / self.config.rope_theta ** (exponents / (2 * self.config.frequencies))
        angles = positions[:, :, None] * frequencies
        return cos_and_sin(angles.flatten(1)).unsqueeze(1).to(device)


def _index_timesteps(
    times: tuple[float, float], conditions: Sequence[H3Condition]
) -> tuple[list[float], list[int]]:
    """Return the timesteps of a pass, and which of them (by index) frames, audio and each condition have."""
    # Conditions share a timestep if the same rule sets it, even if two rules give equal values: compiled
    # blocks depend on which tokens share one, and both schedules of `times` begin at the same value.
    image_timestep, audio_timestep = times
    timesteps = [image_timestep, audio_timestep]
    indices = [FRAME_TIMESTEP, FRAME_TIMESTEP + 1]
    index_by_rule: dict[tuple[bool, float | None], int] = {}
    for condition in conditions:
        rule = (condition.is_audio, condition.clean_fraction)
        if rule not in index_by_rule:
            index_by_rule[rule] = len(timesteps)
            timesteps.append(condition.timestep(image_timestep))
        indices.append(index_by_rule[rule])
    return timesteps, indices


def _split_text(is_image_token: Sequence[bool], num_text: int) -> list[TokenSegment]:
    """Split a text's tokens into segments of consecutive text or image tokens."""
    if not is_image_token:
        return [TokenSegment(num_text, FRAME_TIMESTEP, TEXT)]
    segments: list[TokenSegment] = []
    for is_image, run in groupby(is_image_token):
        modality = IMAGE if is_image else TEXT
        segments.append(TokenSegment(len(list(run)), FRAME_TIMESTEP, modality))
    return segments

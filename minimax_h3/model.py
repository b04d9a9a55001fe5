"""The transformer of MiniMax-H3: one sequence of frames, audio, conditions and text, one stack of blocks.

Module names are the released ones. The input and output layers of latents, the embedding of time, modulation
and rotary angles are always float32. Source: the released weights, and diffusers'
`MiniMaxH3Transformer3DModel`.

The release packs [text, conditions, audio, frames]. Attention sees all tokens and depends on positions only,
so here the noisy frames come first, then their audio, then conditions, then the text.
"""
# Letters: B batch, L all tokens, V of the learned images, M of their sound, T of the text, C their width,
# N heads, D head width, S segments of tokens that share time and kind, K times, E their width, Z latents

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as functional
from einops import rearrange
from torch import Tensor, nn

from minimax_h3.configs import DIT, IMAGE, KINDS, PATCH, SOUND, TEXT, H3Config, spec_of
from minimax_h3.places import AudioPlace, ImageGrid, ImagePlace, all_places
from minimax_h3.video_vae_blocks import rotate_first
from modules.attention.attend import attend
from modules.devices import send_ahead
from modules.layers.modulation import add_gated, modulate, split_segments
from modules.layers.norms import RMSNorm, activation_dtype, run_float32, run_in_weight_dtype
from modules.layers.rope import GridTable, cos_and_sin, sinusoid
from modules.speed_options import SDPA, AttentionChoice
from protocols.steps import NO_OVERRIDES, Overrides
from runtime.run_blocks import Hidden, run_blocks

if TYPE_CHECKING:  # loaded only if processes share tokens
    from runtime.offload.context import TokenShard

ROWS = 6  # modulation rows of a block: shift, scale and gate of attention and of feed-forward
IMAGES_LIE = 0.999  # minimum time of image conditions, nearly clean


@dataclass(frozen=True)
class H3Condition:
    """Latents with their time position: clean or slightly noised conditions, or the noisy latents."""

    latents: Tensor  # B Z F H W of images, B Z 2 A of audio
    place: ImagePlace | AudioPlace
    clean: float | None = None  # fraction of clean latents, which is its minimum time; None: as released

    @property
    def is_sound(self) -> bool:
        """Return whether the latents are audio."""
        return isinstance(self.place, AudioPlace)

    @property
    def kind(self) -> int:
        """Return the kind of the tokens, which selects their modulation."""
        return SOUND if self.is_sound else IMAGE

    def level(self, image_time: float) -> float:
        """Return the condition's time; images are never noisier than the denoised frames at `image_time`."""
        if self.is_sound:
            return 1.0 if self.clean is None else self.clean
        return max(image_time, IMAGES_LIE if self.clean is None else self.clean)


FRAME_TIME = 0  # index of the frames' time among the times of a pass; text tokens have the same time


@dataclass(frozen=True)
class TokenSegment:
    """Consecutive tokens that share a time and a kind."""

    tokens: int
    time: int  # index among the times of a pass
    kind: int


@dataclass(frozen=True)
class H3Tokens:
    """Inputs of the blocks in addition to x, B L C; built once per forward pass."""

    grid: ImageGrid  # grid of the images to denoise, whose tokens come first
    audio: int  # number of audio tokens to denoise, M, which follow
    rotary: Tensor  # rotary embedding of all tokens, L 1 D/2 2
    times: Tensor  # K E float32, embedded; every block computes its modulation from them
    slots: tuple[int, ...]  # for each segment, its row among K * KINDS
    starts: tuple[int, ...]  # index at which each segment after the first begins
    dtype: torch.dtype  # dtype of activations between layers
    attention: AttentionChoice
    shard: "TokenShard | None" = None  # the tokens that this process has; None: all

    def cut(self, shard: "TokenShard") -> "H3Tokens":
        """Return the inputs for one process's tokens; `rotary` still covers all tokens."""
        starts = tuple(shard.count_among_first(start) for start in self.starts)
        return replace(self, shard=shard, starts=starts)

    @property
    def image(self) -> int:
        """Return the number of tokens V of the frames to denoise."""
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

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key and value heads, each B L N D; queries and keys are normalized."""
        query, key, value = (
            run_in_weight_dtype(self.qkv_proj, x).unflatten(-1, (3, -1, self.head_width)).unbind(2)
        )
        return self.q_norm(query), self.k_norm(key), value

    def forward(self, x: Tensor, tokens: H3Tokens) -> Tensor:
        """Return the self-attention of tokens x, B L C."""
        query, key, value = self.heads(x)
        if tokens.shard is not None:
            query, key, value = tokens.shard.gather_tokens(query, key, value)
        query = rotate_first(query, tokens.rotary)
        key = rotate_first(key, tokens.rotary)
        attended = attend(query, key, value, tokens.attention)
        if tokens.shard is not None:
            attended = tokens.shard.gather_heads(attended)
        return run_in_weight_dtype(self.out_proj, attended.flatten(2))

    def see_text(self, x: Tensor, choice: AttentionChoice) -> Tensor:
        """Return the self-attention of text tokens x, B T C, without positions."""
        query, key, value = self.heads(x)
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
        x = x + self.attn.see_text(self.norm1(x), choice)
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


def _make_modulation(config: H3Config, rows: int) -> nn.ModuleDict:
    """Return the layer that computes `rows` modulation vectors from a time embedding."""
    return nn.ModuleDict({"linear": nn.Linear(config.time_dim, rows * config.dim)})


class H3Block(H3StreamBlock):
    """Block with self-attention among all tokens, modulated by their time and their kind."""

    def __init__(self, config: H3Config) -> None:
        super().__init__(config)
        self.adaln_proj = _make_modulation(config, KINDS * ROWS)

    def rows(self, tokens: H3Tokens) -> tuple[Tensor, ...]:
        """Return shift, scale and gate for attention and for the feed-forward, each 1 S C float32."""
        table = run_in_weight_dtype(self.adaln_proj["linear"], tokens.times).float()
        by_slot = table.unflatten(-1, (KINDS, ROWS, -1)).flatten(0, 1)  # K*KINDS 6 C
        # stacking rows: indexing with a list would copy the list to the device, and the host would wait
        chosen = torch.stack([by_slot[slot] for slot in tokens.slots])
        return chosen.unsqueeze(0).unbind(2)

    def forward(self, x: Tensor, tokens: H3Tokens) -> Tensor:
        """Apply the block to tokens x, B L C."""
        # x: B L C
        shift, scale, gate, *feed_rows = self.rows(tokens)
        h = modulate(self.norm1(x), shift, scale, tokens.dtype, split=tokens.starts)
        x = add_gated(x, gate, self.attn(h, tokens), tokens.starts)
        # the feed-forward comes last: if it runs in pieces, recomputing the block can stop before it
        parts = []
        for part, *rows in split_segments(tokens.starts, feed_rows, x):
            # positional: code that computes it in pieces passes arguments by position
            parts.append(self.feed(part, tokens.dtype, *rows))
        return torch.cat(parts, dim=1)

    def modulated_input(self, x: Tensor, tokens: H3Tokens) -> Tensor:
        """Return the modulated input of attention for the noisy frames, the first V tokens of x, B L C."""
        shift, scale, *_ = self.rows(tokens)
        return modulate(self.norm1(x[:, : tokens.starts[0]]), shift[:, :1], scale[:, :1], tokens.dtype)

    def feed(self, x: Tensor, dtype: torch.dtype, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
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
        table = run_in_weight_dtype(self.adaln_proj["linear"], tokens.times).float()
        rows = torch.stack([table[slot // KINDS] for slot in tokens.slots[:2]]).unsqueeze(0)  # 1 2 2C
        shift, scale = rows.chunk(2, dim=-1)
        images, audio = x[:, : tokens.image], x[:, tokens.image : tokens.image + tokens.audio]
        normed_images = modulate(self.norm(images), shift[:, :1], scale[:, :1], tokens.dtype)
        normed_audio = modulate(self.norm(audio), shift[:, 1:], scale[:, 1:], tokens.dtype)
        return run_float32(self.video_out, normed_images), run_float32(self.audio_out, normed_audio)


class H3Model(nn.Module):
    """Predicts the clean latents minus the noise of a video and of its audio.

    Simplified, without conditions and the code around the blocks:

        x = cat([video_patch_proj(patches of noisy), audio_patch_proj(sound), text])   # B V+M+T C
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
        self.spec = spec_of(config)
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
        self._rotary = GridTable[tuple[tuple[ImagePlace | AudioPlace, ...], int]](self._make_table)

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
        shown: Sequence[bool] = (),
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
            shown: Whether each text token is the placeholder of an image part; () without images.
            start: Time position of the first latent; None places it after the text.
            conditions: Clean images, clips and audio, in the order of their time positions.
            overrides: Changes to this call.
        """
        hidden = self.embed(
            noisy,
            audio,
            times,
            text,
            shown=shown,
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
        shown: Sequence[bool] = (),
        start: float | None = None,
        conditions: Sequence[H3Condition] = (),
    ) -> Hidden:
        """Return the tokens of frames, audio, conditions and text, and the other inputs of the blocks.

        Args:
            noisy: B Z F H W.
            audio: B Z' 2 A, two channels.
            times: Times of frames and of audio, 0 for noise, 1 for clean.
            text: States of the language model, B T text_dim, without a mask.
            shown: Whether each text token is the placeholder of an image part; () without images.
            start: Time position of the first latent of `noisy` and `audio`; None places it after the text.
            conditions: Clean images, clips and audio, in the order of their time positions.

        Raises:
            ValueError: If sizes do not match.
        """
        self._check_sizes(noisy, audio)
        dtype = activation_dtype(noisy.device, self.compute_dtype)
        num_text = text.shape[1]
        first_time = float(num_text) if start is None else start
        grid = ImageGrid(noisy.shape[2], noisy.shape[3] // PATCH, noisy.shape[4] // PATCH)
        learned_audio = H3Condition(audio, AudioPlace(audio.shape[3], first_time, grid))
        media = [H3Condition(noisy, ImagePlace(grid, first_time)), learned_audio, *conditions]
        # tokens of each medium
        parts = [self._embed_medium(medium) for medium in media]
        # Tokens share a level if the same rule sets it, even if the values of two rules are equal: compiled
        # blocks depend on which tokens share one, and both schedules begin at the same level.
        levels: dict[object, float] = dict(enumerate(times))
        rules = [*levels, *((condition.is_sound, condition.clean) for condition in conditions)]
        for condition, rule in zip(conditions, rules[len(times) :], strict=True):
            levels[rule] = condition.level(times[0])
        ordered_rules = list(levels)  # a segment names its level by the index of the rule
        segments = []
        for medium, part, rule in zip(media, parts, rules, strict=True):
            segments.append(TokenSegment(part.shape[1], ordered_rules.index(rule), medium.kind))
        # text with image placeholders is split into runs of text and of image tokens
        segments += _split_text(shown, num_text)
        places = tuple(medium.place for medium in media)
        tokens = H3Tokens(
            grid,
            audio=segments[1].tokens,  # the second medium is the noisy audio
            rotary=self._rotary.get_table((places, num_text), noisy.device),
            times=self._embed_times(list(levels.values()), noisy.device),
            # rows of the modulation table, which is ordered by level, then kind
            slots=tuple(KINDS * segment.time + segment.kind for segment in segments),
            starts=tuple(accumulate(segment.tokens for segment in segments[:-1])),
            dtype=dtype,
            attention=self.attention,
        )
        embedded = [part.to(dtype) for part in parts]
        embedded.append(self._embed_text(text.to(dtype)))
        return Hidden(torch.cat(embedded, dim=1), tokens)

    def _embed_medium(self, medium: H3Condition) -> Tensor:
        """Embed frames or audio as tokens, B L C."""
        if medium.is_sound:
            return self._embed_audio(medium.latents)
        return self._embed_images(medium.latents)

    def _check_sizes(self, noisy: Tensor, audio: Tensor) -> None:
        config = self.config
        _, channels, _, height, width = noisy.shape
        if channels != config.channels or height % PATCH or width % PATCH:
            raise ValueError(f"latents of {tuple(noisy.shape[1:])}: {config.channels} channels, even sides")
        if audio.shape[1] != config.audio_channels or audio.shape[2] != 2:
            raise ValueError(
                f"sound of {tuple(audio.shape[1:])}: {config.audio_channels} numbers, 2 channels"
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

    def _embed_times(self, times: Sequence[float], device: torch.device) -> Tensor:
        """Return the time embeddings that the blocks project to their modulation, K E float32."""
        levels = send_ahead(torch.tensor(times, dtype=torch.float32), device)
        if self.config.table_rows:
            return self._look_up(levels)
        waves = sinusoid(levels, self.config.freq_dim, torch.float32)
        hidden = functional.silu(run_float32(self.time_embedder["proj_in"], waves))
        return functional.silu(run_float32(self.time_embedder["proj_out"], hidden))

    def _look_up(self, times: Tensor) -> Tensor:
        """Interpolate the time table of a pruned file linearly at `times`, K E."""
        table = self.adaln_t_table.float()
        places = times.clamp(0, 1) * (len(table) - 1)
        below = places.floor().long().clamp(max=len(table) - 2)
        return table[below].lerp(table[below + 1], (places - below)[:, None])

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

    def _make_table(
        self, layout: tuple[tuple[ImagePlace | AudioPlace, ...], int], /, *, device: torch.device
    ) -> Tensor:
        """Return the rotary table, (cosine, sine) pairs L 1 3K 2 float32, with K frequencies on each axis."""
        media, num_text = layout
        places = all_places(media, num_text).float()
        # float32, as in training
        steps = torch.arange(0, 2 * self.config.frequencies, 2, dtype=torch.float32)
        frequencies = 1 / self.config.rope_theta ** (steps / (2 * self.config.frequencies))
        angles = places[:, :, None] * frequencies
        return cos_and_sin(angles.flatten(1)).unsqueeze(1).to(device)


def _split_text(shown: Sequence[bool], num_text: int) -> list[TokenSegment]:
    """Split a text's tokens into segments of consecutive text or image tokens.

    Args:
        shown: Whether each token is the placeholder of an image part; () without images.
        num_text: Number of tokens.
    """
    if not shown:
        return [TokenSegment(num_text, time=FRAME_TIME, kind=TEXT)]
    segments: list[TokenSegment] = []
    for is_image, run in groupby(shown):
        kind = IMAGE if is_image else TEXT
        segments.append(TokenSegment(len(list(run)), time=FRAME_TIME, kind=kind))
    return segments

"""The transformer of Kandinsky 6: tokens of the video, tokens of its sound, and attention between them.

Names of modules are the maker's, which ComfyUI has too. Each stream has the blocks of Kandinsky 5 and a text
of its own. Source: the maker's code, as diffusers' `transformer_kandinsky6.py` has it.
"""
# Letters: B batch, L tokens of the video, M of the sound, T of the text, N heads, D head width, C width

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as functional
from einops import rearrange
from torch import Tensor, nn

from kandinsky.configs import PATCH, Kandinsky6Config, KandinskyStream
from kandinsky.model import (
    KandinskyAttention,
    KandinskyFinalLayer,
    KandinskyModulation,
    KandinskyTextBlock,
    KandinskyTextEmbedding,
    KandinskyTokens,
    KandinskyVisualBlock,
    ScaledGrid,
    encode_text,
    make_clip_table,
)
from kandinsky.spec import DIT_6
from modules.attention.attend import attend
from modules.devices import send_ahead
from modules.layers.modulation import add_gated, modulate
from modules.layers.norms import Float32LayerNorm, TwoLayerMlp, activation_dtype, run_in_weight_dtype
from modules.layers.rope import THETA, GridTable, axis_rotations, consecutive_rotations, rotate, sinusoid
from modules.speed_options import SDPA, AttentionChoice
from protocols.steps import NO_OVERRIDES, Overrides
from runtime.offload.context import TokenShard
from runtime.run_blocks import BlockNetwork, Hidden

# factor of the sound's positions, of which 43 pass in a second, beside 6 latent frames; as released: no
# tensor shows it
AUDIO_POSITION_SCALE = 0.144
PLAIN, GIVEN = 0, 1  # types of tokens: of the clip, and of a given image


class Velocities(NamedTuple):
    """Velocities of a clip and of its sound."""

    video: Tensor  # B Z F H W float32
    audio: Tensor | None  # B Z L 1 float32; None without sound


@dataclass(frozen=True)
class Kandinsky6Tokens:
    """Inputs of the blocks in addition to the tokens x, B L+M C with the video first.

    The sound's tokens are narrower and padded with zeros.
    """

    video: KandinskyTokens
    audio: KandinskyTokens | None  # None: the clip has no sound
    audio_dim: int  # width of the sound's tokens
    # B 1 1: 0 for samples without sound, whose video must not depend on it; None: all have sound
    audio_factor: Tensor | None = None

    @property
    def stream_lengths(self) -> tuple[int, ...]:
        """Return each stream's number of tokens."""
        lengths = [len(self.video.rotary)]
        if self.audio is not None:
            lengths.append(len(self.audio.rotary))
        return tuple(lengths)

    def cut(self, *parts: TokenShard) -> "Kandinsky6Tokens":
        """Return the inputs for one process, which has a part of each stream's tokens."""
        audio = None if self.audio is None else self.audio.cut(parts[1])
        return replace(self, video=self.video.cut(parts[0]), audio=audio)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Split tokens x into those of the video, B L C, and those of the sound, B M C'."""
        if self.audio is None:
            return x, None
        video, audio = x.split(self.stream_lengths, dim=1)
        return video, audio[..., : self.audio_dim]

    def join(self, video: Tensor, audio: Tensor | None) -> Tensor:
        """Concatenate the tokens of both streams, B L+M C."""
        if audio is None:
            return video
        return torch.cat([video, functional.pad(audio, (0, video.shape[2] - audio.shape[2]))], dim=1)


class StreamConditions(NamedTuple):
    """What the time and the texts of both streams are embedded from."""

    timesteps: Tensor  # B
    pooled: Tensor  # B pooled_dim
    prompts: list[dict[str, Any]]  # text and text_mask of each text
    overrides: Overrides
    dtype: torch.dtype  # dtype of activations between layers


class Kandinsky6Block(nn.Module):
    """A block of Kandinsky 5 for each stream, whose tokens attend to each other before the feed-forward."""

    def __init__(self, config: Kandinsky6Config) -> None:
        super().__init__()
        video, audio = config.video, config.audio
        self.videoT = KandinskyVisualBlock(video)
        self.audioT = KandinskyVisualBlock(audio)
        self.va_cross_attention = KandinskyAttention(video, audio.dim)
        self.av_cross_attention = KandinskyAttention(audio, video.dim)
        # shift and scale of the queries, and the gate of the other stream's attention
        self.va_modulation = KandinskyModulation(video.time_dim, video.dim, video.dim, audio.dim)
        self.av_modulation = KandinskyModulation(audio.time_dim, audio.dim, audio.dim, video.dim)
        self.va_normalization = Float32LayerNorm(video.dim, video.eps)
        self.av_normalization = Float32LayerNorm(audio.dim, audio.eps)

    def forward(self, x: Tensor, tokens: Kandinsky6Tokens) -> Tensor:
        """Apply the block to tokens x, B L+M C."""
        video_x, audio_x = tokens.split(x)
        video = self.videoT.attend(video_x, tokens.video)
        if audio_x is None or tokens.audio is None:
            return self.feed(video.x, self.videoT, tokens.video.dtype, *video.feed_rows)
        audio = self.audioT.attend(audio_x, tokens.audio)

        # each stream reads the other's tokens as they were before their attention to the text
        va_shift, va_scale, audio_gate = self.va_modulation(tokens.video.time)
        av_shift, av_scale, video_gate = self.av_modulation(tokens.audio.time)
        if tokens.audio_factor is not None:
            video_gate = video_gate * tokens.audio_factor
        video_h = modulate(self.va_normalization(video.x), va_shift, va_scale, tokens.video.dtype)
        audio_h = modulate(self.av_normalization(audio.x), av_shift, av_scale, tokens.audio.dtype)
        from_audio = _attend_to_other(
            self.va_cross_attention, video_h, tokens.video, audio.text_input, tokens.audio
        )
        from_video = _attend_to_other(
            self.av_cross_attention, audio_h, tokens.audio, video.text_input, tokens.video
        )
        video_x = add_gated(video.x, video_gate, from_audio)
        audio_x = add_gated(audio.x, audio_gate, from_video)

        audio_x = self.feed(audio_x, self.audioT, tokens.audio.dtype, *audio.feed_rows)
        # the video's feed-forward comes last: if it runs in pieces, recomputing the block can stop before it
        return tokens.join(self.feed(video_x, self.videoT, tokens.video.dtype, *video.feed_rows), audio_x)

    def modulated_input(self, x: Tensor, tokens: Kandinsky6Tokens) -> Tensor:
        """Return the video's part of x, B L C, normalized and modulated as its self-attention takes it."""
        return self.videoT.modulated_input(tokens.split(x)[0], tokens.video)

    def feed(
        self,
        x: Tensor,
        block: KandinskyVisualBlock,
        dtype: torch.dtype,
        shift: Tensor,
        scale: Tensor,
        gate: Tensor,
    ) -> Tensor:
        """Add a stream's feed-forward branch to its tokens x, B L C, each processed independently."""
        return block.feed(x, dtype, shift, scale, gate)


def _attend_to_other(
    layer: KandinskyAttention, h: Tensor, tokens: KandinskyTokens, other_h: Tensor, other: KandinskyTokens
) -> Tensor:
    """Return the attention of a stream's tokens h, B L C, to all tokens of the other stream."""
    key, value = layer.key_and_value(other_h)
    query, key = rotate(layer.query(h), tokens.rotary), rotate(key, other.rotary)
    if tokens.shard is None or other.shard is None:
        return layer.project(attend(query, key, value, tokens.attention))
    # with several processes, each computes some heads for all tokens
    (query,) = tokens.shard.gather_tokens(query)
    key, value = other.shard.gather_tokens(key, value)
    return layer.project(tokens.shard.gather_heads(attend(query, key, value, tokens.attention)))


class Kandinsky6AudioFinalLayer(KandinskyFinalLayer):
    """The sound's output layer, which normalizes a second time, behind the modulation."""

    def forward(self, x: Tensor, tokens: KandinskyTokens) -> Tensor:
        """Return the velocity for tokens x, B M C to B M out_channels float32."""
        shift, scale = self.modulation(tokens.time)
        modulated = modulate(self.norm(x), shift, scale, tokens.dtype)
        return run_in_weight_dtype(self.out_layer, self.norm(modulated)).float()


class Kandinsky6Model(BlockNetwork):
    """Predict the velocities of noisy latents of a clip and of its sound.

    Simplified, without a second text and the code around the blocks:

        time = video_time_embeddings(sinusoid(timesteps)) + video_pooled_text_embeddings(pooled)
        text = video_text_embeddings(text)
        for block in video_text_transformer_blocks:
            text = block(text, time)                      # the same for the sound
        x = visual_embeddings(cat([noisy, zeros, mask]))  # B L C, an image as the last frame
        y = audio_embeddings(audio)                       # B M C'
        for block in visual_blocks:
            x, y = (z + gate * self_attention(norm(z) * (1 + scale) + shift) for z in (x, y))
            read_x, read_y = (norm(z) * (1 + scale2) + shift2 for z in (x, y))
            x, y = (z + gate2 * cross_attention(read, text) for z, read in ((x, read_x), (y, read_y)))
            x, y = x + gate3 * va_cross_attention(..x, read_y), y + gate3 * av_cross_attention(..y, read_x)
            x, y = (z + gate4 * feed_forward(norm(z) * (1 + scale4) + shift4) for z in (x, y))
        velocity, audio_velocity = out_layer(x, time), audio_outLayer(y, time)
    """

    spec = DIT_6
    compute_dtype_parameter = "visual_blocks.0.videoT.self_attention.query_norm.weight"

    def __init__(self, config: Kandinsky6Config, attention: AttentionChoice = SDPA) -> None:
        """Build the network without weights."""
        super().__init__()
        self.config = config
        self.attention = attention
        dim = config.video.dim
        self.visual_embeddings = nn.ModuleDict({"in_layer": nn.Linear(PATCH**2 * config.in_channels, dim)})
        if config.num_token_types:
            self.visual_token_type_embeddings = nn.Embedding(config.num_token_types, dim)
        self.audio_embeddings = KandinskyTextEmbedding(
            config.audio_channels, config.audio.dim, config.audio.eps
        )
        for prefix, sizes in (("video", config.video), ("audio", config.audio)):
            self._add_tower(prefix, sizes)
        self.visual_blocks = nn.ModuleList(Kandinsky6Block(config) for _ in range(config.num_layers))
        self.out_layer = KandinskyFinalLayer(config.video, PATCH**2 * config.out_channels)
        self.audio_outLayer = Kandinsky6AudioFinalLayer(config.audio, config.audio_channels)
        self._rotary = GridTable[ScaledGrid](self._make_table)
        self._audio_rotary = GridTable[int](self._make_audio_table)
        self._text_rotary = GridTable[int](self._make_text_table)

    def _add_tower(self, prefix: str, sizes: KandinskyStream) -> None:
        """Add the layers that embed the time and the text of a stream."""
        config = self.config
        dim, time_dim = sizes.dim, sizes.time_dim
        layers = {
            "time_embeddings": TwoLayerMlp("in_layer out_layer", (dim, time_dim, time_dim), in_float32=True),
            "text_embeddings": KandinskyTextEmbedding(config.text_dim, dim, sizes.eps),
            "pooled_text_embeddings": KandinskyTextEmbedding(
                config.pooled_dim, time_dim, sizes.eps, in_float32=True
            ),
            "text_transformer_blocks": nn.ModuleList(
                KandinskyTextBlock(sizes) for _ in range(config.text_layers)
            ),
        }
        for name, layer in layers.items():
            self.add_module(f"{prefix}_{name}", layer)

    def embed(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        text: Tensor,
        text_mask: Tensor,
        pooled: Tensor,
        position_scale: float = 1.0,
        audio: Tensor | None = None,
        has_audio: Tensor | None = None,
        image: Tensor | None = None,
        overrides: Overrides = NO_OVERRIDES,
    ) -> Hidden:
        """Embed latents as tokens, B L+M C; return them with the blocks' other inputs.

        Args:
            noisy: Latents of the clip, B 16 F H W.
            timesteps: B, 0..1000, of both streams.
            text: States of the language model, B T text_dim.
            text_mask: B T, true for real tokens, which come first.
            pooled: Pooled state of CLIP, B pooled_dim.
            position_scale: Number by which the positions of rows and columns are divided.
            audio: Latents of the sound, B 40 M 1; None: the video runs alone.
            has_audio: B, whether each sample has sound; the sound of others does not change their video.
                None: all have sound.
            image: Clean latents of a given image, B 16 1 H W. It is one more frame behind the clip, with the
                position of the first, a mask of 1 and another type of tokens.
            overrides: Changes to this call. For normalized attention guidance (NAG), they contain a second
                `text` and `text_mask`.

        Raises:
            ValueError: If sizes do not match, or the file takes no image.
        """
        config = self.config
        batch, channels, frames, height, width = noisy.shape
        if channels != config.out_channels or height % PATCH or width % PATCH:
            raise ValueError(
                f"latents of {tuple(noisy.shape[1:])}: {config.out_channels} channels and even sides"
            )
        if image is not None and not config.num_token_types:
            raise ValueError("the transformer has no types of tokens, so it takes no image")
        dtype = activation_dtype(noisy.device, self.compute_dtype)
        sizes = (frames, height // PATCH, width // PATCH)
        grid = ScaledGrid(sizes, position_scale, overrides.slow_frames, ends_with_image=image is not None)
        conditions = StreamConditions(
            timesteps, pooled, overrides.text_inputs(batch, text=text, text_mask=text_mask), overrides, dtype
        )
        tokens = Kandinsky6Tokens(
            self._make_tokens("video", conditions, sizes, self._rotary.get_table(grid, noisy.device)),
            audio=None,
            audio_dim=config.audio.dim,
        )
        x = self._embed_clip(noisy, image, dtype)
        if audio is None:
            return Hidden(x, tokens)
        rotary = self._audio_rotary.get_table(audio.shape[2], audio.device)
        audio_tokens = self._make_tokens("audio", conditions, (audio.shape[2], 1, 1), rotary)
        audio_factor = None
        if has_audio is not None:  # sent ahead: a plain copy would wait for the device
            audio_factor = send_ahead(has_audio.float(), noisy.device).view(-1, 1, 1)
        tokens = replace(tokens, audio=audio_tokens, audio_factor=audio_factor)
        audio_x = self.audio_embeddings(audio.squeeze(3).transpose(1, 2)).to(dtype)
        return Hidden(tokens.join(x, audio_x), tokens)

    def _embed_clip(self, noisy: Tensor, image: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Project a clip, and a given image behind it, to tokens, B L C."""
        if image is not None:
            noisy = torch.cat([noisy, image.to(noisy)], dim=2)
        batch, channels, frames, height, width = noisy.shape
        condition = noisy.new_zeros(batch, self.config.in_channels - channels, frames, height, width)
        if image is not None:
            condition[:, -1, -1] = 1  # the mask
        noisy = torch.cat([noisy, condition], dim=1)
        patches = rearrange(noisy, "b c f (h p) (w q) -> b (f h w) (p q c)", p=PATCH, q=PATCH)
        # clone: of a view, the first block would be compiled apart from the others
        x = run_in_weight_dtype(self.visual_embeddings["in_layer"], patches).to(dtype).clone()
        if image is None:
            return x  # without types: they are for clips with an image alone
        tokens_per_frame = x.shape[1] // frames
        types = torch.full((x.shape[1],), PLAIN, device=x.device)
        types[-tokens_per_frame:] = GIVEN
        return x + self.visual_token_type_embeddings(types).to(dtype)

    def _make_tokens(
        self, prefix: str, conditions: StreamConditions, sizes: tuple[int, int, int], rotary: Tensor
    ) -> KandinskyTokens:
        """Embed the time and the texts of a stream, "video" or "audio", whose tokens have these rotations."""
        dim = self.config.video.dim if prefix == "video" else self.config.audio.dim
        time = self.get_submodule(f"{prefix}_time_embeddings")(
            sinusoid(conditions.timesteps, dim, torch.float32)
        )
        time = time + self.get_submodule(f"{prefix}_pooled_text_embeddings")(conditions.pooled)
        texts = []
        for prompt in conditions.prompts:
            text = encode_text(
                prompt["text"],
                prompt["text_mask"],
                self.get_submodule(f"{prefix}_text_embeddings"),
                self.get_submodule(f"{prefix}_text_transformer_blocks").children(),
                self._text_rotary,
                time=time,
                dtype=conditions.dtype,
                attention=self.attention,
            )
            texts.append(text)
        return KandinskyTokens(
            sizes,
            rotary=rotary,
            texts=tuple(texts),
            time=time,
            num_clean_frames=0,
            dtype=conditions.dtype,
            attention=self.attention,
            combine_attention=conditions.overrides.combine_attention,
        )

    def unembed(self, x: Tensor, tokens: Kandinsky6Tokens) -> Velocities:
        """Turn tokens B L+M C into the velocities of the clip and of its sound."""
        video, audio = tokens.split(x)
        frames, rows, columns = tokens.video.grid
        # patches of the output have their channels first, unlike those of the input
        velocity = rearrange(
            self.out_layer(video[:, : frames * rows * columns], tokens.video),  # without the image
            "b (f h w) (c p q) -> b c f (h p) (w q)",
            f=frames,
            h=rows,
            w=columns,
            p=PATCH,
            q=PATCH,
        )
        if audio is None or tokens.audio is None:
            return Velocities(velocity, None)
        audio_velocity = self.audio_outLayer(audio, tokens.audio)
        return Velocities(velocity, audio_velocity.transpose(1, 2).unsqueeze(3))

    def _make_table(self, grid: ScaledGrid, /, *, device: torch.device) -> Tensor:
        return make_clip_table(self.config.rotary_widths, grid, device)

    def _make_audio_table(self, length: int, /, *, device: torch.device) -> Tensor:
        """Return cosines and sines of the positions of the sound's tokens, M 1 D/2 2 float32."""
        positions = AUDIO_POSITION_SCALE * torch.arange(length, dtype=torch.float64)
        return axis_rotations(positions, self.config.audio.head_width, THETA, device).unsqueeze(1)

    def _make_text_table(self, length: int, /, *, device: torch.device) -> Tensor:
        """Return cosines and sines of the positions of a text's tokens, T 1 D/2 2 float32."""
        return consecutive_rotations(0, length, self.config.video.head_width, THETA, device).unsqueeze(1)

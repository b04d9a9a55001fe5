"""The transformer of LTX-2: video latents, with or without audio, from the states of a text.

Module names follow the published checkpoints. Source: the released code of LTX-2, also where diffusers
differs: attention between the streams is modulated by each stream's own times, and gated by the noise level
of the other one. `blocks` lists the steps in float32.
"""
# Letters: B batch, L video tokens, M audio tokens, S times (2 with given frames), C width of a stream,
# W of the wider one

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from ltx_2.blocks import (
    CrossInputs,
    LtxAudioReferences,
    LtxBlock,
    LtxReferences,
    LtxTokens,
    StreamConditioning,
    TokenTimesteps,
    gelu,
    make_attention_bias,
)
from ltx_2.configs import AUDIO, DIT, EPS, VIDEO, LtxConfig, Modality
from ltx_2.rope import TokenPositions, make_tables
from modules.devices import send_ahead
from modules.layers.modulation import modulate
from modules.layers.norms import (
    Float32LayerNorm,
    TwoLayerMlp,
    activation_dtype,
    run_float32,
    run_in_weight_dtype,
)
from modules.layers.rope import GridTable, sinusoid
from modules.private_torch import disable_modes
from modules.speed_options import SDPA, AttentionChoice
from protocols.steps import FULLY_CLEAN, NO_OVERRIDES, CleanTokens, Overrides
from runtime.run_blocks import Hidden, run_blocks

DEFAULT_FPS = 24.0
References = Mapping[Modality, LtxReferences]  # by stream; audio has `LtxAudioReferences`
NO_REFERENCES: References = MappingProxyType({})
Fps = float | Sequence[float] | Tensor  # frames a second: one number, or one for each sample, on the host


class TimestepModulation(nn.Module):
    """Embed timesteps' sinusoids, and compute shifts, scales and gates from them in float32."""

    def __init__(self, config: LtxConfig, dim: int, num_vectors: int) -> None:
        super().__init__()
        self.num_vectors = num_vectors
        layers = {"linear_1": nn.Linear(config.freq_dim, dim), "linear_2": nn.Linear(dim, dim)}
        self.emb = nn.ModuleDict({"timestep_embedder": nn.ModuleDict(layers)})
        self.linear = nn.Linear(dim, num_vectors * dim)

    def forward(self, sinusoids: Tensor) -> tuple[Tensor, Tensor]:
        """Return modulation vectors, n R C, and embedded timesteps, n C, from sinusoids, n freq_dim."""
        layers: Any = self.emb["timestep_embedder"]
        hidden = functional.silu(run_float32(layers["linear_1"], sinusoids))
        embedded_timestep = run_float32(layers["linear_2"], hidden)
        modulation = run_float32(self.linear, functional.silu(embedded_timestep))
        return modulation.unflatten(-1, (self.num_vectors, -1)), embedded_timestep


@dataclass(frozen=True)
class StreamInputs:
    """Inputs of the video or audio stream in a forward pass."""

    modality: Modality
    latents: Tensor  # B Z F H W of video, B Z M K of audio
    timesteps: Tensor  # B
    freq_dim: int  # width of the timesteps' sinusoids
    references: LtxReferences
    num_clean_frames: int = 0  # leading latent frames that are clean
    # a timestep for each token; None: only conditioning tokens have their own timestep
    token_timesteps: TokenTimesteps | None = None
    keyframe_indices: Sequence[int] = ()  # frame index of each image in the last latent frames
    num_generated_keyframes: int = 0  # how many of these images are denoised

    @cached_property
    def sinusoids(self) -> Tensor:
        """Return the timesteps' sinusoids, B freq_dim, which several layers embed."""
        return self.make_sinusoids(self.timesteps)

    def make_sinusoids(self, timesteps: Tensor) -> Tensor:
        """Return the sinusoidal embeddings of n timesteps, n freq_dim, with float32 angles as in training."""
        return sinusoid(timesteps, self.freq_dim, torch.float32)

    @property
    def num_conditioning_tokens(self) -> int:
        """Return the number of tokens with their own timestep: references and clean frames."""
        in_clean_frames = self.num_clean_frames * self.latents.shape[-1] * self.latents.shape[-2]
        return in_clean_frames + self.references.num_tokens

    def make_attention_bias(self) -> tuple[Tensor, Tensor] | None:
        """Return query and key channels that weaken attention to references, or None at full strength."""
        strengths = self.references.attention_strengths
        if strengths is None:
            return None
        num_video_tokens = math.prod(self.latents.shape[2:])
        return make_attention_bias(strengths, self.references.token_counts, num_video_tokens)


def find_token_timesteps(inputs: StreamInputs, clean_weights: Tensor) -> TokenTimesteps:
    """Return which fraction of the timestep each token of a stream has, references first.

    Args:
        inputs: Inputs of the stream.
        clean_weights: How clean each latent is, from 0 to FULLY_CLEAN, B 1 ... int16, on the host.
    """
    latents = inputs.latents
    references = inputs.references
    num_clean_tokens = inputs.num_conditioning_tokens - references.num_tokens  # of entirely clean frames
    with disable_modes():  # `unique` needs values, also in a dry run that measures memory
        weights = clean_weights.flatten(1).expand(len(latents), -1).clone()
        weights[:, :num_clean_tokens] = FULLY_CLEAN
        reference_weight = FULLY_CLEAN - round(FULLY_CLEAN * references.timestep_fraction)
        reference_weights = weights.new_full((len(latents), references.num_tokens), reference_weight)
        # few distinct weights: modulation is computed once for each
        distinct, indices = torch.cat([reference_weights, weights], dim=1).unique(return_inverse=True)
    fractions = 1 - distinct.float() / FULLY_CLEAN
    return TokenTimesteps(send_ahead(fractions, latents.device), send_ahead(indices, latents.device))


class LtxModel(nn.Module):
    """Predicts the velocities of noisy latents of a video and of its audio, or of one of them.

    Simplified, without references, given frames and the code around the blocks, for each stream:

        x = patchify_proj(latents.flatten(2).mT)                        # B L C; audio: B M C
        modulation, time = adaln_single(timesteps)                      # B 9 C, B C
        text = caption_projection(text)                                 # B T C; LTX-2.0 only
        for block in transformer_blocks:
            x = x + gate * attn1(modulated(x), modulated(x))            # shift, scale, gate: modulation
            x = x + gate * attn2(modulated(x), text)
            x = x + gate * cross_attn(modulated(x), modulated(other_x)) # both streams at the same time
            x = x + gate * ff(modulated(x))
        shift, scale = scale_shift_table + time                         # each B C
        velocity = proj_out(norm_out(x) * (1 + scale) + shift)          # B L Z, returned as B Z F H W
    """

    spec = DIT
    # LoRA files that only one stage uses, and the options that name them; the family sets them for
    # `networks.gated_loras.add_stage_loras`
    stage_files: Sequence[tuple[Path, str]] = ()

    def __init__(self, config: LtxConfig, attention: AttentionChoice = SDPA) -> None:
        """Build the network without weights. `attention` selects how attention is computed."""
        super().__init__()
        self.config = config
        self.attention = attention
        for modality in config.streams:
            self._add_stream(modality)
        # a learned mark for tokens whose latent frame covers a single frame: the first one, and keyframes
        if config.has_single_frame_embedding and config.has_video:
            self.keyframes_abs_pos_embedding = nn.Parameter(torch.zeros(1, config.dim))
        self.transformer_blocks = nn.ModuleList(LtxBlock(config) for _ in range(config.num_layers))
        # rotary embeddings of a pass: of each stream, for itself and for attention to the other stream
        make_table = partial(make_tables, config)
        self._rotary_tables = {
            (modality, time_only): GridTable[tuple[TokenPositions, ...]](make_table)
            for modality in (VIDEO, AUDIO)
            for time_only in (False, True)
        }

    def _add_stream(self, modality: Modality) -> None:
        """Add the layers of a stream that are outside the blocks."""
        config = self.config
        stream = config.streams[modality]
        dim = stream.dim
        prefix = modality.prefix
        modulation = partial(TimestepModulation, config, dim)
        # attributes are named as in released files
        setattr(self, f"{prefix}patchify_proj", nn.Linear(stream.channels, dim))
        if config.projects_text:
            sizes = (stream.text_dim, dim, dim)
            setattr(self, f"{prefix}caption_projection", TwoLayerMlp("linear_1 linear_2", sizes, gelu))
        # shift, scale and gate of self-attention, feed-forward and, in some releases, attention to the text
        setattr(self, f"{prefix}adaln_single", modulation(9 if config.modulates_text else 6))
        if config.modulates_text and config.modulates_text_by_timestep:
            setattr(self, f"{prefix}prompt_adaln_single", modulation(2))
        if len(config.streams) == 2:
            # of the attention between the streams: scale and shift as query and as key, and the gate
            setattr(self, modality.cross_modulation, modulation(4))
            setattr(self, modality.cross_gate, modulation(1))
        # shift and scale of the output
        setattr(self, f"{prefix}scale_shift_table", nn.Parameter(torch.zeros(2, dim)))
        setattr(self, f"{prefix}proj_out", nn.Linear(dim, stream.channels))
        setattr(self, f"{prefix}norm_out", Float32LayerNorm(dim, EPS))

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the biases, which shows the compute dtype even if weights have 8 bits."""
        first = next(iter(self.config.streams)).prefix
        name = f"transformer_blocks.0.{first}attn1.to_q.bias"
        return self.get_parameter(name).dtype  # the weight may be in 8 bits

    def forward(
        self,
        noisy: Tensor | None,
        timesteps: Tensor,
        text: Tensor | None = None,
        fps: Fps = DEFAULT_FPS,
        audio: Tensor | None = None,
        audio_timesteps: Tensor | None = None,
        audio_text: Tensor | None = None,
        has_audio: Tensor | None = None,
        overrides: Overrides = NO_OVERRIDES,
        references: References = NO_REFERENCES,
        keyframes: Sequence[int] = (),
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the velocities of video and audio in float32; None for a stream without input.

        Args:
            noisy: Latents of the video, B Z F H W; None for audio alone.
            timesteps: B, 0..1000; 0 for a clean video.
            text: States for the video stream, B T text_dim, without a mask.
            fps: Frame rate of the video.
            audio: Latents of the audio, B Z M K with K bins each; None for video alone, which uses no weight
                of the audio stream.
            audio_timesteps: B, 0 for clean audio; None: the video's.
            audio_text: States for the audio stream, B T text_dim.
            has_audio: B, whether each sample has audio; other samples' audio does not influence their video.
                None: all samples have audio.
            overrides: Changes to this call; a NAG text has arguments named text and audio_text. Clean
                frames have the time 0, and their velocity is 0.
            references: References of video and audio. If the video's are noisy, its velocity is B Z N: first
                for the tokens of its references, then for the video's tokens.
            keyframes: Frame indices in the video of the single images in the last latent frames of `noisy`.

        Raises:
            ValueError: If sizes do not match, or there is audio but the network has no stream for it.
        """
        latents = {}
        if noisy is not None:
            latents[VIDEO] = noisy
        if audio is not None:
            latents[AUDIO] = audio
        if audio_timesteps is None:
            audio_timesteps = timesteps
        hidden = self.embed(
            latents,
            timesteps={VIDEO: timesteps, AUDIO: audio_timesteps},
            texts={VIDEO: text, AUDIO: audio_text},
            fps=fps,
            has_audio=has_audio,
            overrides=overrides,
            references=references,
            keyframes=keyframes,
        )
        run_blocks(self, hidden, overrides)
        velocities = self.unembed(hidden.x, hidden.tokens)
        return velocities.get(VIDEO), velocities.get(AUDIO)

    def embed(
        self,
        latents: dict[Modality, Tensor],
        timesteps: dict[Modality, Tensor],
        texts: dict[Modality, Tensor | None],
        fps: Fps = DEFAULT_FPS,
        has_audio: Tensor | None = None,
        overrides: Overrides = NO_OVERRIDES,
        references: References = NO_REFERENCES,
        keyframes: Sequence[int] = (),
    ) -> Hidden:
        """Embed all streams as tokens, B L+M W; return them with the blocks' other inputs.

        For each stream, clean tokens (references, keyframes) are added; then texts, latents and timesteps are
        embedded and, with two streams, the inputs of the attention between them.

        Latents, timesteps (B, 0..1000) and texts (B T text_dim) are given by stream. References come before
        the tokens of their stream; attention depends on positions only, not on the order of tokens.
        """
        self._check(latents, texts)
        first_latents = next(iter(latents.values()))
        dtype = activation_dtype(first_latents.device, self.compute_dtype)
        prompts = overrides.text_inputs(len(first_latents), text=texts[VIDEO], audio_text=texts[AUDIO])
        has_cross_attention = len(latents) == 2 and not overrides.isolate_modalities
        hidden_states = {}
        streams = {}
        for modality, stream_latents in latents.items():
            inputs = StreamInputs(
                modality,
                stream_latents,
                timesteps=timesteps[modality],
                freq_dim=self.config.freq_dim,
                references=references.get(modality, LtxReferences()),
            )
            inputs = _add_clean_tokens(inputs, keyframes, overrides)
            text_name = "text" if modality is VIDEO else "audio_text"
            embedded_texts = self._embed_texts(modality, [prompt[text_name] for prompt in prompts])
            hidden_states[modality] = self._project(inputs, dtype)
            streams[modality] = self._embed_stream(inputs, [text.to(dtype) for text in embedded_texts], fps)
            if has_cross_attention:
                cross = self._embed_cross_attention(inputs, timesteps, has_audio, fps)
                streams[modality] = replace(streams[modality], cross=cross)
        video_references = references.get(VIDEO, LtxReferences())
        tokens = LtxTokens(
            streams,
            grid=tuple(latents[VIDEO].shape[2:]) if VIDEO in latents else (),
            audio_grid=tuple(latents[AUDIO].shape[2:]) if AUDIO in latents else (),
            dtype=dtype,
            attention=self.attention,
            combine_text_attention=overrides.combine_attention,
            returns_reference_velocity=VIDEO in streams and video_references.timestep_fraction > 0,
        )
        return Hidden(tokens.join(hidden_states), tokens)

    def _embed_stream(
        self, inputs: StreamInputs, text_embeddings: Sequence[Tensor], fps: Fps
    ) -> StreamConditioning:
        """Return what the blocks need for a stream, except its tokens and the attention to the other stream.

        `text_embeddings` are B T C each.
        """
        modulation, embedded_timestep = self._embed_timesteps(
            self._get_layer(inputs.modality, "adaln_single"), inputs
        )
        return StreamConditioning(
            rotary_emb=self._make_rotary_emb(inputs, fps, time_only=False),
            text_embeddings=tuple(text_embeddings),
            modulation=modulation,
            embedded_timestep=embedded_timestep,
            text_modulation=self._embed_text_modulation(inputs, modulation),
            num_conditioning_tokens=inputs.num_conditioning_tokens,
            token_timesteps=inputs.token_timesteps,
            attention_bias=inputs.make_attention_bias(),
            num_hidden_from_other=inputs.references.num_hidden_from_other,
            num_without_text=inputs.references.num_without_text,
        )

    def _embed_texts(self, modality: Modality, texts: Sequence[Tensor]) -> Sequence[Tensor]:
        """Embed the texts of one stream (video or audio) for cross-attention, each B T C."""
        if not self.config.projects_text:
            return texts
        layer = self._get_layer(modality, "caption_projection")
        return [layer(text) for text in texts]

    def _embed_text_modulation(self, inputs: StreamInputs, modulation: Tensor) -> Tensor | None:
        """Return shift and scale of a stream's text, B 1 2 C; zeros if they do not depend on the timestep."""
        # Returns None if texts are not modulated. `modulation` is the stream's, for its dtype and device.
        if not self.config.modulates_text:
            return None
        if not self.config.modulates_text_by_timestep:
            return modulation.new_zeros(1, 1, 2, 1)
        text_modulation, _ = self._get_layer(inputs.modality, "prompt_adaln_single")(inputs.sinusoids)
        return text_modulation.unsqueeze(1)

    def _embed_cross_attention(
        self,
        inputs: StreamInputs,
        timesteps: Mapping[Modality, Tensor],
        has_audio: Tensor | None,
        fps: Fps,
    ) -> CrossInputs:
        """Return the inputs for a stream's attention to the other stream (video to audio, or back)."""
        # Shifts and scales depend on the stream's own timesteps, the gate on the other stream's. `has_audio`,
        # B bool, states which samples have audio; None means all.
        is_video = inputs.modality is VIDEO
        # shifts and scales
        modulation, _ = self._embed_timesteps(getattr(self, inputs.modality.cross_modulation), inputs)
        # timesteps for the gate are scaled differently
        other_timesteps = timesteps[AUDIO if is_video else VIDEO]
        sinusoids = inputs.make_sinusoids(other_timesteps * self.config.gate_timestep_scale)
        gate, _ = getattr(self, inputs.modality.cross_gate)(sinusoids)
        gate_factor = None
        if is_video and has_audio is not None:
            # audio of a sample without audio must not influence its video. Sent from pinned memory: a copy
            # from pageable memory would wait for the device
            gate_factor = send_ahead(has_audio.float(), modulation.device).view(-1, 1, 1)
        rotary_emb = self._make_rotary_emb(inputs, fps, time_only=True)
        return CrossInputs(rotary_emb, modulation, gate, gate_factor)

    def _project(self, inputs: StreamInputs, dtype: torch.dtype) -> Tensor:
        """Project a stream's latents to tokens, B L C, after the tokens of its references."""
        modality, references = inputs.modality, inputs.references
        flat = _flatten(modality, inputs.latents)
        if references.latents:
            flat_references = [_flatten(modality, reference) for reference in references.latents]
            flat = torch.cat([*flat_references, flat], dim=1)
        x = run_in_weight_dtype(self._get_layer(modality, "patchify_proj"), flat).to(dtype)
        if modality is VIDEO and self.config.has_single_frame_embedding:
            return self._add_single_frame_embedding(x, inputs)
        return x

    def unembed(self, x: Tensor, tokens: LtxTokens) -> dict[Modality, Tensor]:
        """Project tokens B L+M W to each stream's velocity, float32, in the shape of its latents."""
        velocities = {}
        for modality, stream_x in tokens.split(x).items():
            stream = tokens.streams[modality]
            table = self._get_layer(modality, "scale_shift_table").float()
            shift, scale = (table + stream.embedded_timestep.unsqueeze(2)).unbind(2)  # each B S C
            normed = self._get_layer(modality, "norm_out")(stream_x)
            h = modulate(normed, shift, scale, tokens.dtype, split=stream.modulation_split)
            out = run_in_weight_dtype(self._get_layer(modality, "proj_out"), h).float()
            velocities[modality] = _shape_velocity(out, modality, tokens)
        return velocities

    def _add_single_frame_embedding(self, x: Tensor, inputs: StreamInputs) -> Tensor:
        """Add the learned embedding to tokens of x, B L C, whose latent frame covers a single pixel frame."""
        # These are the first latent frame and generated keyframes; references and given images do not get it.
        num_references = inputs.references.num_tokens
        tokens_per_frame = inputs.latents.shape[-1] * inputs.latents.shape[-2]
        is_single_frame = x.new_zeros(x.shape[1], 1)
        is_single_frame[num_references : num_references + tokens_per_frame] = 1
        if inputs.num_generated_keyframes:
            is_single_frame[-inputs.num_generated_keyframes * tokens_per_frame :] = 1
        embedding: Tensor = self.keyframes_abs_pos_embedding.to(x.dtype)
        return x + is_single_frame * embedding

    def _get_layer(self, modality: Modality, name: str) -> Any:
        return getattr(self, modality.prefix + name)

    def _embed_timesteps(self, layer: nn.Module, inputs: StreamInputs) -> tuple[Tensor, Tensor]:
        """Return modulation, B S R C, and embedded timesteps, B S C, for the S timesteps of a stream."""
        # S is the number of fractions in `inputs.token_timesteps`. Without these it is 1, or 2 with
        # conditioning tokens: first their timestep (0 if they are clean), then the other tokens' timestep.
        timesteps = inputs.timesteps
        if inputs.token_timesteps is not None:
            all_timesteps = timesteps[:, None] * inputs.token_timesteps.fractions  # B S
            modulation, embedded = layer(inputs.make_sinusoids(all_timesteps.flatten()))
            return modulation.unflatten(0, all_timesteps.shape), embedded.unflatten(0, all_timesteps.shape)
        if inputs.num_conditioning_tokens == 0:
            modulation, embedded = layer(inputs.sinusoids)
            return modulation.unsqueeze(1), embedded.unsqueeze(1)
        fraction = inputs.references.timestep_fraction
        conditioning_timesteps = timesteps * fraction if fraction else timesteps.new_zeros(1)
        sinusoids = inputs.make_sinusoids(torch.cat([timesteps, conditioning_timesteps]))
        modulation, embedded = layer(sinusoids)
        batch_size = len(timesteps)
        return _pair_by_sample(modulation, batch_size), _pair_by_sample(embedded, batch_size)

    def _make_rotary_emb(self, inputs: StreamInputs, fps: Fps, time_only: bool) -> Tensor:
        """Return the rotary embedding of a stream's tokens, L N D/2 2."""
        # It is B L N D/2 2 if samples differ in fps. With `time_only`, it is for the attention between the
        # streams, which has no rows and columns.
        dim = self.config.cross_dim if time_only else self.config.streams[inputs.modality].dim
        if inputs.modality is AUDIO:
            positions = _list_audio_positions(inputs, dim, time_only)
        else:
            positions = _list_video_positions(inputs, dim, fps, time_only)
        table = self._rotary_tables[inputs.modality, time_only]
        return table.get_table(positions, inputs.latents.device)

    def _check(self, latents: dict[Modality, Tensor], texts: dict[Modality, Tensor | None]) -> None:
        """Raise ValueError if latents or texts of a stream are missing or do not fit the network."""
        if not latents:
            raise ValueError("neither latents of a video nor of audio are given")
        for modality, stream_latents in latents.items():
            title = "audio" if modality is AUDIO else "video"
            config = self.config.streams.get(modality)
            if config is None:
                raise ValueError(f"{title} is given, but the network was loaded without the stream for it")
            if texts[modality] is None:
                raise ValueError(f"the text for the {title} is missing")
            channels = stream_latents.shape[1]
            if modality is AUDIO:
                channels *= stream_latents.shape[3]  # an audio token joins all frequency bins of one time
            if channels != config.channels:
                raise ValueError(
                    f"{title} tokens of width {channels}, but the model requires {config.channels}"
                )


def _add_clean_tokens(
    inputs: StreamInputs, keyframe_indices: Sequence[int], overrides: Overrides
) -> StreamInputs:
    """Return a stream's inputs with its clean tokens' timesteps, and a video's clean frames and keyframes."""
    clean_tokens = overrides.clean_tokens or CleanTokens()
    clean_weights = clean_tokens.audio
    if inputs.modality is VIDEO:
        clean_weights = clean_tokens.image
        inputs = replace(
            inputs,
            num_clean_frames=overrides.num_clean_frames,
            keyframe_indices=keyframe_indices,
            num_generated_keyframes=clean_tokens.num_generated,
        )
    if clean_weights is None:
        return inputs
    return replace(inputs, token_timesteps=find_token_timesteps(inputs, clean_weights))


def _list_audio_positions(inputs: StreamInputs, dim: int, time_only: bool) -> tuple[TokenPositions, ...]:
    """Return the positions of audio references, then of the audio itself; `dim` is the rotated width."""
    references = inputs.references
    ends_before_audio = isinstance(references, LtxAudioReferences) and references.ends_before_audio
    positions = []
    for count in references.token_counts:
        positions.append(
            TokenPositions(dim, (count,), time_only=time_only, ends_before_audio=ends_before_audio)
        )
    positions.append(TokenPositions(dim, (inputs.latents.shape[2],), time_only=time_only))
    return tuple(positions)


def _list_video_positions(
    inputs: StreamInputs, dim: int, fps: Fps, time_only: bool
) -> tuple[TokenPositions, ...]:
    """Return the positions of references, of the clip and of its keyframes; `dim` is the rotated width."""
    make_positions = partial(TokenPositions, dim, fps=_list_distinct_rates(fps), time_only=time_only)
    positions = []
    for reference in inputs.references.latents:
        # a smaller reference is spread over the same area as the latents
        size_factor = inputs.latents.shape[-1] // reference.shape[-1]
        frame_stride = inputs.references.frame_stride
        positions.append(
            make_positions(tuple(reference.shape[2:]), size_factor=size_factor, time_factor=frame_stride)
        )
    num_frames, *sides = inputs.latents.shape[2:]  # the last frames are keyframes
    positions.append(make_positions((num_frames - len(inputs.keyframe_indices), *sides)))
    for frame_index in inputs.keyframe_indices:
        positions.append(make_positions((1, *sides), frame_index=frame_index))
    return tuple(positions)


def _flatten(modality: Modality, latents: Tensor) -> Tensor:
    """Flatten latents to tokens: video B Z F H W to B F*H*W Z, audio B Z M K to B M Z*K."""
    return latents.flatten(2).mT if modality is VIDEO else latents.transpose(1, 2).flatten(2)


def _shape_velocity(out: Tensor, modality: Modality, tokens: LtxTokens) -> Tensor:
    """Return the velocity of a stream in the shape of its latents, from tokens B L Z."""
    # Clean tokens get velocity 0, and partly clean tokens a fraction of it. Reference tokens are removed,
    # unless `returns_reference_velocity` is set; then the result stays flat, B Z L.
    # references that are denoised too need their velocities
    if modality is VIDEO and tokens.returns_reference_velocity:
        return out.mT
    stream = tokens.streams[modality]
    num_clean = stream.num_conditioning_tokens
    if stream.token_timesteps is not None:
        token_fractions = stream.token_timesteps.fractions[stream.token_timesteps.indices]  # B L
        out = out * token_fractions.unsqueeze(2)
    elif num_clean:
        out = torch.cat([torch.zeros_like(out[:, :num_clean]), out[:, num_clean:]], dim=1)
    if modality is AUDIO:
        num_latents, bins = tokens.audio_grid
        out = out[:, -num_latents:]  # without references
        return out.unflatten(2, (-1, bins)).transpose(1, 2)
    out = out[:, -math.prod(tokens.grid) :]  # without references
    return out.transpose(1, 2).unflatten(2, tokens.grid)


def _pair_by_sample(embedded: Tensor, batch_size: int) -> Tensor:
    """Return for each sample the embeddings of its conditioning tokens and of its other tokens, B 2 ..."""
    # `embedded` has the embeddings of the B samples' timesteps, then of the conditioning tokens' timesteps:
    # B, or one for all samples.
    of_samples, of_conditioning = embedded[:batch_size], embedded[batch_size:]
    return torch.stack([of_conditioning.expand_as(of_samples), of_samples], dim=1)


def _list_distinct_rates(fps: Fps) -> tuple[float, ...]:
    """Return each sample's frame rate, or one rate if all are equal."""
    numbers = fps.tolist() if isinstance(fps, Tensor) else fps
    rates = (numbers,) if isinstance(numbers, (int, float)) else tuple(numbers)
    return rates if len(set(rates)) > 1 else rates[:1]

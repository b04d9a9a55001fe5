"""The transformer of LTX-2: video latents, with or without audio, from the states of a text.

Module names follow the published checkpoints. Source: the released code of LTX-2, also where diffusers
differs: attention between the streams is modulated by each stream's own times, and gated by the noise level
of the other one. `blocks` lists the steps in float32.
"""
# Letters: B batch, L video tokens, M sound tokens, S times (2 with given frames), C width of a stream,
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
    Stream,
    dim_references,
    gelu,
)
from ltx_2.configs import DIT, EPS, SOUND, VIDEO, LtxConfig, StreamNames
from ltx_2.rope import Places, make_tables
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
from protocols.steps import FULLY_CLEAN, NO_OVERRIDES, Overrides
from runtime.run_blocks import Hidden, run_blocks

DEFAULT_FPS = 24.0
References = Mapping[StreamNames, LtxReferences]  # by stream; audio has `LtxAudioReferences`
NO_REFERENCES: References = MappingProxyType({})
Fps = float | Sequence[float] | Tensor  # frames a second: one number, or one for each sample, on the host


class TimeModulation(nn.Module):
    """Embed timesteps' sinusoids, and compute shifts, scales and gates from them in float32."""

    def __init__(self, config: LtxConfig, dim: int, rows: int) -> None:
        super().__init__()
        self.rows = rows
        layers = {"linear_1": nn.Linear(config.freq_dim, dim), "linear_2": nn.Linear(dim, dim)}
        self.emb = nn.ModuleDict({"timestep_embedder": nn.ModuleDict(layers)})
        self.linear = nn.Linear(dim, rows * dim)

    def forward(self, waves: Tensor) -> tuple[Tensor, Tensor]:
        """Return modulation rows, n R C, and time embeddings, n C, from sinusoids, n freq_dim."""
        layers: Any = self.emb["timestep_embedder"]
        time = run_float32(layers["linear_2"], functional.silu(run_float32(layers["linear_1"], waves)))
        rows = run_float32(self.linear, functional.silu(time))
        return rows.unflatten(-1, (self.rows, -1)), time


@dataclass(frozen=True)
class StreamInputs:
    """Inputs of the video or audio stream in a forward pass."""

    names: StreamNames
    latents: Tensor  # B Z F H W of video, B Z M K of audio
    timesteps: Tensor  # B
    freq_dim: int  # width of the timesteps' sinusoids
    given_frames: int  # latent frames in front that are clean
    references: LtxReferences
    times: "TokenTimes | None" = None  # times per token; None: only the tokens in front have their own time
    keyframes: Sequence[int] = ()  # frame index of each image in the last latent frames
    num_marked: int = 0  # how many of the last latent frames are marked as the first one is

    @cached_property
    def waves(self) -> Tensor:
        """Return the timesteps' sinusoids, B freq_dim, which several layers embed."""
        return self.make_waves(self.timesteps)

    def make_waves(self, timesteps: Tensor) -> Tensor:
        """Return timesteps' sinusoids, n to n freq_dim, with float32 angles as in training."""
        return sinusoid(timesteps, self.freq_dim, torch.float32)

    @property
    def num_given(self) -> int:
        """Return the number of reference and given tokens, which come first and have their own time."""
        in_given_frames = self.given_frames * self.latents.shape[-1] * self.latents.shape[-2]
        return in_given_frames + sum(self.references.counts)

    def dim_references(self) -> tuple[Tensor, Tensor] | None:
        """Return extra query and key channels that weaken attention to references; None at full strength."""
        strengths = self.references.strengths
        if strengths is None:
            return None
        return dim_references(strengths, self.references.counts, math.prod(self.latents.shape[2:]))


@dataclass(frozen=True)
class TokenTimes:
    """Which fraction of the stream's timestep each of its tokens has; given tokens have less than all."""

    fractions: Tensor  # S float32, different ones
    indices: Tensor  # B L int64: the fraction of each token


def find_token_times(inputs: StreamInputs, given: Tensor) -> TokenTimes:
    """Return which fraction of the timestep each token of a stream has, references first.

    Args:
        inputs: Inputs of the stream.
        given: How much of each latent is given, from 0 to WHOLE (all), B 1 ... int16, on the host.
    """
    latents = inputs.latents
    references = inputs.references
    num_reference_tokens = sum(references.counts)
    num_given_tokens = inputs.num_given - num_reference_tokens  # of completely given frames
    with disable_modes():  # `unique` needs values, also in a dry run that measures memory
        shares = given.flatten(1).expand(len(latents), -1).clone()
        shares[:, :num_given_tokens] = FULLY_CLEAN
        reference_share = FULLY_CLEAN - round(FULLY_CLEAN * references.share)
        reference_shares = shares.new_full((len(latents), num_reference_tokens), reference_share)
        # few distinct shares: modulation is computed once for each
        distinct, indices = torch.cat([reference_shares, shares], dim=1).unique(return_inverse=True)
    fractions = 1 - distinct.float() / FULLY_CLEAN
    return TokenTimes(send_ahead(fractions, latents.device), send_ahead(indices, latents.device))


class LtxModel(nn.Module):
    """Predicts the velocities of noisy latents of a video and of its audio, or of one of them.

    Simplified, without references, given frames and the code around the blocks, for each stream:

        x = patchify_proj(latents.flatten(2).mT)                        # B L C; audio: B M C
        rows, time = adaln_single(timesteps)                            # B 9 C, B C
        text = caption_projection(text)                                 # B T C; LTX-2.0 only
        for block in transformer_blocks:
            x = x + gate * attn1(modulated(x), modulated(x))            # shifts, scales and gates: rows
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
        for names in config.streams:
            self._add_stream(names)
        # a learned mark for tokens whose latent frame covers a single frame: the first one, and keyframes
        if config.marks_first and config.shows:
            self.keyframes_abs_pos_embedding = nn.Parameter(torch.zeros(1, config.dim))
        self.transformer_blocks = nn.ModuleList(LtxBlock(config) for _ in range(config.num_layers))
        # rotary tables of a pass: positions of each stream, for itself and for attention to the other stream
        make = partial(make_tables, config)
        self._rotary = {
            (names, by_time): GridTable[tuple[Places, ...]](make)
            for names in (VIDEO, SOUND)
            for by_time in (False, True)
        }

    def _add_stream(self, names: StreamNames) -> None:
        """Add the layers of a stream that are outside the blocks."""
        config = self.config
        stream = config.streams[names]
        dim = stream.dim
        prefix = names.prefix
        modulation = partial(TimeModulation, config, dim)
        parts: dict[str, nn.Module | nn.Parameter] = {}  # layers by attribute, named as in released files
        parts[f"{prefix}patchify_proj"] = nn.Linear(stream.channels, dim)
        if config.projects_text:
            sizes = (stream.text_dim, dim, dim)
            parts[f"{prefix}caption_projection"] = TwoLayerMlp("linear_1 linear_2", sizes, gelu)
        # shift, scale and gate of self-attention, feed-forward and, in some releases, attention to the text
        parts[f"{prefix}adaln_single"] = modulation(9 if config.modulates_text else 6)
        if config.modulates_text and config.times_text:
            parts[f"{prefix}prompt_adaln_single"] = modulation(2)
        if len(config.streams) == 2:
            # of the attention between the streams: scale and shift as query and as key, and the gate
            parts[names.cross_rows] = modulation(4)
            parts[names.cross_gate] = modulation(1)
        # shift and scale of the output
        parts[f"{prefix}scale_shift_table"] = nn.Parameter(torch.zeros(2, dim))
        parts[f"{prefix}proj_out"] = nn.Linear(dim, stream.channels)
        parts[f"{prefix}norm_out"] = Float32LayerNorm(dim, EPS)
        for name, part in parts.items():
            setattr(self, name, part)

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
        has_sound: Tensor | None = None,
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
            audio_timesteps: B, 0 for clean audio; None: those of the video.
            audio_text: States for the audio stream, B T text_dim.
            has_sound: B, whether each sample has audio; other samples' audio does not influence their video.
                None: all samples have audio.
            overrides: Changes to this call; their second text has arguments named text and audio_text. Their
                given frames have the time 0, and their velocity is 0.
            references: References of video and audio. If those of the video are noisy, its velocity is B Z N:
                the velocity of their tokens, then that of the video's tokens.
            keyframes: Frame indices in the video of the single images in the last latent frames of `noisy`.

        Raises:
            ValueError: If sizes do not match, or there is audio but the network has no stream for it.
        """
        latents = {}
        if noisy is not None:
            latents[VIDEO] = noisy
        if audio is not None:
            latents[SOUND] = audio
        if audio_timesteps is None:
            audio_timesteps = timesteps
        hidden = self.embed(
            latents,
            timesteps={VIDEO: timesteps, SOUND: audio_timesteps},
            texts={VIDEO: text, SOUND: audio_text},
            fps=fps,
            has_sound=has_sound,
            overrides=overrides,
            references=references,
            keyframes=keyframes,
        )
        run_blocks(self, hidden, overrides)
        velocities = self.unembed(hidden.x, hidden.tokens)
        return velocities.get(VIDEO), velocities.get(SOUND)

    def embed(
        self,
        latents: dict[StreamNames, Tensor],
        timesteps: dict[StreamNames, Tensor],
        texts: dict[StreamNames, Tensor | None],
        fps: Fps = DEFAULT_FPS,
        has_sound: Tensor | None = None,
        overrides: Overrides = NO_OVERRIDES,
        references: References = NO_REFERENCES,
        keyframes: Sequence[int] = (),
    ) -> Hidden:
        """Embed all streams as tokens, B L+M W; return them with the blocks' other inputs.

        Latents, timesteps (B, 0..1000) and texts (B T text_dim) are given by stream. References come before
        the tokens of their stream; attention depends on positions only, not on the order of tokens.
        """
        self._check(latents, texts)
        first_latents = next(iter(latents.values()))
        dtype = activation_dtype(first_latents.device, self.compute_dtype)
        prompts = overrides.texts(len(first_latents), text=texts[VIDEO], audio_text=texts[SOUND])
        sees_other = len(latents) == 2 and not overrides.isolate_modalities
        parts = {}
        streams = {}
        for names, stream_latents in latents.items():
            is_video = names is VIDEO
            inputs = StreamInputs(
                names,
                stream_latents,
                timesteps=timesteps[names],
                freq_dim=self.config.freq_dim,
                given_frames=overrides.num_clean_frames if is_video else 0,
                references=references.get(names, LtxReferences()),
                keyframes=keyframes if is_video else (),
            )
            if overrides.clean_tokens is not None:
                if is_video:
                    inputs = replace(inputs, num_marked=overrides.clean_tokens.num_generated)
                given = overrides.clean_tokens.image if is_video else overrides.clean_tokens.audio
                if given is not None:
                    inputs = replace(inputs, times=find_token_times(inputs, given))
            text_name = "text" if is_video else "audio_text"
            stream_texts = self._embed_texts(names, [prompt[text_name] for prompt in prompts])
            parts[names] = self._project(inputs, dtype)
            stream = self._embed_stream(inputs, [text.to(dtype) for text in stream_texts], fps)
            if sees_other:
                other_times = timesteps[SOUND if is_video else VIDEO]
                # audio of a sample without sound must not influence its video
                influence = has_sound if is_video else None
                cross = self._embed_cross(inputs, other_times, influence, fps)
                stream = replace(stream, cross=cross)
            streams[names] = stream
        tokens = LtxTokens(
            streams,
            grid=tuple(latents[VIDEO].shape[2:]) if VIDEO in latents else (),
            audio_grid=tuple(latents[SOUND].shape[2:]) if SOUND in latents else (),
            dtype=dtype,
            attention=self.attention,
            combine=overrides.steer,
            keeps_references=VIDEO in streams and references.get(VIDEO, LtxReferences()).share > 0,
        )
        return Hidden(tokens.join(parts), tokens)

    def _embed_stream(self, inputs: StreamInputs, texts: Sequence[Tensor], fps: Fps) -> Stream:
        """Return what the blocks need for a single stream, without the attention to the other stream.

        `texts` are embedded, B T C each.
        """
        rows, time = self._embed_times(self._get_layer(inputs.names, "adaln_single"), inputs)
        references = inputs.references
        num_hidden, num_without_text = 0, 0  # first tokens that the video, or the text, does not reach
        if isinstance(references, LtxAudioReferences):
            # the mask hides either all tokens of the audio references or none
            num_hidden = sum(references.counts) * references.is_hidden_from_video
            num_without_text = sum(references.counts) * references.is_without_text
        return Stream(
            rotary=self._make_rotation(inputs, fps, by_time=False),
            texts=tuple(texts),
            rows=rows,
            time=time,
            text_rows=self._embed_text_times(inputs, rows),
            split=inputs.num_given if inputs.times is None else inputs.times.indices,
            fractions=None if inputs.times is None else inputs.times.fractions,
            dimmed=inputs.dim_references(),
            num_hidden=num_hidden,
            num_without_text=num_without_text,
        )

    def _embed_texts(self, names: StreamNames, texts: Sequence[Tensor]) -> Sequence[Tensor]:
        """Embed a stream's texts for cross-attention, B T C each."""
        if not self.config.projects_text:
            return texts
        layer = self._get_layer(names, "caption_projection")
        return [layer(text) for text in texts]

    def _embed_text_times(self, inputs: StreamInputs, rows: Tensor) -> Tensor | None:
        """Return shift and scale of a stream's text, B 1 2 C; zeros if they do not depend on the time.

        Returns None if texts are not modulated. `rows` are the stream's, for their dtype and device.
        """
        if not self.config.modulates_text:
            return None
        if not self.config.times_text:
            return rows.new_zeros(1, 1, 2, 1)
        text_rows, _ = self._get_layer(inputs.names, "prompt_adaln_single")(inputs.waves)
        return text_rows.unsqueeze(1)

    def _embed_cross(
        self, inputs: StreamInputs, other_times: Tensor, influence: Tensor | None, fps: Fps
    ) -> CrossInputs:
        """Return the inputs for a stream's attention to the other stream (video to audio, or back).

        Shifts and scales depend on the stream's own times, the gate on the other stream's. `influence`, B
        bool, states whether the other stream has an effect in each sample; None means in all samples.
        """
        # shifts and scales
        rows, _ = self._embed_times(getattr(self, inputs.names.cross_rows), inputs)
        # times for the gate are scaled differently
        other_waves = inputs.make_waves(other_times * self.config.gate_time)
        gate, _ = getattr(self, inputs.names.cross_gate)(other_waves)
        if influence is not None:
            # sent from pinned memory: a copy from pageable memory would wait for the device
            influence = send_ahead(influence.float(), rows.device).view(-1, 1, 1)
        rotary = self._make_rotation(inputs, fps, by_time=True)
        return CrossInputs(rotary, rows, gate, influence)

    def _project(self, inputs: StreamInputs, dtype: torch.dtype) -> Tensor:
        """Project a stream's latents to tokens, B L W, after the tokens of its references."""
        names, latents, references = inputs.names, inputs.latents, inputs.references
        flat = _flatten(names, latents)
        if references.latents:
            in_front = [_flatten(names, reference) for reference in references.latents]
            flat = torch.cat([*in_front, flat], dim=1)
        tokens = run_in_weight_dtype(self._get_layer(names, "patchify_proj"), flat).to(dtype)
        if names is not VIDEO or not self.config.marks_first:
            return tokens
        return self._mark_single_frames(tokens, inputs)

    def unembed(self, x: Tensor, tokens: LtxTokens) -> dict[StreamNames, Tensor]:
        """Project tokens B L+M W to each stream's velocity, float32, in the shape of its latents."""
        velocities = {}
        for names, stream_x in tokens.split(x).items():
            stream = tokens.streams[names]
            table = self._get_layer(names, "scale_shift_table").float()
            shift, scale = (table + stream.time.unsqueeze(2)).unbind(2)  # each B S C
            normed = self._get_layer(names, "norm_out")(stream_x)
            h = modulate(normed, shift, scale, tokens.dtype, split=stream.split)
            out = run_in_weight_dtype(self._get_layer(names, "proj_out"), h).float()
            velocities[names] = _shape_velocity(out, names, tokens)
        return velocities

    def _mark_single_frames(self, x: Tensor, inputs: StreamInputs) -> Tensor:
        """Add the learned embedding to tokens of x, B L C, whose latent frame covers a single pixel frame.

        These are the first latent frame and generated keyframes; references and given images are not marked.
        """
        before = sum(inputs.references.counts)
        count = inputs.latents.shape[-1] * inputs.latents.shape[-2]  # tokens of a latent frame
        marked = x.new_zeros(x.shape[1], 1)
        marked[before : before + count] = 1
        if inputs.num_marked:
            marked[-inputs.num_marked * count :] = 1
        mark: Tensor = self.keyframes_abs_pos_embedding.to(x.dtype)
        return x + marked * mark

    def _get_layer(self, names: StreamNames, name: str) -> Any:
        return getattr(self, names.prefix + name)

    def _embed_times(self, layer: nn.Module, inputs: StreamInputs) -> tuple[Tensor, Tensor]:
        """Return modulation rows, B S R C, and time embeddings, B S C, for the S times of a stream.

        S counts the different times in a stream. It is 1 if all tokens have the timestep, and 2 if given
        tokens stand in front: first their time, the references' fraction of the timestep (0 if they are
        clean), then the timestep. With `inputs.times` each token has one of S fractions of the timestep.
        """
        timesteps, share = inputs.timesteps, inputs.references.share
        if inputs.times is not None:
            times = timesteps[:, None] * inputs.times.fractions  # B S
            rows, time = layer(inputs.make_waves(times.flatten()))
            return rows.unflatten(0, times.shape), time.unflatten(0, times.shape)
        if inputs.num_given == 0:
            rows, time = layer(inputs.waves)
            return rows.unsqueeze(1), time.unsqueeze(1)
        given_times = timesteps * share if share else timesteps.new_zeros(1)
        rows, time = layer(inputs.make_waves(torch.cat([timesteps, given_times])))
        return _pair_times(rows, len(timesteps)), _pair_times(time, len(timesteps))

    def _make_rotation(self, inputs: StreamInputs, fps: Fps, by_time: bool) -> Tensor:
        """Return the rotations of a stream's tokens, L N D/2 2, or B L N D/2 2 if samples differ in fps.

        With `by_time`, they are for the attention between the streams, which rotates by time alone.
        """
        latents = inputs.latents
        width = self.config.cross_dim if by_time else self.config.streams[inputs.names].dim
        # places of references come first, as their tokens do
        tables = self._rotary[inputs.names, by_time]
        if inputs.names is SOUND:
            references = inputs.references
            is_before = isinstance(references, LtxAudioReferences) and references.is_before
            grids = [
                Places(width, (count,), by_time=by_time, is_before=is_before) for count in references.counts
            ]
            grids.append(Places(width, (latents.shape[2],), by_time=by_time))
            return tables.get_table(tuple(grids), latents.device)
        places_of = partial(Places, width, fps=_list_distinct_rates(fps), by_time=by_time)
        places = []
        for reference in inputs.references.latents:
            # a smaller reference is spread over the same area as the latents
            size_factor = latents.shape[-1] // reference.shape[-1]
            factors = (size_factor, inputs.references.time)
            places.append(places_of(tuple(reference.shape[2:]), factors=factors))
        frames, *sides = latents.shape[2:]  # keyframes come after the frames
        places.append(places_of((frames - len(inputs.keyframes), *sides)))
        places += [places_of((1, *sides), frame=frame) for frame in inputs.keyframes]
        return tables.get_table(tuple(places), latents.device)

    def _check(self, latents: dict[StreamNames, Tensor], texts: dict[StreamNames, Tensor | None]) -> None:
        """Raise ValueError if latents or texts of a stream are missing or do not fit the network."""
        if not latents:
            raise ValueError("neither latents of a video nor of sound are given")
        for names, stream_latents in latents.items():
            what = "sound" if names is SOUND else "video"
            config = self.config.streams.get(names)
            if config is None:
                raise ValueError(f"{what} is given, but the network was loaded without the stream for it")
            if texts[names] is None:
                raise ValueError(f"the text for the {what} is missing")
            numbers = stream_latents.shape[1]
            if names is SOUND:
                numbers *= stream_latents.shape[3]  # an audio token joins all channels of one time
            if numbers != config.channels:
                raise ValueError(f"{numbers} numbers in a token of {what}, the model takes {config.channels}")


def _flatten(names: StreamNames, latents: Tensor) -> Tensor:
    """Flatten latents to tokens: video B Z F H W to B F*H*W Z, audio B Z M K to B M Z*K."""
    return latents.flatten(2).mT if names is VIDEO else latents.transpose(1, 2).flatten(2)


def _shape_velocity(out: Tensor, names: StreamNames, tokens: LtxTokens) -> Tensor:
    """Return the velocity of a stream in the shape of its latents, from tokens B L Z.

    Given tokens get velocity 0, and partly given tokens a fraction of it. Reference tokens are removed,
    unless `keeps_references` is set; then the result stays flat, B Z L.
    """
    # references that are denoised too need their velocities
    if names is VIDEO and tokens.keeps_references:
        return out.mT
    stream = tokens.streams[names]
    if isinstance(stream.split, Tensor):  # B L: the index of each token's fraction of the timestep
        assert stream.fractions is not None
        token_fractions = stream.fractions[stream.split]  # B L
        out = out * token_fractions.unsqueeze(2)
    elif stream.split:  # the number of given tokens, which come first
        num_given = stream.split
        out = torch.cat([torch.zeros_like(out[:, :num_given]), out[:, num_given:]], dim=1)
    if names is SOUND:
        length, bins = tokens.audio_grid
        out = out[:, -length:]  # without references
        return out.unflatten(2, (-1, bins)).transpose(1, 2)
    out = out[:, -math.prod(tokens.grid) :]  # without references
    return out.transpose(1, 2).unflatten(2, tokens.grid)


def _pair_times(rows: Tensor, batch: int) -> Tensor:
    """Return each sample's row for given tokens, then that of its timestep, B 2 ...; in `rows` these lead."""
    of_timesteps, of_given = rows[:batch], rows[batch:]
    return torch.stack([of_given.expand_as(of_timesteps), of_timesteps], dim=1)


def _list_distinct_rates(fps: Fps) -> tuple[float, ...]:
    """Return each sample's frame rate, or one rate if all are equal."""
    numbers = fps.tolist() if isinstance(fps, Tensor) else fps
    rates = (numbers,) if isinstance(numbers, (int, float)) else tuple(numbers)
    return rates if len(set(rates)) > 1 else rates[:1]

"""The transformer of LTX-2: video latents, with or without sound, from the states of a text.

Module names follow the published checkpoints. Source: the released code of LTX-2, also where diffusers
differs: attention between the streams is modulated by each stream's own times, and gated by the noise level
of the other one. `blocks` lists the steps in float32.
"""
# Letters: B batch, L video tokens, M sound tokens, S segments (2 with given frames), C width of a stream,
# W of the wider one

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from ltx_2.blocks import CrossInputs, LtxBlock, LtxReferences, LtxTokens, Stream, dim_references, gelu
from ltx_2.configs import DIT, EPS, SOUND, VIDEO, LtxConfig, StreamNames
from ltx_2.rope import Places, make_tables
from modules.contract.steps import NO_TWEAKS, Tweaks
from modules.layers.modulation import modulate
from modules.layers.norms import Float32LayerNorm, TwoLayers, activation_dtype, in_own_dtype, run_float32
from modules.layers.rope import GridTable, sinusoid
from modules.run_blocks import Hidden, run_blocks
from modules.speed_options import SDPA, AttentionChoice

USUAL_FPS = 24.0
NO_REFERENCES = LtxReferences()
Fps = float | Sequence[float] | Tensor  # frames a second: one number, or one for each sample, on the host


class TimeModulation(nn.Module):
    """Embed timesteps and compute shifts, scales and gates of them: n -> n R C and n C, float32."""

    def __init__(self, config: LtxConfig, dim: int, rows: int) -> None:
        super().__init__()
        self.rows, self.freq_dim = rows, config.freq_dim
        layers = {"linear_1": nn.Linear(config.freq_dim, dim), "linear_2": nn.Linear(dim, dim)}
        self.emb = nn.ModuleDict({"timestep_embedder": nn.ModuleDict(layers)})
        self.linear = nn.Linear(dim, rows * dim)

    def forward(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        layers: Any = self.emb["timestep_embedder"]
        # float32 angles, as in training
        waves = sinusoid(timesteps, self.freq_dim, torch.float32)
        time = run_float32(layers["linear_2"], functional.silu(run_float32(layers["linear_1"], waves)))
        rows = run_float32(self.linear, functional.silu(time))
        return rows.unflatten(-1, (self.rows, -1)), time


class LtxModel(nn.Module):
    """Predict the velocities of noisy latents of a video and of its sound, or of one of them."""

    spec = DIT

    def __init__(self, config: LtxConfig, attention: AttentionChoice = SDPA) -> None:
        """attention: passed to `modules.attention.attend`."""
        super().__init__()
        self.config = config
        self.attention = attention
        for names, one in config.streams.items():
            prefix, time = names.prefix, partial(TimeModulation, config, one.dim)
            setattr(self, f"{prefix}patchify_proj", nn.Linear(one.channels, one.dim))
            if config.projects_text:
                layers = TwoLayers("linear_1 linear_2", (one.text_dim, one.dim, one.dim), gelu)
                setattr(self, f"{prefix}caption_projection", layers)
            setattr(self, f"{prefix}adaln_single", time(9 if config.modulates_text else 6))
            if config.modulates_text and config.times_text:
                setattr(self, f"{prefix}prompt_adaln_single", time(2))
            if len(config.streams) == 2:
                setattr(self, names.cross_rows, time(4))
                setattr(self, names.cross_gate, time(1))
            setattr(self, f"{prefix}scale_shift_table", nn.Parameter(torch.zeros(2, one.dim)))
            setattr(self, f"{prefix}proj_out", nn.Linear(one.dim, one.channels))
            setattr(self, f"{prefix}norm_out", Float32LayerNorm(one.dim, EPS))
        if config.marks_first and config.shows:
            self.keyframes_abs_pos_embedding = nn.Parameter(torch.zeros(1, config.dim))
        self.transformer_blocks = nn.ModuleList(LtxBlock(config) for _ in range(config.num_layers))
        # each of the tables of a pass: positions of either stream, for itself and for the other
        make = partial(make_tables, config)
        self._rotary = {
            (names, by_time): GridTable[tuple[Places, ...]](make)
            for names in (VIDEO, SOUND)
            for by_time in (False, True)
        }

    @property
    def compute_dtype(self) -> torch.dtype:
        first = next(iter(self.config.streams)).prefix
        name = f"transformer_blocks.0.{first}attn1.to_q.bias"
        return self.get_parameter(name).dtype  # the weight may be in 8 bits

    def forward(
        self,
        noisy: Tensor | None,
        timesteps: Tensor,
        text: Tensor | None = None,
        fps: Fps = USUAL_FPS,
        sound: Tensor | None = None,
        sound_timesteps: Tensor | None = None,
        sound_text: Tensor | None = None,
        has_sound: Tensor | None = None,
        tweaks: Tweaks = NO_TWEAKS,
        references: LtxReferences = NO_REFERENCES,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the velocities of video and sound, in float32; None for one that is not given.

        noisy: B Z F H W, latents of the video; None: sound alone. timesteps: B, 0..1000; 0 for a video that
        is given. text: B T text_dim, states for the video's stream, all of which are seen. fps: of the video.
        sound: B Z M K, latents of the sound, K bins of each; None: video alone, no weight of the sound's
        stream takes part. sound_timesteps: B, 0 for a sound that is given; None: those of the video.
        sound_text: B T text_dim, states for the sound's stream. has_sound: B, whether a sample has sound:
        without, its sound has no influence on its video; None: all have it. tweaks: ideas that change this
        call; their second text has the names text and sound_text. Their given frames have the time 0, and
        their velocity is 0. references: if they are noisy, the video's velocity is B Z N of their tokens, and
        then its own.
        Raises ValueError if sizes do not go together, or for sound if the network has no stream for it.
        """
        latents = {VIDEO: noisy, SOUND: sound}
        of_sound = timesteps if sound_timesteps is None else sound_timesteps
        hidden = Hidden(
            *self.embed(
                {names: one for names, one in latents.items() if one is not None},
                {VIDEO: timesteps, SOUND: of_sound},
                {VIDEO: text, SOUND: sound_text},
                fps,
                has_sound,
                tweaks,
                references,
            )
        )
        run_blocks(self, hidden, tweaks)
        made = self.unembed(hidden.x, hidden.tokens)
        return made.get(VIDEO), made.get(SOUND)

    def embed(
        self,
        latents: dict[StreamNames, Tensor],
        timesteps: dict[StreamNames, Tensor],
        texts: dict[StreamNames, Tensor | None],
        fps: Fps = USUAL_FPS,
        has_sound: Tensor | None = None,
        tweaks: Tweaks = NO_TWEAKS,
        references: LtxReferences = NO_REFERENCES,
    ) -> tuple[Tensor, LtxTokens]:
        """Return the tokens of all streams, B L+M W, and the other inputs of the blocks.

        References stand in front of the video's tokens: attention knows no order but that of positions.
        """
        self._check(latents, texts)
        first = next(iter(latents.values()))
        dtype = activation_dtype(first.device, self.compute_dtype)
        asked = tweaks.texts(len(first), text=texts[VIDEO], sound_text=texts[SOUND])
        parts, streams, has_cross = {}, {}, len(latents) == 2 and not tweaks.isolated
        for names, one in latents.items():
            texts_of = [each["sound_text" if names is SOUND else "text"] for each in asked]
            if self.config.projects_text:
                texts_of = list(map(self._part(names, "caption_projection"), texts_of))
            before = references if names is VIDEO else NO_REFERENCES
            given = tweaks.given_frames * one.shape[-1] * one.shape[-2] if names is VIDEO else 0
            given += sum(before.counts)
            own, share = timesteps[names], before.share
            parts[names] = self._project(names, one, before, dtype)
            rows, time = self._embed_times(self._part(names, "adaln_single"), own, given > 0, share)
            text_rows = cross = heard = None
            if self.config.modulates_text and not self.config.times_text:
                text_rows = rows.new_zeros(1, 1, 2, 1)
            elif self.config.modulates_text:
                text_rows, _ = self._embed_times(self._part(names, "prompt_adaln_single"), own)
            if has_cross:  # shifts and scales follow its own times, the gate the other stream's
                others = timesteps[SOUND if names is VIDEO else VIDEO] * self.config.gate_time
                cross_rows, _ = self._embed_times(getattr(self, names.cross_rows), own, given > 0, share)
                gate, _ = self._embed_times(getattr(self, names.cross_gate), others)
                if names is VIDEO and has_sound is not None:
                    heard = has_sound.to(rows.device, torch.float32).view(-1, 1, 1)
                by_time = self._rotation(names, one, fps, True, before)
                cross = CrossInputs(by_time, cross_rows, gate.squeeze(2), heard)
            dimmed = None
            if before.strengths is not None:
                dimmed = dim_references(before.strengths, before.counts, math.prod(one.shape[2:]))
            streams[names] = Stream(
                self._rotation(names, one, fps, False, before),
                tuple(each.to(dtype) for each in texts_of),
                rows,
                time,
                text_rows,
                given,
                cross,
                dimmed=dimmed,
            )
        grid = tuple(latents[VIDEO].shape[2:]) if VIDEO in latents else ()
        bins = latents[SOUND].shape[3] if SOUND in latents else 0
        how = self.attention, tweaks.steer
        tokens = LtxTokens(streams, grid, bins, dtype, *how, keeps_references=references.share > 0)
        return tokens.join(parts), tokens

    def _project(
        self, names: StreamNames, latents: Tensor, before: LtxReferences, dtype: torch.dtype
    ) -> Tensor:
        """Return the tokens of a stream before any block, B L W, those of references in front."""
        # B F*H*W Z of a video's latents, B M Z*K of a sound's
        flat = latents.flatten(2).mT if names is VIDEO else latents.transpose(1, 2).flatten(2)
        if before.latents:
            flat = torch.cat([*(each.flatten(2).mT for each in before.latents), flat], dim=1)
        tokens = in_own_dtype(self._part(names, "patchify_proj"), flat).to(dtype)
        if names is not VIDEO or not self.config.marks_first:
            return tokens
        return self._mark_first(tokens, sum(before.counts), latents.shape[-1] * latents.shape[-2])

    def unembed(self, x: Tensor, tokens: LtxTokens) -> dict[StreamNames, Tensor]:
        """Turn tokens B L+M W into the velocities of the streams, as their latents came, in float32."""
        made = {}
        for names, one in tokens.split(x).items():
            stream = tokens.streams[names]
            table = self._part(names, "scale_shift_table").float()
            shift, scale = (table + stream.time.unsqueeze(2)).unbind(2)  # each B S C
            h = modulate(self._part(names, "norm_out")(one), shift, scale, tokens.dtype, stream.given)
            out = in_own_dtype(self._part(names, "proj_out"), h).float()
            if names is VIDEO and tokens.keeps_references:
                made[names] = out.mT
                continue
            if stream.given:
                out = torch.cat([torch.zeros_like(out[:, : stream.given]), out[:, stream.given :]], dim=1)
            if names is VIDEO:
                out = out[:, -math.prod(tokens.grid) :]  # without references
                made[names] = out.transpose(1, 2).unflatten(2, tokens.grid)
            else:
                made[names] = out.unflatten(2, (-1, tokens.bins)).transpose(1, 2)
        return made

    def _mark_first(self, x: Tensor, before: int, count: int) -> Tensor:
        """Mark the `count` tokens of x, B L C, of the latent frame that shows one frame of pixels.

        before: number of tokens of references in front, which are not marked.
        """
        first, marked, rest = x.split([before, count, x.shape[1] - before - count], dim=1)
        return torch.cat([first, marked + self.keyframes_abs_pos_embedding.to(x.dtype), rest], dim=1)

    def _part(self, names: StreamNames, name: str) -> Any:
        return getattr(self, names.prefix + name)

    def _embed_times(
        self, layer: nn.Module, timesteps: Tensor, has_given: bool = False, share: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Return rows, B S R C, and times, B S C; with given frames S is 2, these first: `share` of it."""
        if not has_given:
            rows, time = layer(timesteps)
            return rows.unsqueeze(1), time.unsqueeze(1)
        count = len(timesteps)
        both = layer(torch.cat([timesteps, timesteps * share if share else timesteps.new_zeros(1)]))
        rows, time = (torch.stack([one[count:].expand_as(one[:count]), one[:count]], dim=1) for one in both)
        return rows, time

    def _rotation(
        self,
        names: StreamNames,
        latents: Tensor,
        fps: Fps,
        by_time: bool,
        references: LtxReferences,
    ) -> Tensor:
        width = self.config.cross_dim if by_time else self.config.streams[names].dim
        if names is SOUND:
            places: tuple[Places, ...] = (Places(width, (latents.shape[2],), (), by_time),)
        else:
            given = fps.tolist() if isinstance(fps, Tensor) else fps
            each = (given,) if isinstance(given, (int, float)) else tuple(given)
            rates = each if len(set(each)) > 1 else each[:1]
            shown = references.latents
            factors = [(latents.shape[-1] // one.shape[-1], references.time) for one in shown]
            factors.append((1, 1))
            grids = [tuple(one.shape[2:]) for one in (*shown, latents)]
            both = zip(grids, factors, strict=True)
            places = tuple(Places(width, grid, rates, by_time, factor) for grid, factor in both)
        return self._rotary[names, by_time].of(places, latents.device)

    def _check(self, latents: dict[StreamNames, Tensor], texts: dict[StreamNames, Tensor | None]) -> None:
        if not latents:
            raise ValueError("neither latents of a video nor of sound are given")
        for names, one in latents.items():
            what = "sound" if names is SOUND else "video"
            config = self.config.streams.get(names)
            if config is None:
                raise ValueError(f"{what} is given, but the network was loaded without the stream for it")
            if texts[names] is None:
                raise ValueError(f"the text for the {what} is missing")
            numbers = one.shape[1] if names is VIDEO else one.shape[1] * one.shape[3]
            if numbers != config.channels:
                raise ValueError(f"{numbers} numbers in a token of {what}, the model takes {config.channels}")

"""The sound of clips in reports: which clips have it, whether it covers the clip, and a drawing of it."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from markupsafe import Markup

from dataset.caching.audio import AudioWork
from dataset.caching.planning import SourcePlan
from dataset.caching.prefetch import Failure, map_ahead
from dataset.config import DatasetTable
from dataset.config_keys import IGNORE, REQUIRED
from dataset.sources.audio import NoAudio, find_audio, read_audios
from dataset.sources.fetching import fetch
from dataset.sources.frames import kept_rate
from dataset.sources.media_source import Fault, MediaSource
from modules.bars import Bar
from modules.console import pluralize
from modules.errors import MediaError
from modules.media.reading import video_info
from modules.media.samples import TrackInfo, track_info
from protocols.data import AudioSpec

TOLERANCE_SECONDS = 0.1  # for sound that begins later or ends earlier: codecs pad and round to frames
WAVE_RATE = 8000  # samples per second for the drawing
WAVE_BARS = 300
WAVE_HEIGHT = 40


@dataclass(frozen=True, slots=True)
class AudioInspection:
    """A clip's audio properties, read from its headers."""

    track: TrackInfo | None = None
    missing_reason: str | None = None  # why the clip has no sound
    mismatch: str | None = None  # how the sound does not fit the clip


def uses_audio(table: DatasetTable) -> bool:
    """Return whether a table's clips are trained with their audio."""
    return table.kind == "video" and table.source.audio != IGNORE


def inspect_audio(source: MediaSource) -> AudioInspection:
    """Return the audio properties in a clip's headers, without decoding the audio.

    Raises MediaError or OSError if a file cannot be read.
    """
    video_seconds = None
    try:
        with fetch(source) as local_source:
            path = find_audio(local_source)
            track = track_info(path)
            if track is None:
                raise NoAudio(f"{path}: it has no audio track")
            # only a video file has its own duration to compare with
            is_video = (
                local_source.precomputed is None
                and not local_source.path.is_dir()
                and not local_source.table.source.is_audio_only
            )
            if is_video:
                info = video_info(local_source.path)
                rate = local_source.table.buckets.declared_fps or info.fps
                video_seconds = info.frames / rate if info.frames and rate else None
    except NoAudio as reason:
        return AudioInspection(missing_reason=str(reason))
    # `video_seconds` is None if the duration of the clip is unknown
    mismatches = []
    if track.start > TOLERANCE_SECONDS:
        mismatches.append(f"begins {float(track.start):.2f} s late")
    if track.end is not None and video_seconds is not None:
        excess_seconds = float(track.end) - video_seconds
        if excess_seconds < -TOLERANCE_SECONDS:
            mismatches.append(f"ends {-excess_seconds:.2f} s early")
        if excess_seconds > TOLERANCE_SECONDS:
            mismatches.append(f"continues for {excess_seconds:.2f} s, which are cut off")
    if track.tracks > 1:
        mismatches.append(f"{track.tracks} tracks, and FFmpeg selects one")
    return AudioInspection(track, mismatch=f"its sound: {', '.join(mismatches)}" if mismatches else None)


@dataclass(frozen=True)
class AudioFindings:
    """Findings about the audio of the clips in a dataset table."""

    lines: list[str]  # about the sound and its caches
    errors: list[Fault]
    warnings: list[Fault]


def check_audio(
    table: DatasetTable, plans: Sequence[SourcePlan], work: AudioWork, workers: int
) -> AudioFindings:
    """Check the audio of a table's clips and its caches; `plans` say how their latents are cached."""
    results = map_ahead(
        plans,
        partial(_check_clip, work=work),
        workers,
        Bar(len(plans), "Reading headers", "clip", shown=False),
    )
    findings = AudioFindings(lines=[], errors=[], warnings=[])
    tracks: list[TrackInfo] = []
    num_valid = num_missing = 0  # audio caches
    needs_audio = (
        table.source.audio == REQUIRED or work.spec.audio_only
    )  # else missing audio is only a warning
    for plan, result in zip(plans, results, strict=True):
        if isinstance(result, Failure):
            kind = "have sound that cannot be read"
            findings.errors.append(Fault(kind, str(result), plan.source.stem))
            continue
        audio, num_valid_of_clip = result
        if audio.track is not None:
            tracks.append(audio.track)
            num_valid += num_valid_of_clip
            num_missing += len(plan.item_sizes) - num_valid_of_clip
        if audio.missing_reason is not None:
            silence = Fault("have no sound", audio.missing_reason, plan.source.stem)
            if needs_audio:
                findings.errors.append(silence)
            else:
                findings.warnings.append(silence)
        if audio.mismatch is not None:
            kind = "have sound that does not fit"
            text = f"{plan.source.path}: {audio.mismatch}"
            findings.warnings.append(Fault(kind, text, plan.source.stem))
    description = "can be heard" if table.source.is_audio_only else "clips have it"
    findings.lines.append(f"sound: {len(tracks)} of {len(plans)} {description}{_describe_tracks(tracks)}")
    findings.lines.append(
        f"caches of sound: {num_valid} files are valid, {pluralize(num_missing, 'items need encoding')}"
    )
    return findings


def _check_clip(plan: SourcePlan, work: AudioWork) -> tuple[AudioInspection, int] | Failure:
    """Read a clip's audio properties from its headers, and count its valid audio caches."""
    try:
        audio = inspect_audio(plan.source)
        num_valid = 0 if audio.track is None else work.count_valid(plan.source, plan.valid_files)
    except (MediaError, OSError) as error:
        return Failure.of(plan.source, error)
    return audio, num_valid


def _describe_tracks(tracks: Sequence[TrackInfo]) -> str:
    """Return the formats of audio tracks as ": 3 with 2 channels at 48000 Hz, ..."; "" without tracks."""
    words = [
        f"{count} with {channels} channel{'s' if channels > 1 else ''} at {rate} Hz"
        for rate, channels, count in count_tracks(tracks)
    ]
    return f": {', '.join(words)}" if words else ""


def count_tracks(tracks: Iterable[TrackInfo]) -> list[tuple[int, int, int]]:
    """Count audio tracks by (sample rate, channels); return (rate, channels, count), most frequent first."""
    counts = Counter((track.rate, track.channels) for track in tracks)
    by_frequency = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    return [(rate, channels, count) for (rate, channels), count in by_frequency]


def draw_audio(source: MediaSource, fps: float, num_frames: int) -> Markup | None:
    """Return an SVG of the audio that belongs to the first `num_frames` frames of a clip; None without audio.

    Raises MediaError or OSError if a file cannot be read.
    """
    try:
        with fetch(source) as local_source:
            # one channel; no latents are made, so their shape does not matter
            spec = AudioSpec(WAVE_RATE, 1, lambda frames, rate: (1, 1, 1))
            (samples,) = read_audios(
                find_audio(local_source), [(0, num_frames)], kept_rate(local_source, fps), spec
            )
    except NoAudio:
        return None
    amplitudes = np.abs(samples[0].numpy())
    num_bars = min(WAVE_BARS, len(amplitudes))
    edges = np.linspace(0, len(amplitudes), num_bars + 1).astype(int)
    loudest_samples = np.maximum.reduceat(amplitudes, edges[:-1])
    heights = loudest_samples.clip(0, 1) * WAVE_HEIGHT
    svg_path = ""  # one vertical line for each bar, centered
    for index, height in enumerate(heights):
        svg_path += f"M{index} {(WAVE_HEIGHT - height) / 2:.1f}v{height:.1f}"
    return Markup(
        f'<svg class="wave" viewBox="0 0 {num_bars} {WAVE_HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="loudness of the sound"><path d="{svg_path}"/></svg>'
    )

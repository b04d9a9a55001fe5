"""The sound of clips in reports: which clips have it, whether it covers the clip, and a drawing of it."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from dataset.caching.planning import SourcePlan
from dataset.caching.prefetch import Failure, map_ahead
from dataset.caching.sound import SoundWork
from dataset.config import DatasetTable
from dataset.config_keys import IGNORE, REQUIRED
from dataset.sources.fetching import fetch
from dataset.sources.frames import kept_rate
from dataset.sources.media_source import Fault, MediaSource
from dataset.sources.sound import NoSound, find_sound, read_sounds
from modules.bars import Bar
from modules.console import count_words
from modules.contract.data import SoundSpec
from modules.errors import MediaError
from modules.media.reading import video_info
from modules.media.samples import TrackFacts, track_facts

FITS = 0.1  # seconds that sound may begin later or end earlier: codecs pad, and round to their frames
WAVE_RATE = 8000  # samples per second for the drawing
WAVE_BARS = 300
WAVE_HEIGHT = 40


@dataclass(frozen=True, slots=True)
class Heard:
    """Facts in the headers of a clip and of its sound."""

    track: TrackFacts | None = None
    silent: str | None = None  # why the clip has no sound
    remark: str | None = None  # how the sound does not fit the clip


def is_heard(table: DatasetTable) -> bool:
    return table.kind == "video" and table.audio != IGNORE


def listen(source: MediaSource, fps: float) -> Heard:
    """Return facts about the sound of a clip, without decoding it. fps: of the model.

    Raises MediaError or OSError if a file cannot be read.
    """
    try:
        with fetch(source) as here:
            path = find_sound(here)
            track = track_facts(path)
            if track is None:
                raise NoSound(f"{path}: it has no track of sound")
            bare = here.tensors is not None or here.path.is_dir() or here.table.is_of_sound
            info = None if bare else video_info(here.path)
    except NoSound as reason:
        return Heard(silent=str(reason))
    rate = None if info is None else here.table.stated_fps or info.fps
    seconds = info.frames / rate if info is not None and info.frames and rate else None
    found = [f"begins {float(track.start):.2f} s late"] if track.start > FITS else []
    if track.end is not None and seconds is not None:
        after = float(track.end) - seconds
        found += [f"ends {-after:.2f} s early"] if after < -FITS else []
        found += [f"goes on for {after:.2f} s, which are cut off"] if after > FITS else []
    found += [f"{track.tracks} tracks, of which FFmpeg chooses one"] if track.tracks > 1 else []
    return Heard(track, remark=f"its sound: {', '.join(found)}" if found else None)


def check_sound(
    table: DatasetTable, plans: Sequence[SourcePlan], work: SoundWork, fps: float, workers: int
) -> tuple[list[str], list[Fault], list[Fault]]:
    """Return lines about a table's sound and its caches, faults, and remarks. plans: of its latents."""

    def look(plan: SourcePlan) -> tuple[Heard, int] | Failure:
        try:
            heard = listen(plan.source, fps)
            return heard, 0 if heard.track is None else work.count_valid(plan.source, plan.kept)
        except (MediaError, OSError) as error:
            return Failure.of(plan.source, error)

    bar = Bar(len(plans), "Reading headers", "clip", shown=False)
    faults, remarks, valid, missing = list[Fault](), list[Fault](), 0, 0
    tracks: list[TrackFacts] = []
    for plan, found in zip(plans, map_ahead(plans, look, workers, bar), strict=True):
        stem = plan.source.stem
        if isinstance(found, Failure):
            faults.append(Fault("have sound that cannot be read", str(found), stem))
            continue
        heard, kept = found
        if heard.track is not None:
            tracks.append(heard.track)
            valid, missing = valid + kept, missing + len(plan.items) - kept
        if heard.silent is not None:
            told = faults if table.audio == REQUIRED or work.spec.is_alone else remarks
            told.append(Fault("have no sound", heard.silent, stem))
        if heard.remark is not None:
            remarks.append(Fault("have sound that does not fit", f"{plan.source.path}: {heard.remark}", stem))
    words = [
        f"{count} with {channels} channel{'s' if channels > 1 else ''} at {rate} Hz"
        for rate, channels, count in count_tracks(tracks)
    ]
    forms = f": {', '.join(words)}" if words else ""
    have = "can be heard" if table.is_of_sound else "clips have it"
    lines = [
        f"sound: {len(tracks)} of {len(plans)} {have}{forms}",
        f"caches of sound: {valid} files are valid, {count_words(missing, 'items need encoding')}",
    ]
    return lines, faults, remarks


def count_tracks(tracks: Iterable[TrackFacts]) -> list[tuple[int, int, int]]:
    """Return (rate, channels, how many have both), the most frequent first."""
    counts = Counter((track.rate, track.channels) for track in tracks)
    return [(*form, count) for form, count in sorted(counts.items(), key=lambda one: (-one[1], one[0]))]


def draw_sound(source: MediaSource, fps: float, used: int) -> Markup | None:
    """Return a drawing of the sound of the first `used` kept frames of a clip; None if there is none.

    Raises MediaError or OSError if a file cannot be read.
    """
    try:
        with fetch(source) as here:
            spec = SoundSpec(WAVE_RATE, 1, lambda frames, rate: (1, 1, 1))
            (samples,) = read_sounds(find_sound(here), [(0, used)], kept_rate(here, fps), spec)
    except NoSound:
        return None
    loud = np.abs(samples[0].numpy())
    edges = np.linspace(0, len(loud), min(WAVE_BARS, len(loud)) + 1).astype(int)
    peaks = np.maximum.reduceat(loud, edges[:-1]).clip(0, 1) * WAVE_HEIGHT
    bars = "".join(f"M{place} {(WAVE_HEIGHT - peak) / 2:.1f}v{peak:.1f}" for place, peak in enumerate(peaks))
    return Markup(
        f'<svg class="wave" viewBox="0 0 {len(peaks)} {WAVE_HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="loudness of the sound"><path d="{bars}"/></svg>'
    )

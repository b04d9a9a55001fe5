"""Choose the frames of a video: drop frames to reach a rate, then cut spans in one of five ways.

A span is (first frame, number of frames), counted in kept frames.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence

from dataset.config import DatasetTable
from dataset.sources.faults import Fault
from dataset.sources.media_source import MediaSource
from modules.errors import MediaError
from modules.media.decoding import is_animation
from modules.media.opening import open_video

Span = tuple[int, int]

TOLERANCE = 0.02  # of a rate: 29.97 is 30
LOOKED_AT = 1000  # clips of a dataset whose headers are read for their rates


def spans(table: DatasetTable, kept_frames: int, frame_step: int = 4) -> tuple[Span, ...]:
    """Return the spans of a clip with `kept_frames` frames; none if it is too short for every target.

    frame_step: "full" rounds its length down to frame_step * n + 1 (4 for all families). Spans are sorted by
    target, then by start, without duplicates.
    """
    if table.frame_extraction == "full":
        length = min(kept_frames, table.max_frames)
        return ((0, (length - 1) // frame_step * frame_step + 1),) if length > 0 else ()
    found: dict[Span, None] = {}
    for target in table.target_frames:
        if target <= kept_frames:
            last = kept_frames - target
            starts: Iterable[int]
            match table.frame_extraction:
                case "head":
                    starts = (0,)
                case "chunk":
                    starts = range(0, last + 1, target)
                case "slide":
                    starts = range(0, last + 1, table.frame_stride)
                case "uniform":
                    starts = _even_starts(last, table.frame_sample)
                case mode:
                    raise ValueError(f"unknown frame extraction {mode!r}")
            found |= dict.fromkeys((start, target) for start in starts)
    return tuple(found)


def _even_starts(last: int, count: int) -> Iterator[int]:
    """Return `count` evenly spaced integers from 0 to `last`, rounded down.

    Computed in float64 as in numpy.linspace, so that caches agree with those of other tuners.
    """
    if count == 1:
        yield 0
        return
    if count > last:  # every start, some of them more than once
        yield from range(last + 1)
        return
    step = last / (count - 1)
    yield from (int(index * step) for index in range(count - 1))
    yield last


def describe_short(table: DatasetTable, found: Collection[Span], kept_frames: int) -> str | None:
    """Say for which target_frames a clip with these spans is too short; None if for none, or for all."""
    lengths = {length for _, length in found}
    if not found or table.kind == "image" or table.frame_extraction == "full":
        return None
    missing = [str(target) for target in table.target_frames if target not in lengths]
    return f"{kept_frames} frames, too few for {', '.join(missing)} of target_frames" if missing else None


def frames_wanted(table: DatasetTable) -> int | None:
    """Return how many kept frames are enough, so that decoding can stop; None if all are needed."""
    if table.frame_extraction == "head":
        return max(table.target_frames)
    return table.max_frames if table.frame_extraction == "full" else None


def keep_pattern(source_fps: float | None, target_fps: float) -> Iterator[bool]:
    """Yield for each decoded frame, without end, whether to keep it to get from `source_fps` to `target_fps`.

    Frames are only dropped, never doubled: a source slower than the target keeps all. Without source_fps all
    are kept. The running sum is in float64 on purpose: its rounding decides about some frames, as in users'
    existing caches.
    """
    ratio = 1.0 if source_fps is None else target_fps / source_fps
    position, last = 0.0, -1
    while True:
        slot = int(position)
        position += ratio
        yield slot != last
        last = slot


def resample_indices(num_frames: int, source_fps: float | None, target_fps: float) -> tuple[int, ...]:
    """Return which of `num_frames` decoded frames are kept."""
    return tuple(
        index
        for index, keep in zip(range(num_frames), keep_pattern(source_fps, target_fps), strict=False)
        if keep
    )


# --- rates of clips beside those that their table states
# ------------------------------------------------------------------------------------------------------------


def compare_rates(found: float | None, stated: object, fps: float) -> str | None:
    """Return the fault if a file's rate differs from the stated one or, without one, from the model's."""
    if isinstance(stated, (int, float)):
        expected, cause = float(stated), f"source_fps says {stated:g}"
    elif stated is None:
        expected, cause = fps, "without source_fps all frames are used"
    else:  # "auto"
        return None
    if not found or abs(found / expected - 1) < TOLERANCE:
        return None
    return f"{cause}: the model sees it at {expected / found:.2g} times its speed"


def find_wrong_rates(sources: Sequence[MediaSource]) -> list[Fault]:
    """Return a fault for each clip of another rate than the source_fps that its table says.

    Only headers of clips that are here are read, of at most LOOKED_AT clips. Unreadable files are reported
    elsewhere.
    """
    clips = [one for one in sources if isinstance(one.table.source_fps, float) and not one.origins]
    step = -(-len(clips) // LOOKED_AT) or 1
    kind = 'clips have another rate than source_fps says; write source_fps = "auto"'
    faults = []
    for source in clips[::step]:
        try:
            # a folder has no rate, an animation is played by the times in its file
            if source.tensors is not None or source.path.is_dir() or is_animation(source.path):
                continue
            with open_video(source.path) as (_, stream):
                rate = float(stream.average_rate) if stream.average_rate else None
        except (MediaError, OSError):
            continue
        said = compare_rates(rate, source.table.source_fps, 1.0)
        if said is not None:
            text = f"{source.path}: {rate:.4g} frames a second; {said}"
            faults.append(Fault(kind, text, source.stem))
    return faults

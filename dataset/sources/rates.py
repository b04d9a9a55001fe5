"""Compare the frame rates of clips with those that their table states."""

from collections.abc import Sequence

from dataset.sources.faults import Fault
from dataset.sources.media_source import MediaSource
from modules.errors import MediaError
from modules.media.decoding import is_animation
from modules.media.opening import open_video

TOLERANCE = 0.02  # 29.97 is 30
LOOKED_AT = 1000  # clips of a dataset whose headers are read for this


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
        said = _compare_header(source)
        if said is not None:
            faults.append(Fault(kind, f"{source.path}: {said}", source.stem))
    return faults


def _compare_header(source: MediaSource) -> str | None:
    try:
        # a folder has no rate, an animation is played by the times in its file
        if source.tensors is not None or source.path.is_dir() or is_animation(source.path):
            return None
        with open_video(source.path) as (_, stream):
            rate = float(stream.average_rate) if stream.average_rate else None
    except (MediaError, OSError):
        return None
    said = compare_rates(rate, source.table.source_fps, 1.0)
    return None if said is None else f"{rate:.4g} frames a second; {said}"

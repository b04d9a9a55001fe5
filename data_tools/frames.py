"""Read chosen frames of a clip whose header may have another number of frames than the file."""

from collections.abc import Callable, Collection
from pathlib import Path

from modules.errors import MediaError
from modules.media.reading import Frame, video_frames, video_info

TRIES = 3


def pick_frames(
    path: Path,
    choose: Callable[[int], Collection[int]],
    reduce: Callable[[Frame], Frame],
    threads: int = 0,
    exact: bool = True,
) -> list[Frame]:
    """Return frames of a clip, of which only the reduced ones are kept. All of it is read, to find damage.

    choose: given the number of frames, returns which to take. threads: that decode; 0: FFmpeg's choice.
    exact: choose anew wherever the header is wrong, else only if it makes chosen frames missing. Raises
    MediaError if the clip cannot be read.
    """
    number = video_info(path).frames or sum(1 for _ in video_frames(path, threads=threads))
    for _ in range(TRIES):
        chosen, found, frames = choose(number), 0, []
        for found, frame in enumerate(video_frames(path, threads=threads), 1):
            if found - 1 in chosen:
                frames.append(reduce(frame))
        if found == number or (not exact and len(frames) == len(chosen)):
            return frames
        number = found
    raise MediaError(f"{path} has another number of frames each time it is read. Is it being written?")

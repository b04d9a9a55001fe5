"""RIFLEx: keep a video that is longer than those trained on from repeating itself.

Of the rotary frequencies of the frames, the one whose period is about the trained length makes a longer video
start again. It is slowed down so that it does not complete a turn within the video.
Source: Zhao et al. 2025, arXiv 2502.15894. There the length is that of the latents; the known tools, and
their users' numbers, count the frames of the video.
"""

import logging

from blissful_tuner.steadier_options import SteadierOptions
from modules.layers.rope import Slow

logger = logging.getLogger(__name__)

TURN = 0.9  # of a whole one that the frequency makes in the length of the video


def slow_frames(options: SteadierOptions, frames: int) -> Slow | None:
    """Return the frequency that a video of so many frames needs slowed down: TURN * 2 pi / frames.

    None if the option is off, or if the video is not longer than those trained on.
    """
    if options.riflex_index == 0:
        return None
    if frames <= options.riflex_beyond:
        logger.warning(
            "--riflex_index %d is ignored because the video has %d frames: it is for more than %d",
            options.riflex_index,
            frames,
            options.riflex_beyond,
        )
        return None
    return Slow(options.riflex_index - 1, frames / TURN)

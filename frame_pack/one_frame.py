"""Single images: a section with one target frame, whose index in time sets the distance to the controls.

A larger `target_index` lets the image change more. Control images have indices too and replace the start
image. This makes a model of motion edit images (kisekaeichi: two controls, one at a later index; 1f-mc: two
consecutive ones).
"""

import logging

from frame_pack.sections import Indices, history_indices_after
from protocols.one_frame import OneFrame

logger = logging.getLogger(__name__)


def one_frame_indices(settings: OneFrame, controls: int, window: int) -> Indices:
    """Return the frame indices of the latents that generate a single image.

    Clean latents are the control images, then one black frame; coarser ones are black frames alone.

    Args:
        settings: Typed indices, and which black frames are used.
        controls: Number of control images; without one, a black frame replaces them.
        window: Number of latent frames of a section, the default index of the image.
    """
    controls = max(controls, 1)
    if len(settings.control_indices) > controls:
        logger.warning(
            "control_index has %d indices; those after the first %d are ignored because there are no more "
            "control images",
            len(settings.control_indices),
            controls,
        )
    typed_indices = settings.control_indices[:controls]
    # a control image without a typed index is at index 0
    control_indices = (*typed_indices, *[0] * (controls - len(typed_indices)))
    # black frames are at the history indices after a section that starts at index 1
    black = history_indices_after(1 + window)
    return Indices(
        clean=(*control_indices, *black.clean) if settings.has_post else control_indices,
        clean_2x=black.clean_2x if settings.has_2x else (),
        clean_4x=black.clean_4x if settings.has_4x else (),
        target=(window if settings.target_index is None else settings.target_index,),
    )

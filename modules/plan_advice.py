"""Draw conclusions from a predicted peak: number of `--blocks_to_swap auto`, advice on a plan."""

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from modules.errors import MemoryPlanError, UserError
from modules.planning.memory_plan import Room, Swappable, gib, smallest_swap, swap_for
from modules.speed_options import Speed, set_blocks_to_swap

logger = logging.getLogger(__name__)

Predicted = TypeVar("Predicted", bound=Swappable)


def resolve_swap(
    speed: Speed, room: Room | None, predict: Callable[[], Predicted]
) -> tuple[Speed, Predicted | None]:
    """Return the options with the number that --blocks_to_swap auto stands for, and the prediction.

    room: of a CUDA device; without one nothing is rehearsed, and auto is 0. The prediction is None if there
    is no room or the rehearsal failed, which is logged: a plan is an aid, without one a run is as good.
    Raises UserErrors as the rehearsal does, MemoryPlanError if it fails and auto waits for it, and
    OptionError if the network has fewer blocks than are to be swapped.
    """
    if room is None:
        return (set_blocks_to_swap(speed, 0) if speed.swap.is_auto else speed), None
    try:
        prediction = predict()
    except UserError:
        raise
    except Exception as error:
        if speed.swap.is_auto:
            raise MemoryPlanError(
                f"--blocks_to_swap auto: no plan can be made ({error}). Give a number of blocks."
            ) from error
        logger.warning("The memory of this run cannot be predicted (%s: %s).", type(error).__name__, error)
        return speed, None
    blocks, reason = swap_for(prediction, speed.swap, room)
    if reason is not None:
        logger.info(reason)
        speed = set_blocks_to_swap(speed, blocks)
    return speed, prediction


def advise(
    prediction: Predicted,
    cheaper: Sequence[tuple[str, Callable[[], Predicted]]],
    usable: int,
    swapped: int = 0,
    can_swap: bool = True,
    phase: str = "",
) -> tuple[list[str], Predicted | None]:
    """Advise changes by which a prediction fits, the cheapest first; each line adds to those before it.

    cheaper: options not in use, and the prediction with each and all before it.
    usable: bytes of the device. swapped: blocks that the options swap.
    phase: words behind the bytes, " while denoising".
    Returns the lines, and the last prediction if even that does not fit.
    """
    lines: list[str] = []
    unchanged = [("", lambda: prediction)]
    for name, predict in cheaper or unchanged:
        prediction = predict()
        if name:
            needed = prediction.device(swapped)
            lines.append(f"{name}: {gib(needed)} GiB{phase}" + (" fits" if needed <= usable else ""))
            if needed <= usable:
                return lines, None
        count = smallest_swap(prediction, usable) if can_swap else None
        if count is not None:
            needed = prediction.device(count)
            return [*lines, f"--blocks_to_swap {count}: {gib(needed)} GiB{phase} fits"], None
    return lines, prediction

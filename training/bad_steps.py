"""The error for a step whose loss or gradient norm is NaN or infinite."""

from collections.abc import Sequence

from modules.console import format_count
from modules.errors import UserError


def explain_bad_step(
    step: int, loss: float, norm: float, keys: Sequence[str], *, remedy: str = "", before: int = 0
) -> UserError:
    """Return the error for a step whose loss or gradient norm is NaN or infinite.

    Args:
        step: Number of the optimizer step.
        loss: Mean loss of the step.
        norm: Norm of the gradients.
        keys: Keys of the items of this process.
        remedy: Advice at the end of the message; may be empty.
        before: Number of bad steps in a row that were skipped immediately before this one.
    """
    key_list = ", ".join(keys)
    items = f" The items of this process in that step: {key_list}." if key_list else ""
    skipped_text = (
        f" The {format_count(before, 'step')} before it also went wrong and were skipped." if before else ""
    )
    return UserError(
        f"step {step}: the loss is {loss}, the gradient norm {norm}; nothing of this step was "
        f"saved.{items}{skipped_text}\n"
        "  Lower --learning_rate, or look for a damaged clip among these items, and continue with "
        f"--resume latest-or-fail. {remedy}".rstrip()
    )

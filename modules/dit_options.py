"""The option of all families for the dtype of their transformer. Standard library only."""

from typing import Any

from modules.errors import OptionError
from modules.options import HABIT, option


def dit_dtype_option() -> Any:
    """Return the field of a family's options that `modules.devices.choose_compute_dtype` reads."""
    return option("dtype that the transformer computes in; default: that of its file", facts=HABIT)


def refuse_for_whole(dit_dtype: str | None) -> None:
    """Raise OptionError if --dit_dtype is given to the training of a whole transformer."""
    if dit_dtype is not None:
        raise OptionError(
            "--dit_dtype: trained weights are kept in float32, or in bfloat16 with --full_bf16; leave it out"
        )

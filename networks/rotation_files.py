"""Refuse files of OFTs whose tensors are read otherwise than those of every trainer's default."""

from pathlib import Path

from modules.errors import CheckpointError
from modules.text_files import parse_json, read_text
from networks.alphas import PEFT_FILE

TERMS = 5  # of the series: see `networks.rotation`


def refuse_other_series(path: Path) -> None:
    """Raise CheckpointError if PEFT's settings with an OFT ask for other rotations than the 5 terms.

    path: the OFT's file, or its folder. The tensors do not show which rotations they were trained for: PEFT's
    exact ones turn the other way.
    """
    is_adapter = path.is_dir() or path.name.startswith("adapter_model")
    settings_path = (path if path.is_dir() else path.parent) / PEFT_FILE
    if not is_adapter or not settings_path.is_file():
        return
    try:
        settings = dict(parse_json(read_text(settings_path)))
    except (ValueError, TypeError, OSError, RecursionError) as error:
        raise CheckpointError(
            f"{settings_path} cannot be read, and says how {path} rotates: {error}. Copy it again.", path
        ) from error
    if settings.get("use_cayley_neumann") is False:
        kind = "use_cayley_neumann = false, whose rotations turn the other way"
    elif settings.get("num_cayley_neumann_terms", TERMS) != TERMS:
        kind = f"a series of {settings['num_cayley_neumann_terms']} terms (num_cayley_neumann_terms)"
    else:
        return
    raise CheckpointError(
        f"{path} is an OFT with {kind}, as {PEFT_FILE} says, which is not supported.\n"
        f"  Supported is PEFT's default, the series of {TERMS} terms. Train with that, or merge with PEFT.",
        path,
    )

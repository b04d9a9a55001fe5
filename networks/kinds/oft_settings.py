"""PEFT's settings of an OFT, which say how its rotations were computed: the tensors do not."""

from pathlib import Path

from modules.errors import CheckpointError
from modules.text_files import parse_json, read_text
from networks.kinds.oft import TERMS
from networks.names.layouts import PEFT_FILE


def check_peft_settings(path: Path) -> None:
    """Raise CheckpointError if PEFT's settings say that rotations do not use the 5-term series.

    PEFT's exact rotations have the opposite direction.

    Args:
        path: File of the OFT, or its folder.
    """
    folder = path if path.is_dir() else path.parent
    settings_path = folder / PEFT_FILE
    is_peft_adapter = path.is_dir() or path.name.startswith("adapter_model")
    if not is_peft_adapter or not settings_path.is_file():
        return
    try:
        settings = dict(parse_json(read_text(settings_path)))
    except (ValueError, TypeError, OSError, RecursionError) as error:
        raise CheckpointError(
            f"{settings_path}, which describes the rotations of {path}, cannot be read: {error}. Copy it "
            "again.",
            path,
        ) from error
    variant: str | None = None
    num_terms = settings.get("num_cayley_neumann_terms", TERMS)
    if settings.get("use_cayley_neumann") is False:
        variant = "use_cayley_neumann = false, whose rotations have the opposite direction"
    elif num_terms != TERMS:
        variant = f"a series of {num_terms} terms (num_cayley_neumann_terms)"
    if variant is not None:
        raise CheckpointError(
            f"{path} is an OFT with {variant} according to {PEFT_FILE}, which is not supported.\n"
            f"  Only PEFT's default, the series of {TERMS} terms, is supported. Train with that, or "
            "merge with PEFT.",
            path,
        )

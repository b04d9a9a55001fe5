"""Encoders in Hugging Face's layout: found under any prefix and beside other networks, with the config.json
of their folder.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modules.checkpoints.opening import Checkpoint
from modules.errors import CheckpointError
from modules.text_files import parse_json, read_text

logger = logging.getLogger(__name__)

# beginnings of names of other networks in all-in-one files
ALL_IN_ONE = (
    "model.diffusion_model.",
    "vae.",
    "first_stage_model.",
    "cond_stage_model.",
    "text_encoders.",
    "scaled_fp8",
)


def network_in(
    checkpoint: Checkpoint, embeddings: str, layer: str, beside: tuple[str, ...]
) -> Checkpoint | None:
    """The network that has both of these tensors, without what stands before its names and beside it; None
    where none has.

    beside: beginnings of the names of other networks. Raises CheckpointError where there is something else.
    """
    prefixes = [name.removesuffix(embeddings) for name in checkpoint.tensors if name.endswith(embeddings)]
    prefix = next((prefix for prefix in prefixes if prefix + layer in checkpoint.tensors), None)
    if prefix is None:
        return None
    known = (*beside, *ALL_IN_ONE)
    strange = [name for name in checkpoint.tensors if not name.startswith((prefix, *known))]
    if strange:
        raise CheckpointError(
            f"{checkpoint.path}: beside {prefix}{embeddings} and its like it holds {len(strange)} tensors of "
            "an unknown network, "
            f"such as {', '.join(strange[:3])}. Give the file of that encoder alone.",
            checkpoint.path,
        )
    return checkpoint.without_prefix(prefix, others=known)


def head_width(path: Path, rows: int, told: Mapping[str, Any], usual: int) -> int:
    """Channels of a head: by the number of heads in config.json, else the usual width. Raises
    CheckpointError.
    """
    heads = told.get("num_attention_heads")
    if heads is None and rows % usual == 0:
        return usual
    if heads is not None and heads > 0 and rows % heads == 0:
        return rows // int(heads)
    how = f"config.json beside it says {heads} heads" if heads is not None else f"heads have {usual} channels"
    raise CheckpointError(
        f"{path}: {rows} rows of queries, but {how}. Give the config.json that belongs to it.", path
    )


def told_beside(path: Path, part: str, kind: str, dim: int, defaults: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of the network in the config.json of its folder; nothing where there is none or it is of
    another model.

    part: what the network's own settings are called where the model has several. kind: what its model_type
    begins with. dim: the width by the tensors. defaults: what is meant where a key is missing. Raises
    CheckpointError where config.json cannot be read.
    """
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.is_file():
        return {}
    try:
        whole = parse_json(read_text(file))
        config = whole.get(part, whole)
        named = config.get("model_type")
        settings: dict[str, Any] = {**(defaults if named is not None else {}), **config}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file} cannot be read as the configuration of a model ({error}).", file
        ) from error
    if (named is not None and not str(named).startswith(kind)) or settings.get("hidden_size", dim) != dim:
        logger.info("%s is not of %s and is not used", file, path.name)
        return {}
    return settings

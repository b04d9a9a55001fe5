"""Find encoders in Hugging Face's layout, under any prefix and next to other networks; read config.json.

Also check whether the width of an encoder's states fits the transformer next to it.
"""

import logging
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from checkpoints.opening import Checkpoint, reject_quantized
from modules.errors import CheckpointError
from modules.text_files import parse_json, read_text

logger = logging.getLogger(__name__)

# name prefixes of other networks in all-in-one files
ALL_IN_ONE = (
    "model.diffusion_model.",
    "vae.",
    "first_stage_model.",
    "cond_stage_model.",
    "text_encoders.",
    "scaled_fp8",
)

# tensors that contain a tokenizer's file as bytes, in files of ComfyUI and of LTX-2.5
SPIECE_MODEL = "spiece_model"
TOKENIZER_JSON = "tokenizer_json"


def find_network(
    checkpoint: Checkpoint, embeddings: str, layer: str, excluded: tuple[str, ...]
) -> Checkpoint | None:
    """Find a network by two of its tensors, and remove its prefix; return None if the file lacks them.

    Args:
        checkpoint: The opened file.
        embeddings: Name of the first tensor, without prefix.
        layer: Name of the second tensor, without prefix.
        excluded: Prefixes of other networks, whose tensors are left out.

    Raises:
        CheckpointError: If the file contains tensors of an unknown network.
    """
    prefixes = [name.removesuffix(embeddings) for name in checkpoint.tensors if name.endswith(embeddings)]
    prefix = next((prefix for prefix in prefixes if prefix + layer in checkpoint.tensors), None)
    if prefix is None:
        return None
    other_prefixes = (*excluded, *ALL_IN_ONE)
    unknown = [name for name in checkpoint.tensors if not name.startswith((prefix, *other_prefixes))]
    if unknown:
        reject_quantized(checkpoint)  # a better message if they belong to a quantized format
        raise CheckpointError(
            f"{checkpoint.path}: in addition to {prefix}{embeddings} and its network, it has {len(unknown)} "
            f"tensors of an unknown network, such as {', '.join(unknown[:3])}. Pass a file with only this "
            "encoder.",
            checkpoint.path,
        )
    return checkpoint.without_prefix(prefix, ignored_prefixes=other_prefixes)


def head_width(path: Path, rows: int, config: Mapping[str, Any], default_width: int) -> int:
    """Return the width of an attention head.

    Args:
        path: File of the network, for messages.
        rows: Number of rows of the query projection.
        config: Content of config.json, which may contain the number of heads.
        default_width: Width if config.json does not contain the number of heads.

    Raises:
        CheckpointError: If `rows` cannot be divided among the heads.
    """
    heads = config.get("num_attention_heads")
    if heads is None and rows % default_width == 0:
        return default_width
    if isinstance(heads, int) and heads > 0 and rows % heads == 0:
        return rows // heads
    if heads is None:
        reason = f"heads have {default_width} channels"
    else:
        reason = f"config.json next to it says {heads} heads"
    raise CheckpointError(
        f"{path}: the query projection has {rows} rows, but {reason}. Put the config.json that "
        "belongs to this file next to it.",
        path,
    )


def read_config_json(path: Path) -> tuple[Path, Any]:
    """Return the path and the parsed content of the config.json in a model's folder.

    The content is None if the file is missing.

    Raises:
        CheckpointError: If config.json cannot be read.
    """
    file = (path if path.is_dir() else path.parent) / "config.json"
    try:
        return file, parse_json(read_text(file)) if file.is_file() else None
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} cannot be read as the configuration of a model ({error}). Copy it again, or remove it.",
            file,
        ) from error


def read_network_config(
    path: Path,
    part: str,
    kind: str | tuple[str, ...],
    dim: int,
    defaults: Mapping[str, Any],
    embedded_config: str | None = None,
) -> Mapping[str, Any]:
    """Return the settings of a network from config.json; {} if it is missing or belongs to another model.

    Args:
        path: File or folder of the model.
        part: Key of the network's own settings, for a config.json that describes several networks.
        kind: Prefix of the network's model_type, or several.
        dim: Width of the network according to its tensors.
        defaults: Values of keys that config.json leaves out.
        embedded_config: Content of a config.json inside the model file; None reads config.json in the folder.

    Raises:
        CheckpointError: If config.json cannot be read.
    """
    file, content = read_config_json(path) if embedded_config is None else (path, {})
    if content is None:
        return {}
    try:
        if embedded_config is not None:
            content = parse_json(embedded_config)
        config = content.get(part, content)
        model_type = config.get("model_type")
        # configurations of transformers, which have a model_type, omit keys with default values
        settings: dict[str, Any] = {**(defaults if model_type is not None else {}), **config}
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file} cannot be read as the configuration of a model ({error}).", file
        ) from error
    is_other_type = model_type is not None and not str(model_type).startswith(kind)
    if is_other_type or settings.get("hidden_size", dim) != dim:
        logger.info("%s is ignored because it does not belong to %s", file, path.name)
        return {}
    return settings


def check_state_width(
    option: str, path: Path, width: int, dit_path: Path | None, dit_width: int | None, fits: str
) -> None:
    """Raise CheckpointError if the transformer does not take hidden states as wide as the encoder's.

    Args:
        option: Option that sets the encoder.
        path: File of the encoder.
        width: Width of the encoder's hidden states.
        dit_path: File of the transformer.
        dit_width: Width that the transformer takes; None without a transformer.
        fits: Description of encoders that fit, for the message.
    """
    if dit_width not in (None, width):
        raise CheckpointError(
            f"{option} {path} produces hidden states of width {width}, but {dit_path} takes width "
            f"{dit_width}. Pass {fits}.",
            path,
        )


def declared_settings(checkpoint: Checkpoint, classes: Collection[str]) -> tuple[Path, Mapping[str, Any]]:
    """Return the path and the settings of the config.json next to a checkpoint.

    The settings are {} unless `_class_name` in config.json is one of `classes`.

    Raises:
        CheckpointError: If config.json cannot be read.
    """
    path, settings = read_config_json(checkpoint.path)
    matches_class = isinstance(settings, dict) and settings.get("_class_name") in classes
    return path, settings if matches_class else {}


def declared_groups(checkpoint: Checkpoint, classes: Collection[str]) -> int | None:
    """Return GroupNorm's number of groups from the config.json next to a file; None if it is not set there.

    `classes` are the values of `_class_name` that this model may have.

    Raises:
        CheckpointError: If the config.json cannot be read, or if the number is below 1.
    """
    path, settings = declared_settings(checkpoint, classes)
    if "norm_num_groups" not in settings:
        return None
    groups = settings["norm_num_groups"]
    if type(groups) is not int or groups < 1:
        raise CheckpointError(f'{path}: "norm_num_groups" is {groups!r}; it must be at least 1.', path)
    return groups


def check_groups(checkpoint: Checkpoint, widths: Iterable[int], groups: int) -> None:
    """Raise CheckpointError if one of the channel counts `widths` is not divisible by `groups`."""
    uneven = next((width for width in widths if width % groups), None)
    if uneven is not None:
        raise CheckpointError(
            f"{checkpoint.path}: {uneven} channels cannot be divided into {groups} norm groups. "
            'Write the number of groups as "norm_num_groups" into the config.json next to the file.',
            checkpoint.path,
        )

"""Alphas of LoRAs that stand beside the tensors: PEFT's settings."""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modules.limits import MAX_EXPRESSIONS, MAX_SEARCH_SECONDS
from modules.text_files import parse_json, read_text
from networks.deltas import Factors, group_by_module, rank_of
from networks.key_formats import NETWORKS
from networks.names.layouts import UNET_IN_DIFFUSERS
from networks.names.stable_diffusion import diffusers_path_of_text

# where diffusers keeps the adapter's settings among a file's metadata
PEFT_SETTINGS = "lora_adapter_metadata"
_PLAIN_KEY = re.compile(r"[\w-]+(\.[\w-]+)*", re.ASCII)


def peft_config(path: Path, metadata: Mapping[str, str], start: str) -> dict[str, Any]:
    """The adapter's settings that diffusers keeps in the metadata and PEFT in a file beside the weights; {}
    without them.

    start: of the names of the network that they are for, in the metadata.
    """
    folder = path if path.is_dir() else path.parent
    config_path = folder / "adapter_config.json"
    if PEFT_SETTINGS in metadata:
        entries = parse_json(metadata[PEFT_SETTINGS])
        others = tuple(one for one in NETWORKS if one != start)
        return {
            key.removeprefix(start).removeprefix(UNET_IN_DIFFUSERS): value
            for key, value in entries.items()
            if not key.startswith(others)
        }
    if (path.is_dir() or path.name.startswith("adapter_model")) and config_path.is_file():
        return dict(parse_json(read_text(config_path)))
    return {}


def text_alphas(texts: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """Alphas of LoRAs for text encoders that stand in diffusers' metadata, as `peft_alphas`."""
    alphas: dict[str, Tensor] = {}
    if PEFT_SETTINGS not in metadata:
        return alphas
    modules = group_by_module(texts)
    paths = {name: found for name in modules if (found := diffusers_path_of_text(name)) is not None}
    entries = parse_json(metadata[PEFT_SETTINGS])
    for start in {each.partition(".")[0] + "." for each in paths.values()}:
        config = {key.removeprefix(start): value for key, value in entries.items() if key.startswith(start)}
        own = {name: found.removeprefix(start) for name, found in paths.items() if found.startswith(start)}
        alphas |= peft_alphas({name: modules[name] for name in own}, own, config)
    return alphas


def peft_alphas(
    modules: Mapping[str, Factors], paths: Mapping[str, str], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Alphas that stand in PEFT's settings rather than beside the factors.

    modules: factors by name. paths: of these modules, as the file writes them. Raises ValueError if the
    settings cannot be used.
    """
    if not config:
        return {}
    # a key is the end of a module's path (`to_q`, `attn1.to_q`) or a regular expression for it; of several
    # that match, PEFT takes the first
    values = {key: _finite(value) for key, value in (config.get("alpha_pattern") or {}).items()}
    places = {key: place for place, key in enumerate(values)}
    expressions = [key for key in values if not _PLAIN_KEY.fullmatch(key)]
    if sum(map(len, expressions)) > MAX_EXPRESSIONS:
        raise ValueError(f"its regular expressions have more than {MAX_EXPRESSIONS} characters in all")
    fitting = {key: _expression(key) for key in expressions}
    default = None if config.get("lora_alpha") is None else _finite(config["lora_alpha"])
    alphas = {}
    for module, factors in modules.items():
        rank = rank_of(factors)
        if rank is None or "alpha" in factors:
            continue
        path = paths[module]  # `blocks.0.attn1.to_q`
        ends = [path, *(path[index + 1 :] for index, char in enumerate(path) if char == ".")]
        found = [end for end in ends if end in places]
        found += [key for key, fits in fitting.items() if fits(path)]
        alpha = values[min(found, key=places.__getitem__)] if found else default
        if alpha is None:
            continue
        if config.get("use_rslora"):
            alpha = alpha * rank**0.5  # PEFT scales by alpha / sqrt(rank) then
        alphas[f"{module}.alpha"] = torch.tensor(alpha)
    return alphas


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"an alpha is {number}")
    return number


def _expression(key: str) -> Callable[[str], bool]:
    """Return the function that tells whether a key of PEFT's `alpha_pattern` matches a module's path.

    Raises ValueError if the key is no regular expression; so does the function if the search takes too long.
    """
    import regex  # seldom needed

    try:
        pattern = regex.compile(rf"(.*\.)?({key})$")  # as PEFT does
    except regex.error as error:
        raise ValueError(f"the key {key!r} is no regular expression: {error}") from None

    def fits(path: str) -> bool:
        try:
            return pattern.match(path, timeout=MAX_SEARCH_SECONDS) is not None
        except TimeoutError:
            raise ValueError(f"the key {key!r} takes too long to search {path} for") from None

    return fits

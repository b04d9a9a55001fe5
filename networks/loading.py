"""Read LoRA files of any dialect."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from logging import getLogger
from pathlib import Path
from typing import Any

import regex
import torch
from torch import Tensor

from modules.checkpoints.opening import open_checkpoint
from modules.errors import CheckpointError
from modules.text_files import parse_json, read_text
from networks.deltas import Factors, find_fault, group_by_module, rank_of, weight_delta
from networks.key_formats import OURS, dialect_in_words, other_kind, to_native
from networks.metadata import NETWORKS, expert_of, in_words, is_damaged, metadata_of, split_names
from networks.module_names import FAMILIES, choose_family, read_family
from networks.names.layouts import IN_DIFFUSERS, UNET_IN_DIFFUSERS, FamilyNames
from networks.names.stable_diffusion import diffusers_path_of_text
from networks.parts import mend_split_alphas

logger = getLogger(__name__)
SHOWN = 6  # names listed in a message
# in a name of every kind of network beside a model, read here or not
_OF_NETWORKS = re.compile(r"lora|hada|lokr|oft|dora|vera|ia3|alpha|magnitude|diff(_[bm])?$|norm$")
MAX_EXPRESSIONS = 1_000  # characters of all regular expressions in a file's settings together
SECONDS = 0.5  # that a search for one path may take: a hostile one keeps Python's `re` busy for years
_PLAIN_KEY = re.compile(r"[\w-]+(\.[\w-]+)*", re.ASCII)
A_FEW = 0.1  # share of a file that may be unused with only a plain warning
# where diffusers keeps the adapter's settings among a file's metadata
PEFT_SETTINGS = "lora_adapter_metadata"
# what of a model's uses a LoRA has learned, in words: `Family.metadata` as trained_for
TRAINED_FOR = "reelsmith_trained_for"


@dataclass(frozen=True)
class LoraFile:
    """A LoRA, DoRA, LoHa or LoKr under our names, on the CPU, in the dtype of the file.

    Names are as `lora_unet_blocks_0_self_attn_q.lora_down.weight`. A file that holds a LoRA for each expert
    of a model has them as `parts`, and no tensors of its own: `for_expert` returns one of them.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    dialect: str
    parts: Mapping[str, "LoraFile"] = field(default_factory=dict)  # by expert
    # what it changes in text encoders: `lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight`
    text_tensors: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def expert(self) -> str | None:
        """The expert it was trained for, as its metadata or else its name say; FOR_BOTH; None if unknown."""
        return None if self.parts else expert_of(self.metadata, self.path)

    def for_expert(self, expert: str | None) -> "LoraFile":
        """Return the part for an expert of a file that has parts, any other file as it is.

        expert: empty or None if the model has none or it is unknown which one it is. Raises CheckpointError
        if the file has no part for it.
        """
        if not self.parts:
            return self
        if not expert or expert not in self.parts:
            raise _several(self.path)
        return self.parts[expert]

    def modules(self) -> dict[str, dict[str, Tensor]]:
        """The factors of each module: `{"lora_unet_blocks_0_self_attn_q": {"lora_down.weight": ...}}`.

        Raises CheckpointError if the file has parts and no part was chosen.
        """
        return group_by_module(self.for_expert(None).tensors)

    def family(self) -> FamilyNames | None:
        """Return the family it was trained for, by metadata, else by names and sizes; None if unknown."""
        one = next(iter(self.parts.values()), self)
        return read_family(one.metadata) or family_of(one.modules())


def family_of(modules: Mapping[str, Factors]) -> FamilyNames | None:
    """Return the family of a LoRA's modules by their names, and by sizes if several have these names."""
    family = choose_family(name.removeprefix(OURS) for name in modules)
    if family is None or not family.text_width:
        return family
    return family_by_text_width(modules) or family


def family_by_text_width(modules: Mapping[str, Factors]) -> FamilyNames | None:
    """Return the family whose released models take texts as wide as a U-Net's cross-attention does here."""
    widths = set()
    for name, factors in modules.items():
        if name.endswith(("attn2_to_k", "attn2_to_v")):
            sizes = {part: one for part, one in factors.items() if part != "alpha"}
            delta = weight_delta(sizes, torch.device("meta"))
            widths |= set() if delta is None else {delta.numel() // len(delta)}
    return next((one for one in FAMILIES if {one.text_width} == widths), None)


def _several(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} holds two LoRAs, one for the high-noise and one for the low-noise expert of a model.\n"
        "  Take them apart with convert_lora.py --input FILE --output LOW --output_high_noise HIGH --target "
        "default and give one; merge_lora.py can choose one with --expert.",
        path,
    )


def read_lora(path: Path, by_expert: bool = False, with_texts: bool = False) -> LoraFile:
    """Read a file (or a PEFT folder) and recognise its dialect. Keys that cannot be used are listed in a
    warning.

    with_texts: read its changes of text encoders too. by_expert: allow a file that holds a LoRA for each
    expert; the result has `parts` then. Raises CheckpointError if it is missing, damaged, not a LoRA,
    or of an unsupported kind.
    """
    with open_checkpoint(path) as checkpoint:
        kind = other_kind(checkpoint.tensors)
        # a whole model is told by its names, before gigabytes are read
        if kind is None and not any(_OF_NETWORKS.search(name) for name in checkpoint.tensors):
            raise _no_lora(path, checkpoint.tensors)
        stored = {name: checkpoint.read(name) for name in checkpoint.tensors}
        metadata = dict(checkpoint.metadata)
    if path.is_file() and is_damaged(path, stored, metadata):
        raise CheckpointError(
            f"{path} is damaged: its data do not agree with the checksum written with them. Copy it again.",
            path,
        )
    if kind is not None:
        raise CheckpointError(
            f"{path} is a network of the kind {kind[0]}, which is not supported: it has {kind[1]}.\n"
            "  Supported are LoRA, DoRA, LoHa, LoKr and whole differences of weights. Give such a file.",
            path,
        )
    groups = split_names(stored)
    if len(groups) > 1 and not by_expert:
        raise _several(path)
    parts = {
        expert: _read_part(path, {name: stored[name] for name in names}, metadata, expert, with_texts)
        for expert, names in groups.items()
    }
    if len(parts) == 1:
        return next(iter(parts.values()))
    dialects = sorted({part.dialect for part in parts.values()})
    named = {expert: part for expert, part in parts.items() if expert is not None}
    return LoraFile(path, {}, metadata, " + ".join(dialects), named)


def _read_part(
    path: Path,
    stored: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    expert: str | None,
    with_texts: bool,
) -> LoraFile:
    """Bring tensors of a file under our names.

    expert: their expert; None: names in the file do not say it.
    """
    start = next((start for start, name in NETWORKS.items() if name == expert), IN_DIFFUSERS)
    if expert is not None:
        try:
            metadata = metadata_of(metadata, expert)
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"{path}: what its metadata say of its parts cannot be read: {error}. Copy it again.", path
            ) from error
    made = read_family(metadata)
    native = to_native(stored, None if made is None else made.name)
    texts = native.texts if with_texts else {}
    if not native.tensors and not texts:
        raise _no_lora(path, stored)
    ignored = native.text_encoder if with_texts else (*native.text_encoder, *native.texts)
    if ignored:
        logger.warning(
            f"{path}: {len(ignored)} tensors change a text encoder and are ignored: {list_some(ignored)}"
        )
    if native.unknown:
        warn_of_rest(path, native.unknown, len(stored), "tensors are no part of a LoRA and are ignored")
    for module, factors in group_by_module({**native.tensors, **texts}).items():
        reason = find_fault(factors)
        if reason is not None:
            raise CheckpointError(
                f"{path} cannot be used: {module}: {reason}. Download or copy it again, or give another "
                "LoRA.",
                path,
            )
    try:
        modules = group_by_module(native.tensors)
        alphas = _peft_alphas(modules, native.paths, _peft_config(path, metadata, start))
        text_alphas = _text_alphas(texts, path, metadata)
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: its PEFT settings cannot be read: {error}.\n"
            "  Correct lora_alpha or alpha_pattern in them, or give another LoRA.",
            path,
        ) from error
    use = f", trained for {metadata[TRAINED_FOR]}" if TRAINED_FOR in metadata else ""
    use += f", for the {in_words(expert)}" if expert is not None else ""
    count = f"{len(modules)} modules" + (
        f" and {len(group_by_module(texts))} of text encoders" if texts else ""
    )
    logger.info(f"{path}: {count}, {dialect_in_words(native.dialect)}{use}")
    tensors = mend_split_alphas(path, native.tensors | alphas, metadata)
    return LoraFile(path, tensors, metadata, native.dialect, text_tensors={**texts, **text_alphas})


def _no_lora(path: Path, names: Iterable[str]) -> CheckpointError:
    return CheckpointError(
        f"{path} is no LoRA for a video or image model: it has tensors such as "
        f"{list_some(sorted(names), 3)}. Give a LoRA file.",
        path,
    )


def list_some(names: Sequence[str], most: int = SHOWN) -> str:
    """`a, b, c and 9 more`."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def warn_of_rest(path: Path, rest: Sequence[str], whole: int, what: str) -> None:
    """Warn of unused names, with a second, louder line if they are more than a few of `whole`.

    what: as in "4 of 24 {what}: a, b, c".
    """
    if not rest:
        return
    logger.warning(f"{path}: {len(rest)} of {whole} {what}: {list_some(rest)}")
    if len(rest) > A_FEW * whole:
        logger.warning(
            f"{path} IS USED ONLY IN PART: it is damaged or for another model, and does not do here what it "
            "was trained for. "
            "Copy it again, or give a LoRA for this model."
        )


def _peft_config(path: Path, metadata: Mapping[str, str], start: str) -> dict[str, Any]:
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


def _text_alphas(texts: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """Alphas of LoRAs for text encoders that stand in diffusers' metadata, as `_peft_alphas`."""
    alphas: dict[str, Tensor] = {}
    if PEFT_SETTINGS not in metadata:
        return alphas
    modules = group_by_module(texts)
    paths = {name: found for name in modules if (found := diffusers_path_of_text(name)) is not None}
    entries = parse_json(metadata[PEFT_SETTINGS])
    for start in {each.partition(".")[0] + "." for each in paths.values()}:
        config = {key.removeprefix(start): value for key, value in entries.items() if key.startswith(start)}
        own = {name: found.removeprefix(start) for name, found in paths.items() if found.startswith(start)}
        alphas |= _peft_alphas({name: modules[name] for name in own}, own, config)
    return alphas


def _peft_alphas(
    modules: Mapping[str, Factors], paths: Mapping[str, str], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Alphas that stand in PEFT's settings rather than beside the factors.

    modules: factors by name. paths: of these modules, as the file writes them. Raises ValueError if the
    settings cannot be used.
    """
    patterns = PeftPatterns(
        {key: _finite(value) for key, value in (config.get("alpha_pattern") or {}).items()}
    )
    default = None if config.get("lora_alpha") is None else _finite(config["lora_alpha"])
    alphas = {}
    for module, factors in modules.items():
        rank = rank_of(factors)
        if rank is None or "alpha" in factors:
            continue
        alpha = patterns.find(paths[module])
        alpha = default if alpha is None else alpha
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


class PeftPatterns:
    """The keys of PEFT's `alpha_pattern` with their values; of several that match, PEFT takes the first.

    A key is the end of a module's path (`to_q`, `attn1.to_q`) or a regular expression for it.
    """

    def __init__(self, values: Mapping[str, float]) -> None:
        """Raises ValueError if a key is no expression, or if these are too long."""
        self._values = values
        self._places = {key: place for place, key in enumerate(values)}
        expressions = [key for key in values if not _PLAIN_KEY.fullmatch(key)]
        if sum(map(len, expressions)) > MAX_EXPRESSIONS:
            raise ValueError(f"its regular expressions have more than {MAX_EXPRESSIONS} characters in all")
        self._expressions = {key: _compile_key(key) for key in expressions}

    def find(self, path: str) -> float | None:
        """Return the value for a module path (`blocks.0.attn1.to_q`), or None if no key matches.

        Raises ValueError if an expression takes too long.
        """
        ends = [path, *(path[index + 1 :] for index, char in enumerate(path) if char == ".")]
        found = [end for end in ends if end in self._places]
        for key, pattern in self._expressions.items():
            try:
                if pattern.match(path, timeout=SECONDS):
                    found.append(key)
            except TimeoutError:
                raise ValueError(f"the key {key!r} takes too long to search {path} for") from None
        return self._values[min(found, key=self._places.__getitem__)] if found else None


def _compile_key(key: str) -> "regex.Pattern[str]":
    try:
        return regex.compile(rf"(.*\.)?({key})$")  # as PEFT does
    except regex.error as error:
        raise ValueError(f"the key {key!r} is no regular expression: {error}") from None

"""Find alphas that are not stored as tensors: in a file's header, or in PEFT settings there or beside it."""

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modules.errors import CheckpointError
from modules.limits import MAX_EXPRESSIONS, MAX_SEARCH_SECONDS
from modules.text_files import parse_json, read_text
from networks.deltas import LORA, Factors, group_by_module, rank_of, split_strength, ungroup
from networks.key_formats import EXPERT_STARTS, NETWORKS, NativeTensors
from networks.names.layouts import FOLDED, IN_DIFFUSERS, UNET_IN_DIFFUSERS
from networks.names.texts import diffusers_path_of_text

logger = getLogger(__name__)
# key of the adapter's settings that diffusers writes into a file's metadata
PEFT_SETTINGS = "lora_adapter_metadata"
PEFT_FILE = "adapter_config.json"
_PLAIN_KEY = re.compile(r"[\w-]+(\.[\w-]+)*", re.ASCII)
# the same settings under other keys of a header
_SETTINGS = (PEFT_SETTINGS, "peft_config", "adapter_config", "lora_config", "config")
# keys of alpha in a header, as `_bare` returns them, with or without the network before them
# (`transformer.lora_alpha`), and the keys of the rank beside each
_TRAINED = "ss_network_alpha"
_TEXTS = ("text_encoder", "lora_te", "te1", "te2", "te3")
# a network's name before a key of its own: `transformer.lora_alpha`, `lora_te1_alpha`
_BEGIN = re.compile(
    r"(?:(.*)\.|(transformer(?:_2)?|unet|lora_unet|(?:text_encoder|lora_te|te)_?[123]?)_)?(.*)"
)
_OF_TEXTS = re.compile(r"(?:text_encoder|lora_te|te)_?([123]?)")
_RANKS = ("r", "rank", "lorarank", "lorar", "networkdim", "networkrank", "linear")
_KEYS = {
    **dict.fromkeys(("loraalpha", "networkalpha", "alpha", "linearalpha"), _RANKS),
    "ssnetworkalpha": ("ssnetworkdim",),
}
# further keys of settings in JSON
_PEFT_KEYS = {"alphapattern": "alpha_pattern", "rankpattern": "rank_pattern", "userslora": "use_rslora"}
_LONGEST = 20  # most characters of a value in a message


@dataclass(frozen=True)
class _Source:
    """Settings of one place, as PEFT names them: lora_alpha, r, alpha_pattern, rank_pattern, use_rslora."""

    place: str  # for messages
    settings: Mapping[str, Any]
    is_sure: bool = True  # they belong to this file even without a rank

    @property
    def rank(self) -> float | None:
        return _number(self.settings.get("r"))

    def fits(self, ranks: Collection[int]) -> bool:
        if self.rank is None:
            return self.is_sure
        return self.rank in ranks or bool(self.settings.get("rank_pattern"))


@dataclass(frozen=True)
class FoundAlphas:
    """Alphas of those modules that have none beside their factors."""

    tensors: Mapping[str, Tensor]  # "lora_unet_x.alpha"
    words: str  # their source, or that there are none; "" if every module has its own
    warnings: tuple[str, ...] = ()  # about unusable values


def find_alphas(
    path: Path,
    metadata: Mapping[str, str],
    is_written_here: bool,
    modules: Mapping[str, Factors],
    paths: Mapping[str, str],
    start: str,
    stacked: Mapping[str, int],
) -> FoundAlphas:
    """Find alphas for modules that have none, in the header or in PEFT settings there or beside the file.

    is_written_here: the file was written by us; then alphas are in tensors or folded into factors. modules:
    factors by name. paths: of these modules, as in the file. start: prefix of their network in pipelines of
    diffusers; "" if it has none. stacked: module -> number of factors that were joined into its own, each of
    the trained rank. Raises CheckpointError if two places differ, ValueError and the like if PEFT's
    settings cannot be used.
    """
    ranks = {
        name: rank // stacked.get(name, 1)
        for name, factors in modules.items()
        if "alpha" not in factors and (rank := rank_of(factors)) is not None
    }
    if not ranks:
        return FoundAlphas({}, "")
    sources, warnings = ([], []) if is_written_here else _sources(path, metadata, paths, start)
    for source in sources:
        if not source.fits(set(ranks.values())) and source.is_sure:
            shown = ", ".join(map(str, sorted(set(ranks.values()))))
            warnings.append(
                f"{source.place} has an alpha for rank {source.rank:g}, the factors have rank {shown}: it is "
                "not used"
            )
    sources = [source for source in sources if source.fits(set(ranks.values()))]
    given = [(source.place, source.settings.get("lora_alpha")) for source in sources]
    told = [(place, _finite(alpha)) for place, alpha in given if alpha]
    if len({alpha for _, alpha in told}) > 1:
        both = " and ".join(f"{alpha:g} in {place}" for place, alpha in told)
        raise CheckpointError(
            f"{path} has two alphas: {both}.\n"
            "  Take the wrong one out: the strength of the LoRA depends on it.",
            path,
        )
    config: dict[str, Any] = {"lora_alpha": told[0][1] if told else None, "alpha_pattern": {}}
    for source in sources:
        config["alpha_pattern"] = {**(source.settings.get("alpha_pattern") or {}), **config["alpha_pattern"]}
        config["use_rslora"] = config.get("use_rslora") or source.settings.get("use_rslora")
    tensors = peft_alphas(modules, paths, config, stacked)
    without = len(ranks) - len(tensors)
    words = [f"alpha {told[0][1]:g} of {told[0][0]}"] if told else []
    words += [f"alphas of {sources[0].place}"] if tensors and not told else []
    is_bare = not tensors and not any("alpha" in factors for factors in modules.values())
    some = "in it" if is_bare else f"for {without} modules"
    words += [f"no alpha {some}: the rank is taken"] if without else []
    return FoundAlphas(tensors, ", ".join(words), tuple(warnings))


def unfold(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the tensors of a file written by us with the alphas that were folded into their factors.

    tensors: under our names. The change of the weights stays the same. Factors keep their dtype if that is
    exact, else they become float32.
    """
    strengths = read_folded(metadata)
    modules = group_by_module(tensors)
    for factors in modules.values():
        rank = rank_of(factors)
        if rank not in strengths or "alpha" in factors or not factors.keys() >= {*LORA}:
            continue
        strength = strengths[rank]
        is_exact = math.frexp(strength)[0] == 0.5
        by = split_strength(strength)
        divisors = {LORA[0]: by[0], LORA[1]: by[1], "lora_up.bias": strength}
        for part, divisor in divisors.items():
            if part in factors:
                whole = factors[part].float() / divisor
                factors[part] = whole.to(factors[part].dtype) if is_exact else whole
        factors["alpha"] = torch.tensor(strength * rank)
    return ungroup(modules)


def read_folded(metadata: Mapping[str, str]) -> dict[int, float]:
    """Return rank -> alpha / rank of the metadata `FOLDED`; {} if there are none that can be used."""
    try:
        found = {int(rank): float(one) for rank, one in parse_json(metadata.get(FOLDED, "{}")).items()}
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return {}
    return {rank: one for rank, one in found.items() if math.isfinite(one) and one > 0}


def without_alphas(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata without alphas, for a file with alphas as tensors or folded into the factors."""
    is_trained = "ss_network_module" in metadata
    return {
        key: value
        for key, value in metadata.items()
        if not _has_alpha(key, value)
        and not (_bare(key)[1] in _KEYS and not (is_trained and key == _TRAINED))
    }


def _has_alpha(key: str, text: str) -> bool:
    """Return whether a header key holds PEFT settings; `config` does if its text has an alpha."""
    if key != "config":
        return key in _SETTINGS
    try:
        return any(source.settings.get("lora_alpha") for source in _inside(key, parse_json(text), ""))
    except (ValueError, AttributeError, RecursionError):
        return False


def _sources(
    path: Path, metadata: Mapping[str, str], paths: Mapping[str, str], start: str
) -> tuple[list[_Source], list[str]]:
    """Return the settings that may apply to these modules, and warnings about non-numeric values."""
    sources, warnings = [], []
    bare = {_bare(key): text for key, text in metadata.items()}
    for key, text in metadata.items():
        begin, name = _bare(key)
        if name not in _KEYS or not _is_of(begin, start):
            continue
        # trainers that write this key store alphas as tensors; dotted names show that a converter has
        # folded them into the factors
        if key == _TRAINED and "ss_network_module" in metadata and any("." in one for one in paths.values()):
            continue
        rank = next((bare[begin, one] for one in _KEYS[name] if (begin, one) in bare), None)
        if _number(text) is None:
            warnings.append(f"its metadata have {key} {str(text)[:_LONGEST]!r}, which is no number: not used")
            continue
        scaling = bare.get((begin, "userslora"), "").lower() == "true"
        own = {"lora_alpha": float(text), "r": rank, "use_rslora": scaling}
        sources.append(_Source(f"its metadata ({key})", own))
    for key in _SETTINGS:
        if key == "config" and not _has_alpha(key, metadata.get(key, "")):
            continue  # of a model, or of anything
        try:
            sources += _inside(f"its metadata ({key})", parse_json(metadata.get(key, "{}")), start)
        except (ValueError, AttributeError, RecursionError) as error:
            if key == PEFT_SETTINGS:
                raise
            warnings.append(f"its metadata have {key}, which cannot be read and is not used: {error}")
    folder = path if path.is_dir() else path.parent
    if (beside := folder / PEFT_FILE).is_file():
        is_sure = path.is_dir() or path.name.startswith("adapter_model")
        try:
            found = _inside(f"{PEFT_FILE} beside it", parse_json(read_text(beside)), start)
            sources += [replace(source, is_sure=is_sure) for source in found]
        except (ValueError, AttributeError, OSError, RecursionError) as error:
            if is_sure:
                raise
            warnings.append(f"{beside} cannot be read and is not used: {error}")
    return sources, warnings


def _inside(place: str, settings: Mapping[str, Any], start: str, begin: str = "") -> list[_Source]:
    """Return the settings in JSON for the network that a pipeline calls `start`, in any spelling.

    begin: network of keys that name none. Settings without an alpha may hold nested ones, as PEFT's for
    several adapters do. Raises AttributeError if `settings` is not a JSON object.
    """
    entries = [(*_bare(key), value) for key, value in settings.items()]
    if not any(name in _KEYS or name == "alphapattern" for _, name, _ in entries):
        return [
            source
            for key, value in settings.items()
            if isinstance(value, Mapping)
            for source in _inside(f"{place}: {key}", value, start, key if _is_network(key) else begin)
        ]
    own = {name: value for inside, name, value in entries if _is_of(inside or begin, start)}
    patterns = {word: own[name] for name, word in _PEFT_KEYS.items() if name in own}
    if "use_rslora" in patterns:
        patterns["use_rslora"] = str(patterns["use_rslora"]).lower() == "true"
    names = [name for name in _KEYS if name in own] or ([""] if patterns else [])
    ranks = (next((own[one] for one in _KEYS.get(name, _RANKS) if one in own), None) for name in names)
    return [
        _Source(place, {"lora_alpha": own.get(name), "r": rank, **patterns})
        for name, rank in zip(names, ranks, strict=True)
    ]


def _is_network(key: str) -> bool:
    return f"{key}." in (*EXPERT_STARTS, UNET_IN_DIFFUSERS) or key.startswith(_TEXTS)


def _bare(key: str) -> tuple[str, str]:
    """Normalise a key, as spellings vary: `transformer.LoRA_alpha` -> (`transformer`, `loraalpha`)."""
    found = _BEGIN.fullmatch(key)
    begin, name = ("", key) if found is None else (found[1] or found[2] or "", found[3])
    return begin, re.sub(r"[\W_]", "", name).lower()


def _is_of(begin: str, start: str) -> bool:
    """Return whether a key with this prefix belongs to the network that a pipeline calls `start`."""
    if not begin or f"{begin}." == start:
        return True
    if text := _OF_TEXTS.fullmatch(begin):  # numbered from 1, through CLIP-L, CLIP-G and T5
        return start == ("text_encoder_2." if text[1] in ("2", "3") else "text_encoder.")
    # a transformer has many names: any prefix except those of text encoders and other experts
    if start not in EXPERT_STARTS or begin.startswith(_TEXTS):
        return False
    return EXPERT_STARTS.get(f"{begin}.", EXPERT_STARTS[start]) == EXPERT_STARTS[start]


def read_alphas(
    path: Path,
    metadata: Mapping[str, str],
    native: NativeTensors,
    expert: str | None,
    is_written_here: bool,
    warns: bool = True,
) -> tuple[dict[str, Tensor], str]:
    """Return the alphas of a file's modules and text encoders by `find_alphas`, and their source in words.

    expert: the expert of this part of the file; None: it has no parts. warns: log unusable values. Raises
    CheckpointError if settings are unusable.
    """
    find = partial(find_alphas, path, metadata, is_written_here)
    texts = group_by_module(native.texts)
    groups: dict[str, dict[str, str]] = {}  # start of the encoder's names in diffusers -> modules' paths
    for name in texts:
        begin, dot, rest = (diffusers_path_of_text(name) or f".{name}").partition(".")
        groups.setdefault(begin and begin + dot, {})[name] = rest
    start = next((start for start, name in NETWORKS.items() if name == expert), IN_DIFFUSERS)
    try:
        found = find(group_by_module(native.tensors), native.paths, start, native.stacked)
        of_texts = [
            find({name: texts[name] for name in paths}, paths, start, {}) for start, paths in groups.items()
        ]
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: its PEFT settings cannot be read: {error}.\n"
            "  Correct lora_alpha or alpha_pattern in them, or give another LoRA.",
            path,
        ) from error
    if warns:
        for warning in dict.fromkeys(warning for one in (found, *of_texts) for warning in one.warnings):
            logger.warning(f"{path}: {warning}")
    tensors = {name: alpha for one in (found, *of_texts) for name, alpha in one.tensors.items()}
    words = (found.words, ", ".join(dict.fromkeys(one.words for one in of_texts if one.words)))
    return tensors, ", ".join(dict.fromkeys(filter(None, words)))


def peft_alphas(
    modules: Mapping[str, Factors],
    paths: Mapping[str, str],
    config: Mapping[str, Any],
    stacked: Mapping[str, int],
) -> dict[str, Tensor]:
    """Return the alphas that PEFT settings give to modules.

    Arguments as for `find_alphas`. Raises ValueError if the settings cannot be used.
    """
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
        count = stacked.get(module, 1)
        if config.get("use_rslora"):
            alpha = alpha * (rank // count) ** 0.5  # rank-stabilised: PEFT then scales by alpha / sqrt(rank)
        alphas[f"{module}.alpha"] = torch.tensor(alpha * count)
    return alphas


def _number(value: Any) -> float | None:
    try:
        return _finite(value)
    except (ValueError, TypeError, OverflowError):
        return None


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"an alpha is {number}")
    return number


def _expression(key: str) -> Callable[[str], bool]:
    """Return a function that tests whether a key of PEFT's `alpha_pattern` matches a module's path.

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

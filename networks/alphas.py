"""Find alphas that are not tensors: in a file's metadata, or in PEFT's settings (in metadata or a file).

A source is one place with settings, such as a metadata key. A file may have several networks; `start` is the
prefix that a network has in diffusers' pipelines, such as `transformer.` or `text_encoder_2.`.
"""

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from logging import getLogger
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modules.errors import CheckpointError
from modules.limits import MAX_EXPRESSIONS, MAX_SEARCH_SECONDS
from modules.text_files import parse_json, read_text
from networks.deltas import group_by_module, rank_of, split_strength, ungroup
from networks.key_formats import NativeTensors
from networks.kinds.factors import DOWN, UP, Factors
from networks.names.layouts import FOLDED, IN_DIFFUSERS, UNET_IN_DIFFUSERS
from networks.names.texts import diffusers_path_of_text
from networks.tensor_names import find_expert_starts, find_networks

logger = getLogger(__name__)
# key of the adapter's settings that diffusers writes into a file's metadata
PEFT_SETTINGS = "lora_adapter_metadata"
PEFT_FILE = "adapter_config.json"
_PLAIN_KEY = re.compile(
    r"[\w-]+(\.[\w-]+)*", re.ASCII
)  # a key of alpha_pattern that is no regular expression
# metadata keys under which programs store these settings
_SETTINGS = (PEFT_SETTINGS, "peft_config", "adapter_config", "lora_config", "config")
_TRAINED = "ss_network_alpha"
_TEXTS = ("text_encoder", "lora_te", "te1", "te2", "te3")  # beginnings of the names of text encoders
# a key with the name of a network in front: `transformer.lora_alpha`, `lora_te1_alpha`
_BEGIN = re.compile(
    r"(?:(.*)\.|(transformer(?:_2)?|unet|lora_unet|(?:text_encoder|lora_te|te)_?[123]?)_)?(.*)"
)
_OF_TEXTS = re.compile(r"(?:text_encoder|lora_te|te)_?([123]?)")
_RANKS = ("r", "rank", "lorarank", "lorar", "networkdim", "networkrank", "linear")
# name of an alpha, as `_split_key` returns it -> names that the rank may have next to it
_KEYS = {
    **dict.fromkeys(("loraalpha", "networkalpha", "alpha", "linearalpha"), _RANKS),
    "ssnetworkalpha": ("ssnetworkdim",),
}
# other settings in JSON, as `_split_key` returns them -> their names in PEFT
_PEFT_KEYS = {"alphapattern": "alpha_pattern", "rankpattern": "rank_pattern", "userslora": "use_rslora"}
_MAX_SHOWN = 20  # characters of a value that a message shows


@dataclass(frozen=True)
class _Source:
    """Settings with alphas, and the metadata entry or file that contains them."""

    place: str  # where they were found, for messages
    settings: Mapping[str, Any]  # by PEFT's names: lora_alpha, r, alpha_pattern, rank_pattern, use_rslora
    is_sure: bool = True  # whether they certainly belong to this file

    @property
    def rank(self) -> float | None:
        return _number(self.settings.get("r"))

    def fits(self, ranks: Collection[int]) -> bool:
        """Return whether the settings can be for factors of these ranks."""
        if self.rank is None:
            return self.is_sure
        return self.rank in ranks or bool(self.settings.get("rank_pattern"))


class _Sources(NamedTuple):
    """Settings that may apply, and warnings about unusable ones."""

    sources: list[_Source]
    warnings: list[str]


class _Key(NamedTuple):
    """A metadata key, split and spelled uniformly: `loraalpha` for `transformer.LoRA_alpha`."""

    network: str  # prefix of the key that names a network; "" if it has none
    name: str  # rest of the key, in lower case, letters and digits only


@dataclass(frozen=True)
class FoundAlphas:
    """Alphas for modules that have no alpha tensor next to their factors, and where they were found."""

    tensors: Mapping[str, Tensor]  # by name: "lora_unet_x.alpha"
    words: str  # description for the log; "" if every module has an alpha tensor
    warnings: tuple[str, ...] = ()  # about unusable values


def find_alphas(
    path: Path,
    metadata: Mapping[str, str],
    is_written_here: bool,
    modules: Mapping[str, Factors],
    paths: Mapping[str, str],
    start: str,
    joined_lora_counts: Mapping[str, int],
) -> FoundAlphas:
    """Find alphas for modules without an alpha tensor, in the metadata or in PEFT's settings.

    Args:
        path: Path of the file.
        metadata: Metadata of the file.
        is_written_here: Whether the file was written by us; its alphas are then tensors or folded into
            factors, and metadata are not searched.
        modules: Factors by module name.
        paths: Paths of these modules, as in the file.
        start: Prefix of their network in diffusers' pipelines; "" if it has none.
        joined_lora_counts: Number of LoRAs that were joined into a module's factors, by module; 1 by default.

    Raises:
        CheckpointError: If two sources of alphas contradict each other.
        ValueError: If PEFT's settings cannot be used; other errors of parsing may pass through as well.
    """
    ranks = _ranks_without_alpha(modules, joined_lora_counts)
    # every module has an alpha of its own
    if not ranks:
        return FoundAlphas({}, "")
    sources: list[_Source] = []
    warnings: list[str] = []
    if not is_written_here:
        sources, warnings = _sources(path, metadata, paths, start)
    # keep the sources that can be for factors of these ranks
    distinct_ranks = set(ranks.values())
    warnings += _list_warnings_of_other_ranks(sources, distinct_ranks)
    sources = [source for source in sources if source.fits(distinct_ranks)]
    with_alpha = [source for source in sources if source.settings.get("lora_alpha")]
    alphas = [_finite(source.settings["lora_alpha"]) for source in with_alpha]
    if len(set(alphas)) > 1:
        alphas_in_words = [
            f"{alpha:g} in {source.place}" for alpha, source in zip(alphas, with_alpha, strict=True)
        ]
        raise CheckpointError(
            f"{path} has two alphas: {' and '.join(alphas_in_words)}.\n"
            "  Take the wrong one out: the strength of the LoRA depends on it.",
            path,
        )
    tensors = peft_alphas(modules, paths, _join_settings(sources, alphas), joined_lora_counts)
    # say for the log where the alphas come from, and how many modules have none
    descriptions: list[str] = []
    if alphas:
        descriptions.append(f"alpha {alphas[0]:g} of {with_alpha[0].place}")
    elif tensors:  # only patterns
        descriptions.append(f"alphas of {sources[0].place}")
    num_missing = len(ranks) - len(tensors)
    if num_missing:
        has_alphas = tensors or any("alpha" in factors for factors in modules.values())
        which = f"for {num_missing} modules" if has_alphas else "in it"
        descriptions.append(f"no alpha {which}: the rank is taken")
    return FoundAlphas(tensors, ", ".join(descriptions), tuple(warnings))


def _list_warnings_of_other_ranks(sources: Iterable[_Source], ranks: Collection[int]) -> list[str]:
    """Return a warning for each source whose alpha is for a rank that no module of the file has."""
    rank_list = ", ".join(map(str, sorted(ranks)))
    warnings: list[str] = []
    for source in sources:
        if source.is_sure and not source.fits(ranks):
            warnings.append(
                f"{source.place} has an alpha for rank {source.rank:g}, the factors have rank {rank_list}: "
                "it is not used"
            )
    return warnings


def _ranks_without_alpha(
    modules: Mapping[str, Factors], joined_lora_counts: Mapping[str, int]
) -> dict[str, int]:
    """Return the trained rank of each module that has a rank but no alpha."""
    ranks: dict[str, int] = {}
    for name, factors in modules.items():
        rank = None if "alpha" in factors else rank_of(factors)
        if rank is not None:
            ranks[name] = rank // joined_lora_counts.get(name, 1)
    return ranks


def _join_settings(sources: Sequence[_Source], alphas: Sequence[float]) -> dict[str, Any]:
    """Merge the settings of all sources into one PEFT configuration; earlier sources take precedence."""
    patterns: dict[str, Any] = {}
    use_rslora = None
    for source in sources:
        patterns = {**(source.settings.get("alpha_pattern") or {}), **patterns}
        use_rslora = use_rslora or source.settings.get("use_rslora")
    return {
        "lora_alpha": alphas[0] if alphas else None,
        "alpha_pattern": patterns,
        "use_rslora": use_rslora,
    }


def unfold(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """Restore alphas that were folded into the factors of a file written by us; return all tensors.

    The changes of the weights stay the same. Factors keep their dtype if the division is exact; otherwise
    they become float32.

    Args:
        tensors: Tensors under our names.
        metadata: Metadata of the file.
    """
    strengths = read_folded(metadata)
    modules = group_by_module(tensors)
    for factors in modules.values():
        rank = rank_of(factors)
        is_pair = DOWN in factors and UP in factors
        # folding is recorded by rank: this module was not folded
        if rank not in strengths or "alpha" in factors or not is_pair:
            continue
        strength = strengths[rank]
        mantissa, _ = math.frexp(strength)
        is_exact = mantissa == 0.5  # for a power of two, division only changes exponents
        down_factor, up_factor = split_strength(strength)
        divisors = {
            DOWN: down_factor,
            UP: up_factor,
            "lora_up.bias": strength,
        }
        for part, divisor in divisors.items():
            if part in factors:
                unfolded = factors[part].float() / divisor
                factors[part] = unfolded.to(factors[part].dtype) if is_exact else unfolded
        factors["alpha"] = torch.tensor(strength * rank)
    return ungroup(modules)


def read_folded(metadata: Mapping[str, str]) -> dict[int, float]:
    """Return alpha / rank by rank, from the metadata entry `FOLDED`; {} if it is missing or unusable."""
    try:
        entries = parse_json(metadata.get(FOLDED, "{}"))
        strengths = {int(rank): float(strength) for rank, strength in entries.items()}
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return {}
    return {
        rank: strength for rank, strength in strengths.items() if math.isfinite(strength) and strength > 0
    }


def without_alphas(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata without alphas, for a file with alphas as tensors or folded into the factors."""
    is_trained = "ss_network_module" in metadata
    remaining: dict[str, str] = {}
    for key, value in metadata.items():
        # trainers record the alpha of the training too, which readers ignore if alphas are tensors
        is_alpha = _split_key(key).name in _KEYS and not (is_trained and key == _TRAINED)
        if not _has_alpha(key, value) and not is_alpha:
            remaining[key] = value
    return remaining


def _has_alpha(key: str, text: str) -> bool:
    """Return whether a metadata key holds PEFT settings; for `config`, only if its JSON has an alpha."""
    if key != "config":
        return key in _SETTINGS
    try:
        sources = _sources_in_json(key, parse_json(text), "")
    except (ValueError, AttributeError, RecursionError):
        return False
    return any(source.settings.get("lora_alpha") for source in sources)


def _sources(path: Path, metadata: Mapping[str, str], paths: Mapping[str, str], start: str) -> _Sources:
    """Return the settings that may apply to these modules, and warnings about non-numeric values."""
    in_header = _sources_in_header(metadata, paths, start)
    in_settings = _sources_in_settings(metadata, start)
    in_folder = _sources_in_folder(path, start)
    return _Sources(
        sources=[*in_header.sources, *in_settings.sources, *in_folder.sources],
        warnings=[*in_header.warnings, *in_settings.warnings, *in_folder.warnings],
    )


def _sources_in_header(metadata: Mapping[str, str], paths: Mapping[str, str], start: str) -> _Sources:
    """Return the alphas that are separate keys of a file's metadata."""
    sources: list[_Source] = []
    warnings: list[str] = []
    # programs that write ss_network_module store alphas as tensors, under names without dots; if names have
    # dots, a converter has folded the alphas into the factors
    is_folded = "ss_network_module" in metadata and any("." in path for path in paths.values())
    text_by_key = {_split_key(key): text for key, text in metadata.items()}
    for full_key, text in metadata.items():
        network, name = _split_key(full_key)
        if name not in _KEYS or not _is_of(network, start):
            continue
        if full_key == _TRAINED and is_folded:
            continue
        if _number(text) is None:
            value = repr(str(text)[:_MAX_SHOWN])
            warnings.append(f"its metadata have {full_key} {value}, which is no number: not used")
            continue
        rank_keys = [_Key(network, rank_name) for rank_name in _KEYS[name]]
        scaling = text_by_key.get(_Key(network, "userslora"), "")
        settings = {
            "lora_alpha": float(text),
            "r": _first_of(text_by_key, rank_keys),
            "use_rslora": scaling.lower() == "true",
        }
        sources.append(_Source(f"its metadata ({full_key})", settings))
    return _Sources(sources, warnings)


def _first_of(values: Mapping[Any, Any], keys: Iterable[Any]) -> Any:
    """Return the value of the first of `keys` that `values` has; None if it has none of them."""
    return next((values[key] for key in keys if key in values), None)


def _sources_in_settings(metadata: Mapping[str, str], start: str) -> _Sources:
    """Return the alphas in the JSON settings of a file's metadata."""
    sources: list[_Source] = []
    warnings: list[str] = []
    for key in _SETTINGS:
        if key == "config" and not _has_alpha(key, metadata.get(key, "")):
            continue  # "config" may describe anything, such as the model
        try:
            # a missing key counts as empty settings
            settings = parse_json(metadata.get(key, "{}"))
            sources += _sources_in_json(f"its metadata ({key})", settings, start)
        except (ValueError, AttributeError, RecursionError) as error:
            if key == PEFT_SETTINGS:  # diffusers writes it into LoRA files: the alphas cannot be ignored
                raise
            warnings.append(f"its metadata have {key}, which cannot be read and is not used: {error}")
    return _Sources(sources, warnings)


def _sources_in_folder(path: Path, start: str) -> _Sources:
    """Return the alphas in PEFT's settings file next to a LoRA file, or in its folder."""
    folder = path if path.is_dir() else path.parent
    settings_path = folder / PEFT_FILE
    if not settings_path.is_file():
        return _Sources([], [])
    is_sure = path.is_dir() or path.name.startswith("adapter_model")
    try:
        sources = _sources_in_json(f"{PEFT_FILE} beside it", parse_json(read_text(settings_path)), start)
    except (ValueError, AttributeError, OSError, RecursionError) as error:
        if is_sure:
            raise
        return _Sources([], [f"{settings_path} cannot be read and is not used: {error}"])
    return _Sources([replace(source, is_sure=is_sure) for source in sources], [])


def _sources_in_json(place: str, settings: Mapping[str, Any], start: str, network: str = "") -> list[_Source]:
    """Return the sources in JSON settings for one network, with keys in any spelling.

    If the settings have no alpha, nested objects are searched, because PEFT nests settings of several
    adapters.

    Args:
        place: Description of where the settings are, for messages.
        settings: The settings.
        start: Prefix of the network in diffusers' pipelines.
        network: Network of keys that do not name one themselves.

    Raises:
        AttributeError: If `settings` is not a JSON object.
    """
    entries = [(_split_key(full_key), value) for full_key, value in settings.items()]
    all_names = {key.name for key, _ in entries}
    sources: list[_Source] = []
    has_alphas = not all_names.isdisjoint({*_KEYS, "alphapattern"})  # names by `_split_key`: no underscores
    if not has_alphas:  # each value may be the settings of one adapter or network
        for full_key, value in settings.items():
            if not isinstance(value, Mapping):
                continue
            names_transformer = f"{full_key}." in (*find_expert_starts(), UNET_IN_DIFFUSERS)
            names_network = names_transformer or full_key.startswith(_TEXTS)
            inner_network = full_key if names_network else network
            sources += _sources_in_json(f"{place}: {full_key}", value, start, inner_network)
        return sources
    values: dict[str, Any] = {}
    for key, value in entries:
        if _is_of(key.network or network, start):
            values[key.name] = value
    # these settings apply to every alpha
    common = {peft_name: values[name] for name, peft_name in _PEFT_KEYS.items() if name in values}
    if "use_rslora" in common:
        common["use_rslora"] = str(common["use_rslora"]).lower() == "true"
    # one source for each spelling of alpha that is there
    alpha_keys = [name for name in _KEYS if name in values]
    if not alpha_keys and common:
        alpha_keys = [""]  # only patterns with alphas for some modules
    for alpha_key in alpha_keys:
        # the rank beside this alpha
        rank = _first_of(values, _KEYS.get(alpha_key, _RANKS))
        peft_settings = {"lora_alpha": values.get(alpha_key), "r": rank, **common}
        sources.append(_Source(place, peft_settings))
    return sources


def _split_key(key: str) -> _Key:
    """Split a metadata key into the name of a network ("" without one) and the name of the setting."""
    match = _BEGIN.fullmatch(key)
    network = ""
    name = key
    if match is not None:
        network = match[1] or match[2] or ""
        name = match[3]
    return _Key(network, re.sub(r"[\W_]", "", name).lower())


def _is_of(network: str, start: str) -> bool:
    """Return whether a key that names `network` (or none) belongs to the network with the prefix `start`."""
    if not network or f"{network}." == start:
        return True
    match = _OF_TEXTS.fullmatch(network)
    # in LoRA files, CLIP-L is 1, CLIP-G 2 and T5 3; a pipeline calls the last two text_encoder_2
    if match is not None:
        return start == ("text_encoder_2." if match[1] in ("2", "3") else "text_encoder.")
    # a transformer has many names: any name except those of text encoders and of other experts
    experts = find_expert_starts()
    if start not in experts or network.startswith(_TEXTS):
        return False
    named_expert = experts.get(f"{network}.")
    return named_expert is None or named_expert == experts[start]


def read_alphas(
    path: Path,
    metadata: Mapping[str, str],
    native: NativeTensors,
    expert: str | None,
    is_written_here: bool,
    warns: bool = True,
) -> FoundAlphas:
    """Call `find_alphas` for the transformer and each text encoder of a file, and join the results.

    Args:
        path: Path of the file.
        metadata: Metadata of the file.
        native: Tensors under our names.
        expert: Expert of these tensors; None if the file is for a single network.
        is_written_here: Whether the file was written by us.
        warns: Whether warnings are logged.

    Raises:
        CheckpointError: If settings are unusable.
    """
    find = partial(find_alphas, path, metadata, is_written_here)
    # the prefix of this expert's network in diffusers' pipelines
    prefix = next((prefix for prefix, name in find_networks().items() if name == expert), IN_DIFFUSERS)
    text_modules = group_by_module(native.texts)
    try:
        in_dit = find(
            modules=group_by_module(native.tensors),
            paths=native.paths,
            start=prefix,
            joined_lora_counts=native.joined_lora_counts,
        )
        in_texts: list[FoundAlphas] = []
        for encoder_prefix, paths in _paths_by_encoder(text_modules).items():
            modules = {name: text_modules[name] for name in paths}
            in_texts.append(find(modules=modules, paths=paths, start=encoder_prefix, joined_lora_counts={}))
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: its PEFT settings cannot be read: {error}.\n"
            "  Correct lora_alpha or alpha_pattern in them, or give another LoRA.",
            path,
        ) from error
    # join what was found, log each warning once, and describe each finding once
    tensors: dict[str, Tensor] = {}
    warnings: dict[str, None] = {}  # an ordered set
    for alphas in (in_dit, *in_texts):
        tensors.update(alphas.tensors)
        warnings.update(dict.fromkeys(alphas.warnings))
    for warning in warnings if warns else ():
        logger.warning(f"{path}: {warning}")
    text_words = ", ".join(dict.fromkeys(alphas.words for alphas in in_texts if alphas.words))
    descriptions = dict.fromkeys(filter(None, (in_dit.words, text_words)))
    return FoundAlphas(tensors, ", ".join(descriptions), tuple(warnings))


def _paths_by_encoder(texts: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return the paths of text encoders' modules by name, grouped by the encoder's prefix in diffusers."""
    paths: dict[str, dict[str, str]] = {}
    for name in texts:
        start = ""
        path = name
        full_path = diffusers_path_of_text(name)
        if full_path:
            encoder, dot, path = full_path.partition(".")
            start = encoder + dot
        paths.setdefault(start, {})[name] = path
    return paths


@dataclass(frozen=True)
class _AlphaRules:
    """The alphas in PEFT settings.

    A key of `alpha_pattern` is the end of a module's path (`to_q`, `attn1.to_q`) or a regular expression for
    it. If several keys match, PEFT uses the first.
    """

    values: Mapping[str, float]  # the setting alpha_pattern
    positions: Mapping[str, int]  # key of alpha_pattern -> its index
    expressions: Mapping[
        str, Callable[[str], bool]
    ]  # keys that are regular expressions -> function that matches
    default: float | None  # the setting lora_alpha, for modules that no key matches

    def alpha_of(self, path: str) -> float | None:
        """Return the alpha of the module with a path such as `blocks.0.attn1.to_q`."""
        names = path.split(".")
        endings = [".".join(names[start:]) for start in range(len(names))]
        matching = [ending for ending in endings if ending in self.values]
        matching += [key for key, fits in self.expressions.items() if fits(path)]
        if not matching:
            return self.default
        first = min(matching, key=lambda key: self.positions[key])
        return self.values[first]


def _read_rules(config: Mapping[str, Any]) -> _AlphaRules:
    """Read the alphas in PEFT settings; raise ValueError if they cannot be used."""
    values = {key: _finite(value) for key, value in (config.get("alpha_pattern") or {}).items()}
    keys = [key for key in values if not _PLAIN_KEY.fullmatch(key)]
    if sum(map(len, keys)) > MAX_EXPRESSIONS:
        raise ValueError(f"its regular expressions have more than {MAX_EXPRESSIONS} characters in all")
    expressions = {key: _expression(key) for key in keys}
    default = None if config.get("lora_alpha") is None else _finite(config["lora_alpha"])
    positions = {key: position for position, key in enumerate(values)}
    return _AlphaRules(values, positions, expressions, default)


def peft_alphas(
    modules: Mapping[str, Factors],
    paths: Mapping[str, str],
    config: Mapping[str, Any],
    joined_lora_counts: Mapping[str, int],
) -> dict[str, Tensor]:
    """Return the alphas that PEFT settings give to modules without an alpha of their own.

    Args:
        modules: Factors by module name.
        paths: Paths of these modules, as in the file.
        config: Content of PEFT's adapter_config.json.
        joined_lora_counts: Number of LoRAs that were joined into a module's factors, by module; 1 by default.

    Raises:
        ValueError: If the settings cannot be used.
    """
    rules = _read_rules(config)
    alphas: dict[str, Tensor] = {}
    for module, factors in modules.items():
        rank = rank_of(factors)
        # a kind without a rank, or an alpha of its own, which takes precedence
        if rank is None or "alpha" in factors:
            continue
        alpha = rules.alpha_of(paths[module])
        if alpha is None:
            continue
        num_joined = joined_lora_counts.get(module, 1)
        if config.get("use_rslora"):
            # rank-stabilized LoRA scales by alpha / sqrt(rank), we by alpha / rank
            alpha = alpha * (rank // num_joined) ** 0.5
        alphas[f"{module}.alpha"] = torch.tensor(alpha * num_joined)  # like the rank of the joined factors
    return alphas


def _number(value: Any) -> float | None:
    """Return a value as a float; None if it is not a finite number."""
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

    Raises:
        ValueError: If the key is not a regular expression. The returned function raises ValueError if
            matching takes too long.
    """
    import regex  # rarely needed

    try:
        # the key may name a module or the end of its path
        pattern = regex.compile(rf"(.*\.)?({key})$")  # as PEFT does
    except regex.error as error:
        raise ValueError(f"the key {key!r} is no regular expression: {error}") from None

    def fits(path: str) -> bool:
        try:
            return pattern.match(path, timeout=MAX_SEARCH_SECONDS) is not None
        except TimeoutError:
            raise ValueError(f"the key {key!r} takes too long to search {path} for") from None

    return fits

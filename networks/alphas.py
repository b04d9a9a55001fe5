"""Find alphas that are not stored as tensors: in a LoRA's metadata, or in PEFT's settings (metadata or file).

A source is one place with settings, such as a metadata key. A file may contain LoRAs for several networks;
`network_prefix` is a network's prefix in diffusers' pipelines, such as `text_encoder_2.`.
"""

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from logging import getLogger
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modules.errors import CheckpointError
from modules.limits import MAX_EXPRESSIONS, MAX_SEARCH_SECONDS
from modules.text_files import parse_json, read_text
from networks.key_formats import NativeTensors
from networks.kinds.factors import DOWN, UP, Factors
from networks.module_factors import get_lora_rank, group_by_module, split_scaling, ungroup
from networks.names.layouts import FOLDED, IN_DIFFUSERS, PEFT_FILE, UNET_IN_DIFFUSERS
from networks.names.texts import find_diffusers_text_path
from networks.tensor_names import find_expert_prefixes, find_networks

logger = getLogger(__name__)
# key of the adapter's settings that diffusers writes into a file's metadata
PEFT_SETTINGS = "lora_adapter_metadata"
# a key of alpha_pattern that is not a regular expression
_PLAIN_PATH = re.compile(r"[\w-]+(\.[\w-]+)*", re.ASCII)
# metadata keys under which programs store these settings
_SETTINGS_KEYS = (PEFT_SETTINGS, "peft_config", "adapter_config", "lora_config", "config")
_TRAINED_ALPHA_KEY = "ss_network_alpha"
# prefixes of text encoder names
_TEXT_ENCODER_PREFIXES = ("text_encoder", "lora_te", "te1", "te2", "te3")
# a key with the name of a network in front: `transformer.lora_alpha`, `lora_te1_alpha`
_KEY_WITH_NETWORK = re.compile(
    r"(?:(.*)\.|(transformer(?:_2)?|unet|lora_unet|(?:text_encoder|lora_te|te)_?[123]?)_)?(.*)"
)
_TEXT_ENCODER = re.compile(r"(?:text_encoder|lora_te|te)_?([123]?)")
_RANK_NAMES = ("r", "rank", "lorarank", "lorar", "networkdim", "networkrank", "linear")
# name of an alpha, as `_parse_key` returns it -> names that the rank may have next to it
_RANK_NAMES_BY_ALPHA = {
    **dict.fromkeys(("loraalpha", "networkalpha", "alpha", "linearalpha"), _RANK_NAMES),
    "ssnetworkalpha": ("ssnetworkdim",),
}
# other settings in JSON, as `_parse_key` returns them -> their names in PEFT
_PEFT_KEYS = {"alphapattern": "alpha_pattern", "rankpattern": "rank_pattern", "userslora": "use_rslora"}
_MAX_SHOWN = 20  # characters of a value that a message shows


@dataclass(frozen=True)
class _AlphaSource:
    """Settings that contain alphas, and the metadata key or file where they were found."""

    location: str  # where they were found, for messages
    settings: Mapping[str, Any]  # by PEFT's names: lora_alpha, r, alpha_pattern, rank_pattern, use_rslora
    surely_belongs: bool = True  # whether they certainly belong to this LoRA; otherwise the rank must match

    @property
    def rank(self) -> float | None:
        return _to_finite_or_none(self.settings.get("r"))

    def can_be_for(self, ranks: Collection[int]) -> bool:
        """Return whether the settings may belong to a file whose factors have these ranks."""
        if self.rank is None:
            return self.surely_belongs
        return self.rank in ranks or bool(self.settings.get("rank_pattern"))


class _FoundSources(NamedTuple):
    """Alpha settings that may apply to a network, and warnings about unusable settings."""

    sources: list[_AlphaSource]
    warnings: list[str]


class _Key(NamedTuple):
    """A metadata key, split and normalized: `loraalpha` for `transformer.LoRA_alpha`."""

    network: str  # prefix of the key that names a network; "" if it has none
    name: str  # rest of the key, in lower case, letters and digits only


@dataclass(frozen=True)
class FoundAlphas:
    """Alphas found elsewhere for modules that lack alpha tensors, and a description of where."""

    tensors: Mapping[str, Tensor]  # by name: "lora_unet_x.alpha"
    description: str  # description for the log; "" if every module has an alpha tensor
    warnings: tuple[str, ...] = ()  # about unusable values


class NetworkFactors(NamedTuple):
    """LoRA factors for one network of a pipeline: the transformer or one text encoder."""

    modules: Mapping[str, Factors]  # by module name
    module_paths: Mapping[str, str]  # module name -> path of the module in the file
    prefix: str  # of the network in diffusers' pipelines, such as `transformer.`; "" if it has none
    joined_lora_counts: Mapping[str, int]  # module name -> number of LoRAs in its factors; 1 by default


def find_alphas(
    path: Path, metadata: Mapping[str, str], is_written_here: bool, network: NetworkFactors
) -> FoundAlphas:
    """Find alphas for modules without an alpha tensor, in the metadata or in PEFT's settings.

    Args:
        path: Path of the file.
        metadata: Metadata of the file.
        is_written_here: Whether we wrote the file; its alphas are then tensors or folded into factors, and
            the metadata is not searched.
        network: The factors.

    Raises:
        CheckpointError: If two sources of alphas contradict each other.
        ValueError: If PEFT's settings cannot be used; other parsing errors may propagate too.
    """
    # The rank of each module without alpha; for joined LoRAs, the rank of each of them
    ranks: dict[str, int] = {}
    for name, factors in network.modules.items():
        rank = None if "alpha" in factors else get_lora_rank(factors)
        if rank is not None:
            ranks[name] = rank // network.joined_lora_counts.get(name, 1)
    every_module_has_alpha = not ranks
    if every_module_has_alpha:
        return FoundAlphas({}, "")
    sources: list[_AlphaSource] = []
    warnings: list[str] = []
    if not is_written_here:
        sources, warnings = _find_sources(path, metadata, network)
    distinct_ranks = set(ranks.values())
    # ignore alphas that were set for ranks which no module has
    warnings += _list_rank_warnings(sources, distinct_ranks)
    sources = [source for source in sources if source.can_be_for(distinct_ranks)]
    alpha = _require_one_alpha(path, sources)
    tensors = peft_alphas(
        network.modules, network.module_paths, _merge_settings(sources, alpha), network.joined_lora_counts
    )
    num_missing = len(ranks) - len(tensors)
    description = _describe_alphas(sources, network, num_found=len(tensors), num_missing=num_missing)
    return FoundAlphas(tensors, description, tuple(warnings))


def _require_one_alpha(path: Path, sources: Sequence[_AlphaSource]) -> float | None:
    """Return the only alpha in the sources; None without one. Raises CheckpointError if they differ."""
    with_alpha = [source for source in sources if source.settings.get("lora_alpha")]
    alphas = [_to_finite(source.settings["lora_alpha"]) for source in with_alpha]
    if len(set(alphas)) > 1:
        clauses = [
            f"{alpha:g} in {source.location}" for alpha, source in zip(alphas, with_alpha, strict=True)
        ]
        raise CheckpointError(
            f"{path} has two alphas: {' and '.join(clauses)}.\n"
            "  Take the wrong one out: the strength of the LoRA depends on it.",
            path,
        )
    return alphas[0] if alphas else None


def _describe_alphas(
    sources: Sequence[_AlphaSource], network: NetworkFactors, num_found: int, num_missing: int
) -> str:
    """Describe where the alphas come from and how many modules have none, for the log."""
    descriptions: list[str] = []
    source_with_alpha = next((source for source in sources if source.settings.get("lora_alpha")), None)
    if source_with_alpha is not None:
        alpha = _to_finite(source_with_alpha.settings["lora_alpha"])
        descriptions.append(f"alpha {alpha:g} of {source_with_alpha.location}")
    elif num_found:  # PEFT's settings have only alphas by pattern
        descriptions.append(f"alphas of {sources[0].location}")
    if num_missing:
        has_alphas = num_found or any("alpha" in factors for factors in network.modules.values())
        modules_clause = f"for {num_missing} modules" if has_alphas else "in it"
        descriptions.append(f"no alpha {modules_clause}: the rank is used instead")
    return ", ".join(descriptions)


def _list_rank_warnings(sources: Iterable[_AlphaSource], ranks: Collection[int]) -> list[str]:
    """Return a warning for each alpha source whose rank no module in the file has."""
    rank_list = ", ".join(map(str, sorted(ranks)))
    warnings: list[str] = []
    for source in sources:
        if source.surely_belongs and not source.can_be_for(ranks):
            warnings.append(
                f"{source.location} has an alpha for rank {source.rank:g}, the factors have rank {rank_list}"
                ": it is not used"
            )
    return warnings


def _merge_settings(sources: Sequence[_AlphaSource], alpha: float | None) -> dict[str, Any]:
    """Merge the settings from all sources into one PEFT configuration; earlier sources take precedence."""
    patterns: dict[str, Any] = {}
    use_rslora = None
    for source in sources:
        patterns = {**(source.settings.get("alpha_pattern") or {}), **patterns}
        use_rslora = use_rslora or source.settings.get("use_rslora")
    return {"lora_alpha": alpha, "alpha_pattern": patterns, "use_rslora": use_rslora}


def restore_folded_alphas(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """Restore alphas that were folded into the factors of a file written by us; return all tensors.

    The weight changes stay the same. Factors keep their dtype if the division is exact; otherwise they become
    float32.

    Args:
        tensors: Tensors under our names.
        metadata: Metadata of the file.
    """
    scalings = read_folded(metadata)  # rank -> alpha / rank
    modules = group_by_module(tensors)
    for factors in modules.values():
        rank = get_lora_rank(factors)
        is_pair = DOWN in factors and UP in factors
        was_folded = rank in scalings and "alpha" not in factors and is_pair
        if rank is None or not was_folded:
            continue
        _unfold_scaling(factors, scalings[rank])
        factors["alpha"] = torch.tensor(scalings[rank] * rank)
    return ungroup(modules)


def _unfold_scaling(factors: dict[str, Tensor], scaling: float) -> None:
    """Divide LoRA factors, in place, by the alpha / rank that was multiplied into them."""
    mantissa, _ = math.frexp(scaling)
    is_exact = mantissa == 0.5  # for a power of two, division only changes exponents
    down_factor, up_factor = split_scaling(scaling)
    divisors = {
        DOWN: down_factor,
        UP: up_factor,
        "lora_up.bias": scaling,
    }
    for name, divisor in divisors.items():
        if name in factors:
            unfolded = factors[name].float() / divisor
            factors[name] = unfolded.to(factors[name].dtype) if is_exact else unfolded


def read_folded(metadata: Mapping[str, str]) -> dict[int, float]:
    """Return {rank: alpha / rank} from the metadata entry `FOLDED`; {} if it is missing or invalid."""
    try:
        entries = parse_json(metadata.get(FOLDED, "{}"))
        scalings = {int(rank): float(scaling) for rank, scaling in entries.items()}
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return {}
    return {rank: scaling for rank, scaling in scalings.items() if math.isfinite(scaling) and scaling > 0}


def without_alphas(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return metadata without alphas, for a file that stores alphas as tensors or in the factors."""
    remaining: dict[str, str] = {}
    for key, value in metadata.items():
        # trainers also record the training alpha, which readers ignore if alphas are tensors
        is_training_record = key == _TRAINED_ALPHA_KEY and "ss_network_module" in metadata
        is_alpha = _parse_key(key).name in _RANK_NAMES_BY_ALPHA
        if is_training_record or not (is_alpha or _holds_settings(key, value)):
            remaining[key] = value
    return remaining


def _holds_settings(key: str, text: str) -> bool:
    """Return whether a metadata value contains PEFT settings; `config` must be JSON with an alpha."""
    if key != "config":
        return key in _SETTINGS_KEYS
    try:
        sources = _parse_settings(key, parse_json(text), "")
    except (ValueError, AttributeError, RecursionError):
        return False
    return any(source.settings.get("lora_alpha") for source in sources)


def _find_sources(path: Path, metadata: Mapping[str, str], network: NetworkFactors) -> _FoundSources:
    """Return the alpha settings that may apply to a network, and warnings about non-numeric values."""
    in_keys = _find_in_metadata_keys(metadata, network.module_paths, network.prefix)
    # The alphas in JSON settings in a file's metadata, such as `lora_adapter_metadata`
    sources: list[_AlphaSource] = []
    warnings: list[str] = []
    for key in _SETTINGS_KEYS:
        if key == "config" and not _holds_settings(key, metadata.get(key, "")):
            continue  # "config" may describe anything, such as the model
        try:
            # a missing key counts as empty settings
            settings = parse_json(metadata.get(key, "{}"))
            sources += _parse_settings(f"its metadata ({key})", settings, network.prefix)
        except (ValueError, AttributeError, RecursionError) as error:
            if key == PEFT_SETTINGS:  # diffusers writes it into LoRA files: the alphas cannot be ignored
                raise
            warnings.append(f"its metadata has {key}, which cannot be read and is not used: {error}")
    in_json = _FoundSources(sources, warnings)
    in_file = _find_in_settings_file(path, network.prefix)
    return _FoundSources(
        sources=[*in_keys.sources, *in_json.sources, *in_file.sources],
        warnings=[*in_keys.warnings, *in_json.warnings, *in_file.warnings],
    )


def _find_in_metadata_keys(
    metadata: Mapping[str, str], module_paths: Mapping[str, str], network_prefix: str
) -> _FoundSources:
    """Return alphas stored as separate metadata keys, such as `transformer.lora_alpha`."""
    sources: list[_AlphaSource] = []
    warnings: list[str] = []
    # programs that write ss_network_module store alphas as tensors, under names without dots; if names have
    # dots, a converter has folded the alphas into the factors
    is_folded = "ss_network_module" in metadata and any("." in path for path in module_paths.values())
    text_by_key = {_parse_key(key): text for key, text in metadata.items()}
    for full_key, text in metadata.items():
        network, name = _parse_key(full_key)
        is_unused_record = full_key == _TRAINED_ALPHA_KEY and is_folded
        if name not in _RANK_NAMES_BY_ALPHA or not _belongs_to(network, network_prefix) or is_unused_record:
            continue
        if _to_finite_or_none(text) is None:
            shown_value = repr(str(text)[:_MAX_SHOWN])
            warnings.append(f"its metadata has {full_key} {shown_value}, which is not a number: not used")
        else:
            sources.append(_make_alpha_source(full_key, float(text), text_by_key))
    return _FoundSources(sources, warnings)


def _make_alpha_source(full_key: str, alpha: float, text_by_key: Mapping[_Key, str]) -> _AlphaSource:
    """Return the alpha in a metadata key, with the rank and use_rslora that are set for the same network."""
    network, name = _parse_key(full_key)
    rank_keys = [_Key(network, rank_name) for rank_name in _RANK_NAMES_BY_ALPHA[name]]
    settings = {
        "lora_alpha": alpha,
        "r": _get_first(text_by_key, rank_keys),
        "use_rslora": text_by_key.get(_Key(network, "userslora"), "").lower() == "true",
    }
    return _AlphaSource(f"its metadata ({full_key})", settings)


def _get_first(values: Mapping[Any, Any], keys: Iterable[Any]) -> Any:
    """Return the value of the first key that `values` contains; None if it contains none of them."""
    return next((values[key] for key in keys if key in values), None)


def _find_in_settings_file(path: Path, network_prefix: str) -> _FoundSources:
    """Return the alphas in PEFT's `adapter_config.json` in the folder of a LoRA."""
    # The folder may contain several LoRA files. PEFT writes these settings for `adapter_model`; for a file
    # with another name, unreadable settings only cause a warning.
    folder = path if path.is_dir() else path.parent
    settings_path = folder / PEFT_FILE
    if not settings_path.is_file():
        return _FoundSources([], [])
    surely_belongs = path.is_dir() or path.name.startswith("adapter_model")
    try:
        settings = parse_json(read_text(settings_path))
        sources = _parse_settings(f"{PEFT_FILE} next to it", settings, network_prefix)
    except (ValueError, AttributeError, OSError, RecursionError) as error:
        if surely_belongs:
            raise
        return _FoundSources([], [f"{settings_path} cannot be read and is not used: {error}"])
    return _FoundSources([replace(source, surely_belongs=surely_belongs) for source in sources], [])


def _parse_settings(
    location: str, settings: Mapping[str, Any], network_prefix: str, network: str = ""
) -> list[_AlphaSource]:
    """Return the alpha sources for one network in JSON settings, with keys in any spelling."""
    # If the settings have no alpha, nested objects are searched, because PEFT nests the settings of multiple
    # adapters.
    entries = [(_parse_key(full_key), value) for full_key, value in settings.items()]
    names = {key.name for key, _ in entries}  # in lower case, without underscores
    has_alphas = not names.isdisjoint({*_RANK_NAMES_BY_ALPHA, "alphapattern"})
    if not has_alphas:
        return _parse_nested_settings(location, settings, network_prefix, network)
    values: dict[str, Any] = {}
    for key, value in entries:
        if _belongs_to(key.network or network, network_prefix):
            values[key.name] = value
    return [_AlphaSource(location, peft_settings) for peft_settings in _to_peft_settings(values)]


def _to_peft_settings(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return settings by PEFT's names, once for each alpha in them, or once if there are only patterns."""
    common = {peft_name: values[name] for name, peft_name in _PEFT_KEYS.items() if name in values}
    if "use_rslora" in common:
        common["use_rslora"] = str(common["use_rslora"]).lower() == "true"
    alpha_names = [name for name in _RANK_NAMES_BY_ALPHA if name in values]
    if not alpha_names and common:  # only patterns, with alphas for some modules
        return [{"lora_alpha": None, "r": _get_first(values, _RANK_NAMES), **common}]
    settings: list[dict[str, Any]] = []
    for name in alpha_names:
        rank = _get_first(values, _RANK_NAMES_BY_ALPHA[name])
        settings.append({"lora_alpha": values[name], "r": rank, **common})
    return settings


def _parse_nested_settings(
    location: str, settings: Mapping[str, Any], network_prefix: str, network: str
) -> list[_AlphaSource]:
    """Return the alpha sources in nested JSON settings, whose keys may name adapters or networks."""
    sources: list[_AlphaSource] = []
    for key, value in settings.items():
        if not isinstance(value, Mapping):
            continue
        names_transformer = f"{key}." in (*find_expert_prefixes(), UNET_IN_DIFFUSERS)
        names_network = names_transformer or key.startswith(_TEXT_ENCODER_PREFIXES)
        inner_network = key if names_network else network
        sources += _parse_settings(f"{location}: {key}", value, network_prefix, inner_network)
    return sources


def _parse_key(key: str) -> _Key:
    """Split a metadata key into the prefix of a network ("" if it has none) and the setting's name."""
    match = _KEY_WITH_NETWORK.fullmatch(key)
    network = ""
    name = key
    if match is not None:
        network = match[1] or match[2] or ""
        name = match[3]
    return _Key(network, re.sub(r"[\W_]", "", name).lower())


def _belongs_to(network: str, network_prefix: str) -> bool:
    """Return whether a key for `network` ("" if it names none) applies to the network with this prefix."""
    if not network or f"{network}." == network_prefix:
        return True
    text_encoder = _TEXT_ENCODER.fullmatch(network)
    if text_encoder is not None:
        # in LoRA files, CLIP-L is 1, CLIP-G 2 and T5 3; in pipelines, 2 and 3 are text_encoder_2
        is_second = text_encoder[1] in ("2", "3")
        return network_prefix == ("text_encoder_2." if is_second else "text_encoder.")
    # a transformer has many names: accept any name except names of text encoders and other experts
    experts = find_expert_prefixes()
    if network_prefix not in experts or network.startswith(_TEXT_ENCODER_PREFIXES):
        return False
    named_expert = experts.get(f"{network}.")
    return named_expert is None or named_expert == experts[network_prefix]


def read_alphas(
    path: Path,
    metadata: Mapping[str, str],
    native: NativeTensors,
    expert: str | None,
    is_written_here: bool,
    warns: bool = True,
) -> FoundAlphas:
    """Find the alphas that a file does not store as tensors, for the transformer and each text encoder.

    Args:
        path: Path of the file.
        metadata: Metadata of the file.
        native: Tensors under our names.
        expert: Expert of these tensors; None if the file is for a single network.
        is_written_here: Whether we wrote the file.
        warns: Whether to log warnings.

    Raises:
        CheckpointError: If settings are unusable.
    """
    dit = _collect_dit_factors(native, expert)
    # The LoRA factors in a file for each text encoder
    text_encoders: list[NetworkFactors] = []
    text_modules = group_by_module(native.text_tensors)
    for encoder_prefix, module_paths in _paths_by_encoder(text_modules).items():
        modules = {name: text_modules[name] for name in module_paths}
        text_encoders.append(NetworkFactors(modules, module_paths, encoder_prefix, joined_lora_counts={}))
    try:
        dit_alphas = find_alphas(path, metadata, is_written_here, dit)
        encoder_alphas = [find_alphas(path, metadata, is_written_here, encoder) for encoder in text_encoders]
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: its PEFT settings cannot be read: {error}.\n"
            "  Fix lora_alpha or alpha_pattern in them, or pass another LoRA.",
            path,
        ) from error
    found_alphas = _join_alphas(dit_alphas, encoder_alphas)
    if warns:
        for warning in found_alphas.warnings:
            logger.warning(f"{path}: {warning}")
    return found_alphas


def _collect_dit_factors(native: NativeTensors, expert: str | None) -> NetworkFactors:
    """Return the LoRA factors in a file for the transformer, or for one of its experts."""
    # the prefix of this expert's network in diffusers' pipelines
    prefix = next((prefix for prefix, name in find_networks().items() if name == expert), IN_DIFFUSERS)
    return NetworkFactors(
        modules=group_by_module(native.tensors),
        module_paths=native.paths_in_file,
        prefix=prefix,
        joined_lora_counts=native.joined_lora_counts,
    )


def _join_alphas(dit_alphas: FoundAlphas, encoder_alphas: Sequence[FoundAlphas]) -> FoundAlphas:
    """Join the alphas of all networks, without repeating equal descriptions and warnings."""
    tensors: dict[str, Tensor] = {}
    warnings: dict[str, None] = {}  # an ordered set
    for alphas in (dit_alphas, *encoder_alphas):
        tensors.update(alphas.tensors)
        warnings.update(dict.fromkeys(alphas.warnings))
    encoder_descriptions = dict.fromkeys(
        alphas.description for alphas in encoder_alphas if alphas.description
    )
    descriptions = dict.fromkeys(filter(None, (dit_alphas.description, ", ".join(encoder_descriptions))))
    return FoundAlphas(tensors, ", ".join(descriptions), tuple(warnings))


def _paths_by_encoder(texts: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return {text encoder prefix in diffusers: {module name: module path}}."""
    module_paths: dict[str, dict[str, str]] = {}
    for name in texts:
        encoder_prefix = ""
        path = name
        full_path = find_diffusers_text_path(name)
        if full_path:
            encoder, dot, path = full_path.partition(".")
            encoder_prefix = encoder + dot
        module_paths.setdefault(encoder_prefix, {})[name] = path
    return module_paths


@dataclass(frozen=True)
class _AlphaRules:
    """The alphas in PEFT settings, by module path.

    A key of `alpha_pattern` is the end of a module path (`to_q`, `attn1.to_q`) or a regular expression for
    the path. If several keys match, PEFT uses the first.
    """

    values: Mapping[str, float]  # the setting alpha_pattern
    positions: Mapping[str, int]  # key of alpha_pattern -> its index
    # keys that are regular expressions -> function that matches
    expressions: Mapping[str, Callable[[str], bool]]
    default: float | None  # the setting lora_alpha, for modules that no key matches

    def find_alpha(self, path: str) -> float | None:
        """Return the alpha of the module at a path such as `blocks.0.attn1.to_q`."""
        names = path.split(".")
        endings = [".".join(names[first:]) for first in range(len(names))]
        matching = [ending for ending in endings if ending in self.values]
        matching += [key for key, matches in self.expressions.items() if matches(path)]
        if not matching:
            return self.default
        first = min(matching, key=lambda key: self.positions[key])
        return self.values[first]


def _read_rules(config: Mapping[str, Any]) -> _AlphaRules:
    """Parse the alphas in PEFT settings; raise ValueError if they cannot be used."""
    values = {key: _to_finite(value) for key, value in (config.get("alpha_pattern") or {}).items()}
    keys = [key for key in values if not _PLAIN_PATH.fullmatch(key)]
    if sum(map(len, keys)) > MAX_EXPRESSIONS:
        raise ValueError(f"its regular expressions have more than {MAX_EXPRESSIONS} characters in total")
    expressions = {key: _compile_expression(key) for key in keys}
    default = None if config.get("lora_alpha") is None else _to_finite(config["lora_alpha"])
    positions = {key: position for position, key in enumerate(values)}
    return _AlphaRules(values, positions, expressions, default)


def peft_alphas(
    modules: Mapping[str, Factors],
    module_paths: Mapping[str, str],
    config: Mapping[str, Any],
    joined_lora_counts: Mapping[str, int],
) -> dict[str, Tensor]:
    """Return the alphas from PEFT settings for modules without an alpha tensor.

    Args:
        modules: Factors by module name.
        module_paths: Paths of these modules as in the file.
        config: Content of PEFT's adapter_config.json.
        joined_lora_counts: Number of LoRAs joined into a module's factors, by module; 1 by default.

    Raises:
        ValueError: If the settings cannot be used.
    """
    rules = _read_rules(config)
    alphas: dict[str, Tensor] = {}
    for module, factors in modules.items():
        rank = get_lora_rank(factors)
        has_own_alpha = "alpha" in factors  # it takes precedence
        if rank is None or has_own_alpha:
            continue
        alpha = rules.find_alpha(module_paths[module])
        if alpha is None:
            continue
        num_joined = joined_lora_counts.get(module, 1)
        if config.get("use_rslora"):
            # rank-stabilized LoRA scales by alpha / sqrt(rank) instead of alpha / rank
            alpha = alpha * (rank // num_joined) ** 0.5
        # joined factors have the sum of the ranks, so alpha / rank stays the same
        alphas[f"{module}.alpha"] = torch.tensor(alpha * num_joined)
    return alphas


def _to_finite_or_none(value: Any) -> float | None:
    """Return a value as a float; None if it is not a finite number."""
    try:
        return _to_finite(value)
    except (ValueError, TypeError, OverflowError):
        return None


def _to_finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"an alpha is {number}")
    return number


def _compile_expression(key: str) -> Callable[[str], bool]:
    """Compile a key of PEFT's `alpha_pattern` to a function that tests whether a module path matches."""
    import regex  # rarely needed

    try:
        # the key may name a module or the end of its path
        pattern = regex.compile(rf"(.*\.)?({key})$")  # as PEFT does
    except regex.error as error:
        raise ValueError(f"the key {key!r} is not a regular expression: {error}") from None

    def matches(path: str) -> bool:
        try:
            return pattern.match(path, timeout=MAX_SEARCH_SECONDS) is not None
        except TimeoutError:
            raise ValueError(f"the key {key!r} takes too long to match against {path}") from None

    return matches

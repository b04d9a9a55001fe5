"""Write the LoRA of a training run under the names of the known trainers, ComfyUI or diffusers."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from checkpoints.writing import save_tensors
from modules.console import list_some
from modules.errors import OptionError
from networks.builtin_modules import OWN_MODULES
from networks.formats import comfyui, diffusers
from networks.kinds.contract import NetworkKind
from networks.kinds.factors import DOWN, Factors
from networks.metadata import add_hashes
from networks.module_factors import compute_scaling, fold_scaling, group_by_module, ungroup
from networks.module_names import read_family
from networks.names.layouts import (
    COMFYUI,
    DIFFUSERS,
    FOLDED,
    KNOWN,
    LORA_FORMAT,
    OURS,
    TRAINED_ON,
    FamilyNames,
)
from networks.options import NetworkOptions
from networks.tensor_names import PEFT_ENDS
from networks.writing import (
    TranslatedModules,
    convert_to_dialect,
    convert_to_our_layout,
    rename_to_aliases,
    texts_to_comfyui,
    texts_to_diffusers,
)

logger = getLogger(__name__)

# format -> value of --target of convert_lora.py
TARGETS = {KNOWN: "default", COMFYUI: "other", DIFFUSERS: "diffusers"}
_OTHERWISE = "Use --lora_format known"
_UNKNOWN_NAMES = f"its names for the layers of this model are not known. {_OTHERWISE}"


class Formatted(NamedTuple):
    """Tensors of a LoRA under the names that a value of `--lora_format` prescribes."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]  # additional metadata about the tensors
    left_out: dict[str, str]  # module that the format cannot express -> reason


@dataclass(frozen=True)
class LoraFormat:
    """How LoRA files of a training run name their modules (--lora_format), for one model family."""

    name: str = KNOWN
    family: FamilyNames | None = None

    def check(self, network: nn.Module) -> None:
        """Raise OptionError if this file format cannot express a module of the network."""
        tensors = {name: tensor.detach().to("cpu") for name, tensor in network.state_dict().items()}
        left_out = self.convert(tensors).left_out
        if left_out:
            reasons = [f"{module} ({reason})" for module, reason in left_out.items()]
            raise OptionError(
                f"--lora_format {self.name} cannot store {len(reasons)} of the network's modules: "
                f"{list_some(reasons, 3)}. {_OTHERWISE}, or omit them with --network_args "
                "exclude_patterns"
            )

    def save(
        self,
        network: nn.Module,
        path: Path,
        dtype: torch.dtype | None,
        metadata: Mapping[str, str],
        additional_tensors: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        """Write a network to a file, completely or not at all, with hashes added to the metadata.

        Args:
            network: The network.
            path: Path of the file.
            dtype: Dtype of the tensors in the file; None keeps the training dtype.
            metadata: Metadata of the file.
            additional_tensors: Additional tensors for the file, by name.
        """
        # convert in the training dtype, so that values are rounded only once, below
        trained = {name: tensor.detach().to("cpu") for name, tensor in network.state_dict().items()}
        converted = self.convert(trained)
        tensors = {}
        for name, tensor in {**converted.tensors, **additional_tensors}.items():
            tensors[name] = tensor.detach().to("cpu", dtype).contiguous()
        all_metadata = {**metadata, **converted.metadata, LORA_FORMAT: self.name}
        save_tensors(path, tensors, add_hashes(tensors, all_metadata))

    def convert(self, tensors: Mapping[str, Tensor]) -> Formatted:
        """Return tensors under the names that this format prescribes.

        If the format has no alphas, alpha / rank is folded into the factors by powers of two. The metadata
        entry `FOLDED` stores alpha / rank, so that the alphas can be restored when the file is read.

        Args:
            tensors: Tensors under our names, on the CPU.
        """
        if self.name == KNOWN:
            if self.family is not None and self.family.underscored_names == "aliases":
                tensors = rename_to_aliases(tensors, self.family)
            return Formatted(dict(tensors), {}, {})
        text_modules: dict[str, Factors] = {}
        in_dit: dict[str, Factors] = {}
        for module, factors in group_by_module(tensors).items():
            if module.startswith(OURS):
                in_dit[module] = factors
            else:
                text_modules[module] = factors
        converted = [*self._convert_dit(in_dit), *self._convert_texts(text_modules)]
        written_tensors: dict[str, Tensor] = {}
        left_out: dict[str, str] = {}
        for modules in converted:
            written_tensors |= modules.translated.tensors
            left_out |= modules.translated.left_out
        return Formatted(written_tensors, _make_scaling_metadata(converted), left_out)

    def _convert_dit(self, modules: Mapping[str, Factors]) -> list["_ConvertedModules"]:
        """Convert a transformer's modules to this format, in groups of equal alpha / rank."""
        converted: list[_ConvertedModules] = []
        for scaling, group in self._group_by_scaling(modules).items():
            native = convert_to_our_layout(group, self.family)
            if scaling is not None:
                factors_by_module = group_by_module(native)
                native = ungroup({name: fold_scaling(factors) for name, factors in factors_by_module.items()})
            translated = convert_to_dialect(native, self.family, TARGETS[self.name])
            converted.append(_ConvertedModules(translated, scaling))
        return converted

    def _convert_texts(self, modules: Mapping[str, Factors]) -> list["_ConvertedModules"]:
        """Convert modules of text encoders to this format; only diffusers' format folds alpha / rank."""
        if self.name == COMFYUI:
            tensors = texts_to_comfyui(ungroup(modules), self.family)
            return [_ConvertedModules(TranslatedModules(tensors, {}), folded_scaling=None)]
        converted: list[_ConvertedModules] = []
        for name, factors in modules.items():
            translated = texts_to_diffusers(ungroup({name: factors}))
            converted.append(_ConvertedModules(translated, compute_scaling(factors)))
        return converted

    def _group_by_scaling(self, modules: Mapping[str, Factors]) -> dict[float | None, dict[str, Tensor]]:
        """Group module tensors by alpha / rank; modules that keep their alphas are under None."""
        # if ComfyUI reads names with underscores (HunyuanImage-2.1), it reads alphas too
        keeps_alphas = self.name == COMFYUI and self.family is not None and self.family.underscored_in_comfyui
        groups: dict[float | None, dict[str, Tensor]] = {}
        for name, factors in modules.items():
            is_folded = DOWN in factors and not keeps_alphas
            scaling = compute_scaling(factors) if is_folded else None
            groups.setdefault(scaling, {}).update(ungroup({name: factors}))
        return groups


class _ConvertedModules(NamedTuple):
    """Modules under the names of another program, and the alpha / rank that is folded into their factors."""

    translated: TranslatedModules
    folded_scaling: float | None  # None: the alphas are kept as tensors


def _make_scaling_metadata(converted: Sequence[_ConvertedModules]) -> dict[str, str]:
    """Return metadata with the key `FOLDED`: alpha / rank for each rank whose modules share one value."""
    scalings_by_rank: dict[int, set[float]] = {}
    for modules in converted:
        if modules.folded_scaling is None:
            continue
        for name, tensor in modules.translated.tensors.items():
            if name.endswith(PEFT_ENDS[DOWN]):
                scalings_by_rank.setdefault(len(tensor), set()).add(modules.folded_scaling)
    common = {rank: min(values) for rank, values in scalings_by_rank.items() if len(values) == 1}
    return {FOLDED: json.dumps(common)} if common else {}


def select_format(
    options: NetworkOptions, family_name: str, module: str, texts: Mapping[str, str]
) -> LoraFormat | None:
    """Return the file format of --lora_format, or the family's default; None for another package's network.

    If the default format cannot express the network, KNOWN (the names of the known tuners) is used, and the
    reason is logged.

    Args:
        options: Options of the network.
        family_name: Name of the family.
        module: Name of the module that builds the network.
        texts: Names of the trained text encoders, by the prefix of their module names.

    Raises:
        OptionError: If the format of --lora_format cannot express the network.
    """
    family = read_family({TRAINED_ON: family_name})
    typed_name = options.lora_format
    if module not in OWN_MODULES and typed_name in (None, KNOWN):
        return None
    name = typed_name or (KNOWN if family is None else family.default_format)
    if name == KNOWN:  # this format can express all networks
        return LoraFormat(name, family)
    error = find_error(name, family, options=options, module=module, texts=texts)
    if error is None:
        return LoraFormat(name, family)
    if typed_name is None:
        logger.info(f"LoRA files get the names of the known tuners (--lora_format {KNOWN}): {error}")
        return LoraFormat(KNOWN, family)
    raise OptionError(f"--lora_format {typed_name}: {error}")


def find_error(
    name: str, family: FamilyNames | None, options: NetworkOptions, module: str, texts: Mapping[str, str]
) -> str | None:
    """Return why the format `name`, other than KNOWN, cannot express a network; None if it can.

    Args:
        name: Value of --lora_format.
        family: Names of the model's modules; None if unknown.
        options: Options of the network.
        module: Module that builds the network.
        texts: Names of the trained text encoders, by the prefix of their module names.
    """
    own_module = OWN_MODULES.get(module)
    if own_module is None:
        return (
            f"the files of --network_module {module} have that package's own names. {_OTHERWISE}, and "
            f"convert the file afterwards (convert_lora.py --target {name})"
        )
    kinds = (own_module.kind, *options.variants)
    if name == COMFYUI:
        return _find_comfyui_error(kinds, family)
    if family is None:
        return _UNKNOWN_NAMES
    for kind in kinds:
        error = diffusers.find_saving_error(kind, family, bool(texts))
        if error:
            return error
    for prefix, encoder in texts.items():
        if prefix not in family.texts_in_diffusers:
            return (
                f"diffusers' pipeline of this model cannot load LoRAs for the text encoder {encoder}, "
                f"which is trained. {_OTHERWISE}, or train only the transformer (--network_train_unet_only)"
            )
    return None


def _find_comfyui_error(kinds: Sequence[NetworkKind], family: FamilyNames | None) -> str | None:
    """Return why ComfyUI has no form for a network of a kind and its variants (such as DoRA); else None."""
    kind_error, *variant_errors = [comfyui.describe_kind(kind).saving_error for kind in kinds]
    family_error = ""
    if family is None:
        family_error = _UNKNOWN_NAMES
    elif family.not_in_comfyui:
        family_error = f"{family.not_in_comfyui}. {_OTHERWISE} or diffusers"
    return next(filter(None, (kind_error, family_error, *variant_errors)), None)

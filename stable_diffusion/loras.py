"""LoRAs and similar networks: merge them into a checkpoint's weights, or add them at run time.

Each batch can have other strengths, except for files that are merged permanently. Merging adds in float32 and
rounds once to the model's dtype; at run time the LoRA's matrices have the model's dtype.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from logging import getLogger
from pathlib import Path
from typing import Any

from torch import nn

from checkpoints.dialects import LoadPlan
from modules.console import format_count
from modules.errors import CheckpointError, OptionError
from networks.apply import LoraPatch, OriginalWeights
from networks.gated_loras import LoraBranch, attach_branches, find_parameters, fit_lora
from networks.key_formats import family_by_text_width
from networks.loading import LoraFile, WeightedLora, read_lora
from networks.module_factors import group_by_module, to_meta_tensor
from networks.module_names import read_family
from networks.names.texts import published_parameter, published_path
from networks.rounding import LoraRounding
from networks.text_loras import rename_for_encoders, select_for_network
from stable_diffusion.contract import KINDS, Model, ModelKind
from stable_diffusion.loading import CheckpointPlan
from stable_diffusion.network_options import AddedNetworkOptions
from stable_diffusion.textual_inversion import LearnedWord, read_lora_words

logger = getLogger(__name__)
OPTION = "--network_weights"
Multipliers = tuple[float, ...]


class AdjustableLoras:
    """A model's LoRAs, in the order of the options, whose strengths can change between images."""

    def __init__(
        self,
        defaults: Multipliers,
        apply_strengths: Callable[[Multipliers], None],
        layers: Sequence[Mapping[str, LoraBranch]] | None,
    ) -> None:
        """Store LoRAs whose strengths can be changed.

        Args:
            defaults: Strengths of the command line.
            apply_strengths: Makes the model compute with the given strengths.
            layers: For each LoRA, the branches that it adds to the U-Net, by diffusers' module path; None if
                LoRAs are merged into the weights, where they cannot be separated.
        """
        self._defaults = defaults
        self._apply_strengths = apply_strengths
        self._current: Multipliers | None = None  # strengths in the model; None while they are being changed
        self.layers = None if layers is None else tuple(layers)
        self.set_strengths(None)  # start with the strengths of the command line

    def __len__(self) -> int:
        return len(self._defaults)

    def resolve_strengths(self, multipliers: Multipliers | None, part: int | None = None) -> Multipliers:
        """Return the strength of each LoRA.

        Args:
            multipliers: Multipliers of a prompt (`--am`); the last one is repeated for the remaining LoRAs.
                None stands for those on the command line.
            part: Index of the only LoRA to use; None for all.

        Raises:
            OptionError: If there are too many multipliers.
        """
        strengths = self._defaults if multipliers is None else multipliers
        if len(strengths) > len(self) or not strengths:
            raise OptionError(
                f"--am has {len(strengths)} strengths for {len(self)} networks: pass one for each of "
                "--network_weights, without those that --network_merge or --network_merge_n_models fold in"
            )
        strengths = (*strengths, *[strengths[-1]] * (len(self) - len(strengths)))
        if part is None:
            return strengths
        return tuple(strength if index == part else 0.0 for index, strength in enumerate(strengths))

    def set_strengths(self, multipliers: Multipliers | None, part: int | None = None) -> None:
        """Apply the LoRAs with these strengths until the next call.

        Args:
            multipliers: Strengths of a prompt; None for the command line's.
            part: Index of the only LoRA to use; None for all.
        """
        strengths = self.resolve_strengths(multipliers, part)
        if strengths != self._current:
            self._current = None  # Ctrl-C may leave some weights with other strengths
            self._apply_strengths(strengths)
            self._current = strengths


@dataclass(frozen=True)
class _LoraTarget:
    """The U-Net or a text encoder as a target of LoRAs, with its prefix in LoRA files."""

    network: nn.Module
    prefix: str = ""  # prefix of the network's modules in LoRA files; "" for the U-Net

    def get_published_name(self, name: str) -> str:
        """Return a parameter's name in released files."""
        return published_parameter(name) if self.prefix else name

    def get_published_module(self, path: str) -> str:
        return published_path(path) if self.prefix else path


def read_networks(options: AddedNetworkOptions) -> list[LoraFile]:
    """Read the files of `--network_weights`; log their metadata if the options ask for it.

    Raises:
        CheckpointError: If a file is not a LoRA, or was trained for a model other than Stable Diffusion.
    """
    loras = []
    for path in options.files:
        lora = read_lora(path, with_texts=True, with_embeddings=True)
        family_names = [family.name for family in lora.families()]  # empty if the family is unknown
        if family_names and not {kind.name for kind in KINDS}.intersection(family_names):
            raise CheckpointError(
                f"{OPTION} {path} is a LoRA for {' or '.join(family_names)}, not for Stable Diffusion.\n"
                "  Pass a LoRA that was trained for Stable Diffusion 1.x, 2.x or XL.",
                path,
            )
        loras.append(lora)
        if options.network_show_meta:
            logger.info(f"metadata of {path}:\n{_as_json(lora.metadata)}")
    if options.network_args:
        logger.warning(
            f"--network_args {' '.join(options.network_args)} is ignored because the tensors in the files "
            "show what they are"
        )
    return loras


def read_learned_words(loras: Iterable[LoraFile]) -> tuple[LearnedWord, ...]:
    """Return the textual inversion words that LoRA files contain.

    Raises:
        CheckpointError: If a word cannot be read.
    """
    return read_lora_words({lora.path: lora.embeddings for lora in loras if lora.embeddings}, OPTION)


def check_networks(loras: Sequence[LoraFile], checkpoint_plan: CheckpointPlan) -> None:
    """Check from names and shapes, before loading, that each LoRA fits the checkpoint's networks.

    Raises:
        CheckpointError: If a LoRA was made for a different kind or size of model, or fits no layer.
    """
    check_kind(loras, checkpoint_plan.kind)
    kind = checkpoint_plan.kind
    weighted_loras = rename_for_encoders(map(WeightedLora, loras), kind.title, kind.lora_prefixes)
    if not loras:
        return
    _check_fit("", checkpoint_plan.unet, weighted_loras, checkpoint_plan.path)
    for prefix, encoder in zip(kind.lora_prefixes, checkpoint_plan.text_encoders, strict=True):
        _check_fit(prefix, encoder.load_plan, weighted_loras, checkpoint_plan.path)


def _check_fit(
    prefix: str, plan: LoadPlan[Any], weighted_loras: Sequence[WeightedLora], checkpoint: Path
) -> None:
    """Raise CheckpointError if LoRAs do not fit a network's weights; compares shapes on the meta device."""
    patch = LoraPatch(select_for_network(weighted_loras, prefix), model=checkpoint)
    published_name = published_parameter if prefix else str  # only text encoders have other names here
    for name, source in plan.sources.items():
        tensors = [to_meta_tensor(plan.checkpoint.tensors[stored_name]) for stored_name in source.names]
        patch.add_to(published_name(name), source.build_tensor(tensors))
    patch.reject_misfits()


def check_kind(loras: Sequence[LoraFile], kind: ModelKind) -> None:
    """Check that LoRAs were trained for a checkpoint's kind; warn if only their metadata says otherwise.

    Raises:
        CheckpointError: If a LoRA's tensors have the sizes of a different kind.
    """
    kinds = {known_kind.name: known_kind for known_kind in KINDS}
    for lora in loras:
        family = read_family(lora.metadata)
        family_by_width = family_by_text_width(group_by_module(lora.tensors))
        fitting_kind = None if family_by_width is None else kinds.get(family_by_width.name)
        if fitting_kind is not None and fitting_kind is not kind:
            raise CheckpointError(
                f"{OPTION} {lora.path} is a LoRA for {fitting_kind.title}, by its sizes; --ckpt is "
                f"{kind.title}.\n  Pass a LoRA that was trained for {kind.title}."
            )
        if family is not None and family.name != kind.name:
            logger.warning(
                f"{lora.path} was trained for {kinds[family.name].title}, according to {lora.evidence}, and "
                f"is used with {kind.title}: the results may be poor"
            )


def load_networks(
    options: AddedNetworkOptions, model: Model, loras: Sequence[LoraFile] | None = None
) -> AdjustableLoras | None:
    """Add the LoRAs of `--network_weights` to a model; return those whose strengths can change.

    There are three ways: --network_merge merges LoRAs into the weights once, --network_pre_calc merges them
    again for each new strength, and otherwise LoRAs compute next to the layers.

    Args:
        options: Options of the run.
        model: The loaded model.
        loras: The files, if they have been read already.

    Returns:
        The LoRAs; None if there are none, or if all are merged permanently.

    Raises:
        CheckpointError: If a file is not a LoRA or does not fit.
    """
    if not options.files:
        return None
    loras = read_networks(options) if loras is None else loras
    all_weighted_loras = map(WeightedLora, loras, options.multipliers)
    weighted_loras = rename_for_encoders(all_weighted_loras, model.kind.title, model.kind.lora_prefixes)
    merged = weighted_loras[: options.num_merged]
    adjustable = weighted_loras[options.num_merged :]
    unet = _LoraTarget(model.unet)
    text_encoders = [_LoraTarget(encoder.network, encoder.lora_prefix) for encoder in model.text_encoders]
    targets = [unet, *text_encoders]
    if merged:
        _merge(targets, merged, options.lora_rounding)
    if not adjustable:
        return None
    if options.network_pre_calc:  # LoRAs are merged again when multipliers change
        defaults = tuple(weighted.multiplier for weighted in adjustable)
        return AdjustableLoras(defaults, _make_folding(targets, adjustable, options.lora_rounding), None)
    return _add_layers(targets, adjustable, model)


def _add_layers(
    targets: Sequence[_LoraTarget], weighted_loras: Sequence[WeightedLora], model: Model
) -> AdjustableLoras:
    """Attach LoRA branches to the layers of all targets; the first target is the U-Net."""
    attached_by_target = [_attach_loras(target, weighted_loras, model) for target in targets]
    layers_by_lora: list[list[LoraBranch]] = [[] for _ in weighted_loras]  # in all networks
    for attached in attached_by_target:
        for lora_layers, layers in zip(layers_by_lora, attached, strict=True):
            lora_layers += layers.values()
    # for each LoRA, by diffusers' module path
    unet_layers = [
        {layer.target.module_path: layer for layer in layers.values()} for layers in attached_by_target[0]
    ]
    for weighted, lora_layers in zip(weighted_loras, layers_by_lora, strict=True):
        _log_added(weighted, lora_layers)

    def apply_strengths(multipliers: Multipliers) -> None:
        for lora_layers, multiplier in zip(layers_by_lora, multipliers, strict=True):
            for layer in lora_layers:
                layer.multiplier = multiplier

    defaults = tuple(weighted.multiplier for weighted in weighted_loras)
    return AdjustableLoras(defaults, apply_strengths, unet_layers)


def _merge(targets: Sequence[_LoraTarget], weighted_loras: Sequence[WeightedLora], rounding: str) -> None:
    """Merge LoRAs into network weights; `rounding` is the value of --lora_rounding."""
    for target in targets:
        target_loras = select_for_network(weighted_loras, target.prefix)
        if target_loras:
            patch = LoraPatch(target_loras, rounding=LoraRounding(rounding))
            patch.bake(target.network, target.get_published_name)
            patch.check()


def _log_added(weighted: WeightedLora, layers: Sequence[LoraBranch]) -> None:
    """Log how many modules a LoRA changes, and how many of them recompute their weights at each step."""
    num_recomputed = sum(layer.needs_full_matrix for layer in layers)
    hint = ""
    if num_recomputed:
        hint = f"; {num_recomputed} of them are computed again at each step: --network_pre_calc is faster"
    modules = format_count(len(layers), "module")
    logger.info(f"{weighted.lora.path}: added to {modules}, strength {weighted.multiplier:g}{hint}")


def _make_folding(
    targets: Sequence[_LoraTarget], weighted_loras: Sequence[WeightedLora], rounding: str
) -> Callable[[Multipliers], None]:
    """Return a function that merges LoRAs with given strengths into the networks' original weights."""
    # `rounding` is the value of --lora_rounding.
    # keep a copy of the weights that LoRAs change, and check that the LoRAs fit
    originals = []
    for target in targets:
        target_loras = select_for_network(weighted_loras, target.prefix)
        if target_loras:
            original = OriginalWeights(target_loras, target.get_published_name, rounding)
            original.keep(target.network)
            original.check()
            originals.append((target, original))

    def apply_strengths(multipliers: Multipliers) -> None:
        scaled = [
            replace(weighted, multiplier=multiplier)
            for weighted, multiplier in zip(weighted_loras, multipliers, strict=True)
        ]
        for target, original in originals:
            effective = [
                weighted for weighted in select_for_network(scaled, target.prefix) if weighted.multiplier
            ]
            original.switch(target.network, effective)

    return apply_strengths


def _attach_loras(
    target: _LoraTarget, weighted_loras: Sequence[WeightedLora], model: Model
) -> list[dict[str, LoraBranch]]:
    """Attach LoRAs to a network; return the added layers of each LoRA by module name."""
    parameters = find_parameters(target.network, target.get_published_module)
    layers_by_lora: list[dict[str, LoraBranch]] = []
    for weighted in weighted_loras:
        layers: dict[str, LoraBranch] = {}
        # the LoRA's modules for this network, if it has any
        for part in select_for_network([weighted], target.prefix):
            for name, delta in fit_lora(part.lora, parameters, OPTION).items():
                layers[name] = LoraBranch(parameters[name], delta, 1.0, weighted.lora.has_frozen_norms)
        layers_by_lora.append(layers)
    for layer in attach_branches(layers_by_lora, parameters):
        layer.switch_on(model.device, model.dtype)
    return layers_by_lora


def _as_json(metadata: Mapping[str, str]) -> str:
    def value(text: str) -> Any:
        try:
            return json.loads(text) if text[:1] in "{[" else text
        except (ValueError, RecursionError):
            return text

    return json.dumps({key: value(text) for key, text in metadata.items()}, indent=2, ensure_ascii=False)

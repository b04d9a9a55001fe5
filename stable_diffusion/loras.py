"""LoRAs and their like in a loaded checkpoint: folded into its weights, or added while it computes.

Strengths can be chosen for each batch, except of files that are folded in for good. Sums are made in float32
and rounded once to the model's dtype where weights change; added at run time, factors have the model's dtype.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from logging import getLogger
from typing import Any

from torch import nn

from modules.checkpoints.dialects import LoadPlan
from modules.console import count_of
from modules.errors import CheckpointError, OptionError
from networks.added import AddedPart, attach_parts, fitting, places
from networks.apply import LoraPatch, OriginalWeights
from networks.deltas import group_by_module, hollow
from networks.key_formats import family_by_text_width
from networks.loading import LoraFile, LoraUse, read_lora
from networks.module_names import read_family
from networks.text_loras import for_encoders, uses_for
from stable_diffusion.contract import KINDS, Model, ModelKind
from stable_diffusion.loading import OpenedCheckpoint
from stable_diffusion.network_options import AddedNetworkOptions

logger = getLogger(__name__)
OPTION = "--network_weights"
Multipliers = tuple[float, ...]
_TEXT_START = "text_model."  # Hugging Face's CLIP is one level deeper than ours


class ChosenLoras:
    """The LoRAs of a model whose strengths can be chosen, in the order of `--network_weights`."""

    def __init__(
        self,
        defaults: Multipliers,
        use: Callable[[Multipliers], None],
        layers: Sequence[Mapping[str, AddedPart]] | None,
    ) -> None:
        """defaults: strengths of the command line. use: makes the model compute with these strengths."""
        self._defaults = defaults
        self._use = use
        self._current: Multipliers | None = None  # None: none are set throughout
        # what each LoRA adds to the U-Net, by diffusers' paths of modules; None: they are folded into
        # weights, so that nothing can be done with what a single one adds
        self.layers = None if layers is None else tuple(layers)
        self.choose(None)

    def __len__(self) -> int:
        return len(self._defaults)

    def settle(self, multipliers: Multipliers | None, part: int | None = None) -> Multipliers:
        """Return the strength of each LoRA.

        multipliers: a prompt's (`--am`), the last repeated for further LoRAs; None: the command line's. part:
        the only LoRA with an effect; None: all. Raises OptionError if there are too many multipliers.
        """
        given = self._defaults if multipliers is None else multipliers
        if len(given) > len(self) or not given:
            raise OptionError(
                f"--am has {len(given)} strengths for {len(self)} networks: give one for each of "
                "--network_weights, without those that --network_merge or --network_merge_n_models fold in"
            )
        settled = (*given, *[given[-1]] * (len(self) - len(given)))
        return settled if part is None else tuple(m if i == part else 0.0 for i, m in enumerate(settled))

    def choose(self, multipliers: Multipliers | None, part: int | None = None) -> None:
        """Let the LoRAs act with these strengths, see `settle`, until others are chosen."""
        wanted = self.settle(multipliers, part)
        if wanted != self._current:
            self._current = None  # Ctrl-C may leave some weights with other strengths
            self._use(wanted)
            self._current = wanted


@dataclass(frozen=True)
class _Target:
    """A network that LoRAs change."""

    network: nn.Module
    start: str = ""  # of its modules' paths in files, beside ours
    prefix: str = ""  # of its modules in LoRA files; "" for the U-Net

    def published(self, path: str) -> str:
        return self.start + path


def read_networks(options: AddedNetworkOptions) -> list[LoraFile]:
    """Read the files of `--network_weights`; show their metadata if the options ask for it.

    Raises CheckpointError if one is no LoRA, or for a model that is no Stable Diffusion.
    """
    loras = []
    for path in options.files:
        lora = read_lora(path, with_texts=True)
        found = [family.name for family in lora.families()]
        if found and not {kind.name for kind in KINDS}.intersection(found):
            raise CheckpointError(
                f"{OPTION} {path} is a LoRA for {' or '.join(found)}, not for Stable Diffusion.\n"
                "  Give a LoRA that was trained for Stable Diffusion 1.x, 2.x or XL.",
                path,
            )
        loras.append(lora)
        if options.network_show_meta:
            logger.info(f"{path} says of itself:\n{_shown(lora.metadata)}")
    if options.network_args:
        logger.warning(
            f"--network_args {' '.join(options.network_args)} is ignored because the files say by their "
            "tensors what they are"
        )
    return loras


def check_networks(loras: Sequence[LoraFile], release: OpenedCheckpoint) -> None:
    """Compare LoRAs with the headers of the checkpoint, before it is loaded.

    Raises CheckpointError if a LoRA is of another kind or size, or fits nothing.
    """
    check_kind(loras, release.kind)
    uses = for_encoders(map(LoraUse, loras), release.kind.words, release.kind.lora_prefixes)
    texts = zip(release.kind.lora_prefixes, release.texts, strict=True)
    parts: list[tuple[str, LoadPlan[Any]]] = [
        ("", release.unet),
        *((one, text.network) for one, text in texts),
    ]
    for prefix, plan in parts if loras else ():
        patch = LoraPatch(uses_for(uses, prefix), model=release.path, is_text=bool(prefix))
        for name, source in plan.sources.items():
            tensors = [hollow(plan.checkpoint.tensors[each]) for each in source.names]
            patch.add_to((_TEXT_START if prefix else "") + name, source.make(tensors))
        patch.refuse_misfits()


def check_kind(loras: Sequence[LoraFile], kind: ModelKind) -> None:
    """Compare LoRAs with the kind of a checkpoint.

    Raises CheckpointError if one has another kind's text width, warns if its metadata name another kind.
    """
    for lora in loras:
        made = read_family(lora.metadata)
        by_width = family_by_text_width(group_by_module(lora.tensors))
        fitting_kind = next(
            (one for one in KINDS if by_width is not None and one.name == by_width.name), None
        )
        if fitting_kind is not None and fitting_kind is not kind:
            raise CheckpointError(
                f"{OPTION} {lora.path} is a LoRA for {fitting_kind.words}, by its sizes; --ckpt is "
                f"{kind.words}.\n  Give a LoRA that was trained for {kind.words}."
            )
        if made is not None and made.name != kind.name:
            words = next(each.words for each in KINDS if each.name == made.name)
            logger.warning(
                f"{lora.path} was trained for {words}, as its metadata say, and is used with {kind.words}: "
                "do not expect much of it"
            )


def load_networks(
    options: AddedNetworkOptions, model: Model, loras: Sequence[LoraFile] | None = None
) -> ChosenLoras | None:
    """Put the files of `--network_weights` into a model; return those whose strengths can be chosen.

    loras: the files, if they are read already. Returns None if there are none, or if all are folded in for
    good. Raises CheckpointError if a file is no LoRA or does not fit.
    """
    if not options.files:
        return None
    loras = read_networks(options) if loras is None else loras
    all_uses = map(LoraUse, loras, options.multipliers)
    uses = for_encoders(all_uses, model.kind.words, model.kind.lora_prefixes)
    merged, adjustable = uses[: options.num_merged], uses[options.num_merged :]
    targets = [
        _Target(model.unet),
        *(_Target(tower.network, _TEXT_START, tower.lora_prefix) for tower in model.texts),
    ]
    for target in targets if merged else ():
        if given := uses_for(merged, target.prefix):
            patch = LoraPatch(given)
            patch.bake(target.network, target.published)
            patch.check()
    if not adjustable:
        return None
    defaults = tuple(use.multiplier for use in adjustable)
    if options.network_pre_calc:
        return ChosenLoras(defaults, _folded(targets, adjustable), None)
    parts = [_added(target, adjustable, model) for target in targets]
    for index, use in enumerate(adjustable):
        own = [part for target in parts for part in target[index].values()]
        whole = sum(part.is_made_whole for part in own)
        hint = f"; {whole} of them are made anew at each step: --network_pre_calc is faster" if whole else ""
        logger.info(
            f"{use.lora.path}: added to {count_of(len(own), 'module')}, strength {use.multiplier:g}{hint}"
        )

    def use_multipliers(multipliers: Multipliers) -> None:
        for target in parts:
            for one, multiplier in zip(target, multipliers, strict=True):
                for part in one.values():
                    part.multiplier = multiplier

    layers = [{part.place.module_path: part for part in one.values()} for one in parts[0]]
    return ChosenLoras(defaults, use_multipliers, layers)


def _folded(targets: Sequence[_Target], uses: Sequence[LoraUse]) -> Callable[[Multipliers], None]:
    originals = []
    for target in targets:
        given = uses_for(uses, target.prefix)
        if given:
            original = OriginalWeights(given, target.published)
            original.keep(target.network)
            original.check()
            originals.append((target, original))

    def use_multipliers(multipliers: Multipliers) -> None:
        scaled = [replace(use, multiplier=one) for use, one in zip(uses, multipliers, strict=True)]
        for target, original in originals:
            original.switch(
                target.network, [use for use in uses_for(scaled, target.prefix) if use.multiplier]
            )

    return use_multipliers


def _added(target: _Target, uses: Sequence[LoraUse], model: Model) -> list[dict[str, AddedPart]]:
    """Attach each file's LoRA to a network; return what each adds, by our names of modules."""
    known = places(target.network, target.published)
    parts = []
    for use in uses:
        found = [fitting(part.lora, known, OPTION) for part in uses_for([use], target.prefix)]
        factors = found[0] if found else {}
        is_frozen = use.lora.has_frozen_norms
        parts.append({name: AddedPart(known[name], one, 1.0, is_frozen) for name, one in factors.items()})
    for layer in attach_parts(parts, known):
        layer.switch_on(model.device, model.dtype)
    return parts


def _shown(metadata: Mapping[str, str]) -> str:
    def value(text: str) -> Any:
        try:
            return json.loads(text) if text[:1] in "{[" else text
        except (ValueError, RecursionError):
            return text

    return json.dumps({key: value(text) for key, text in metadata.items()}, indent=2, ensure_ascii=False)

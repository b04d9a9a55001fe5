"""Add LoRAs to the weights of a model, which are handed over one by one while it is loaded or copied."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from logging import getLogger
from pathlib import Path

import torch
from torch import Tensor

from modules.errors import CheckpointError, OptionError
from networks.changes import Change, blocks, fit, leaves
from networks.deltas import other_channels
from networks.key_formats import OURS, module_of_tensor, rename_modules
from networks.loading import (
    LoraFile,
    list_some,
    read_lora,
    warn_of_absent,
    warn_of_other_expert,
    warn_of_other_family,
)
from networks.module_names import Relative, choose_family, relatives
from networks.names.layouts import FIRST_LAYERS, FamilyNames
from networks.options import LoraOptions, LoraPatternOptions

logger = getLogger(__name__)
# HunyuanVideo in diffusers' layout has no name that FramePack has not too; FramePack has more
LIKELY_MODEL = "hunyuan_video"


@dataclass(frozen=True)
class LoraUse:
    """One LoRA file and how it is used.

    Patterns are regular expressions searched in its tensor names (ours). Where the model calls a module
    otherwise, as FramePack does HunyuanVideo's, its name counts too: a pattern may be written for either, and
    choose a part of a fused module. Raises OptionError where a pattern is none.
    """

    lora: LoraFile
    multiplier: float = 1.0
    include: str | None = None
    exclude: str | None = None

    def __post_init__(self) -> None:
        for pattern in (self.include, self.exclude):
            try:
                re.compile(pattern or "")
            except re.error as error:
                raise OptionError(
                    f"a LoRA pattern for {self.lora.path} is no regular expression: {error}"
                ) from None

    def for_expert(self, expert: str | None) -> "LoraUse":
        """Return the same for an expert's part of the file, if it has parts, and warn if it is another one's.

        Raises as `LoraFile.for_expert`.
        """
        lora = self.lora.for_expert(expert)
        warn_of_other_expert(lora, expert)
        return replace(self, lora=lora)

    def keeps(self, factors: Iterable[str], *names: str) -> bool:
        """Whether the patterns keep one of a module's factors; names: what the module is called, by the file
        and by the model.
        """
        return any(self._keeps([f"{name}.{factor}" for name in names]) for factor in factors)

    def _keeps(self, tensor: Sequence[str]) -> bool:
        included = self.include is None or any(re.search(self.include, name) for name in tensor)
        return included and (
            self.exclude is None or not any(re.search(self.exclude, name) for name in tensor)
        )


class LoraPatch:
    """Adds LoRAs to weights that it is handed by name: `patch(name, weight) -> weight`, a `WeightPatch`.

    W + multiplier * (alpha / rank) * up @ down, summed in float32 on the weight's device, rounded once to the
    weight's dtype. DoRA gives multiplier * (new weight - W); the changes of several files all start from W.
    After loading, `check()` tells what found no weight.
    """

    def __init__(
        self,
        uses: Sequence[LoraUse],
        parameter_names: Iterable[str] | None = None,
        model: Path | None = None,
        is_text: bool = False,
    ) -> None:
        """parameter_names: of a file in another layout than ours, such as the diffusers one. model: its file,
        for messages. is_text: it is a text encoder, whose names no family has.
        """
        self._uses = tuple(uses)
        self._is_text = is_text
        self._path = model
        self._model = "this model" if model is None else str(model)
        # "lora_unet_blocks_0_ffn_0.weight" -> what is added to it
        self._changes: dict[str, list[tuple[LoraUse, Change]]] = {}
        for use in uses:
            for module, factors in use.lora.modules().items():
                for leaf, delta in leaves(factors).items():
                    change = Change(use.lora.path, use.multiplier, factors, delta)
                    self._changes.setdefault(f"{module}.{leaf}", []).append((use, change))
        self._seen: set[str] = set()  # keys that a weight handed over has in one layout or another
        # use -> those of its keys that change something
        self._taken: dict[int, set[str]] = {id(use): set() for use in uses}
        # use -> how many channels its first layer takes, if that is another number than the model's
        self._narrower: dict[int, str] = {}
        self._modules: dict[str, None] = {}  # of the model, as far as weights were handed over
        self._renamed = rename_modules(module_of_tensor(name)[0] for name in parameter_names or ())

    def __call__(self, name: str, weight: Tensor) -> Tensor:
        """Return the changed weight, a new tensor, or `weight` if nothing changes it. Raises as `add_to`."""
        if self.touches(name):
            return self.add_to(name, weight.clone())
        self._note(name)
        return weight

    def add_to(self, name: str, weight: Tensor) -> Tensor:
        """Change the weight in place and return it; on the meta device, only compare shapes.

        Works on some rows at a time, so that memory holds no second copy. A change of the first layer for
        another number of channels is left out, which `check` tells. Raises CheckpointError if a LoRA has
        another size.
        """
        self._note(name)
        changes = []
        for key, use, change, relative in self._changes_of(name):
            if name.endswith(FIRST_LAYERS) and (other := other_channels(change.factors, weight)) is not None:
                self._narrower[id(use)] = other
                continue
            self._taken[id(use)].add(key)
            changes.append(fit(change, relative, weight, name, self._model).on(weight.device))
        for rows in () if weight.is_meta else blocks(weight, changes):
            part = weight if rows is None else weight[rows]
            total = torch.zeros(part.shape, dtype=torch.float32, device=part.device)
            for change in changes:
                change.add_to(total, rows, part)
            part.copy_(total.add_(part))
        return weight

    def touches(self, name: str) -> bool:
        """Whether a LoRA changes the parameter with this name."""
        return any(True for _ in self._changes_of(name))

    def unused(self) -> list[str]:
        """Return the parts of LoRAs without a weight so far, as `file: module.weight`."""
        return [
            f"{use.lora.path.name}: {key}"
            for use in self._uses
            for key in self._keys(use)
            if key not in self._seen
        ]

    def check(self) -> None:
        """Warn of parts of LoRAs without a weight, and of LoRAs for another model.

        Raises CheckpointError if no part of a LoRA has a weight.
        """
        self.refuse_misfits()
        family = choose_family(self._modules, LIKELY_MODEL)
        for use in self._uses:
            path, keys = use.lora.path, self._keys(use)
            missed = [key for key in keys if key not in self._seen]
            taken = self._taken[id(use)]
            if not keys and use.lora.text_tensors:
                continue  # it changes text encoders alone
            if id(use) in self._narrower:
                logger.warning(f"{path}: {self._narrower[id(use)]}; the rest is used without it")
            if not taken:
                logger.warning(f"{path} changes nothing, because its patterns leave no tensor that fits")
            else:
                logger.info(f"{path}: {len(taken)} weights changed, multiplier {use.multiplier:g}")
                warn_of_other_family(use.lora, family)
                warn_of_absent(path, missed, len(keys), f"weights are not in {self._model}", family)

    def refuse_misfits(self) -> None:
        """Raise CheckpointError if no part of a LoRA has a weight."""
        for use in self._uses:
            keys = self._keys(use)
            if keys and not self._seen.intersection(keys):
                raise self._misfit(use.lora, keys, choose_family(self._modules, LIKELY_MODEL))

    def _misfit(self, lora: LoraFile, missed: Sequence[str], family: FamilyNames | None) -> CheckpointError:
        """Return the error for a model and a LoRA that have nothing in common."""
        if self._path is not None and family is None and not self._is_text:
            return CheckpointError(
                f"{self._model} is no transformer that a LoRA could be added to: it has modules such as "
                f"{list_some(list(self._modules), 3)}.\n  Give the model's own file.",
                self._path,
            )
        if self._is_text:
            missed = [key.removeprefix(OURS) for key in missed]
        made = lora.family()
        kinds = (
            ""
            if made is None or family is None or made is family
            else f" It is for {made.name}, the model is {family.name}."
        )
        return CheckpointError(
            f"{lora.path} does not fit {self._model}, which has none of its {len(missed)} weights, such as "
            f"{list_some(missed, 2)}."
            f"{kinds}\n  Give a LoRA that was trained for this model.",
            self._path or lora.path,
        )

    def _note(self, name: str) -> None:
        """Remember a weight of the model."""
        self._modules.setdefault(self._own(name)[0])
        self._seen.update(key for key, _ in self._keys_of(name))

    def _own(self, name: str) -> tuple[str, str]:
        """(module under our name, leaf) of a parameter."""
        module, leaf = module_of_tensor(name)
        return self._renamed.get(module, module), leaf

    def _keys_of(self, name: str) -> Iterator[tuple[str, Relative | None]]:
        """Names under which LoRAs change a parameter: its own, and those of its parts or of what it is part
        of in other layouts.
        """
        module, leaf = self._own(name)
        yield f"{OURS}{module}.{leaf}", None
        for relative in relatives(module):
            yield f"{OURS}{relative.name}.{leaf}", relative

    def _changes_of(self, name: str) -> Iterator[tuple[str, LoraUse, Change, Relative | None]]:
        """What changes a parameter, by key, as far as the patterns keep it under its name in the file and in
        the model.
        """
        own = OURS + self._own(name)[0]
        for key, relative in self._keys_of(name):
            for use, change in self._changes.get(key, []):
                if use.keeps(change.factors, key.partition(".")[0], own):
                    yield key, use, change, relative

    def _keys(self, use: LoraUse) -> list[str]:
        """Return the keys of a file that the patterns keep."""
        return [
            key
            for key, changes in self._changes.items()
            for owner, change in changes
            if owner is use
            and (key in self._taken[id(use)] or use.keeps(change.factors, key.partition(".")[0]))
        ]


def lora_uses(
    loras: LoraOptions, patterns: LoraPatternOptions | None = None, with_texts: bool = False
) -> list[LoraUse]:
    """Read the files of `--lora_weight`; return each with its multiplier and patterns.

    with_texts: what they change in text encoders too.
    """
    files = loras.lora_weight or ()
    includes = _per_file(files, patterns.include_patterns if patterns else None, "--include_patterns")
    excludes = _per_file(files, patterns.exclude_patterns if patterns else None, "--exclude_patterns")
    rows = zip(files, loras.multipliers(), includes, excludes, strict=True)
    return [
        LoraUse(read_lora(path, by_expert=True, with_texts=with_texts), multiplier, include, exclude)
        for path, multiplier, include, exclude in rows
    ]


def _per_file(files: Sequence[Path], patterns: Sequence[str] | None, option: str) -> list[str | None]:
    """Return one pattern per file; None for files without one."""
    given = list(patterns or ())
    if len(given) > len(files):
        raise OptionError(
            f"{option} has {len(given)} patterns for {len(files)} LoRA files: give one per file, in the same "
            "order"
        )
    return [*given, *[None] * (len(files) - len(given))]

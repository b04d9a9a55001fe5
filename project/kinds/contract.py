"""Kinds of runs: a LoRA, or another value of `new --train`. Imports no torch."""

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from downloads.catalogue import ModelSet
from modules import installation

# prefixes of options that only LoRA runs have
LORA_OPTION_PREFIXES = ("network_", "lora_format")


def drop_lora_options(values: Mapping[str, Any], memory: float) -> dict[str, Any]:
    """Return the training options without those that only a LoRA has.

    `memory`, the GPU memory in GiB, has no effect.
    """
    return {name: value for name, value in values.items() if not name.startswith(LORA_OPTION_PREFIXES)}


def find_catalog_command(key: str, model: ModelSet) -> list[str]:
    """Return the script and options of a model for a kind of run; [] if the model catalog has none.

    `key` is the catalog key of the kind of run.
    """
    return shlex.split(model.properties.get(key, ""))


def find_lora_script(model: ModelSet) -> list[str]:
    """Return the script that trains a LoRA for a model, as the first word of a command."""
    return [next(word for word in shlex.split(model.commands["train"]) if word.endswith(".py"))]


def find_reason(key: str, title: str, model: ModelSet, memory: float) -> str | None:
    """Return why a model does not support this kind of run; None if it does.

    `key` is the model catalog's key for this kind, and `title` its name in messages.
    """
    return None if find_catalog_command(key, model) else f"new does not set up {title} for {model.title}"


def _describe_nothing(model: ModelSet, memory: float) -> list[str]:
    return []


@dataclass(frozen=True)
class RunKind:
    """What a run trains (LoRA, full model ...), and how its options differ from a LoRA run's."""

    name: str  # value of --train
    title: str  # in sentences: "a ControlNet"
    # script that trains it, and options that differ from a LoRA's; empty if the model has no script
    find_training_command: Callable[[ModelSet], list[str]]
    # reason why it cannot be trained with so many GiB of GPU memory (0: a CPU); None if it can
    why_unsupported: Callable[[ModelSet, float], str | None]
    # converts the options of a LoRA run to options of this kind, for the given memory
    adapt_options: Callable[[Mapping[str, Any], float], dict[str, Any]]
    # lines about memory, disk and data, for the given memory
    describe: Callable[[ModelSet, float], list[str]] = _describe_nothing
    architecture_suffix: str = ""  # suffix of `modelspec.architecture` in its trained files
    switch: str = ""  # option that distinguishes its command from a LoRA's, if they share a script
    uses_control_images: bool = False  # whether it is trained on pairs of an image and a control image
    inpaints_images: bool = False  # whether each image is its own control image, to repaint
    trains_embedding: bool = False  # the trigger word itself is trained, and all captions contain it
    needs_bfloat16: bool = False  # its weights are trained in bfloat16
    saves_large_files: bool = False  # each save takes gigabytes, so few are written and kept
    supports_few_step_targets: bool = False  # it can use targets that preserve a distilled model's few steps
    # it reverts a distillation, so that other LoRAs can be trained on top
    makes_training_adapter: bool = False

    def find_script(self, model: ModelSet) -> Path | None:
        """Return the script that trains this kind of run for a model; None if there is none."""
        words = self.find_training_command(model)
        return installation.find_script(words[0]) if words else None

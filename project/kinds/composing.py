"""The kinds of runs, one line for each."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from downloads.catalogue import ModelSet
from project.kinds.contract import RunKind
from project.kinds.control_networks import CONTROL_NET, LLLITE
from project.kinds.embedding import EMBEDDING
from project.kinds.whole_model import WHOLE


def _find_lora_script(model: ModelSet) -> list[str]:
    return [next(word for word in shlex.split(model.commands["train"]) if word.endswith(".py"))]


def _leave_values(values: Mapping[str, Any], memory: float) -> dict[str, Any]:
    return dict(values)


LORA = RunKind(
    name="lora",
    title="a LoRA",
    find_words=_find_lora_script,
    why_not=lambda model, memory: None,
    change=_leave_values,
    has_targets=True,
)
KINDS = (LORA, LLLITE, CONTROL_NET, EMBEDDING, WHOLE)  # of control networks, the first is the usual one
BY_NAME = {kind.name: kind for kind in KINDS}


def list_kinds(model: ModelSet) -> list[RunKind]:
    """Return the kinds of runs that a model has a script for."""
    return [kind for kind in KINDS if kind.find_script(model) is not None]


def find_control_kind(model: ModelSet) -> RunKind | None:
    """Return the kind of a run that pairs with control pictures make, if nothing is typed."""
    return next((kind for kind in list_kinds(model) if kind.sees_controls), None)


def find_kind(model: ModelSet, script: str) -> RunKind:
    """Return the kind of the run that a script trains for a model; a LoRA for an unknown one."""
    return next((kind for kind in list_kinds(model) if kind.find_words(model)[0] == script), LORA)


def list_scripts(models: Sequence[ModelSet]) -> set[Path | None]:
    """Return the scripts that train the kinds of runs of some models."""
    return {kind.find_script(model) for model in models for kind in KINDS}

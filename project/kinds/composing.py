"""The kinds of runs, one line for each."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from downloads.catalogue import ModelSet
from project.kinds.adapter import ADAPTER
from project.kinds.contract import RunKind, find_lora_script
from project.kinds.control_networks import CONTROL_NET, LLLITE, LLLITE_INPAINTING
from project.kinds.embedding import EMBEDDING
from project.kinds.whole_model import FULL
from project.options import find_models


def _leave_values(values: Mapping[str, Any], memory: float) -> dict[str, Any]:
    return dict(values)


LORA = RunKind(
    name="lora",
    title="a LoRA",
    find_training_command=find_lora_script,
    why_unsupported=lambda model, memory: None,
    adapt_options=_leave_values,
    architecture_suffix="lora",
    supports_few_step_targets=True,
)
# the first control network is the default one
KINDS = (
    LORA,
    ADAPTER,
    LLLITE,
    LLLITE_INPAINTING,
    CONTROL_NET,
    EMBEDDING,
    FULL,
)
BY_NAME = {kind.name: kind for kind in KINDS}


def list_kinds(model: ModelSet) -> list[RunKind]:
    """Return the kinds of training runs for which a model has a script."""
    return [kind for kind in KINDS if kind.find_script(model) is not None]


def find_control_kind(model: ModelSet) -> RunKind | None:
    """Return the kind of run for a folder with control images; None if the model supports none."""
    return next((kind for kind in list_kinds(model) if kind.uses_control_images), None)


def find_run_kind(commands: Sequence[Sequence[str]]) -> RunKind:
    """Return the kind of run that the last command (training) starts; LORA if unknown."""
    words = commands[-1] if commands else ()
    switched = [kind for kind in KINDS if kind.switch in words]
    if switched:
        return switched[0]
    return kinds_by_script().get(words[1], LORA) if len(words) > 1 else LORA


@cache
def kinds_by_script() -> dict[str, RunKind]:
    """Return the kind of training run for each training script; LORA if several kinds share the script."""
    kinds: dict[str, RunKind] = {}
    for model in find_models():
        for kind in list_kinds(model):
            kinds.setdefault(kind.find_training_command(model)[0], kind)
    return kinds

"""`new --train adapter`: train a training adapter, a LoRA that unlearns a distillation, for other LoRAs.

Sources of the settings: the cards of SimpleTuner's assistants for Qwen-Image-2.1 and of ShootTheSound's
adapter for MiniMax-H3-Image: plain flow matching, AdamW at 1e-4, gradients clipped at 1, rank = alpha, an
average of the weights.
"""

from collections.abc import Mapping
from typing import Any

from downloads.catalogue import ModelSet
from project.kinds.contract import RunKind, find_lora_script

RECIPE: Mapping[str, Any] = {
    "network_dim": 32,
    "network_alpha": 32,
    "learning_rate": 1e-4,
    "max_grad_norm": 1.0,
    "gradient_accumulation_steps": 4,
    "ema_decay": 0.998,
    "lora_format": "comfyui",  # without alphas, as published adapters are
}
ADAPTER_NAME_SUFFIX = "_training_adapter_v1"  # suffix of its file name, as in published adapters


def _find_training_command(model: ModelSet) -> list[str]:
    """Return the script that trains an adapter for a distilled model; [] for others or if one exists."""
    return find_lora_script(model) if model.properties.get("distilled") and not model.has_adapter else []


def _why_not(model: ModelSet, memory: float) -> str | None:
    if model.has_adapter:
        return f"{model.title} is trained with one already: pass the task without it"
    if not model.properties.get("distilled"):
        return f"{model.title} was not distilled, so there is nothing to unlearn"
    return None


def _set_adapter_options(values: Mapping[str, Any], memory: float) -> dict[str, Any]:
    return {**values, **RECIPE}


ADAPTER = RunKind(
    name="adapter",
    title="a training adapter",
    find_training_command=_find_training_command,
    why_unsupported=_why_not,
    adapt_options=_set_adapter_options,
    architecture_suffix="lora",
    makes_training_adapter=True,
)

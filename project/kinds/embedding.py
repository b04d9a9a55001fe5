"""`new --train embedding`: train a word, its vectors in the text encoders (textual inversion).

Stable Diffusion has scripts for it, which the catalogue names; other models have their script of LoRAs.
"""

import shlex

from downloads.catalogue import ModelSet
from project.kinds.contract import RunKind, drop_lora_options, find_lora_script

ALONE = "--embedding_only"
EMBEDDING_ARGUMENTS = f"{ALONE} --train_embedding {{word}} --embedding_vectors 4 --learning_rate 1e-3"


def _find_training_command(model: ModelSet) -> list[str]:
    """Return the script and options that train an embedding; [] if the model does not support it."""
    named = model.properties.get("embedding")
    if named is not None:
        return shlex.split(named)
    return [*find_lora_script(model), *shlex.split(EMBEDDING_ARGUMENTS)]


def _why_not(model: ModelSet, memory: float) -> str | None:
    if _find_training_command(model):
        return None
    if model.has_adapter:
        return "an embedding cannot use a training adapter: choose the task without it"
    return f"{model.title} reads captions together with images, which cannot train a word"


EMBEDDING = RunKind(
    name="embedding",
    title="an embedding",
    find_training_command=_find_training_command,
    why_unsupported=_why_not,
    adapt_options=drop_lora_options,
    architecture_suffix="textual-inversion",
    switch=ALONE,
    trains_embedding=True,
)

"""Describe the tensors of a LoRA file that a reader or a model does not use, sorted by kind."""

import re
from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple

from networks import module_names
from networks.names.layouts import (
    CLIP_LAYER_PREFIX,
    LANGUAGE_MODEL_LAYER_PREFIX,
    OURS,
    T5_LAYER_PREFIX,
    FamilyNames,
)
from networks.names.texts import TEXT_PROJECTION
from networks.tensor_names import strip_known_prefixes
from protocols.bundled_embeddings import BUNDLE, get_embedding_word

# consequence if the reason is unknown
_UNKNOWN_CONSEQUENCE = (
    "it is damaged or for another model, so it does not have the effect that it was trained for. Copy it "
    "again, or pass a LoRA for this model."
)
_WORD_EMBEDDINGS = ("emb_params", BUNDLE, "string_to_param")  # prefixes of names in several programs' files
# levels that PEFT adds to the path of a module
_PEFT_LEVEL = re.compile(r"\.(?:base_layer|original_module|modules_to_save(?:\.[^.]+)?)$")
_LEAVES = (".weight", ".bias")


class UnusedReason(NamedTuple):
    """Why tensors of a LoRA file are ignored, as the end of a warning, such as "are of another network"."""

    description: str
    consequence: str = ""  # sentence to add if many tensors are of this kind


def group_by_reason(
    names: Iterable[str], explain: Callable[[str], UnusedReason]
) -> dict[UnusedReason, list[str]]:
    """Group tensor names by the reason that `explain` returns for each."""
    names_by_reason: dict[UnusedReason, list[str]] = {}
    for name in names:
        names_by_reason.setdefault(explain(name), []).append(name)
    return names_by_reason


def explain_unused_tensor(family: FamilyNames | None, key: str) -> UnusedReason:
    """Return why a tensor is not part of a LoRA; the description follows the word "tensors" in messages.

    Args:
        family: Family of the LoRA; None if unknown.
        key: Name of the tensor in the file.
    """
    leaf = next((leaf for leaf in _LEAVES if key.endswith(leaf)), "")
    path = strip_known_prefixes(_PEFT_LEVEL.sub("", key.removesuffix(leaf))).path
    name = path.replace(".", "_")
    our_name = name if family is None else module_names.from_alias(name, family)
    text_module = module_names.describe_text_module(our_name)
    if text_module:
        return UnusedReason(f"are weights of {text_module}, not changes, and are ignored")
    if path.startswith(_WORD_EMBEDDINGS):
        return UnusedReason(f"are word embeddings and are ignored{_advise_on_word(key)}")
    if module_names.is_known_module(name):
        # Why a complete weight of the model, instead of a change, is ignored
        kind = "weights"
        if leaf == ".bias":
            kind = "biases"
        elif "norm" in name:
            kind = "norms"
        return UnusedReason(
            f"are complete {kind} of the model, not changes, and are ignored",
            f"complete {kind} are not part of a LoRA, but it was trained together with them. Save only the "
            "change with the program that made it.",
        )
    module, dot, part = path.rpartition(".")
    # a known module with an unknown factor: an unsupported kind of adapter
    if dot and module_names.is_known_module(module.replace(".", "_")):
        return UnusedReason(
            f"are parts of layers called {part}, which are not supported, and are ignored",
            f"the effect of {part} on a layer is not known. Save a plain LoRA with the program that made it.",
        )
    if leaf and dot:  # a weight or bias of an unknown module
        network_prefix = path.partition(".")[0]
        network = key[: key.index(network_prefix)] + network_prefix
        return UnusedReason(f"belong to another network, {network}, and are ignored")
    return UnusedReason("are not part of a LoRA and are ignored", _UNKNOWN_CONSEQUENCE)


def _advise_on_word(key: str) -> str:
    """Return the end of a warning about a trained word (embedding) in a LoRA file; "" for other keys."""
    word = get_embedding_word(key)
    if not word:
        return ""
    return (
        f", so that {word} means nothing in a prompt here. The scripts that generate with Stable Diffusion "
        "know the word if this file is one of their LoRAs; strength 0 adds only its words"
    )


def explain_absent_module(
    model: FamilyNames | None, has_text_modules: bool, names_without_numbers: Collection[str], name: str
) -> UnusedReason:
    """Return why the model has no module for a LoRA's tensor or module.

    Args:
        model: Family of the model; None if unknown.
        has_text_modules: Whether the model has modules that are loaded with the text encoder.
        names_without_numbers: Results of `without_numbers` for the model's modules.
        name: Name of the tensor or module, such as `lora_unet_x.weight` or `lora_unet_x`.
    """
    module, _, leaf = name.removeprefix(OURS).partition(".")
    # such as connectors between text encoder and transformer
    text_modules = "" if has_text_modules else module_names.describe_text_module(module)
    if text_modules:
        return UnusedReason(
            f": they change {text_modules}, which process texts before the transformer, and are not used "
            "here. To use them, merge the LoRA into the model's file with merge_lora.py, and cache texts "
            "with that file"
        )
    # the model has the same layer in blocks with other indices, so its depth differs
    is_other_size = without_numbers(module) in names_without_numbers
    if model is not None and not is_other_size and module_names.is_optional(module, model):
        return UnusedReason(f": they are for {model.optional_description}; the rest is used without them")
    if model is not None and module_names.has_module(module, model):
        # The reason for a module or bias that only other models of the same family have
        if leaf == "bias":
            return UnusedReason(
                ": they are biases, which these layers do not have in this model", "its biases are left out."
            )
        return UnusedReason(
            f": other models of {model.name} have them",
            f"it is for another model of {model.name}, with other layers. Pass a LoRA for this one.",
        )
    # a model of another family
    families = [family.name for family in module_names.FAMILIES if module_names.has_module(module, family)]
    if families:
        names = " or ".join(families)
        return UnusedReason(f": they belong to {names}", f"it is for {names}. Pass a LoRA for this model.")
    return UnusedReason(
        ": no known model has layers of these names",
        "its other layers belong to an unknown network.",
    )


_ENCODERS = {
    "lora_te": "the text encoder",
    "lora_te1": "the first text encoder",
    "lora_te2": "the second text encoder",
    "lora_te3": "the T5 text encoder",
}


def explain_absent_text_module(name: str) -> UnusedReason:
    """Return why the text encoder has no module for a LoRA's tensor or module.

    Args:
        name: Name of the tensor or module, such as `lora_te2_text_projection.weight`.
    """
    module = name.partition(".")[0]
    # such as `lora_te2`
    prefix = "_".join(module.split("_")[:2])
    path = module.removeprefix(f"{prefix}_")
    encoder = _ENCODERS.get(prefix, "a text encoder")
    if path == TEXT_PROJECTION:
        return UnusedReason(f": they are the projection of {encoder}, which this model does not use")
    if path.startswith((CLIP_LAYER_PREFIX, T5_LAYER_PREFIX, LANGUAGE_MODEL_LAYER_PREFIX)):
        return UnusedReason(f": {encoder} of this model has no such layers")
    return UnusedReason(f": no known text encoder has layers of these names ({encoder})")


def is_projection(names: Iterable[str]) -> bool:
    """Return whether all of these module or weight names belong to a text encoder's projection."""
    return all(get_module_name(name) == TEXT_PROJECTION for name in names)


def without_numbers(module: str) -> str:
    """Replace each number in a name with 0, so that the same module has the same name in all blocks."""
    return re.sub(r"\d+", "0", module)


def get_module_name(name: str) -> str:
    """Return the module that a LoRA tensor belongs to, without our name prefix."""
    return name.removeprefix(OURS).partition(".")[0]


def list_lacking(names: Iterable[str], weights: Collection[str], model: FamilyNames | None) -> list[str]:
    """Return those names of a LoRA that belong to optional modules that a model lacks.

    Args:
        names: Names of the LoRA's tensors or modules.
        weights: Names of the model's tensors.
        model: Family of the model; None if unknown.
    """
    # underscored names of modules
    existing = {name.removesuffix(".weight").replace(".", "_") for name in weights}
    if model is None or not existing:
        return []
    absent: list[str] = []
    for name in dict.fromkeys(names):
        module = get_module_name(name)
        if module not in existing and module_names.is_optional(module, model):
            absent.append(name)
    return absent


def describe_text_side(names: Iterable[str]) -> str:
    """Describe the module group of all names if it is loaded with the text encoder; else ""."""
    # "": of the transformer
    model_parts = {module_names.describe_text_module(get_module_name(name)) for name in names}
    return model_parts.pop() if len(model_parts) == 1 else ""

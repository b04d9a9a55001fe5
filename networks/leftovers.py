"""Tensors of a LoRA file that a reader or a model has no use for, sorted by what they are."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from networks import module_names
from networks.key_formats import OURS, bare_path
from networks.names.layouts import FamilyNames

# if nothing better is known
NOT_KNOWN = (
    "it is damaged or for another model, and does not do here what it was trained for. Copy it again, or "
    "give a LoRA for this model."
)
_OF_WORDS = ("emb_params", "bundle_emb", "string_to_param")  # embeddings of words, in several programs' files
_IN_PEFT = re.compile(
    r"\.(?:base_layer|original_module|modules_to_save(?:\.[^.]+)?)$"
)  # behind a module's path
_LEAVES = (".weight", ".bias")


@dataclass
class Leftovers:
    """Tensors of one kind."""

    words: str  # what they are, for messages: "... tensors {words}"
    loss: str  # what it means that many are left out, for a louder message; "" if the rest is whole
    names: list[str] = field(default_factory=list)


def sort_tensors(keys: Iterable[str], family: FamilyNames | None) -> list[Leftovers]:
    """Sort tensors of a file that are no part of a LoRA. family: the LoRA's."""
    found: dict[str, Leftovers] = {}
    for key in keys:
        words, loss = _kind_of_tensor(key, family)
        found.setdefault(words, Leftovers(words, loss)).names.append(key)
    return list(found.values())


def _kind_of_tensor(key: str, family: FamilyNames | None) -> tuple[str, str]:
    leaf = next((leaf for leaf in _LEAVES if key.endswith(leaf)), "")
    path = bare_path(_IN_PEFT.sub("", key.removesuffix(leaf)))
    name = module_names.replace_dots(path)
    if beside := module_names.on_text_side(name if family is None else module_names.alias(name, family)):
        return f"are whole weights of {beside}, no changes of them, and are ignored", ""
    if path.startswith(_OF_WORDS):
        return "are embeddings of words and are ignored", ""
    if module_names.is_name(name):
        kind = "biases" if leaf == ".bias" else "norms" if "norm" in name else "weights"
        return f"are whole {kind} of the model, no changes of them, and are ignored", (
            f"whole {kind} are no part of a LoRA, and it was trained together with them. Save the change "
            "alone with its program."
        )
    start, dot, _ = path.partition(".")
    module, dot_behind, part = path.rpartition(".")
    if not leaf and dot_behind and module_names.is_name(module_names.replace_dots(module)):
        return f"are parts of layers called {part}, which are not known here, and are ignored", (
            f"what {part} does to a layer is not known here. Save the LoRA as a plain one with its program."
        )
    if not dot or not leaf:
        return "are no part of a LoRA and are ignored", NOT_KNOWN
    return f"are of another network, {key[: key.index(start)]}{start}, and are ignored", ""


def sort_modules(
    names: Iterable[str], what: str, model: FamilyNames | None, holds_side: bool = False
) -> list[Leftovers]:
    """Sort parts of a LoRA that a model lacks, `lora_unet_x.weight` or `lora_unet_x`.

    what: as in "4 of 24 {what}". model: its family. holds_side: whether it has the text encoder's side.
    """
    found: dict[str, Leftovers] = {}
    for name in names:
        words, loss = _kind_of_module(*name.removeprefix(OURS).partition(".")[::2], model, holds_side)
        found.setdefault(words, Leftovers(what + words, loss)).names.append(name)
    return list(found.values())


def _kind_of_module(module: str, leaf: str, model: FamilyNames | None, holds_side: bool) -> tuple[str, str]:
    if model is not None and module_names.is_optional(module, model):
        return f": they are for {model.optional_words}; the rest is used without them", ""
    if not holds_side and (words := module_names.on_text_side(module)):
        return (
            f": they change {words}, which read the texts before the transformer, and are not used here. To "
            "have them, merge it into the model's file with merge_lora.py, and cache texts with that file"
        ), ""
    if model is not None and module_names.has_module(module, model):
        if leaf == "bias":
            return ": they are biases, which these layers do not have here", "its biases are left out."
        return f": other models of {model.name} have them", (
            f"it is for another model of {model.name}, with other layers. Give a LoRA for this one."
        )
    others = [one.name for one in module_names.FAMILIES if module_names.has_module(module, one)]
    if others:
        return (
            f": they are of {' or '.join(others)}",
            f"it is for {' or '.join(others)}. Give a LoRA for this model.",
        )
    return (
        ": no known model has layers of these names",
        "the rest of it is of a network that is not known here.",
    )


def module_of(name: str) -> str:
    return name.removeprefix(OURS).partition(".")[0]


def text_side_of(names: Iterable[str]) -> str:
    """Return what modules or weights of a LoRA belong to if all are loaded with the text encoder; else ""."""
    words = {module_names.on_text_side(module_of(name)) for name in names}
    return words.pop() if len(words) == 1 else ""

"""What diffusers and PEFT read of each network kind, and how they name and store its tensors."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from networks.kinds.contract import NetworkKind
from networks.kinds.dora import DORA
from networks.kinds.loha import LOHA
from networks.kinds.lokr import LOKR
from networks.kinds.oft import OFT
from networks.kinds.oft_settings import check_peft_settings
from networks.names.layouts import FamilyNames


@dataclass(frozen=True)
class InDiffusers:
    """How diffusers and PEFT store a network kind, and what they cannot read of it, as parts of messages."""

    # --- reading
    endings: Mapping[str, str] = field(default_factory=dict)  # ending of a tensor's name -> our part
    spellings: Mapping[str, str] = field(default_factory=dict)  # pattern of an ending -> our spelling
    vectors: str = ""  # pattern of names whose tensor is a vector in the file and a column here
    # raises CheckpointError if a file, or the settings in its folder, show a variant that is not supported
    check_file: Callable[[Path], None] | None = None

    # --- writing
    # prefix of names in PEFT, if PEFT reads the files, and the pipelines of diffusers do not
    peft_prefix: str = ""
    two_experts_error: str = ""  # why a file cannot contain the networks of two experts
    saving_error: str = ""  # why a training run cannot save files for pipelines that do not read the kind
    texts_error: str = ""  # why it cannot save them if text encoders are trained


_AS_SAVED = InDiffusers()
BY_KIND: Mapping[NetworkKind, InDiffusers] = {
    DORA: InDiffusers(
        # the second in ai-toolkit, which otherwise has PEFT's names
        endings=dict.fromkeys((".lora_magnitude_vector", ".magnitude"), DORA.magnitudes),
        # PEFT may add the name of an adapter and "weight"
        spellings={r"(?<=\.lora_magnitude_vector)(\.[^.]+){1,2}$": ""},
        # vectors, or 1 x out x 1 x 1 for convolutions; in LyCORIS and here out x 1 (x 1 ...)
        vectors=r"\.lora_magnitude_vector|\.magnitude$",
        texts_error=(
            "diffusers cannot load DoRA magnitudes into text encoders, which are trained. Use --lora_format "
            "known, or train only the transformer (--network_train_unet_only)"
        ),
    ),
    LOHA: InDiffusers(
        saving_error=(
            "diffusers cannot read a LoHa for this model. Use --lora_format known, and make a plain LoRA of "
            "it afterwards (convert_lora.py --target diffusers --bake 64)"
        ),
    ),
    LOKR: InDiffusers(
        saving_error=(
            "diffusers cannot read a LoKr for this model. Use --lora_format known, and convert it to a plain "
            "LoRA afterwards (convert_lora.py --target diffusers --bake 64)"
        ),
    ),
    OFT: InDiffusers(
        spellings={r"\.oft_R(?:\.[^.]+)*$": f".{OFT.parts[0]}"},  # `.oft_R.default.weight`, with any name
        check_file=check_peft_settings,
        peft_prefix="base_model.model.",
        two_experts_error=(
            "--target diffusers writes an OFT as PEFT does, for a single network, not for two experts. "
            "Select one with --expert high_noise or low_noise, or write two files with --output_high_noise"
        ),
    ),
}
# ending of a tensor's name -> our part
ENDINGS = {end: part for rules in BY_KIND.values() for end, part in rules.endings.items()}
# (pattern of an ending, our spelling)
SPELLINGS = tuple(
    (re.compile(theirs), ours) for rules in BY_KIND.values() for theirs, ours in rules.spellings.items()
)
# matches names of tensors that are vectors in the file and columns here
STORED_AS_VECTOR = re.compile(
    "|".join(rules.vectors for rules in BY_KIND.values() if rules.vectors) or r"(?!)"
)


def describe_kind(kind: NetworkKind) -> InDiffusers:
    """Return how diffusers and PEFT store a network kind."""
    return BY_KIND.get(kind, _AS_SAVED)


def find_saving_error(kind: NetworkKind, family: FamilyNames, has_texts: bool) -> str:
    """Return why a training run cannot save a network kind under diffusers' names; "" if it can.

    Args:
        kind: The kind.
        family: Names of the model's modules.
        has_texts: Whether text encoders are trained too.
    """
    rules = describe_kind(kind)
    reason = dict(family.not_in_diffusers).get(kind.name)
    if reason is not None:
        return (
            f"{reason}. Use --lora_format known, and convert the file to a plain LoRA afterwards "
            "(convert_lora.py --target diffusers --bake 64 --dit MODEL)"
        )
    if rules.saving_error and kind.name not in family.kinds_in_diffusers:
        return rules.saving_error
    return rules.texts_error if has_texts else ""

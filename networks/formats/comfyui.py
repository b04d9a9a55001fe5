"""What ComfyUI reads of each network kind. It reads a kind without a row here as training saves it."""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from networks.kinds.composing import MAGNITUDES, find_kinds_with_factors, find_network_kind
from networks.kinds.contract import NetworkKind
from networks.kinds.dora import DORA
from networks.kinds.loha import LOHA
from networks.kinds.lokr import LOKR
from networks.kinds.oft import OFT
from networks.names.layouts import LAYOUT_KEY

# Metadata key for the norms by which rows are divided before per-row magnitudes multiply them, and its value
# for the frozen weights' norms (ComfyUI). Without it, the changed weights' norms are used. Other tools write
# this key too
NORMS_FORM = "ss_dora_scale_format"
FROZEN_NORMS = "comfy_weight_norm"
_MUSUBI_MODULE = re.compile(r"(musubi_tuner\.)?networks\.lo(ra|kr)")


@dataclass(frozen=True)
class InComfyUI:
    """What ComfyUI cannot read of a network kind, as parts of messages; "" if it can."""

    module_error: str = ""  # why it has no form for a module of the kind
    file_error: str = ""  # why a file cannot be converted for it; follows the path of the file
    saving_error: str = ""  # why a training run cannot save files under its names
    is_only_reader: bool = False  # whether no other program reads the files without conversion


_AS_SAVED = InComfyUI()
_BY_KIND: Mapping[NetworkKind, InComfyUI] = {
    DORA: InComfyUI(
        saving_error=(
            "ComfyUI divides the magnitudes of a DoRA by the norms of the frozen weights, and training by "
            "those of the changed weights. Use --lora_format known, and convert the file afterwards with the "
            "model (convert_lora.py --target comfyui --dit MODEL), which is exact"
        ),
    ),
    LOHA: InComfyUI(is_only_reader=True),
    LOKR: InComfyUI(is_only_reader=True),
    OFT: InComfyUI(
        module_error="ComfyUI cannot read an OFT of this form: its own rotates the outputs of a layer",
        file_error=(
            "is an OFT, which ComfyUI cannot read in this form.\n"
            "  Convert it to a plain LoRA: convert_lora.py --target other --bake 64 --dit MODEL."
        ),
        saving_error=(
            "ComfyUI cannot read an OFT of this form. Use --lora_format known, and convert it to a plain "
            "LoRA afterwards (convert_lora.py --target other --bake 64 --dit MODEL)"
        ),
    ),
}


def describe_kind(kind: NetworkKind) -> InComfyUI:
    """Return what ComfyUI cannot read of a network kind."""
    return _BY_KIND.get(kind, _AS_SAVED)


def find_module_error(parts: Collection[str]) -> str:
    """Return why ComfyUI has no form for a module with factors of these names; "" if it has one."""
    errors = (describe_kind(kind).module_error for kind in find_kinds_with_factors(parts))
    return next(filter(None, errors), "")


def find_file_error(names: Iterable[str]) -> str:
    """Return why a file with these tensor names cannot be converted for ComfyUI; "" if it can."""
    kind = find_network_kind(names, [kind for kind, rules in _BY_KIND.items() if rules.file_error])
    return "" if kind is None else describe_kind(kind).file_error


def has_unstated_norms(names: Iterable[str], metadata: Mapping[str, str]) -> bool:
    """Return whether a file in ComfyUI's format is a DoRA that musubi-tuner's fork for LTX-2 wrote.

    The magnitudes in such a file refer to frozen norms, which the file does not state. Its metadata names
    the fork's network module. Our files may name the same module, but their metadata also has a layout hash.
    """
    if not MAGNITUDES or LAYOUT_KEY in metadata:
        return False
    is_of_fork = _MUSUBI_MODULE.match(metadata.get("ss_network_module", "")) is not None
    return is_of_fork and any(name.endswith(MAGNITUDES) for name in names)

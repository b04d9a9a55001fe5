"""DoRA: a LoRA, LoHa or LoKr with magnitudes, the norms of the rows or columns of the changed weight.

`dora_change.py` computes the change, `networks/train/dora.py` trains magnitudes in the layer of a LoRA, and
`networks/magnitudes.py` converts magnitudes to ComfyUI's form and back.
Source: Liu et al. 2024, arXiv 2402.09353.
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from networks.kinds.contract import NetworkKind
from networks.names.layouts import COMFYUI, LAYOUT_KEY

if TYPE_CHECKING:  # --help must not import torch
    from networks.kinds.dora_change import DoraAlgebra
    from networks.names.layouts import FamilyNames

NAME = "DoRA"
PART = "dora_scale"
# endings of the names of magnitudes in PEFT and in ai-toolkit
IN_PEFT = ".lora_magnitude_vector"
IN_TOOLKIT = ".magnitude"
_MUSUBI_MODULE = re.compile(r"(musubi_tuner\.)?networks\.lo(ra|kr)")


class DoraKind(NetworkKind):
    """DoRA: a LoRA, LoHa or LoKr that also trains magnitudes (the norms of the changed weight)."""

    name = NAME
    parts = (PART,)
    magnitudes = PART
    needs_weight = True
    word = "dora"
    ends = {IN_PEFT: PART, IN_TOOLKIT: PART}
    # PEFT may add the name of an adapter and "weight"
    spellings = {r"(?<=\.lora_magnitude_vector)(\.[^.]+){1,2}$": ""}
    # In PEFT, magnitudes are vectors, or 1 x out x 1 x 1 for convolutions; in LyCORIS and here out x 1 (x 1
    # ...)
    flat = r"\.lora_magnitude_vector|\.magnitude$"
    switch = "dora_wd"
    elsewhere = (
        "A DoRA has its trained effect here and in diffusers. In ComfyUI, its effect differs by 3 to 24 %, "
        "unless convert_lora.py --target other --dit MODEL wrote it. musubi-tuner and sd-scripts ignore its "
        "magnitudes: they need a plain LoRA."
    )
    plain_title = "Make a plain LoRA of the DoRA"

    def load_algebra(self) -> "DoraAlgebra":
        """Return the object that computes with DoRA magnitudes."""
        from networks.kinds.dora_change import DoraAlgebra  # torch

        return DoraAlgebra(PART)

    def has_frozen_norms(self, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> bool:
        """Return whether a file in ComfyUI's format is a DoRA that musubi-tuner's fork for LTX-2 wrote.

        The magnitudes in such a file refer to frozen norms, which the file does not state. Its metadata names
        the fork's network module. Our files may name the same module, but their metadata also has a layout
        hash.
        """
        return (
            any(name.endswith(PART) for name in tensors)
            and _MUSUBI_MODULE.match(metadata.get("ss_network_module", "")) is not None
            and LAYOUT_KEY not in metadata
        )

    def find_format_error(self, name: str, family: "FamilyNames | None", has_texts: bool) -> str:
        """Return why files of a --lora_format cannot contain a DoRA; "" if they can."""
        if family is None:  # networks without known names have their own formats, which check them
            return ""
        if name == COMFYUI:
            return (
                "ComfyUI divides the magnitudes of a DoRA by the norms of the frozen weights, and "
                "training by those of the changed weights. Use --lora_format known, and convert the file "
                f"afterwards with the model (convert_lora.py --target {COMFYUI} --dit MODEL), which is exact"
            )
        reason = dict(family.not_in_diffusers).get(NAME)
        if reason is not None:
            return (
                f"{reason}. Use --lora_format known, and convert the file to a plain LoRA afterwards "
                "(convert_lora.py --target diffusers --bake 64 --dit MODEL)"
            )
        if has_texts:
            return (
                "diffusers cannot load DoRA magnitudes into text encoders, which are trained. Use "
                "--lora_format known, or train only the transformer (--network_train_unet_only)"
            )
        return ""


DORA = DoraKind()

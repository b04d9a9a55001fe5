"""What effect each network kind has in other programs, for the summaries and commands of a training run."""

from collections.abc import Mapping

from networks.kinds.contract import NetworkKind
from networks.kinds.dora import DORA
from networks.kinds.oft import OFT
from networks.kinds.tlora import TLORA

# kinds that some programs read without their trained effect, or not at all
NOTES: Mapping[NetworkKind, str] = {
    DORA: (
        "A DoRA has its trained effect here and in diffusers. In ComfyUI, its effect differs by 3 to 24 %, "
        "unless convert_lora.py --target other --dit MODEL wrote it. musubi-tuner and sd-scripts ignore its "
        "magnitudes: they need a plain LoRA."
    ),
    OFT: (
        "PEFT reads an OFT without changes (convert_lora.py --target diffusers). ComfyUI and the known "
        "tuners do not: they need a plain LoRA, which keeps only a part of the change."
    ),
    TLORA: (
        "A T-LoRA has its trained effect in the scripts here, which mask its ranks at each step. Other "
        "programs do not mask ranks, nor does merging: all ranks are then active at every noise level."
    ),
}

"""How sd-scripts and musubi-tuner name each network kind, and which of its forms are not supported."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from networks.kinds.contract import NetworkKind
from networks.kinds.oft import OFT


@dataclass(frozen=True)
class InKohya:
    """Names of a network kind in the files and options of sd-scripts, other than those of its LoRAs."""

    prefixes: tuple[str, ...] = ()  # prefixes of tensor names for the transformer
    modules: Mapping[str, str] = field(default_factory=dict)  # unsupported --network_module -> advice
    read_form: str = ""  # name of the form that is supported, if there are several
    other_form: str = ""  # name of the forms that are not, and the endings of their tensor names
    other_endings: tuple[str, ...] = ()


BY_KIND: Mapping[NetworkKind, InKohya] = {
    OFT: InKohya(
        prefixes=("oft_unet_",),
        modules={
            "networks.oft_v2": f"this variant of OFT is {OFT.network_module} here. Pass that",
            "networks.boft": (
                f"BOFT is not supported: only sd-scripts reads its files. Use {OFT.network_module}"
            ),
        },
        read_form=OFT.parts[0],
        # sd-scripts' networks.oft and LyCORIS' diag-oft, which rotate outputs; PEFT before 0.16
        other_form=f"OFT in an older form than {OFT.parts[0]}",
        other_endings=(".oft_blocks", ".oft_diag", ".oft_r"),
    ),
}
OTHER_MODULES = {name: advice for rules in BY_KIND.values() for name, advice in rules.modules.items()}

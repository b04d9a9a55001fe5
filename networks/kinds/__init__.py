"""Network kinds. Nothing here imports the rest of `networks/`, except names.

Each kind, except LoRA, can be removed: delete its files, also in `networks/train/`, and its two lines in
`__init__.py` of both folders.
"""

import os

from modules.installation import EXTENSIONS
from networks.kinds.contract import NetworkKind
from networks.kinds.dora import DORA
from networks.kinds.loha import LOHA
from networks.kinds.lokr import LOKR
from networks.kinds.lora import LORA
from networks.kinds.oft import OFT
from networks.kinds.tlora import TLORA

__all__ = ["KINDS", "LORA"]

# in the order in which messages name them; one per line, so that a kind is removed with its line
# fmt: off
KINDS: tuple[NetworkKind, ...] = (
    LORA,
    DORA,
    LOHA,
    LOKR,
    OFT,
    TLORA,
)
# fmt: on
if os.environ.get(EXTENSIONS):
    from modules.extensions import NETWORKS, load_extensions

    KINDS = (*KINDS, *load_extensions(NETWORKS).values())

"""The network kinds by their names in LyCORIS."""

from collections.abc import Mapping

from networks.kinds.contract import NetworkKind
from networks.kinds.loha import LOHA
from networks.kinds.lokr import LOKR
from networks.kinds.lora import LORA
from networks.kinds.oft import OFT

# value of the argument `algo` -> the kind that trains the same network
ALGORITHMS: Mapping[str, NetworkKind] = {
    "lora": LORA,
    "locon": LORA,
    "loha": LOHA,
    "lokr": LOKR,
    "diag-oft": OFT,
}

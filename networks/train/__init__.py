"""The trained layers of each kind of network. Each, except LoRA's, can be removed with its lines below."""

from networks.kinds.contract import KindTraining
from networks.train.dora import DORA
from networks.train.loha import LOHA
from networks.train.lokr import LOKR
from networks.train.oft import OFT

# one per line, so that a kind is removed with its line; `lora.py` adds LoRA
# fmt: off
TRAININGS: tuple[KindTraining, ...] = (
    DORA,
    LOHA,
    LOKR,
    OFT,
)
# fmt: on

"""The trained layers of each kind of network. Each, except LoRA's, can be removed with its lines below.

dora: train magnitudes in the layers of a LoRA
factored: build layers of products of factors (LoHa, LoKr)
loha: build the layers of a LoHa
lokr: build the layers of a LoKr
lora: build LoRA layers; find what trains a kind
oft: the trained layer of an OFT
"""

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

"""Kinds of networks, each in one file that can be deleted together with its lines below; but LoRA.

composing: what tools and phases ask all kinds for
contract: what a kind of network is
dora: magnitudes of rows or columns
loha: element-wise products of two low-rank matrices
loha_layer: the products of a LoHa, and its layer
lokr: Kronecker products of two matrices
lokr_layer: the products of a LoKr, and its layer
lora: two low-rank matrices
oft: rotated inputs
oft_layer: the layer of an OFT
oft_rotation: the rotations of an OFT
tlora: ranks that act by the noise of each sample
"""

from networks.kinds.contract import Kind
from networks.kinds.dora import DORA
from networks.kinds.loha import LOHA
from networks.kinds.lokr import LOKR
from networks.kinds.lora import LORA
from networks.kinds.oft import OFT
from networks.kinds.tlora import TLORA

# in the order in which messages name them, one a line
# fmt: off
KINDS: tuple[Kind, ...] = (
    LORA,
    DORA,
    LOHA,
    LOKR,
    OFT,
    TLORA,
)
# fmt: on

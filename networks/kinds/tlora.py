"""T-LoRA: the noisier a sample is, the fewer ranks of a LoRA act on it.

Source: Soboleva et al. 2025, arXiv 2507.05964.
"""

from networks.kinds.contract import Kind

# keys of --network_args
SWITCH, MIN_RANK, ALPHA = "tlora", "tlora_min_rank", "tlora_alpha"

TLORA = Kind(name="T-LoRA")

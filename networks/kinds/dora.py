"""DoRA: a LoRA, LoHa or LoKr with magnitudes, the norms of the rows or columns of the changed weight.

Source: Liu et al. 2024, arXiv 2402.09353.
"""

from networks.kinds.contract import Kind

PART = (
    "dora_scale"  # magnitudes: out x 1 (x 1 ...), one of each output, or 1 x in (x 1 ...), one of each input
)

DORA = Kind(
    name="DoRA",
    parts=(PART,),
    word="dora",
    switch="dora_wd",
)

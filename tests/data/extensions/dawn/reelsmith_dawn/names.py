"""The names of the family."""

from dataclasses import replace

from reelsmith.protocols.families import FamilyEntry
from reelsmith.wan.names import WAN

ENTRY = FamilyEntry(
    "reelsmith_dawn",
    own_files=False,
    script="dawn",
    cache="wan_cache",
    makes="video",
    record="Wan",
    texts="--t5 T5_FILE",
    same_latents="wan",
)
LORA = (replace(WAN, name="dawn"),)
MARKS = ()

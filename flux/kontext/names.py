"""FLUX.1 Kontext's names; its LoRAs and files are FLUX.1's."""

from networks.names.layouts import FamilyNames
from protocols.families import IMAGES, FamilyEntry, Marks

ENTRY = FamilyEntry(
    "flux.kontext",
    own_files=False,
    script="flux_kontext",
    cache="flux_kontext_cache",
    record="Kontext",
    encoders=(("vae", "--vae", IMAGES),),
    texts="--text_encoder1 T5_FILE --text_encoder2 CLIP_FILE",
    same_latents="flux",
)

LORA: tuple[FamilyNames, ...] = ()

MARKS: Marks = ()

"""The scripts that train Stable Diffusion XL; stable_diffusion/names.py has the names of modules."""

from networks.names.layouts import FamilyNames
from protocols.families import FamilyEntry, Marks

ENTRY = FamilyEntry(
    "stable_diffusion.sdxl",
    own_files=False,
    script="sdxl",
    cache="sdxl_cache",
    trained="ckpt",
    record="Sdxl",
    encoders=(),  # the VAE is in the checkpoint, or in a file of its own
    spelled=(("infer_steps", "--steps"), ("sample_solver", "--sampler")),
    texts="--pretrained_model_name_or_path CHECKPOINT",
)

LORA: tuple[FamilyNames, ...] = ()

MARKS: Marks = ()

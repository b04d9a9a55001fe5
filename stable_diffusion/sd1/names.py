"""The scripts that train Stable Diffusion 1.x and 2.x; stable_diffusion/names.py has the names of modules."""

from networks.names.layouts import FamilyNames
from protocols.families import FamilyEntry, Marks

ENTRY = FamilyEntry(
    "stable_diffusion.sd1",
    own_files=False,
    script="sd",
    cache="sd_cache",
    trainer="train_network",
    trained="ckpt",
    record="Sd1",
    encoders=(),  # the VAE is in the checkpoint, or in a file of its own
    spelled=(("infer_steps", "--steps"), ("sample_solver", "--sampler")),
    texts="--pretrained_model_name_or_path CHECKPOINT",
    further_models=("sd2",),
)

LORA: tuple[FamilyNames, ...] = ()

MARKS: Marks = ()

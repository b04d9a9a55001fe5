"""Rewrite a LoRA file in another dialect."""

from logging import getLogger
from pathlib import Path

from modules.atomic_write import save_tensors
from modules.checkpoints.opening import checkpoint_paths
from modules.console import as_size, show_box
from modules.errors import CheckpointError
from networks.hashes import add_hashes
from networks.key_formats import OURS, add_missing_alphas, to_other
from networks.loading import PEFT_SETTINGS, list_some, read_lora
from networks.module_names import choose_family, read_family
from networks.names.framepack import FRAMEPACK
from networks.names.layouts import TRAINED_ON
from networks.options import refuse_replacing
from networks.parts import fuse

logger = getLogger(__name__)
# HunyuanVideo's names in diffusers' layout are FramePack's own; whose a file is that does not say so
LIKELY_FAMILY = dict.fromkeys(("diffusers", "PEFT", "OneTrainer", "without prefix"), "hunyuan_video")


def convert_file(source: Path, output: Path, target: str) -> None:
    """Write the LoRA of `source`, of any dialect, in ours (target "default") or in that of ComfyUI and
    diffusers ("other").

    Metadata are copied, the hashes among them made anew; they name the family where the names alone no longer
    would. Modules without a form in the other dialect are listed in a warning. LoRAs for parts of a fused
    module are put together. Raises CheckpointError where the file is no LoRA or nothing of it can be written,
    OptionError where the result would replace it.
    """
    refuse_replacing("--output", output, checkpoint_paths(source))
    lora = read_lora(source)
    made = read_family(lora.metadata)
    hint = LIKELY_FAMILY.get(lora.dialect) if made is None else made.name
    family = choose_family((name.removeprefix(OURS) for name in lora.modules()), hint)
    native = fuse(lora.tensors) if family is not None and family.parts else lora.tensors
    if target == "default":
        tensors = add_missing_alphas(native)
    else:
        other = to_other(native, hint)
        reasons = [f"{module} ({reason})" for module, reason in other.left_out.items()]
        if not other.tensors:
            raise CheckpointError(f"{source} cannot be converted: {list_some(reasons, 3)}.", source)
        if reasons:
            logger.warning(f"{source}: {len(reasons)} modules are left out: {list_some(reasons)}")
        tensors = other.tensors
    # its alphas are in the tensors now
    metadata = {key: value for key, value in lora.metadata.items() if key != PEFT_SETTINGS}
    if family is FRAMEPACK and made is None:
        metadata[TRAINED_ON] = family.name  # HunyuanVideo's names in diffusers' layout are the same
    save_tensors(output, tensors, add_hashes(tensors, metadata))
    rows = [
        ("from", f"{source}, names as of {lora.dialect}"),
        ("to", f"{output} ({as_size(output.stat().st_size)})"),
        ("tensors", f"{len(tensors)} written"),
    ]
    show_box("The LoRA is converted", rows)

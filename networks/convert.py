"""Rewrite a LoRA file in another dialect."""

from logging import getLogger
from pathlib import Path

from modules.atomic_write import save_tensors
from modules.errors import CheckpointError
from networks.hashes import with_hashes
from networks.key_formats import to_other, with_rank_as_alpha
from networks.loading import listed, read_lora

logger = getLogger(__name__)


def convert_file(source: Path, output: Path, target: str) -> None:
    """Write the LoRA of `source`, of any dialect, in ours (target "default") or in that of ComfyUI (target "other").

    Metadata are copied, the hashes among them made anew. Modules without a form in the other dialect are listed in a warning.
    Raises CheckpointError where the file is no LoRA or nothing of it can be written.
    """
    lora = read_lora(source)
    if target == "default":
        tensors = with_rank_as_alpha(lora.tensors)
    else:
        other = to_other(lora.tensors, lora.metadata.get("ss_base_model_version"))
        reasons = [f"{module} ({reason})" for module, reason in other.left_out.items()]
        if not other.tensors:
            raise CheckpointError(f"{source} cannot be converted: {listed(reasons, 3)}.", source)
        if reasons:
            logger.warning(f"{source}: {len(reasons)} modules are left out: {listed(reasons)}")
        tensors = other.tensors
    save_tensors(output, tensors, with_hashes(tensors, lora.metadata))
    logger.info(f"{output}: {len(tensors)} tensors written")

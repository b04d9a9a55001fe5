"""Find what a prompt describes in an image, with CLIPSeg or SAM 3 from transformers.

Code and pickles that come with a model are never run.
Source: Lüddecke and Ecker 2022, arXiv 2112.10003 (CLIPSeg); transformers, models clipseg and sam3.
"""
# Letters: h w the network's grid, P prompts, N things that the network proposes

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from checkpoints.model_folders import build_on_meta, check_settings, require_matching_shapes
from data_tools.masks.places import MODEL_FOLDER
from data_tools.masks.shaping import ScoreMap
from modules.command import quote_command
from modules.control_codes import shorten
from modules.devices import select_device
from modules.errors import CheckpointError, InstallationError, MemoryPlanError
from modules.media.reading import Frame
from modules.text_files import parse_json, read_text

# settings of `from_pretrained`
SAFE_LOADING: dict[str, Any] = {
    "local_files_only": True,
    "trust_remote_code": False,
}
MAX_SIDE = 1024  # pixels; SAM 3 looks at 1008
CLIPSEG, SAM3 = "clipseg", "sam3"  # model_type in config.json
_DOWNLOAD_COMMAND = ["python", "tools/download.py", "--family", "tools", "--task", "clipseg", "--to"]
_CLASSES = {  # names of the network and the processor in transformers
    CLIPSEG: ("CLIPSegForImageSegmentation", "CLIPSegProcessor"),
    SAM3: ("Sam3Model", "Sam3Processor"),
}


@dataclass(frozen=True)
class PromptFinder:
    """Finds what prompts describe, with a loaded segmentation model."""

    network: Any
    processor: Any
    prompts: Sequence[str]
    least_score: float  # of a thing that SAM 3 proposes

    @torch.no_grad()
    def score(self, frame: Frame) -> ScoreMap:
        """Score how well each region of an image, H W 3, matches the prompt that fits it best: h w, 0..1.

        Raises:
            MemoryPlanError: If the device's memory is too small.
        """
        try:
            if self.network.config.model_type == CLIPSEG:
                # CLIPSeg's map for each prompt, P h w
                images = [frame] * len(self.prompts)
                inputs = self.processor(
                    text=list(self.prompts), images=images, padding=True, truncation=True, return_tensors="pt"
                )
                logits = self.network(**inputs.to(self.network.device)).logits.float()
                by_prompt = logits.reshape(len(self.prompts), *logits.shape[-2:]).sigmoid()
            else:
                by_prompt = torch.stack([self._score_with_sam(frame, prompt) for prompt in self.prompts])
            scores = by_prompt.amax(dim=0)  # P h w -> h w
        except torch.OutOfMemoryError:
            raise MemoryPlanError(
                "An image does not fit into the memory of the device with this model. Pass --device cpu"
            ) from None
        return np.asarray(scores.cpu().numpy(), np.float32)

    def _score_with_sam(self, frame: Frame, prompt: str) -> Tensor:
        """Return one map, h w, that merges all detected objects whose score suffices; zeros without any."""
        inputs = self.processor(images=frame, text=prompt, return_tensors="pt").to(self.network.device)
        outputs = self.network(**inputs)
        scores = outputs.pred_logits[0].float().sigmoid()  # N
        if outputs.presence_logits is not None:
            scores = scores * outputs.presence_logits[0].float().sigmoid()
        masks = outputs.pred_masks[0].float().sigmoid()  # N h w
        detected = masks[scores > self.least_score]
        return detected.amax(dim=0) if len(detected) else torch.zeros_like(masks[0])


def read_kind(folder: Path) -> str:
    """Return the type of a text-prompted segmentation model, from the config.json in its folder.

    Raises:
        CheckpointError: If the kind of model is not supported.
    """
    path = folder / "config.json"
    if not path.is_file():
        target = folder.parent if folder.name == MODEL_FOLDER.name else MODEL_FOLDER.parent
        command = quote_command([*_DOWNLOAD_COMMAND, str(target)])
        raise CheckpointError(
            f"--model {folder}: there is no config.json in this folder. {command} downloads CLIPSeg, after "
            "its size and license",
            folder,
        )
    try:
        kind = parse_json(read_text(path)).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read: {shorten(str(error), 300)}", path) from None
    if not isinstance(kind, str) or kind not in _CLASSES:
        raise CheckpointError(
            f"--model {folder}: this is a model of the kind {shorten(str(kind), 80)}, which finds no "
            "words in images. Pass CLIPSeg or SAM 3",
            folder,
        )
    return kind


def load_prompt_finder(
    folder: Path, prompts: Sequence[str], least_score: float, device: str | None
) -> PromptFinder:
    """Load CLIPSeg or SAM 3, which segment what a prompt describes.

    Args:
        folder: Folder of the model, as transformers saves it.
        prompts: What to find.
        least_score: Lowest score of a found object, for SAM 3.
        device: Device to load onto, in float32; None selects the best one available.

    Raises:
        CheckpointError: If the folder has no model of these kinds, or a damaged one.
        InstallationError: If torchvision is missing.
    """
    selected_device = select_device(device)
    model_type = read_kind(folder)
    network_name, processor_name = _CLASSES[model_type]
    shapes = check_settings(folder, "--model", MAX_SIDE)
    import transformers  # takes seconds; only for prompts

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        network_class = getattr(transformers, network_name)
        config = network_class.config_class.from_pretrained(folder, **SAFE_LOADING)
        # shapes in the file are compared with an empty network before memory is allocated for weights
        empty_network = build_on_meta(network_class, config)
        require_matching_shapes(folder, "--model", empty_network, shapes, is_exact=model_type == CLIPSEG)
        processor = getattr(transformers, processor_name).from_pretrained(folder, **SAFE_LOADING)
        network = network_class.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, **SAFE_LOADING
        )
    except CheckpointError:
        raise
    except Exception as error:  # damaged files raise many libraries' errors
        if "torchvision" in str(error).lower() and find_spec("torchvision") is None:  # as SAM 3 needs it
            raise InstallationError(
                f"--model {folder}: transformers reads its images with torchvision. Run: pip install "
                "torchvision"
            ) from None
        reason = shorten(" ".join(str(error).split()), 300)
        raise CheckpointError(f"--model {folder}: transformers cannot load it: {reason}", folder) from None
    return PromptFinder(
        network.eval().requires_grad_(False).to(selected_device), processor, prompts, least_score
    )

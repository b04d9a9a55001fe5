"""Estimate the depth of images with a transformers model, such as Depth Anything or DPT.

Code and pickles that come with a model are never run.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate

from checkpoints.model_folders import build_on_meta, check_settings, require_matching_shapes
from modules.control_codes import shorten
from modules.devices import select_device
from modules.errors import CheckpointError, MemoryPlanError
from modules.media.reading import Frame

SAFE_LOADING: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
# kinds of models that predict distances; the others predict the inverse, up to a factor and an offset
DISTANCE_MODELS = frozenset({"depth_pro", "glpn", "prompt_depth_anything", "zoedepth"})
MIN_DISTANCE = 1e-3  # metres, so that the inverse is finite


@dataclass(frozen=True)
class DepthModel:
    """A loaded depth model with its processor."""

    network: Any
    processor: Any

    @torch.no_grad()
    def draw(self, image: Frame) -> Frame:
        """Return the depth map of an image in gray, H W 3 of the same size: black is far, white is near.

        The nearest point of each image is white and the farthest black, as in the maps that depth ControlNets
        were trained with.

        Raises:
            MemoryPlanError: If the device's memory is too small.
        """
        inputs = self.processor(images=image, return_tensors="pt").to(self.network.device)
        try:
            depth = self.network(**inputs).predicted_depth.float()  # 1 h w
        except torch.OutOfMemoryError:
            raise MemoryPlanError(
                "An image does not fit into the memory of the device with this model. Pass --device cpu"
            ) from None
        # most models predict inverse depth, others distances
        config = self.network.config
        is_metric = getattr(config, "depth_estimation_type", "relative") == "metric"  # of Depth Anything
        if is_metric or config.model_type in DISTANCE_MODELS:
            # this model returns distances, which are large for far points
            depth = 1 / depth.clamp(min=MIN_DISTANCE)
        depth = interpolate(depth[:, None], size=image.shape[:2], mode="bicubic", align_corners=False)[0, 0]
        low, high = depth.min(), depth.max()
        gray = (depth - low) / (high - low).clamp(min=torch.finfo(depth.dtype).tiny)
        pixels = (gray * 255).round().to("cpu", torch.uint8).numpy()
        return np.repeat(pixels[..., None], 3, axis=2)


def load_depth_model(folder: Path, device: str | None) -> DepthModel:
    """Load a depth model from a folder onto a device, in float32; None selects the best device available.

    Raises:
        CheckpointError: If the folder has no model for depth estimation, or a damaged one.
    """
    selected_device = select_device(device)
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"--depth {folder}: there is no config.json in this folder. Pass the folder of a model as "
            "transformers saves it, with preprocessor_config.json and model.safetensors",
            folder,
        )
    shapes = check_settings(folder, "--depth")
    import transformers  # takes seconds; only with --depth

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **SAFE_LOADING)
        # shapes in the file are compared with an empty network before memory is allocated for weights
        empty_network = build_on_meta(transformers.AutoModelForDepthEstimation.from_config, config)
        require_matching_shapes(folder, "--depth", empty_network, shapes, is_exact=False)
        processor = transformers.AutoImageProcessor.from_pretrained(folder, **SAFE_LOADING)
        network = transformers.AutoModelForDepthEstimation.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, **SAFE_LOADING
        )
    except CheckpointError:
        raise
    except Exception as error:  # damaged files raise many libraries' errors
        reason = shorten(" ".join(str(error).split()), 300)
        raise CheckpointError(
            f"--depth {folder}: transformers cannot load it for depth estimation: {reason}", folder
        ) from None
    return DepthModel(network.eval().requires_grad_(False).to(selected_device), processor)

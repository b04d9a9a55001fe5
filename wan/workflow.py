"""Wan in ComfyUI: text to video and to images. Source: ComfyUI's templates of Wan2.1 and Wan2.2."""

from modules.errors import OptionError
from protocols.workflows import CLIP_LATENT, ComfyModel, shift_thousand
from wan.configs import WanTask

TEXT_TO_VIDEO = ComfyModel(
    vae="wan_2.1_vae.safetensors",
    text_encoders=("umt5_xxl_fp8_e4m3fn_scaled.safetensors",),
    text_type="wan",
    latent=CLIP_LATENT,
    has_length=True,
    patches=shift_thousand,
)


def find_comfy_model(task: WanTask, takes_images: bool) -> ComfyModel:
    """Return how a ComfyUI workflow loads and samples a task's model; only text-to-video is supported.

    Args:
        task: The task.
        takes_images: Whether samples are single images made from control images (`wan.one_frame`).

    Raises:
        OptionError: Unless the task starts from text alone.
    """
    if task.kind != "t2v" or task.has_control or takes_images:
        raise OptionError(
            f"only --task t2v and t2i generate from text alone; {task.name} also takes images here"
        )
    return TEXT_TO_VIDEO

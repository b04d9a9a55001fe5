"""Keep parts of an image equal to a reference while denoising: by a mask, or where the two hardly differ."""
# Letters: B batch, C channels, F H W frames, height and width of latents

from pathlib import Path

import torch
import torch.nn.functional as functional
from PIL import Image
from torch import Tensor

from modules.flow.schedule import Schedule, noisy_source
from protocols.rules import ConsistencyRules
from protocols.steps import CompletedStep, Section


def restore_outside_mask(section: Section, latents: Tensor, schedule: Schedule, step: int) -> Tensor:
    """Return latents, reset to the noisy original image wherever the section's mask allows no changes.

    Call it after each step. Without a mask the latents are returned unchanged.

    Args:
        section: The section to denoise.
        latents: Latents in model space, B C F H W.
        schedule: Schedule of noise levels.
        step: Index in the schedule of the latents' noise level.
    """
    edit_reference = section.edit_reference  # the original image and its mask
    if edit_reference is None or edit_reference.changed_mask is None:
        return latents
    noisy_reference = noisy_source(edit_reference.latents, section.noise, schedule, step)
    return torch.where(edit_reference.changed_mask > 0, latents, noisy_reference)


def restore_unchanged_regions(section: Section, latents: Tensor, schedule: Schedule, step: int) -> Tensor:
    """Return latents, reset to the noisy original image in regions where they hardly differ from it.

    Call before each step, once its velocity is known, so that small deviations do not accumulate.

    Args:
        section: The section to denoise.
        latents: Latents in model space, B C F H W.
        schedule: Schedule of noise levels.
        step: Index in the schedule of the latents' noise level.
    """
    edit_reference = section.edit_reference  # the original image and the rules that find changes
    if edit_reference is None or edit_reference.rules is None:
        return latents
    noisy_reference = noisy_source(edit_reference.latents, section.noise, schedule, step)
    return torch.where(
        find_changes(latents - noisy_reference, edit_reference.rules), latents, noisy_reference
    )


def find_changes(difference: Tensor, rules: ConsistencyRules) -> Tensor:
    """Return a mask of the changed regions of an image: B 1 F H W bool, True where it changed.

    The difference is blurred; the mean of its absolute values over the channels is compared with the
    threshold.

    Args:
        difference: Difference from the reference with the same noise, B C F H W.
        rules: The family's blur, threshold and growth of changed regions.
    """
    magnitude = blur(difference, rules.kernel_size).abs().mean(dim=1, keepdim=True)  # B 1 F H W
    threshold = rules.threshold * (magnitude.max() if rules.is_relative else 1)
    changed = magnitude > threshold
    if rules.dilate_size:
        # max pooling with stride 1 grows each changed region by `dilate_size` on all sides
        frames = changed.flatten(0, 2)[:, None].float()  # B*F 1 H W
        width = 2 * rules.dilate_size + 1
        grown = functional.max_pool2d(frames, width, stride=1, padding=rules.dilate_size) > 0
        changed = grown.view(magnitude.shape)
    return changed


def blur(latents: Tensor, kernel_size: int) -> Tensor:
    """Return latents B C F H W, blurred with a Gaussian kernel.

    Sigma follows from the kernel size as in OpenCV; edge values are repeated.

    Args:
        latents: Latents, B C F H W.
        kernel_size: Size of the kernel, an odd number of latent pixels.
    """
    half = kernel_size // 2
    if not half:
        return latents
    sigma = 0.3 * (half - 1) + 0.8  # OpenCV's getGaussianKernel
    offsets = torch.arange(-half, half + 1, device=latents.device, dtype=latents.dtype)
    kernel = torch.softmax(-(offsets**2) / (2 * sigma**2), dim=0)  # softmax: the weights sum to 1
    planes = latents.flatten(0, 2)[:, None]  # (B C F) 1 H W
    padded = functional.pad(planes, (half,) * 4, mode="replicate")
    # the kernel is separable: first along rows, then along columns
    blurred_rows = functional.conv2d(padded, kernel.view(1, 1, 1, -1))
    return functional.conv2d(blurred_rows, kernel.view(1, 1, -1, 1)).view(latents.shape)


def save_changes(done: CompletedStep, folder: Path, stem: str) -> None:
    """Write the mask of latents that changed in a step as an image, if the options ask for it."""
    edit_reference = done.section.edit_reference
    sigma = done.step.sigma
    if edit_reference is not None and edit_reference.rules is not None and edit_reference.rules.save_masks:
        noisy_reference = (1 - sigma) * edit_reference.latents + sigma * done.section.noise
        changed = find_changes(done.step.noisy - noisy_reference, edit_reference.rules)[0, 0, 0]
        path = folder / f"{stem}_rcm_{done.step.index:03d}.png"
        Image.fromarray(changed.mul(255).byte().cpu().numpy()).save(path)

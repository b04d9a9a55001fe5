"""Keep parts of a picture equal to a reference while denoising: by a mask, or where the two hardly differ."""
# Letters: B batch, C channels, F H W frames, height and width of latents

from pathlib import Path

import torch
import torch.nn.functional as functional
from PIL import Image
from torch import Tensor

from contract.rules import ConsistencyRules
from contract.steps import Section, StepDone
from modules.flow.schedule import Schedule, noisy_source


def hold_masked(section: Section, latents: Tensor, schedule: Schedule, step: int) -> Tensor:
    """Return latents B C F H W with the noisy reference in every region that the section's mask protects.

    Call after each step.

    Args:
        section: The section to denoise.
        latents: Latents in model space, B C F H W.
        schedule: Schedule of noise levels.
        step: Step of the schedule, for the noise level of the latents.
    """
    anchor = section.anchor
    if anchor is None or anchor.changed is None:
        return latents
    noisy_reference = noisy_source(anchor.latents, section.noise, schedule, step)
    return torch.where(anchor.changed > 0, latents, noisy_reference)


def hold_consistent(section: Section, latents: Tensor, schedule: Schedule, step: int) -> Tensor:
    """Return latents B C F H W with the noisy reference in the regions where the two hardly differ.

    Call before each step, once its velocity is known, so that small deviations do not add up.
    """
    anchor = section.anchor
    if anchor is None or anchor.rules is None:
        return latents
    noisy_reference = noisy_source(anchor.latents, section.noise, schedule, step)
    return torch.where(find_changes(latents - noisy_reference, anchor.rules), latents, noisy_reference)


def find_changes(difference: Tensor, rules: ConsistencyRules) -> Tensor:
    """Return a mask of the changed regions of a picture: B 1 F H W bool, True where changed.

    It is blurred; the mean of its absolute value over the channels is compared with the threshold.

    Args:
        difference: Difference from the reference with the same noise, B C F H W.
        rules: The family's rules for anchors.
    """
    size = blur(difference, rules.kernel_size).abs().mean(dim=1, keepdim=True)
    threshold = rules.threshold * (size.max() if rules.is_relative else 1)
    changed = size > threshold
    if rules.dilate_size:
        width = 2 * rules.dilate_size + 1
        margin = rules.dilate_size
        changed = functional.max_pool2d(changed.flatten(0, 2)[:, None].float(), width, 1, margin) > 0
        changed = changed.view(size.shape)
    return changed


def blur(latents: Tensor, kernel_size: int) -> Tensor:
    """Blur latents B C F H W with a Gaussian kernel of `kernel_size` pixels, an odd number.

    Sigma follows from the size as in OpenCV; edge pixels are repeated.
    """
    half = kernel_size // 2
    if not half:
        return latents
    deviation = 0.3 * (half - 1) + 0.8
    places = torch.arange(-half, half + 1, device=latents.device, dtype=latents.dtype)
    row = torch.softmax(-(places**2) / (2 * deviation**2), dim=0)
    planes = functional.pad(latents.flatten(0, 2)[:, None], (half,) * 4, mode="replicate")
    rows = functional.conv2d(planes, row.view(1, 1, 1, -1))
    return functional.conv2d(rows, row.view(1, 1, -1, 1)).view(latents.shape)


def save_changes(done: StepDone, folder: Path, stem: str) -> None:
    """Write the mask of changes at a step as a picture, if the rules ask for it."""
    anchor = done.section.anchor
    sigma = done.step.sigma
    if anchor is not None and anchor.rules is not None and anchor.rules.saves:
        noisy_reference = (1 - sigma) * anchor.latents + sigma * done.section.noise
        changed = find_changes(done.step.noisy - noisy_reference, anchor.rules)[0, 0, 0]
        path = folder / f"{stem}_rcm_{done.step.index:03d}.png"
        Image.fromarray(changed.mul(255).byte().cpu().numpy()).save(path)

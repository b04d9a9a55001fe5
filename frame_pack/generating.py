"""Denoise a video section by section, or a single image, and decode latents to pixels.

Source: the released code; Zhang and Agrawala 2025, arXiv 2504.12626.
"""

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from frame_pack.one_frame import one_frame_indices
from frame_pack.sections import (
    GenerationOrder,
    Indices,
    blend_overlaps,
    count_window_sections,
    decoding_slices,
    section_frames,
    video_latents,
)
from hunyuan_model.spec import LATENT as VAE_LATENT
from hunyuan_model.vae import HunyuanVae
from protocols.data import Conditions, MediaEncoders
from protocols.family import NoiseSource
from protocols.one_frame import OneFrame
from protocols.steps import EncodedPrompts, PreviewPiece, Section

CPU = torch.device("cpu")
Sections = Generator[Section, Tensor, Tensor]


def video_sections(
    prompts: Mapping[int, EncodedPrompts],
    inputs: Mapping[int, Conditions],
    noise: NoiseSource,
    guidance: Tensor,
    order: GenerationOrder,
    window: int,
    paddings: Sequence[int],
) -> Sections:
    """Yield each section to the denoising loop, in the order of generation; return the video's latents.

    1. Plan the sections, and start the history with the images given for both ends.
    2. Denoise each section with the history as clean latents; add its result to the history, on the CPU, so
       that device memory does not grow with the length.
    3. Join the history to latents 1 C F h w.

    Args:
        prompts: Encoded prompts by section.
        inputs: Conditions by section: image embeddings and latents of its start image.
        noise: Source of the noise.
        guidance: The network's guidance input, shape 1.
        order: Order of generation.
        window: Latent frames of a section.
        paddings: --latent_paddings.
    """
    plan = order.plan_sections(len(inputs), window, paddings)  # in the order of generation
    history = order.start_history(*_images_at_both_ends(inputs, first_generated=plan[0].index))
    previous_piece = None  # preview of the section generated before
    device = CPU  # of the denoised sections, to which the video is moved at the end
    for number, section in enumerate(plan):
        conditions = _section_conditions(inputs[section.index], section.indices, order, history)
        conditions["guidance"] = guidance
        target_noise = noise.draw((*history.shape[:2], window, *history.shape[3:]))
        latents = yield replace(
            prompts[section.index].section(target_noise, conditions),
            first_latent_frame=1 + section.index * window,  # after the start image
            previous_piece=previous_piece,
            label=f"section {number + 1} of {len(plan)}",
            count=len(plan),
        )
        device = latents.device
        history = order.add_to_history(history, latents.to(CPU))
        previous_piece = _make_preview_piece(order, history, window, number)
    first_image = _get_tensor(inputs[0], "start_latents")
    return order.join_video(first_image, history, len(plan) * window).to(device)


def _images_at_both_ends(
    inputs: Mapping[int, Conditions], first_generated: int
) -> tuple[Tensor, Tensor | None]:
    """Return the latents of the start image and of the end image; None if no end image is given."""
    # The start image is that of the section that is generated first.
    end = inputs[0].get("end_latents")
    assert end is None or isinstance(end, Tensor)
    return _get_tensor(inputs[first_generated], "start_latents"), end


def _section_conditions(
    inputs: Conditions, indices: Indices, order: GenerationOrder, history: Tensor
) -> dict[str, Any]:
    """Return a section's conditions by cache key, without guidance: its image and its clean latents."""
    clean_latents = order.clean_latents(_get_tensor(inputs, "start_latents"), history)
    return {
        "image_embeddings": inputs["image_embeddings"],
        **_stack_indices(indices),
        **clean_latents.by_name(),
    }


def _make_preview_piece(order: GenerationOrder, history: Tensor, window: int, number: int) -> PreviewPiece:
    """Return the newest section and its neighbor in time, so that a preview shows the final transition."""
    # `history` is all that has been generated, in playing order; the newest section is at its front if
    # `order.prepends_sections`, else at its end. `number` counts sections from 0 in the order of generation.
    is_first_section = number == 0
    num_generated = (number + 1) * window
    num_newest = window if is_first_section else 2 * window  # the newest section and its neighbor
    if order.prepends_sections:
        newest = history[:, :, :num_newest]
        so_far = history[:, :, :num_generated]
    else:
        # the latent frame of the start image precedes the first section
        newest = history[:, :, -(num_newest + is_first_section) :]
        so_far = history[:, :, -(num_generated + 1) :]
    return PreviewPiece(
        newest,
        overlap=0 if is_first_section else section_frames(window),
        is_prepended=order.prepends_sections,
        decode=decode_part,
        previous_latents=so_far,
    )


def one_frame_section(
    settings: OneFrame,
    prompts: EncodedPrompts,
    inputs: Conditions,
    noise: NoiseSource,
    guidance: Tensor,
    window: int,
    shape: Sequence[int],
) -> Sections:
    """Yield the only denoising section, which generates an image; return its latent, 1 C 1 h w.

    Args:
        settings: Settings of the image.
        prompts: Its encoded prompts.
        inputs: Result of `frame_pack.inputs.one_frame_inputs`.
        noise: Source of the noise.
        guidance: The network's guidance input, shape 1.
        window: Latent frames of a section.
        shape: Shape of the latent.
    """
    controls = inputs.get("control_latents")
    black = torch.zeros(*shape)
    clean = controls if isinstance(controls, Tensor) else black
    indices = one_frame_indices(settings, clean.shape[2], window)
    if settings.has_post:
        clean = torch.cat([clean, black.to(clean)], dim=2)
    conditions = {
        "image_embeddings": inputs["image_embeddings"],
        "guidance": guidance,
        **_stack_indices(indices),
        "latents_clean": clean,
    }
    return (yield prompts.section(noise.draw(shape), conditions))


def decode_video(vae: HunyuanVae, latents: Tensor, window: int, in_one_pass: bool) -> Iterator[Tensor]:
    """Decode latents, 1 C F h w in model space, to pixels 1 3 F H W in -1..1, in playing order.

    Sections of `window` latent frames are decoded in overlapping pairs and blended, on the CPU. With
    `in_one_pass`, or if the latents are not a whole number of sections, all are decoded together, which
    has no seams and takes more memory.
    """
    sections = count_window_sections(latents.shape[2], window)
    if in_one_pass or sections < 2 or video_latents(sections, window) != latents.shape[2]:
        yield from vae.decode(latents / VAE_LATENT.scale)
        return
    overlapping_clips = _decode_overlapping(vae, latents, decoding_slices(sections, window))
    for chunk in blend_overlaps(overlapping_clips, section_frames(window)):
        yield chunk.clamp_(-1, 1)  # after blending, as in the released code


def _decode_overlapping(vae: HunyuanVae, latents: Tensor, slices: Iterable[slice]) -> Iterator[Tensor]:
    """Decode overlapping slices of latent frames one by one to pixels on the CPU, not clamped to -1..1."""
    for frames in slices:  # each is scaled alone: no copy of a long video
        chunks = vae.decode_unclamped(latents[:, :, frames] / VAE_LATENT.scale)
        yield torch.cat([chunk.cpu() for chunk in chunks], dim=2)


def decode_part(encoders: MediaEncoders, latents: Tensor) -> Iterator[Tensor]:
    """Decode the latents of a `PreviewPiece` at once to pixels, 1 3 F H W, which may lie outside -1..1."""
    return encoders.vae.decode_unclamped(latents / VAE_LATENT.scale)


def _stack_indices(indices: Indices) -> dict[str, Tensor]:
    """Return the frame indices by cache key, with a batch dimension."""
    return {name: torch.tensor([numbers]) for name, numbers in indices.by_name().items()}


def _get_tensor(conditions: Conditions, name: str) -> Tensor:
    value = conditions[name]
    assert isinstance(value, Tensor)
    return value

"""Generate a batch of images: encode texts, prepare the start, denoise, decode."""
# Letters: B images, h w latent size

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from generation import denoise as loop
from modules.bars import Bar
from modules.errors import OptionError
from protocols.data import Conditions
from protocols.steps import Section, StepDone
from stable_diffusion import contract, samplers, starting
from stable_diffusion.guiding import Guides
from stable_diffusion.loras import AdjustableLoras
from stable_diffusion.regions import Regions, join_parts, split_parts
from stable_diffusion.sampling_options import SamplingOptions
from stable_diffusion.small_start import begin_small, check_batch
from stable_diffusion.text import ImageVectors, PromptEncoder


class BatchHook(Protocol):
    """Object that sets up the U-Net for each batch and creates a hook for its calls."""

    def apply_to_batch(
        self, requests: Sequence[contract.RequestedImage], width: int, height: int
    ) -> AbstractContextManager[contract.UnetHook | None]:
        """Return a context to generate a batch in, which yields a U-Net hook, or None without one."""


class _Texts(NamedTuple):
    """Text states of a batch, with one entry for each image."""

    prompts: list[contract.TextState]
    negative: list[contract.TextState] | None  # None without guidance
    blank: list[contract.TextState] | None  # states of the empty text, for the third pass of --negative_scale


@dataclass(frozen=True, eq=False)
class ImageGenerator:
    """Generate images with a loaded model, batch by batch."""

    model: contract.Model
    texts: PromptEncoder
    sampling: SamplingOptions
    vae_batch_size: float | None = None
    networks: AdjustableLoras | None = None
    batch_hooks: Sequence[BatchHook] = ()  # in the order in which they see a call of the U-Net
    regions: Regions | None = None  # regions of prompts with several parts
    vision: ImageVectors | None = None
    guides: Guides | None = None
    keeps_rest: bool = False  # whether inpainting models also restore the unmasked area exactly

    @cached_property
    def _scheduler(self) -> Any:
        options = self.sampling
        velocity = self.model.predicts_velocity
        return samplers.make_scheduler(
            options.sampler,
            velocity,
            options.zero_terminal_snr or (self.model.zero_terminal_snr and velocity),
            0 if options.force_scheduler_zero_steps_offset else 1,
        )

    @torch.no_grad()
    def make(
        self,
        requests: Sequence[contract.RequestedImage],
        start: contract.SecondStageInput | None = None,
        wants_images: bool = True,
    ) -> contract.StageResult:
        """Generate a batch of images; an image does not depend on the rest of its batch.

        Images are generated in groups of equal text length and kinds of inputs, or one at a time if CLIP or
        VGG16 guide them.

        Args:
            requests: Images with equal settings.
            start: Replacement for the input images; None keeps them.
            wants_images: Whether images are returned in addition to latents.

        Raises:
            UserError: If an input image cannot be used.
        """
        for request in requests:
            starting.check_start(self.model, request, start)

        def kind_of(index: int) -> tuple[int, ...]:
            """Return a key that images have in common if they can be generated together."""
            request = requests[index]
            own_group = 0 if self.guides is None else index  # steered images are generated alone
            return self._count_chunks(request), request.image is not None, request.mask is not None, own_group

        latents: dict[int, Tensor] = {}  # by index of the image
        # sorted by that key, because groupby only joins neighbors
        for _, group in groupby(sorted(range(len(requests)), key=kind_of), kind_of):
            indices = list(group)
            group_start = None if start is None else _pick(start, indices)
            group_latents = self._make_group([requests[index] for index in indices], group_start)
            latents |= dict(zip(indices, group_latents, strict=True))
        joined = torch.stack([latents[index] for index in range(len(requests))])
        if not wants_images:
            return contract.StageResult(joined, None)
        labels = [request.label for request in requests]
        images = starting.decode_latents(self.model, joined, labels, self.vae_batch_size)
        return contract.StageResult(joined, images)

    def _make_group(
        self, requests: Sequence[contract.RequestedImage], start: contract.SecondStageInput | None
    ) -> Tensor:
        """Generate the latents, B 4 h w, of images with prompts of equal length."""
        settings = requests[0].settings
        options = self.sampling
        gradual = settings.gradual_latent
        if gradual is not None:
            check_batch(requests, options.sampler)
        sampler = samplers.begin_sampling(
            self._scheduler,
            settings.steps,
            # on the CPU, so that the numbers are the same on every device
            [torch.Generator().manual_seed(request.seed) for request in requests],
            samplers.count_left_out(settings.steps, starting.find_strength(requests[0], start)),
        )
        section_texts = self._encode(requests)
        beginning = starting.begin(
            self.model,
            requests,
            start=start,
            sampler=sampler,
            noise_options=options.noise,
            keeps_rest=self.keeps_rest,
        )
        if gradual is not None:
            small, growing = begin_small(beginning.latents, sampler, gradual)
            beginning = replace(beginning, latents=small, sampler=growing)
        self._select_loras(settings)  # all of them: encoding the parts of a prompt selects one at a time
        # each of ControlNets, Deep Shrink and the like changes the U-Net until the batch is done
        with ExitStack() as stack:
            batch_hooks = [*self.batch_hooks]
            if self.regions is not None:
                batch_hooks.append(self.regions)
            hooks = []
            for batch_hook in batch_hooks:
                hook = stack.enter_context(
                    batch_hook.apply_to_batch(requests, settings.width, settings.height)
                )
                if hook is not None:
                    hooks.append(hook)
            passes = samplers.UnetPasses(self.model, beginning.sampler, hooks, beginning.inpainting)
            return self._denoise(passes, beginning, section_texts, requests[0])

    def _denoise(
        self,
        passes: samplers.UnetPasses,
        beginning: starting.Beginning,
        texts: _Texts,
        request: contract.RequestedImage,
    ) -> Tensor:
        """Return the denoised latents. `request` is any of the group, because all have the same settings."""
        sampler = beginning.sampler
        settings = request.settings
        guidance = samplers.make_guidance(settings.scale, settings.negative_scale)
        if self.guides is not None:
            guidance = self.guides.steer(guidance, passes, request)
        section = self._make_section(beginning.latents, texts, settings)

        def network(_: float) -> nn.Module:  # one network for all noise levels
            unet: nn.Module = self.model.unet
            return unet

        num_steps = sampler.schedule.num_steps - sampler.first
        with Bar(num_steps, "Denoising") as bar:

            def show(_: StepDone) -> bool:
                bar.update()
                return False  # True would stop the loop

            latents = loop.denoise(
                passes,
                network,
                section,
                latents=beginning.latents,
                solver=sampler,
                guidance=guidance,
                watchers=[show],
                split=False,
                first_step=sampler.first,
            )
        return latents.squeeze(2)  # without the axis of frames

    def _make_section(self, latents: Tensor, texts: _Texts, settings: contract.ImageSettings) -> Section:
        """Return latents and texts as a section for the denoising loop."""
        device = self.model.device
        positive_sizes = negative_sizes = None
        if self.model.kind is contract.SDXL:
            positive_sizes = time_ids(settings, negative=False)
            negative_sizes = time_ids(settings, negative=True)

        def avoided(states: list[contract.TextState] | None) -> Conditions | None:
            if states is None:
                return None
            return samplers.make_conditions(states, device, negative_sizes, negative=True)

        positive = samplers.make_conditions(texts.prompts, device, positive_sizes)
        return Section(latents, positive, negative=avoided(texts.negative), blank=avoided(texts.blank))

    # Texts

    def _count_chunks(self, request: contract.RequestedImage) -> int:
        return max(map(self.texts.count_chunks, [*self._split_parts(request), *self._list_avoided(request)]))

    def _split_parts(self, request: contract.RequestedImage) -> list[str]:
        return split_parts(request.prompt) if request.settings.num_parts > 1 else [request.prompt]

    def _list_avoided(self, request: contract.RequestedImage) -> list[str]:
        """Return the negative prompt, with three guidance passes also the empty one; [] without guidance."""
        settings = request.settings
        if not samplers.is_guided(settings.scale, settings.negative_scale):
            return []
        return [request.negative_prompt] if settings.negative_scale is None else [request.negative_prompt, ""]

    def _encode(self, requests: Sequence[contract.RequestedImage]) -> _Texts:
        """Encode the prompts and negative prompts of a group of images."""
        settings = requests[0].settings
        prompts = [self._split_parts(request) for request in requests]
        avoided = [self._list_avoided(request) for request in requests]
        # with a mask of regions, part i of the prompt is encoded with LoRA i alone, also in negative texts
        is_regional = settings.num_parts > 1 and requests[0].mask is not None
        states = self._encode_parts(requests[0], prompts, avoided, is_regional)

        def join(request: contract.RequestedImage, texts: Sequence[str]) -> contract.TextState:
            """Combine the states of an image's texts, one for each part of its prompt."""
            parts = [states[text, part if is_regional else None] for part, text in enumerate(texts)]
            return self._join_parts(request, parts)

        positive = [join(request, parts) for request, parts in zip(requests, prompts, strict=True)]
        if self.vision is not None:
            positive = self.vision.replace_pooled(positive, _list_vision_paths(requests))
        # each avoided text is repeated for all parts of the prompt
        avoided_states = [
            [join(request, [text] * settings.num_parts) for text in texts]
            for request, texts in zip(requests, avoided, strict=True)
        ]
        num_avoided = len(avoided[0])  # 0, 1 (negative) or 2 (negative and blank), equal for all images
        return _Texts(
            positive,
            negative=[of_image[0] for of_image in avoided_states] if num_avoided > 0 else None,
            blank=[of_image[1] for of_image in avoided_states] if num_avoided > 1 else None,
        )

    def _join_parts(
        self, request: contract.RequestedImage, parts: Sequence[contract.TextState]
    ) -> contract.TextState:
        """Combine the text states of a prompt's parts into one; each part acts in its region."""
        if len(parts) == 1:
            return parts[0]
        regions = self.regions or Regions(self.model.unet)
        return join_parts(parts, regions.read(request, request.settings.width, request.settings.height))

    def _encode_parts(
        self,
        request: contract.RequestedImage,
        prompts: Sequence[Sequence[str]],
        avoided: Sequence[Sequence[str]],
        is_regional: bool,
    ) -> dict[tuple[str, int | None], contract.TextState]:
        """Return the states of a group's texts, by text and, if LoRAs are regional, by prompt part.

        Args:
            request: Any image of the group, because all have the same settings.
            prompts: Parts of each image's prompt.
            avoided: Texts that guidance leads away from.
            is_regional: Whether LoRAs act in regions.
        """
        settings = request.settings
        chunks = self._count_chunks(request)
        states: dict[tuple[str, int | None], contract.TextState] = {}
        for number in range(settings.num_parts):
            part = number if is_regional else None
            self._select_loras(settings, part)  # before encoding, as LoRAs change the text encoders too
            for parts, avoided_texts in zip(prompts, avoided, strict=True):
                for text in (parts[number], *avoided_texts):
                    if (text, part) not in states:
                        lora_key = (settings.multipliers, part)
                        states[text, part] = self.texts.encode(text, chunks, lora_key)
        return states

    def _select_loras(self, settings: contract.ImageSettings, part: int | None = None) -> None:
        if self.networks is not None:
            self.networks.choose(settings.multipliers, part)


def time_ids(settings: contract.ImageSettings, negative: bool) -> Tensor:
    """Return SDXL's size conditions, 1 6: original height and width, crop top and left, height and width.

    The original size defaults to the image's size; with `negative`, to the original size for the prompt.
    """
    sizes = settings.sizes
    height = settings.height if sizes.original_height is None else sizes.original_height
    width = settings.width if sizes.original_width is None else sizes.original_width
    if negative and sizes.original_height_negative is not None:
        height = sizes.original_height_negative
    if negative and sizes.original_width_negative is not None:
        width = sizes.original_width_negative
    top = sizes.crop_top or 0
    left = sizes.crop_left or 0
    return torch.tensor([(height, width, top, left, settings.height, settings.width)], dtype=torch.float32)


def _list_vision_paths(requests: Sequence[contract.RequestedImage]) -> list[Path]:
    """Return the input images to use CLIP embeddings of; raise OptionError if an image is missing."""
    paths = [request.image for request in requests if request.image is not None]
    if len(paths) < len(requests):
        raise OptionError(
            f"{requests[0].label}: --clip_vision_strength needs --image_path, the picture that CLIP sees"
        )
    return paths


def _pick(start: contract.SecondStageInput, indices: Sequence[int]) -> contract.SecondStageInput:
    """Return the start images or start latents of some images of the batch, by index."""
    images = None if start.images is None else [start.images[index] for index in indices]
    return contract.SecondStageInput(images, None if start.latents is None else start.latents[indices])

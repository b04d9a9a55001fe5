"""Generate a batch of images: encode texts, prepare the start, denoise, decode."""
# Letters: B images, h w latent size

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from generation import denoise as loop
from modules.bars import Bar
from modules.errors import OptionError
from protocols.steps import CompletedStep, Section
from stable_diffusion import contract, samplers, starting
from stable_diffusion.guiding import Guides
from stable_diffusion.loras import AdjustableLoras
from stable_diffusion.regions import Regions, join_parts, split_parts
from stable_diffusion.sampling_options import SamplingOptions
from stable_diffusion.small_start import begin_small, check_batch
from stable_diffusion.text import ImageVectors, PromptEncoder


class BatchHook(Protocol):
    """An extension that modifies the U-Net for a batch, such as ControlNets, Deep Shrink or regions."""

    def apply_to_batch(
        self, requests: Sequence[contract.RequestedImage], width: int, height: int
    ) -> AbstractContextManager[contract.UnetHook | None]:
        """Return a context manager that modifies the U-Net for a batch and restores it at the end.

        It yields a function to call before each U-Net call, or None.
        """


class _TextStates(NamedTuple):
    """Text states of a batch, one per image."""

    positive: list[contract.TextState]
    negative: list[contract.TextState] | None  # None without guidance
    empty: list[contract.TextState] | None  # of the empty text, for the third pass of --negative_scale


@dataclass(frozen=True, eq=False)
class ImageGenerator:
    """Generate images with a loaded model, batch by batch."""

    model: contract.Model
    prompt_encoder: PromptEncoder
    sampling: SamplingOptions
    vae_batch_size: float | None = None
    loras: AdjustableLoras | None = None
    batch_hooks: Sequence[BatchHook] = ()  # in the order in which they see a U-Net call
    regions: Regions | None = None  # regions of prompts with several parts
    image_vectors: ImageVectors | None = None
    guides: Guides | None = None
    restores_unmasked: bool = False  # whether inpainting models also restore the unmasked area exactly

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
        latents_by_index: dict[int, Tensor] = {}
        for indices in self._group_indices(requests):
            group_start = None if start is None else _select_start(start, indices)
            group_latents = self._generate_latents([requests[index] for index in indices], group_start)
            latents_by_index |= dict(zip(indices, group_latents, strict=True))
        latents = torch.stack([latents_by_index[index] for index in range(len(requests))])
        if not wants_images:
            return contract.StageResult(latents, None)
        labels = [request.label for request in requests]
        images = starting.decode_latents(self.model, latents, labels, self.vae_batch_size)
        return contract.StageResult(latents, images)

    def _group_indices(self, requests: Sequence[contract.RequestedImage]) -> list[list[int]]:
        """Group requests that can share a batch; return their indices by group."""

        def group_key(index: int) -> tuple[int, ...]:
            request = requests[index]
            own_group = 0 if self.guides is None else index  # guided images are generated alone
            return self._count_chunks(request), request.image is not None, request.mask is not None, own_group

        # sorted, because groupby only joins neighbors
        indices = sorted(range(len(requests)), key=group_key)
        return [list(group) for _, group in groupby(indices, group_key)]

    def _generate_latents(
        self, requests: Sequence[contract.RequestedImage], start: contract.SecondStageInput | None
    ) -> Tensor:
        """Generate the latents, B 4 h w, of images with equal settings and prompts of equal length."""
        # Encode the prompts, make the start latents, set up the U-Net (ControlNets, regions), denoise.
        settings = requests[0].settings
        options = self.sampling
        gradual = settings.gradual_latent
        if gradual is not None:
            check_batch(requests, options.sampler)
        sampler = samplers.begin_sampling(
            self._scheduler,
            settings.steps,
            # on the CPU, so that a seed gives the same noise on every device
            [torch.Generator().manual_seed(request.seed) for request in requests],
            samplers.count_skipped_steps(settings.steps, starting.find_strength(requests[0], start)),
        )
        text_states = self._encode(requests)
        beginning = starting.begin(
            self.model,
            requests,
            start=start,
            sampler=sampler,
            noise_options=options.noise,
            restores_unmasked=self.restores_unmasked,
        )
        if gradual is not None:
            small_latents, growing_sampler = begin_small(beginning.latents, sampler, gradual)
            beginning = replace(beginning, latents=small_latents, sampler=growing_sampler)
        self._select_loras(settings)  # all of them, because encoding prompt parts selects one at a time
        with self._modify_unet(requests) as unet_hooks:
            passes = samplers.UnetPasses(self.model, beginning.sampler, unet_hooks, beginning.inpainting)
            return self._denoise(passes, beginning, text_states, requests[0])

    @contextmanager
    def _modify_unet(self, requests: Sequence[contract.RequestedImage]) -> Iterator[list[contract.UnetHook]]:
        """Apply ControlNets, Deep Shrink, regions and so on to the U-Net for a batch, then restore it."""
        # Yields the functions to call before each U-Net call.
        settings = requests[0].settings
        batch_hooks = [*self.batch_hooks]
        if self.regions is not None:
            batch_hooks.append(self.regions)
        with ExitStack() as stack:
            unet_hooks = []
            for batch_hook in batch_hooks:
                context = batch_hook.apply_to_batch(requests, settings.width, settings.height)
                unet_hook = stack.enter_context(context)
                if unet_hook is not None:
                    unet_hooks.append(unet_hook)
            yield unet_hooks

    def _denoise(
        self,
        passes: samplers.UnetPasses,
        beginning: starting.Beginning,
        text_states: _TextStates,
        request: contract.RequestedImage,
    ) -> Tensor:
        """Denoise a batch and return its latents, B 4 h w."""
        sampler = beginning.sampler
        settings = request.settings
        guidance = samplers.make_guidance(settings.scale, settings.negative_scale)
        if self.guides is not None:
            guidance = self.guides.steer(guidance, passes, request)
        section = self._make_section(beginning.latents, text_states, settings)

        num_steps = sampler.schedule.num_steps - sampler.first_index
        with Bar(num_steps, "Denoising") as bar:

            def update_bar(_: CompletedStep) -> bool:
                bar.update()
                return False  # True would stop the loop

            latents = loop.denoise(
                passes,
                lambda _: self.model.unet,  # one network for all noise levels
                section,
                latents=beginning.latents,
                solver=sampler,
                guidance=guidance,
                watchers=[update_bar],
                split=False,  # guidance passes run as one batch
                first_step=sampler.first_index,
            )
        return latents.squeeze(2)  # without the axis of frames

    def _make_section(
        self, latents: Tensor, text_states: _TextStates, settings: contract.ImageSettings
    ) -> Section:
        """Return the denoising loop's input: start latents, and conditions of all three kinds of prompts."""
        device = self.model.device
        positive_sizes = negative_sizes = None
        if self.model.kind is contract.SDXL:
            positive_sizes = time_ids(settings, negative=False)
            negative_sizes = time_ids(settings, negative=True)
        positive = samplers.make_conditions(text_states.positive, device, positive_sizes)
        negative = empty = None
        if text_states.negative is not None:
            negative = samplers.make_conditions(text_states.negative, device, negative_sizes, negative=True)
        if text_states.empty is not None:
            empty = samplers.make_conditions(text_states.empty, device, negative_sizes, negative=True)
        return Section(latents, positive, negative=negative, blank=empty)

    # Texts

    def _count_chunks(self, request: contract.RequestedImage) -> int:
        """Return the number of 75-token chunks in the longest of an image's prompts."""
        texts = [*self._split_prompt(request), *self._list_negative_texts(request)]
        return max(self.prompt_encoder.count_chunks(text) for text in texts)

    def _split_prompt(self, request: contract.RequestedImage) -> list[str]:
        return split_parts(request.prompt) if request.settings.num_parts > 1 else [request.prompt]

    def _list_negative_texts(self, request: contract.RequestedImage) -> list[str]:
        """Return the negative prompt, plus an empty one if there are three passes; [] without guidance."""
        settings = request.settings
        if not samplers.is_guided(settings.scale, settings.negative_scale):
            return []
        return [request.negative_prompt] if settings.negative_scale is None else [request.negative_prompt, ""]

    def _encode(self, requests: Sequence[contract.RequestedImage]) -> _TextStates:
        """Encode a batch's prompts, negative prompts and, for three guidance passes, the empty prompt."""
        settings = requests[0].settings
        prompt_parts = [self._split_prompt(request) for request in requests]
        negative_texts = [self._list_negative_texts(request) for request in requests]
        # with a region mask, part i of the prompt is encoded with LoRA i alone, also in negative prompts
        is_regional = settings.num_parts > 1 and requests[0].mask is not None
        states = self._encode_parts(requests[0], prompt_parts, negative_texts, is_regional)
        positive = self._join_texts(requests, prompt_parts, states, is_regional)
        if self.image_vectors is not None:
            # The input images for CLIP vision embeddings; raise OptionError if a request has none
            paths = [request.image for request in requests if request.image is not None]
            if len(paths) < len(requests):
                raise OptionError(
                    f"{requests[0].label}: --clip_vision_strength needs --image_path, the image that CLIP "
                    "sees"
                )
            positive = self.image_vectors.replace_pooled(positive, paths)
        negative_and_empty: list[list[contract.TextState] | None] = [None, None]
        for index in range(len(negative_texts[0])):  # all images have the same number of negative texts
            # a negative text applies to all parts of the prompt
            repeated = [[texts[index]] * settings.num_parts for texts in negative_texts]
            negative_and_empty[index] = self._join_texts(requests, repeated, states, is_regional)
        negative, empty = negative_and_empty
        return _TextStates(positive, negative, empty)

    def _join_texts(
        self,
        requests: Sequence[contract.RequestedImage],
        texts_by_image: Sequence[Sequence[str]],
        states: Mapping[tuple[str, int | None], contract.TextState],
        is_regional: bool,
    ) -> list[contract.TextState]:
        """Return one text state per image, joined from the states of its prompt parts."""
        # `states` and `is_regional` are the result and an argument of `_encode_parts`.
        joined = []
        for request, texts in zip(requests, texts_by_image, strict=True):
            part_states = [states[text, part if is_regional else None] for part, text in enumerate(texts)]
            joined.append(self._join_parts(request, part_states))
        return joined

    def _join_parts(
        self, request: contract.RequestedImage, parts: Sequence[contract.TextState]
    ) -> contract.TextState:
        """Combine the text states of a prompt's parts into one; each part affects its own region."""
        if len(parts) == 1:
            return parts[0]
        regions = self.regions or Regions(self.model.unet)
        settings = request.settings
        return join_parts(parts, regions.read_regions(request, settings.width, settings.height))

    def _encode_parts(
        self,
        request: contract.RequestedImage,
        prompt_parts: Sequence[Sequence[str]],
        negative_texts: Sequence[Sequence[str]],
        is_regional: bool,
    ) -> dict[tuple[str, int | None], contract.TextState]:
        """Return the states of a batch's texts, keyed by text and, if LoRAs are regional, part index."""
        settings = request.settings
        num_chunks = self._count_chunks(request)
        states: dict[tuple[str, int | None], contract.TextState] = {}
        for index in range(settings.num_parts):
            active_lora = index if is_regional else None  # None: all LoRAs
            self._select_loras(settings, active_lora)  # before encoding, as they change text encoders too
            for parts, negatives in zip(prompt_parts, negative_texts, strict=True):
                for text in (parts[index], *negatives):
                    if (text, active_lora) not in states:
                        lora_key = (settings.multipliers, active_lora)
                        states[text, active_lora] = self.prompt_encoder.encode(text, num_chunks, lora_key)
        return states

    def _select_loras(self, settings: contract.ImageSettings, part: int | None = None) -> None:
        if self.loras is not None:
            self.loras.set_strengths(settings.multipliers, part)


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


def _select_start(start: contract.SecondStageInput, indices: Sequence[int]) -> contract.SecondStageInput:
    """Return the start images or start latents of the batch's images at `indices`."""
    images = None if start.images is None else [start.images[index] for index in indices]
    return contract.SecondStageInput(images, None if start.latents is None else start.latents[indices])

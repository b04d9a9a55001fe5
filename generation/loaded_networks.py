"""Keep the networks of a run: each kind is loaded when first needed, and only one kind is on the device.

The kinds are the text encoders, the media encoders (VAE and image encoder) and the DiT. Between its phases a
kind waits on the CPU or is freed. If the DiT has several experts, they take turns (`generation.experts`).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from blissful_tuner.guidance import plan_steps
from blissful_tuner.options import PLAIN_GUIDANCE, GuidanceOptions
from checkpoints.finite import is_finite
from generation.denoise import SOURCE, conditions_to
from generation.experts import ExpertOffloader
from modules.bars import track
from modules.console import quiet
from modules.devices import free_memory
from modules.errors import UserError
from modules.media.tracks import Track
from protocols.data import Conditions, MediaEncoders
from protocols.family import Family, HearsAudio, TextEncoder, can_divide
from protocols.loading import BlockSharder
from protocols.requests import Prepared, Prompt, Prompts
from protocols.steps import EncodedPrompts

if TYPE_CHECKING:  # loaded only if LoRAs change text encoders
    from networks.text_loras import TextLoras

CPU = torch.device("cpu")
NO_ENCODERS = MediaEncoders(vae=None)

Texts = dict[Prompt, Conditions]  # every text that was encoded, with all encoders' outputs, on the CPU


@torch.no_grad()
def encode_inputs(family: Family, encoders: MediaEncoders, prepared: Prepared) -> Mapping[int, Conditions]:
    """Return the encoded images and videos of a request, by section index.

    Conditions are on the CPU, with a batch dimension. The source of denoising is in section 0, as `SOURCE`.

    Args:
        family: The model family.
        encoders: Media encoders on their device; `NO_ENCODERS` if the request needs none (`needs_media`).
        prepared: The request with all values resolved.
    """
    inputs = dict(family.request_conditions(encoders, prepared))
    if prepared.request.source is not None:
        from blissful_tuner.video_to_video import encode_source  # only with a source

        inputs[0] = {**inputs.get(0, {}), SOURCE: encode_source(family, encoders, prepared)}
    return {section: conditions_to(conditions, CPU) for section, conditions in inputs.items()}


def needs_media(family: Family, prepared: Prepared) -> bool:
    """Return whether a request needs images or a source video encoded before denoising."""
    source = prepared.request.source
    return family.needs_media(prepared) or (source is not None and source.needs_vae)


@dataclass
class Session:
    """The loaded networks of a generation run."""

    family: Family
    device: torch.device
    dits: ExpertOffloader  # with its `keep`, all networks wait on the CPU between phases, for the next prompt
    text_loras: "TextLoras | None" = None
    blocks: BlockSharder | None = None  # splits text encoders over processes, which encode the same prompts
    _encoded: Texts = field(default_factory=dict)
    _text_encoders: Sequence[TextEncoder] | None = None
    _media: MediaEncoders | None = None
    _has_image_encoder: bool = False
    _logged_media: set[bool] = field(default_factory=set)  # values of `images` whose load was logged

    def encode_texts(self, prompts: Sequence[Mapping[int, Prompts]]) -> list[Mapping[int, EncodedPrompts]]:
        """Encode the prompts of each section, as listed by `select_prompts`.

        Each text encoder is loaded once and encodes each new prompt alone, because its conditions must not
        depend on another prompt. Before the next encoder is loaded, it is freed or, with `keep`, moved to the
        CPU.

        Returns:
            Conditions on the CPU, without a batch dimension.
        """
        if self._text_encoders is None:
            self._text_encoders = self.family.text_encoders()
            if self.blocks is not None:
                # each process loads only some of the blocks
                for encoder in self._text_encoders:
                    if can_divide(encoder):
                        encoder.blocks = self.blocks
            if self.text_loras is not None:
                self.text_loras.warn_about_unused_changes(self._text_encoders)
        new_prompts = [text for text in list_prompts(prompts) if text not in self._encoded]
        outputs: dict[Prompt, dict[str, Tensor | list[Tensor]]] = {}
        for encoder in self._text_encoders if new_prompts else ():
            for text, conditions in self._encode_with(encoder, new_prompts).items():
                outputs.setdefault(text, {}).update(conditions)
        self._encoded.update(outputs)  # after all encoders, so that no partly encoded prompt is kept
        return [gather_encoded(by_section, self._encoded) for by_section in prompts]

    @torch.no_grad()
    def _encode_with(self, encoder: TextEncoder, prompts: Sequence[Prompt]) -> Texts:
        """Load a text encoder, encode the prompts, and free it or, with `keep`, move it to the CPU."""
        outputs: Texts = {}
        is_loaded = False
        try:
            encoder.load(self.device)
            is_loaded = True
            if self.text_loras is not None:
                self.text_loras.add_to(encoder)
            for text in track(prompts, "Encoding texts", len(prompts), unit="text"):
                (conditions,) = encoder.encode([text])
                outputs[text] = conditions_to(conditions, CPU)
        finally:
            if self.dits.keep and is_loaded:  # otherwise Ctrl-C may have interrupted a move
                encoder.load(CPU)  # moves the loaded encoder
            else:
                encoder.free()
            free_memory(self.device)
        return outputs

    def count_new(self, prompts: Iterable[Mapping[int, Prompts]]) -> int:
        """Return how many of the prompts still have to be encoded."""
        return sum(text not in self._encoded for text in list_prompts(prompts))

    def encode_with_loras(
        self, loras: "TextLoras", prompts: Sequence[Mapping[int, Prompts]]
    ) -> list[Mapping[int, EncodedPrompts]]:
        """Encode the prompts of each section with LoRAs in the text encoders, which are then freed."""
        assert not self.dits.keep, "kept encoders have the LoRAs of before in their weights"
        before = self._encoded, self.text_loras
        self._encoded = {}  # it keeps results by prompt, but these also depend on the LoRAs
        self.text_loras = loras
        try:
            return self.encode_texts(prompts)
        finally:
            self._encoded, self.text_loras = before

    @contextmanager
    def media(self, with_image_encoder: bool, needed_again: bool) -> Iterator[MediaEncoders]:
        """Yield the media encoders on the device.

        Args:
            with_image_encoder: Whether to include the image encoder.
            needed_again: Whether the encoders are needed again later. They then wait on the CPU; if the CPU
                is the device, they are freed and loaded again.
        """
        try:
            if self._media is None or (with_image_encoder and not self._has_image_encoder):
                # the VAE is loaded again with the image encoder, which is rare; two VAEs would not fit
                self._media = None
                # a VAE that is loaded repeatedly, as for each sample of CPU training, is logged once
                with quiet() if with_image_encoder in self._logged_media else nullcontext():
                    self._media = self.family.media_encoders(self.device, with_image_encoder)
                self._has_image_encoder = with_image_encoder
                self._logged_media.add(with_image_encoder)
            else:
                _move(self._media, self.device, with_image_encoder)
            with torch.no_grad():
                yield self._media
        finally:  # also if Ctrl-C interrupts a move
            stays_in_host_memory = self.dits.keep or (needed_again and self.device != CPU)
            if self._media is not None and stays_in_host_memory:
                _move(self._media, CPU, images=True)
            else:
                self._media = None
            free_memory(self.device)

    def drop_image_encoder(self) -> None:
        """Free the image encoder, unless networks are kept for further prompts."""
        if self._media is not None and not self.dits.keep:
            self._media = replace(self._media, image_encoder=None)
            self._has_image_encoder = False

    def free(self) -> None:
        """Free all networks and torch's cached device memory."""
        for encoder in self._text_encoders or ():
            encoder.free()
        self._media = None
        self.dits.free()
        free_memory(self.device)


def select_prompts(prepared: Prepared, options: GuidanceOptions = PLAIN_GUIDANCE) -> Mapping[int, Prompts]:
    """Return the prompts to encode by section, without those that guidance does not use."""
    # "positive", "negative" and "blank", as the guidance passes of any step use them
    needed: set[str] = set()
    for expert_plans in plan_steps(prepared, options):
        for plan in expert_plans:
            needed |= {guidance_pass.conditions_name for guidance_pass in plan.passes}
    return {
        section: replace(
            prompts,
            negative=prompts.negative if "negative" in needed else None,
            blank=(prompts.blank or Prompt("")) if "blank" in needed else None,
            # NAG steers attention away from a text: by default from the negative prompt
            nag=(prompts.nag or prompts.negative or Prompt("")) if options.nag.is_on else None,
        )
        for section, prompts in prepared.prompts.items()
    }


def list_prompts(prompts: Iterable[Mapping[int, Prompts]]) -> list[Prompt]:
    """Return the distinct prompts of several requests; each request maps section indices to prompts."""
    texts: dict[Prompt, None] = {}
    for by_section in prompts:
        for section in by_section.values():
            for text in (section.positive, section.negative, section.blank, section.nag):
                if text is not None:
                    texts[text] = None
    return list(texts)


def gather_encoded(
    prompts: Mapping[int, Prompts], encoded: Mapping[Prompt, Conditions]
) -> dict[int, EncodedPrompts]:
    """Return the encoded prompts of each section, by its index.

    Args:
        prompts: Prompts of each section, by its index.
        encoded: Conditions of each prompt.
    """
    # a prompt that is not needed, such as the negative one without guidance, is None
    conditions_by_prompt: dict[Prompt | None, Conditions | None] = {None: None}
    for text, conditions in encoded.items():
        conditions_by_prompt[text] = conditions
    return {
        section: EncodedPrompts(
            encoded[texts.positive],
            negative=conditions_by_prompt[texts.negative],
            blank=conditions_by_prompt[texts.blank],
            nag=conditions_by_prompt[texts.nag],
        )
        for section, texts in prompts.items()
    }


def _move(encoders: MediaEncoders, device: torch.device, images: bool) -> None:
    networks: tuple[Any, ...] = (encoders.vae, encoders.image_encoder if images else None)
    for network in networks:
        if network is not None:
            network.to(device)


@torch.no_grad()
def decode_tracks(
    family: HearsAudio,
    latents: Mapping[str, Tensor],
    device: torch.device,
    collect_errors: Callable[[str], AbstractContextManager[object]],
) -> dict[str, Track]:
    """Decode audio latents; return the track of each clip by label, without those that fail.

    Args:
        family: The model family.
        latents: Audio latents in model space, 1 C T M, by label.
        device: Device of the run.
        collect_errors: Returns a context manager for a label that records errors of the clip.
    """
    tracks: dict[str, Track] = {}
    if not latents:
        return tracks
    networks = family.audio_networks(device, decodes=True)
    try:
        for label in track(latents, "Decoding sound", len(latents), unit="clip"):
            with collect_errors(label):
                audio = family.decode_audio(networks, latents[label].to(device))
                if not is_finite(audio.samples):
                    raise UserError(
                        "The audio decoder produced NaN or infinite values from valid latents. Use "
                        "--vae_dtype float32"
                    )
                tracks[label] = audio.samples.float().cpu().numpy(), audio.rate
    finally:
        del networks
        free_memory(device)
    return tracks

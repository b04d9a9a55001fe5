"""The networks of a family over a run: loaded when first needed, one kind at a time on the device.

The kinds are the text encoders, the media encoders (VAE and image encoder) and the DiT. Between its phases a
kind is kept on the CPU or freed. If the DiT has several experts, they take turns on the device, unless it has
room for all of them.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from blissful_tuner.guidance import needs
from blissful_tuner.guidance_options import PLAIN_GUIDANCE, GuidanceOptions
from blissful_tuner.video_to_video import encode_source
from generation.sections import SOURCE, conditions_to
from modules.bars import track
from modules.contract.data import Conditions, MediaEncoders
from modules.contract.experts import expert_at, noisiest
from modules.contract.family import Family, TextEncoder
from modules.contract.generation import DitAt, EncodedPrompts, Prompt, Prompts
from modules.contract.prepared import Prepared
from modules.contract.steps import Needs
from modules.devices import free_memory
from modules.errors import MemoryPlanError
from modules.offload.block_swap import move_network
from modules.planning.device_memory import bytes_on, host_room, spare_bytes
from modules.planning.memory_plan import gib

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")
NO_ENCODERS = MediaEncoders(vae=None)

Texts = dict[Prompt, Conditions]  # every text that was encoded, with all encoders' outputs, on the CPU


def encode_inputs(
    family: Family, encoders: MediaEncoders, requests: Sequence[Prepared]
) -> list[Mapping[int, Conditions]]:
    """Encode the images and videos of each request, by section. Conditions are on the CPU, with batch
    dimension.

    What denoising starts from is among those of section 0, as `SOURCE`. encoders: on their device;
    `NO_ENCODERS` will do if no request `needs_media`.
    """
    found: list[Mapping[int, Conditions]] = []
    with torch.no_grad():
        for prepared in requests:
            by_section = dict(family.request_conditions(encoders, prepared))
            if prepared.asked.source is not None:
                by_section[0] = {**by_section.get(0, {}), SOURCE: encode_source(family, encoders, prepared)}
            found.append(
                {section: conditions_to(conditions, CPU) for section, conditions in by_section.items()}
            )
    return found


def needs_media(family: Family, prepared: Prepared) -> bool:
    """Whether images or videos must be encoded before denoising."""
    source = prepared.asked.source
    return family.needs_media(prepared) or (source is not None and source.needs_vae)


@dataclass
class Session:
    """The loaded networks of one run of the generation script."""

    family: Family
    device: torch.device
    load_dit: Callable[[int], nn.Module]  # expert -> network on the device
    keep: bool  # whether networks stay on the CPU between their phases, for the next prompt
    spare_bytes: Callable[[torch.device], int] = spare_bytes  # of a CUDA device
    host_room: Callable[[], int | None] = host_room
    # bytes of the device, where something was let in beside the DiT
    most_beside: int = field(default=0, init=False)
    _known: Texts = field(default_factory=dict)
    _text_encoders: Sequence[TextEncoder] | None = None
    _media: MediaEncoders | None = None
    _has_image_encoder: bool = False
    _dits: dict[int, nn.Module] = field(default_factory=dict)  # by expert: those that are loaded
    _working: set[int] = field(default_factory=set)  # experts that are on the device

    def texts(self, wanted: Sequence[Mapping[int, Prompts]]) -> list[Mapping[int, EncodedPrompts]]:
        """Encode texts by section, as `wanted_texts` names them. Conditions are on the CPU, without batch
        dimension.

        Each text encoder is loaded once, encodes each text that is new once and alone (its conditions depend
        on no other), and is freed, or with `keep` moved to the CPU, before the next is loaded.
        """
        if self._text_encoders is None:
            self._text_encoders = self.family.text_encoders()
        new = [text for text in dict.fromkeys(texts_of(wanted)) if text not in self._known]
        outputs: dict[Prompt, dict[str, Tensor | list[Tensor]]] = {}
        for encoder in self._text_encoders if new else ():
            with _at_work(encoder, self.device, self.keep), torch.no_grad():
                for text in track(new, "Encoding texts", len(new), unit="text"):
                    (conditions,) = encoder.encode([text])
                    outputs.setdefault(text, {}).update(conditions_to(conditions, CPU))
        self._known.update(outputs)  # only now: an interrupted text is not known by half
        return [
            {section: gather_encoded(prompts, self._known) for section, prompts in by_section.items()}
            for by_section in wanted
        ]

    @contextmanager
    def media(self, images: bool, again: bool) -> Iterator[MediaEncoders]:
        """The VAE on the device, with the image encoder where `images`; `again`: they are needed later and
        wait on the CPU.
        """
        try:
            if self._media is None or (images and not self._has_image_encoder):
                # the VAE comes again with the image encoder: rare, and two at once would not fit
                self._media = None
                self._media, self._has_image_encoder = self.family.media_encoders(self.device, images), images
            else:
                _move(self._media, self.device, images)
            with torch.no_grad():
                yield self._media
        finally:  # also where Ctrl-C comes in the middle of a move
            if self._media is not None and (again or self.keep):
                _move(self._media, CPU, images=True)
            else:
                self._media = None
            free_memory(self.device)

    def drop_image_encoder(self) -> None:
        """Free what only inputs need, where the inputs of all requests are encoded."""
        if self._media is not None and not self.keep:
            self._media, self._has_image_encoder = replace(self._media, image_encoder=None), False

    def dit_can_stay(self, needed: int | None) -> bool:
        """Whether the DiT may stay where it works while something else needs so many bytes of the device;
        None: not known.
        """
        if self.device.type == "cpu":
            return True
        if self.device.type == "cuda" and needed is not None and needed <= self.spare_bytes(self.device):
            self.most_beside = max(self.most_beside, torch.cuda.memory_allocated(self.device) + needed)
            return True
        return False

    @contextmanager
    def dit_aside(self) -> Iterator[None]:
        """A block in the midst of the DiT's work, which waits on the CPU meanwhile.

        Raises MemoryPlanError where the host has no room for it; there a system may end the process without a
        word.
        """
        working = [self._dits[expert] for expert in self._working]
        weights, room = sum(bytes_on(dit, self.device) for dit in working), self.host_room()
        if room is not None and weights > room:
            raise MemoryPlanError(
                f"the transformer would have to wait in host memory, which has {gib(room)} GiB free; it "
                f"takes {gib(weights)} GiB"
            )
        try:
            for dit in working:
                move_network(dit, CPU)
            free_memory(self.device)
            yield
        finally:
            for dit in working:
                move_network(dit, self.device)

    @contextmanager
    def dit(self) -> Iterator[DitAt]:
        """The denoising network, as timestep -> the expert for it, on the device.

        That of the highest timesteps, with which a video from noise begins, comes at once; another when it is
        asked for.
        """
        experts = self.family.experts
        try:
            self._bring(noisiest(experts))
            yield lambda timestep: self._bring(expert_at(timestep, experts))
        finally:  # also where Ctrl-C comes in the middle of a move
            if not self.keep:
                self._dits, self._working = {}, set()
            elif self.device.type != "cpu":
                for expert in [*self._working]:
                    self._put_away(expert)
            free_memory(self.device)

    def _bring(self, expert: int) -> nn.Module:
        """Put an expert on the device.

        Those that are there make room first, unless the device has room for both.
        """
        if expert not in self._working:
            for other in [*self._working]:
                if not self._fits_beside(self._dits[other]):
                    self._put_away(other)
            if expert in self._dits:
                self._working.add(expert)  # now, as it may be interrupted half-way
                move_network(self._dits[expert], self.device)
            else:
                self._dits[expert] = self.load_dit(expert).eval().requires_grad_(False)
                self._working.add(expert)
        return self._dits[expert]

    def _fits_beside(self, working: nn.Module) -> bool:
        """Whether another expert, which is as large, may come beside one that is at work."""
        weights = bytes_on(working, self.device)
        if self.device.type == "cpu":
            room = self.host_room()
            return room is None or weights <= room
        if self.device.type != "cuda":
            return False
        # what the steps until now have taken beside the weights, the next ones will take again
        steps = torch.cuda.max_memory_allocated(self.device) - torch.cuda.memory_allocated(self.device)
        return self.dit_can_stay(weights + steps)

    def _put_away(self, expert: int) -> None:
        """Have an expert wait in host memory, or free it if that has no room or is where it works."""
        weights, room = bytes_on(self._dits[expert], self.device), self.host_room()
        if self.device.type != "cpu" and (room is None or weights <= room):
            move_network(self._dits[expert], CPU)
            self._working.remove(expert)
        else:
            logger.info(
                "The host has no room for a transformer that waits: it is loaded again when it is needed"
            )
            self._working.remove(expert)
            del self._dits[expert]
        free_memory(self.device)


def wanted_texts(prepared: Prepared, options: GuidanceOptions = PLAIN_GUIDANCE) -> Mapping[int, Prompts]:
    """List the texts that are to be encoded, by section: the prompt, and what guidance needs."""
    needed = needs(prepared, options)
    return {section: select_texts(texts, needed) for section, texts in prepared.prompts.items()}


def select_texts(texts: Prompts, needed: Needs) -> Prompts:
    """Leave out the texts that are not needed, and put in those that are: the empty one, and as the one to
    steer away from the negative one if there is no other.
    """
    return replace(
        texts,
        negative=texts.negative if needed.negative else None,
        blank=(texts.blank or Prompt("")) if needed.blank else None,
        away=(texts.away or texts.negative or Prompt("")) if needed.away else None,
    )


def texts_of(wanted: Sequence[Mapping[int, Prompts]]) -> Iterator[Prompt]:
    """All of them one after the other, those that are there."""
    for by_section in wanted:
        for prompts in by_section.values():
            texts = (prompts.positive, prompts.negative, prompts.blank, prompts.away)
            yield from (text for text in texts if text is not None)


def gather_encoded(prompts: Prompts, known: Mapping[Prompt, Conditions]) -> EncodedPrompts:
    """What the encoders made of a section's texts."""

    def of(text: Prompt | None) -> Conditions | None:
        return None if text is None else known[text]

    return EncodedPrompts(known[prompts.positive], of(prompts.negative), of(prompts.blank), of(prompts.away))


@contextmanager
def _at_work(encoder: TextEncoder, device: torch.device, keep: bool) -> Iterator[None]:
    """The encoder on the device; afterwards on the CPU (`keep`) or freed."""
    try:
        encoder.load(device)
    except BaseException:
        encoder.free()  # Ctrl-C may have come in the middle of a move
        raise
    try:
        yield
    finally:
        if keep:
            encoder.load(CPU)  # a loaded encoder moves
        else:
            encoder.free()
        free_memory(device)


def _move(encoders: MediaEncoders, device: torch.device, images: bool) -> None:
    networks: tuple[Any, ...] = (encoders.vae, encoders.image_encoder if images else None)
    for network in networks:
        if network is not None:
            network.to(device)

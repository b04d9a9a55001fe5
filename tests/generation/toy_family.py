"""A family of toy networks that keeps a diary: what was loaded, moved and freed, in order."""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from frame_pack.sections import blend_overlaps, decoding_slices, section_frames, video_frames
from modules.errors import CheckpointError, MediaError, OptionError
from protocols.data import (
    Batch,
    CacheEntry,
    Conditions,
    LatentSpec,
    MediaBatch,
    MediaEncoders,
    SamplingDefaults,
)
from protocols.family import (
    FLOW,
    Abilities,
    DitSpec,
    EncoderAbilities,
    Family,
    NoiseSource,
    NoiseSpec,
    TextEncoder,
)
from protocols.loading import Placement
from protocols.requests import Prepared, Prompt, Request, get_size, resolve_request
from protocols.rules import ONE_EXPERT, CountTokens, Expert, ModelRelease, SourceRules, TokenCount
from protocols.steps import NO_OVERRIDES, EncodedPrompts, Overrides, PreviewPiece, Section

TOY_RELEASE = ModelRelease(("owner/toy",), "Toy license", "other", "https://example.org/licence")
LATENT = LatentSpec(channels=2, stride=(4, 8, 8), pixel_step=16, frame_step=4)
WINDOW = 3


class ToyTextEncoder:
    """A text becomes its length."""

    name = "letters"
    abilities = EncoderAbilities()
    keys = frozenset({"letters"})
    variable_length = frozenset({"letters"})
    identity: Mapping[str, str] = {"letters": "1"}

    def __init__(self, diary: list[str], stop: Callable[[str], None]) -> None:
        self.diary = diary
        self.stop = stop
        self.loaded = False

    def token_counter(self) -> CountTokens:
        return lambda text: TokenCount(text, 1, 1, len(text))

    def load(self, device: torch.device) -> None:
        self.diary.append("move text" if self.loaded else "load text")
        self.stop("text")
        self.loaded = True

    def encode(self, prompts: Sequence[Prompt]) -> list[Conditions]:
        assert self.loaded
        self.diary.extend(f"encode {prompt.text}" for prompt in prompts)
        return [{"letters": [torch.full((1, 1), float(len(prompt.text)))]} for prompt in prompts]

    def free(self) -> None:
        self.diary.append("free text")
        self.loaded = False


class ToyVae(nn.Module):
    """Every latent pixel is one picture of 8 x 8 pixels; latent frames after the first are four.

    A frame shows the mean so far.
    """

    def __init__(
        self, diary: list[str], places: dict[str, str], on_chunk: Callable[[], object] = lambda: None
    ) -> None:
        super().__init__()
        self.on_chunk = on_chunk
        self.diary = diary
        self.places = places

    def to(self, device: torch.device) -> "ToyVae":  # type: ignore[override]
        self.places["vae"] = str(device)
        return self

    def decode(self, latents: Tensor) -> Iterator[Tensor]:
        together = self.places["vae"] != "cpu" and self.places["vae"] == self.places.get("dit")
        self.diary.append("decode beside dit" if together else "decode")
        latents = latents.cumsum(2) / torch.arange(1, latents.shape[2] + 1).view(-1, 1, 1)
        pixels = (
            latents[:, :1].clamp(-1, 1).repeat(1, 3, 1, 1, 1).repeat_interleave(8, 3).repeat_interleave(8, 4)
        )
        for index, frame in enumerate(pixels.split(1, dim=2)):
            self.on_chunk()
            yield frame if index == 0 else frame.repeat_interleave(4, 2)


class ToyDit(nn.Module):
    """velocity = scale * (noisy + letters / 100); a skipped block halves it."""

    def __init__(self, places: dict[str, str] | None = None, has_room_on_host: bool = True) -> None:
        super().__init__()
        self.places = {} if places is None else places
        self.has_room_on_host = has_room_on_host
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.blocks = nn.ModuleList([nn.Identity(), nn.Identity()])

    def to(self, device: torch.device) -> "ToyDit":  # type: ignore[override]
        if device.type == "cpu" and not self.has_room_on_host:
            raise RuntimeError("not enough memory")  # as torch's allocator of host memory does
        self.places["dit"] = str(device)
        return self

    def forward(self, noisy: Tensor, letters: list[Tensor], overrides: Overrides) -> Tensor:
        text = torch.stack([one.mean() for one in letters]).view(-1, 1, 1, 1, 1)
        return self.scale * (noisy + text / 100) * 0.5 ** len(overrides.skip_blocks)


@dataclass(frozen=True)
class ToyFamily:
    """Text to video. An image path "missing.png" fails when it is read, a prompt "impossible" at once.

    With `sections_made` a video is that many windows of latent frames behind a first one, made like those of
    FramePack.
    """

    diary: list[str] = field(default_factory=list)
    name: str = "toy"
    abilities: Abilities = Abilities()
    cache_tag: str = "toy"
    lora_module: str = "networks.lora_wan"
    latent: LatentSpec = LATENT
    noise: NoiseSpec = FLOW
    references: None = None
    dit: DitSpec = DitSpec(("blocks",))
    text_keys: frozenset[str] = frozenset({"letters"})
    defaults: SamplingDefaults = SamplingDefaults(3, 16.0, 5.0, None, 3.0, "unipc", 32, 32, 5)
    experts: tuple[Expert, ...] = ONE_EXPERT
    media_identity: Mapping[str, str] = field(default_factory=dict)
    can_decode: bool = True
    interrupt_at: str | None = None  # the prompt at which someone presses Ctrl-C
    interrupt_pass: int | None = None  # the pass at which someone does, from 1
    lost: Path | None = None  # a model file that is not there
    lengths_without_room: frozenset[int] = frozenset()  # of latents whose decoding fails
    has_room_for_two: bool = True  # whether the VAE can decode where the DiT is
    no_room: Exception = torch.OutOfMemoryError("no room")  # raised where it cannot
    has_room_on_host: bool = True  # whether the DiT can be moved there
    sections_made: int = 0
    makes_last_first: bool = True
    places: dict[str, str] = field(default_factory=dict)  # where networks were moved to, though nothing moves
    on_chunk: Callable[[], object] = lambda: None  # called with each chunk of pixels
    source: SourceRules = SourceRules(("video_path",), "the toy", False, frozenset({"toy"}))
    # networks at whose next loading someone presses Ctrl-C
    stop_loading: set[str] = field(default_factory=set)

    def stop(self, network: str) -> None:
        if network in self.stop_loading:
            self.stop_loading.remove(network)
            raise KeyboardInterrupt

    @property
    def release(self) -> ModelRelease:
        return TOY_RELEASE

    @property
    def metadata(self) -> Mapping[str, str]:
        return {"model_type": "toy", "task": "t2v"}

    @property
    def hashed_files(self) -> Mapping[str, Path]:
        return {}

    def text_encoders(self) -> Sequence[TextEncoder]:
        return [ToyTextEncoder(self.diary, self.stop)]

    def media_encoders(self, device: torch.device, images: bool = True) -> MediaEncoders:
        self.diary.append("load vae")
        self.stop("media")
        self.places["vae"] = str(device)
        return MediaEncoders(ToyVae(self.diary, self.places, self.on_chunk))

    def encode_media(self, encoders: MediaEncoders, media: MediaBatch) -> list[list[CacheEntry]]:
        raise NotImplementedError

    def check_named_files(self) -> None: ...

    def block_counts(self) -> tuple[int, ...]:
        return (2,)

    has_dit_files = True

    @property
    def dit_files(self) -> tuple[Path, ...]:
        return ()

    def compute_dtype(self, placement: Placement) -> torch.dtype:
        return torch.float32

    def load_dit(self, placement: Placement, expert: int = 0) -> nn.Module:
        self.diary.append("load dit")
        self.stop("dit")
        self.places["dit"] = str(placement.device)
        dit = ToyDit(self.places, self.has_room_on_host)
        if placement.patch is not None:
            dit.scale.data = placement.patch("blocks.0.scale", dit.scale.data)
        return dit

    def batch_conditions(self, latents: Tensor, batch: Batch) -> Conditions:
        raise NotImplementedError

    def predict(
        self,
        dit: nn.Module,
        noisy: Tensor,
        timesteps: Tensor,
        cond: Conditions,
        overrides: Overrides = NO_OVERRIDES,
    ) -> Tensor:
        self.diary.append(
            f"pass {int(cond['letters'][0])}"
            + (f" without {sorted(overrides.skip_blocks)}" if overrides.skip_blocks else "")
        )
        if self.interrupt_pass == sum(line.startswith("pass") for line in self.diary):
            raise KeyboardInterrupt
        if self.interrupt_at is not None and int(cond["letters"][0]) == len(self.interrupt_at):
            raise KeyboardInterrupt
        return dit(noisy, cond["letters"], overrides)

    def check_files(self, media: bool) -> None:
        if self.lost is not None:
            raise CheckpointError(f"--dit {self.lost}: no such file or folder", self.lost)

    def prepare(self, request: Request) -> Prepared:
        if request.prompt == "impossible":
            raise OptionError("this cannot be made")
        width, height, frames = get_size(request, self.defaults)
        if self.sections_made:
            frames = video_frames(self.sections_made, WINDOW)
        return resolve_request(
            request, self.defaults, (width, height, frames), request.flow_shift or 3.0, "bad"
        )

    def encode_source(self, encoders: MediaEncoders, frames: Tensor, seed: int) -> Tensor:
        raise NotImplementedError

    def needs_media(self, prepared: Prepared) -> bool:
        return prepared.request.image_path is not None

    def request_conditions(self, encoders: MediaEncoders, prepared: Prepared) -> Mapping[int, Conditions]:
        path = prepared.request.image_path
        if path is None:
            return {0: {}}
        if path.name == "missing.png":
            raise MediaError("missing.png: no such file")
        self.diary.append(f"encode {path}")
        return {0: {"image": torch.zeros(1, 1)}}

    def sections(
        self,
        prepared: Prepared,
        prompts: Mapping[int, EncodedPrompts],
        inputs: Mapping[int, Conditions],
        noise: NoiseSource,
    ) -> Generator[Section, Tensor, Tensor]:
        shape = self.latent.shape(prepared.frames, prepared.height, prepared.width)
        if self.sections_made:
            return (yield from self.windows(shape, prompts[0], noise))
        return (yield prompts[0].section(noise.draw(shape), inputs[0]))

    def windows(
        self, whole: Sequence[int], prompts: EncodedPrompts, noise: NoiseSource
    ) -> Generator[Section, Tensor, Tensor]:
        shape = list(whole)
        start, shape[2] = torch.full([*shape[:2], 1, *shape[3:]], 0.5), WINDOW
        video, made = (None if self.makes_last_first else start), None
        for number in range(self.sections_made):
            latents = yield replace(
                prompts.section(noise.draw(shape)),
                previous_piece=made,
                label=f"section {number + 1}",
                count=self.sections_made,
            )
            before = [] if video is None else [video]
            video = torch.cat([latents, *before] if self.makes_last_first else [*before, latents], dim=2)
            newest = video[:, :, : 2 * WINDOW] if self.makes_last_first else video[:, :, -2 * WINDOW :]
            made = PreviewPiece(
                newest if number else video,
                section_frames(WINDOW) if number else 0,
                self.makes_last_first,
                self.decode_part,
                video,
            )
        assert video is not None
        return torch.cat([start, video], dim=2) if self.makes_last_first else video

    def decode(self, encoders: MediaEncoders, latents: Tensor) -> Iterator[Tensor]:
        self.check_room(latents)
        if not self.sections_made:
            return encoders.vae.decode(latents)
        slices = decoding_slices(self.sections_made, WINDOW)
        clips = (torch.cat(list(encoders.vae.decode(latents[:, :, part])), dim=2) for part in slices)
        return blend_overlaps(clips, section_frames(WINDOW))

    def decode_part(self, encoders: MediaEncoders, latents: Tensor) -> Iterator[Tensor]:
        self.check_room(latents)
        return encoders.vae.decode(latents)

    def check_room(self, latents: Tensor) -> None:
        is_crowded = (
            self.places.get("dit") == self.places.get("vae", "cpu") != "cpu" and not self.has_room_for_two
        )
        if not self.can_decode or latents.shape[2] in self.lengths_without_room or is_crowded:
            raise self.no_room


_: type[Family] = ToyFamily

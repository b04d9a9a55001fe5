"""A family of toy networks that keeps a diary: what was loaded, moved and freed, in order."""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from modules.errors import CheckpointError, MediaError, OptionError
from modules.family import DitSpec, Family, LatentSpec, NoiseSource, SamplingDefaults, TextEncoder
from modules.records import (
    NO_TWEAKS,
    Batch,
    CacheEntry,
    Conditions,
    EncodedPrompts,
    MediaBatch,
    MediaEncoders,
    Placement,
    Prompt,
    Prompts,
    Request,
    Section,
    Tweaks,
)

LATENT = LatentSpec(channels=2, stride=(4, 8, 8), pixel_step=16, frame_step=4)


class ToyTextEncoder:
    """A text becomes its length."""

    name = "letters"
    keys = frozenset({"letters"})
    variable_length = frozenset({"letters"})
    identity: Mapping[str, str] = {"letters": "1"}

    def __init__(self, diary: list[str], stop: Callable[[str], None]) -> None:
        self.diary = diary
        self.stop = stop
        self.loaded = False

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
    """Every latent pixel is one picture of 8 x 8 pixels; latent frames after the first are four."""

    def __init__(self, diary: list[str]) -> None:
        super().__init__()
        self.diary = diary

    def decode(self, latents: Tensor) -> Iterator[Tensor]:
        self.diary.append("decode")
        pixels = latents[:, :1].clamp(-1, 1).repeat(1, 3, 1, 1, 1).repeat_interleave(8, 3).repeat_interleave(8, 4)
        for index, frame in enumerate(pixels.split(1, dim=2)):
            yield frame if index == 0 else frame.repeat_interleave(4, 2)


class ToyDit(nn.Module):
    """velocity = scale * (noisy + letters / 100); a skipped block halves it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.blocks = nn.ModuleList([nn.Identity(), nn.Identity()])

    def forward(self, noisy: Tensor, letters: list[Tensor], skip_blocks: frozenset[int]) -> Tensor:
        text = torch.stack([one.mean() for one in letters]).view(-1, 1, 1, 1, 1)
        return self.scale * (noisy + text / 100) * 0.5 ** len(skip_blocks)


@dataclass(frozen=True)
class ToyFamily:
    """Text to video. An image path "missing.png" fails when it is read, a prompt "impossible" at once."""

    diary: list[str] = field(default_factory=list)
    name: str = "toy"
    cache_tag: str = "toy"
    lora_module: str = "networks.lora_wan"
    latent: LatentSpec = LATENT
    dit: DitSpec = DitSpec(("blocks",))
    text_keys: frozenset[str] = frozenset({"letters"})
    defaults: SamplingDefaults = SamplingDefaults(3, 16.0, 5.0, None, 3.0, "unipc", 32, 32, 5)
    experts: tuple[float, ...] = (0.0,)
    media_identity: Mapping[str, str] = field(default_factory=dict)
    can_decode: bool = True
    interrupt_at: str | None = None  # the prompt at which someone presses Ctrl-C
    lost: Path | None = None  # a model file that is not there
    stop_loading: set[str] = field(default_factory=set)  # networks at whose next loading someone presses Ctrl-C

    def stop(self, network: str) -> None:
        if network in self.stop_loading:
            self.stop_loading.remove(network)
            raise KeyboardInterrupt

    @property
    def metadata(self) -> Mapping[str, str]:
        return {"model_type": "toy", "task": "t2v"}

    def text_encoders(self) -> Sequence[TextEncoder]:
        return [ToyTextEncoder(self.diary, self.stop)]

    def media_encoders(self, device: torch.device, images: bool = True) -> MediaEncoders:
        self.diary.append("load vae")
        self.stop("media")
        return MediaEncoders(ToyVae(self.diary))

    def encode_media(self, encoders: MediaEncoders, media: MediaBatch) -> list[list[CacheEntry]]:
        raise NotImplementedError

    @property
    def dit_files(self) -> tuple[Path, ...]:
        if self.lost is not None:
            raise CheckpointError(f"--dit {self.lost}: no such file or folder", self.lost)
        return ()

    def compute_dtype(self, placement: Placement) -> torch.dtype:
        return torch.float32

    def load_dit(self, placement: Placement, expert: int = 0) -> nn.Module:
        self.diary.append("load dit")
        self.stop("dit")
        dit = ToyDit()
        if placement.patch is not None:
            dit.scale.data = placement.patch("blocks.0.scale", dit.scale.data)
        return dit

    def batch_conditions(self, latents: Tensor, batch: Batch) -> Conditions:
        raise NotImplementedError

    def predict(self, dit: nn.Module, noisy: Tensor, timesteps: Tensor, cond: Conditions, tweaks: Tweaks = NO_TWEAKS) -> Tensor:
        self.diary.append(
            f"pass {int(cond['letters'][0])}" + (f" without {sorted(tweaks.skip_blocks)}" if tweaks.skip_blocks else "")
        )
        if self.interrupt_at is not None and int(cond["letters"][0]) == len(self.interrupt_at):
            raise KeyboardInterrupt
        return dit(noisy, cond["letters"], tweaks.skip_blocks)

    def prepare(self, request: Request) -> Request:
        if request.prompt == "impossible":
            raise OptionError("this cannot be made")
        usual = self.defaults
        return replace(
            request,
            frames=request.frames or usual.frames,
            steps=request.steps or usual.steps,
            flow_shift=request.flow_shift or usual.flow_shift,
            solver=request.solver or usual.solver,
            fps=request.fps or usual.fps,
            negative_prompt=request.negative_prompt or "bad",
        )

    def prompts(self, request: Request) -> Mapping[int, Prompts]:
        return {0: Prompts(Prompt(request.prompt), Prompt(request.negative_prompt or ""))}

    def needs_media(self, request: Request) -> bool:
        return request.image_path is not None

    def request_conditions(self, encoders: MediaEncoders, request: Request) -> Mapping[int, Conditions]:
        if request.image_path is None:
            return {0: {}}
        if request.image_path.name == "missing.png":
            raise MediaError("missing.png: no such file")
        self.diary.append(f"encode {request.image_path}")
        return {0: {"image": torch.zeros(1, 1)}}

    def sections(
        self,
        request: Request,
        prompts: Mapping[int, EncodedPrompts],
        inputs: Mapping[int, Conditions],
        noise: NoiseSource,
    ) -> Generator[Section, Tensor, Tensor]:
        assert request.frames is not None
        assert request.height is not None
        assert request.width is not None
        shape = self.latent.shape(request.frames, request.height, request.width)
        return (yield prompts[0].section(noise.draw(shape), inputs[0]))

    def decode(self, encoders: MediaEncoders, latents: Tensor) -> Iterator[Tensor]:
        if not self.can_decode:
            raise torch.OutOfMemoryError("no room")
        yield from encoders.vae.decode(latents)


_: type[Family] = ToyFamily

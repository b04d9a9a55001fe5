"""The transformers of all families in one shape, for tests of what acts on them from outside."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from anima.model import AnimaModel
from ernie_image.model import ErnieImageModel
from fibo_2.configs import STATES
from fibo_2.model import Fibo2Model
from flux.model import FluxModel
from flux.spec import dit_spec
from flux_2.model import Flux2Model
from flux_3.model import Flux3Model
from frame_pack.model import FramePackModel
from hidream_o1.model import HiDreamO1Model
from hidream_o1.texts import REFERENCE_ID
from hunyuan_image.model import HunyuanImageModel
from hunyuan_model.model import HunyuanVideoModel
from hunyuan_video_15.model import HunyuanVideo15Model
from ideogram4.model import Ideogram4Model
from kandinsky.model import KandinskyModel
from kandinsky.model_6 import Kandinsky6Model
from krea2.model import Krea2Model
from ltx_2.model import LtxModel
from lumina.model import LuminaModel
from moss_image.model import MossImageModel
from networks.lora_network import OwnNetwork
from protocols.family import DitSpec
from qwen_image.model import QwenImageModel
from qwen_image_21.model import QwenImage21Model
from tests.ltx_2.tiny_dit import DIT_CONFIGS, dit_inputs, dit_state
from tests.networks.making import randomize
from tests.tiny import (
    anima,
    ernie_image,
    fibo_2,
    flux,
    flux_2,
    flux_3,
    framepack_dit,
    hidream_o1,
    hunyuan_dit,
    hunyuan_image,
    hunyuan_video_15,
    ideogram4,
    kandinsky,
    kandinsky_6,
    krea2,
    lumina,
    moss_image,
    qwen_image,
    qwen_image_21,
    wan_dit,
    z_image,
)
from tests.tiny.loras import make_lora
from wan.model import WanModel
from wan.vace_model import WanVaceModel
from z_image.model import ZImageModel

Size = tuple[int, int, int, int]  # latent frames, rows, columns, tokens of the text


@dataclass(frozen=True)
class TinyDit:
    """One transformer.

    `make` gives it frozen; `inputs` are the arguments of its forward for a size and a batch.
    """

    name: str
    spec: DitSpec
    make: Callable[[int | Sequence[int]], nn.Module]  # number of blocks in each list
    lora: str  # its module's name
    inputs: Callable[[Size, int], dict[str, Any]]

    def with_lora(self, blocks: int = 3, **arguments: Any) -> tuple[nn.Module, OwnNetwork]:
        """A transformer and a LoRA in it with random factors; both the same at every call."""
        dit = self.make(blocks)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = make_lora(self.lora, 4, 2.0, dit, **arguments)
        randomize(network)
        network.attach()
        return dit, network


def gradients(
    dit: nn.Module, network: nn.Module, inputs: dict[str, Any], autocast: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """What a transformer in its present mode returns, and the gradients of a loss of it; zeros where none
    arrives.
    """
    network.zero_grad()
    with torch.autocast(inputs["noisy"].device.type, torch.bfloat16, enabled=autocast):
        velocity = dit(**inputs)
    velocity.float().square().mean().backward()
    found = [torch.zeros_like(one) if one.grad is None else one.grad.clone() for one in network.parameters()]
    return velocity.detach(), found


TWO_LISTS = ("double_blocks", "single_blocks")


def _maker(
    model: Any, config: Any, state: Callable[..., dict[str, Tensor]], *lists: str
) -> Callable[[int | Sequence[int]], nn.Module]:
    """Return what makes a frozen transformer. lists: the entries of its config that count blocks."""

    def make(blocks: int | Sequence[int]) -> nn.Module:
        counts = [blocks] * len(lists) if isinstance(blocks, int) else blocks
        sizes = dict(zip(lists, counts, strict=True))
        dit: nn.Module = model(replace(config, **sizes))
        dit.load_state_dict(state(**sizes))
        return dit.requires_grad_(False)

    return make


def _drawing(seed: int = 7) -> Callable[..., Tensor]:
    """Return what draws a tensor of a shape."""
    return partial(torch.randn, generator=torch.Generator().manual_seed(seed))


def _mask(batch: int, text: int) -> Tensor:
    """Of a batch, texts differ in length."""
    return (torch.arange(text) < (text - torch.arange(batch))[:, None]).long()


def _wan(kind: str) -> TinyDit:
    config = wan_dit.CONFIGS[kind]

    def inputs(size: Size, batch: int) -> dict[str, Any]:
        draw, (*grid, text) = _drawing(), size
        given: dict[str, Any] = {
            "noisy": draw(batch, config.in_dim, *grid),
            "timesteps": torch.linspace(900.0, 100.0, batch),
            "text": [draw(text - sample, config.text_dim) for sample in range(batch)],
        }
        if config.has_image:
            given["image_embeds"] = draw(batch, 257, config.image_dim)
        if config.vace_layers:
            given["control"] = draw(batch, config.vace_dim, *grid)
            given["hint_scales"] = draw(batch, 8)  # of as many layers at most
        return given

    model, lists = WanModel, ["num_layers"]
    if config.vace_layers:
        model, lists = WanVaceModel, ["num_layers", "vace_layers"]
    make = _maker(model, config, partial(wan_dit.tiny_state, kind), *lists)
    return TinyDit(f"wan {kind}", model.spec, make, "lora_wan", inputs)


def _hunyuan_inputs(config: Any, draw: Callable[..., Tensor], size: Size, batch: int) -> dict[str, Any]:
    *grid, text = size
    return {
        "noisy": draw(batch, config.in_dim, *grid),
        "timesteps": torch.linspace(900.0, 100.0, batch),
        "llama": draw(batch, text, config.text_dim),
        "llama_mask": _mask(batch, text),
        "clip_l": draw(batch, config.pooled_dim),
        "guidance": torch.linspace(1000.0, 6000.0, batch),
    }


def _hunyuan(kind: str) -> TinyDit:
    config = hunyuan_dit.CONFIGS[kind]

    def inputs(size: Size, batch: int) -> dict[str, Any]:
        return _hunyuan_inputs(config, _drawing(), size, batch)

    make = _maker(HunyuanVideoModel, config, partial(hunyuan_dit.tiny_state, kind), *TWO_LISTS)
    return TinyDit(f"hunyuan {kind}", HunyuanVideoModel.spec, make, "lora_hunyuan", inputs)


def _framepack() -> TinyDit:
    """With all three kinds of history, of frames that are not multiples of two and of four."""
    config, history = framepack_dit.CONFIG, {"": 2, "_2x": 3, "_4x": 6}

    def inputs(size: Size, batch: int) -> dict[str, Any]:
        draw, (frames, *area, _) = _drawing(), size
        given = _hunyuan_inputs(config, draw, size, batch)
        given["image_embeddings"] = draw(batch, 7, config.image_dim)
        given["latent_indices"] = torch.arange(1, 1 + frames).expand(batch, -1)
        start = 1 + frames
        for kind, count in history.items():
            given[f"clean_latents{kind}"] = draw(batch, config.in_dim, count, *area)
            given[f"clean_latent{kind}_indices"] = torch.arange(start, start + count).expand(batch, -1)
            start += count
        return given

    make = _maker(FramePackModel, config, framepack_dit.tiny_state, *TWO_LISTS)
    return TinyDit("framepack", FramePackModel.spec, make, "lora_framepack", inputs)


def _flux(kind: str) -> TinyDit:
    config = flux.CONFIGS[kind]

    def inputs(size: Size, batch: int) -> dict[str, Any]:
        draw, (_, *area, text) = _drawing(), size
        given = {
            "noisy": draw(batch, config.channels, 1, *area),
            "timesteps": torch.linspace(900.0, 100.0, batch),
            "t5": draw(batch, text, config.text_dim),
            "t5_mask": _mask(batch, text),
        }
        if config.pooled_dim:
            given["pooled"] = draw(batch, config.pooled_dim)
            given["guidance"] = torch.linspace(1.0, 6.0, batch)
        return given

    make = _maker(FluxModel, config, partial(flux.tiny_state, kind), *TWO_LISTS)
    return TinyDit(f"flux {kind}", dit_spec(kind), make, "lora_flux", inputs)


def _flux_2() -> TinyDit:
    config = flux_2.CONFIGS["dev"]

    def inputs(size: Size, batch: int) -> dict[str, Any]:
        draw, (_, *area, text) = _drawing(), size
        return {
            "noisy": draw(batch, config.channels, 1, *area),
            "timesteps": torch.linspace(900.0, 100.0, batch),
            "text": draw(batch, text, config.text_dim),
            "guidance": torch.linspace(1.0, 6.0, batch),
            "references": [draw(batch, config.channels, 1, 2, 3)],
        }

    make = _maker(Flux2Model, config, partial(flux_2.tiny_state, "dev"), *TWO_LISTS)
    return TinyDit("flux_2", Flux2Model.spec, make, "lora_flux_2", inputs)


def _flux_3() -> TinyDit:
    """With a reference, and texts of several lengths."""
    config = flux_3.CONFIG

    def inputs(size: Size, batch: int) -> dict[str, Any]:
        draw, (_, *area, text) = _drawing(), size
        return {
            "noisy": draw(batch, config.channels, 1, *area),
            "timesteps": torch.linspace(900.0, 100.0, batch),
            "text": draw(batch, text, config.text_dim),
            "text_mask": _mask(batch, text),
            "references": [draw(batch, config.channels, 1, 2, 3)],
        }

    make = _maker(Flux3Model, config, flux_3.tiny_state, "mode_blocks", "joint_blocks")
    return TinyDit("flux_3", Flux3Model.spec, make, "lora_flux_3", inputs)


def _single_stream(name: str, model: Any, tiny: Any, lora: str) -> TinyDit:
    """Lumina or Z-Image. tiny: the module of its files."""
    config = tiny.CONFIG

    def inputs(size: Size, batch: int) -> dict[str, Any]:
        draw, (_, *area, text) = _drawing(), size
        return {
            "noisy": draw(batch, config.in_dim, *area),
            "times": torch.linspace(0.1, 0.9, batch),
            "caption": draw(batch, text, config.text_dim),
            "caption_mask": _mask(batch, text),
        }

    return TinyDit(name, model.spec, _maker(model, config, tiny.tiny_state, "num_layers"), lora, inputs)


def _hunyuan_image() -> TinyDit:
    """Of a batch, the first picture has nothing to write."""
    config = hunyuan_image.CONFIG

    def inputs(size: Size, batch: int) -> dict[str, Any]:
        draw, (_, *area, text) = _drawing(), size
        glyphs = 2 * torch.arange(batch)[:, None]
        return {
            "noisy": draw(batch, config.in_dim, *area),
            "timesteps": torch.linspace(900.0, 100.0, batch).trunc(),
            "text": draw(batch, text, config.text_dim),
            "text_mask": _mask(batch, text),
            "glyphs": draw(batch, 4, config.glyph_dim),
            "glyph_mask": (torch.arange(4) < glyphs).long(),
        }

    make = _maker(HunyuanImageModel, config, hunyuan_image.tiny_state, *TWO_LISTS)
    return TinyDit("hunyuan_image", HunyuanImageModel.spec, make, "lora_hunyuan_image", inputs)


def _qwen_image(edits: bool = False) -> TinyDit:
    """edits: with a reference that is modulated with time 0."""
    config = qwen_image.CONFIG

    def inputs(size: Size, batch: int) -> dict[str, Any]:
        draw, (_, *area, text) = _drawing(), size
        return {
            "noisy": draw(batch, config.channels, 1, *area),
            "timesteps": torch.linspace(900.0, 100.0, batch),
            "text": draw(batch, text, config.text_dim),
            "text_mask": _mask(batch, text),
        }

    def with_reference(size: Size, batch: int) -> dict[str, Any]:
        reference = _drawing(8)(batch, config.channels, 1, 4, 6)
        return {**inputs(size, batch), "references": [reference], "clean_references": True}

    make = _maker(QwenImageModel, config, qwen_image.tiny_state, "num_layers")
    name = "qwen_image edit" if edits else "qwen_image"
    return TinyDit(name, QwenImageModel.spec, make, "lora_qwen_image", with_reference if edits else inputs)


def _krea2(edits: bool = False) -> TinyDit:
    """With edits: a reference that attends to itself alone."""
    config = krea2.CONFIG

    def inputs(size: Size, batch: int) -> dict[str, Any]:
        draw, (_, *area, text) = _drawing(), size
        return {
            "noisy": draw(batch, config.channels, 1, *area),
            "timesteps": torch.linspace(900.0, 100.0, batch),
            "text": draw(batch, text, config.states, config.text_dim),
            "text_mask": _mask(batch, text),
        }

    def with_reference(size: Size, batch: int) -> dict[str, Any]:
        reference = _drawing(8)(batch, config.channels, 1, 4, 6)
        return {**inputs(size, batch), "references": [reference], "isolated": True}

    make = _maker(Krea2Model, config, krea2.tiny_state, "num_layers")
    name = "krea2 edit" if edits else "krea2"
    return TinyDit(name, Krea2Model.spec, make, "lora_krea2", with_reference if edits else inputs)


def _qwen_image_21(edits: bool = False) -> TinyDit:
    """With edits: a reference within the text."""
    config = qwen_image_21.CONFIG

    def inputs(size: Size, batch: int) -> dict[str, Any]:
        draw, (_, *area, text) = _drawing(), size
        return {
            "noisy": draw(batch, config.channels, 1, *area),
            "timesteps": torch.linspace(900.0, 100.0, batch),
            "text": draw(batch, text, config.text_dim),
            "text_mask": _mask(batch, text),
            "slots": torch.zeros(batch, 0, dtype=torch.int64),
        }

    def with_reference(size: Size, batch: int) -> dict[str, Any]:
        reference = _drawing(8)(batch, config.channels, 1, 4, 6)
        return {**inputs(size, batch), "references": [reference], "slots": torch.ones(batch, 1).long()}

    make = _maker(QwenImage21Model, config, qwen_image_21.tiny_state, "num_layers")
    name = "qwen_image_21 edit" if edits else "qwen_image_21"
    chosen = with_reference if edits else inputs
    return TinyDit(name, QwenImage21Model.spec, make, "lora_qwen_image_21", chosen)


def _moss_image(edits: bool = False) -> TinyDit:
    """With texts of several lengths. With edits: a reference."""
    config = moss_image.CONFIG

    def inputs(size: Size, batch: int) -> dict[str, Any]:
        draw, (_, *area, text) = _drawing(), size
        return {
            "noisy": draw(batch, config.channels, 1, *area),
            "timesteps": torch.linspace(900.0, 100.0, batch),
            "text": draw(batch, text, config.text_dim),
            "text_mask": _mask(batch, text),
        }

    def with_reference(size: Size, batch: int) -> dict[str, Any]:
        return {**inputs(size, batch), "references": [_drawing(8)(batch, config.channels, 1, 2, 3)]}

    make = _maker(MossImageModel, config, moss_image.tiny_state, "num_layers")
    name = "moss_image edit" if edits else "moss_image"
    return TinyDit(name, MossImageModel.spec, make, "lora_moss_image", with_reference if edits else inputs)


def _fibo_2(edits: bool = False) -> TinyDit:
    """With texts of several lengths. With edits: a reference."""
    config = fibo_2.CONFIG

    def inputs(size: Size, batch: int) -> dict[str, Any]:
        draw, (_, *area, text) = _drawing(), size
        return {
            "noisy": draw(batch, config.in_dim, 1, *area),
            "timesteps": torch.linspace(900.0, 100.0, batch),
            "text": draw(batch, text, len(STATES), config.state_dim),
            "text_mask": _mask(batch, text),
        }

    def with_reference(size: Size, batch: int) -> dict[str, Any]:
        return {**inputs(size, batch), "references": [_drawing(8)(batch, config.in_dim, 1, 2, 3)]}

    make = _maker(Fibo2Model, config, fibo_2.tiny_state, "num_layers")
    name = "fibo_2 edit" if edits else "fibo_2"
    return TinyDit(name, Fibo2Model.spec, make, "lora_fibo_2", with_reference if edits else inputs)


def _ernie_image() -> TinyDit:
    """With texts of several lengths."""
    config = ernie_image.CONFIG

    def inputs(size: Size, batch: int) -> dict[str, Any]:
        draw, (_, *area, text) = _drawing(), size
        return {
            "noisy": draw(batch, config.channels, 1, *area),
            "timesteps": torch.linspace(900.0, 100.0, batch),
            "text": draw(batch, text, config.text_dim),
            "text_mask": _mask(batch, text),
        }

    make = _maker(ErnieImageModel, config, ernie_image.tiny_state, "num_layers")
    return TinyDit("ernie_image", ErnieImageModel.spec, make, "lora_ernie_image", inputs)


def _hidream_o1(edits: bool = False) -> TinyDit:
    """With texts of several lengths; rows and columns are those of patches. With edits: a reference."""
    config = hidream_o1.WITH_TOWER if edits else hidream_o1.CONFIG

    def inputs(size: Size, batch: int) -> dict[str, Any]:
        draw, (_, rows, columns, text) = _drawing(), size
        generator = torch.Generator().manual_seed(5)
        return {
            "noisy": draw(batch, 3, 1, rows * config.patch_size, columns * config.patch_size),
            "timesteps": torch.linspace(900.0, 100.0, batch),
            "text": torch.randint(config.vocabulary, (batch, text + 1), generator=generator),
            "text_mask": _mask(batch, text + 1),
        }

    def with_reference(size: Size, batch: int) -> dict[str, Any]:
        """Two tokens of the reference stand behind the first token of each text."""
        given, patch = inputs(size, batch), config.patch_size
        given["references"] = [_drawing(8)(batch, 3, 1, 2 * patch, 3 * patch).clamp(-1, 1)]
        first, others = given["text"][:, :1], given["text"][:, 1:]
        given["text"] = torch.cat([first, torch.full((batch, 2), REFERENCE_ID), others], dim=1)
        ones = torch.ones(batch, 2, dtype=given["text_mask"].dtype)
        given["text_mask"] = torch.cat([ones, given["text_mask"]], dim=1)
        given["shown"] = torch.full((batch, 2, 3 * 32**2), 99, dtype=torch.uint8)
        given["grids"] = torch.tensor([[1, 2]]).expand(batch, -1, -1)
        return given

    def state(**sizes: int) -> dict[str, Tensor]:
        return {**hidream_o1.tiny_state(**sizes), **(hidream_o1.tower_state() if edits else {})}

    make = _maker(HiDreamO1Model, config, state, "num_layers")
    name = "hidream_o1 edit" if edits else "hidream_o1"
    return TinyDit(name, HiDreamO1Model.spec, make, "lora_hidream_o1", with_reference if edits else inputs)


def _ideogram4() -> TinyDit:
    """With texts of several lengths."""
    config = ideogram4.CONFIG

    def inputs(size: Size, batch: int) -> dict[str, Any]:
        draw, (_, *area, text) = _drawing(), size
        return {
            "noisy": draw(batch, config.in_dim, 1, *area),
            "times": torch.linspace(0.1, 0.9, batch),
            "text": draw(batch, text, config.text_dim),
            "text_mask": _mask(batch, text),
        }

    make = _maker(Ideogram4Model, config, ideogram4.tiny_state, "num_layers")
    return TinyDit("ideogram4", Ideogram4Model.spec, make, "lora_ideogram4", inputs)


def _kandinsky() -> TinyDit:
    """With texts of several lengths."""
    config = kandinsky.CONFIG

    def inputs(size: Size, batch: int) -> dict[str, Any]:
        draw, (*grid, text) = _drawing(), size
        return {
            "noisy": draw(batch, config.out_channels, *grid),
            "timesteps": torch.linspace(900.0, 100.0, batch),
            "text": draw(batch, text, config.text_dim),
            "text_mask": _mask(batch, text),
            "pooled": draw(batch, config.pooled_dim),
            "position_scale": 2.0,
        }

    make = _maker(KandinskyModel, config, kandinsky.tiny_state, "num_layers")
    return TinyDit("kandinsky", KandinskyModel.spec, make, "lora_kandinsky", inputs)


class FlatKandinsky6(Kandinsky6Model):
    """With the velocities of both streams as one tensor, B n, as the others have one."""

    def forward(self, *given: Any, **named: Any) -> Tensor:
        return torch.cat([one.flatten(1) for one in super().forward(*given, **named)], 1)


def _kandinsky_6() -> TinyDit:
    """With sound, a first image and texts of several lengths."""
    config = kandinsky_6.CONFIG

    def inputs(size: Size, batch: int) -> dict[str, Any]:
        draw, (*grid, text) = _drawing(), size
        return {
            "noisy": draw(batch, config.out_channels, *grid),
            "timesteps": torch.linspace(900.0, 100.0, batch),
            "text": draw(batch, text, config.text_dim),
            "text_mask": _mask(batch, text),
            "pooled": draw(batch, config.pooled_dim),
            "position_scale": 2.0,
            "audio": draw(batch, config.audio_channels, 5, 1),
            "image": draw(batch, config.out_channels, 1, *grid[1:]),
        }

    make = _maker(FlatKandinsky6, config, kandinsky_6.tiny_state, "num_layers")
    return TinyDit("kandinsky_6", FlatKandinsky6.spec, make, "lora_kandinsky", inputs)


def _hunyuan_video_15() -> TinyDit:
    """With a first frame, and with texts and glyphs of several lengths."""
    config = hunyuan_video_15.CONFIG

    def inputs(size: Size, batch: int) -> dict[str, Any]:
        draw, (frames, *area, text) = _drawing(), size
        return {
            "noisy": draw(batch, config.out_dim, frames, *area),
            "timesteps": torch.linspace(900.0, 100.0, batch),
            "text": draw(batch, text, config.text_dim),
            "text_mask": _mask(batch, text),
            "glyphs": draw(batch, 4, config.glyph_dim),
            "glyphs_mask": _mask(batch, 4),
            "first_latents": draw(batch, config.out_dim, 1, *area),
            "image": draw(batch, 5, config.image_dim),
        }

    make = _maker(HunyuanVideo15Model, config, hunyuan_video_15.tiny_state, "double_blocks")
    return TinyDit("hunyuan_video_15", HunyuanVideo15Model.spec, make, "lora_hv_1_5", inputs)


def _anima() -> TinyDit:
    """With texts of unequal numbers of states, and of T5's tokens."""
    config = anima.CONFIG
    assert config.adapter is not None
    width = config.adapter.text_dim

    def inputs(size: Size, batch: int) -> dict[str, Any]:
        draw, (_, *area, text) = _drawing(), size
        mask = _mask(batch, text)
        ids = torch.arange(2, 2 + batch * text).view(batch, text)
        return {
            "noisy": draw(batch, config.channels, 1, *area),
            "sigmas": torch.linspace(0.9, 0.1, batch),
            "states": draw(batch, text, width) * mask[..., None],
            "states_mask": mask,
            "ids": ids * mask,
            "weights": mask,
        }

    make = _maker(AnimaModel, config, anima.tiny_state, "num_layers")
    return TinyDit("anima", AnimaModel.spec, make, "lora_anima", inputs)


class FlatLtx(LtxModel):
    """With the velocities of both streams as one tensor, B n, as the others have one."""

    def forward(self, *given: Any, **named: Any) -> Tensor:  # type: ignore[override]
        return torch.cat([one.flatten(1) for one in super().forward(*given, **named) if one is not None], 1)


def _ltx(version: str) -> TinyDit:
    make = _maker(FlatLtx, DIT_CONFIGS[version], partial(dit_state, version), "num_layers")
    return TinyDit(f"ltx_2 {version}", FlatLtx.spec, make, "lora_ltx2", partial(dit_inputs, version))


LUMINA = _single_stream("lumina", LuminaModel, lumina, "lora_lumina")
Z_IMAGE = _single_stream("z_image", ZImageModel, z_image, "lora_zimage")
DITS = (
    *(_wan("t2v"), _wan("i2v"), _hunyuan("t2v"), _framepack()),
    *(LUMINA, _flux("dev"), _flux("chroma"), _flux_2(), _flux_3()),
    *(_hunyuan_image(), _qwen_image(), _qwen_image(edits=True), Z_IMAGE, _krea2(), _krea2(edits=True)),
    *(_qwen_image_21(), _qwen_image_21(edits=True), _moss_image(), _moss_image(edits=True)),
    *(
        _fibo_2(),
        _fibo_2(edits=True),
        _ernie_image(),
        _ideogram4(),
        _kandinsky(),
        _kandinsky_6(),
        _hidream_o1(),
        _hidream_o1(edits=True),
        _hunyuan_video_15(),
        _anima(),
    ),
    *(_ltx("2.0"), _ltx("2.3"), _ltx("2.5"), _wan("vace")),
)
ONE_OF_EACH = (DITS[0], DITS[2], DITS[3])


def dit_called(name: str) -> TinyDit:
    """One of DITS."""
    return next(each for each in DITS if each.name == name)


TI2V = _wan("ti2v")  # differs from t2v where frames are given: tests/wan/test_model.py

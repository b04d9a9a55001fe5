"""Two steps of training of each family equal those computed with diffusers, and the LoRA that comes out has
the same effect there as here. Of Wan and LTX-2: test_training.py, tests/ltx_2.

The optimizer is plain gradient descent, so a step's change of the weights is the gradient itself, times the
rate.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import Flux2LoraLoaderMixin, QwenImageLoraLoaderMixin
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import pad

import tests.anima.making as anima
import tests.ernie_image.making as ernie_image
import tests.fibo_2.making as fibo_2
import tests.flux.making as flux
import tests.flux_2.making as flux_2
import tests.flux_3.making as flux_3
import tests.hidream_o1.making as hidream_o1
import tests.hunyuan_image.making as hunyuan_image
import tests.hunyuan_video_15.making as hunyuan_video_15
import tests.ideogram4.making as ideogram4
import tests.kandinsky.making as kandinsky
import tests.krea2.making as krea2
import tests.lumina.making as lumina
import tests.parity.framepack as framepack
import tests.parity.hunyuan as hunyuan
import tests.qwen_image.making as qwen_image
import tests.qwen_image_21.making as qwen_image_21
import tests.tiny.anima as tiny_anima
import tests.tiny.flux as tiny_flux
import tests.tiny.flux_2 as tiny_flux_2
import tests.tiny.flux_3 as tiny_flux_3
import tests.tiny.hidream_o1 as tiny_hidream_o1
import tests.tiny.hunyuan_dit as tiny_hunyuan
import tests.tiny.hunyuan_image as tiny_hunyuan_image
import tests.tiny.hunyuan_video_15 as tiny_hunyuan_video_15
import tests.tiny.krea2 as tiny_krea2
import tests.tiny.lumina as tiny_lumina
import tests.z_image.making as z_image
from encoders.autoencoder import SCALE, SHIFT
from ideogram4.configs import LATENT
from tests.faults.messages import succeed_here
from tests.hidream_o1.plain import PlainHiDreamO1, edit_clean
from tests.moss_image.plain import PlainMossImage
from tests.parity.running import assert_equal, training_key
from tests.parity.training import (
    Factors,
    Item,
    assert_steps_of_descent,
    descent,
    learning,
    mixed,
    normal_share,
    padded,
    parts_of,
    ratio_of,
    shifted,
    shuffled,
    uniform_of,
)
from tests.tiny.families import family_called, write_references
from tests.tiny.project import write_image

Parts = dict[str, list[str]]  # name of a module in LoRA files -> its modules in diffusers' network
GUIDANCE = 2.5
LONG = "a blue circle moves left " * 5


@dataclass(frozen=True)
class Training:
    """A training, and diffusers' network for it.

    tag: in names of caches. text: the tensor with the states of a text. options: of the training. network: of
    the tensors of a file. parts: of a file. error: the predicted less the wanted velocity of the micro-batch
    of that number. change: of the project before it is cached. to_model: of cached latents. lora: what reads
    LoRAs of ours there. unused: modules without a gradient, such as what the last block makes of the text.
    family: if its name is not that of the case.
    """

    tag: str
    text: str
    rate: float
    options: Sequence[object]
    network: Callable[[Any], nn.Module]
    parts: Callable[[Path], Parts]
    error: Callable[[nn.Module, Sequence[Item], int], Tensor]
    change: Callable[[Path], object] = lambda folder: None
    to_model: Callable[[Tensor], Tensor] = lambda latents: latents
    lora: Any = None
    unused: int = 0
    caching: Sequence[object] = ()  # options of caching latents
    tolerance: float = 1e-4  # of the largest weight
    share: float | None = None  # see `assert_descent`
    family: str = ""
    names: Sequence[object] = ()  # options for the LoRA's names, where the usual ones are others


def stacked(batch: Sequence[Item], name: str) -> Tensor:
    return torch.stack([item.tensors[name] for item in batch])


def references_of(batch: Sequence[Item]) -> list[Tensor]:
    """The references of a batch, each B Z 1 H W."""
    names = [name for name in sorted(batch[0].tensors) if name.startswith("latents_control")]
    found = [stacked(batch, name) for name in names]
    return [each if each.ndim == 5 else each.unsqueeze(2) for each in found]


def by_size(batch: Sequence[Item], step: int, side: int = 2, **ends: float) -> Tensor:
    """Noise levels that depend on the number of tokens. side: of a token, in latents."""
    rows, columns = batch[0].latents.shape[-2:]
    return shifted(normal_share(batch, step), ratio_of(rows // side * (columns // side), **ends))


def error_of_flux(
    dit: nn.Module,
    batch: Sequence[Item],
    step: int,
    text: str,
    pooled: str | None,
    later: int = 0,
    has_control: bool = False,
) -> Tensor:
    """Without --apply_t5_attn_mask FLUX sees the padding. later: added to timesteps by the known tuner."""
    sigmas = by_size(batch, step)
    noisy, wanted = mixed(batch, step, sigmas)
    inputs: dict[str, Any] = {"noisy": noisy, "timesteps": 1000 * sigmas + later, "t5": stacked(batch, text)}
    inputs["t5_mask"] = stacked(batch, "t5_attn_mask") if pooled is None else None
    inputs["pooled"] = None if pooled is None else stacked(batch, pooled)
    inputs["guidance"] = torch.full((len(batch),), GUIDANCE)
    references, control = references_of(batch), flux.tiny_control_net() if has_control else None
    found = [flux.run_there(dit, inputs, sample, references, control) for sample in range(len(batch))]
    return torch.cat(found) - wanted


def error_of_flux_2(dit: nn.Module, batch: Sequence[Item], step: int) -> Tensor:
    sigmas = by_size(batch, step, side=1)
    noisy, wanted = mixed(batch, step, sigmas)
    timesteps = 1000 * sigmas + 1  # as the known tuner's
    given = {"noisy": noisy, "timesteps": timesteps, "text": stacked(batch, "ctx_vec")}
    return flux_2.predict_with(dit, given, references_of(batch)) - wanted  # type: ignore[arg-type]


def error_of_flux_3(dit: nn.Module, batch: Sequence[Item], step: int) -> Tensor:
    """Each by itself, as the padding of a batch counts there."""
    sigmas = shifted(normal_share(batch, step), 6.93)
    noisy, wanted = mixed(batch, step, sigmas)
    references = references_of(batch)
    velocities = []
    for sample, item in enumerate(batch):
        row = slice(sample, sample + 1)
        given = {"noisy": noisy[row], "timesteps": 1000 * sigmas[row], "text": item.tensors["ctx_vec"][None]}
        velocities.append(flux_3.predict_with(dit, given, [each[row] for each in references]))  # type: ignore[arg-type]
    return torch.cat(velocities) - wanted


def flux_3_parts(dit_file: Path) -> Parts:
    """The Linear layers of all blocks: 6 of each."""
    parts = {}
    for name, weight in load_file(dit_file).items():
        if "_blocks." in name and "norm" not in name:
            (there,) = tiny_flux_3.in_diffusers_names({name: weight})
            parts[name.removesuffix(".weight").replace(".", "_")] = [there.removesuffix(".weight")]
    return parts


def texts_of_two_lengths(folder: Path) -> None:
    """References keep their sizes, and a caption is as long as two windows of 80 tokens."""
    keep_sizes(folder)
    write_caption("picture 1", LONG * 4, folder)


def error_of_qwen_image(dit: nn.Module, batch: Sequence[Item], step: int) -> Tensor:
    sigmas = by_size(batch, step, many=8192, shift=0.9)
    noisy, wanted = mixed(batch, step, sigmas)
    text, mask = padded(batch)
    timesteps = 1000 * sigmas + 1  # as the known tuner's
    given = {"noisy": noisy, "timesteps": timesteps, "text": text, "text_mask": mask}
    found = qwen_image.predict_with(dit, given, references_of(batch))  # type: ignore[arg-type]
    return found - qwen_image.pack(wanted)


def error_of_qwen_image_layered(dit: nn.Module, batch: Sequence[Item], step: int) -> Tensor:
    """Frame after frame, and behind them the picture that is taken apart, clean."""
    sigmas = shifted(normal_share(batch, step), 2.5)
    noisy, wanted = mixed(batch, step, sigmas)
    source = torch.stack([item.latents for item in batch])[:, :, :1]
    frames = torch.cat([noisy, source], dim=2).split(1, dim=2)
    text, mask = padded(batch)
    grid = (1, noisy.shape[-2] // 2, noisy.shape[-1] // 2)
    velocity = dit(
        hidden_states=torch.cat([qwen_image.pack(one) for one in frames], dim=1),
        encoder_hidden_states=text,
        encoder_hidden_states_mask=mask,
        timestep=sigmas + 0.001,  # as the known tuner's
        img_shapes=[[grid] * len(frames)] * len(batch),
        additional_t_cond=torch.zeros(len(batch), dtype=torch.long),
        return_dict=False,
    )[0]
    expected = torch.cat([qwen_image.pack(one) for one in wanted.split(1, dim=2)], dim=1)
    return velocity[:, : expected.shape[1]] - expected


def error_of_fibo_2(dit: nn.Module, batch: Sequence[Item], step: int) -> Tensor:
    """The timesteps are the shares of noise in thousandths."""
    sigmas = by_size(batch, step, side=1)
    noisy, wanted = mixed(batch, step, sigmas)
    text, mask = padded(batch)
    given = {"noisy": noisy, "timesteps": 1000 * sigmas, "text": text, "text_mask": mask}
    return fibo_2.predict_with(dit, given, references_of(batch)) - wanted


def error_of_krea2(dit: nn.Module, batch: Sequence[Item], step: int) -> Tensor:
    sigmas = by_size(batch, step, many=6400, shift=1.15)
    noisy, wanted = mixed(batch, step, sigmas)
    text, mask = padded(batch)
    timesteps = 1000 * sigmas + 1  # as the known tuner's
    given = {"noisy": noisy, "timesteps": timesteps, "text": text, "text_mask": mask}
    return krea2.predict_with(dit, given) - qwen_image.pack(wanted)


def error_of_krea2_edit(dit: nn.Module, batch: Sequence[Item], step: int, isolated: bool = False) -> Tensor:
    """Each by itself, as there is no padding then."""
    sigmas = by_size(batch, step, many=6400, shift=1.15)
    noisy, wanted = mixed(batch, step, sigmas)
    times, references, found = sigmas + 0.001, references_of(batch), []
    for index, item in enumerate(batch):
        one, own = slice(index, index + 1), [each[index : index + 1] for each in references]
        text = item.text[None]
        found.append(krea2.predict_edit(dit, noisy[one], times[one], text, own, isolated))
    return torch.cat(found) - qwen_image.pack(wanted)


def error_of_qwen_image_21(dit: nn.Module, batch: Sequence[Item], step: int) -> Tensor:
    sigmas = by_size(batch, step, side=1, many=8192, shift=0.9)
    noisy, wanted = mixed(batch, step, sigmas)
    text, mask = padded(batch)
    slots = stacked(batch, "image_slots")
    timesteps = 1000 * sigmas + 1  # as the known tuner's
    given = {"noisy": noisy, "timesteps": timesteps, "text": text, "text_mask": mask, "slots": slots}
    return qwen_image_21.predict_with(dit, given, references_of(batch)) - wanted


def moss_levels(batch: Sequence[Item], step: int) -> Tensor:
    """The report's: one draw of a hundred is even, the others logit-normal, cut at 0.95 and stretched."""
    edges = torch.arange(1, 1001, dtype=torch.float64) / 1000
    below = torch.special.ndtr((torch.logit(0.95 * edges) - 1.09) / 0.95)
    numbers = uniform_of(batch, step)
    even = torch.searchsorted(edges, numbers / 0.01)
    others = torch.searchsorted(below / below[-1], (numbers - 0.01) / 0.99)
    return (torch.where(numbers < 0.01, even, others) + 1).float() / 1000


def error_of_moss_image(dit: nn.Module, batch: Sequence[Item], step: int, joint: bool = False) -> Tensor:
    """Each by itself, as there is no padding then. joint: references see the picture and the text too."""
    sigmas = moss_levels(batch, step)
    noisy, wanted = mixed(batch, step, sigmas)
    references, found = [each[:, :, 0] for each in references_of(batch)], []
    for index, item in enumerate(batch):
        own = [each[index] for each in references]
        found.append(dit(noisy[index, :, 0], 1000 * sigmas[index], item.text, own, joint))
    return torch.stack(found) - wanted[:, :, 0]


def error_of_z_image(dit: nn.Module, batch: Sequence[Item], step: int) -> Tensor:
    sigmas = shifted(normal_share(batch, step), 2.2)
    noisy, wanted = mixed(batch, step, sigmas)
    caption, mask = padded(batch)
    times = 1 - (1000 * sigmas + 1) / 1000  # as the known trainer
    given = {"noisy": noisy.squeeze(2), "times": times, "caption": caption, "caption_mask": mask}
    return -z_image.predict_with(dit, given) - wanted.squeeze(2)  # type: ignore[arg-type]


def error_of_ernie_image(dit: nn.Module, batch: Sequence[Item], step: int) -> Tensor:
    sigmas = shifted(normal_share(batch, step), 4.0)
    noisy, wanted = mixed(batch, step, sigmas)
    text, mask = padded(batch)
    given = {"noisy": noisy, "timesteps": 1000 * sigmas, "text": text, "text_mask": mask}
    return ernie_image.predict_with(dit, given) - wanted


def error_of_ideogram4(dit: nn.Module, batch: Sequence[Item], step: int) -> Tensor:
    size = batch[0].latents.shape[-2] * batch[0].latents.shape[-1]
    logits = torch.special.logit(normal_share(batch, step))
    sigmas = torch.sigmoid(0.5 * math.log(size * 256 / 512**2) + 1.5 * logits)
    noisy, wanted = mixed(batch, step, sigmas.float())
    # rounded as timesteps of 0 to 1000: the fastest waves of the time see the last digit
    times = 1 - (1000 * sigmas).float() / 1000
    text, mask = padded(batch)
    given = {"noisy": noisy, "times": times, "text": text, "text_mask": mask}
    return -ideogram4.predict_with(dit, given) - wanted


def error_of_kandinsky(
    dit: nn.Module, batch: Sequence[Item], step: int, flow_shift: float, scale: float, given: int = 0
) -> Tensor:
    """Each text by itself. given: clean latent frames in front, which are not learned."""
    sigmas = shifted(normal_share(batch, step), flow_shift)
    noisy, wanted = mixed(batch, step, sigmas)
    clean = torch.stack([item.latents for item in batch])[:, :, :given]
    noisy = torch.cat([clean, noisy[:, :, given:]], dim=2)
    text, mask = padded(batch)
    inputs = {"noisy": noisy, "timesteps": 1000 * sigmas, "text": text, "text_mask": mask}
    inputs["pooled"] = stacked(batch, "pooled_embed")
    return (kandinsky.predict_with(dit, inputs, scale, given) - wanted)[:, :, given:]  # type: ignore[arg-type]


def error_of_hidream_o1(dit: PlainHiDreamO1, batch: Sequence[Item], step: int) -> Tensor:
    """The error of the clean picture, at noise levels that are even; the noise is 8 times as loud."""
    sigmas = uniform_of(batch, step).float()
    noisy, _ = mixed(batch, step, sigmas)
    text, mask = padded(batch)
    given = {"noisy": 8 * noisy, "timesteps": 1000 * sigmas, "text": text, "text_mask": mask}
    clean = torch.stack([8 * item.latents for item in batch])
    return hidream_o1.predict_plainly(dit, given, config=tiny_hidream_o1.CONFIG) - clean


def error_of_hidream_o1_edit(dit: PlainHiDreamO1, batch: Sequence[Item], step: int) -> Tensor:
    """The same with references, each sample by itself."""
    sigmas = uniform_of(batch, step).float()
    noisy, _ = mixed(batch, step, sigmas)
    shape = hidream_o1.shape_of(tiny_hidream_o1.CONFIG)
    errors = []
    for sample, item in enumerate(batch):
        ids = item.text
        grids = [(rows, columns) for rows, columns in item.tensors["hidream_o1_grids"].tolist()]
        rows, deep = hidream_o1.look_at(dit.visual, item.tensors["hidream_o1_shown"], grids)
        spots = (ids < 0).nonzero().flatten().tolist()
        looks, passed = [], 0
        for height, width in grids:
            looks.append((spots[passed], height, width))
            passed += height * width
        pictures = [pixels[sample, :, 0] for pixels in references_of(batch)]
        clean = edit_clean(
            dit,
            shape,
            ids.clamp(min=0).tolist(),
            8 * noisy[sample, :, 0],
            float(sigmas[sample]),
            pictures,
            looks,
            rows,
            deep,
        )
        errors.append(clean - 8 * item.latents[:, 0])
    return torch.stack(errors)


def error_of_lumina(dit: nn.Module, batch: Sequence[Item], step: int) -> Tensor:
    tokens = batch[0].latents.shape[-1] * batch[0].latents.shape[-2] // 4
    sigmas = shifted(uniform_of(batch, step), ratio_of(tokens))
    noisy, wanted = mixed(batch, step, sigmas)
    texts = stacked(batch, "hidden_state"), stacked(batch, "attention_mask")
    return dit(noisy[:, :, 0], 1 - sigmas, *texts).sample + wanted[:, :, 0]


def error_of_anima(dit: nn.Module, batch: Sequence[Item], step: int) -> Tensor:
    """The adapter, which does not learn, has the weights of the tiny file."""
    sigmas = normal_share(batch, step).float()
    noisy, wanted = mixed(batch, step, sigmas)
    names = {"states": "prompt_embeds", "states_mask": "attn_mask", "ids": "t5_input_ids"}
    given = {name: stacked(batch, key) for name, key in names.items()}
    adapter = anima.conditioner_in_diffusers(tiny_anima.tiny_state())
    text = anima.text_in_diffusers(adapter, {**given, "weights": stacked(batch, "t5_attn_mask")})
    return anima.predict_in_diffusers(dit, noisy, sigmas, text) - wanted


def anima_parts(dit_file: Path) -> Parts:
    """The linear layers of attention and feed-forward: 10 of each block."""
    parts = {}
    for name, weight in load_file(dit_file).items():
        if name.startswith("blocks.") and "norm" not in name and "modulation" not in name:
            (there,) = tiny_anima.in_diffusers_names({name: weight})
            parts[name.removesuffix(".weight").replace(".", "_")] = [there.removesuffix(".weight")]
    assert len(parts) == 10 * tiny_anima.CONFIG.num_layers
    return parts


def error_of_hunyuan_image(dit: nn.Module, batch: Sequence[Item], step: int) -> Tensor:
    """Each by itself; noise levels are an entry of the released table of 1000, which is shifted."""
    sigmas = shifted(1 - (1000 * uniform_of(batch, step)).floor() / 1000, 5.0)
    noisy, wanted = (each.squeeze(2) for each in mixed(batch, step, sigmas))
    found = []
    for index, item in enumerate(batch):
        inputs = {
            "noisy": noisy[index : index + 1],
            "timesteps": (1000 * sigmas[index : index + 1]).trunc(),
            "text": item.text[None],
            "text_mask": torch.ones(1, len(item.text), dtype=torch.int64),
            "glyphs": item.tensors["byt5_embed"][None],
            "glyph_mask": item.tensors["byt5_mask"][None],
        }
        found.append(hunyuan_image.run_there(dit, inputs, learns=True))
    return torch.cat(found) - wanted


def error_of_hunyuan_video(dit: nn.Module, batch: Sequence[Item], step: int) -> Tensor:
    sigmas = shifted(normal_share(batch, step), 3.0)
    noisy, wanted = mixed(batch, step, sigmas)
    if "latents_image" in batch[0].tensors:
        image = 0.476986 * stacked(batch, "latents_image")
        noisy = torch.cat([noisy, pad(image, (0, 0, 0, 0, 0, noisy.shape[2] - 1))], dim=1)
    texts = [stacked(batch, name) for name in ("llm", "llm_mask", "clipL")]
    guidance = torch.full((len(batch),), GUIDANCE)
    return dit(noisy, 1000 * sigmas + 1, *texts, guidance, return_dict=False)[0] - wanted


def error_of_hunyuan_video_15(dit: nn.Module, batch: Sequence[Item], step: int) -> Tensor:
    """Each by itself, as there is no padding then."""
    sigmas = shifted(normal_share(batch, step), 2.0)
    noisy, wanted = mixed(batch, step, sigmas)
    found = []
    for index, item in enumerate(batch):
        one, glyphs = slice(index, index + 1), item.tensors["byt5_embed"]
        inputs = {
            "noisy": noisy[one],
            "timesteps": 1000 * sigmas[one] + 1,  # as the known tuner's
            "text": item.text[None],
            "text_mask": torch.ones(1, len(item.text), dtype=torch.int64),
            "glyphs": glyphs[None] if len(glyphs) else torch.zeros(1, 1, glyphs.shape[1]),
            "glyphs_mask": torch.full((1, max(1, len(glyphs))), int(len(glyphs) > 0)),
        }
        if "siglip" in item.tensors:
            inputs["first_latents"] = 1.03682 * item.tensors["latents_image"][None]
            inputs["image"] = item.tensors["siglip"][None]
        found.append(hunyuan_video_15.predict_with(dit, inputs))  # type: ignore[arg-type]
    return torch.cat(found) - wanted


def hunyuan_video_15_parts(dit_file: Path) -> Parts:
    """The linear layers of the blocks: 14 of each."""
    parts = {}
    for name, weight in load_file(dit_file).items():
        if name.startswith("double_blocks.") and weight.ndim == 2:
            (there,) = tiny_hunyuan_video_15.diffusers_state({name: weight})
            parts[name.removesuffix(".weight").replace(".", "_")] = [there.removesuffix(".weight")]
    return parts


def error_of_framepack(dit: nn.Module, batch: Sequence[Item], step: int) -> Tensor:
    """One by one, as it takes the same places for all samples of a batch."""
    sigmas = shifted(normal_share(batch, step), 3.0)
    noisy, wanted = mixed(batch, step, sigmas)
    found, guidance = [], torch.tensor([1000 * GUIDANCE])
    for sample, item in enumerate(batch):
        given = {name: tensor[None] for name, tensor in item.tensors.items()}
        one = slice(sample, sample + 1)
        found.append(framepack.velocity(dit, noisy[one], 1000 * sigmas[one] + 1, guidance, given))  # type: ignore[arg-type]
    return torch.cat(found) - wanted


def hunyuan_parts(dit_file: Path) -> Parts:
    """Of no modulation."""
    linears = parts_of(dit_file, tiny_hunyuan.diffusers_parts)
    return {name: paths for name, paths in linears.items() if "mod" not in name}


def linears_in(*starts: str) -> Callable[[Path], Parts]:
    """The Linear layers of a file in diffusers' names but for norms and modulation."""

    def parts(dit_file: Path) -> Parts:
        paths = [name.removesuffix(".weight") for name in load_file(dit_file) if name.endswith(".weight")]
        others = ("norm", "_mod", "_ln")
        is_learned = [path.startswith(starts) and not any(part in path for part in others) for path in paths]
        chosen = [path for path, learns in zip(paths, is_learned, strict=True) if learns]
        return {path.replace(".", "_"): [path] for path in chosen}

    return parts


def hidream_o1_parts(dit_file: Path) -> Parts:
    """The Linear layers of the blocks, those that embed and end the patches, and those of a vision tower."""
    starts = ("language_model.layers.", "x_embedder.", "final_layer2.", "visual.blocks.", "visual.merger.")
    paths = [name.removesuffix(".weight") for name in load_file(dit_file) if name.endswith(".weight")]
    chosen = [path for path in paths if path.startswith(starts) and "norm" not in path]
    return {f"model_{path.replace('.', '_')}": [path] for path in chosen}  # as musubi-tuner calls them


def ideogram4_parts(dit_file: Path) -> Parts:
    """The layers of the blocks; diffusers splits queries, keys and values."""
    parts: Parts = {}
    for name in load_file(dit_file):
        path = name.removesuffix(".weight")
        is_learned = path.endswith(("attention.qkv", "attention.o", ".w1", ".w2", ".w3"))
        if is_learned:
            start = path.removesuffix("qkv").removesuffix(".o")
            modules = [f"{start}to_{letter}" for letter in "qkv"] if path.endswith("qkv") else [path]
            parts[path.replace(".", "_")] = [f"{start}.to_out.0"] if path.endswith(".o") else modules
    return parts


def krea2_parts(dit_file: Path) -> Parts:
    """All Linear layers, those of the texts too."""
    state = {name: weight for name, weight in load_file(dit_file).items() if name.endswith(".weight")}
    there = {name: [*tiny_krea2.in_diffusers_names({name: weight})] for name, weight in state.items()}
    return {
        name.removesuffix(".weight").replace(".", "_"): [part.removesuffix(".weight") for part in parts]
        for name, parts in there.items()
    }


def lumina_parts(dit_file: Path) -> Parts:
    """One module there, or those for q, k and v."""
    found = {}
    for name, weight in load_file(dit_file).items():
        if name.endswith(".weight") and "embedder" not in name and "norm" not in name:
            there = tiny_lumina.diffusers_state({name: weight})
            path = name.removesuffix(".weight").replace(".", "_")
            found[path] = [each.removesuffix(".weight") for each in there]
    return found


def two_references_of_other_sizes(folder: Path) -> None:
    for path in (folder / "control").iterdir():
        path.unlink()
    for index in range(4):
        for number, (width, height) in enumerate(((64, 40), (32, 48))):
            write_image(folder / "control" / f"picture {index}_{number}.png", width, height)
    keep_sizes(folder)


def edits_of_two(folder: Path) -> None:
    """Two references for each picture, of other sizes, and captions of unequal lengths."""
    write_references(folder, ("_0", "_1"))
    for index in range(4):
        for number, size in enumerate(((64, 32), (32, 48))):
            write_image(folder / "control" / f"picture {index}_{number}.png", *size)
    write_caption("picture 1", LONG, folder)


def keep_sizes(folder: Path) -> None:
    """References keep the sizes that they have."""
    with (folder / "dataset.toml").open("a", encoding="utf-8") as file:
        file.write("no_resize_control = true\n")


def two_clips(folder: Path) -> None:
    """Of which each has two sections."""
    for path in (folder / "clips").glob("clip [23].*"):
        path.unlink()


def write_caption(name: str, text: str, folder: Path) -> None:
    (folder / "clips" / f"{name}.txt").write_text(text, encoding="utf-8")


def add_control_net(folder: Path) -> None:
    """A ControlNet in diffusers' layout, and what it sees of each picture, of another size and with alpha."""
    flux.tiny_control_net().save_pretrained(folder / CONTROL_NET[1])
    dataset = folder / "dataset.toml"
    text = dataset.read_text(encoding="utf-8")
    dataset.write_text(f'{text}\ncontrol_directory = "control"\n', encoding="utf-8")
    (folder / "control").mkdir()
    for number, path in enumerate(sorted((folder / "clips").glob("*.png"))):
        write_image(folder / "control" / path.name, 96 + 16 * number, 64)


CONTROL_NET = ("--controlnet_model_name_or_path", "model/control")
FLUX = {"rate": 0.5, "parts": partial(parts_of, parts_there=tiny_flux.diffusers_parts)}
BY_SIZE = ("--timestep_sampling", "flux_shift", "--guidance_scale", GUIDANCE)
QWEN = {
    "text": "vl_embed",
    "rate": 20.0,
    "options": ("--timestep_sampling", "qwen_shift", "--discrete_flow_shift", "2.2"),
    "parts": linears_in("transformer_blocks."),
    "error": error_of_qwen_image,
    "lora": QwenImageLoraLoaderMixin,
    "unused": 4,
}
SHIFT_3 = ("--timestep_sampling", "shift", "--discrete_flow_shift", 3, "--guidance_scale", GUIDANCE)
HUNYUAN: dict[str, Any] = {
    "tag": "hv",
    "text": "llm",
    "rate": 2.0,
    "options": SHIFT_3,
    "network": hunyuan.in_diffusers,
    "parts": hunyuan_parts,
    "error": error_of_hunyuan_video,
    "to_model": lambda latents: 0.476986 * latents,
}
FRAMEPACK: dict[str, Any] = {
    "tag": "fp",
    "text": "llama_vec",
    "rate": 2.0,
    "options": SHIFT_3,
    "network": framepack.in_diffusers,
    "parts": linears_in("transformer_blocks.", "single_transformer_blocks."),
    "error": error_of_framepack,
    "caching": ("--vae_dtype", "float32"),
    "tolerance": 2e-5,  # measured: 2.2e-6
}
CASES: dict[str, Training] = {
    "hunyuan_video": Training(**HUNYUAN),
    "skyreels i2v": Training(**HUNYUAN),
    "framepack": Training(**FRAMEPACK, change=two_clips),
    "framepack f1": Training(**FRAMEPACK, change=two_clips),
    "framepack one frame": Training(**FRAMEPACK),
    "flux": Training(
        *("flux", "t5_out"),
        **FLUX,
        options=BY_SIZE,
        network=partial(flux.in_diffusers, "dev"),
        error=partial(error_of_flux, text="t5_out", pooled="l_pooled"),
    ),
    "flux with a ControlNet": Training(
        *("flux", "t5_out"),
        **FLUX,
        family="flux",
        options=(*BY_SIZE, *CONTROL_NET),
        network=partial(flux.in_diffusers, "dev"),
        error=partial(error_of_flux, text="t5_out", pooled="l_pooled", has_control=True),
        change=add_control_net,
        caching=CONTROL_NET,
    ),
    "chroma": Training(
        *("flux", "t5_out"),
        **FLUX,
        options=BY_SIZE,
        network=partial(flux.in_diffusers, "chroma"),
        error=partial(error_of_flux, text="t5_out", pooled=None),
    ),
    "kontext": Training(
        *("fk", "t5_vec"),
        **FLUX,
        options=(*BY_SIZE, "--network_args", "include_patterns=['.*mod.*']"),
        network=partial(flux.in_diffusers, "dev"),
        error=partial(error_of_flux, text="t5_vec", pooled="clip_l_pooler", later=1),
    ),
    "flux_2": Training(
        *("f2k4b", "ctx_vec", 20.0),
        options=("--timestep_sampling", "flux2_shift"),
        network=flux_2.in_diffusers,
        parts=partial(parts_of, parts_there=tiny_flux_2.diffusers_parts),
        error=error_of_flux_2,
        change=keep_sizes,
        lora=Flux2LoraLoaderMixin,
    ),
    "flux_3": Training(
        *("f3", "ctx_vec", 20.0),
        options=("--timestep_sampling", "shift", "--discrete_flow_shift", 6.93),
        network=flux_3.in_diffusers,
        parts=flux_3_parts,
        error=error_of_flux_3,
        change=texts_of_two_lengths,
    ),
    "lumina": Training(
        *("lumina", "hidden_state", 2.0),
        options=("--timestep_sampling", "nextdit_shift"),
        network=lumina.in_diffusers,
        parts=lumina_parts,
        error=error_of_lumina,
    ),
    "anima": Training(
        *("anima", "prompt_embeds", 20.0, ()),
        network=anima.transformer_in_diffusers,
        parts=anima_parts,
        error=error_of_anima,
    ),
    "hunyuan_image": Training(
        *("hi", "vlm_embed", 8.0, ()),
        network=hunyuan_image.fill_diffusers,
        parts=partial(parts_of, parts_there=tiny_hunyuan_image.diffusers_parts),
        error=error_of_hunyuan_image,
        change=partial(write_caption, "picture 2", 'a door that says "push"'),
        to_model=lambda latents: latents * 0.75289,
    ),
    "qwen_image": Training("qi", **QWEN, network=qwen_image.in_diffusers),
    "qwen_image edit-2509": Training(
        "qie",
        **QWEN,
        family="qwen_image edit-2511",
        network=qwen_image.in_diffusers,
        change=two_references_of_other_sizes,
    ),
    "qwen_image edit-2511": Training(
        "qie",
        **QWEN,
        network=partial(qwen_image.in_diffusers, clean_references=True),
        change=two_references_of_other_sizes,
    ),
    "qwen_image layered": Training(
        "qil",
        **{
            **QWEN,
            "error": error_of_qwen_image_layered,
            "options": ("--timestep_sampling", "shift", "--discrete_flow_shift", 2.5),
        },
        network=partial(qwen_image.in_diffusers, layered=True),
    ),
    **{
        name: Training(
            *("fibo", "fibo_states", 20.0),
            options=("--timestep_sampling", "flux_shift"),
            network=fibo_2.in_diffusers,
            parts=linears_in("layers.", "noise_refiner.", "perceiver."),
            error=error_of_fibo_2,
            change=change,
            share=1e-9,  # queries and keys of the gist tokens move the picture little
        )
        for name, change in {
            "fibo_2": partial(write_caption, "picture 1", LONG),  # captions of unequal lengths
            "fibo_2 edit": keep_sizes,
        }.items()
    },
    "krea2": Training(
        *("kr2", "krea2_vl_embed", 20.0),
        options=("--timestep_sampling", "krea2_shift"),
        network=krea2.in_diffusers,
        parts=krea2_parts,
        error=error_of_krea2,
        change=partial(write_caption, "picture 1", LONG),  # so that rows of padding are masked
        share=1e-7,  # layers of the texts move the picture little
    ),
    **{
        f"krea2 edit{option}": Training(
            *("kr2e", "krea2_vl_embed", 20.0),
            options=("--timestep_sampling", "krea2_shift", *option.split()),
            network=krea2.in_diffusers,
            parts=krea2_parts,
            error=partial(error_of_krea2_edit, isolated=bool(option)),
            change=edits_of_two,
            family="krea2",
            share=1e-8,  # beside two references still less
        )
        for option in ("", " --kv_cache")
    },
    **{
        name: Training(
            *("qi21", "vl_embed", 20.0),
            options=("--timestep_sampling", "qwen_shift"),
            network=qwen_image_21.in_diffusers,
            parts=linears_in("transformer_blocks."),
            error=error_of_qwen_image_21,
            change=partial(write_caption, "picture 1", LONG),  # captions of unequal lengths
            unused=0 if "edit" in name else 0,
        )
        for name in ("qwen_image_21", "qwen_image_21 edit")
    },
    **{
        f"moss_image{kind}": Training(
            *("moss", "qwen3_5_embed", 20.0),
            options=options,
            network=PlainMossImage,
            parts=linears_in("layers."),
            error=partial(error_of_moss_image, joint=bool(options)),
            change=change,
            names=("--lora_format", "known"),
            family="moss_image",
        )
        for kind, options, change in (
            ("", (), partial(write_caption, "picture 1", LONG)),  # captions of unequal lengths
            (" edit", (), edits_of_two),
            (" edit, joint", ("--joint_references",), edits_of_two),
        )
    },
    "hidream_o1": Training(
        *("ho1", "hidream_o1_ids", 1.0),
        options=("--timestep_sampling", "uniform"),
        network=PlainHiDreamO1,
        parts=hidream_o1_parts,
        error=error_of_hidream_o1,  # type: ignore[arg-type]
        change=partial(write_caption, "picture 1", LONG),  # captions of unequal lengths
        to_model=lambda latents: latents / 8,
        share=1e-8,  # the last layers move the image far more
        names=("--lora_format", "known"),
    ),
    "hidream_o1 edit": Training(
        *("ho1", "hidream_o1_ids", 1.0),
        options=("--timestep_sampling", "uniform"),
        network=hidream_o1.plain_editor,
        parts=hidream_o1_parts,
        error=error_of_hidream_o1_edit,  # type: ignore[arg-type]
        change=partial(write_caption, "picture 1", LONG),  # captions of unequal lengths
        to_model=lambda latents: latents / 8,
        share=1e-9,  # the vision tower moves the image little
        names=("--lora_format", "known"),
    ),
    "ernie_image": Training(
        *("ernie", "ministral3_embed", 20.0),
        options=("--timestep_sampling", "shift", "--discrete_flow_shift", 4.0),
        network=ernie_image.in_diffusers,
        parts=linears_in("layers."),
        error=error_of_ernie_image,
        change=partial(write_caption, "picture 1", LONG),  # captions of unequal lengths
    ),
    "ideogram4": Training(
        *("i4", "i4_llm_features", 20.0),
        network=ideogram4.in_diffusers,
        parts=ideogram4_parts,
        options=(),
        error=error_of_ideogram4,
        change=partial(write_caption, "picture 1", LONG),  # captions of unequal lengths
        to_model=lambda latents: LATENT.to_model(latents.unsqueeze(1)),
    ),
    **{
        name: Training(
            *("k5", "text_embeds", 2.0),
            options=("--timestep_sampling", "shift", "--discrete_flow_shift", flow_shift),
            network=kandinsky.network_of,
            parts=linears_in("text_transformer_blocks.", "visual_transformer_blocks."),
            error=partial(error_of_kandinsky, flow_shift=flow_shift, scale=scale, given=given),
            change=partial(write_caption, "picture 1" if "image" in name else "clip 1", LONG),
            to_model=lambda latents, factor=factor: factor * latents,  # type: ignore[misc]
            caching=("--vae_dtype", "float32"),
        )
        for name, flow_shift, scale, given, factor in (
            ("kandinsky", 5.0, 2.0, 0, 0.476986),
            ("kandinsky i2v", 5.0, 2.0, 1, 0.476986),
            ("kandinsky image", 3.0, 1.0, 0, 1.0),
        )
    },
    **{
        name: Training(
            *("hv15", "vl_embed", 2.0),
            options=("--timestep_sampling", "shift", "--discrete_flow_shift", 2),
            network=hunyuan_video_15.in_diffusers,
            parts=hunyuan_video_15_parts,
            error=error_of_hunyuan_video_15,
            change=partial(write_caption, "clip 2", 'a door that says "push"'),
            to_model=lambda latents: 1.03682 * latents,
            unused=4,  # what the last block makes of the text
            share=share,
        )
        # among the many tokens of an image, a key moves the clip little
        for name, share in (("hunyuan_video_15", None), ("hunyuan_video_15 i2v", 1e-9))
    },
    "z_image": Training(
        *("zi", "llm_embed", 20.0),
        options=("--timestep_sampling", "shift", "--discrete_flow_shift", 2.2),
        network=z_image.in_diffusers,
        parts=linears_in("layers."),
        error=error_of_z_image,
        change=partial(write_caption, "picture 1", LONG),  # so that rows of padding are masked
        to_model=lambda latents: (latents - SHIFT) * SCALE,
    ),
}


def cached(folder: Path, name: str) -> list[Item]:
    """Write a project and its caches, of one batch; what they hold of its items, sorted by name."""
    case, family = CASES[name], family_called(CASES[name].family or name)
    family.prepare(folder)
    dataset = folder / "dataset.toml"
    text = re.sub("batch_size = .", "batch_size = 4", dataset.read_text(encoding="utf-8"))
    dataset.write_text(re.sub("target_frames = .*", "target_frames = [9]", text), encoding="utf-8")
    case.change(folder)
    succeed_here(*family.cache_latents, *case.caching, *version_of(name), folder=folder)
    succeed_here(*family.cache_texts, *version_of(name), folder=folder)
    items = []
    for path in sorted((folder / "cache").glob(f"*_{case.tag}.safetensors")):
        texts = path.with_name(f"{path.name.partition('_')[0]}_{case.tag}_te.safetensors")
        found = load_file(path) | load_file(texts)
        tensors = {
            training_key(key): tensor.float() if tensor.is_floating_point() else tensor
            for key, tensor in found.items()
        }
        latents = case.to_model(tensors["latents"])
        latents = latents if latents.ndim == 4 else latents.unsqueeze(1)
        items.append(Item(latents, tensors[case.text], tensors=tensors))
    assert len(items) == 4
    return items


def version_of(name: str) -> Sequence[str]:
    """The option of the release, if it is another than the family's."""
    if name.startswith("krea2 edit"):
        return ("--edit",)
    return ("--model_version", name.split()[1]) if "qwen_image edit" in CASES[name].family else ()


def train(folder: Path, name: str, *more: object) -> Path:
    """Train two steps of descent; the transformer's file."""
    case, family = CASES[name], family_called(CASES[name].family or name)
    words = [*family.train, *descent(case.rate), *case.options, *case.names, *version_of(name), *more]
    succeed_here(*words, folder=folder)
    return folder / "model" / "dit.safetensors"


# the networks of the others are compared with recorded numbers, and what they learn in tests/test_families.py
DAILY = {"hunyuan_video", "chroma", "lumina", "hunyuan_image", "qwen_image", "krea2", "z_image"}
DAILY |= {"anima", "ernie_image", "ideogram4", "hidream_o1", "hunyuan_video_15", "kandinsky"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in DAILY)) for name in CASES]
)
def test_two_steps_equal_those_computed_with_diffusers(tmp_path: Path, name: str) -> None:
    case, items = CASES[name], cached(tmp_path, name)

    dit_file = train(tmp_path, name)

    parts, dit = case.parts(dit_file), case.network(load_file(dit_file)).requires_grad_(False)

    def gradients_at(factors: Factors, step: int) -> Factors:
        with learning(dit, parts, factors) as found:
            case.error(dit, shuffled(items, step), step).square().mean().backward()
            every = found()
        learned = {key: both for key, both in every.items() if both[1] is not None and both[1].any()}
        assert len(every) - len(learned) == case.unused
        return learned

    assert_steps_of_descent(
        tmp_path / "out", parts, case.rate, gradients_at, name, case.tolerance, case.share
    )
    if case.lora is not None:
        assert_same_effect(case, dit_file, tmp_path / "out" / "lora.safetensors", items)


@torch.no_grad()
def assert_same_effect(case: Training, dit_file: Path, lora: Path, items: Sequence[Item]) -> None:
    """Load a LoRA of ours with diffusers, and merge it with our tool: both networks give the same."""
    dit, merged = case.network(load_file(dit_file)), lora.with_name("merged.safetensors")
    without = case.error(dit, items, 0)
    dit.load_lora_adapter(case.lora.lora_state_dict(str(lora)), prefix="transformer")
    loaded = case.error(dit, items, 0)
    tool = ["--dit", dit_file, "--lora_weight", lora, "--save_merged_model", merged]
    succeed_here("merge_lora.py", *tool, folder=lora.parent)
    assert (loaded - without).abs().max() > 1e-2
    assert_equal(case.error(case.network(load_file(merged)), items, 0), loaded, "LoRA")

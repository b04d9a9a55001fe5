"""Loaded tiny models, ControlNets and LoRAs, for the tests of gen_img.py."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file
from torch import Tensor, nn

from encoders.clip_layers import ClipText
from modules.script_options import parse_options
from networks.module_names import to_alias
from networks.names.texts import TEXT_PROJECTION
from stable_diffusion.contract import (
    SD1,
    SD2,
    SDXL,
    ImageSettings,
    LoadedTextEncoder,
    Model,
    ModelKind,
    RequestedImage,
    SecondStageInput,
    StageResult,
    UnetCall,
)
from stable_diffusion.loading import check_attention, load_checkpoint, plan_checkpoint
from stable_diffusion.loras import AdjustableLoras, load_networks
from stable_diffusion.names import SDXL as SDXL_NAMES
from stable_diffusion.options import GenImgOptions, ModelOptions, read_gen_img
from tests.faults.messages import run_here
from tests.tiny.stable_diffusion import KINDS, TEXT_DIM, text_config, text_state, unet_state, vocabulary

CPU = torch.device("cpu")


def load(ckpt: Path | str, *others: object, device: torch.device = CPU) -> Model:
    """Load the checkpoint of a command line as gen_img.py would."""
    given: ModelOptions
    (given,) = parse_options(None, ["--ckpt", str(ckpt), *map(str, others)], ModelOptions)
    check_attention(given, device)
    with ExitStack() as files:
        return load_checkpoint(given, plan_checkpoint(given, files), device)


WORDS = ("a", "cat", "dog", "red", "old", "house", "of", "the", "two", "one", ",", ".", "and", "in")
OF_NAME = {kind.name: kind for kind in (SD1, SD2, SDXL)}


def tokenize(text: str) -> list[int]:
    """Known words have one token, other ones a token for each letter."""
    ids: list[int] = []
    for word in text.lower().split():
        ids += [10 + WORDS.index(word)] if word in WORDS else [30 + ord(character) % 50 for character in word]
    return ids


def make_towers(name: str) -> tuple[tuple[LoadedTextEncoder, ...], ModelKind]:
    """The text encoders of a tiny model, loaded anew, and its kind."""
    kind, end = OF_NAME[name], vocabulary() - 1
    towers = []
    for number, (activation, layers) in enumerate(KINDS[name].texts):
        is_projected = name == "sdxl" and number == 1
        config = text_config(activation, layers)
        network = ClipText(replace(config, projection_dim=TEXT_DIM if is_projected else 0))
        state = {key.removeprefix("text_model."): value for key, value in text_state(name, number).items()}
        if is_projected:
            state["text_projection.weight"] = torch.eye(TEXT_DIM).flip(0)
        network.load_state_dict(state)
        pad = end if activation == "quick_gelu" else 0
        towers.append(
            LoadedTextEncoder(
                network=network.eval().requires_grad_(False),
                tokenize=tokenize,
                bos_token_id=end - 1,
                eos_token_id=end,
                pad_token_id=pad,
                lora_prefix=kind.lora_prefixes[number],
                missing_layers=1 if name == "sd2" else 0,
            )
        )
    return tuple(towers), kind


def options(*arguments: object) -> GenImgOptions:
    """Return the options of a command line with a checkpoint and a prompt."""
    words = [str(argument) for argument in arguments]
    if not {"--prompt", "--from_file", "--from_module", "--interactive", "--image_path"} & set(words):
        words += ["--prompt", "a cat"]
    return read_gen_img(None, ["--ckpt", "model.safetensors", "--device", "cpu", *words])


@dataclass
class PlainMaker:
    """Makes pictures of one color, which the seed decides.

    batches, starts: what it was asked for.
    """

    kind: ModelKind = SD1
    fails_on: str = ""  # prompts with this text
    error: type[BaseException] = RuntimeError
    batches: list[list[RequestedImage]] = field(default_factory=list)
    starts: list[SecondStageInput | None] = field(default_factory=list)
    loras: None = None
    vae_batch_size: None = None

    @property
    def model(self) -> Any:
        vae = SimpleNamespace(device=CPU)
        return SimpleNamespace(kind=self.kind, device=CPU, vae=vae, dtype=torch.float32)

    def make(
        self,
        pictures: Sequence[RequestedImage],
        start: SecondStageInput | None = None,
        wants_images: bool = True,
    ) -> StageResult:
        if self.fails_on and any(self.fails_on in image.prompt for image in pictures):
            raise self.error("no such thing")
        self.batches.append(list(pictures))
        self.starts.append(start)
        size = pictures[0].settings.width, pictures[0].settings.height
        images = [Image.new("RGB", size, (image.seed % 256, 0, 0)) for image in pictures]
        latents = torch.zeros(len(pictures), 4, size[1] // 8, size[0] // 8)
        return StageResult(latents, images if wants_images else None)

    def load(self, options: GenImgOptions, device: torch.device) -> Any:
        return self

    @property
    def pictures(self) -> list[RequestedImage]:
        return [image for batch in self.batches for image in batch]


def write_image(path: Path, size: tuple[int, int] = (20, 30), **texts: str) -> Path:
    """Write a PNG with texts; names have - in place of _."""
    chunks = PngInfo()
    for name, text in texts.items():
        chunks.add_text(name.replace("_", "-"), text)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path, pnginfo=chunks)
    return path


def make_images(project: Path, out: Path, *words: object) -> list[np.ndarray]:
    """Run gen_img.py in a project with tokenizers; its pictures in the order of their names, H W 3 int."""
    arguments = ("--tokenizer_cache_dir", "tokenizers", "--outdir", out, *words)
    code, said = run_here("gen_img.py", *arguments, folder=project)
    assert code == 0, said[-3000:]
    return [np.asarray(Image.open(path)).astype(int) for path in sorted(out.glob("*.png"))]


SETTINGS = ImageSettings(width=64, height=48, steps=4, scale=7.5)


def unet_of(kind: str) -> UNet2DConditionModel:
    network = UNet2DConditionModel(**KINDS[kind].unet)
    network.load_state_dict(unet_state(kind))
    return network.eval().requires_grad_(False)


def model_of(kind: str) -> Model:
    return Model(
        kind=OF_NAME[kind],
        path=Path("model"),
        unet=unet_of(kind),
        vae=None,
        text_encoders=(),
        predicts_velocity=False,
        zero_terminal_snr=False,
        device=CPU,
        dtype=torch.float32,
        vae_dtype=torch.float32,
    )


def picture(*guides: Path, parts: int = 1) -> RequestedImage:
    return RequestedImage(
        "line 1", "a cat", "", 1, replace(SETTINGS, num_parts=parts), "a cat", guides=guides
    )


def write_guide(path: Path, seed: int = 0, size: tuple[int, int] = (64, 48)) -> Path:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def call_of(kind: str, rows: int = 2, step: int = 0, size: tuple[int, int] = (64, 48)) -> UnetCall:
    generator = torch.Generator().manual_seed(3)
    config = KINDS[kind].unet
    added = {}
    if kind == "sdxl":
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        added = {
            "text_embeds": torch.randn((rows, pooled), generator=generator),
            "time_ids": torch.full((rows, 6), 64.0),
        }
    return UnetCall(
        step=step,
        num_steps=4,
        timestep=501.0,
        sample=torch.randn((rows, 4, size[1] // 8, size[0] // 8), generator=generator),
        context=torch.randn((rows, 77, config["cross_attention_dim"]), generator=generator),
        negative_rows=rows // 2,
        added=added,
    )


@torch.no_grad()
def run_unet(unet: Any, call: UnetCall) -> Tensor:
    """What a U-Net makes of a call."""
    added = {}
    if call.residuals is not None:
        added["down_block_additional_residuals"], added["mid_block_additional_residual"] = call.residuals
    known = dict(call.added)
    return unet(call.sample, call.timestep, call.context, added_cond_kwargs=known, **added).sample


def pixels(path: Path) -> Tensor:
    """A guide as it is: 1 3 H W in 0..1."""
    return torch.from_numpy(np.array(Image.open(path))).float().permute(2, 0, 1)[None] / 255


RANK = 3
Factors = dict[str, Tensor]
Result = tuple[Tensor, ...]


def random(*shape: int, seed: str, scale: float = 0.3) -> Tensor:
    """Numbers that depend on the seed's text alone."""
    generator = torch.Generator().manual_seed(
        sum(ord(character) * (i + 1) for i, character in enumerate(seed))
    )
    return torch.randn(*shape, generator=generator) * scale


def unet_modules(model: Model, only: Callable[[str], bool] = lambda path: True) -> dict[str, nn.Module]:
    """Matrices and convolutions of the U-Net, by diffusers' paths."""
    named = model.unet.named_modules()
    return {path: one for path, one in named if isinstance(one, (nn.Linear, nn.Conv2d)) and only(path)}


def text_modules(model: Model) -> dict[str, nn.Module]:
    """Matrices of the text encoders by sd-scripts' names: `lora_te1_text_model_encoder_layers_0_mlp_fc1`.

    The projection of the pooled state is next to `text_model`, as ComfyUI names it.
    """
    return {
        f"{tower.lora_prefix}_{'' if path == TEXT_PROJECTION else 'text_model_'}{path.replace('.', '_')}": one
        for tower in model.text_encoders
        for path, one in tower.network.named_modules()
        if isinstance(one, nn.Linear)
    }


def low_rank(name: str, module: nn.Module, alpha: float = 2.0) -> Factors:
    """A LoRA of a module, as sd-scripts shapes it."""
    out, *rest = module.weight.shape  # type: ignore[operator]
    ones = [1] * (len(rest) - 1)
    return {
        "lora_down.weight": random(RANK, *rest, seed=name),
        "lora_up.weight": random(out, RANK, *ones, seed=f"{name} up"),
        "alpha": torch.tensor(alpha),
    }


def kohya_name(path: str, kind: str) -> str:
    """As sd-scripts names a module of the U-Net: SDXL's as the released file does."""
    name = path.replace(".", "_")
    return f"lora_unet_{to_alias(name, SDXL_NAMES) if kind == 'sdxl' else name}"


def save(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    """Write a safetensors file."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def change_json(path: Path, **values: object) -> None:
    """Set values of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")


def write(
    path: Path, modules: Mapping[str, Mapping[str, Tensor]], metadata: dict[str, str] | None = None
) -> Path:
    """Write `name.part` tensors."""
    tensors = {f"{name}.{part}": one for name, factors in modules.items() for part, one in factors.items()}
    return save(path, tensors, metadata)


def write_kohya(
    path: Path, model: Model, only: Callable[[str], bool] = lambda path: True, texts: bool = True
) -> Path:
    """A LoRA of sd-scripts for the U-Net and the text encoders."""
    found = unet_modules(model, only)
    kind = model.kind.name
    modules = {kohya_name(name, kind): low_rank(name, module) for name, module in found.items()}
    if texts:
        modules |= {name: low_rank(name, module) for name, module in text_modules(model).items()}
    return write(path, modules)


# of each sort of module in the U-Net one or more
PLACES = "conv_in time_emb_proj conv1 conv_shortcut samplers.0.conv proj_in attn2.to_k net.2"


def in_places(path: str) -> bool:
    return path.endswith(tuple(PLACES.split()))


def put_in(model: Model, *words: object) -> AdjustableLoras | None:
    return load_networks(options("--network_weights", *words).networks, model)


@torch.no_grad()
def results(model: Model) -> Result:
    """What the U-Net and each text encoder compute from the same input."""
    ids = torch.arange(6)[None]
    texts = [tower.network(ids, torch.tensor([5])) for tower in model.text_encoders]
    width = model.unet.config.cross_attention_dim
    added = None
    if model.kind.name == "sdxl":
        added = {"text_embeds": random(1, 64, seed="pooled"), "time_ids": torch.full((1, 6), 64.0)}
    sample = random(1, 4, 4, 4, seed="sample", scale=1).to(model.dtype)
    context = random(1, 7, width, seed="context", scale=1).to(model.dtype)
    out = model.unet(sample, 500.0, context, added_cond_kwargs=added, return_dict=False)[0]
    return out, *texts


def assert_same(found: Result, wanted: Result, tolerance: float = 1e-5) -> None:
    """Compare what two models compute, in deviations."""
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one / other.std(), other / other.std(), rtol=tolerance, atol=tolerance)

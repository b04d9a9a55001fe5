"""Pictures of the command lines equal those of diffusers' pipelines, which read the same prompts with their
own tokenizers and encoders.

Of Lumina, diffusers ends guidance after a share of the steps instead of a share of data; its normalization
makes every row of a prediction as long as without guidance, where the release limits the length of the whole
(recorded vectors have that: tests/lumina). So here guidance is limited in neither way, or ends at a step that
both rules name.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, FluxKontextPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import anima_generate_image
import ernie_image_generate_image
import flux_2_generate_image
import flux_generate_image
import flux_kontext_generate_image
import flux_minimal_inference
import hunyuan_image_generate_image
import hunyuan_image_minimal_inference
import krea2_generate_image
import lumina_generate_image
import qwen_image_generate_image
import zimage_generate_image
from encoders.autoencoder import SCALE, SHIFT
from flux.model import unpack
from tests.parity import pipelines
from tests.parity.anima import AnimaThere
from tests.parity.hunyuan_image import guider, load_pipeline
from tests.parity.running import assert_equal, image_in, latents_in
from tests.parity.training import RANK
from tests.qwen_image.test_family import SCHEDULER
from tests.tiny.anima import write_tiny_anima
from tests.tiny.dit_files import TinyModel
from tests.tiny.ernie_image import write_tiny_ernie_image
from tests.tiny.flux import TinyFlux, write_tiny_flux
from tests.tiny.flux_2 import write_tiny_flux_2
from tests.tiny.hunyuan_image import write_tiny_hunyuan_image
from tests.tiny.krea2 import write_dit, write_tiny_krea2
from tests.tiny.lumina import write_tiny_lumina
from tests.tiny.project import write_image
from tests.tiny.qwen_image import write_tiny_qwen_image
from tests.tiny.z_image import write_tiny_z_image

PROMPT, NEGATIVE, SEED = "a small rabbit runs through the grass", "low quality, blurred", 20
HEIGHT, WIDTH, STEPS = 48, 80, 4
ROWS, COLUMNS = HEIGHT // 16, WIDTH // 16  # of tokens
AVOID = ("--negative_prompt", NEGATIVE)
OWN_SIZE = "--no_resize_control"


@dataclass(frozen=True)
class Model:
    """How a family makes pictures here and there.

    write: the tiny files. main: our script. pipe: the pipeline of the files. latents: what a pipeline returns
    as ours are, C 1 h w. picture: the same decoded, 1 3 H W in -1..1. models: the options that name them.
    more: what the pipeline is given beside, with these references.
    """

    write: Callable[[Path], Any]
    main: Callable[[list[str]], object]
    pipe: Callable[[Any], Any]
    latents: Callable[[Any, Tensor], Tensor]
    picture: Callable[[Any, Tensor], Tensor]
    models: Callable[[Any], Sequence[str]] = lambda files: files.models
    more: Callable[[Any, list[Image.Image]], dict[str, Any]] = lambda pipe, images: {}
    near: float = 0.51  # levels of 255: as near as bytes can be
    size: tuple[int, int] = (HEIGHT, WIDTH)


def unpacked(pipe: Any, found: Tensor) -> Tensor:
    return unpack(found, ROWS, COLUMNS)[0]


def decoded(pipe: Any, latents: Tensor) -> Tensor:
    """By the autoencoder that several families share."""
    return pipe.vae.decode(latents / SCALE + SHIFT).sample


def noise_of_flux(pipe: Any = None, images: Sequence[Image.Image] = ()) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(SEED)
    return {"latents": torch.randn(1, ROWS * COLUMNS, 64, generator=generator)}


def flux(kind: str) -> Model:
    return Model(
        partial(write_tiny_flux, kind=kind),
        flux_generate_image.main,
        partial(pipelines.flux, kind=kind),
        unpacked,
        lambda pipe, found: decoded(pipe, unpack(found, ROWS, COLUMNS)[:, :, 0]),
        more=noise_of_flux,
        near=0.6,
    )


def kontext_models(files: TinyFlux) -> list[str]:
    texts = ["--text_encoder1", str(files.t5xxl), "--text_encoder2", str(files.clip_l)]
    return ["--dit", str(files.dit), "--vae", str(files.ae), *texts]


def with_reference(pipe: Any, images: list[Image.Image]) -> dict[str, Any]:
    return {"image": images[0] if images else None, "max_area": HEIGHT * WIDTH, **noise_of_flux()}


KONTEXT = Model(
    write_tiny_flux,
    flux_kontext_generate_image.main,
    lambda files: pipelines.quiet(FluxKontextPipeline(**pipelines.flux(files, "dev").components)),
    unpacked,
    lambda pipe, found: decoded(pipe, unpack(found, ROWS, COLUMNS)[:, :, 0]),
    kontext_models,
    with_reference,
    near=0.6,
)


def statistics(pipe: Any) -> tuple[Tensor, Tensor]:
    """Mean and deviation of FLUX.2's latents."""
    norm = pipe.vae.bn
    return norm.running_mean[:, None, None], (norm.running_var[:, None, None] + 1e-4).sqrt()


def latents_of_flux_2(pipe: Any, found: Tensor) -> Tensor:
    """Of dev tokens B L 128, of klein 1 32 2h 2w, which are those of the autoencoder."""
    if found.ndim == 3:
        return found[0].T.unflatten(1, (1, ROWS, COLUMNS))
    (packed,), (mean, deviation) = pipe._patchify_latents(found), statistics(pipe)
    return ((packed - mean) / deviation).unsqueeze(1)


def image_of_flux_2(pipe: Any, found: Tensor) -> Tensor:
    mean, deviation = statistics(pipe)
    own = latents_of_flux_2(pipe, found)[:, 0] * deviation + mean
    return pipe.vae.decode(pipe._unpatchify_latents(own[None])).sample


def with_references(pipe: Any, images: list[Image.Image]) -> dict[str, Any]:
    """The pipeline of klein knows no negative prompt but ""."""
    if isinstance(pipe, Flux2KleinPipeline) and not pipe.config.is_distilled:
        negative, _ = pipe.encode_prompt(" ")
        return {"image": images or None, "negative_prompt_embeds": negative}
    return {"image": images or None}


def flux_2(version: str) -> Model:
    return Model(
        lambda folder: write_tiny_flux_2(folder, version) if version == "dev" else write_tiny_flux_2(folder),
        flux_2_generate_image.main,
        partial(pipelines.flux_2, is_distilled=version == "klein-9b"),
        latents_of_flux_2,
        image_of_flux_2,
        lambda files: [*files.models[:-1], version],
        with_references,
        near=0.6,
    )


def latents_of_ernie_image(pipe: Any, found: Tensor) -> Tensor:
    return found[0].unsqueeze(1)


def image_of_ernie_image(pipe: Any, found: Tensor) -> Tensor:
    """Decoded as the pipeline does, with a smaller number in the statistics than FLUX.2's."""
    norm = pipe.vae.bn
    deviation = (norm.running_var + 1e-5).sqrt()[:, None, None]
    return pipe.vae.decode(
        pipe._unpatchify_latents(found * deviation + norm.running_mean[:, None, None])
    ).sample


def ernie_image(name: str = "dit") -> Model:
    """name: of the transformer's file, which says whether it is Turbo."""
    return Model(
        partial(write_tiny_ernie_image, name=name),
        ernie_image_generate_image.main,
        pipelines.ernie_image,
        latents_of_ernie_image,
        image_of_ernie_image,
        more=lambda pipe, images: {"use_pe": False},
        near=0.6,
    )


LUMINA = Model(
    write_tiny_lumina,
    lumina_generate_image.main,
    pipelines.lumina,
    lambda pipe, found: found[0].unsqueeze(1),
    decoded,
)
Z_IMAGE = Model(
    write_tiny_z_image,
    zimage_generate_image.main,
    pipelines.z_image,
    lambda pipe, found: found[0].unsqueeze(1),
    decoded,
)


def qwen_latents(pipe: Any, found: Tensor) -> Tensor:
    return pipe._unpack_latents(found, HEIGHT, WIDTH, pipe.vae_scale_factor)[0]


def qwen_picture(pipe: Any, found: Tensor) -> Tensor:
    return image_of_wan(pipe, qwen_latents(pipe, found)[None])


def image_of_wan(pipe: Any, latents: Tensor) -> Tensor:
    """Decoded by Wan2.1's VAE for single frames."""
    mean, std = (
        torch.tensor(getattr(pipe.vae.config, name)).view(1, -1, 1, 1, 1)
        for name in ("latents_mean", "latents_std")
    )
    return pipe.vae.decode(latents * std + mean).sample[:, :, 0]


ANIMA = Model(
    write_tiny_anima,
    anima_generate_image.main,
    AnimaThere,
    lambda pipe, found: found[0],
    image_of_wan,
)


def qwen_image(lora: bool = False, **settings: Any) -> Model:
    """settings: of diffusers' scheduler. lora: with names as those of lightx2v's for few steps."""

    def write(folder: Path) -> TinyModel:
        files = write_tiny_qwen_image(folder)
        if lora:
            write_lightning(files, files.dit.with_name("lightning.safetensors"))
        return files

    def pipe(files: TinyModel) -> Any:
        scheduler = FlowMatchEulerDiscreteScheduler(**{**SCHEDULER, **settings})
        made = pipelines.qwen_image(files, scheduler)
        if lora:
            made.load_lora_weights(files.dit.with_name("lightning.safetensors"))
            assert made.transformer.peft_config
        return made

    def models(files: TinyModel) -> list[str]:
        more = ["--lora_weight", str(files.dit.with_name("lightning.safetensors"))] if lora else []
        return [*files.models, *more]

    return Model(write, qwen_image_generate_image.main, pipe, qwen_latents, qwen_picture, models)


def krea2(turbo: str = "", dialect: str = "") -> Model:
    """turbo: in the name of the file. dialect: the layout of the transformer."""

    def write(folder: Path) -> TinyModel:
        files = write_tiny_krea2(folder, name=f"dit{turbo}")
        if dialect:
            write_dit(folder, load_file(files.dit), dialect)
        return files

    def models(files: TinyModel) -> list[str]:
        dit = files.dit.parent / "transformer" if dialect else files.dit
        return [*files.models, "--dit", str(dit)]

    return Model(
        write,
        krea2_generate_image.main,
        partial(pipelines.krea2, is_distilled=bool(turbo)),
        lambda pipe, found: pipe._unpack_latents(found, HEIGHT, WIDTH)[0],
        lambda pipe, found: image_of_wan(pipe, pipe._unpack_latents(found, HEIGHT, WIDTH)),
        models,
    )


def write_lightning(files: TinyModel, path: Path) -> Path:
    """Write a LoRA with names as those of lightx2v's LoRAs for few steps: bare paths and kohya's endings."""
    generator, tensors = torch.Generator().manual_seed(4), {}
    for name, weight in load_file(files.dit).items():
        if name.startswith("transformer_blocks.") and weight.ndim == 2 and "_mod." not in name:
            module = name.removesuffix(".weight")
            tensors[f"{module}.lora_down.weight"] = torch.randn(RANK, weight.shape[1], generator=generator)
            tensors[f"{module}.lora_up.weight"] = 0.1 * torch.randn(len(weight), RANK, generator=generator)
            tensors[f"{module}.alpha"] = torch.tensor(RANK / 2.0)
    save_file(tensors, path)
    return path


def noise_of_hunyuan_image(pipe: Any, images: list[Image.Image]) -> dict[str, Any]:
    generator, shape = torch.Generator().manual_seed(SEED), (1, 64, 2, 3)
    return {"latents": torch.randn(shape, dtype=torch.bfloat16, generator=generator).float()}


def hunyuan_image(main: Callable[[list[str]], object] = hunyuan_image_generate_image.main) -> Model:
    """The released code cuts timesteps to whole numbers, diffusers does not: a shift of 3 has whole ones in 4
    steps.
    """
    return Model(
        write_tiny_hunyuan_image,
        main,
        partial(load_pipeline, shift=3),
        lambda pipe, found: found[0].unsqueeze(1),
        lambda pipe, found: pipe.vae.decode(found / pipe.vae.config.scaling_factor).sample,
        more=noise_of_hunyuan_image,
        near=1.01,
        size=(64, 96),
    )


def apg(scale: float, general: int, ocr: int) -> tuple[object, ...]:
    """Guidance that changes at a step, another one for pictures of letters."""
    steps = ("--apg_start_step_general", general, "--apg_start_step_ocr", ocr)
    return (*SHIFT_3, "--guidance_scale", scale, *steps)


def guiders(scale: float, general: int, ocr: int) -> dict[str, Any]:
    return {"guider": guider(scale, general), "ocr_guider": guider(scale, ocr)}


def guided(name: str, scale: float) -> dict[str, Any]:
    return {name: scale, "negative_prompt": NEGATIVE}


def steps_of_lumina(share: float) -> dict[str, Any]:
    low = 6.0 * 0.001 / (1 + 5.0 * 0.001)
    asked = {"sigmas": numpy.linspace(1, low, STEPS), "cfg_trunc_ratio": share, "cfg_normalization": False}
    return {**guided("guidance_scale", 3.5), "system_prompt": "Draw well.", **asked}


LUMINA_WORDS = ("--system_prompt", "Draw well.", "--renorm_cfg", 0, "--cfg_trunc_ratio")
OCR = 'a sign “open” beside "no\' way" and a cat'
EVEN, THREE = ("--even_steps",), ("--guidance_scale", 3)
TUNER = numpy.linspace(1, 0.001, STEPS + 1)[:-1].tolist()
# of the distilled LoRAs for four and eight steps: one shift for all sizes, and no last level
PLAIN = {"base_shift": math.log(3), "max_shift": math.log(3), "shift_terminal": None}
SHIFT_3 = ("--flow_shift", 3)
LONG = " ".join(["a cat"] * 400)
EDITED = ((48, 80),)  # larger than the picture, in another shape; sizes of references in width and height
TWO = ((75, 90), (110, 66))  # no multiples of 16
# options, what the pipeline is asked, sizes of references
CASES: dict[str, tuple[Model, Sequence[object], dict[str, Any], Sequence[tuple[int, int]]]] = {
    "flux dev": (flux("dev"), ("--embedded_cfg_scale", 2.5), {"guidance_scale": 2.5}, ()),
    "flux dev, guided": (
        flux("dev"),
        (*THREE, *AVOID),
        {"guidance_scale": 3.5, **guided("true_cfg_scale", 3.0)},
        (),
    ),
    "flux schnell": (flux("schnell"), ("--t5xxl_max_token_length", 256), {"max_sequence_length": 256}, ()),
    "chroma": (flux("chroma"), (*THREE, *AVOID), guided("guidance_scale", 3.0), ()),
    "kontext, text alone": (KONTEXT, (), {"guidance_scale": 2.5}, ()),
    "kontext": (
        KONTEXT,
        (OWN_SIZE, "--embedded_cfg_scale", 3),
        {"guidance_scale": 3.0, "_auto_resize": False},
        EDITED,
    ),
    "kontext, guided": (
        KONTEXT,
        (OWN_SIZE, *THREE, *AVOID),
        {"guidance_scale": 2.5, "_auto_resize": False, **guided("true_cfg_scale", 3.0)},
        EDITED,
    ),
    "kontext at a trained size": (KONTEXT, (), {"guidance_scale": 2.5}, EDITED),
    "flux_2 klein-base-4b": (
        flux_2("klein-base-4b"),
        (*THREE, "--negative_prompt", " "),
        {"guidance_scale": 3.0},
        (),
    ),
    "flux_2 klein-base-4b, two references": (
        flux_2("klein-base-4b"),
        (*THREE, "--negative_prompt", " "),
        {"guidance_scale": 3.0},
        TWO,
    ),
    "flux_2 klein-9b": (flux_2("klein-9b"), ("--guidance_scale", 4), {"guidance_scale": 4.0}, TWO[:1]),
    "flux_2 dev": (flux_2("dev"), ("--embedded_cfg_scale", 2.5), {"guidance_scale": 2.5}, ()),
    "flux_2 dev, two references": (flux_2("dev"), (), {"guidance_scale": 4.0}, TWO),
    "lumina": (LUMINA, (*LUMINA_WORDS, 1, *AVOID), steps_of_lumina(1.0), ()),
    "lumina, guided at first": (LUMINA, (*LUMINA_WORDS, 0.2, *AVOID), steps_of_lumina(2 / STEPS), ()),
    "ernie_image": (ernie_image(), (), {"guidance_scale": 4.0}, ()),
    "ernie_image, negative prompt": (
        ernie_image(),
        (*THREE, *AVOID),
        guided("guidance_scale", 3.0),
        (),
    ),
    "ernie_image turbo": (ernie_image("ernie-image-turbo"), (), {"guidance_scale": 1.0}, ()),
    # guidance scales count from 0 in both
    "z_image turbo": (Z_IMAGE, EVEN, {"guidance_scale": 0.0}, ()),
    "z_image base": (Z_IMAGE, (*EVEN, *THREE, *AVOID), guided("guidance_scale", 3.0), ()),
    "z_image, levels of the known tuner": (
        Z_IMAGE,
        (*THREE, *AVOID),
        {**guided("guidance_scale", 3.0), "sigmas": TUNER},
        (),
    ),
    "z_image, normalized and truncated": (
        Z_IMAGE,
        (*EVEN, *THREE, *AVOID, "--renorm_cfg", 1.1, "--cfg_trunc_ratio", 0.3),
        {**guided("guidance_scale", 3.0), "cfg_normalization": 1.1, "cfg_truncation": 0.3},
        (),
    ),
    "qwen_image": (qwen_image(), ("--guidance_scale", 4, *AVOID), guided("true_cfg_scale", 4.0), ()),
    "qwen_image, unguided": (qwen_image(), ("--guidance_scale", 1), {"true_cfg_scale": 1.0}, ()),
    "qwen_image, plain shift": (
        qwen_image(**PLAIN),
        ("--guidance_scale", 4, *AVOID, *SHIFT_3),
        guided("true_cfg_scale", 4.0),
        (),
    ),
    "qwen_image, lightning": (
        qwen_image(lora=True, **PLAIN),
        ("--guidance_scale", 1, *SHIFT_3),
        {"true_cfg_scale": 1.0},
        (),
    ),
    # guidance scales count from 1 here, from 0 there
    "krea2 raw": (
        krea2(dialect="diffusers_sharded"),
        ("--guidance_scale", 5.5, *AVOID),
        guided("guidance_scale", 4.5),
        (),
    ),
    "krea2 turbo, a long prompt": (
        krea2("_turbo"),
        ("--prompt", LONG),
        {"guidance_scale": 0.0, "prompt": LONG},
        (),
    ),
    "anima": (ANIMA, ("--guidance_scale", 4, *AVOID), guided("guidance_scale", 4.0), ()),
    "anima, a long prompt, no negative": (
        ANIMA,
        ("--guidance_scale", 4, "--prompt", LONG),
        {"guidance_scale": 4.0, "prompt": LONG, "max_sequence_length": 512},
        (),
    ),
    "hunyuan_image": (
        hunyuan_image(hunyuan_image_minimal_inference.main),
        (*apg(3.5, 99, 99), "--negative_prompt", ""),
        {**guiders(3.5, 99, 99), "negative_prompt": ""},
        (),
    ),
    "hunyuan_image, projected": (
        hunyuan_image(),
        (*apg(3.5, 1, 99), *AVOID),
        {**guiders(3.5, 1, 99), "negative_prompt": NEGATIVE},
        (),
    ),
    "hunyuan_image, letters": (
        hunyuan_image(),
        (*apg(2.0, 99, 0), *AVOID, "--prompt", OCR),
        {**guiders(2.0, 99, 0), "negative_prompt": NEGATIVE, "prompt": OCR},
        (),
    ),
    "hunyuan_image, unguided": (
        hunyuan_image(),
        (*apg(1.0, 99, 99), "--prompt", OCR),
        {**guiders(1.0, 99, 99), "prompt": OCR},
        (),
    ),
}
SLOW = {  # each release and kind of reference has another case, and each way of guiding one of another model
    *("flux dev, guided", "kontext at a trained size", "kontext, guided", "kontext, text alone"),
    *("flux_2 dev", "flux_2 dev, two references", "flux_2 klein-base-4b", "flux_2 klein-9b"),
    *("hunyuan_image, projected", "hunyuan_image, unguided", "krea2 turbo, a long prompt"),
    *("qwen_image, plain shift", "z_image, normalized and truncated"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CASES]
)
@torch.no_grad()
def test_pictures_equal_those_of_diffusers(tmp_path: Path, name: str) -> None:
    model, words, asked, sizes = CASES[name]
    files, out = model.write(tmp_path / "models"), tmp_path / "out"
    references = [tmp_path / f"reference {index}.png" for index in range(len(sizes))]
    for path, size in zip(references, sizes, strict=True):
        write_image(path, *size)
    shown = ["--control_image_path", *references] if references else []
    height, width = model.size
    default = [
        "--image_size",
        height,
        width,
        "--infer_steps",
        STEPS,
        "--seed",
        SEED,
        "--vae_dtype",
        "float32",
    ]
    output = ["--output_type", "latent_images", "--save_path", out, "--device", "cpu"]
    options = [*model.models(files), "--prompt", PROMPT, *default, *output, *words, *shown]

    model.main([str(word) for word in options])

    asked, pipe = dict(asked), model.pipe(files)
    pipe.register_modules(**{part: asked.pop(part) for part in ("guider", "ocr_guider") if part in asked})
    given = {"prompt": PROMPT, "height": height, "width": width, "num_inference_steps": STEPS}
    given |= {"output_type": "latent", "generator": torch.Generator().manual_seed(SEED)}
    given |= model.more(pipe, [Image.open(path) for path in references])
    found = pipe(**{**given, **asked}).images
    assert_equal(latents_in(out), model.latents(pipe, found), f"{name}, latents")
    pixels = model.picture(pipe, found)[0].clamp(-1, 1).permute(1, 2, 0)
    assert (image_in(out) - (pixels + 1) * 127.5).abs().max() < model.near
    if name.startswith("kontext"):
        (latents,) = out.glob("*.safetensors")
        with safe_open(latents, "pt") as file:
            assert file.metadata().get("bt_control_image_path") == (
                references[0].name if references else None
            )


def test_flux_s_command_of_the_guides_makes_the_same_picture(tmp_path: Path) -> None:
    models = write_tiny_flux(tmp_path / "models")
    files = {"--ckpt_path": models.dit, "--clip_l": models.clip_l, "--t5xxl": models.t5xxl, "--ae": models.ae}
    words = [word for option, path in files.items() for word in (option, str(path))]
    words += ["--dtype", "float32", "--output_dir", str(tmp_path / "out"), "--guidance", "2.5"]
    # rounded up to whole tokens
    words += ["--height", str(HEIGHT - 3), "--width", str(WIDTH - 15)]

    flux_minimal_inference.main([*words, "--prompt", PROMPT, "--steps", str(STEPS), "--seed", str(SEED)])

    pipe, model = pipelines.flux(models, "dev"), flux("dev")
    size = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": STEPS, "guidance_scale": 2.5}
    with torch.no_grad():
        found = pipe(prompt=PROMPT, **size, **noise_of_flux(), output_type="latent").images
        pixels = model.picture(pipe, found)[0].clamp(-1, 1).permute(1, 2, 0)
    assert (image_in(tmp_path / "out") - (pixels + 1) * 127.5).abs().max() < 0.6

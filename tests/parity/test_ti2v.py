"""TI2V-5B, first and last images and other conditions of Wan equal diffusers' pipelines; in bfloat16 they are
as near to float32 as diffusers is.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from modules.media.writing import write_png, write_video
from tests.golden_cases import read_case
from tests.parity import reference
from tests.parity.reference import Inputs, ReleasedUniPC, Sampling, denoise, draw_noise, open_image, to_pixels
from tests.parity.running import assert_as_exact, assert_equal, decoded, generate
from tests.parity.theirs import Theirs, pad_text
from tests.tiny.project import moving_square
from tests.tiny.wan import write_tiny_wan
from tests.tiny.wan_encoders import t5_tensors, vae_diffusers_tensors
from wan.configs import WAN_2_2

PROMPT, SEED, FRAMES, STEPS = "close up of a butterfly", 31, 9, 4
HEIGHT, WIDTH = 64, 96
OPTIONS = (
    *("--prompt", PROMPT, "--seed", SEED, "--infer_steps", STEPS),
    *("--video_size", HEIGHT, WIDTH, "--video_length", FRAMES),
)
NEGATIVE = read_case("text_constants")[0]["wan_default_negative_prompt"]
# float32: measured at most 3e-6
TOLERANCE = 1e-5
ModelsOf = Callable[[str], Path]


def their_vae(folder: Path) -> AutoencoderKLWan:
    vae = AutoencoderKLWan(
        base_dim=8,
        decoder_base_dim=12,
        z_dim=48,
        is_residual=True,
        patch_size=2,
        in_channels=12,
        out_channels=12,
        scale_factor_spatial=16,
        latents_mean=list(WAN_2_2.mean),
        latents_std=list(WAN_2_2.std),
    )
    vae.load_state_dict(vae_diffusers_tensors(load_file(folder / "vae.safetensors")))
    return vae.eval().requires_grad_(False)


def their_video(folder: Path, image: Image.Image | None = None, output: str = "latent") -> Any:
    """What their pipeline makes of TI2V-5B: latents C F h w, or frames F H W 3 in 0..1."""
    theirs = Theirs(folder)
    kind = WanPipeline if image is None else WanImageToVideoPipeline
    pipeline = kind(
        tokenizer=None,
        text_encoder=None,
        vae=their_vae(folder),
        scheduler=ReleasedUniPC(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SAMPLING.flow_shift
        ),
        transformer=theirs.dit,
        expand_timesteps=True,
    )
    pipeline.set_progress_bar_config(disable=True)
    height, width = (HEIGHT, WIDTH) if image is None else (image.height, image.width)
    shape = (1, 48, (FRAMES - 1) // 4 + 1, height // 16, width // 16)
    positive, negative = map(pad_text, texts(theirs))
    made = pipeline(
        **({} if image is None else {"image": image}),
        **{"prompt_embeds": positive, "negative_prompt_embeds": negative},
        **{"height": height, "width": width, "num_frames": FRAMES, "num_inference_steps": STEPS},
        **{"guidance_scale": 5.0, "output_type": output},
        latents=torch.randn(shape, generator=torch.Generator().manual_seed(SEED)),
    )
    return made.frames[0]


@pytest.mark.parametrize(
    ("image", "made"),
    [
        (None, None),
        ("exact", (64, 96)),
        ("high", (96, 64)),
        pytest.param("wide", (32, 128), marks=pytest.mark.slow),
    ],
)
def test_videos_of_5b_equal_those_of_the_pipeline(
    tmp_path: Path, media: Path, models_of: ModelsOf, image: str | None, made: tuple[int, int] | None
) -> None:
    """An image is scaled to cover, with LANCZOS also where it shrinks, and cropped.

    made: height and width of at most 64 x 96 pixels, as the released code chooses them.
    """
    models, more, given = models_of("ti2v"), (), None
    if image is not None and made is not None:
        path = media / f"{image}.png"
        more, given = ("--image_path", path), covering_crop(path, *made)

    latents = generate(tmp_path, models, "ti2v-5B", *OPTIONS, *more)

    assert_equal(latents, their_video(models, given), f"ti2v {image}", TOLERANCE)


def covering_crop(path: Path, height: int, width: int) -> Image.Image:
    image = Image.open(path)
    scale = max(height / image.height, width / image.width)
    size = round(image.width * scale), round(image.height * scale)
    image = image.resize(size, Image.Resampling.LANCZOS)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def test_the_frames_of_5b_are_theirs(tmp_path: Path, media: Path, models_of: ModelsOf) -> None:
    models, path, out = models_of("ti2v"), media / "exact.png", tmp_path / "made"

    words = [*OPTIONS, "--image_path", path, "--output_type", "latent_images"]
    generate(tmp_path, models, "ti2v-5B", *words)

    ours = torch.stack([torch.from_numpy(open_image(file).copy()) for file in sorted(out.glob("*/*.png"))])
    expected: Tensor = torch.as_tensor(their_video(models, Image.open(path), output="np")) * 255
    assert ours.shape == (FRAMES, HEIGHT, WIDTH, 3)
    assert (ours - expected).abs().max() < 0.51 + 255 * TOLERANCE  # rounded to whole levels


HIGH, WIDE = 32, 64  # asked for; images set the aspect
CONDITIONED = (*OPTIONS, "--video_size", HIGH, WIDE)
SAMPLING = Sampling(scales=(5.0,) * STEPS)
FIRST_LAST_SHIFT = 16.0  # what these models are sampled with, by the released code


def picture(height: int, width: int, seed: int) -> numpy.ndarray:
    """A picture with detail at every scale, so that each way to resize gives other pixels."""
    random = numpy.random.default_rng(seed)
    return random.integers(0, 256, (height, width, 3), dtype=numpy.uint8)


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of several shapes, a control video larger than asked for and one as a folder of images."""
    folder = tmp_path_factory.mktemp("media")
    sizes = {"high": (90, 60), "small": (24, 20), "wide": (30, 80), "exact": (HEIGHT, WIDTH)}
    for name, (height, width) in sizes.items():
        write_png(folder / f"{name}.png", picture(height, width, height))
    write_video(folder / "control.mp4", moving_square(15, 96, 80, 3), fps=16)
    (folder / "control").mkdir()
    for index in range(FRAMES):
        write_png(folder / "control" / f"{index:03d}.png", picture(20, 40, index))
    return folder


@pytest.fixture(scope="module")
def models_of(tmp_path_factory: pytest.TempPathFactory) -> ModelsOf:
    """kind -> a folder with tiny models of it, written once."""
    root = tmp_path_factory.mktemp("models")

    def folder_of(kind: str) -> Path:
        if not (root / kind).exists():
            write_tiny_wan(root / kind, kind)
        return root / kind

    return folder_of


def texts(theirs: Theirs, negative: str = NEGATIVE) -> tuple[Tensor, Tensor]:
    return theirs.text(PROMPT), theirs.text(negative)


def resized(path: Path, height: int, width: int) -> Tensor:
    return to_pixels([reference.stretched(open_image(path), height, width)])


@pytest.mark.parametrize(("start", "end"), [("small", None), ("wide", None), ("high", "wide")])
def test_image_to_video(
    tmp_path: Path, media: Path, models_of: ModelsOf, start: str, end: str | None
) -> None:
    """An end image is one more latent frame, of noise too; the image tower sees the start image only."""
    path, more = media / f"{start}.png", ()
    if end is not None:
        more = ("--end_image_path", media / f"{end}.png")

    latents = generate(tmp_path, models_of("i2v"), "i2v-14B", *CONDITIONED, "--image_path", path, *more)

    theirs = Theirs(models_of("i2v"))
    height, width = reference.video_size_for(open_image(path), HIGH, WIDE)
    last = None if end is None else resized(media / f"{end}.png", height, width)
    condition = reference.image_condition(theirs, resized(path, height, width), FRAMES, last)
    noise = draw_noise(SEED, FRAMES if end is None else FRAMES + 4, height, width)
    inputs = Inputs(noise, *texts(theirs), reference.features_of(theirs, open_image(path)), condition)
    assert_equal(latents, denoise(theirs.dit, inputs, SAMPLING), f"i2v {start} {height}x{width}, end {end}")


def test_first_and_last_image(tmp_path: Path, media: Path, models_of: ModelsOf) -> None:
    """514 image tokens with positions; both images in one clip; the negative text of these models names cuts
    first.
    """
    start, end = media / "high.png", media / "wide.png"
    more = ("--image_path", start, "--end_image_path", end)

    latents = generate(tmp_path, models_of("flf2v"), "flf2v-14B", *CONDITIONED, *more)

    theirs = Theirs(models_of("flf2v"))
    height, width = reference.video_size_for(open_image(start), HIGH, WIDE)
    first, last = resized(start, height, width), resized(end, height, width)
    condition = reference.first_last_condition(theirs, first, last, FRAMES)
    clip = reference.features_of(theirs, open_image(start), open_image(end))
    noise = draw_noise(SEED, FRAMES, height, width)
    inputs = Inputs(noise, *texts(theirs, "镜头切换，" + NEGATIVE), clip, condition)
    sampling = Sampling(flow_shift=FIRST_LAST_SHIFT, scales=SAMPLING.scales)
    assert_equal(latents, denoise(theirs.dit, inputs, sampling), "flf2v")


@pytest.mark.parametrize("control", ["control.mp4", "control"])
def test_control_without_an_image(tmp_path: Path, media: Path, models_of: ModelsOf, control: str) -> None:
    """The image channels are zero, and so are the features of the image tower."""
    more = ("--control_path", media / control)

    latents = generate(tmp_path, models_of("fun-control"), "t2v-1.3B-FC", *CONDITIONED, *more)

    theirs = Theirs(models_of("fun-control"))
    if control == "control":
        frames = [open_image(path) for path in sorted((media / control).iterdir())]
    else:
        frames = decoded(media / "control.mp4")[:FRAMES]
    pixels = to_pixels([reference.covering(frame, HIGH, WIDE) for frame in frames])
    extra = reference.control_condition(theirs, pixels, None)
    zeros = torch.zeros(1, 257, theirs.dit.config.image_dim)
    inputs = Inputs(draw_noise(SEED, FRAMES, HIGH, WIDE), *texts(theirs), zeros, extra)
    assert_equal(latents, denoise(theirs.dit, inputs, SAMPLING), f"t2v-FC {control}")


@pytest.mark.parametrize(("with_end", "control_frames"), [(False, FRAMES), (True, FRAMES + 1), (True, 15)])
def test_control_with_an_image(
    tmp_path: Path, media: Path, models_of: ModelsOf, with_end: bool, control_frames: int
) -> None:
    """Of the image's latents only the first frame is kept, and the end image's; no mask. The model's ref_conv
    is not used.

    An end image takes four frames more, of which the control video needs to have one.
    """
    start, end, control = media / "high.png", media / "small.png", tmp_path / "control"
    control.mkdir()
    frames = decoded(media / "control.mp4")[:control_frames]
    for index, frame in enumerate(frames):
        write_png(control / f"{index:03d}.png", frame)
    more = [
        *("--image_path", start, "--control_path", control),
        *(["--end_image_path", end] if with_end else []),
    ]

    latents = generate(tmp_path, models_of("fun-control-v1.1"), "i2v-14B-FC", *CONDITIONED, *more)

    theirs = Theirs(models_of("fun-control-v1.1"))
    height, width = reference.video_size_for(open_image(start), HIGH, WIDE)
    length = FRAMES + 4 * with_end
    last = resized(end, height, width) if with_end else None
    image = reference.image_condition(theirs, resized(start, height, width), FRAMES, last)[4:]
    followed = [reference.covering(frame, height, width) for frame in [*frames, *[frames[-1]] * 3][:length]]
    extra = reference.control_condition(theirs, to_pixels(followed), image, with_end)
    clip = reference.features_of(theirs, open_image(start))
    inputs = Inputs(draw_noise(SEED, length, height, width), *texts(theirs), clip, extra)
    assert_equal(latents, denoise(theirs.dit, inputs, SAMPLING), f"i2v-FC end {with_end}")


def test_the_pipelines_of_diffusers_make_the_same_conditions(media: Path, models_of: ModelsOf) -> None:
    """The formulas of reference.py against the ones diffusers runs itself."""
    theirs = Theirs(models_of("i2v"))
    pipeline = WanImageToVideoPipeline(None, None, theirs.vae, None)
    first, last = (resized(media / f"{name}.png", 48, 32) for name in ("high", "wide"))
    size = {"height": 48, "width": 32, "num_frames": FRAMES, "dtype": torch.float32}

    _, one = pipeline.prepare_latents(first[:, :, 0], 1, **size)
    _, two = pipeline.prepare_latents(first[:, :, 0], 1, **size, last_image=last[:, :, 0])

    assert_equal(reference.image_condition(theirs, first, FRAMES), one[0], "pipeline i2v")
    assert_equal(reference.first_last_condition(theirs, first, last, FRAMES), two[0], "pipeline flf2v")


@pytest.mark.slow
@torch.no_grad()
def test_in_bfloat16_it_is_as_exact_as_diffusers(tmp_path: Path, media: Path) -> None:
    """Transformer, VAE and umT5. Measured: latents 1e-2 from float32, theirs 1.7e-2; pixels 1.3e-2 both."""
    models, path = tmp_path / "models", media / "exact.png"
    write_tiny_wan(models, "i2v", torch.bfloat16)
    save_file(t5_tensors(dtype=torch.bfloat16), models / "t5.safetensors")
    more = ("--flow_shift", 5, "--image_path", path, "--output_type", "latent_images")

    latents = generate(tmp_path, models, "i2v-14B", *OPTIONS, *more)

    def expected(theirs: Theirs) -> Tensor:
        pixels = to_pixels([open_image(path)]).to(theirs.vae.dtype)
        condition = reference.image_condition(theirs, pixels, FRAMES)
        clip, noise = reference.features_of(theirs, open_image(path)), draw_noise(SEED, FRAMES, HEIGHT, WIDTH)
        return denoise(theirs.dit, Inputs(noise, *texts(theirs), clip, condition), SAMPLING)

    theirs, exact = in_bfloat16(models), Theirs(models)
    assert_as_exact(latents, expected(theirs), expected(exact), "Wan")

    pixels = to_pixels([open_image(path) for path in sorted((tmp_path / "made").rglob("*.png"))])
    decoded = [one.decode(latents[None]) for one in (theirs, exact)]
    assert_as_exact(pixels, *decoded, "Wan's pixels")


def in_bfloat16(folder: Path) -> Theirs:
    """Everything but the image encoder, which computes in float32 on a CPU, and but what diffusers keeps in
    float32 when it loads a transformer in 16 bits.
    """
    theirs = Theirs(folder)
    for network in (theirs.dit, theirs.vae, theirs.t5):
        network.to(torch.bfloat16)
    kept = set(WanTransformer3DModel._keep_in_fp32_modules)
    for name, module in theirs.dit.named_modules():
        if name.rpartition(".")[2] in kept:
            module.float()
    for name, parameter in theirs.dit.named_parameters():
        if name.rpartition(".")[2] in kept:
            parameter.data = parameter.data.float()
    return theirs

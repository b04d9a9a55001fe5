"""Bernini-R through the command line equals its formulas written out: latents, caches and a step of training.

1e-4 of the largest value: latents are within 6e-6, the first step within 2e-6; each mistake below is far off.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from modules.media.writing import write_png, write_video
from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.parity import bernini as oracle
from tests.parity.reference import Sampling, TheirSolver, draw_noise, relative_error, to_pixels
from tests.parity.running import assert_equal, decoded, generate
from tests.parity.test_training import DESCENT, RATE, by_sigma, draw
from tests.parity.theirs import Theirs
from tests.parity.training import ALPHA, RANK, SEED, Item
from tests.tiny.wan import write_tiny_wan

PROMPT, NEGATIVE, NUMBER = "a red apple rolls &amp; stops", "dull, blurry", 31
HEIGHT, WIDTH, FRAMES, STEPS = 32, 48, 9, 3
ASK: list[object] = ["--prompt", PROMPT, "--negative_prompt", NEGATIVE, "--seed", NUMBER]
ASK += ["--video_size", HEIGHT, WIDTH, "--video_length", FRAMES, "--infer_steps", STEPS]
RV2V = "You are a helpful assistant specialized in video editing with reference."
V2V = "You are a helpful assistant specialized in video editing."
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Chain:
    """The passes of a step: how many sources each sees, the last one with the prompt, and the weights."""

    seen: Sequence[int]
    weights: Sequence[float]
    is_projected: bool = False
    sentence: str = RV2V
    factor: float = 0.8  # on all weights for low noise, from the first of its steps


class Scene:
    """Tiny models of two experts, a clip to change, and an image of another size."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.models = folder, folder / "models"
        write_tiny_wan(self.models, experts=2)
        random = numpy.random.default_rng(7)
        self.frames = [random.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=numpy.uint8) for _ in range(FRAMES)]
        (folder / "video").mkdir()
        for index, frame in enumerate(self.frames):
            write_png(folder / "video" / f"{index:02d}.png", frame)
        self.image = random.integers(0, 256, (50, 31, 3), dtype=numpy.uint8)
        write_png(folder / "image.png", self.image)
        self.options = ["--src_video", folder / "video", "--src_ref_images", folder / "image.png"]

    def sources(self) -> list[Tensor]:
        """The clip, and the image at its own size, whose sides are multiples of 16."""
        theirs = Theirs(self.models)
        image = numpy.array(Image.fromarray(self.image).resize((32, 48), Image.Resampling.BICUBIC))
        return [theirs.encode(to_pixels(frames))[0] for frames in (self.frames, [image])]

    @torch.no_grad()
    def theirs(self, chain: Chain, experts: int = 2, mistake: oracle.Mistake = "") -> Tensor:
        theirs, sources = Theirs(self.models), self.sources()
        positive, negative = theirs.text(chain.sentence + PROMPT.replace("&amp;", "&")), theirs.text(NEGATIVE)
        files = ("dit", "dit_high") if experts == 2 else ("dit", "dit")
        low, high = (load_file(self.models / f"{name}.safetensors") for name in files)
        solver = TheirSolver(Sampling(flow_shift=3.0, scales=(None,) * STEPS))
        latents = draw_noise(NUMBER, FRAMES, HEIGHT, WIDTH)
        for step, timestep in enumerate(solver.timesteps):
            is_high = timestep >= 875
            weights = high if is_high else low
            factor = 1.0 if is_high or experts == 1 else chain.factor
            passes = [
                oracle.velocity(weights, latents, timestep, text, sources[:count], mistake)
                for count, text in zip(
                    (*chain.seen, len(sources)), (*[negative] * len(chain.seen), positive), strict=True
                )
            ]
            scales = [factor * weight for weight in chain.weights]
            if chain.is_projected:
                sigma = float(solver.sigmas[step])
                guided = oracle.guide_projected(latents, sigma, passes, scales)
            else:
                guided = oracle.guide(passes, scales)
            latents = solver.step(step, guided, latents)
        return latents


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("bernini"))


CHAINS = {
    "rv2v": Chain((0, 1, 2), (1.25, 4.5, 4.0)),
    "v2v": Chain((2,), (4.0,)),
    "v2v_apg": Chain((2,), (4.0,), is_projected=True),
    "r2v_apg": Chain((0, 2), (4.5, 4.0), is_projected=True),
    "t2v": Chain((0,), (4.0,)),
}


@pytest.mark.parametrize(
    "mode", ["rv2v", *(pytest.param(mode, marks=pytest.mark.slow) for mode in list(CHAINS)[1:])]
)
def test_a_clip_is_changed_after_an_image(tmp_path: Path, scene: Scene, mode: str) -> None:
    """The mode for both is chosen without --bernini_guidance."""
    asked = [] if mode == "rv2v" else ["--bernini_guidance", mode]
    high = ["--dit_high_noise", scene.models / "dit_high.safetensors"]

    latents = generate(tmp_path, scene.models, "bernini-14B", *ASK, *high, *scene.options, *asked)

    assert_equal(latents, scene.theirs(CHAINS[mode]), mode, TOLERANCE)


def test_each_misreading_of_the_release_shows_in_the_latents(scene: Scene) -> None:
    expected = scene.theirs(CHAINS["rv2v"])

    for mistake in oracle.MISTAKES:
        wrong = scene.theirs(CHAINS["rv2v"], mistake=mistake)
        assert relative_error(wrong, expected) > 100 * TOLERANCE, mistake
    others = {
        "a space behind the sentence": Chain((0, 1, 2), (1.25, 4.5, 4.0), sentence=f"{RV2V} "),
        "no sentence": Chain((0, 1, 2), (1.25, 4.5, 4.0), sentence=""),
        "weights of high noise for low noise": Chain((0, 1, 2), (1.25, 4.5, 4.0), factor=1.0),
    }
    for name, chain in others.items():
        assert relative_error(scene.theirs(chain), expected) > 10 * TOLERANCE, name


@pytest.mark.slow
def test_the_small_model_has_one_expert_and_its_own_sentence(tmp_path: Path, scene: Scene) -> None:
    chosen = ["--bernini_prompt", "v2v", "--bernini_guidance", "v2v"]

    latents = generate(tmp_path, scene.models, "bernini-1.3B", *ASK, *scene.options, *chosen)

    assert_equal(latents, scene.theirs(Chain((2,), (4.0,), sentence=V2V), experts=1), "1.3B", TOLERANCE)


DATASET = """
[[datasets]]
video_directory = "clips"
cache_directory = "cache"
control_directory = "control"
reference_directory = "references"
resolution = [48, 32]
target_frames = [9]
batch_size = 1
caption_extension = ".txt"
"""
ENCODE = ("--dataset_config", "dataset.toml", "--device", "cpu")
TEXTS = ("wan_cache_text_encoder_outputs.py", *ENCODE, "--t5", "models/t5.safetensors")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip with the clip that it was changed from, and two references of their own sizes, cached."""
    folder, random = tmp_path_factory.mktemp("a project"), numpy.random.default_rng(4)
    write_tiny_wan(folder / "models")
    (folder / "models" / "dit.safetensors").rename(folder / "models" / "bernini.safetensors")
    for name in ("clips", "control", "references"):
        (folder / name).mkdir()
    for name in ("clips", "control"):
        frames = random.integers(0, 256, (FRAMES, HEIGHT, WIDTH, 3), dtype=numpy.uint8)
        write_video(folder / name / "a.mp4", frames, fps=16)
    for index, size in enumerate(((48, 32), (16, 64))):
        write_png(
            folder / "references" / f"a_{index}.png", random.integers(0, 256, (*size, 3), dtype=numpy.uint8)
        )
    (folder / "clips" / "a.txt").write_text("a red apple", encoding="utf-8")
    (folder / "dataset.toml").write_text(DATASET, encoding="utf-8")
    vae = ("--vae", "models/vae.safetensors", "--vae_dtype", "float32")
    succeed_here("wan_cache_latents.py", *ENCODE, *vae, "--bernini", folder=folder)
    succeed_here(*TEXTS, "--bernini_prompt", "rv2v", folder=folder)
    return folder


def their_sources(project: Path) -> list[Tensor]:
    theirs = Theirs(project / "models")
    clip = to_pixels(decoded(project / "control" / "a.mp4")[:FRAMES])
    images = [to_pixels(decoded(project / "references" / f"a_{index}.png")) for index in (0, 1)]
    return [theirs.encode(pixels)[0] for pixels in (clip, *images)]


def test_caches_hold_each_source_at_its_own_size(project: Path) -> None:
    (path,) = (project / "cache").glob("*_wan.safetensors")
    found = {name.rsplit("_", 2)[0]: tensor for name, tensor in load_file(path).items()}

    names = ("latents_control", "latents_reference_0", "latents_reference_1")
    for name, expected in zip(names, their_sources(project), strict=True):
        assert_equal(found[name], expected, name)
    assert found["latents_reference_1"].shape[1:] == (1, 2, 8)
    (path,) = (project / "cache").glob("*_wan_te.safetensors")
    (text,) = load_file(path).values()
    assert_equal(text, Theirs(project / "models").text(f"{RV2V}a red apple"), "caption")


TRAIN = [
    *("wan_train_network.py", "--dit", "models/bernini.safetensors", "--dataset_config", "dataset.toml"),
    *("--sdpa", "--network_module", "networks.lora_wan", "--network_dim", str(RANK)),
    *("--network_alpha", str(ALPHA), "--max_train_steps", "1", "--seed", str(SEED)),
    *("--max_data_loader_n_workers", "0", "--output_dir", "out"),
]


def their_gradients(project: Path, mistake: oracle.Mistake = "") -> dict[str, Tensor]:
    """The gradient of each weight: the loss is that of the target alone."""
    (path,) = (project / "cache").glob("*_wan_te.safetensors")
    (text,) = load_file(path).values()
    clip = to_pixels(decoded(project / "clips" / "a.mp4")[:FRAMES])
    latents = Theirs(project / "models").encode(clip)[0]
    drawn = draw([Item(latents, text)], 0, by_sigma)
    sigma, noise = drawn.sigmas[0], drawn.noise[0]
    noisy = ((1 - sigma) * latents + sigma * noise).float()
    weights = load_file(project / "models" / "bernini.safetensors")
    for tensor in weights.values():
        tensor.requires_grad_()
    made = oracle.velocity(
        weights, noisy, float(drawn.timesteps[0]), text.float(), their_sources(project), mistake
    )
    (made - (noise - latents)).square().mean().backward()
    return {name: tensor.grad for name, tensor in weights.items() if tensor.grad is not None}


def weight_name(module: str) -> str:
    """`lora_unet_blocks_0_self_attn_q` -> `blocks.0.self_attn.q.weight`."""
    _, number, *rest = module.removeprefix("lora_unet_").split("_")
    inner = ".".join(rest) if rest[0] == "ffn" else f"{'_'.join(rest[:2])}.{rest[2]}"
    return f"blocks.{number}.{inner}.weight"


def step_of(gradients: dict[str, Tensor], trained: dict[str, Tensor]) -> Tensor:
    """What a step of plain descent makes of the factors that begin at zero, in a row."""
    ups = sorted(name for name in trained if name.endswith("lora_up.weight"))
    modules = [name.removesuffix(".lora_up.weight") for name in ups]
    steps = [
        -RATE * ALPHA / RANK * gradients[weight_name(module)] @ trained[f"{module}.lora_down.weight"].T
        for module in modules
    ]
    return torch.cat([step.flatten() for step in steps])


def test_the_first_step_is_that_of_plain_torch_and_of_no_mistake(project: Path) -> None:
    """The file's name says that it is Bernini, so --task is not needed."""
    output = ["--output_name", "first", "--bernini_prompt", "rv2v", *map(str, DESCENT)]
    said = succeed_here(*TRAIN, *output, folder=project)
    assert "models/bernini.safetensors is Bernini-R, its name says so" in said.replace("\\", "/")
    trained = load_file(project / "out" / "first.safetensors")
    ups = sorted(name for name in trained if name.endswith("lora_up.weight"))
    ours = torch.cat([trained[name].flatten() for name in ups])

    expected = step_of(their_gradients(project), trained)
    assert_equal(ours, expected, "first step", TOLERANCE)
    for mistake in oracle.MISTAKES:
        wrong = step_of(their_gradients(project, mistake), trained)
        assert relative_error(ours, wrong) > 30 * TOLERANCE, mistake
    with safe_open(project / "out" / "first.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["reelsmith_trained_for"] == "Bernini-R"


def test_captions_without_the_sentence_are_not_trained_in_silence(project: Path) -> None:
    answer = run_here(*TRAIN, "--output_name", "none", "--bernini_prompt", "none", folder=project)

    assert_one_message(*answer, "with a sentence of Bernini", "train with --bernini_prompt v2v")


def test_plain_training_on_a_file_of_bernini_is_warned_of(project: Path) -> None:
    (project / "plain.toml").write_text(
        "\n".join(line for line in DATASET.splitlines() if "control" not in line and "reference" not in line),
        encoding="utf-8",
    )
    plain = [*TRAIN, "--dataset_config", "plain.toml", "--task", "t2v-1.3B", "--output_name", "plain"]

    said = succeed_here(*plain, folder=project)

    assert "is Bernini-R" in said
    assert "--task t2v-1.3B uses it as plain Wan, without sources" in said

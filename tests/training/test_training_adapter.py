"""A LoRA that the model has in training steps alone: --training_adapter."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from anima.family import Anima
from checkpoints.file_hashes import name_base
from checkpoints.writing import save_tensors
from flux.family import Flux, FluxFiles
from flux_2.family import Flux2
from flux_2.files import Flux2Files
from modules.errors import OptionError
from networks.apply import LoraPatch
from networks.gated_loras import add_loras
from networks.loading import WeightedLora, read_lora
from networks.names.layouts import MADE_FOR, TRAINED_EXPERT
from protocols.family import Abilities
from protocols.few_steps import FewSteps
from protocols.loading import Placement
from stable_diffusion.family import StableDiffusion
from stable_diffusion.training_files import TrainingFiles
from tests.tiny import flux as tiny_flux
from tests.tiny import flux_2 as tiny_flux_2
from tests.tiny import z_image as tiny_z_image
from tests.training import toy
from tests.training.test_speed import COMPILED, CPU, KINDS, random, write_file
from training.run import train_network
from z_image.family import ZImage, ZImageFiles

pytestmark = pytest.mark.usefixtures("nothing_compiled")

SWAPPED = ["--gradient_checkpointing", "--blocks_to_swap", 1]
HOW: dict[str, tuple[str, list[object]]] = {  # a kind of file, and options
    **{kind: (kind, []) for kind in KINDS},
    "swapped": ("LoRA", SWAPPED),
    "compiled": ("LoRA", COMPILED),
    "accumulating": ("LoRA", ["--gradient_accumulation_steps", 2]),
}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Within what eight steps of AdamW make of the order in which an addition is summed."""
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.slow_cases("LoHa", "accumulating", "compiled", "swapped")
@pytest.mark.parametrize("how", HOW)
def test_training_is_that_of_a_model_merged_with_it(tmp_path: Path, how: str) -> None:
    toy.write_caches(tmp_path)
    kind, words = HOW[how]
    path = write_file(tmp_path, KINDS[kind])
    expected = toy.train_toy(tmp_path, *words, "--base_weights", path, "--base_weights_multiplier", 0.5)
    plain = toy.train_toy(tmp_path, *words, "--overwrite")

    words = [*words, "--training_adapter", path, "--training_adapter_multiplier", 0.5]
    found = toy.train_toy(tmp_path, *words, "--overwrite")

    assert_close(found, expected)
    assert not toy.same(found, plain)


def test_a_change_of_a_norm_is_in_the_backward_pass_too(tmp_path: Path) -> None:
    """The weight is put back before the backward pass, whose gradients need the changed one."""
    dit = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8)).requires_grad_(False)
    path = tmp_path / "norm.safetensors"
    save_file({"lora_unet_1.diff": random(8), "lora_unet_1.diff_b": random(8)}, path)
    lora = read_lora(path)
    merged = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8)).requires_grad_(False)
    merged.load_state_dict(dit.state_dict())
    patch = LoraPatch([WeightedLora(lora)])
    for name, parameter in merged.named_parameters():
        parameter.data = patch(name, parameter.data)
    adapter = add_loras(dit, [WeightedLora(lora)])
    adapter.place_on(CPU, torch.float32)
    x, y = (random(3, 8, seed=5).requires_grad_() for _ in range(2))

    with adapter.switched_to(is_on=True):
        dit(x).pow(3).sum().backward()
    merged(y).pow(3).sum().backward()

    assert x.grad is not None
    torch.testing.assert_close(x.grad, y.grad)
    assert isinstance(dit[1].weight, torch.nn.Parameter)


@pytest.mark.slow_cases("compiled", "usual")
@pytest.mark.parametrize("how", [[], SWAPPED, COMPILED], ids=["usual", "swapped", "compiled"])
def test_samples_and_validation_are_without_it_to_the_bit(tmp_path: Path, how: list[object]) -> None:
    """Before the first step the network changes nothing, so that samples are the model's own."""
    toy.write_caches(tmp_path)
    path = write_file(tmp_path, KINDS["LoRA"])
    options = [*how, "--sample_prompts", toy.write_prompts(tmp_path), "--sample_at_first"]
    options += ["--validation_split", 0.2, "--learning_rate", 0, "--sample_every_n_steps", 3]
    images: list[list[Tensor]] = []
    told: list[list[dict[str, Any]]] = []
    for more in ([], ["--training_adapter", path, "--overwrite"]):
        images.append([])
        family = toy.ToyFamily(on_decode=images[-1].append)
        toy.train_toy(tmp_path, *options, *more, family=family, has_page=True)
        history = (tmp_path / "output" / "x-history.jsonl").read_text(encoding="utf-8")
        told.append([json.loads(line) for line in history.splitlines()])

    assert len(images[0]) >= 2
    assert all(torch.equal(one, other) for one, other in zip(*images, strict=True))
    validated, steps = (
        [[line[kind] for line in lines if kind in line] for lines in told] for kind in ("losses", "loss")
    )
    assert validated[0] == validated[1]
    assert steps[0] != steps[1]


def test_samples_with_a_lora_of_their_own_are_those_without_the_adapter(tmp_path: Path) -> None:
    toy.write_caches(tmp_path)
    (tmp_path / "other").mkdir()
    path, other = write_file(tmp_path, KINDS["LoRA"]), write_file(tmp_path / "other", KINDS["LoHa"])
    options = ["--sample_prompts", toy.write_prompts(tmp_path), "--sample_at_first", "--sample_lora", other]
    images: list[Tensor] = []
    family = toy.ToyFamily(on_decode=images.append)

    for more in ([], ["--training_adapter", path, "--overwrite"]):
        toy.train_toy(tmp_path, *options, "--max_train_steps", 1, *more, family=family)

    assert torch.equal(*images)


def test_the_file_says_that_it_was_there_and_nothing_else(tmp_path: Path) -> None:
    toy.write_caches(tmp_path)
    path = write_file(tmp_path, KINDS["LoRA"])
    words = ["--learning_rate", 0, "--overwrite", "--max_train_steps", 2]
    found, metadata = [], []
    for more in ([], ["--training_adapter", path], ["--training_adapter", path, "--no_metadata"]):
        found.append(toy.train_toy(tmp_path, *words, *more))
        metadata.append(toy.metadata_of(tmp_path / "output" / "x.safetensors"))

    before, after, untold = metadata
    assert toy.same(found[0], found[1])
    assert after.keys() - before.keys() == {"ss_training_adapter"}
    assert after["ss_training_adapter"] == "own style.safetensors:1"
    assert "ss_training_adapter" not in untold


STATES = ["--save_every_n_steps", 3, "--save_state", "--resume", "latest"]


def test_a_resumed_run_ends_with_equal_bytes_and_needs_the_same_file(tmp_path: Path) -> None:
    toy.write_caches(tmp_path)
    path = write_file(tmp_path, KINDS["LoRA"])
    adapter = ["--training_adapter", path]
    expected = toy.train_toy(tmp_path, *STATES, *adapter)
    words = [*STATES, "--output_dir", tmp_path / "killed"]
    with pytest.raises(toy.Killed):
        toy.train_toy(tmp_path, *words, *adapter, family=toy.killed_at(5))

    write_file(tmp_path, {**KINDS["LoRA"], "alpha": torch.tensor(2.0)})
    with pytest.raises(OptionError, match=r"--training_adapter: own style.safetensors:1, \w+ in the state"):
        toy.train_toy(tmp_path, *words, *adapter)
    write_file(tmp_path, KINDS["LoRA"])
    with pytest.raises(OptionError, match="--training_adapter: own style.*None now"):
        toy.train_toy(tmp_path, *words)
    with pytest.raises(OptionError, match="--training_adapter: own style.safetensors:1, .*:2, "):
        toy.train_toy(tmp_path, *words, *adapter, "--training_adapter_multiplier", 2)

    assert toy.same(toy.train_toy(tmp_path, *words, *adapter), expected)


@pytest.mark.slow_cases("both")
@pytest.mark.parametrize("turns", [[], ["--offload_inactive_dit"]], ids=["both", "turns"])
def test_two_transformers_have_it_both_unless_the_file_is_for_one(
    tmp_path: Path, turns: list[object]
) -> None:
    toy.write_caches(tmp_path)
    path, family = write_file(tmp_path, KINDS["LoRA"]), toy.ToyFamily(experts=toy.TWO_EXPERTS)

    def train(*words: object) -> dict[str, Tensor]:
        return toy.train_toy(tmp_path, "--max_train_steps", 12, "--overwrite", *turns, *words, family=family)

    both = train("--base_weights", path)
    assert_close(train("--training_adapter", path), both)

    tensors = {f"lora_unet_blocks_0_up.{part}": tensor for part, tensor in KINDS["LoRA"].items()}
    save_file(tensors, path, {TRAINED_EXPERT: "high"})
    empty = tmp_path / "empty.safetensors"
    save_file({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, empty)
    one = train("--base_weights", empty, "--base_weights_high_noise", path)
    assert_close(train("--training_adapter", path), one)
    assert not toy.same(one, both)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--training_adapter no.safetensors", "--training_adapter no.safetensors: no such file"),
        ("--training_adapter_multiplier 2", "needs --training_adapter"),
        ("--teacher_weight 0.3", "--teacher_weight needs --teacher"),
        ("--teacher base --teacher_weight 0", "use a number above 0 and of at most 1"),
        ("--teacher base --teacher_weight 1.5", "use a number above 0 and of at most 1"),
    ],
)
def test_mistakes_are_told(tmp_path: Path, words: str, reason: str) -> None:
    with pytest.raises(OptionError, match=reason):
        toy.toy_options(tmp_path, *words.split())


@pytest.mark.parametrize(
    "words",
    ["--training_adapter a", "--training_adapter_multiplier 2", "--teacher base", "--teacher_weight 1"],
)
def test_training_the_model_itself_refuses_them(tmp_path: Path, words: str) -> None:
    option, value = words.split()
    with pytest.raises(OptionError, match=f"{option} is refused: the model itself is trained"):
        toy.toy_options(tmp_path, option, value, full_dit=True)


@pytest.mark.parametrize(
    ("name", "title", "found"),
    [
        ("z_image_turbo_bf16.safetensors", "", True),
        ("zImageTurbo_v1.safetensors", "", True),
        ("ltx-2.3-22b-distilled-1.1.safetensors", "", True),
        ("Qwen-Image-Lightning-8steps-V1.0.safetensors", "", True),
        ("wan2.1_t2v_14B_lightx2v.safetensors", "", True),
        ("flux-hyper.safetensors", "", True),
        ("mine.safetensors", "Z-Image-Turbo", True),
        ("z_image_de_turbo_v1_bf16.safetensors", "", False),
        ("flux1-dev-dedistilled.safetensors", "", False),
        ("hunyuan_video_720_cfgdistill_fp8.safetensors", "", False),
        ("hyperion-step00000400.safetensors", "", False),
        ("models/turbo/z_image_bf16.safetensors", "", False),
        ("Z-Image-Turbo/transformer/diffusion_pytorch_model.safetensors", "", True),
        ("Z-Image/transformer/diffusion_pytorch_model.safetensors", "", False),
    ],
)
def test_a_distilled_transformer_is_known_by_names(name: str, title: str, found: bool) -> None:
    path = Path("/somewhere/above/all/of/it") / name
    verdict = FewSteps().judge(path, {"modelspec.title": title})
    assert (verdict is not None and verdict.is_distilled) == found


def test_families_know_their_releases_of_few_steps(tmp_path: Path) -> None:
    def of_flux(kind: str) -> str | None:
        return Flux(
            FluxFiles(tiny_flux.write_dit(tmp_path / kind, tiny_flux.tiny_state(kind)))
        ).few_steps_evidence()

    def of_flux_2(version: str, name: str) -> str | None:
        path = tiny_flux_2.write_dit(tmp_path, tiny_flux_2.tiny_state("klein"), name=name)
        return Flux2(Flux2Files(path, model_version=version)).few_steps_evidence()

    assert [of_flux(kind) is None for kind in ("dev", "schnell", "chroma")] == [True, False, True]
    assert "FLUX.2-klein-4B" in str(of_flux_2("klein-4b", "x"))
    assert "flux-2-klein-4b" in str(of_flux_2("klein-base-4b", "flux-2-klein-4b"))
    assert of_flux_2("klein-base-4b", "flux-2-klein-base-4b") is None
    path = tiny_z_image.write_dit(tmp_path, tiny_z_image.tiny_state(), name="z_image_turbo")
    assert "z_image_turbo" in str(ZImage(ZImageFiles(path)).few_steps_evidence())


@dataclass(frozen=True)
class Turbo(toy.ToyFamily):
    """Says that its transformer is distilled."""

    abilities: Abilities = Abilities(detects_few_steps=True)
    few_steps: FewSteps = FewSteps("another")

    def few_steps_evidence(self) -> str:
        return "it is called turbo"


@dataclass(frozen=True)
class TurboFile(Turbo):
    """Has a file, too."""

    file: Path = Path()

    @property
    def dit_files(self) -> tuple[Path, ...]:
        return (self.file,)

    def file_beside(self, path: Path) -> None:
        """The model has no file with further tensors."""


def test_a_distilled_transformer_without_an_adapter_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    toy.write_caches(tmp_path)
    path = write_file(tmp_path, KINDS["LoRA"])
    said = []
    for more in ([], ["--training_adapter", path], ["--base_weights", path]):
        caplog.clear()
        toy.train_toy(tmp_path, "--max_train_steps", 1, "--overwrite", *more, family=Turbo())
        said.append(
            [
                text
                for text in caplog.messages
                if "may be distilled for few steps (it is called turbo). If it is," in text
            ]
        )

    assert [len(texts) for texts in said] == [1, 0, 0]
    assert "Train on another, or pass --training_adapter with a LoRA that undoes the dist" in said[0][0]
    assert "If you train this one" in said[0][0]
    assert "keep more of them: --guided_target 3" in said[0][0]


def test_check_says_that_a_transformer_is_distilled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toy.write_caches(tmp_path)
    said = []
    for family in (Turbo(), toy.ToyFamily()):
        assert train_network(family, toy.toy_options(tmp_path, "--check")) == 0
        said.append(capsys.readouterr().out)

    assert ["may be distilled for few steps (it is called turbo)" in text for text in said] == [True, False]
    assert "Train on another, or pass --training_adapter" in said[0]


@pytest.mark.parametrize("family", [Anima, Flux, Flux2, ZImage])
def test_advice_on_a_distilled_model_says_each_thing_once(family: Any) -> None:
    advice = family.few_steps.advice_for_lora
    assert advice.startswith("Train on ")
    assert [advice.count(words) for words in ("rain on", "LoRAs work on", "--training_adapter")] == [1, 1, 1]
    assert family.few_steps.advice_for_full_training == advice.partition(", whose")[0]


@pytest.mark.parametrize("preview", ["--check", "--plan"])
def test_previews_refuse_the_network_module_of_another_model(preview: str, tmp_path: Path) -> None:
    toy.write_caches(tmp_path)
    words = ["--network_module", "networks.lora_flux_2", preview]

    with pytest.raises(OptionError, match="networks.lora_flux_2 is for a different model than this script"):
        train_network(toy.ToyFamily(), toy.toy_options(tmp_path, *words))


@pytest.mark.parametrize(("name", "found"), [("dreamXL_turbo_v2", True), ("sd_xl_base_1.0", False)])
def test_checkpoints_of_stable_diffusion_are_known_by_their_names(
    name: str, found: bool, tmp_path: Path
) -> None:
    path = tmp_path / f"{name}.safetensors"
    path.touch()
    family = StableDiffusion(TrainingFiles((), path))

    assert (family.few_steps_evidence() is not None) is found
    assert family.abilities.detects_few_steps


def test_a_distilled_model_that_is_trained_whole_is_told_what_a_whole_model_can_do(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    toy.write_caches(tmp_path)
    toy.train_toy(tmp_path, "--max_train_steps", 1, family=Turbo(), full_dit=True)
    [warning] = [text for text in caplog.messages if "may be distilled" in text]
    assert "plain training unlearns them: it needs more steps, and guidance, for equal quality" in warning
    assert warning.endswith(". Train on another.")
    assert "--training_adapter" not in warning  # both are refused
    assert "--guided_target" not in warning


def test_an_adapter_is_compared_with_what_it_meets(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Layers of related models have equal shapes, so that the adapter of another one would fit."""
    toy.write_caches(tmp_path)
    path = write_file(tmp_path, KINDS["LoRA"])
    tensors = load_file(path)
    found = []
    family = TurboFile(file=tmp_path / "dit.safetensors")
    save_file(family.load_dit(Placement(CPU)).state_dict(), family.file)
    own = {"ss_base_model_version": "toy", MADE_FOR: name_base(family.file)}
    others = ({"ss_base_model_version": "flux2"}, {"base_model": "an/Other"}, {MADE_FOR: "b 0123"})
    for metadata in ({}, own, *others):
        save_file(tensors, path, metadata)
        caplog.clear()
        words = ["--max_train_steps", 1, "--overwrite", "--training_adapter", path]
        toy.train_toy(tmp_path, *words, family=family)
        found.append(
            [text for text in caplog.messages if "An adapter undoes the distillation of one" in text]
        )

    assert [len(texts) for texts in found] == [0, 0, 1, 1, 1]
    assert "is for flux2, and the transformer is toy" in found[2][0]
    assert "is for an/Other, and the transformer is of" in found[3][0]
    assert "was made for b 0123, not for dit.safetensors" in found[4][0]


def test_an_adapter_with_a_guided_target_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    toy.write_caches(tmp_path)
    empty = {"varlen_letters_float32": torch.full((1, 1), -0.7)}
    save_tensors(tmp_path / "cache" / "toy_te.empty.safetensors", empty)
    path = write_file(tmp_path, KINDS["LoRA"])
    words = ["--max_train_steps", 1, "--overwrite", "--guided_target", 3]

    toy.train_toy(tmp_path, *words)
    assert not any("acts twice" in text for text in caplog.messages)
    toy.train_toy(tmp_path, *words, "--training_adapter", path)

    assert any(
        "--training_adapter with --guided_target 3: the adapter has" in text for text in caplog.messages
    )


def test_an_adapter_that_is_made_names_its_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    toy.write_caches(tmp_path)
    family = TurboFile(file=tmp_path / "dit.safetensors")
    save_file(family.load_dit(Placement(CPU)).state_dict(), family.file)
    toy.train_toy(tmp_path, "--max_train_steps", 1, "--make_adapter", "own", family=family)
    metadata = toy.metadata_of(tmp_path / "output" / "x.safetensors")

    assert metadata["ss_adapter_data"] == "own"
    assert metadata[MADE_FOR] == name_base(family.dit_files[0])
    assert not any("may be distilled" in text for text in caplog.messages)
    for words, reason in (
        (["--guided_target", 3], "--make_adapter with --guided_target 3: an adapter has to unlearn"),
        (
            ["--training_adapter", write_file(tmp_path, KINDS["LoRA"])],
            "--make_adapter with --training_adapter",
        ),
    ):
        with pytest.raises(OptionError, match=reason):
            toy.train_toy(tmp_path, "--make_adapter", "own", *words, family=family)
    with pytest.raises(OptionError, match="a training adapter is a LoRA"):
        toy.train_toy(tmp_path, "--make_adapter", "own", full_dit=True)

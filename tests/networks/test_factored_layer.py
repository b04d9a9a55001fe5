"""LoHa, LoKr and distilled LoRAs: what they add, their gradients, files that load elsewhere."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from modules.errors import CheckpointError, OptionError
from networks.apply import LoraPatch
from networks.convert import convert_file
from networks.delta import read_delta
from networks.factored_layer import FactoredLayer, Product
from networks.gated_loras import add_loras
from networks.kinds import loha_layer, lokr_layer
from networks.kinds.loha import make_shapes as loha_shapes
from networks.kinds.lokr import make_shapes as lokr_shapes
from networks.kinds.lokr import split_size
from networks.loading import WeightedLora, read_lora
from networks.lora_layer import LoraLayer
from networks.train import dora
from protocols.loading import Placement
from tests.networks.making import inputs, tiny_dit
from tests.networks.test_key_formats import TOLERANCE, load_there, run_there
from tests.tiny.loras import lora_like, unused
from tests.tiny.wan_dit import tiny_state, write_dit
from tests.training.conftest import _fresh_accelerator  # noqa: F401
from tests.training.toy import ToyFamily, same, toy_options, train_toy, write_caches
from tests.wan.making import in_diffusers
from training.run import train_network
from wan.checkpoints import load_dit

CPU = torch.device("cpu")
KINDS = {
    "LoHa": loha_shapes((12, 8), 2),
    "LoKr": lokr_shapes((12, 16), 1),
    "LoKr whole": lokr_shapes((12, 8), 64),
    "LoKr of four": lokr_shapes((144, 144), 2, decompose_both=True),
    "LoKr by 2": lokr_shapes((12, 8), 1, factor=2),
}
NETWORKS: dict[str, list[object]] = {
    "loha": ["--network_module", "networks.loha", "--network_dim", 2],
    "lokr": ["--network_module", "networks.lokr", "--network_dim", 1],
    "lokr whole": ["--network_module", "networks.lokr", "--network_dim", 100000],
    "lokr by 2": ["--network_module", "networks.lokr", "--network_args", "factor=2", "decompose_both=True"],
    "dora": ["--network_module", "networks.lora", "--network_args", "dora_wd=True"],
}
DROPPING = ["loraplus_lr_ratio=4", "rank_dropout=0.2", "module_dropout=0.2"]


# weight of a convolution and further settings of its module
CONVOLUTIONS: dict[str, tuple[tuple[int, ...], dict[str, int]]] = {
    "3x3": ((12, 8, 3, 3), {"padding": 1}),
    "3x3 that halves": ((8, 8, 3, 3), {"padding": 1, "stride": 2}),
    "1x1": ((6, 16, 1, 1), {}),
    "dilated": ((4, 6, 3, 1), {"dilation": 2}),
}
# shapes of factors as LyCORIS 4.1.3 has them for a weight of 12 8 3 3
IN_LYCORIS = {
    "LoHa": {"hada_w1_a": (12, 2), "hada_w1_b": (2, 72), "hada_w2_a": (12, 2), "hada_w2_b": (2, 72)},
    "LoKr": {"lokr_w1": (3, 2), "lokr_w2_a": (4, 1), "lokr_w2_b": (1, 36)},
    "LoKr whole": {"lokr_w1": (3, 2), "lokr_w2": (4, 4, 3, 3)},
    "LoKr by 2": {"lokr_w1": (2, 2), "lokr_w2_a": (6, 1), "lokr_w2_b": (1, 36)},
}


def product_of(shapes: Mapping[str, tuple[int, ...]]) -> Product:
    return loha_layer.PRODUCT if "hada_w1_a" in shapes else lokr_layer.PRODUCT


def shapes_of(kind: str, weight: tuple[int, ...]) -> tuple[Any, int]:
    """Factors of a kind for a weight, and their rank."""
    if kind == "LoHa":
        return loha_shapes(weight, 2), 2
    rank = 64 if kind == "LoKr whole" else 1
    return lokr_shapes(weight, rank, factor=2 if kind == "LoKr by 2" else -1), rank


def whole(factors: dict[str, Tensor], name: str) -> Tensor:
    """One of the two matrices of a LoKr, or its whole kernel, flattened."""
    if name in factors:
        return factors[name].flatten(1)
    return factors[f"{name}_a"] @ factors[f"{name}_b"]


@pytest.mark.parametrize("kind", [*IN_LYCORIS, "DoRA"])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_a_convolution_computes_with_the_changed_weight(kind: str, case: str) -> None:
    """Output and gradients, by the formulas of the papers written out."""
    weight, settings = CONVOLUTIONS[case]
    torch.manual_seed(3)
    original = nn.Conv2d(weight[1], weight[0], weight[2:], **settings).requires_grad_(False)  # type: ignore[arg-type]
    layer: FactoredLayer | LoraLayer
    if kind == "DoRA":
        layer = LoraLayer(original, 2, 0.7)
        dora.extend(layer)
        scale = 0.35
    else:
        shapes, rank = shapes_of(kind, weight)
        if case == "3x3":
            assert shapes == IN_LYCORIS[kind]
        layer = FactoredLayer(original, shapes, rank, 0.7, product_of(shapes))
        scale = 1.0 if kind == "LoKr whole" or {"lokr_w1", "lokr_w2"} <= shapes.keys() else 0.7 / rank
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, weight[1], 9, 7, requires_grad=True)
    factors = dict(layer.named_parameters())
    if kind == "DoRA":
        change = factors["lora_up.weight"].flatten(1) @ factors["lora_down.weight"].flatten(1)
    elif kind == "LoHa":
        change = (factors["hada_w1_a"] @ factors["hada_w1_b"]) * (factors["hada_w2_a"] @ factors["hada_w2_b"])
    else:
        change = torch.kron(whole(factors, "lokr_w1"), whole(factors, "lokr_w2"))
    changed = original.weight + scale * change.view(weight)
    if kind == "DoRA":
        assert factors["dora_scale"].shape == (weight[0], 1, 1, 1)
        norms = changed.detach().flatten(1).norm(dim=1).view(-1, 1, 1, 1)  # a constant: section 4.3
        changed = factors["dora_scale"] * changed / norms
    expected = nn.functional.conv2d(x, changed, original.bias, **settings)  # type: ignore[arg-type]

    layer.attach()
    found = original(x)

    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    direction = torch.randn_like(found)
    leaves = [x, *layer.parameters()]
    for mine, theirs in zip(
        torch.autograd.grad((found * direction).sum(), leaves),
        torch.autograd.grad((expected * direction).sum(), leaves),
        strict=True,
    ):
        # sums of hundreds of products in another order
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
    delta = read_delta(
        {name: tensor for name, tensor in layer.state_dict().items() if name != "dora_scale"}
    ).compute_change(x.device)
    assert delta is not None  # as generation merges it
    torch.testing.assert_close(delta.view(weight), scale * change.detach().view(weight), rtol=1e-4, atol=1e-4)
    if kind != "DoRA":
        torch.testing.assert_close(layer.norm().detach(), torch.linalg.vector_norm(delta))


def size_of(shapes: Any) -> tuple[int, int]:
    """Outputs and inputs of the weight that factors of these shapes change."""
    factors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    found = read_delta(factors).change_shape()
    assert found is not None
    rows, columns = found
    return rows, columns


def random_layer(kind: str, alpha: float = 0.7) -> tuple[nn.Linear, FactoredLayer]:
    torch.manual_seed(3)
    shapes = KINDS[kind]
    out_features, in_features = size_of(shapes)
    rank = {"LoKr": 1, "LoKr by 2": 1, "LoKr whole": 64}.get(kind, 2)
    original = nn.Linear(in_features, out_features).requires_grad_(False)
    layer = FactoredLayer(original, shapes, rank, alpha, product_of(shapes))
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return original, layer


@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients_are_those_of_the_merged_weight(kind: str) -> None:
    original, layer = random_layer(kind)
    x = torch.randn(2, 5, original.in_features, requires_grad=True)
    layer.multiplier = 0.5
    delta = read_delta(layer.state_dict(keep_vars=True)).compute_change(x.device)  # as generation merges it
    assert delta is not None
    expected = nn.functional.linear(x, original.weight + layer.multiplier * delta, original.bias)
    layer.attach()
    found = original(x)

    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    weight = torch.randn_like(found)
    leaves = [x, *layer.parameters()]
    for mine, theirs in zip(
        torch.autograd.grad((found * weight).sum(), leaves),
        torch.autograd.grad((expected * weight).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    layer.multiplier = 0.0
    assert torch.equal(original(x), nn.functional.linear(x, original.weight, original.bias))


@pytest.mark.parametrize("kind", KINDS)
def test_the_norm_is_that_of_the_change_and_shrinks_with_it(kind: str) -> None:
    _, layer = random_layer(kind)
    delta = read_delta(layer.state_dict()).compute_change(torch.device("cpu"))
    assert delta is not None
    with torch.no_grad():
        torch.testing.assert_close(layer.norm(), torch.linalg.vector_norm(delta))
        before = layer.norm()
        layer.shrink(torch.tensor(0.25))
        torch.testing.assert_close(layer.norm(), before / 4)


@pytest.mark.parametrize(
    ("size", "factor", "wanted"),
    [
        # as LyCORIS documents them
        *[(127, -1, (1, 127)), (250, -1, (10, 25)), (512, -1, (16, 32)), (1024, -1, (32, 32))],
        *[(128, 2, (2, 64)), (250, 4, (2, 125)), (1024, 16, (16, 64)), (12, 6, (2, 6))],
    ],
)
def test_a_size_is_split(size: int, factor: int, wanted: tuple[int, int]) -> None:
    assert split_size(size, factor) == wanted


def test_large_ranks_keep_matrices_whole() -> None:
    assert lokr_shapes((512, 512), 15) == {"lokr_w1": (16, 16), "lokr_w2_a": (32, 15), "lokr_w2_b": (15, 32)}
    assert lokr_shapes((512, 512), 16) == {"lokr_w1": (16, 16), "lokr_w2": (32, 32)}
    assert lokr_shapes((512, 512), 7, decompose_both=True).keys() >= {"lokr_w1_a", "lokr_w1_b"}


@pytest.mark.parametrize("kind", NETWORKS)
def test_what_was_trained_is_what_generation_adds(tmp_path: Path, kind: str) -> None:
    write_caches(tmp_path)
    tensors = train_toy(tmp_path, *NETWORKS[kind], "--network_alpha", 0.5, "--max_train_steps", 3)
    path = tmp_path / "output" / "x.safetensors"
    patch = LoraPatch([WeightedLora(read_lora(path))])
    merged = ToyFamily().load_dit(Placement(CPU, patch=patch))
    patch.check()
    dit, module = ToyFamily().load_dit(Placement(CPU)), str(NETWORKS[kind][1])
    plain = dict(dit.named_parameters())["blocks.0.up.weight"].clone()
    network = lora_like(module.removeprefix("networks."), read_lora(path).tensors, dit)
    network.attach()
    assert network.load_weights(path) == []
    x = torch.randn(1, 2, 1, 4, 4), torch.tensor([500.0]), [torch.ones(1, 1)]

    with torch.no_grad():
        found, unchanged = dit(*x), ToyFamily().load_dit(Placement(CPU))(*x)
        torch.testing.assert_close(found, merged(*x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, unchanged)
    assert same(network.state_dict(), tensors)
    if kind == "dora":
        learned = tensors["lora_unet_blocks_0_up.dora_scale"]
        assert not torch.allclose(learned.flatten(), torch.linalg.vector_norm(plain, dim=1))
    with safe_open(path, "pt") as file:
        assert file.metadata()["ss_network_module"] == module


@pytest.mark.parametrize("kind", ["loha", "lokr", "dora"])
def test_a_run_resumes_and_continues_from_a_file(tmp_path: Path, kind: str) -> None:
    write_caches(tmp_path)
    precision = ["--mixed_precision", "bf16"]
    more = DROPPING if kind == "dora" else []
    default = [*NETWORKS[kind], *more, *precision, "--scale_weight_norms", "0.1"]
    expected = train_toy(tmp_path, *default)
    train_toy(tmp_path, *default, "--max_train_steps", 4, "--save_state")
    assert same(train_toy(tmp_path, *default, "--resume", "latest"), expected)
    path = tmp_path / "output" / "x.safetensors"

    still = [*precision, "--learning_rate", 0, "--max_train_steps", 1, "--network_weights", path]
    wanted = load_file(path)
    assert same(train_toy(tmp_path, *NETWORKS[kind], *still), wanted)
    assert same(train_toy(tmp_path, *NETWORKS[kind][:2], *still, "--dim_from_weights"), wanted)


@pytest.mark.parametrize(
    "given",
    [
        ["--network_module", "networks.lokr", "--network_args", "factor=x"],
        ["--network_module", "networks.lokr", "--network_args", "decompose_both=maybe"],
        ["--network_module", "networks.loha", "--network_args", "module_dropout=0.1"],
        ["--network_module", "networks.lokr", "--network_args", "loraplus_lr_ratio=4"],
        ["--network_module", "networks.loha", "--network_dim", 5000],
    ],
)
def test_settings_that_cannot_be_used_are_refused_by_name(tmp_path: Path, given: list[object]) -> None:
    write_caches(tmp_path)
    with pytest.raises(OptionError, match="--network_"):
        train_network(ToyFamily(), toy_options(tmp_path, *given))


@pytest.mark.parametrize(
    ("more", "words"),
    [([], "--dim_from_weights"), (["--dim_from_weights"], "another kind of network")],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, more: list[object], words: str) -> None:
    write_caches(tmp_path)
    train_toy(tmp_path, "--max_train_steps", 1)
    weights = ["--network_weights", tmp_path / "output" / "x.safetensors", *more]

    with pytest.raises(CheckpointError, match=words):
        train_network(ToyFamily(), toy_options(tmp_path, *NETWORKS["lokr"], *weights))


STRENGTH = 0.7
RANK = 2


def random(*shape: int, seed: int) -> Tensor:
    return 0.05 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def distilled(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A LoRA as LightX2V extracts it, for every parameter, and what it adds to each in float32."""
    written: dict[str, Tensor] = {}
    deltas: dict[str, Tensor] = {}
    for seed, (name, weight) in enumerate(state.items()):
        path, _, leaf = name.rpartition(".")
        start = f"diffusion_model.{path}"
        if leaf == "weight" and weight.ndim == 2 and "head" not in name:
            down, up = random(RANK, weight.shape[1], seed=seed), random(len(weight), RANK, seed=seed + 1000)
            written |= {f"{start}.lora_down.weight": down, f"{start}.lora_up.weight": up}
            deltas[name] = up @ down
        else:
            kind = {"weight": "diff", "bias": "diff_b", "modulation": "diff_m"}[leaf]
            written[f"{start}.{kind}"] = deltas[name] = random(*weight.shape, seed=seed)
    return written, deltas


class Case:
    """A tiny Wan on disk, a LoRA for all of it, and the sum of both."""

    def __init__(self, folder: Path, kind: str = "t2v", dialect: str = "safetensors") -> None:
        self.state = tiny_state(kind)
        self.model = write_dit(folder / "model", self.state, dialect)
        written, self.deltas = distilled(self.state)
        self.path = folder / "lora.safetensors"
        save_file(written, self.path)
        self.use = WeightedLora(read_lora(self.path), STRENGTH)
        self.merged = {name: tensor + STRENGTH * self.deltas[name] for name, tensor in self.state.items()}

    def assert_merged(self, found: dict[str, Tensor]) -> None:
        for name, wanted in self.merged.items():
            # one rounding of float32 apart: the strength is multiplied in at another place
            torch.testing.assert_close(found[name].float(), wanted, rtol=1e-6, atol=1e-6, msg=name)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


@pytest.mark.parametrize("modulation", ["diff_m", "modulation.diff"])
def test_loading_adds_every_difference(case: Case, modulation: str, caplog: pytest.LogCaptureFixture) -> None:
    written = {name.replace("diff_m", modulation): tensor for name, tensor in load_file(case.path).items()}
    save_file(written, case.path)
    patch = LoraPatch([WeightedLora(read_lora(case.path), STRENGTH)], model=case.model)

    dit = load_dit(case.model, Placement(CPU, patch=patch))
    patch.check()

    case.assert_merged(dit.state_dict())
    assert unused(patch) == []
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@torch.no_grad()
def test_a_lora_for_samples_adds_every_difference_and_leaves_nothing(tmp_path: Path, case: Case) -> None:
    dit = tiny_dit(tmp_path / "other")
    plain, given = dit(**inputs(dit)), inputs(dit)
    added = add_loras(dit, [WeightedLora(case.use.lora, STRENGTH)])

    with added.switched_on(CPU, torch.float32):
        found = dit(**given)
    again = dit(**given)

    dit.load_state_dict(case.merged)
    torch.testing.assert_close(found, dit(**given), rtol=1e-5, atol=1e-5)  # x W + x A B, not x (W + A B)
    assert torch.equal(again, plain)
    assert float((found - plain).abs().max()) > 0.1


@pytest.mark.parametrize("target", ["default", "other"])
def test_conversion_keeps_every_difference(tmp_path: Path, case: Case, target: str) -> None:
    convert_file(case.path, tmp_path / "once.safetensors", target)
    convert_file(tmp_path / "once.safetensors", tmp_path / "twice.safetensors", "other")

    for name in ("once", "twice"):
        patch = LoraPatch([WeightedLora(read_lora(tmp_path / f"{name}.safetensors"), STRENGTH)])
        case.assert_merged({each: patch(each, weight) for each, weight in case.state.items()})
        assert unused(patch) == []
    # the one name for it that ComfyUI reads
    assert "diffusion_model.blocks.0.modulation.diff" in load_file(tmp_path / "twice.safetensors")


def test_a_difference_of_the_first_layer_for_other_channels_is_left_out(
    tmp_path: Path, case: Case, caplog: pytest.LogCaptureFixture
) -> None:
    """LoRAs of text-to-video models are used on image-to-video models, which take more channels."""
    state = tiny_state("i2v")
    patch = LoraPatch([case.use])

    merged = {name: patch(name, weight) for name, weight in state.items()}
    patch.check()

    assert torch.equal(merged["patch_embedding.weight"], state["patch_embedding.weight"])
    assert not torch.equal(merged["patch_embedding.bias"], state["patch_embedding.bias"])
    assert "its first layer takes 16 channels, the model's 36; the rest is used without it" in caplog.text
    assert "ONLY IN PART" not in caplog.text
    caplog.clear()
    dit = tiny_dit(tmp_path / "i2v", "i2v")
    with add_loras(dit, [WeightedLora(case.use.lora, 1.0)]).switched_on(CPU, torch.float32):
        dit(**inputs(dit))
    assert "its first layer takes 16 channels, the model's 36; the rest is used without it" in caplog.text


def test_image_attention_that_a_model_lacks_is_told_as_such(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """LightX2V's files for Wan2.2 I2V have what only Wan2.1 I2V has: k_img, v_img, img_emb."""
    case = Case(tmp_path, "i2v")
    patch, dit = LoraPatch([case.use]), tiny_dit(tmp_path / "t2v")
    for name, weight in tiny_state("t2v", in_dim=36).items():
        patch(name, weight)

    patch.check()
    add_loras(dit, [WeightedLora(case.use.lora, 1.0)])

    assert caplog.text.count("the attention to images of Wan2.1's image-to-video models; the rest") == 2
    assert "lora_unet_blocks_0_cross_attn_k_img" in caplog.text
    assert "ONLY IN PART" not in caplog.text


@pytest.mark.parametrize("through", ["its own reader", "--target diffusers"])
def test_diffusers_makes_the_same_of_it(tmp_path: Path, case: Case, through: str) -> None:
    """As far as diffusers has a form: factors and biases of the blocks, and the last layer as a whole."""
    kept = {
        name: tensor
        for name, tensor in load_file(case.path).items()
        if "head.head" in name or (".blocks." in name and "norm" not in name and "diff_m" not in name)
    }
    save_file(kept, case.path)
    dit, path = tiny_dit(tmp_path / "again"), case.path
    if through == "--target diffusers":
        path = tmp_path / "converted.safetensors"
        convert_file(case.path, path, "diffusers")
        assert all(name.startswith("transformer.") for name in load_file(path))
    other = in_diffusers(dit.config, dit.state_dict())

    load_there(other, path)

    patch = LoraPatch([WeightedLora(read_lora(case.path))])
    merged = {name: patch(name, weight) for name, weight in dit.state_dict().items()}
    found = run_there(other, dit)
    dit.load_state_dict(merged)
    assert unused(patch) == []
    torch.testing.assert_close(found, dit(**inputs(dit)), **TOLERANCE)

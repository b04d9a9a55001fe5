"""LoHas, LoKrs and DoRAs of other programs on joined queries, keys and values, in every family."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from modules.errors import CheckpointError
from networks.apply import LoraPatch
from networks.convert import convert_file
from networks.gated_loras import add_loras
from networks.loading import WeightedLora, read_lora
from tests.tiny.dits import dit_called
from tests.tiny.loras import unused

Factors = dict[str, Tensor]


def lokr(rows: int, columns: int, draw: Callable[..., Tensor]) -> tuple[Factors, Tensor]:
    """4 x 4 blocks: the rows of q, k and v do not lie between them."""
    first, second = draw(4, 4), draw(rows // 4, columns // 4)
    return {"lokr_w1": first, "lokr_w2": second, "alpha": torch.tensor(1.0)}, torch.kron(first, second)


def low_lokr(rows: int, columns: int, draw: Callable[..., Tensor]) -> tuple[Factors, Tensor]:
    first, down, up = draw(4, 4), draw(2, columns // 4), draw(rows // 4, 2)
    factors = {"lokr_w1": first, "lokr_w2_a": up, "lokr_w2_b": down, "alpha": torch.tensor(1.0)}
    return factors, 0.5 * torch.kron(first, up @ down)


def loha(rows: int, columns: int, draw: Callable[..., Tensor]) -> tuple[Factors, Tensor]:
    names = [(f"hada_w{n}_a", f"hada_w{n}_b") for n in "12"]
    factors = {name: one for a, b in names for name, one in ((a, draw(rows, 2)), (b, draw(2, columns)))}
    change = (factors["hada_w1_a"] @ factors["hada_w1_b"]) * (factors["hada_w2_a"] @ factors["hada_w2_b"])
    return {**factors, "alpha": torch.tensor(1.0)}, 0.5 * change


def lora(rows: int, columns: int, draw: Callable[..., Tensor]) -> tuple[Factors, Tensor]:
    down, up = draw(2, columns), draw(rows, 2)
    return {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(1.0)}, 0.5 * up @ down


KINDS = {"LoKr": lokr, "low-rank LoKr": low_lokr, "LoHa": loha, "LoRA": lora}


@dataclass(frozen=True)
class Joined:
    """A layer that diffusers or LyCORIS joins, {n}: its block, and the weights that it is in our model."""

    family: str  # of tests/tiny/dits.py
    layer: str
    weights: tuple[str, ...]
    is_split: bool = True  # our model has the parts as weights of their own


def each(start: str, names: str) -> tuple[str, ...]:
    return tuple(start + name for name in names.split())


QKV = "transformer_blocks.{n}.attn.to_qkv"  # in diffusers
LAYERS = (
    Joined(
        "krea2",
        "text_fusion.layerwise_blocks.{n}.attn.to_qkv",
        each("txtfusion.layerwise_blocks.{n}.attn.", "wq wk wv"),
    ),
    Joined("krea2", QKV, each("blocks.{n}.attn.", "wq wk wv")),
    Joined("qwen_image", QKV, each("transformer_blocks.{n}.attn.to_", "q k v")),
    Joined(
        "qwen_image",
        "transformer_blocks.{n}.attn.to_added_qkv",
        each("transformer_blocks.{n}.attn.add_", "q_proj k_proj v_proj"),
    ),
    Joined("wan t2v", "blocks.{n}.attn1.to_qkv", each("blocks.{n}.self_attn.", "q k v")),
    Joined("wan t2v", "blocks.{n}.attn2.to_kv", each("blocks.{n}.cross_attn.", "k v")),
    Joined(
        "ltx_2 2.0", "transformer_blocks.{n}.attn1.to_qkv", each("transformer_blocks.{n}.attn1.to_", "q k v")
    ),
    Joined("z_image", "layers.{n}.attention.to_qkv", each("layers.{n}.attention.to_", "q k v")),
    Joined("z_image", "layers.{n}.attention.qkv", each("layers.{n}.attention.to_", "q k v")),
    Joined("framepack", QKV, each("transformer_blocks.{n}.attn.to_", "q k v")),
    *(
        Joined("flux_3", f"{theirs}.{{n}}.attn.to_qkv", each(f"{ours}.{{n}}.", "q_proj k_proj v_proj"))
        for theirs, ours in (
            ("single_transformer_blocks", "single_blocks"),
            ("mode_blocks.image_cond", "content_mode_blocks.image_cond"),
        )
    ),
    Joined("flux_2", QKV, ("double_blocks.{n}.img_attn.qkv",), is_split=False),
    Joined(
        "flux_2",
        "transformer_blocks.{n}.attn.to_added_qkv",
        ("double_blocks.{n}.txt_attn.qkv",),
        is_split=False,
    ),
    Joined("flux dev", QKV, ("double_blocks.{n}.img_attn.qkv",), is_split=False),
    Joined("hunyuan t2v", QKV, ("double_blocks.{n}.img_attn_qkv",), is_split=False),
    Joined("lumina", "layers.{n}.attn.to_qkv", ("layers.{n}.attention.qkv",), is_split=False),
)
SPLIT = [one for one in LAYERS if one.is_split]
FULL = [one for one in LAYERS if not one.is_split]


def write(
    path: Path, joined: Joined, state: Mapping[str, Tensor], kind: str, axis: int | None, dots: bool
) -> dict[str, Tensor]:
    """Write a file for two blocks; return what it changes the model's weights to.

    axis: of a DoRA's norms, over the joined weight; None: no DoRA. dots: names as in diffusers.
    """
    generator, tensors, expected = torch.Generator().manual_seed(4), dict[str, Tensor](), dict(state)

    def draw(*shape: int) -> Tensor:
        return 0.2 * torch.randn(shape, generator=generator)

    for block in range(2):
        names = [f"{name.format(n=block)}.weight" for name in joined.weights]
        weight = torch.cat([state[name] for name in names])
        factors, change = KINDS[kind](*weight.shape, draw)
        changed = weight + change
        if axis is not None:
            factors["dora_scale"] = 1.2 * weight.norm(dim=axis, keepdim=True)
            changed = changed * factors["dora_scale"] / changed.norm(dim=axis, keepdim=True)
        module = joined.layer.format(n=block)
        module = f"transformer.{module}" if dots else f"lycoris_{module.replace('.', '_')}"
        tensors |= {f"{module}.{name}": one.contiguous() for name, one in factors.items()}
        split_sizes = [len(state[name]) for name in names]
        expected |= dict(zip(names, changed.split(split_sizes), strict=True))
    save_file(tensors, path)
    return expected


def assert_changed(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-5, msg=name)


def merged(path: Path, dit: nn.Module) -> dict[str, Tensor]:
    patch = LoraPatch([WeightedLora(read_lora(path))])
    found = {name: patch(name, weight) for name, weight in dit.state_dict().items()}
    patch.check()
    assert unused(patch) == []
    return found


CASES = [
    *((one, kind, None, dots) for one in LAYERS for kind in ("LoKr", "LoHa") for dots in (False, True)),
    *((one, kind, 1, dots) for one in LAYERS for kind in ("LoKr", "LoHa") for dots in (False, True)),
    *((one, "low-rank LoKr", None, False) for one in LAYERS),
    *((one, "LoRA", 1, True) for one in LAYERS),
    *((one, kind, 0, False) for one in FULL for kind in KINDS),
]


@pytest.mark.parametrize(("joined", "kind", "axis", "dots"), CASES)
@torch.no_grad()
def test_the_change_of_a_joined_layer_is_cut_by_rows_or_taken_whole(
    tmp_path: Path, joined: Joined, kind: str, axis: int | None, dots: bool, caplog: pytest.LogCaptureFixture
) -> None:
    dit = dit_called(joined.family).make(2)
    expected = write(tmp_path / "x.safetensors", joined, dit.state_dict(), kind, axis, dots)

    assert_changed(merged(tmp_path / "x.safetensors", dit), expected)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("joined", SPLIT[::3])
def test_norms_of_the_whole_layer_are_refused_where_the_model_has_its_parts(
    tmp_path: Path, joined: Joined, kind: str
) -> None:
    dit = dit_called(joined.family).make(2)
    write(tmp_path / "x.safetensors", joined, dit.state_dict(), kind, 0, dots=False)

    with pytest.raises(
        CheckpointError, match="magnitudes by input refer to the whole weight, but the model has only parts"
    ):
        merged(tmp_path / "x.safetensors", dit)


@pytest.mark.parametrize("kind", ["LoKr", "LoHa"])
@pytest.mark.parametrize("joined", [SPLIT[0], SPLIT[2], SPLIT[8], *FULL])
@torch.no_grad()
def test_added_round_the_layers_it_acts_as_merged(tmp_path: Path, joined: Joined, kind: str) -> None:
    tiny = dit_called(joined.family)
    dit, changed = tiny.make(2), tiny.make(2)
    expected = write(tmp_path / "x.safetensors", joined, dit.state_dict(), kind, None, dots=False)
    changed.load_state_dict(expected)
    given = tiny.inputs((1, 4, 4, 5), 1)
    plain = first(dit(**given))

    with add_loras(dit, [WeightedLora(read_lora(tmp_path / "x.safetensors"))]).switched_on(
        torch.device("cpu"), torch.float32
    ):
        found = first(dit(**given))

    torch.testing.assert_close(found, first(changed(**given)), rtol=1e-3, atol=1e-4)
    assert (found - plain).abs().max() > 1e-3


def first(out: Tensor | Sequence[Tensor]) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]


@pytest.mark.parametrize("target", ["default", "other", "diffusers"])
@pytest.mark.parametrize("kind", ["LoKr", "LoHa"])
@pytest.mark.parametrize("joined", [SPLIT[0], SPLIT[2], FULL[0]])
@torch.no_grad()
def test_converted_it_is_the_same_change_in_form_that_tools_know(
    tmp_path: Path, joined: Joined, kind: str, target: str
) -> None:
    dit = dit_called(joined.family).make(2)
    expected = write(tmp_path / "x.safetensors", joined, dit.state_dict(), kind, None, dots=False)
    is_lost = target == "diffusers" and kind == "LoHa"
    if is_lost:
        with pytest.raises(CheckpointError, match="--bake RANK makes plain LoRAs of them"):
            convert_file(tmp_path / "x.safetensors", tmp_path / "there.safetensors", target, joined.family)
        return

    convert_file(tmp_path / "x.safetensors", tmp_path / "there.safetensors", target, joined.family)

    tensors = load_file(tmp_path / "there.safetensors")
    assert not [name for name in tensors if "rows" in name]
    assert any("lokr" in name for name in tensors) == (kind == "LoKr" and not joined.is_split)
    assert_changed(merged(tmp_path / "there.safetensors", dit), expected)


@pytest.mark.parametrize("part", ["dora_scale", "lora_up.bias", "diff_b"])
def test_parts_joined_for_comfyui_come_back_with_magnitudes_and_biases(tmp_path: Path, part: str) -> None:
    random = torch.Generator().manual_seed(0)
    shapes = {
        "lora_down.weight": (2, 8),
        "lora_up.weight": (8, 2),
        part: (8, 1) if part == "dora_scale" else (8,),
    }
    tensors = {
        f"lora_unet_layers_0_attention_to_{letter}.{name}": torch.randn(shape, generator=random)
        for letter in "qkv"
        for name, shape in shapes.items()
    }
    save_file(tensors, tmp_path / "x.safetensors")

    convert_file(tmp_path / "x.safetensors", tmp_path / "joined.safetensors", "other", "fibo_2")
    convert_file(tmp_path / "joined.safetensors", tmp_path / "back.safetensors", "default", "fibo_2")

    back = load_file(tmp_path / "back.safetensors")
    read = "diff_b" if part == "lora_up.bias" else part
    for letter in "qkv":
        name = f"lora_unet_layers_0_attention_to_{letter}"
        assert torch.equal(back[f"{name}.{read}"], tensors[f"{name}.{part}"])
        change = tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"]
        torch.testing.assert_close(back[f"{name}.lora_up.weight"] @ back[f"{name}.lora_down.weight"], change)


def test_a_lokr_of_a_joined_layer_changes_the_biases_of_a_model_that_has_the_parts(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    factors, change = lokr(24, 16, lambda *shape: torch.randn(shape, generator=random))
    factors["diff_b"] = torch.randn(24, generator=random)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    save_file({f"{name}.{key}": factor for key, factor in factors.items()}, tmp_path / "x.safetensors")
    lora = read_lora(tmp_path / "x.safetensors", family="flux")
    parts = [f"transformer_blocks.0.attn.to_{letter}" for letter in "qkv"]
    weights = {f"{part}.weight": torch.zeros(8, 16) for part in parts}
    biases = {f"{part}.bias": torch.zeros(8) for part in parts}

    patch = LoraPatch([WeightedLora(lora, 0.5)], [*weights, *biases], family="flux")

    torch.testing.assert_close(torch.cat([patch(name, old) for name, old in weights.items()]), 0.5 * change)
    bias = torch.cat([patch(name, old) for name, old in biases.items()])
    torch.testing.assert_close(bias, 0.5 * factors["diff_b"])


@pytest.mark.parametrize("rows", [[0, 1, 2], [-3, -1], [0, 4]])
def test_rows_that_a_file_states_are_not_read(tmp_path: Path, rows: list[int]) -> None:
    name = "lora_unet_blocks_0_self_attn_q"
    factors = {f"{name}.lora_down.weight": torch.ones(2, 8), f"{name}.lora_up.weight": torch.ones(8, 2)}
    save_file({**factors, f"{name}.reelsmith_rows": torch.tensor(rows)}, tmp_path / "x.safetensors")

    lora = read_lora(tmp_path / "x.safetensors", family="wan")

    assert lora.tensors.keys() == factors.keys()


@pytest.mark.parametrize(
    ("part", "shape"),
    [("diff_b", ()), ("diff_b", (24,)), ("hada_w2_a", (12, 2)), ("dora_scale", ()), ("dora_scale", (24, 1))],
)
def test_factors_that_do_not_fit_the_joined_layer_are_one_message(
    tmp_path: Path, part: str, shape: tuple[int, ...]
) -> None:
    factors = {f"hada_w{n}_a": torch.ones(384, 2) for n in "12"}
    factors |= {f"hada_w{n}_b": torch.ones(2, 128) for n in "12"}
    factors[part] = torch.ones(shape)
    save_file(
        {f"blocks.0.attn1.to_qkv.{name}": one for name, one in factors.items()}, tmp_path / "x.safetensors"
    )

    with pytest.raises(CheckpointError, match=r"x.safetensors"):
        merged(tmp_path / "x.safetensors", dit_called("wan t2v").make(1))

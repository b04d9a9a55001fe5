"""What factors of all forms add to a weight, against sums written out, and while a layer computes."""

import functools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as functional
from safetensors.torch import save_file
from torch import Tensor, nn

from networks.delta import read_delta
from networks.gated_loras import ChangedParameter, LoraBranch, LoraWrapper
from networks.module_factors import compute_scaling
from tests.commands import ROOT, run_python
from tests.stable_diffusion.loaded import RANK, Factors, low_rank, random

CPU = torch.device("cpu")


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


DOWN, UP = drawn(3, 5), drawn(7, 3)
CONV_DOWN, CONV_UP, CORE = drawn(3, 5, 1, 1), drawn(7, 3, 1, 1), drawn(3, 3, 2, 2)
A1, B1, A2, B2 = drawn(7, 3), drawn(3, 5), drawn(7, 3) + 1, drawn(3, 5) - 1
W1, W2, A, B, CORE_OF_6 = drawn(2, 3), drawn(4, 5), drawn(4, 6), drawn(6, 5), drawn(6, 6, 2, 2)


def rebuilt(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The kernel of a core between two matrices of `rank` rows."""
    return torch.einsum("pqkl,po,qi->oikl", core, a, b)


FORMULAS: dict[str, tuple[dict[str, Tensor], Tensor]] = {
    "LoRA: up times down times alpha over rank": (
        {"lora_down.weight": DOWN, "lora_up.weight": UP, "alpha": torch.tensor(1.5)},
        0.5 * UP @ DOWN,
    ),
    "LoRA of a convolution keeps the kernel": (
        {"lora_down.weight": drawn(3, 5, 2, 2), "lora_up.weight": CONV_UP},
        torch.einsum("or,rikl->oikl", CONV_UP[:, :, 0, 0], drawn(3, 5, 2, 2)),
    ),
    "LoRA with a core in the middle": (
        {"lora_down.weight": CONV_DOWN, "lora_mid.weight": CORE, "lora_up.weight": CONV_UP},
        torch.einsum("or,rskl,si->oikl", CONV_UP[:, :, 0, 0], CORE, CONV_DOWN[:, :, 0, 0]),
    ),
    "LoHa: the product of two LoRAs": (
        {"hada_w1_a": A1, "hada_w1_b": B1, "hada_w2_a": A2, "hada_w2_b": B2, "alpha": torch.tensor(6.0)},
        2 * (A1 @ B1) * (A2 @ B2),
    ),
    "LoHa of a convolution with cores": (
        {"hada_w1_a": A1.T, "hada_w1_b": B1, "hada_w2_a": A2.T, "hada_w2_b": B2}
        | {"hada_t1": CORE, "hada_t2": CORE + 1},
        rebuilt(CORE, A1.T, B1) * rebuilt(CORE + 1, A2.T, B2),
    ),
    "LoKr stored whole is not scaled": (
        {"lokr_w1": W1, "lokr_w2": W2, "alpha": torch.tensor(8.0)},
        torch.kron(W1, W2),
    ),
    "LoKr with factors is scaled by their rank": (
        {"lokr_w1": W1, "lokr_w2_a": A, "lokr_w2_b": B, "alpha": torch.tensor(3.0)},
        0.5 * torch.kron(W1, A @ B),
    ),
    "LoKr of a convolution with a core": (
        {"lokr_w1": W1, "lokr_w2_a": A.T, "lokr_w2_b": B, "lokr_t2": CORE_OF_6},
        torch.kron(W1[:, :, None, None], rebuilt(CORE_OF_6, A.T, B).contiguous()),
    ),
    "whole difference": ({"diff": drawn(3, 4), "diff_b": drawn(3)}, drawn(3, 4)),
}


@pytest.mark.parametrize(("factors", "expected"), FORMULAS.values(), ids=list(FORMULAS))
def test_a_change_is_that_of_its_formula(factors: dict[str, Tensor], expected: Tensor) -> None:
    assert read_delta(factors).find_error() is None
    delta = read_delta(factors).compute_change(CPU)
    assert delta is not None
    torch.testing.assert_close(delta.reshape(expected.shape), expected, rtol=1e-5, atol=1e-5)
    shape = read_delta(factors).change_shape()
    assert shape == tuple(delta.shape)


@pytest.mark.parametrize("alpha", [{}, {"alpha": torch.tensor(0.0)}])
def test_missing_or_zero_alpha_means_the_rank(alpha: dict[str, Tensor]) -> None:
    assert compute_scaling({"lora_down.weight": drawn(3, 5), "lora_up.weight": drawn(7, 3), **alpha}) == 1.0


def test_a_difference_of_a_bias_is_the_change() -> None:
    delta = read_delta({"diff_b": drawn(3)}).compute_bias_change(CPU)
    assert delta is not None
    assert torch.equal(delta, drawn(3))


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (["lora_down.weight", "alpha"], "no lora_up.weight"),
        (["hada_w1_a", "hada_w1_b"], "no hada_w2_a"),
        (["lokr_w1"], "no lokr_w2"),
        (["alpha"], "only alpha"),
        (["lora_down.weight", "lora_up.weight", "dora_scale"], "its dora_scale has the shape [2, 2]"),
        (["dora_scale"], "only dora_scale"),
    ],
)
def test_incomplete_factors_are_explained(parts: list[str], words: str) -> None:
    reason = read_delta(dict.fromkeys(parts, torch.ones(2, 2))).find_error()
    assert reason is not None
    assert words in reason


@pytest.mark.parametrize(
    "wrong",
    [
        {"lora_down.weight": torch.ones(0, 5)},
        {"lora_up.weight": torch.ones(7)},
        {"alpha": torch.ones(2)},
        {"alpha": torch.tensor(torch.nan)},
    ],
)
def test_factors_that_are_no_matrices_are_explained(wrong: dict[str, Tensor]) -> None:
    reason = read_delta({"lora_down.weight": drawn(3, 5), "lora_up.weight": drawn(7, 3)} | wrong).find_error()
    assert reason is not None
    assert next(iter(wrong)) in reason


def of_other_shape(name: str, module: nn.Module) -> Factors:
    """Factors of a matrix for a 1x1 convolution, and the reverse."""
    f = low_rank(name, module)
    if module.weight.ndim == 4 and module.weight.shape[2] > 1:  # type: ignore[union-attr, operator, index]
        return f
    ones = [1, 1] if isinstance(module, nn.Linear) else []
    return f | {
        part: one.flatten(1).reshape(*one.shape[:2], *ones) for part, one in f.items() if part != "alpha"
    }


def shapes_of(form: str, out: int, channels: int, *kernel: int) -> dict[str, tuple[int, ...]]:
    """The factors of a form and their shapes."""
    rest = channels * math.prod(kernel)
    has_core = bool(kernel) and kernel[0] > 1
    match form:
        case "LoHa with cores" if has_core:
            parts = {"t{}": (RANK, RANK, *kernel), "w{}_a": (RANK, out), "w{}_b": (RANK, channels)}
        case "LoCon" if has_core:
            one = (1, 1)
            return {
                "lora_down.weight": (RANK, channels, *one),
                "lora_mid.weight": (RANK, RANK, *kernel),
                "lora_up.weight": (out, RANK, *one),
            }
        case "LoKr":
            return {"lokr_w1": (2, 2), "lokr_w2": (out // 2, channels // 2, *kernel)}
        case _:
            parts = {"w{}_a": (out, RANK), "w{}_b": (RANK, rest)}
    return {f"hada_{part.format(n)}": shape for n in "12" for part, shape in parts.items()}


def drawn_as(form: str, name: str, module: nn.Module) -> Factors:
    shapes = shapes_of(form, *module.weight.shape)  # type: ignore[misc]
    made = {part: random(*shape, seed=f"{name}{part}") for part, shape in shapes.items()}
    return made if form == "LoKr" else {**made, "alpha": torch.tensor(1.5)}


def dora(name: str, module: nn.Module) -> Factors:
    f = low_rank(name, module)
    norms = (module.weight.detach() + change_of(f, module)).flatten(1).norm(dim=1)  # type: ignore[operator]
    magnitudes = norms * (1 + random(len(norms), seed=f"{name}m"))
    return {**f, "dora_scale": magnitudes.reshape(-1, *[1] * (module.weight.ndim - 1))}  # type: ignore[operator]


def change_of(factors: Factors, module: nn.Module) -> Tensor:
    """What factors add to the weight of a module, by the formulas above."""
    weight = module.weight.detach()  # type: ignore[union-attr, operator]
    delta = read_delta(factors).compute_change(CPU)
    assert delta is not None
    delta = delta.reshape(weight.shape)
    if "dora_scale" not in factors:
        return delta
    norms = (weight + delta).flatten(1).norm(dim=1).reshape(factors["dora_scale"].shape)
    return factors["dora_scale"] * (weight + delta) / norms - weight


FORMS: dict[str, Callable[[str, nn.Module], Factors]] = {
    "LoRA": low_rank,
    "of another shape": of_other_shape,
    **{form: functools.partial(drawn_as, form) for form in ("LoHa", "LoHa with cores", "LoKr", "LoCon")},
    "DoRA": dora,
}
MODULES: dict[str, Callable[[], nn.Module]] = {
    "matrix": functools.partial(nn.Linear, 6, 8),
    "convolution": functools.partial(nn.Conv2d, 6, 8, 3, stride=2, padding=1),
    "convolution of 1": functools.partial(nn.Conv2d, 6, 8, 1, bias=False),
}


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))
@pytest.mark.parametrize("module", MODULES.values(), ids=list(MODULES))
def test_what_is_added_equals_a_changed_weight(
    module: Callable[[], nn.Module], form: Callable[[str, nn.Module], Factors]
) -> None:
    changed, wanted = module(), module()
    wanted.load_state_dict(changed.state_dict())
    place, x = ChangedParameter("x.weight", changed), random(2, 6, 5, 7, seed="x", scale=1)
    x = x.movedim(1, -1) if isinstance(changed, nn.Linear) else x
    parts = []
    weight = changed.weight.clone()  # type: ignore[operator]
    for name, multiplier in (("one", 0.5), ("two", -2.0), ("off", 0.0)):
        factors = form(name, changed)
        change = change_of(factors, changed)
        parts.append(LoraBranch(place, read_delta({**factors, "diff_b": random(8, seed=name)}), multiplier))
        weight += multiplier * change.reshape(weight.shape)
    layer = LoraWrapper(place, parts)
    layer.attach()
    wanted.weight.copy_(weight)  # type: ignore[operator]
    bias = 0.5 * random(8, seed="one") - 2 * random(8, seed="two")
    bias = bias if isinstance(changed, nn.Linear) else bias[:, None, None]
    plain = changed(x)

    layer.switch_on(CPU, torch.float32)
    torch.testing.assert_close(changed(x), wanted(x) + bias, rtol=1e-5, atol=1e-5)
    parts[1].apply_region = torch.zeros_like
    parts[1].multiplier, parts[2].multiplier = 0.7, 0.0
    alone = changed(x)
    parts[1].multiplier = 0.0
    assert torch.equal(alone, changed(x))
    layer.switch_off()
    assert torch.equal(changed(x), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(6,), (2, 5, 6)])
def test_products_are_added_in_place_and_rounded_once(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    module, x = nn.Linear(6, 8).to(dtype), random(*shape, seed="x", scale=1).to(dtype)
    place, names = ChangedParameter("x.weight", module), ("one", "two")
    factors = {name: low_rank(name, module) for name in names}
    plain = module(x)
    layer = LoraWrapper(place, [LoraBranch(place, read_delta(factors[name]), 0.5) for name in names])
    layer.attach()
    layer.switch_on(CPU, dtype)

    with torch.no_grad():
        found = module(x)

    expected = plain
    for name in names:
        down, up = (factors[name][f"lora_{which}.weight"] for which in ("down", "up"))
        hidden = functional.linear(x, down.to(dtype)) * 0.5
        change = hidden.float() @ (up * 2 / RANK).to(dtype).float().T
        expected = (expected.float() + change).to(dtype)
    torch.testing.assert_close(found, expected, rtol=1e-6 if dtype == torch.float32 else 0, atol=1e-6)
    assert torch.autograd.grad(module(x.requires_grad_()).sum(), x)[0].shape == shape


@torch.no_grad()
def test_what_more_than_a_product_is_added_is_not_left_out() -> None:
    module, x = nn.Linear(6, 8), random(2, 5, 6, seed="x", scale=1)
    place, plain, bias = ChangedParameter("x.weight", module), module(x), random(8, seed="bias")
    factors = low_rank("one", module)
    change = change_of(factors, module)
    parts = [
        LoraBranch(place, read_delta(factors), 0.5),
        LoraBranch(place, read_delta({**factors, "diff_b": bias}), 1.0),
    ]
    layer = LoraWrapper(place, parts)
    layer.attach()
    layer.switch_on(CPU, torch.float32)
    parts[0].apply_region = torch.zeros_like

    torch.testing.assert_close(module(x), plain + x @ change.T + bias, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_change_of_a_bias_alone_is_added() -> None:
    module, x, change = nn.Conv2d(6, 8, 3), random(2, 6, 5, 7, seed="x", scale=1), random(8, seed="bias")
    place, plain = ChangedParameter("x.weight", module), module(x)
    layer = LoraWrapper(place, [LoraBranch(place, read_delta({"diff_b": change}), 2.0)])
    layer.attach()
    layer.switch_on(CPU, torch.float32)

    torch.testing.assert_close(module(x), plain + 2 * change[:, None, None])


@torch.no_grad()
def test_what_is_added_to_a_norm_can_be_changed_too() -> None:
    norm, x = nn.LayerNorm(6), random(2, 6, seed="x", scale=1)
    plain = norm(x)
    place = ChangedParameter("norm.weight", norm)
    parts = [LoraBranch(place, read_delta({"diff": random(6, seed=name)})) for name in ("one", "two")]
    layer = LoraWrapper(place, parts)
    layer.attach()
    layer.switch_on(CPU, torch.float32)
    parts[0].apply_region = torch.zeros_like
    parts[1].apply_region = lambda added: added * 2

    wanted = plain + 2 * functional.layer_norm(x, (6,)) * random(6, seed="two")
    torch.testing.assert_close(norm(x), wanted)


@pytest.mark.parametrize(
    ("wrong", "parts"),
    [
        ({"lora_up.weight": (7, 3), "lora_down.weight": (4, 5)}, "up and down"),
        ({"lora_up.weight": (7, 3), "lora_down.weight": (3, 5), "lora_mid.weight": (3, 4, 3, 3)}, "a core"),
        (
            {"hada_w1_a": (6, 2), "hada_w1_b": (2, 5), "hada_w2_a": (6, 2), "hada_w2_b": (2, 4)},
            "two sizes",
        ),
        ({"hada_w1_a": (6, 2), "hada_w1_b": (3, 5), "hada_w2_a": (6, 2), "hada_w2_b": (2, 5)}, "one matrix"),
        ({"lokr_w1": (2, 2), "lokr_w2_a": (3, 2), "lokr_w2_b": (4, 3)}, "a product"),
        ({"lora_up.weight": (7, 3), "lora_down.weight": (3, 5), "diff": (7, 6)}, "two changes"),
    ],
)
def test_shapes_that_have_no_product_are_told_from_shapes_alone(
    wrong: dict[str, tuple[int, ...]], parts: str
) -> None:
    """On the meta device no product can be tried without torch's compiler, which takes seconds to load."""
    factors = {part: torch.ones(shape) for part, shape in wrong.items()}

    error = read_delta(factors).find_error()

    assert error is not None, parts
    assert error.startswith("its factors do not match each other")


def test_a_lora_is_read_and_fitted_without_torchs_compiler(tmp_path: Path) -> None:
    save_file(
        {"lora_unet_x.lora_down.weight": torch.ones(2, 5), "lora_unet_x.lora_up.weight": torch.ones(4, 2)},
        tmp_path / "lora.safetensors",
    )
    script = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from networks.apply import LoraPatch\n"
        "from networks.loading import read_weighted_loras\n"
        "uses = read_weighted_loras([(Path(sys.argv[1]), 0.5)])\n"
        "changed = LoraPatch(uses)('x.weight', torch.zeros(4, 5))\n"
        "print(changed.unique().item(), 'torch._dynamo' in sys.modules)\n"
    )
    done = run_python("-c", script, tmp_path / "lora.safetensors", folder=ROOT)

    assert done.stdout.split() == ["1.0", "False"]  # 0.5 times 2 ranks of 1 * 1

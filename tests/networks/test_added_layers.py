"""What LoRAs of all forms add to matrices and convolutions while they compute, against plain formulas."""

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from networks.added import AddedLayer, AddedPart, ChangedPlace

RANK = 3
Factors = dict[str, Tensor]


def random(*shape: int, seed: str, scale: float = 0.3) -> Tensor:
    generator = torch.Generator().manual_seed(sum(ord(letter) * (i + 1) for i, letter in enumerate(seed)))
    return torch.randn(*shape, generator=generator) * scale


def low_rank(name: str, module: nn.Module) -> Factors:
    out, *rest = module.weight.shape  # type: ignore[operator]
    ones = [1] * (len(rest) - 1)
    return {
        "lora_down.weight": random(RANK, *rest, seed=name),
        "lora_up.weight": random(out, RANK, *ones, seed=f"{name} up"),
        "alpha": torch.tensor(2.0),
    }


def lora(name: str, module: nn.Module) -> tuple[Factors, Tensor]:
    f = low_rank(name, module)
    return f, f["lora_up.weight"].flatten(1) @ f["lora_down.weight"].flatten(1) * 2 / RANK


def of_other_shape(name: str, module: nn.Module) -> tuple[Factors, Tensor]:
    """Factors of a matrix for a 1x1 convolution, and the reverse."""
    f, change = lora(name, module)
    if module.weight.ndim == 4 and module.weight.shape[2] > 1:  # type: ignore[union-attr, operator, index]
        return f, change
    ones = [1, 1] if isinstance(module, nn.Linear) else []
    parts = {
        part: one.flatten(1).reshape(*one.shape[:2], *ones) for part, one in f.items() if part != "alpha"
    }
    return {**f, **parts}, change


def loha(name: str, module: nn.Module) -> tuple[Factors, Tensor]:
    out, rest = module.weight.shape[0], module.weight[0].numel()  # type: ignore[index, union-attr]
    f = {
        "hada_w1_a": random(out, RANK, seed=f"{name}1a"),
        "hada_w1_b": random(RANK, rest, seed=f"{name}1b"),
        "hada_w2_a": random(out, RANK, seed=f"{name}2a"),
        "hada_w2_b": random(RANK, rest, seed=f"{name}2b"),
        "alpha": torch.tensor(1.5),
    }
    return f, (f["hada_w1_a"] @ f["hada_w1_b"]) * (f["hada_w2_a"] @ f["hada_w2_b"]) * 1.5 / RANK


def loha_with_cores(name: str, module: nn.Module) -> tuple[Factors, Tensor]:
    shape = module.weight.shape
    if len(shape) < 4 or shape[2] == 1:
        return loha(name, module)
    out, channels, *kernel = shape  # type: ignore[misc]
    f: Factors = {"alpha": torch.tensor(float(RANK))}
    halves = []
    for k in "12":
        f[f"hada_t{k}"] = random(RANK, RANK, *kernel, seed=f"{name}t{k}")
        f[f"hada_w{k}_a"] = random(RANK, out, seed=f"{name}{k}a")
        f[f"hada_w{k}_b"] = random(RANK, channels, seed=f"{name}{k}b")
        half = torch.einsum("ijkl,jr->irkl", f[f"hada_t{k}"], f[f"hada_w{k}_b"])
        halves.append(torch.einsum("irkl,io->orkl", half, f[f"hada_w{k}_a"]))
    return f, halves[0] * halves[1]


def lokr(name: str, module: nn.Module) -> tuple[Factors, Tensor]:
    out, channels, *kernel = module.weight.shape  # type: ignore[misc]
    f: Factors = {"lokr_w1": random(2, 2, seed=name)}
    f["lokr_w2"] = random(out // 2, channels // 2, *kernel, seed=f"{name}2")
    ones = [1] * len(kernel)
    return f, torch.kron(f["lokr_w1"].reshape(2, 2, *ones), f["lokr_w2"])


def locon_with_core(name: str, module: nn.Module) -> tuple[Factors, Tensor]:
    out, channels, *kernel = module.weight.shape  # type: ignore[misc]
    if not kernel or kernel[0] == 1:
        f = low_rank(name, module)
        return f, f["lora_up.weight"].flatten(1) @ f["lora_down.weight"].flatten(1) * 2 / RANK
    f = {
        "lora_down.weight": random(RANK, channels, 1, 1, seed=name),
        "lora_mid.weight": random(RANK, RANK, *kernel, seed=f"{name} mid"),
        "lora_up.weight": random(out, RANK, 1, 1, seed=f"{name} up"),
        "alpha": torch.tensor(2.0),
    }
    down, up = f["lora_down.weight"][:, :, 0, 0], f["lora_up.weight"][:, :, 0, 0]
    return f, torch.einsum("or,rskl,si->oikl", up, f["lora_mid.weight"], down) * 2 / RANK


def dora(name: str, module: nn.Module) -> tuple[Factors, Tensor]:
    weight = module.weight.detach()  # type: ignore[union-attr, operator]
    f = low_rank(name, module)
    whole = (
        weight
        + (f["lora_up.weight"].flatten(1) @ f["lora_down.weight"].flatten(1)).reshape(weight.shape) * 2 / RANK
    )
    norms = whole.flatten(1).norm(dim=1).reshape(-1, *[1] * (whole.ndim - 1))
    f["dora_scale"] = norms * (1 + random(len(norms), seed=f"{name}m").reshape(norms.shape))
    return f, f["dora_scale"] * whole / norms - weight


def whole(name: str, module: nn.Module) -> tuple[Factors, Tensor]:
    change = random(*module.weight.shape, seed=name, scale=0.02)  # type: ignore[misc]
    return {"diff": change}, change


FORMS = {
    "LoRA": lora,
    "of another shape": of_other_shape,
    "LoHa": loha,
    "LoHa with cores": loha_with_cores,
    "LoKr": lokr,
    "LoCon": locon_with_core,
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
    module: Callable[[], nn.Module], form: Callable[[str, nn.Module], tuple[Factors, Tensor]]
) -> None:
    changed, wanted = module(), module()
    wanted.load_state_dict(changed.state_dict())
    place, x = ChangedPlace("x.weight", changed), random(2, 6, 5, 7, seed="x", scale=1)
    x = x.movedim(1, -1) if isinstance(changed, nn.Linear) else x
    parts = []
    weight = changed.weight.clone()  # type: ignore[operator]
    for name, multiplier in (("one", 0.5), ("two", -2.0), ("off", 0.0)):
        factors, change = form(name, changed)
        parts.append(AddedPart(place, {**factors, "diff_b": random(8, seed=name)}, multiplier))
        weight += multiplier * change.reshape(weight.shape)
    layer = AddedLayer(place, parts)
    layer.attach()
    wanted.weight.copy_(weight)  # type: ignore[operator]
    bias = 0.5 * random(8, seed="one") - 2 * random(8, seed="two")
    bias = bias if isinstance(changed, nn.Linear) else bias[:, None, None]
    plain = changed(x)

    layer.switch_on(torch.device("cpu"), torch.float32)
    torch.testing.assert_close(changed(x), wanted(x) + bias, rtol=1e-5, atol=1e-5)
    parts[1].region = torch.zeros_like
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
    place, names = ChangedPlace("x.weight", module), ("one", "two")
    factors = {name: low_rank(name, module) for name in names}
    plain = module(x)
    layer = AddedLayer(place, [AddedPart(place, factors[name], 0.5) for name in names])
    layer.attach()
    layer.switch_on(torch.device("cpu"), dtype)

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
    place, plain, bias = ChangedPlace("x.weight", module), module(x), random(8, seed="bias")
    factors, change = lora("one", module)
    parts = [AddedPart(place, factors, 0.5), AddedPart(place, {**factors, "diff_b": bias}, 1.0)]
    layer = AddedLayer(place, parts)
    layer.attach()
    layer.switch_on(torch.device("cpu"), torch.float32)
    parts[0].region = torch.zeros_like

    torch.testing.assert_close(module(x), plain + x @ change.T + bias, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_change_of_a_bias_alone_is_added() -> None:
    module, x = nn.Conv2d(6, 8, 3, padding=1), random(2, 6, 5, 7, seed="x", scale=1)
    plain, change = module(x), random(8, seed="bias")
    layer = AddedLayer(
        ChangedPlace("x.weight", module),
        [AddedPart(ChangedPlace("x.weight", module), {"diff_b": change}, 2.0)],
    )
    layer.attach()
    layer.switch_on(torch.device("cpu"), torch.float32)

    torch.testing.assert_close(module(x), plain + 2 * change[:, None, None])


@torch.no_grad()
def test_what_is_added_to_a_norm_can_be_changed_too() -> None:
    norm, x = nn.LayerNorm(6), random(2, 6, seed="x", scale=1)
    plain = norm(x)
    place = ChangedPlace("norm.weight", norm)
    parts = [AddedPart(place, {"diff": random(6, seed=name)}) for name in ("one", "two")]
    layer = AddedLayer(place, parts)
    layer.attach()
    layer.switch_on(torch.device("cpu"), torch.float32)
    parts[0].region = torch.zeros_like
    parts[1].region = lambda added: added * 2

    wanted = plain + 2 * functional.layer_norm(x, (6,)) * random(6, seed="two")
    torch.testing.assert_close(norm(x), wanted)

"""The loss has a closed form for a network that says a constant."""

from contextlib import nullcontext

import torch

from modules.contract.data import Batch
from tests.training.toy import LATENT, ToyFamily
from training.loss import NoisyBatch, squared_errors, training_loss


class Constant(torch.nn.Module):
    """Predicts the same velocity everywhere and remembers what it was fed."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = torch.nn.Parameter(torch.tensor(value))

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, text: list[torch.Tensor]) -> torch.Tensor:
        self.noisy, self.timesteps = noisy, timesteps
        return self.value.expand_as(noisy)


def noisy_batch(weights: tuple[float, float] = (1.0, 1.0)) -> NoisyBatch:
    latents = torch.stack([torch.full((2, 1, 2, 2), 4.0), torch.full((2, 1, 2, 2), 8.0)])
    batch = Batch(
        {"latents": latents, "letters": [torch.ones(1, 1), torch.ones(3, 1)]}, ("a", "b"), ("a", "b")
    )
    noise = torch.full_like(latents, 1.0)
    return NoisyBatch(
        batch, noise, torch.tensor([0.25, 0.5]), torch.tensor([251.0, 501.0]), torch.tensor(weights)
    )


def test_latents_are_scaled_then_mixed_with_noise() -> None:
    dit = Constant(0.0)

    squared_errors(ToyFamily(), dit, noisy_batch(), nullcontext)

    scaled = torch.tensor([4.0, 8.0]) * LATENT.scale
    torch.testing.assert_close(
        dit.noisy[:, 0, 0, 0, 0],
        0.75 * scaled * torch.tensor([1, 0])
        + 0.5 * scaled * torch.tensor([0, 1])
        + torch.tensor([0.25, 0.5]),
    )
    assert dit.timesteps.tolist() == [251.0, 501.0]


def test_each_sample_counts_its_squared_distance_from_noise_minus_latents() -> None:
    errors = squared_errors(ToyFamily(), Constant(0.5), noisy_batch(), nullcontext)

    assert errors.tolist() == [(0.5 - (1 - 2)) ** 2, (0.5 - (1 - 4)) ** 2]


def test_weights_multiply_the_losses_of_their_samples() -> None:
    loss = training_loss(ToyFamily(), Constant(0.5), noisy_batch((2.0, 0.5)), nullcontext)

    assert loss.item() == (2.0 * 1.5**2 + 0.5 * 3.5**2) / 2


def test_the_loss_is_float32_where_the_network_computes_in_bf16() -> None:
    errors = squared_errors(
        ToyFamily(dtype=torch.bfloat16), Constant(0.5).bfloat16(), noisy_batch(), nullcontext
    )

    assert errors.dtype == torch.float32


def test_moving_a_batch_moves_every_tensor_of_it() -> None:
    moved = noisy_batch().to(torch.device("meta"))

    tensors = [
        moved.noise,
        moved.sigmas,
        moved.timesteps,
        moved.weights,
        moved.batch.tensors["latents"],
        *moved.batch.tensors["letters"],
    ]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert len(moved.batch) == 2

"""The tiny Lumina-Image-2.0 in diffusers."""

from diffusers import Lumina2Transformer2DModel
from torch import Tensor

from tests.tiny.dit_files import frozen
from tests.tiny.lumina import CONFIG, diffusers_state


def in_diffusers(state: dict[str, Tensor], layers: int = CONFIG.num_layers) -> Lumina2Transformer2DModel:
    """The same network there; its time embedding is as wide as the model, and its feed-forward 4 times."""
    theirs = Lumina2Transformer2DModel(
        hidden_size=CONFIG.dim,
        num_layers=layers,
        num_refiner_layers=CONFIG.noise_refiner_layers,
        num_attention_heads=CONFIG.num_heads,
        num_kv_heads=CONFIG.num_kv_heads,
        multiple_of=CONFIG.ffn_dim,
        cap_feat_dim=CONFIG.text_dim,
        axes_dim_rope=(CONFIG.head_width // 3,) * 3,
    )
    return frozen(theirs, diffusers_state(state))

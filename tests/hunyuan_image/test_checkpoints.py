"""Files of the HunyuanImage transformer: every layout, the published one at full size, and others refused."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from hunyuan_image.checkpoints import load_dit, read_dit_header
from modules.checkpoints.opening import open_checkpoint
from modules.contract.loading import Placement
from modules.errors import CheckpointError
from modules.families import identify
from tests.hunyuan_image.making import tiny_inputs, tiny_model
from tests.manifests import tensor_list, write_hollow
from tests.tiny.hunyuan_dit import tiny_state as video_state
from tests.tiny.hunyuan_encoders import save
from tests.tiny.hunyuan_image import CONFIG, DIALECTS, tiny_state, write_dit

PLACE = Placement(torch.device("cpu"))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_layout_gives_the_same_network(dialect: str, tmp_path: Path) -> None:
    path = write_dit(tmp_path, tiny_state(), dialect)

    dit = load_dit(path, PLACE)

    assert dit.config == CONFIG
    with torch.no_grad():
        assert torch.equal(dit(**tiny_inputs()), tiny_model()(**tiny_inputs()))


def test_the_published_transformer_loads_at_full_size(tmp_path: Path) -> None:
    path = write_hollow(tmp_path / "hunyuanimage2.1.safetensors", tensor_list("hunyuanimage2.1-dit"))

    dit = load_dit(path, Placement(torch.device("meta")))

    config = dit.config
    assert (config.dim, config.num_heads, config.double_blocks, config.single_blocks) == (3584, 28, 20, 40)
    assert (config.in_dim, config.text_dim, config.glyph_dim) == (64, 3584, 1472)
    assert sum(each.numel() for each in dit.parameters()) == 17425795520
    assert dit.compute_dtype == torch.bfloat16
    assert identify(path) == "it is a HunyuanImage-2.1 transformer (--dit)"


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({**tiny_state(), "time_r_in.mlp.0.weight": torch.zeros(2)}, "distilled"),
        ({**tiny_state(), "guidance_in.mlp.0.weight": torch.zeros(2)}, "distilled"),
        (video_state(), "HunyuanVideo"),
        ({**tiny_state(), "img_in.proj.weight": torch.zeros(64, 64, 2, 2)}, "patches of 2 x 2"),
        (tiny_state(in_dim=16), "16 latent channels"),
        ({key: value for key, value in tiny_state().items() if "time_in" not in key}, "incomplete"),
    ],
    ids=["meanflow", "guidance", "video", "patches", "channels", "incomplete"],
)
def test_other_files_are_refused_by_name(state: dict[str, Tensor], says: str, tmp_path: Path) -> None:
    path = save(tmp_path / "dit.safetensors", state)

    with open_checkpoint(path) as checkpoint, pytest.raises(CheckpointError, match=says):
        read_dit_header(checkpoint)

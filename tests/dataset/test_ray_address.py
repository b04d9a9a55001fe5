"""Joining a cluster lets its other programs run code here, so no line of a file does it."""

import pytest

from dataset.options import RayOptions
from modules.errors import OptionError
from modules.installation import FROM_QUEUE, RUN_GOES_ON

COMMAND = ("wan_cache_latents.py", "--dataset_config", "data.toml", "--vae", "vae.safetensors")


@pytest.mark.parametrize("variable", [RUN_GOES_ON, FROM_QUEUE])
@pytest.mark.parametrize("address", ["ray://203.0.113.7:10001", "203.0.113.7:6379", "auto"])
def test_only_a_typed_command_joins_a_cluster(
    variable: str, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert RayOptions(address=address, command=COMMAND).address == address
    monkeypatch.setenv(variable, "1")
    RayOptions(command=COMMAND)
    with pytest.raises(OptionError, match="--address joins other programs"):
        RayOptions(address=address, command=COMMAND)

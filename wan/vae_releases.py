"""The released VAEs as data: the marks of their latents, and the numbers that normalise these."""

from dataclasses import dataclass


@dataclass(frozen=True)
class VaeRelease:
    """One generation of the VAE. Its dimensions are read from its file; these facts follow from them."""

    name: str
    models: str  # whose latents these are
    channels: int  # of the latents
    stride: tuple[int, int, int]  # pixels of a latent: frames, height, width
    mean: tuple[float, ...]  # of the latents, per channel
    std: tuple[float, ...]
    file: str  # in the folder of the official release
    others: str  # published files with the same tensors, for messages

    @property
    def about(self) -> str:
        """Describe it in words."""
        size = f"{self.channels} latent channels, {self.stride[1]}x{self.stride[2]} pixels each"
        return f"the {self.name} VAE (of {self.models}: {size})"

    @property
    def files(self) -> str:
        """The published files, to recommend one."""
        return f"{self.file}, {self.others}"


# fmt: off
WAN_2_1 = VaeRelease(
    "Wan2.1",
    "Wan2.1 and Wan2.2 A14B",
    16,
    (4, 8, 8),
    # released code, wan/modules/vae.py
    mean=(
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    ),
    std=(
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    ),
    file="Wan2.1_VAE.pth",
    others="wan_2.1_vae.safetensors or a diffusers vae folder",
)

WAN_2_2 = VaeRelease(
    "Wan2.2",
    "Wan2.2 TI2V-5B",
    48,
    (4, 16, 16),
    # released code, wan/modules/vae2_2.py
    mean=(
        -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813,
        0.0891, 0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108,
        -0.2158, 0.2502, -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313,
        -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944,
        0.3573, -0.0548, -0.1681, -0.0667,
    ),
    std=(
        0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
        0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
        0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
        0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
    ),
    file="Wan2.2_VAE.pth",
    others="wan2.2_vae.safetensors or the vae folder of Wan2.2-TI2V-5B-Diffusers",
)
# fmt: on

RELEASES = {release.channels: release for release in (WAN_2_1, WAN_2_2)}  # by the channels of their latents

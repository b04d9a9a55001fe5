"""Let networks take turns on a device: keep frozen weights in host memory, and copy them to run.

    host_weights = make_host_weights(..., device, all_weights=True)  # to load from disk to host memory
    dit = family.load_dit(Placement(device, host_weights=host_weights), expert)
    ...                                                   # LoRA, compilation, checkpointing, swap
    copy = HostCopy(dit, device, host_weights)            # call last; None: it was loaded to the device
    copy.to_device()
    copy.free_device_memory()                             # nothing is copied back

A parameter stays the same object; only its `.data` switches between the host's copy and the device's. Frozen
weights never change, so that leaving only frees memory. Trained parameters stay where they are. Swapped
weights stay in host memory, and the buffers of the swap are freed on leaving.
"""

from collections.abc import Mapping
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn

from protocols.loading import TensorInfo
from runtime.offload.block_swap import get_swap
from runtime.offload.host_memory import Transfer, allocate, transfer_to
from runtime.offload.swap_plan import HostWeights


class _HostPair(NamedTuple):
    """A weight or buffer of a network, and its copy in host memory."""

    tensor: Tensor
    host: Tensor


class HostCopy:
    """A host copy of a network's frozen weights and buffers, which are on the device only while it works.

    On a CPU nothing is copied, and moving in either direction does nothing.
    """

    def __init__(
        self,
        network: nn.Module,
        device: torch.device,
        host_weights: HostWeights | None = None,
        transfer: Transfer | None = None,
    ) -> None:
        """Move the frozen tensors of a network to host memory.

        Call it when the network is ready to run. The network may be on the host or on the device before, and
        is on the host afterwards. Tensors outside `host_weights` are copied to host memory one by one.

        Args:
            network: The network.
            device: Device on which the network works.
            host_weights: Host memory that the network was loaded with; None if there is none.
            transfer: Copies between host and device; by default the kind that suits the device.
        """
        self._network = network
        self._is_on_device = False
        self._pairs: list[_HostPair] = []
        if device.type == "cpu" and transfer is None:  # the network computes in host memory anyway
            self._transfer: Transfer | None = None
            return
        self._transfer = transfer or transfer_to(device)
        # The frozen weights and buffers by name, except those that block swap moves itself
        swap = get_swap(network)
        swapped = frozenset() if swap is None else swap.in_host_memory
        frozen_tensors = {
            name: tensor
            for name, tensor in chain(network.named_parameters(), network.named_buffers())
            if not tensor.requires_grad and tensor not in swapped
        }
        loaded_tensors = {} if host_weights is None else host_weights.tensors
        host_tensors = _find_loaded_on_host(frozen_tensors, loaded_tensors)
        other_tensors = {name: tensor for name, tensor in frozen_tensors.items() if name not in host_tensors}
        infos = {
            name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in other_tensors.items()
        }
        allocated = allocate(infos, device.type == "cuda").tensors
        for name, tensor in other_tensors.items():
            allocated[name].copy_(tensor.data)
            tensor.data = allocated[name]  # immediately, so that there is never a second copy of all weights
        for name, tensor in frozen_tensors.items():
            host = host_tensors[name] if name in host_tensors else allocated[name]
            self._pairs.append(_HostPair(tensor, host))
        self.free_device_memory()  # frees the slots of a block swap that has run

    @property
    def is_on_device(self) -> bool:
        """Whether the network is on the device; always true on a CPU."""
        return self._transfer is None or self._is_on_device

    @property
    def size_bytes(self) -> int:
        """Return the bytes `to_device` allocates, beyond the tensors that always stay on the device."""
        return sum(host.nbytes for _, host in self._pairs)

    def to_device(self) -> None:
        """Copy the weights to the device asynchronously; work that is queued later finds them there.

        If it is interrupted, the weights are on the host: call `to_device` again.
        """
        if self._transfer is None or self._is_on_device:
            return
        try:
            # samples are generated in inference mode, but training cannot use tensors created in it
            with torch.inference_mode(False), torch.no_grad():
                copies: list[tuple[Tensor, Tensor]] = []  # (target on the device, source on the host)
                for _, host in self._pairs:
                    memory = self._transfer.allocate(host.nbytes)
                    copies.append((memory.view(host.dtype).view(host.shape), host))
                if copies:
                    # the copies start only after `allocated`: in a deterministic run PyTorch fills new
                    # memory, and would otherwise overwrite copied weights
                    allocated = self._transfer.record_event()
                    self._transfer.wait(self._transfer.copy(copies, allocated))
            for pair, (on_device, _) in zip(self._pairs, copies, strict=True):
                pair.tensor.data = on_device
            self._is_on_device = True
        except BaseException:
            self.free_device_memory()
            raise

    def free_device_memory(self) -> None:
        """Point the weights at the host's copy, and free the device's memory. Nothing is copied.

        Queued work can still read the freed memory, because torch reuses it in stream order. If this call is
        interrupted, repeat it before anything else.
        """
        self._is_on_device = False
        swap = get_swap(self._network)
        if swap is not None:
            swap.free_slots()
        for tensor, host in self._pairs:
            tensor.data = host


def _find_loaded_on_host(
    tensors: Mapping[str, Tensor], host_tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the host memory of those tensors that are still in the memory they were loaded into."""
    on_host = {}
    for name, tensor in tensors.items():
        host = host_tensors.get(name)
        # a weight that was replaced after loading is no longer in this memory
        if host is not None and tensor.data_ptr() == host.data_ptr() and tensor.dtype == host.dtype:
            on_host[name] = host
    return on_host

"""Take turns on a device: frozen weights of a network stay in host memory and are copied there to work.

    place = swapped_weights(..., device, all_weights=True)  # to load from disk straight into host memory
    dit = family.load_dit(Placement(device, host=place), expert)
    ...                                                   # LoRA, compilation, checkpointing, swap
    copy = HostCopy(dit, device, place)                   # call last; None: it was loaded without a place
    copy.bring()                                          # on the device
    copy.leave()                                          # off it: nothing is copied back

A parameter stays the same object; only its `.data` switches between the host's copy and the device's. Frozen
weights never change, so that leaving only frees memory. Parameters that learn stay where they are. Swapped
weights stay in host memory, and the buffers of the swap are freed on leaving.
"""

from itertools import chain

import torch
from torch import Tensor, nn

from contract.loading import TensorInfo
from running.offload.block_swap import swap_of
from running.offload.host_memory import Transfer, allocate, transfer_to
from running.offload.swap_plan import HostWeights


class HostCopy:
    """The frozen weights and the buffers of one network in host memory, and on the device while it works.

    On a CPU nothing is copied and both moves do nothing.
    """

    def __init__(
        self,
        network: nn.Module,
        device: torch.device,
        place: HostWeights | None = None,
        transfer: Transfer | None = None,
    ) -> None:
        """Take over a network. Tensors outside `place` are copied to host memory first, one by one.

        Call it when the network is dressed: it may be on the host or on the device, and is on the host
        afterwards. device: where it works. transfer: None chooses one for the device.
        """
        self._network = network
        self._is_here = False
        # each with its memory on the host
        self._pairs: list[tuple[Tensor, Tensor]] = []
        if device.type == "cpu" and transfer is None:
            self._transfer: Transfer | None = None
            return
        self._transfer = transfer or transfer_to(device)
        swap = swap_of(network)
        swapped = frozenset() if swap is None else swap.in_host_memory
        moving = {
            name: tensor
            for name, tensor in chain(network.named_parameters(), network.named_buffers())
            if not tensor.requires_grad and tensor not in swapped
        }
        filled = {} if place is None else place.tensors
        on_host: dict[str, Tensor] = {}
        remaining: dict[str, TensorInfo] = {}
        for name, tensor in moving.items():
            host = filled.get(name)
            if host is not None and tensor.data_ptr() == host.data_ptr() and tensor.dtype == host.dtype:
                on_host[name] = host
            else:
                remaining[name] = TensorInfo(tensor.dtype, tuple(tensor.shape))
        new = allocate(remaining, device.type == "cuda").tensors
        for name, tensor in moving.items():
            host = on_host.get(name)
            if host is None:
                host = new[name]
                host.copy_(tensor.data)
                tensor.data = host  # one by one: no second copy of all
            self._pairs.append((tensor, host))
        self.leave()  # a swap that has run has memory there too

    @property
    def is_here(self) -> bool:
        """Whether the network is on the device; always true on a CPU."""
        return self._transfer is None or self._is_here

    @property
    def size_bytes(self) -> int:
        """Return the bytes that the network takes on its device in addition to those it always has there."""
        return sum(host.nbytes for _, host in self._pairs)

    def bring(self) -> None:
        """Copy the weights to the device without waiting: work that is queued later finds them there.

        If it is interrupted, the weights are on the host: call `bring` again.
        """
        if self._transfer is None or self._is_here:
            return
        try:
            with torch.inference_mode(False), torch.no_grad():
                views = [
                    self._transfer.memory(host.nbytes).view(host.dtype).view(host.shape)
                    for _, host in self._pairs
                ]
                if views:
                    pairs = [(view, host) for view, (_, host) in zip(views, self._pairs, strict=True)]
                    # marked when all memory is there: deterministic runs fill it first
                    self._transfer.wait(self._transfer.copy(pairs, self._transfer.mark()))
            for (tensor, _), view in zip(self._pairs, views, strict=True):
                tensor.data = view
            self._is_here = True
        except BaseException:
            self.leave()
            raise

    def leave(self) -> None:
        """Point the weights at the host's copy, and free the device's memory. Nothing is copied.

        Work that is queued already still finds them: memory is reused in the order of the work. If it is
        interrupted, call it again before anything else.
        """
        self._is_here = False
        swap = swap_of(self._network)
        if swap is not None:
            swap.park()
        for tensor, host in self._pairs:
            tensor.data = host

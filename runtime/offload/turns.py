"""Let networks take turns on a device: keep frozen weights in host memory, and copy them to run.

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

from protocols.loading import TensorInfo
from runtime.offload.block_swap import swap_of
from runtime.offload.host_memory import Transfer, allocate, transfer_to
from runtime.offload.swap_plan import HostWeights


class HostCopy:
    """A copy of a network's frozen weights and buffers in host memory; they are on the device while it works.

    On a CPU nothing is copied, and moving in either direction does nothing.
    """

    def __init__(
        self,
        network: nn.Module,
        device: torch.device,
        place: HostWeights | None = None,
        transfer: Transfer | None = None,
    ) -> None:
        """Move the frozen tensors of a network to host memory.

        Call it when the network is ready to run. The network may be on the host or on the device before, and
        is on the host afterwards. Tensors outside of `place` are copied to host memory one by one.

        Args:
            network: The network.
            device: Device on which the network works.
            place: Host memory that the network was loaded with; None if there is none.
            transfer: Copies between host and device; by default the kind that suits the device.
        """
        self._network = network
        self._is_here = False
        # (tensor, its copy in host memory)
        self._pairs: list[tuple[Tensor, Tensor]] = []
        if device.type == "cpu" and transfer is None:
            self._transfer: Transfer | None = None
            return
        self._transfer = transfer or transfer_to(device)
        # tensors that block swap keeps in host memory are moved by the swap
        swap = swap_of(network)
        swapped = frozenset() if swap is None else swap.in_host_memory
        moving = {
            name: tensor
            for name, tensor in chain(network.named_parameters(), network.named_buffers())
            if not tensor.requires_grad and tensor not in swapped
        }
        # find the tensors that are in host memory already, and allocate memory for the remaining ones
        loaded = {} if place is None else place.tensors
        on_host: dict[str, Tensor] = {}
        remaining: dict[str, TensorInfo] = {}
        for name, tensor in moving.items():
            host = loaded.get(name)
            # a weight that was replaced after loading is no longer in the memory of `place`
            if host is not None and tensor.data_ptr() == host.data_ptr() and tensor.dtype == host.dtype:
                on_host[name] = host
            else:
                remaining[name] = TensorInfo(tensor.dtype, tuple(tensor.shape))
        allocated = allocate(remaining, device.type == "cuda").tensors
        for name, tensor in moving.items():
            host = on_host.get(name)
            if host is None:
                host = allocated[name]
                host.copy_(tensor.data)
                tensor.data = host  # at once, so that there is never a second copy of all weights
            self._pairs.append((tensor, host))
        self.leave()  # frees the slots of a block swap that has run

    @property
    def is_here(self) -> bool:
        """Whether the network is on the device; always true on a CPU."""
        return self._transfer is None or self._is_here

    @property
    def size_bytes(self) -> int:
        """Return the bytes that `bring` takes on the device, in addition to those that always stay there."""
        return sum(host.nbytes for _, host in self._pairs)

    def bring(self) -> None:
        """Copy the weights to the device asynchronously; work that is queued later finds them there.

        If it is interrupted, the weights are on the host: call `bring` again.
        """
        if self._transfer is None or self._is_here:
            return
        try:
            # not in inference mode, in which samples are made: training cannot use tensors made in that mode
            with torch.inference_mode(False), torch.no_grad():
                copies: list[tuple[Tensor, Tensor]] = []  # memory on the device, and its source on the host
                for _, host in self._pairs:
                    memory = self._transfer.memory(host.nbytes)
                    copies.append((memory.view(host.dtype).view(host.shape), host))
                if copies:
                    # the copies start only after `allocated`: in a deterministic run PyTorch fills new
                    # memory, and would otherwise overwrite copied weights
                    allocated = self._transfer.mark()
                    self._transfer.wait(self._transfer.copy(copies, allocated))
            for (tensor, _), (on_device, _) in zip(self._pairs, copies, strict=True):
                tensor.data = on_device
            self._is_here = True
        except BaseException:
            self.leave()
            raise

    def leave(self) -> None:
        """Point the weights at the host's copy, and free the device's memory. Nothing is copied.

        Queued work can still read the freed memory, because it is reused in the order of the queue. If this
        call is interrupted, repeat it before anything else.
        """
        self._is_here = False
        swap = swap_of(self._network)
        if swap is not None:
            swap.park()
        for tensor, host in self._pairs:
            tensor.data = host

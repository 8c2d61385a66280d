"""The processes of a run, as ``accelerate launch`` or ``torchrun`` started them; one when nothing did."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor


class Processes:
    """Who else is training. Every process holds the whole model and the same adapter.

    Args:
        device: ``"cpu"`` keeps a run on the processor, where processes talk through gloo.
    """

    def __init__(self, device: str = "cpu") -> None:
        self._state: Any = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState

            self._state = PartialState(cpu=device == "cpu")

    @property
    def count(self) -> int:
        return 1 if self._state is None else int(self._state.num_processes)

    @property
    def rank(self) -> int:
        return 0 if self._state is None else int(self._state.process_index)

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def device(self, wanted: str) -> torch.device:
        """The device of this process: each has its own GPU."""
        if self._state is not None and wanted == "cuda":
            return torch.device(self._state.device)
        return torch.device(wanted)

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over processes."""
        if self.count == 1:
            return tensor
        from accelerate.utils import reduce

        return reduce(tensor, reduction="sum")

    def same(self, values: list[Any]) -> list[Any]:
        """The main process's values, in every process."""
        if self.count == 1:
            return values
        from accelerate.utils import broadcast_object_list

        return list(broadcast_object_list(list(values)))

    def wait(self) -> None:
        if self._state is not None:
            self._state.wait_for_everyone()

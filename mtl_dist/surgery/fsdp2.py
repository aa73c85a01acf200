"""FSDP2: backward passes leave in `.grad` this rank's shard of the averaged gradient."""

# Shape suffixes: as in rows.py.

from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from mtl_dist.config import UserError
from mtl_dist.surgery.rows import Parameters, Rows, add


class Sharded(Rows):
    """Every rank holds its shards of every row."""

    def __init__(self, model: Any, shared: Parameters, rest: Parameters, dtype: torch.dtype, scaler: Any) -> None:
        self.parts = [part for part in model.modules() if isinstance(part, FSDPModule)]
        self.mesh = _one_mesh((*shared, *rest))
        if self.mesh is None or not self.parts:
            raise UserError(
                "surgery needs every trained parameter sharded over one mesh dimension, and one here is not: "
                "HSDP and tensor parallelism are not supported, and fully_shard must wrap the whole model"
            )
        super().__init__(model, shared, rest, dtype, scaler)
        self.device = local((*shared, *rest)[0]).device
        self._lay_out([local(parameter).numel() for parameter in shared])

    def _group(self) -> Any:
        return self.mesh.get_group()

    def start(self) -> None:
        """Begins a step."""
        super().start()
        trained = (*self.shared, *self.rest)
        self._refuse_left_over(local(parameter.grad) for parameter in trained if parameter.grad is not None)
        self._clear()

    def give_up(self) -> None:
        """Leaves a step that failed."""
        super().give_up()
        self._clear()

    def _clear(self) -> None:
        for parameter in (*self.shared, *self.rest):
            parameter.grad = None

    @contextmanager
    def micro_batch(self, averages: bool) -> Iterator[None]:
        """Around a backward pass; whether FSDP2 then averages."""
        self._average(averages)
        try:
            with super().micro_batch(averages):
                yield
        finally:
            self._average(True)

    def _average(self, averages: bool) -> None:
        for part in self.parts:
            part.set_requires_gradient_sync(averages, recurse=False)

    @contextmanager
    def of_task(self, task: str, last: bool) -> Iterator[None]:
        """Around the backward passes of a visit of a task."""
        k, _ = self._visit(task)
        yield
        found = [
            (self.rows[k][columns], local(parameter.grad).reshape(-1))
            for parameter, columns in zip(self.shared, self.slices, strict=True)
            if parameter.grad is not None
        ]
        add([into for into, _ in found], [gradient for _, gradient in found])
        # Copied: what FSDP2 gives is a piece of all that it has just scattered, embeddings as well.
        own = [(parameter, parameter.grad.clone()) for parameter in self.rest if parameter.grad is not None]
        self._keep_own(k, own)
        self._clear()

    def deposit(self, weights_GK: Tensor | None, group_of_S: Sequence[int], reached: Set[nn.Parameter]) -> None:
        """Makes the combination of the rows, and the sum of what is not combined, the gradients of the parameters."""
        combined_N = self.combined(weights_GK, group_of_S)
        for parameter, columns in zip(self.shared, self.slices, strict=True):
            if parameter in reached:
                assert isinstance(parameter, DTensor)
                shard = combined_N[columns].view_as(local(parameter)).to(parameter.dtype)
                parameter.grad = DTensor.from_local(
                    shard, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
                )
        for parameter, gradient in self.summed_own().items():
            parameter.grad = gradient


def _one_mesh(parameters: Parameters) -> Any:
    """The mesh of one dimension that all parameters are sharded over, if there is one."""
    for parameter in parameters:
        if not (
            isinstance(parameter, DTensor)
            and parameter.device_mesh.ndim == 1
            and isinstance(parameter.placements[0], Shard)
        ):
            return None
        if local(parameter).device.type != parameter.device_mesh.device_type:
            raise UserError("FSDP2's CPU offload is not supported; leave offload_policy out")
        mesh = parameter.device_mesh
    return mesh


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor that FSDP2 spreads over the ranks."""
    assert isinstance(tensor, DTensor)
    return tensor.to_local()

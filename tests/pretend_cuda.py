"""A GPU that is pretended, with a CPU build of torch: real numbers, and the code as it runs on CUDA.

    with pretended_cuda() as gpu, pretended_ranks(8): train(experiment)
    gpu.waits      # how often the host waited for the device, by what and where: ("event", "training/books.py settle")
    gpu.problems   # what a GPU would refuse: tensors of two devices in one operation, a CPU tensor given to NCCL, ...
    gpu.sent       # bytes given to collectives, by their names

Every storage has a mark, GPU or none; results take the mark of their inputs, and whoever asks a tensor for its device
sees it. The numbers are computed on the CPU, attention's varlen kernel by a loop over the sentences. Of several ranks
this is the first one, and all others have what it has.
"""

import math
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import pairwise
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
# What makes the host wait, as ATen calls it.
READS = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "unique_dim", "is_nonzero"}
MAY_MIX = {"index", "index_put_", "_index_put_impl_", "copy_", "_to_copy"}  # CPU indices, and copies
NO_CPU_SCALARS = {"_fused_adamw_", "_fused_adam_", "_amp_foreach_non_finite_check_and_unscale_", "_amp_update_scale_"}
REFUSED_BY_NCCL = {torch.int16, torch.complex64, torch.complex128}


class Gpu:
    """What was seen."""

    def __init__(self) -> None:
        self.waits = Counter[tuple[str, str]]()
        self.problems = Counter[tuple[str, str]]()
        self.kernels = Counter[str]()  # by where they were launched
        self.sent = Counter[str]()
        self.under_way: list[Any] = []  # memory on the CPU that a copy from the GPU is to fill

    def waits_for(self, what: str) -> None:
        self.waits[what, place()] += 1

    def refuses(self, what: str) -> None:
        self.problems[what, place()] += 1


def place() -> str:
    """The innermost function of the project that runs, but for one that reads for others."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if "/mtl_dist/" in file and name not in ("read", "<genexpr>", "<listcomp>", "<dictcomp>"):
            return f"{file.rsplit('/mtl_dist/', 1)[1]} {name}"
        frame = frame.f_back
    return "elsewhere"


def storage(tensor: Tensor) -> Any:
    with torch._C.DisableTorchFunction():
        return tensor.untyped_storage()


def on_gpu(tensor: Tensor) -> bool:
    return getattr(storage(tensor), "on_gpu", False) is True


def marked(tensor: Tensor, gpu: bool = True) -> Tensor:
    storage(tensor).on_gpu = gpu
    return tensor


class Devices(TorchFunctionMode):
    """Python's view: devices that are asked for, and tensors that are asked for theirs."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name, first = getattr(func, "__name__", ""), args[0] if args and isinstance(args[0], Tensor) else None
        if first is not None:
            asked = getattr(getattr(func, "__self__", None), "__name__", "") if name == "__get__" else name
            if asked == "device":
                return CUDA if on_gpu(first) else CPU
            if asked in ("is_cuda", "is_cpu"):
                return on_gpu(first) == (asked == "is_cuda")
            if asked == "get_device":
                return 0 if on_gpu(first) else -1
            if asked in ("numpy", "__array__") and on_gpu(first):
                raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
            if asked == "tolist" and on_gpu(first):
                self.gpu.waits_for("tolist")
            if asked == "pin_memory":
                return self._pinned(first.clone())
            if func in (Tensor.to, Tensor.cuda, Tensor.cpu):
                return self._moved(func, first, args[1:], kwargs)
        pins = kwargs.pop("pin_memory", False)
        device = kwargs.get("device")
        if device is None:
            result = func(*args, **kwargs)
            if isinstance(result, Tensor) and hasattr(storage(result), "of_cpp") and first is None:
                marked(result, False)  # asked for in Python, where nobody said on which device
            return result
        to_gpu = torch.device(device).type == "cuda"
        result = func(*args, **(kwargs | {"device": "cpu"}))
        if to_gpu and name in ("tensor", "new_tensor", "as_tensor"):
            self.gpu.waits_for(f"{name} on the GPU")
        return self._pinned(result) if pins else marked(result, to_gpu) if isinstance(result, Tensor) else result

    def _pinned(self, tensor: Tensor) -> Tensor:
        storage(tensor).pinned = True
        return marked(tensor, False)

    def _moved(self, func: Any, tensor: Tensor, args: Any, kwargs: Any) -> Tensor:
        copy = kwargs.pop("copy", False)
        if func is not Tensor.to:
            device, dtype = CUDA if func is Tensor.cuda else CPU, tensor.dtype
            non_blocking = kwargs.get("non_blocking", False)
        elif args and isinstance(args[0], Tensor):
            device, dtype, non_blocking = args[0].device, args[0].dtype, False
        else:
            device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        to_gpu, dtype = on_gpu(tensor) if device is None else device.type == "cuda", dtype or tensor.dtype
        if to_gpu == on_gpu(tensor) and dtype == tensor.dtype and not copy:
            return tensor
        if to_gpu != on_gpu(tensor):
            if to_gpu and not (non_blocking and getattr(storage(tensor), "pinned", False)):
                self.gpu.waits_for("copy to the GPU")
            elif not to_gpu:
                self.gpu.waits_for("copy from the GPU")
                if non_blocking:
                    self.gpu.refuses("a copy from the GPU that nobody waits for")
        return _Moved.apply(tensor, dtype, to_gpu)  # type: ignore[no-any-return, no-untyped-call]


class _Moved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, dtype: torch.dtype, to_gpu: bool) -> Tensor:
        ctx.before = tensor.dtype, on_gpu(tensor)
        with torch._C.DisableTorchFunction():
            return marked(tensor.to(dtype, copy=True), to_gpu)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        dtype, gpu = ctx.before
        with torch._C.DisableTorchFunction():
            return marked(gradient.to(dtype, copy=True), gpu), None, None


class Operations(TorchDispatchMode):
    """ATen's view, in forward and backward passes alike."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        name = func._schema.name.split("::")[-1]
        if func.namespace == "c10d":
            return self._collective(name, func, args, kwargs, tensors)
        there = [tensor for tensor in tensors if on_gpu(tensor)]
        if there:
            self._look(name, func, args, kwargs, tensors)
        for tensor in tensors:
            if storage(tensor) in self.gpu.under_way and name != "copy_" and not func.is_view and name != "detach":
                self.gpu.refuses("a copy from the GPU is read that nobody waited for")
        result = func(*args, **kwargs)
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and not hasattr(storage(made), "on_gpu"):
                if tensors:
                    marked(made, bool(there))
                else:
                    storage(made).of_cpp = True  # on a device that we do not know
        return result

    def _look(self, name: str, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> None:
        if not func.is_view and name != "detach":
            self.gpu.kernels[place()] += 1
        if name in READS or (
            name == "index" and any(tensor.dtype in (torch.bool, torch.uint8) for tensor in tensors[1:])
        ):
            self.gpu.waits_for(name)
        if name == "segment_reduce" and not kwargs.get("unsafe", False):
            self.gpu.waits_for("segment_reduce looks at the lengths")
        if name == "copy_" and not on_gpu(args[0]):
            if (args[2] if len(args) > 2 else kwargs.get("non_blocking", False)) and hasattr(
                storage(args[0]), "pinned"
            ):
                self.gpu.under_way.append(storage(args[0]))
            else:
                self.gpu.waits_for("copy from the GPU")
        if name == "copy_" and on_gpu(args[0]) and not on_gpu(args[1]) and not hasattr(storage(args[1]), "pinned"):
            self.gpu.waits_for("copy to the GPU")
        here = [tensor for tensor in tensors if getattr(storage(tensor), "on_gpu", None) is False]
        if torch.Tag.pointwise in func.tags and name not in NO_CPU_SCALARS:
            here = [tensor for tensor in here if tensor.dim() > 0]
        if here and name not in MAY_MIX and not func.is_view:
            self.gpu.refuses(f"{func} of tensors on the GPU and on the CPU")

    def _collective(self, name: str, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:  # what DDP's C++ makes to compare the ranks' models has no mark
            if frame.f_code.co_filename.endswith("torch/nn/parallel/distributed.py"):
                return func(*args, **kwargs)
            frame = frame.f_back
        for tensor in tensors:
            if not on_gpu(tensor):
                self.gpu.refuses(f"NCCL's {name} of a CPU tensor")
            if tensor.dtype in REFUSED_BY_NCCL:
                self.gpu.refuses(f"NCCL's {name} of {tensor.dtype}")
            if not tensor.is_contiguous():
                self.gpu.refuses(f"NCCL's {name} of a tensor that is not contiguous")
        self.gpu.sent[name] += max(tensor.nbytes for tensor in tensors)
        result = func(*args, **kwargs)
        world = dist.get_world_size()
        if name == "allreduce_":  # a sum, as all of ours are
            for tensor in tensors:
                tensor.mul_(world)
        elif name == "_reduce_scatter_base_":
            tensors[0].copy_(tensors[1].view(world, -1)[0].mul(world).view_as(tensors[0]))
        elif name == "_allgather_base_":
            tensors[0].view(world, -1).copy_(tensors[1].view(1, -1))
        return result


def _attention(
    q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor, longest_q: int, *rest: Any, **options: Any
) -> Any:
    """torch.ops.aten._flash_attention_forward, with what its kernel asks for."""
    dropout = rest[1]
    assert q.dtype in (torch.float16, torch.bfloat16) and q.dtype == k.dtype == v.dtype, q.dtype
    assert ends_q.dtype == torch.int32 and all(x.stride(-1) == 1 for x in (q, k, v)), ends_q.dtype
    assert all(map(on_gpu, (q, k, v, ends_q, ends_k))) and dropout == 0 and q.shape[-1] % 8 == 0
    out, sums = torch.empty(q.shape, dtype=q.dtype), torch.empty(q.shape[1], len(q))
    for start, end in _sentences(ends_q, longest_q):
        scores = torch.einsum("qhe,khe->hqk", q[start:end].float(), k[start:end].float()) / math.sqrt(q.shape[-1])
        sums[:, start:end] = scores.logsumexp(-1)
        out[start:end] = torch.einsum("hqk,khe->qhe", scores.softmax(-1), v[start:end].float()).to(q.dtype)
    return out, sums, torch.zeros(2, dtype=torch.uint64), torch.zeros((), dtype=torch.uint64), torch.zeros(0)


def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, ends_q: Tensor, ends_k: Tensor,
    longest_q: int, *rest: Any, **options: Any,
) -> Any:  # fmt: skip
    grads, scale = [torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v)], q.shape[-1] ** -0.5
    for start, end in _sentences(ends_q, longest_q):
        Q, K, V, G = (x[start:end].float() for x in (q, k, v, grad))
        p = (torch.einsum("qhe,khe->hqk", Q, K) * scale).softmax(-1)
        dp = torch.einsum("qhe,khe->hqk", G, V)
        ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * scale
        for into, value in zip(
            grads,
            (
                torch.einsum("hqk,khe->qhe", ds, K),
                torch.einsum("hqk,qhe->khe", ds, Q),
                torch.einsum("hqk,qhe->khe", p, G),
            ),
            strict=True,
        ):
            into[start:end] = value.to(into.dtype)
    return tuple(grads)


def _sentences(ends: Tensor, longest: int) -> Iterator[tuple[int, int]]:
    with torch._C.DisableTorchFunction():
        bounds = ends.tolist()
    assert longest >= max(end - start for start, end in pairwise(bounds))
    yield from pairwise(bounds)


class _Event:
    """torch.cuda.Event."""

    gpu: Gpu

    def record(self) -> None:
        self.before = list(self.gpu.under_way)

    def synchronize(self) -> None:
        self.gpu.waits_for("event")
        self.gpu.under_way = [each for each in self.gpu.under_way if not any(each is one for one in self.before)]


@contextmanager
def pretended_cuda(capability: tuple[int, int] = (9, 0)) -> Iterator[Gpu]:
    gpu = Gpu()
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", _attention, "CPU")
    library.impl("_flash_attention_backward", _attention_backward, "CPU")
    enter_autocast, leave_autocast = torch.autocast.__enter__, torch.autocast.__exit__
    group = torch._C._group_tensors_by_device_and_dtype  # type: ignore[attr-defined]

    def enter(autocast: Any) -> Any:
        result = enter_autocast(autocast)
        if autocast.device == "cuda":  # the numbers come from the CPU
            autocast.beside = torch.autocast("cpu", dtype=autocast.fast_dtype, enabled=autocast._enabled)
            enter_autocast(autocast.beside)
        return result

    def leave(autocast: Any, *error: Any) -> Any:
        if autocast.device == "cuda":
            leave_autocast(autocast.beside, *error)
        return leave_autocast(autocast, *error)

    def group_by_mark(*args: Any) -> Any:  # C++ asks the tensors themselves
        with torch._C.DisableTorchFunction():
            found = group(*args)
        return {
            (CUDA if (first := lists[0][0][0]) is not None and on_gpu(first) else key[0], key[1]): lists
            for key, lists in found.items()
        }

    of_cuda = {
        "is_available": lambda: True,
        "device_count": lambda: 8,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_capability": lambda device=None: capability,
        "get_device_name": lambda device=None: "a pretended GPU",
        "is_bf16_supported": lambda including_emulation=True: capability >= (8, 0),
        "manual_seed_all": lambda seed: None,
        "synchronize": lambda device=None: gpu.waits_for("synchronize"),
        "empty_cache": lambda: None,
        "is_initialized": lambda: False,
        "Event": type("Event", (_Event,), {"gpu": gpu}),
    }
    with ExitStack() as stack:
        for name, value in of_cuda.items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        stack.enter_context(patch.object(torch.autocast, "__enter__", enter))
        stack.enter_context(patch.object(torch.autocast, "__exit__", leave))
        stack.enter_context(patch.object(torch._C, "_group_tensors_by_device_and_dtype", group_by_mark))
        # In another thread none of this would be seen.
        stack.enter_context(patch("mtl_dist.training.loop.prefetched", lambda make, steps: map(make, steps)))
        stack.enter_context(Devices(gpu))
        stack.enter_context(Operations(gpu))
        yield gpu
    library._destroy()


@contextmanager
def pretended_ranks(world: int) -> Iterator[None]:
    """Makes this process the first of so many, on nodes of eight."""
    start = dist.init_process_group

    def init(backend: str | None = None, **options: Any) -> None:
        options = {key: value for key, value in options.items() if key not in ("init_method", "rank", "world_size")}
        start("fake", store=FakeStore(), rank=0, world_size=world, **options)

    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(min(8, world))}
    with ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, environment | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29555"}))
        stack.enter_context(patch.object(dist, "init_process_group", init))
        stack.enter_context(patch("mtl_dist.distributed._however_long", nullcontext))
        for module in ("distributed", "training.books", "training.scores"):
            stack.enter_context(patch(f"mtl_dist.{module}.gather_object", lambda found: found))
        yield

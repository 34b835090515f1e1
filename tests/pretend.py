"""A GPU that is not there: what a CUDA device would refuse is refused, and where the host would wait for it is counted.

Inside `with PretendGPU() as gpu:` the device `cuda:0` exists. Its tensors hold their numbers on the CPU. To Python they
are on `cuda:0`; to torch's C++ side on `meta`, which every build has. A `TorchFunctionMode` translates the one to the
other where Python names a device, a `TorchDispatchMode` runs every operation on the numbers, and refuses those that mix
devices as CUDA does.

A copy to the host that is not waited for holds zeros until an event behind it was.

It cannot see kernels: their results, precision and speed, memory, streams, and what a kernel asserts of its indices.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import apd

CPU, GPU, META = torch.device("cpu"), torch.device("cuda:0"), torch.device("meta")
HOME = str(Path(apd.__file__).parent)
aten = torch.ops.aten

#: The host must know a value, or a shape that depends on values.
WAITS = {aten._local_scalar_dense, aten.equal, aten.nonzero, aten.masked_select, aten._unique2, aten.bincount}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
COPIES = {aten._to_copy, aten.copy_}
NO_KERNEL = {aten._unsafe_view, aten.lift_fresh, aten.empty, aten.new_empty, aten.empty_like, aten._local_scalar_dense}


class OnGPU(Tensor):
    """A tensor of the pretended device.

    Attributes:
        held: its numbers, on the CPU.
    """

    held: Tensor
    device = property(lambda self: GPU)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> OnGPU:
        shape = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        self = Tensor._make_wrapper_subclass(cls, held.size(), device=META, **shape)
        self.held = held
        return self

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError(f"{function} of a tensor on the pretended GPU, outside of it")

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def __repr__(self) -> str:
        return f"OnGPU({self.held})"


class _Names(TorchFunctionMode):
    """Calls the device by the name that C++ knows it by."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.tensor:
            kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
        # A tensor of Python's numbers is a copy that is waited for. C++ would leave the numbers out for "meta".
        if function is Tensor.new_tensor:
            kwargs = {"dtype": args[0].dtype, "device": args[0].device} | kwargs
            function, args = torch.tensor, args[1:]
        if function in (torch.tensor, torch.as_tensor) and is_gpu(kwargs.get("device")):
            return function(*args, **kwargs | {"device": CPU}).to(META)
        if function in (Tensor.__getitem__, Tensor.__setitem__) and is_gpu(args[0].device):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            index = tuple(torch.tensor(i).to(META) if isinstance(i, list) else i for i in index)
            args = args[0], index, *args[2:]
        if function is not torch.device:
            args, kwargs = mapped((str, torch.device), lambda x: META if is_gpu(x) else x, (args, kwargs))
        return function(*args, **kwargs)


def mapped(kind: Any, function: Callable[[Any], Any], value: Any) -> Any:
    """`value` with `function` of each part of that kind, in tuples, lists and dicts: torch's pytrees take five times longer."""
    if isinstance(value, kind):
        return function(value)
    if type(value) is tuple or type(value) is list:
        return type(value)([mapped(kind, function, each) for each in value])
    if type(value) is dict:
        return {name: mapped(kind, function, each) for name, each in value.items()}
    return value


def is_gpu(device: Any) -> bool:
    return str(device) in ("cuda", "cuda:0", "meta") if isinstance(device, (str, torch.device)) else False


def move(module: nn.Module) -> None:
    """Put a module there, in place, as `module.cuda()` would."""
    moved: dict[int, Tensor] = {}  # tied weights stay tied
    for part in module.modules():
        for of in (part._parameters, part._buffers):
            of.update({k: moved.setdefault(id(t), OnGPU(t.detach())) for k, t in of.items() if t is not None})


class PretendGPU(TorchDispatchMode):
    """The device, while it is there.

    Attributes:
        waits: how often the host waited for it, by the line of the library and the operation.
        launches: likewise, kernels started; views start none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[tuple[str, str]] = Counter()
        self.launches: Counter[tuple[str, str]] = Counter()
        self.on_the_way: list[tuple[Tensor, Tensor]] = []  # copies to the host, and what they will hold
        self.given = self.reached = 0  # operations, and how many of them the host knows to be done
        # The current device is another one, so that whoever does not name the stream gets one that is idle.
        streams = {"Event": partial(Event, self), "current_stream": torch.device}
        self.names, self.events = _Names(), mock.patch.multiple("torch.cuda", **streams)

    def __enter__(self) -> PretendGPU:
        self.names.__enter__()
        self.events.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.events.__exit__(*error)
        self.names.__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():
            return self._outside_of_inference_mode(function, args, kwargs)
        tensors: list[Tensor] = []
        mapped(Tensor, tensors.append, (args, kwargs))
        here = [x for x in tensors if isinstance(x, OnGPU)]
        goes = is_gpu(kwargs["device"]) if kwargs.get("device") is not None else bool(here)
        if not here and not goes:
            return function(*args, **kwargs)
        self._check_and_count(function, args, kwargs, tensors, goes)
        if function.overloadpacket is aten._fused_sdp_choice:
            return 0  # attention in single operations, which every device has
        held = mapped(OnGPU, lambda x: x.held, (args, kwargs))
        if is_gpu(kwargs.get("device")):
            held[1]["device"] = CPU
        known = {id(getattr(x, "held", x)): x for x in tensors}  # what was written to
        result = function(*held[0], **held[1])
        if function.overloadpacket is aten._to_copy and not goes and kwargs.get("non_blocking"):
            self.on_the_way.append((result, result.clone()))
            result.zero_()

        def placed(x: Tensor) -> Tensor:
            return known[id(x)] if id(x) in known else OnGPU(x) if goes else x

        return mapped(Tensor, placed, result)

    def _outside_of_inference_mode(self, function, args, kwargs) -> Any:
        """The same operation where torch takes compound ones apart."""
        super().__enter__()
        try:
            with torch.inference_mode(False), torch.no_grad():
                return function(*args, **kwargs)
        finally:
            super().__exit__(None, None, None)

    def _check_and_count(self, function, args, kwargs, tensors, goes) -> None:
        packet, others = function.overloadpacket, [x for x in tensors if not isinstance(x, OnGPU)]
        place = where(), packet.__name__
        waits = packet in WAITS
        if packet in COPIES:
            is_free = kwargs.get("non_blocking") or (goes and args[2:] == (True,))
            waits = bool(others or not goes) and not is_free
        elif packet in INDEXING and isinstance(args[0], OnGPU):
            indices = [x for x in args[1] if x is not None]
            waits = any(x.dtype in (torch.bool, torch.uint8) or not isinstance(x, OnGPU) for x in indices)
            others = [x for x in others if not any(x is index for index in indices)]
        if packet not in COPIES and any(x.dim() for x in others):
            raise RuntimeError(
                f"{packet.__name__} expects all tensors on one device, got cuda:0 and cpu at {place[0]}"
            )
        self.given += 1
        self.reached = self.given if waits else self.reached
        is_view = any(r.alias_info and not r.alias_info.is_write for r in function._schema.returns)
        self.waits[place] += bool(waits)
        self.launches[place] += not (is_view or packet in NO_KERNEL)


class Event:
    """What the device reaches once it is done with all that it was given before."""

    def __init__(self, gpu: PretendGPU) -> None:
        self.gpu = gpu

    def record(self, stream: torch.device | None = None) -> None:
        self.place, self.before = self.gpu.given, []
        if stream == torch.device(GPU):
            self.before, self.gpu.on_the_way = self.gpu.on_the_way, []

    def synchronize(self) -> None:
        self.gpu.waits[where(), "synchronize"] += self.place > self.gpu.reached
        self.gpu.reached = max(self.gpu.reached, self.place)
        for copy, values in self.before:
            copy.copy_(values)


def where() -> str:
    """The line of the library that is running."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(HOME):
            return f"{frame.f_code.co_filename[len(HOME) + 1 :]}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"

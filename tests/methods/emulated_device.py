"""A device that only exists as shapes, to see where a training step would wait for it: a script that prints JSON
for the cases it is given.

Tensors hold no values (`FakeTensorMode`), so every read of one by the host, and every copy from the host that is not
queued, can be counted with the line that asks for it; tensors of two devices that meet are an error, as on a GPU.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from toy_methods import CASES, batch, networks_of

from unspool import shapes
from unspool.methods import clean_prefix, on_policy

NAME = "emulated"
WAITS: list[str] = []
REAL_TO = Tensor.to


def note(what: str, error: TracebackType | None = None) -> None:
    """The line of the package that waits, or fails; what torch asks for itself is not the package's."""
    for frame in reversed(traceback.extract_tb(error) if error else traceback.extract_stack()):
        if "/src/unspool/" in frame.filename:
            line = f"{what} at {frame.filename.rpartition('/src/unspool/')[2]}: {frame.line}"
            return WAITS.append(line) if line not in WAITS else None


def valueless(x: Tensor) -> Tensor:
    """Without the values that this mode keeps of small tensors: it would compute with them, and the device cannot."""
    if not isinstance(x, FakeTensor):
        return torch.empty_like(x) if is_emulating() else x
    x.constant = None
    return x


def is_emulating() -> bool:
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def queued(x: Tensor, device: torch.device) -> Tensor:
    """`to_device`, which waits for nothing."""
    return REAL_TO(valueless(x), device)


def copied(x: Tensor, *given: Any, **options: Any) -> Tensor:
    made = REAL_TO(valueless(x), *given, **options)
    if x.device.type != made.device.type:
        note(f"a copy to {'the host' if made.device.type == 'cpu' else 'the device'}")
    return made


def reads(name: str, default: Any) -> Callable[..., Any]:
    """A method that needs the values: noted on the device; what a tensor of the host says is not known here."""
    real = getattr(Tensor, name)

    def read(x: Tensor, *given: Any) -> Any:
        if x.device.type == NAME:
            note(f"{name}()")
        try:
            return real(x, *given)
        except Exception:
            return default(x) if callable(default) else default

    return read


def picked(x: Tensor, index: Any) -> Any:
    for part in index if isinstance(index, tuple) else (index,):
        is_host = isinstance(part, list) or (isinstance(part, Tensor) and part.device.type == "cpu")
        if x.device.type == NAME and (is_host or (isinstance(part, Tensor) and part.dtype == torch.bool)):
            note("an index")
    return REAL_PICK(x, index)


REAL_PICK = Tensor.__getitem__


def emulate() -> None:
    _setup_privateuseone_for_python_backend(NAME)
    for name, default in (("__bool__", True), ("item", 1), ("__int__", 1), ("__float__", 1.0), ("__index__", 1)):
        setattr(Tensor, name, reads(name, default))
    for name, default in (("tolist", lambda x: [0] * len(x)), ("nonzero", lambda x: x.new_zeros(1, x.ndim).long())):
        setattr(Tensor, name, reads(name, default))
    Tensor.cpu = lambda x: copied(x, "cpu")  # type: ignore[assignment, method-assign]
    Tensor.to, Tensor.__getitem__ = copied, picked  # type: ignore[assignment, method-assign]
    torch.unique = lambda x, **_: (x.reshape(-1), torch.arange(x.numel()).reshape(x.shape))
    torch.autocast = lambda *_, **__: nullcontext()  # type: ignore[assignment, misc]
    is_enabled = torch.is_autocast_enabled
    torch.is_autocast_enabled = lambda kind="cpu": kind != NAME and is_enabled(kind)
    real = shapes.to_device
    for module in [m for n, m in sys.modules.items() if n.startswith("unspool")]:
        if getattr(module, "to_device", None) is real:
            module.to_device = queued  # type: ignore[attr-defined]
    for module in (on_policy, clean_prefix):
        module.shared_integer = lambda count, rng: count - 1  # type: ignore[attr-defined]


def placed(network: nn.Module) -> nn.Module:
    """The network on the device."""
    for module in network.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                empty = torch.empty(weight.shape, device=NAME)
                module._parameters[name] = nn.Parameter(empty, requires_grad=weight.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=NAME)
    return network


def step(name: str, method: Any) -> None:
    """A step of every role; of the long rollouts that of the student, which asks all networks."""
    for network in networks_of(method):
        placed(network)
    for role in ("student",) if name == "long_rollouts" else method.networks:
        method.step(batch(name, NAME), role, 0, torch.Generator())


def main(names: list[str]) -> None:
    methods = {name: CASES[name]() for name in names}
    emulate()
    found = {}
    for name, method in methods.items():
        WAITS.clear()
        try:
            with FakeTensorMode(allow_non_fake_inputs=True):
                step(name, method)
        except Exception as error:  # what the device has no values or no memory for
            note(f"{type(error).__name__}: {str(error).splitlines()[0]}", error.__traceback__)
        found[name] = list(WAITS)
    print(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])

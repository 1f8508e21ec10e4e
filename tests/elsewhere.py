"""A device that is not the processor, made of the processor: for machines without a GPU.

Tensors on it say that they are elsewhere, cannot become NumPy arrays and do not mix with those of
the processor, as on a GPU; whatever has to wait for the device is counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")
"""Of those that PyTorch knows, one that needs no driver."""
WAITS = {"_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "masked_select", "bincount"}
"""Operations whose result, or its size, the processor must know; copies wait, too."""


class Elsewhere(Tensor):
    """A tensor of that device, which lies in memory as any other.

    Attributes:
        plain: That one.
    """

    plain: Tensor

    @staticmethod
    def __new__(cls, plain: Tensor) -> Elsewhere:
        made: Elsewhere = torch.Tensor._make_wrapper_subclass(
            cls,
            plain.shape,
            strides=plain.stride(),
            storage_offset=plain.storage_offset(),
            dtype=plain.dtype,
            device=DEVICE,
        )
        made.plain = plain
        return made

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("this tensor lies elsewhere: copy it to the processor first")

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise AssertionError(f"{func} outside of `device()`")


class Device(TorchDispatchMode):
    """Runs operations on it.

    Attributes:
        waits: How often one had to wait for its result.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        with self:  # in inference mode, operations that are made of others come as one
            outcome = func.decompose(*args, **kwargs)
        if outcome is not NotImplemented:
            return outcome
        name = func.overloadpacket.__name__
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        away = [isinstance(x, Elsewhere) for x in tensors]
        device = kwargs.get("device")
        if not any(away) and (device is None or device.type != DEVICE.type):
            return func(*args, **kwargs)
        copies = name in ("_to_copy", "copy_")
        if not all(away) and not copies:
            apart = [x for x, is_away in zip(tensors, away, strict=True) if not is_away]
            assert all(x.dim() == 0 for x in apart), f"{name} mixes devices"
        to_processor = copies and (
            (device is not None and device.type == "cpu") or (name == "copy_" and not away[0])
        )
        from_processor = copies and not all(away)
        self.waits += name in WAITS or to_processor or from_processor
        if device is not None:
            kwargs["device"] = torch.device("cpu")
        outcome = func(*tree_map(_plain, args), **tree_map(_plain, kwargs))
        written = {id(x.plain): x for x in tensors if isinstance(x, Elsewhere)}

        def wrap(x: Any) -> Any:
            if not isinstance(x, Tensor) or to_processor:
                return x
            return written[id(x)] if id(x) in written else Elsewhere(x)

        return tree_map(wrap, outcome)


def _plain(x: Any) -> Any:
    return x.plain if isinstance(x, Elsewhere) else x


@contextmanager
def device() -> Iterator[Device]:
    """That device, as long as it is there."""
    made = torch.tensor

    def tensor(data: Any, *, dtype: Any = None, device: Any = None) -> Tensor:
        found = made(data, dtype=dtype)
        return found if device is None else found.to(device)

    with Device() as mode, pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "tensor", tensor)  # the only factory that fills no other device
        yield mode

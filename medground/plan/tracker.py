"""Live bytes of a device that is not there: tensors on "meta" stand for it, and every storage is followed.

A dispatch mode sees each operation's results, a finalizer each storage's end, and `resize_`, with which FSDP2 frees
weights, is watched as well. So the tracker knows at any time what an allocator that wastes nothing would hold, and what
it was allocated for: the innermost label at that time. What an operation needs inside, and frees before it returns, is
not seen.

"meta" has a second meaning that the code in hand uses: a tensor that is nowhere yet. What is made under
`torch.device("meta")`, and what is made of that without a device being named, is not counted.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary


class Peak(NamedTuple):
    """The most that a phase held at a time, in bytes, and by label."""

    total: int
    parts: dict[str, int]


class _Held:
    """A storage: its bytes, what for."""

    __slots__ = ("bytes", "label")

    def __init__(self, label: str):
        self.bytes, self.label = 0, label


class Tracker(TorchDispatchMode):
    """Follows storages while it is entered.

    Attributes:
        live: bytes by label.
        peaks: of each phase by name; of one that came again, the higher.
        moved: bytes that collectives gave out, by (phase, operation).
    """

    def __init__(self, grain: int = 1):
        """Follow nothing yet.

        Args:
            grain: an allocation is a multiple of so many bytes: 512 for CUDA's caching allocator.
        """
        super().__init__()
        self.live: Counter[str] = Counter()
        self.peaks: dict[str, Peak] = {}
        self.moved: Counter[tuple[str, str]] = Counter()
        self._grain, self._total, self._top = grain, 0, Peak(0, {})
        self._labels, self._phase = ["other"], ""
        self._held = WeakIdKeyDictionary()
        self._nowhere = WeakIdKeyDictionary()
        self._aside = 0  # FakeTensorModes that are entered: DTensor asks them for shapes
        self._made_nowhere = False  # whether a tensor is being made under torch.device("meta")
        self._stack = ExitStack()
        self._shapes: dict[Any, Any] = {}
        self._pure: dict[Any, bool] = {}

    def __enter__(self) -> Tracker:
        with ExitStack() as stack:
            for owner, name, value in self._watched():
                stack.enter_context(patch.object(owner, name, value))
            super().__enter__()
            self._stack = stack.pop_all()
        return self

    def _watched(self) -> Iterator[tuple[Any, str, Callable]]:
        """What no dispatch tells of."""
        tracker, resize, construct = self, torch.UntypedStorage.resize_, DeviceContext.__torch_function__

        def resized(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            resize(storage, size)
            if held := tracker._held.get(storage):
                tracker._set(held, storage.nbytes())
            return storage

        def constructed(context: DeviceContext, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            before = tracker._made_nowhere
            tracker._made_nowhere = context.device.type == "meta" and (kwargs or {}).get("device") is None
            try:
                return construct(context, func, types, args, kwargs)
            finally:
                tracker._made_nowhere = before

        def counted(method: Callable, step: int) -> Callable:
            def call(mode: FakeTensorMode, *args: Any) -> Any:
                tracker._aside += step
                return method(mode, *args)

            return call

        yield torch.UntypedStorage, "resize_", resized
        yield DeviceContext, "__torch_function__", constructed
        yield FakeTensorMode, "__enter__", counted(FakeTensorMode.__enter__, 1)
        yield FakeTensorMode, "__exit__", counted(FakeTensorMode.__exit__, -1)

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    @contextmanager
    def label(self, name: str) -> Iterator[None]:
        """What is allocated meanwhile is for this."""
        self._labels.append(name)
        try:
            yield
        finally:
            self._labels.pop()

    def labelled(self, name: str, function: Callable) -> Callable:
        """`function` with a label around each call."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.label(name):
                return function(*args, **kwargs)

        return call

    def relabel(self, tensor: Tensor, name: str) -> None:
        """A tensor's storage is for something else from now on."""
        if held := self._held.get(_local(tensor).untyped_storage()):
            amount = held.bytes
            self._set(held, 0)
            held.label = name
            self._set(held, amount)

    def begin(self, phase: str) -> None:
        """End the phase before and begin another."""
        self.end()
        self._phase, self._top = phase, Peak(self._total, dict(self.live))

    def end(self) -> None:
        """End the phase."""
        if self._phase and self._top.total >= self.peaks.get(self._phase, Peak(-1, {})).total:
            self.peaks[self._phase] = Peak(self._top.total, {k: v for k, v in self._top.parts.items() if v})
        self._phase = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._aside:
            return func(*args, **kwargs)
        if any(kind is not Tensor for kind in types):
            return NotImplemented  # DTensors and 8-bit moments do their part first, and come again with what they hold
        out = self._shaped(func, args, kwargs)
        if func.namespace == "c10d":
            self._count_collective(func, args)
        nowhere: bool | None = None
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                if self._knows(tensor):
                    continue
                storage = tensor.untyped_storage()
                if nowhere is None:
                    nowhere = self._is_nowhere(func, args, kwargs)
                if nowhere:
                    self._nowhere[storage] = True
                else:
                    self._take(storage)
        return out

    def _shaped(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Results of an operation; of one that has been seen before, by their shapes alone: layers are alike."""
        key = self._key(func, args, kwargs)
        if key is None:
            return func(*args, **kwargs)
        if key not in self._shapes:
            out = func(*args, **kwargs)
            flat = out if isinstance(out, (tuple, list)) else (out,)
            given = {_storage(t) for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
            plain = all(isinstance(t, Tensor) and t.is_meta and _storage(t) not in given for t in flat)
            self._shapes[key] = plain and (type(out), [(t.shape, t.stride(), t.dtype) for t in flat])
            return out
        if not (found := self._shapes[key]):
            return func(*args, **kwargs)
        kind, shapes = found
        made = [torch.empty_strided(shape, stride, dtype=dtype, device="meta") for shape, stride, dtype in shapes]
        return kind(made) if kind in (tuple, list) else made[0]

    def _knows(self, tensor: Tensor) -> bool:
        storage = tensor.untyped_storage()
        return storage in self._held or storage in self._nowhere

    def _key(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func not in self._pure:
            schema = func._schema
            self._pure[func] = func.namespace == "aten" and not any(
                part.alias_info for part in (*schema.arguments, *schema.returns)
            )
        if not self._pure[func]:
            return None
        try:
            key = (func, *map(_shape, args), *((name, _shape(value)) for name, value in kwargs.items()))
            hash(key)
        except TypeError:
            return None
        return key

    def _is_nowhere(self, func: Any, args: Any, kwargs: Any) -> bool:
        if self._made_nowhere:
            return True
        given = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor) and t.is_meta]
        placed = kwargs.get("device") is not None and func is not torch.ops.aten._to_copy.default  # which tells its own
        return not placed and any(t.untyped_storage() in self._nowhere for t in given)

    def _take(self, storage: torch.UntypedStorage) -> None:
        held = _Held(self._labels[-1])
        self._held[storage] = held
        weakref.finalize(storage, self._set, held, 0).atexit = False
        self._set(held, storage.nbytes())

    def _set(self, held: _Held, amount: int) -> None:
        amount = -(-amount // self._grain) * self._grain
        self.live[held.label] += amount - held.bytes
        self._total += amount - held.bytes
        held.bytes = amount
        if self._total > self._top.total:
            self._top = Peak(self._total, dict(self.live))

    def _count_collective(self, func: Any, args: Any) -> None:
        whole = max((t.nbytes for t in tree_iter(args) if isinstance(t, Tensor)), default=0)
        self.moved[self._phase, func._schema.name.removeprefix("c10d::")] += whole


def _shape(value: Any) -> Any:
    if isinstance(value, Tensor):
        if not value.is_meta:
            raise TypeError
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (list, tuple)):
        return tuple(map(_shape, value))
    return type(value), value


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor

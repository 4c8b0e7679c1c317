"""A tensor whose values are on the server, or are defined by such tensors.

torch asks a subclass without storage for each operation (`__torch_dispatch__`). What has a meaning on the server happens there
(operations.py); anything else is computed here, from values that are read for it and written back where it changes them
(fallback.py). So nothing is ignored and nothing approximated.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from kt_expert_client.errors import UnsupportedModel


class Source(Protocol):
    """Values on the server, in the layout the trainer knows. Calls wait for the server's answer."""

    @property
    def name(self) -> str:
        """For messages."""

    def read(self) -> torch.Tensor:
        """All of it, on the CPU, in fp32 or the dtype the server has it in."""

    def write(self, values: torch.Tensor) -> None:
        """Replaces all of it. Raises UnsupportedModel where that is not possible."""

    def copy(self, memo: dict[int, Any]) -> Source | None:
        """An independent copy on the server, or what needs none; None where a copy of the values is a plain tensor."""

    def adopted(self, parameter: torch.Tensor) -> None:
        """A parameter stands for it."""

    @property
    def copies(self) -> LateCopies | None:
        """Copies of it that have not been read; None where a copy is what this is, also later."""


@dataclass(frozen=True, eq=False, slots=True)
class Stored:
    """The values of a source, contiguous."""

    source: Source

    def read(self) -> torch.Tensor:
        return self.source.read()


@dataclass(frozen=True, eq=False, slots=True)
class View:
    """A stored tensor seen with other sizes and strides."""

    base: RemoteTensor
    geometry: torch.Tensor  # on the meta device

    def read(self) -> torch.Tensor:
        return self.of(self.base.laid_out())

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """The same part of the base's values, laid out as the base is."""
        return whole.as_strided(self.geometry.shape, self.geometry.stride(), self.geometry.storage_offset())


@dataclass(frozen=True, eq=False, slots=True)
class Product:
    """scale * left @ right, a matrix for each expert: what LoRA adds to a weight."""

    left: RemoteTensor
    right: RemoteTensor
    scale: float

    def read(self) -> torch.Tensor:
        return torch.bmm(self.left.values(), self.right.values()) * self.scale


@dataclass(frozen=True, eq=False, slots=True)
class Sum:
    """A stored weight and products that are added to it. Without the weight: products alone."""

    base: RemoteTensor | None
    products: tuple[Product, ...]

    def read(self) -> torch.Tensor:
        total = None if self.base is None else self.base.values()
        for product in self.products:
            values = product.read()
            total = values if total is None else total + values.to(total.dtype)
        assert total is not None  # noqa: S101
        return total


class LateCopy:
    """A copy of what another tensor was, in another dtype or on another device. Its values are read when somebody wants them,
    or before the original changes: most copies are dropped unread."""

    def __init__(self, of: Stored | View, dtype: torch.dtype) -> None:
        self.of: Stored | View | None = of  # until it has values of its own
        self._dtype = dtype  # of the original as its holder sees it: that rounds
        self._values: torch.Tensor | None = None

    @staticmethod
    def holding(values: torch.Tensor) -> LateCopy:
        """One with these values."""
        made = LateCopy.__new__(LateCopy)
        made.of, made._dtype, made._values = None, values.dtype, values
        return made

    def keep(self, whole: torch.Tensor) -> None:
        """The original is about to change; `whole` is what its source holds. The values are not changed in place."""
        if self.of is not None:
            part = self.of.of(whole).clone() if isinstance(self.of, View) else whole
            self._values, self.of = part.to(self._dtype), None

    def read(self) -> torch.Tensor:
        if self.of is not None:
            return self.of.read().to(self._dtype)
        assert self._values is not None  # noqa: S101  # one of the two
        return self._values

    def write(self, values: torch.Tensor) -> None:
        self._values, self.of = values.clone(), None


class LateCopies:
    """Those of one source."""

    def __init__(self) -> None:
        self._copies: weakref.WeakSet[LateCopy] = weakref.WeakSet()

    def add(self, copy: LateCopy) -> None:
        self._copies.add(copy)

    def keep(self, source: Source) -> None:
        """The source is about to change."""
        copies = [copy for copy in list(self._copies) if copy.of is not None]
        if copies:
            whole = source.read()
            for copy in copies:
                copy.keep(whole)
        self._copies.clear()


Value = Stored | View | Product | Sum | LateCopy


@dataclass(frozen=True, slots=True)
class _Elsewhere:
    """In place of a storage: none of this process's memory."""

    number: int

    def data_ptr(self) -> int:
        return self.number

    def nbytes(self) -> int:
        return 0

    def size(self) -> int:
        return 0


SET_DATA: Any = torch.Tensor.data.__set__  # type: ignore[attr-defined]  # what torch calls for `tensor.data = value`
_SETTER = type(SET_DATA)
Handler = Callable[..., Any]
HANDLERS: dict[Any, Handler] = {}  # by operation; filled where the modules of this package are imported


class RemoteTensor(torch.Tensor):
    """`remote` says what its values are; shape, dtype and device are as the trainer sees them."""

    remote: Value
    _copy: torch.Tensor

    @staticmethod
    def __new__(
        cls: type[RemoteTensor],
        remote: Value,
        like: torch.Tensor,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> RemoteTensor:
        made: RemoteTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            like.shape,
            strides=like.stride(),
            storage_offset=like.storage_offset(),
            dtype=dtype or like.dtype,
            device=device or (torch.device("cpu") if like.is_meta else like.device),
        )
        made.remote = remote
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # torch leaves it unannotated
        del tensor_contents
        return f"RemoteTensor({self.describe()}, shape={tuple(self.shape)}, dtype={self.dtype})"

    def describe(self) -> str:
        """What it is, for messages."""
        remote = self.remote
        if isinstance(remote, Stored):
            return remote.source.name
        if isinstance(remote, LateCopy):
            return "a copy" if remote.of is None else f"a copy of {RemoteTensor(remote.of, self).describe()}"
        return f"a view of {remote.base.describe()}" if isinstance(remote, View) else "a weight with LoRA on it"

    def values(self) -> torch.Tensor:
        """Its values as a plain tensor of its dtype on the CPU, read now."""
        with torch.no_grad():
            return self.remote.read().to(self.dtype)

    def laid_out(self) -> torch.Tensor:
        """values() with this tensor's strides, from the beginning of their memory. Not to be changed in place."""
        values = self.values()
        if values.stride() == self.stride() and not values.storage_offset():
            return values
        return torch.empty_strided(self.shape, self.stride(), dtype=self.dtype).copy_(values)

    def write(self, values: torch.Tensor) -> None:
        """Replaces its values. Raises UnsupportedModel where they follow from others."""
        if isinstance(self.remote, LateCopy):
            self.remote.write(values.detach())
            return
        if not isinstance(self.remote, Stored):
            raise UnsupportedModel(f"{self.describe()} cannot be written; write what it is made of")
        self.remote.source.write(values.detach())

    # What libraries ask of a tensor's memory

    def untyped_storage(self) -> Any:
        """Something that tells shared tensors apart without a read: the same for the same values."""
        remote = self.remote
        return _Elsewhere(id(remote.source if isinstance(remote, Stored) else remote if isinstance(remote, LateCopy) else self))

    def element_size(self) -> int:
        """Bytes of this process's memory that an element takes. What adds them up (get_memory_footprint, transformers' own
        placement) counts the memory of this machine."""
        return 0

    def data_ptr(self) -> int:
        """Of a copy of the values that is read now and lives as long as this tensor: what safetensors writes. Raises
        UnsupportedModel for a parameter: whoever has its address may change it, and the server would not know."""
        if isinstance(self, torch.nn.Parameter) and self.requires_grad:
            raise UnsupportedModel(
                f"{self.describe()} has no address in this process; read it (.detach().cpu()), or train it with "
                "lora_location='trainer'"
            )
        self._copy = self.values().contiguous()
        return self._copy.data_ptr()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled as its values."""
        return self.values().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        source = self.remote.source if isinstance(self.remote, Stored) else None
        copied = None if source is None else source.copy(memo)
        made = self.values().clone() if copied is None else RemoteTensor(Stored(copied), self)
        if isinstance(self, torch.nn.Parameter):
            made = torch.nn.Parameter(made, self.requires_grad)
            if copied is not None:
                copied.adopted(made)
        memo[id(self)] = made
        return made

    def become(self, value: torch.Tensor) -> bool:
        """`tensor.data = value`. False where torch's own way does it: the same values seen with another dtype or device."""
        if isinstance(value, RemoteTensor) and source_behind(value) is source_of(self) is not None:
            return False
        if value.numel() == 0 < self.numel():
            raise UnsupportedModel(
                f"{self.describe()} was to give up its memory to be spread over ranks, as DeepSpeed's ZeRO-3 does: it has none "
                "in this process, the server holds it once for all ranks. Use ZeRO-1 or ZeRO-2, or FSDP2's fully_shard, which "
                "leave it where it is"
            )
        if value.shape != self.shape:
            raise UnsupportedModel(
                f"{self.describe()} has shape {tuple(self.shape)} and is given values of shape {tuple(value.shape)}"
            )
        handler = HANDLERS.get(SET_DATA)
        if handler is None or handler(SET_DATA, self, value) is NotImplemented:
            self.write(value.values() if isinstance(value, RemoteTensor) else value)
        return True

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[Any, Any] | None = None
    ) -> Any:
        if type(func) is _SETTER and func == SET_DATA and isinstance(args[0], RemoteTensor) and args[0].become(args[1]):
            return None
        return torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})  # a step asks thousands of times

    def geometry(self) -> torch.Tensor:
        """A meta tensor of its sizes and strides."""
        return torch.empty_strided(self.shape, self.stride(), dtype=self.dtype, device="meta")

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's annotations lack the classmethod
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[Any, Any] | None = None
    ) -> Any:
        del types
        handler = HANDLERS.get(func)
        if handler is not None:
            result = handler(func, *args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        from kt_expert_client.parameters.fallback import compute_here

        return compute_here(func, args, kwargs or {})


def source_of(tensor: object) -> Source | None:
    """What all of a tensor's values are on the server; None for any other tensor, and for a copy."""
    remote = tensor.remote if isinstance(tensor, RemoteTensor) else None
    return remote.source if isinstance(remote, Stored) else None


def source_behind(tensor: object) -> Source | None:
    """The same, also of a late copy while that is what its original is."""
    remote = tensor.remote if isinstance(tensor, RemoteTensor) else None
    if isinstance(remote, LateCopy):
        remote = remote.of
    return remote.source if isinstance(remote, Stored) else None


def late_copy(tensor: RemoteTensor) -> Value:
    """What a copy of it in another dtype or on another device is. One of a gradient, or of weights with LoRA on them, is what
    that is, also later: such a copy is made to be used at once."""
    remote = tensor.remote
    base = remote.base.remote if isinstance(remote, View) else remote
    if isinstance(base, LateCopy):  # a copy of a copy is rounded twice
        return LateCopy.holding(tensor.values().clone())
    copies = base.source.copies if isinstance(base, Stored) else None
    if copies is None or not isinstance(remote, Stored | View):
        return remote
    copied = LateCopy(remote, tensor.dtype)
    copies.add(copied)
    return copied


def handles(*operations: Any) -> Callable[[Handler], Handler]:
    """Registers what answers these operations: called with the operation and its arguments; NotImplemented leaves one to the
    fallback."""

    def register(handler: Handler) -> Handler:
        for operation in operations:
            HANDLERS[operation] = handler
        return handler

    return register

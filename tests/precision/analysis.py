"""A float64 computation that carries, beside every number, how far one in another dtype may be from it.

Every operation that PyTorch dispatches, those of autograd's backward pass included, goes through ``Analysis``, which
lets it run and writes the bound of its results (rules.py) into shadow memory: one error for each number of a storage,
so that views and writes through them need no rule of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.precision.bound import TINY, UNIT
from tests.precision.rules import EXACT, RULES

_BYTES = 1 << 26  # of new shadows, until those of memory that is gone are looked for


class Analysis(TorchDispatchMode):
    """Of a computation in ``dtype``.  Numbers that exist before are exact.

    wide: scores and the results of activations are in the sums' dtype, at least float32; else they too may be
    rounded to a ``dtype`` of 16 bits.  scale: a constant that products of them may be multiplied by afterwards, which
    counts where numbers are so small that their roundings are absolute.
    """

    def __init__(self, dtype: torch.dtype, wide: bool = True, scale: float = 1.0) -> None:
        super().__init__()
        self.stored, self.tiny = UNIT[dtype], TINY[dtype] * max(1.0, scale)
        self.sums = min(self.stored, UNIT[torch.float32])
        self.narrow = self.stored > self.sums
        self.wide = wide
        self._shadows: dict[int, tuple[StorageWeakRef, Tensor]] = {}
        self._new = 0  # bytes

    def error(self, x: Any) -> Tensor:
        """The bound of each of x's numbers; 0 for what isn't float64."""
        if not isinstance(x, Tensor) or x.dtype != torch.float64:
            return torch.zeros((), dtype=torch.float64)
        found = self._shadows.get(x.untyped_storage()._cdata)
        shadow = self._new_shadow(x) if found is None else found[1]
        return shadow.as_strided(x.shape, x.stride(), x.storage_offset())

    def derived(self, x: Tensor) -> bool:
        """Whether x has been computed, with roundings, rather than given."""
        return bool(self.error(x).any())

    def _new_shadow(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        self._new += storage.nbytes()
        if self._new > _BYTES:
            self._shadows = {key: kept for key, kept in self._shadows.items() if not kept[0].expired()}
            self._new = 0
        shadow = torch.zeros(storage.nbytes() // x.element_size(), dtype=torch.float64, device=x.device)
        # while the weak reference is held, nothing else gets this address
        self._shadows[storage._cdata] = (StorageWeakRef(storage), shadow)
        return shadow

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if not any(True for _ in _doubles((args, kwargs))) or func.is_view:
            return func(*args, **kwargs)
        if name in RULES:
            out = func(*args, **kwargs)
            if _tuple(out)[0].numel() == 0:
                return out
            errors = RULES[name](self, out, *args, **kwargs)
            for x, error in zip(_tuple(out), _tuple(errors)):
                if x is not None and error is not None and x.numel():
                    self._new_shadow(x)
                    self.error(x).copy_(error)
            return out
        base = name.removesuffix("_")
        if base != name and base in RULES:
            functional = getattr(getattr(torch.ops.aten, base), func._overloadname)
            out = functional(*args, **kwargs)
            error = RULES[base](self, out, *args, **kwargs)
            self.error(args[0]).copy_(error)
            return args[0].copy_(out)
        if name in EXACT:
            return func(*args, **kwargs)
        if func in decomposition_table:
            with self:
                return decomposition_table[func](*args, **kwargs)
        out = func(*args, **kwargs)
        if any(True for _ in _doubles(out)):
            raise NotImplementedError(f"tests/precision/rules.py has no rule for {func}")
        return out


def _doubles(tree: Any) -> Iterator[Tensor]:
    return (x for x in tree_leaves(tree) if isinstance(x, Tensor) and x.dtype == torch.float64)


def _tuple(x: Any) -> tuple[Any, ...]:
    return tuple(x) if isinstance(x, (tuple, list)) else (x,)

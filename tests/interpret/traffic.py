"""Counts what Triton kernels move: bytes of the lanes that the interpreter's loads and stores don't mask off.

Everything counts, so no temporary escapes; descriptors and weights are small beside a map, if the map is large enough.
Lanes of one load that share an address count once, as one instruction fetches a line once; two loads of it count twice.
"""

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder


class Traffic:
    """`with Traffic() as moved`: bytes in moved.read and moved.written."""

    def __enter__(self):
        self.read = self.written = 0
        self._kept = load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

        def counted(ptrs, mask):
            return np.unique(ptrs.data[mask.data.astype(bool)]).size * ptrs.get_element_ty().primitive_bitwidth // 8

        def counted_load(builder, ptrs, mask, *rest):
            self.read += counted(ptrs, mask)
            return load(builder, ptrs, mask, *rest)

        def counted_store(builder, ptrs, value, mask, *rest):
            self.written += counted(ptrs, mask)
            return store(builder, ptrs, value, mask, *rest)

        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = counted_load, counted_store
        return self

    def __exit__(self, *problem):
        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = self._kept

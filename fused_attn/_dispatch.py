"""Which backend runs first on a GPU, as measured: (op, architecture, class of size) -> backends.

Written by `python -m bench dispatch` from bench/results; not to be edited. Empty where no result is committed.
"""

TABLE: dict[tuple[str, str, str], tuple[str, ...]] = {}

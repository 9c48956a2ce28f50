"""How `pytest bench --benchmark-only` measures: one thread, the heap pinned before anything is allocated."""

from bench import measure

measure.prepare(measure.default_device())

"""Measurements of fused_attn, run from a checkout: `python -m bench --help`."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch loads: the profiler says on stderr that it runs

"""Measurements of fused_attn, run from a checkout: `python -m bench --help`."""

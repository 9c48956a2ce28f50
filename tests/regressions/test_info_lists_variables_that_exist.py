"""`python -m fused_attn.info` listed FUSED_ATTN_LOG, which nothing reads.

Cause: the list was written before what it lists. Found in review.
"""

from pathlib import Path

import pytest

from fused_attn import info

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", [name for name in info.VARIABLES if name.startswith("FUSED_ATTN_")])
def test_info_lists_variables_that_exist(name: str) -> None:
    files = [
        ROOT / "setup.py",
        *(path for where in ("fused_attn/**/*.py", "csrc/**/*.cpp") for path in ROOT.glob(where)),
    ]
    reads = (f'environ.get("{name}"', f'environ["{name}"]', f'getenv("{name}")')
    assert any(read in path.read_text() for path in files for read in reads)

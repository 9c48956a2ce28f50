"""Random calls of every op and block against float64: what the suites with chosen cases didn't think of.

    make test      the same examples each time
    make fuzz      others each time: EXAMPLES=100000 for more of them, SEED=7 for those of one seed

A failure is shrunk to the smallest call that shows it, and printed as a file for tests/regressions/.
"""

import os

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from fused_attn import backend
from tests import fuzzing

ASKED = int(os.environ.get("FUSED_ATTN_FUZZ", "0"))
EACH = -(-(ASKED or 2000) // len(fuzzing.SUBJECTS))
BACKENDS = ("auto", "eager", *(() if backend.extension() else ("cpp",)))


@pytest.mark.parametrize("name", fuzzing.SUBJECTS)
def test_random_calls(name: str) -> None:
    @settings(
        max_examples=EACH,
        derandomize=not ASKED,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
        report_multiple_bugs=False,
        phases=[Phase.reuse, Phase.generate, Phase.shrink],  # what explains a failure costs minutes
    )
    @given(fuzzing.examples(name, BACKENDS))
    def run(example: fuzzing.Example) -> None:
        fuzzing.check(example)

    before = len(fuzzing.forgiven)
    run()
    # What is ill posed is rare; a tolerance that has to be forgiven often is a wrong one, or a kernel is.
    assert len(fuzzing.forgiven) - before <= EACH // 20 + 3, fuzzing.forgiven[before:]

"""Random calls of every Triton kernel, in its interpreter, against float64: a few of each op's, of tiny maps."""

import os

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from fused_attn import OPS, testing
from tests import fuzzing

ASKED = int(os.environ.get("FUSED_ATTN_FUZZ", "0"))
NAMES = [n for n in fuzzing.SUBJECTS if n in OPS and testing.missing(OPS[n], "triton") is None]
EACH = max(4, ASKED // 50 // len(NAMES))  # a kernel costs a third of a second here
MOST = 700  # elements

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy, beyond a tensor's end


@pytest.mark.parametrize("name", NAMES)
def test_random_calls(name: str) -> None:
    @settings(
        max_examples=EACH,
        derandomize=not ASKED,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
        report_multiple_bugs=False,
        phases=[Phase.generate, Phase.shrink],
    )
    @given(fuzzing.examples(name, ["triton"], MOST))
    def run(example: fuzzing.Example) -> None:
        fuzzing.check(example)

    run()

"""The cases that ops declare for the bench, and how they are called."""

from fused_attn.registry import OPS, Case, Op

SE = "pool_mlp_scale"


def bench_ops() -> list[Op]:
    """The ops that declare cases for the bench."""
    return [op for op in OPS.values() if any("bench" in c.tags for c in op.cases)]


def bench_cases(op: Op) -> list[Case]:
    """An op's cases for the bench."""
    return [c for c in op.cases if "bench" in c.tags]


def label(op: Op, c: Case) -> str:
    """A case in a few words: the shape of its first argument, and the options that it sets."""
    first, *rest = c.args.items()
    words = ["x".join(map(str, first[1]))]
    for name, value in rest:
        if not isinstance(value, tuple):
            words.append(f"{name}={value}")
        elif name in op.maps:
            words.append(name)
    return " ".join(words)

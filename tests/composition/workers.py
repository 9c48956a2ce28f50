"""What the processes of test_processes.py run: importable by those that are spawned, and quick to import."""

import copy
import queue
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fused_attn.blocks import SqueezeExcite
from tests.composition.subjects import BLOCK_CASES, FEW, Subject, Tail, run, same

WORLD = 2
ROWS = 4  # of a batch, to be shared out
# Blocks whose parameters all processes hold, by the case with most of them.
SUBJECTS = [s for s in FEW if s.name.rpartition("-")[0] in BLOCK_CASES and any(True for _ in s.module().parameters())]


def loss(y: Tensor) -> Tensor:
    """A sum over samples, so that processes' losses add up."""
    return y.square().sum()


def whole(subject: Subject) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients by one process. Norms use running statistics: those of a batch would be its half's."""
    module = subject.module().eval()
    value = loss(module(*subject.maps(batch=ROWS)))
    value.backward()
    return float(value), {name: p.grad for name, p in module.named_parameters()}


def together(rank: int, folder: str) -> None:
    """One of two processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    try:
        for part in (data_parallel, fully_sharded, sharded_batch, synchronised):
            part(rank)
    finally:
        dist.destroy_process_group()


def share(maps: tuple[Tensor, ...], rank: int) -> list[Tensor]:
    return [x.chunk(WORLD)[rank].clone() for x in maps]


def total(value: Tensor) -> float:
    value = value.detach().clone()
    dist.all_reduce(value)
    return float(value)


def agrees(subject: Subject, value: float, grads: dict[str, Tensor | None], scale: float = 1.0) -> None:
    expected, wanted = whole(subject)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)
    assert list(grads) == list(wanted)
    unit = max(float(g.abs().max()) for g in wanted.values() if g is not None)
    for name, want in wanted.items():
        found = grads[name]
        if want is None:
            assert found is None or not found.any(), f"{subject}: {name}"
        else:
            torch.testing.assert_close(
                found * scale, want, rtol=1e-8, atol=1e-10 * unit, msg=lambda m, n=name: f"{subject}: {n}: {m}"
            )


def data_parallel(rank: int) -> None:
    for subject in SUBJECTS:
        module = nn.parallel.DistributedDataParallel(subject.module().eval(), find_unused_parameters=True)
        value = loss(module(*share(subject.maps(batch=ROWS), rank)))
        value.backward()
        grads = {name: p.grad for name, p in module.module.named_parameters()}
        agrees(subject, total(value), grads, WORLD)  # DDP averages


def fully_sharded(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (WORLD,))
    for subject in SUBJECTS:
        module = fully_shard(nn.Sequential(subject.module().eval()), mesh=mesh)
        value = loss(module(*share(subject.maps(batch=ROWS), rank)))
        value.backward()
        grads = {
            name.removeprefix("0."): None if p.grad is None else p.grad.full_tensor()
            for name, p in module.named_parameters()
        }
        agrees(subject, total(value), grads, WORLD)


def sharded_batch(rank: int) -> None:
    """DTensor: a batch in shards, replicated weights. Each process runs its own; gradients are sums of partial ones."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.experimental import local_map

    mesh = dist.init_device_mesh("cpu", (WORLD,))
    for subject in SUBJECTS:
        module = subject.module().eval()
        (x,) = subject.maps(batch=ROWS)
        x = distribute_tensor(x, mesh, [Shard(0)])
        on_each = local_map(module, out_placements=[Shard(0)], in_placements=([Shard(0)],), device_mesh=mesh)
        y = on_each(x)
        assert isinstance(y, DTensor)
        assert y.placements == (Shard(0),)
        value = loss(y.to_local())
        value.backward()
        grads = {}
        for name, p in module.named_parameters():
            grads[name] = None
            if p.grad is not None:
                grads[name] = DTensor.from_local(p.grad, mesh, [Partial()]).redistribute(mesh, [Replicate()]).to_local()
        agrees(subject, total(value), grads)


SHARDS = {"halves": (2, 2), "uneven": (3, 1), "one is empty": (4, 0)}


def tails() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "norm": Tail(None, 8).double(),
        "norm and gate": Tail(SqueezeExcite(8, rd_channels=4), 8).double(),
    }


def synchronised(rank: int) -> None:
    """A SyncBatchNorm that is computed with what follows it, beside one process with the whole batch: outputs,
    gradients and running statistics, where a process has fewer samples than the other, or none."""
    draw = torch.Generator().manual_seed(4)
    x, r, dy = (torch.randn(4, 8, 6, 5, generator=draw, dtype=torch.float64) for _ in range(3))
    for sizes in SHARDS.values():
        rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        for name, plain in tails().items():
            module = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
            leaves = [t[rows].clone().requires_grad_() for t in (x, r)]
            y = module(*leaves)
            y.backward(dy[rows])
            wholes = [t.clone().requires_grad_() for t in (x, r)]
            z = plain(*wholes)
            z.backward(dy)
            close = lambda a, b, what: torch.testing.assert_close(
                a, b, rtol=1e-9, atol=1e-11, msg=lambda m: f"{name}, {sizes}: {what}: {m}"  # noqa: B023
            )  # fmt: skip
            close(y, z[rows], "y")
            for leaf, other in zip(leaves, wholes, strict=True):
                close(leaf.grad, other.grad[rows], "dx")
            for (key, p), q in zip(module.named_parameters(), plain.parameters(), strict=True):
                grad = torch.zeros_like(p) if p.grad is None else p.grad.clone()
                dist.all_reduce(grad)
                close(grad, q.grad, key)
            for (key, b), c in zip(module.named_buffers(), plain.named_buffers(), strict=True):
                close(b, c[1], key)


def answers(module: nn.Module, maps: tuple[Tensor, ...], results: Any) -> None:
    """One forward and backward in another process."""
    torch.set_num_threads(1)
    y, grads = run(module, maps, [*module.parameters()])
    results.put((y.numpy(), [None if g is None else g.numpy() for g in grads]))


def compare(subject: Subject, module: nn.Module, results: Any) -> None:
    """What `answers` put there, beside this process."""
    try:
        y, grads = results.get(timeout=300)
    except queue.Empty:
        raise AssertionError(f"{subject}: no answer") from None
    same((torch.as_tensor(y), [None if g is None else torch.as_tensor(g) for g in grads]),
         run(module, subject.maps(), [*module.parameters()]))  # fmt: skip

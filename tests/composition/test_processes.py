"""Several processes: workers that are forked or spawned, weights in shared memory, and two processes of gloo that train
together, over every block. Each test starts its processes once, and all blocks run in them: starting is what costs.

GPUs: each test says what hardware it needs, and is skipped without.
"""

import multiprocessing
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.composition import workers
from tests.composition.subjects import FEW, run, same


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo")
def test_two_processes(tmp_path) -> None:
    """DistributedDataParallel, fully_shard, DTensor and SyncBatchNorm: losses and gradients are those of one process
    with the whole batch."""
    torch.multiprocessing.spawn(workers.together, (str(tmp_path),), nprocs=workers.WORLD)


def test_forked_worker_of_everything() -> None:
    """After this process has run kernels, as a loader's worker that augments by a network is. One worker for all."""
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("this system has no fork")
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    made = [(s, s.module()) for s in FEW]
    for subject, module in made:
        run(module.train(), subject.maps(), [*module.parameters()])
    for _, module in made:
        module.eval()

    def work() -> None:
        for subject, module in made:
            workers.answers(module, subject.maps(), results)

    worker = context.Process(target=work)
    worker.start()
    for subject, module in made:
        workers.compare(subject, module, results)
    worker.join(60)
    assert worker.exitcode == 0


def test_spawned_worker_with_shared_weights() -> None:
    """The weights lie in shared memory: a step that this process makes is seen by the next worker."""
    context = torch.multiprocessing.get_context("spawn")
    subject = next(s for s in FEW if s.name.startswith("cbam"))
    module = subject.module().eval().share_memory()
    assert all(p.is_shared() for p in module.parameters())
    for _ in range(2):
        results = context.Queue()
        worker = context.Process(target=workers.answers, args=(module, subject.maps(), results))
        worker.start()
        workers.compare(subject, module, results)
        worker.join(60)
        assert worker.exitcode == 0
        with torch.no_grad():
            for p in module.parameters():
                p.mul_(1.5)


GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
one_gpu = pytest.mark.skipif(GPUS < 1, reason="needs a CUDA GPU")
two_gpus = pytest.mark.skipif(GPUS < 2, reason="needs two CUDA GPUs")


@pytest.mark.gpu
@one_gpu
@pytest.mark.parametrize("subject", FEW, ids=str)
def test_cuda_graph(subject: Any) -> None:
    """A captured step, replayed with other numbers in its place."""
    module = subject.module(torch.float32).cuda().eval()
    place = [x.cuda() for x in subject.maps(torch.float32)]
    parameters = [*module.parameters()]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run_on_gpu(module, place, parameters)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run_on_gpu(module, place, parameters)
    for x in place:
        x.mul_(-1.5)
    graph.replay()
    same(found, run_on_gpu(module, place, parameters), 1e-4)


def run_on_gpu(module: Any, maps: Any, parameters: Any) -> Any:
    """`run`, without random numbers: what a graph can hold."""
    leaves = [x.detach().requires_grad_() for x in maps]
    y = module(*leaves)
    grads = torch.autograd.grad(y.square().sum(), [*leaves, *parameters], allow_unused=True)
    return y.detach(), list(grads)


@pytest.mark.gpu
@one_gpu
@pytest.mark.parametrize("subject", FEW, ids=str)
def test_streams(subject: Any) -> None:
    """Two streams at once."""
    module = subject.module(torch.float32).cuda().eval()
    maps = [[x.cuda() * k for x in subject.maps(torch.float32)] for k in (1, 2)]
    expected = [run_on_gpu(module, m, [*module.parameters()]) for m in maps]
    torch.cuda.synchronize()
    streams, found = [torch.cuda.Stream() for _ in maps], []
    for stream, m in zip(streams, maps, strict=True):
        with torch.cuda.stream(stream):
            found.append(run_on_gpu(module, m, [*module.parameters()]))
    torch.cuda.synchronize()
    for a, b in zip(found, expected, strict=True):
        same(a, b, 1e-5)


@pytest.mark.gpu
@two_gpus
@pytest.mark.parametrize("subject", FEW, ids=str)
def test_another_gpu_than_the_current(subject: Any) -> None:
    """The device guard: tensors on the second GPU while the first is current."""
    module = subject.module(torch.float32).eval()
    expected = run_on_gpu(module, subject.maps(torch.float32), [*module.parameters()])
    module.to("cuda:1")
    with torch.cuda.device(0):
        y, grads = run_on_gpu(module, [x.to("cuda:1") for x in subject.maps(torch.float32)], [*module.parameters()])
    same((y.cpu(), [g if g is None else g.cpu() for g in grads]), expected, 1e-4)

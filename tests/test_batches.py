from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn

from clip_index.encoders.batches import Batches, fill
from clip_index.encoders.compiled import Compiled

CPU = torch.device("cpu")
INPUTS = torch.randn(21, 3, generator=torch.Generator().manual_seed(0))


def unit(x):
    return (x / x.norm(dim=1, keepdim=True)).numpy()


class Watched(nn.Module):
    """Tells the shapes of what it is called with; more rows than `most` do not fit its memory."""

    def __init__(self, most=1000):
        super().__init__()
        self.most, self.seen = most, []

    def forward(self, x):
        self.seen.append(len(x))
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 2 * x


def test_blocks_of_a_fixed_shape_are_filled_and_cut():
    run, tower = Batches(CPU), Watched()
    for n, shape in ((5, 8), (3, 8), (8, 8), (9, 10), (2, 10)):
        found = run.run(tower, INPUTS[:n], 80, fixed=True)
        np.testing.assert_allclose(found, unit(INPUTS[:n]), rtol=1e-6)
        assert tower.seen.pop() == shape
    # 800 positions make blocks of 10, and no larger shape than that
    run.run(tower, INPUTS, 80, fixed=True)
    assert tower.seen == [10, 10, 10]
    assert run.run(tower, INPUTS[:3], 80).shape == (3, 3) and tower.seen.pop() == 3


def test_out_of_memory_loses_nothing():
    run, tower = Batches(CPU), Watched(most=4)
    np.testing.assert_allclose(run.run(tower, INPUTS, 80, fixed=True), unit(INPUTS), rtol=1e-6)
    assert tower.seen == [10, 5, 2, *[2] * 10]
    # the next call knows
    tower.seen.clear()
    run.run(tower, INPUTS[:7], 80, fixed=True)
    assert tower.seen == [2, 2, 2, 2]


def test_the_memory_of_a_failed_block_is_free_before_the_next_try():
    class Holder:
        pass

    alive = []

    def tower(x):
        import weakref

        holder = Holder()
        if len(x) > 2:
            alive.append(weakref.ref(holder))
            raise torch.OutOfMemoryError("CUDA out of memory")
        assert all(ref() is None for ref in alive)
        return x

    assert Batches(CPU).run(tower, INPUTS, 80).shape == (21, 3) and len(alive) == 2


def test_fill():
    assert fill(torch.tensor([[1, 2], [3, 4]]), 4).tolist() == [[1, 2], [3, 4], [3, 4], [3, 4]]
    block = torch.ones(2, 2)
    assert fill(block, 2) is block


class Device:
    """Streams and events that record what happens, in order."""

    def __init__(self, monkeypatch):
        self.told, self.current = [], "compute"
        device = self

        class Stream:
            def __init__(self, name):
                self.name = name

            def wait_stream(self, other):
                device.told.append((self.name, "waits for", other.name))

        class Event:
            def __init__(self, blocking):
                assert blocking

            def record(self, stream):
                device.told.append((stream.name, "records"))

            def synchronize(self):
                device.told.append(("host", "waits"))

        names = iter(["there", "back"])
        compute = Stream("compute")

        @contextmanager
        def stream(chosen):
            before, device.current = device.current, chosen.name
            yield
            device.current = before

        monkeypatch.setattr(torch.cuda, "Stream", lambda _: Stream(next(names)))
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: compute)
        monkeypatch.setattr(torch.cuda, "stream", stream)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: device.told.append(("host", "frees")))
        monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextmanager(lambda: (yield))())
        empty = torch.empty
        monkeypatch.setattr(torch, "empty", lambda shape, pin_memory: empty(shape))


class OnDevice(torch.Tensor):
    """A tensor of the CPU that says it is elsewhere."""

    host: Device

    @property
    def device(self):
        return torch.device("cuda")

    def pin_memory(self):
        self.host.told.append(("host", "pins"))
        return self

    def to(self, device, non_blocking):
        assert device.type == "cuda" and non_blocking
        self.host.told.append((self.host.current, "copies"))
        return self

    def record_stream(self, stream):
        self.host.told.append((stream.name, "uses"))


def test_copies_run_beside_the_computation(monkeypatch):
    device = OnDevice.host = Device(monkeypatch)
    run = Batches(torch.device("cuda"))
    run._positions = 400

    def tower(x):
        device.told.append((device.current, "computes"))
        if len(x) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x * 2

    found = run.run(tower, INPUTS.as_subclass(OnDevice), 10)
    np.testing.assert_allclose(found, unit(INPUTS), rtol=1e-6)
    there = [("host", "pins"), ("there", "copies"), ("compute", "waits for", "there"), ("compute", "uses")]
    back = [("back", "waits for", "compute"), ("back", "records"), ("back", "uses")]
    once = [*there, ("compute", "computes")]
    failed = [*once, ("host", "frees")]
    # 21 are too many, then 10, 10 and 1 follow without waiting; only then are they waited for
    assert device.told == failed + (once + back) * 3 + [("host", "waits")] * 3


def test_threads_take_turns(monkeypatch):
    run = Batches(CPU)
    run._turn = threading.Lock()
    inside = []

    def tower(x):
        inside.append(1)
        assert len(inside) == 1
        inside.pop()
        return x

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: run.run(tower, INPUTS, 80), range(20)):
            np.testing.assert_allclose(found, unit(INPUTS), rtol=1e-6)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_tower_is_compiled_once_it_pays(backend):
    tower = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2)).requires_grad_(False)
    compiled = Compiled(tower, 80, worth=2000, backend=backend)
    run = Batches(CPU)
    wanted = unit(tower(INPUTS))
    for _ in range(3):
        np.testing.assert_allclose(run.run(compiled, INPUTS, 80, fixed=True), wanted, rtol=1e-5, atol=1e-6)
    # 10 rows of 80 positions twice are worth nothing yet; the shape stays the same
    assert isinstance(compiled._run, torch._dynamo.eval_frame.OptimizedModule)
    torch._dynamo.reset()


def test_a_compiler_that_fails_is_done_without(caplog):
    calls = []

    def broken(graph, inputs):
        calls.append(graph)
        raise RuntimeError("no Triton,\n no C compiler")

    tower = nn.Linear(3, 2).requires_grad_(False)
    compiled = Compiled(tower, 1, worth=0, backend=broken)
    for _ in range(2):
        assert torch.equal(compiled(INPUTS), tower(INPUTS))
    assert len(calls) == 1
    (said,) = (record.getMessage() for record in caplog.records if record.name.startswith("clip_index"))
    assert said.startswith("the model runs uncompiled, as the compiler failed:") and "no Triton, no C" in said
    torch._dynamo.reset()


def test_memory_running_out_is_no_failure_of_the_compiler():
    compiled = Compiled(nn.Identity(), 1, worth=0, backend="eager")
    compiled._run = Watched(most=1)
    with pytest.raises(torch.OutOfMemoryError):
        compiled(INPUTS)
    assert compiled._run is not compiled.tower

"""Workers on GPUs: one for each, every one with a GPU of its own. No GPU is needed here."""

import os
import signal

import pytest
import torch

from retrace.analyze.arguments import choose_device
from retrace.analyze.workers.processes import Processes, WorkerDied
from retrace.analyze.workers.start import VISIBLE, WORTH_GPUS, gpu_environments, start_workers
from retrace.traces import RetraceError

CUDA = torch.device("cuda")


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which PyTorch finds two GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv(VISIBLE, raising=False)


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        (None, ["0", "1"]),
        ("5,2", ["5", "2"]),
        ("GPU-8932f937, GPU-d72e1ab4", ["GPU-8932f937", "GPU-d72e1ab4"]),
        ("3,1,-1,0", ["3", "1"]),  # those after a name that is none are not seen
    ],
)
def test_each_sees_one_of_those_that_are_seen(
    two_gpus: None, monkeypatch: pytest.MonkeyPatch, visible: str | None, names: list[str]
) -> None:
    if visible is not None:
        monkeypatch.setenv(VISIBLE, visible)
    assert gpu_environments(CUDA) == [{VISIBLE: name} for name in names]


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_a_device_that_is_named_is_everybodys(two_gpus: None, device: str) -> None:
    assert gpu_environments(torch.device(device)) == [{}]


@pytest.mark.parametrize(
    ("device", "asked", "work", "seen"),
    [
        ("cuda", None, WORTH_GPUS, ["0", "1"]),
        ("cuda", 3, 0.0, ["0", "0", "1"]),
        ("cuda:1", 2, 0.0, [None, None]),
    ],
)
def test_workers_take_the_gpus_in_turn(
    two_gpus: None, device: str, asked: int | None, work: float, seen: list[str | None]
) -> None:
    with start_workers(torch.device(device), asked, work) as (pool, count):
        assert isinstance(pool, Processes)
        assert count == len(pool.pids) == len(seen)
        # They can be called seconds after all have been asked, so that each answers once.
        answers = [pool.submit(os.getenv, VISIBLE) for _ in seen]
        assert sorted((answer.result() for answer in answers), key=str) == seen


@pytest.mark.parametrize(
    ("device", "work"), [("cuda", WORTH_GPUS / 2), ("cuda:1", WORTH_GPUS), ("cpu", 0.0)]
)
def test_one_gpu_or_little_work_takes_no_processes(
    two_gpus: None, device: str, work: float
) -> None:
    with start_workers(torch.device(device), None, work) as (pool, count):
        assert not isinstance(pool, Processes)
        assert count == (torch.get_num_threads() if device == "cpu" else 1)


def test_who_follows_a_dead_worker_takes_its_gpu() -> None:
    with Processes(2, [{VISIBLE: "GPU-a"}, {VISIBLE: "GPU-b"}]) as pool:
        first = pool.submit(os.getenv, VISIBLE).result()
        pool.submit(os.getenv, VISIBLE).result()
        died = pool.submit(os.kill, 0, signal.SIGKILL)  # its own group: itself
        with pytest.raises(WorkerDied):
            died.result()
        assert pool.submit(os.getenv, VISIBLE).result() == first


def test_a_gpu_that_is_not_there(two_gpus: None) -> None:
    assert choose_device("auto") == CUDA
    assert choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(RetraceError, match=r"no device 'cuda:2': PyTorch finds 2, from cuda:0"):
        choose_device("cuda:2")

"""The machine that a benchmark runs on, and the memory that this process has of it."""

import platform
from pathlib import Path

import torch


def processor(device: torch.device | str = "cpu") -> str:
    """The name of a GPU, or of the CPU as Linux knows it."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        facts = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        return next(
            line.partition(":")[2].strip() for line in facts.splitlines() if "model name" in line
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def resident(which: str) -> int:
    """Bytes that Linux counts of this process under a name in `/proc/self/status`: `VmRSS` are
    resident now, `VmHWM` at most so far, `VmData` are its data. What `getrusage` calls the peak
    begins with that of the process that started this one."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(which))

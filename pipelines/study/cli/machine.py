"""On what, and from which commit, a figure was made."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from pathlib import Path


def machine() -> dict:
    """Hardware, versions, commit (`+changes` where tracked files differ from it), date and load; JSON values."""
    import torch

    from teacher_cache.device import device_name
    from teacher_cache.extraction.record import software

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "hardware": {"cpu": _cpu(), "n_cpus": len(os.sched_getaffinity(0)), "gpu": gpu,
                     "device": device_name(torch.device("cuda" if gpu else "cpu"))},
        "versions": software(), "commit": _commit(), "date": time.strftime("%Y-%m-%d %H:%M"),
        "load_average": round(os.getloadavg()[0], 2), "threads": torch.get_num_threads(),
    }  # fmt: skip


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()

    try:
        head = git("rev-parse", "--short", "HEAD")
        return (head or "unknown") + "+changes" * bool(head and git("status", "--porcelain", "-uno"))
    except OSError:
        return "unknown"

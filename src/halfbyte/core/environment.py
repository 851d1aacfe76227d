"""The machine this process runs on: cores, name, peak memory. Imports no torch, so that small workers can use it."""

from __future__ import annotations

import os
import platform
import socket
import sys
from functools import cache
from urllib.parse import urlparse
from urllib.request import getproxies

import psutil


def cores() -> int:
    """CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def peak_process_memory() -> int:
    """Most resident bytes that this process has had so far, on Linux, macOS and Windows."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    if sys.platform == "linux":  # ru_maxrss would start at the parent's size: exec keeps it, a new address space not
        with open("/proc/self/status", encoding="ascii", errors="replace") as handle:
            return next(1024 * int(line.split()[1]) for line in handle if line.startswith("VmHWM"))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def cpu_name() -> str:
    """The processor's marketing name where the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as handle:
            for line in handle:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


TIMEOUT_SECONDS = 3.0


@cache
def reachable() -> bool:
    """False when offline mode is set or no connection can be opened; behind a proxy only the proxy is asked."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    proxies = getproxies()
    address = urlparse(
        proxies.get("https") or proxies.get("all") or os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    )
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((address.hostname, port), timeout=TIMEOUT_SECONDS).close()
    except (OSError, ValueError):
        return False
    return True

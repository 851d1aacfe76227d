"""Whether the Hugging Face hub can be reached, asked once and quickly: its own retries take half a minute."""

from __future__ import annotations

import os
import socket
from functools import cache
from urllib.parse import urlparse
from urllib.request import getproxies

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

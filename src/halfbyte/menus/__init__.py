"""What a search chooses from: activation bits for every unit, or a ggml type for every matrix. One file each."""

from __future__ import annotations

from halfbyte.core.registry import Registry

MENUS: Registry = Registry("menu", "halfbyte.menus", "MENU")

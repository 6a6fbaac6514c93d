"""Keys of a config that have another name now, so that an old file or flag is told the new one."""

from __future__ import annotations

OLD_KEYS: dict[str, str] = {}
"""The new key of an old one, such as "moe.router_map": "moe.router.map.kind". A key that ends with
a dot stands for all below it, of a section that has another name now."""


def new_key(key: str) -> str | None:
    """What a key is called now; None: it is no old key."""
    if key in OLD_KEYS:
        return OLD_KEYS[key]
    whole = key
    while "." in key:
        key = key.rpartition(".")[0]
        if f"{key}." in OLD_KEYS:
            return OLD_KEYS[f"{key}."] + whole[len(key) + 1 :]
    return None

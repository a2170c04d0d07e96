"""Bytes as people read them, in a screen, a log and a reason alike: GiB and its kin. Pure; imports nothing."""

_KIBI = 1024


def human_bytes(size_bytes: int) -> str:
    """1536 -> "1.5 KiB", 24 << 30 -> "24.0 GiB"."""
    if size_bytes < _KIBI:
        return f"{size_bytes} B"
    size = size_bytes / _KIBI
    for unit in ("KiB", "MiB", "GiB"):
        if size < _KIBI:
            return f"{size:.1f} {unit}"
        size /= _KIBI
    return f"{size:.1f} TiB"

"""Format shares, bytes, times and counts, the same way in every message, table and page."""

_BYTES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def percent(share: float, digits: int = 1) -> str:
    """A share of 1 in a sentence: `43.7 %`."""
    return f"{100 * share:.{digits}f} %"


def in_percent(share: float | None) -> str:
    """A share of 1 in a table whose heading says percent: `43.7`; a dash if there is none."""
    return "-" if share is None else f"{100 * share:.1f}"


def size(count: float) -> str:
    """Bytes of files: `4.9 MB`."""
    for unit, name in _BYTES:
        if count >= unit:
            return f"{count / unit:,.1f} {name}"
    return f"{count:,.0f} bytes"


def gib(count: float) -> float:
    """Bytes of memory, in GiB."""
    return count / 2**30


def memory(count: float) -> str:
    """Bytes of memory: `1.5 GiB`."""
    return f"{gib(count):,.1f} GiB"


def duration(seconds: float) -> str:
    """A time: `8.2s`, `3m12s`, `2h05m`."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


def counted(count: int, noun: str) -> str:
    """A count with its noun: `1 set`, `2,000 sets`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def signed_points(share: float) -> str:
    """A difference of two shares of 1 in points: +1.2, 0.0, or with a true minus sign."""
    points = round(100 * share, 1)
    return f"{points:+.1f}".replace("-", "\N{MINUS SIGN}") if points else "0.0"


def shortened(text: str, most: int) -> str:
    """A text with at most so many characters; the end of a longer one becomes dots and its length."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"

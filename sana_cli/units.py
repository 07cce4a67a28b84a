"""Readable sizes, times, orders and JSON."""

import json
import re
from typing import Any


def human_bytes(count: float) -> str:
    """1234567 -> '1.2 MB'."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def human_time(seconds: float) -> str:
    """75 -> '1:15'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def natural(text: str) -> list[tuple[int, str]]:
    """A key that sorts numbers in texts by their value: a2 before a10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text) if part]


def as_json(content: Any, indent: int | None = None) -> str:
    """JSON with readable text; escaped if UTF-8 cannot encode it, as some file names."""
    text = json.dumps(content, indent=indent, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(content, indent=indent)
    return text


def human_factor(times: float) -> str:
    """How many times as large, such as x1.7."""
    return f"x{times:.1f}" if times < 10 else f"x{times:,.0f}"

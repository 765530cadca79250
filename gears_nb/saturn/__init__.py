"""Species whose genes have other names: `from gears_nb.saturn import Saturn`."""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["Saturn"]

if TYPE_CHECKING:  # at run time it is imported when it is first asked for: torch takes seconds
    from .saturn import Saturn


def __getattr__(name: str) -> Any:
    if name != "Saturn":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .saturn import Saturn

    return Saturn

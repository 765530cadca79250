"""Expression as a sum over contexts: `from gears_nb.cycle import CycleAE`."""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["CycleAE"]

if TYPE_CHECKING:  # at run time it is imported when it is first asked for: torch takes seconds
    from .cycle import CycleAE


def __getattr__(name: str) -> Any:
    if name != "CycleAE":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .cycle import CycleAE

    return CycleAE

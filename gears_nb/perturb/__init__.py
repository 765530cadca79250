"""Cells under drugs, guides and doses that nobody measured: `from gears_nb.perturb import Perturb`."""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["Perturb"]

if TYPE_CHECKING:  # at run time it is imported when it is first asked for: torch takes seconds
    from .perturb import Perturb


def __getattr__(name: str) -> Any:
    if name != "Perturb":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .perturb import Perturb

    return Perturb

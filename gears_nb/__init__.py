"""Pose-free spatial geometry for cells that have only gene expression: `from gears_nb import Gears`."""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Gears", "InputError", "__version__", "profile", "read"]

if TYPE_CHECKING:  # what editors and type checkers see; at run time each name is imported when it is first asked for
    from .core.errors import InputError
    from .data.readers import read
    from .reconstruct.facade import Gears
    from .reconstruct.settings import profile

_HOMES = {
    "Gears": "gears_nb.reconstruct.facade",
    "InputError": "gears_nb.core.errors",
    "profile": "gears_nb.reconstruct.settings",
    "read": "gears_nb.data.readers",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use: torch takes seconds, and `gears --help` should not."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Read once by the server of `forks`, so that no page reads it again: the digests of all modules (a second of a page's time).

They are kept by path and time of change, so that a module that is edited is read anew.
"""
from gears_nb.lab.digests import PACKAGE, closure

closure(path.relative_to(PACKAGE).with_suffix("").as_posix() for path in sorted(PACKAGE.glob("*/*.py")))

"""``make wheel``'s last step: the built wheel and sdist hold what they must, and nothing else.

python tests/check_dist.py dist
"""

from __future__ import annotations

import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("calibration", "export", "profiling", "runtime", "serving", "trio")
LARGEST_WHEEL = 20_000_000
PACKAGED = "trio_edge/profiling/check/bundle/trio.json"
"""Files that ``make wheel`` adds for ``trio-check``; git has no copy."""


def problems(folder: Path, *, is_release: bool = False) -> list[str]:
    """Return what is wrong with the files in ``folder``, one line each; a release also has the graphs of the packaged model."""
    (wheel,) = folder.glob("*.whl")
    (sdist,) = folder.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = set(archive.namelist())
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    return [
        *(f"{wheel.name}: expected {name}, got none" for name in sorted(_expected() - in_wheel)),
        *(
            [f"{wheel.name}: expected {PACKAGED}, got none"]
            if is_release and PACKAGED not in in_wheel
            else []
        ),
        *(f"{wheel.name}: expected no {name}, got it" for name in sorted(in_wheel) if not _belongs(name)),
        *(f"{sdist.name}: expected {name}, got none" for name in sorted(_sources() - in_sdist)),
        *([f"{wheel.name}: expected at most 20 MB"] if wheel.stat().st_size > LARGEST_WHEEL else []),
    ]


def _sources() -> set[str]:
    """Return the modules and data files of all packages, as paths from the root."""
    files = (path for top in FOLDERS for path in (ROOT / top).rglob("*") if path.is_file())
    return {
        str(path.relative_to(ROOT))
        for path in files
        if "__pycache__" not in path.parts and path.suffix != ".md"
    }


def _expected() -> set[str]:
    others = {"optimum/commands/register/register_trio_edge.py", "trio_edge/__init__.py"}
    return others | {f"trio_edge/{name}" for name in _sources()}


def _belongs(name: str) -> bool:
    return name in _expected() or ".dist-info/" in name


def main(argv: list[str]) -> int:
    """Print the problems; 2 if there are any."""
    found = problems(Path(argv[0]), is_release=True)
    print("\n".join(found) or f"{argv[0]}: wheel and sdist are complete")
    return 2 if found else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

"""A copy of the program in the run directory, so that what is edited later does not change a job in the queue."""

from __future__ import annotations

import errno
import hashlib
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import dinoreg
from dinoreg.config import ConfigError

PARTS = ("dinoreg", "launch", "eval", "configs")  # what a run may need; each where it exists
# Python runs a folder by this file, and finds the packages beside it before any others.
MAIN = '"""`python` with this folder as its script is `dinoreg` as it was when the run was launched."""\n\
from dinoreg.cli import main\n\nif __name__ == "__main__":\n    main()\n'


@dataclass(frozen=True)
class Snapshot:
    """folder: run_dir/code/<digits of its content>. commit: of the checkout, with + where files differ from it."""

    folder: Path
    commit: str = ""


def take_snapshot(run_dir: Path) -> Snapshot:
    """Copy the program that is running now. The same content is the same folder, which is then left as it is."""
    root = Path(dinoreg.__file__).resolve().parents[1]
    files = _files(root)
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file}\n".encode() + (root / file).read_bytes() + b"\n")
    folder = run_dir / "code" / digest.hexdigest()[:12]
    commit, difference = _commit(root)
    if not folder.exists():
        try:
            _copy(root, files, folder, commit, difference)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise ConfigError(f"no room for a copy of the program in {run_dir}: {error.strerror}") from None
    return Snapshot(folder, commit)


def _files(root: Path) -> list[Path]:
    """Below root: what git knows or would add, or in an installed package all that is no bytecode."""
    parts = [part for part in PARTS if (root / part).is_dir()]
    listed = _git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *parts)
    if listed is not None:
        files = {Path(name) for name in listed.split("\0") if name}
    else:
        files = {path.relative_to(root) for part in parts for path in (root / part).rglob("*")}
    return sorted(file for file in files if (root / file).is_file() and "__pycache__" not in file.parts)


def _copy(root: Path, files: list[Path], folder: Path, commit: str, difference: str) -> None:
    """Into another folder first: whoever finds the right name finds everything."""
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for file in files:
        target = partial / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / file, target)
    (partial / "__main__.py").write_text(MAIN)
    (partial / "commit.txt").write_text(f"{commit or 'no git checkout'}\n")
    (partial / "changes.diff").write_text(difference)
    partial.rename(folder)


def _commit(root: Path) -> tuple[str, str]:
    """The commit, with + where files differ from it, and how they differ."""
    commit = (_git(root, "rev-parse", "HEAD") or "").strip()
    difference = _git(root, "diff", "HEAD", "--", *PARTS) or ""
    return (f"{commit}+" if difference else commit), difference


def _git(root: Path, *words: str) -> str | None:
    """What git says, or None where root is not the top of a checkout."""
    if not (root / ".git").exists():
        return None
    try:
        # Somebody else's checkout is only read here, which git refuses unless told.
        command = ["git", "-c", f"safe.directory={root}", "-C", str(root), *words]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None

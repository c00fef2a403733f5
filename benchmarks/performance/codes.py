"""The codes that are compared: this one, and that of another commit in a git worktree of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The repository."""

PARTS = ("pipeline", "stages", "model", "simulation")
"""Its folders that are installed below ``sgclassify``."""


@dataclass(frozen=True)
class Code:
    """A state of the program: `name` for the table, `path` for PYTHONPATH; None for the installed one."""

    name: str
    path: Path | None

    def environment(self, **more: str) -> dict[str, str]:
        """Environment of a process that runs this code and finds the benchmarks."""
        before = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        own = [str(self.path)] if self.path is not None else [p for p in before if p]
        path = os.pathsep.join([*own, str(ROOT / "benchmarks")])
        return {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", **more}


THIS = "this"


def this_code() -> Code:
    """The code that this process runs."""
    return Code(THIS, None)


def code_of(commit: str, folder: Path) -> Code:
    """The code of a commit, checked out below ``folder`` if it is not there yet."""
    sha = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--verify", f"{commit}^{{commit}}"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    tree = folder / "codes" / sha[:12]
    if not (tree / "pipeline").is_dir():
        tree.parent.mkdir(parents=True, exist_ok=True)
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "prune"], check=True, capture_output=True)
        subprocess.run([*git, "add", "--force", "--detach", str(tree), sha], check=True, capture_output=True)
    names = tree / "build" / "namespace" / "sgclassify"
    names.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        link = names / part
        if not link.is_symlink():
            link.symlink_to(tree / part)
    return Code(sha[:7], names.parent)


def commit_of(root: Path = ROOT) -> str:
    """The commit that a repository stands at, with a plus if files differ from it; a question mark outside of git."""
    try:
        describe = ["git", "-C", str(root), "describe", "--always", "--abbrev=7", "--dirty=+", "--exclude=*"]
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "?"


def python(*arguments: str) -> list[str]:
    """Command line of this interpreter."""
    return [sys.executable, *arguments]

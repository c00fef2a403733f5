"""Draw the structure of the code from its imports: which package uses which, and what goes against the rules.

    python docs/structure.py            the diagram of the architecture page, as text
    python docs/structure.py --check    what goes against the rules; exit code 1 if there is anything
    python docs/structure.py --write    put the diagram into docs/architecture.md

The rules:

- The four parts are layers: pipeline, model, simulation, stages. A module imports its own layer and lower ones.
- No import circle between modules. Imports within functions and below ``TYPE_CHECKING`` count too.
- In stages, only read/ and write/ open files.
"""

from __future__ import annotations

import argparse
import ast
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAMESPACE = "sgclassify"
LAYERS = ("pipeline", "model", "simulation", "stages")
"""The parts, the highest first."""

FILE_ROOMS = ("stages.read", "stages.write")
"""The packages of stages that may open files."""

WIDTH = 84
"""Characters between the walls of the diagram."""

OPENED_BY_DESIGN = {
    "stages.program": "reads the program's own sources to make their digest",
}
"""Modules of stages that open files although they lie elsewhere, and why."""

OPENERS = frozenset(
    {
        "open", "fdopen", "memmap", "mmap",
        "read_bytes", "read_text", "write_bytes", "write_text",
        "load", "loadtxt", "genfromtxt", "fromfile", "tofile", "save", "savez", "savez_compressed", "savetxt",
        "read_table", "read_csv", "read_parquet", "read_schema", "read_metadata", "write_table", "write_metadata",
        "write_dataset", "ParquetFile", "ParquetWriter", "to_parquet", "to_csv",
    }
)  # fmt: skip
"""Names of functions and methods that open a file, in the standard library and the libraries in use."""


@dataclass
class Structure:
    """What the sources say.

    Attributes
    ----------
    imports : dict of str to set of str
        For each module, such as ``stages.read.header``, the project's modules that it imports.
    opened : dict of str to list of tuple of (int, str)
        For each module, line and name of every call that opens a file.
    summaries : dict of str to str
        First line of the docstring of each package.
    """

    imports: dict[str, set[str]] = field(default_factory=dict)
    opened: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    summaries: dict[str, str] = field(default_factory=dict)


def read_structure(root: Path = ROOT) -> Structure:
    """Parse every module of the four parts below ``root``; none is imported."""
    sources: dict[str, ast.Module] = {}
    structure = Structure()
    packages = set(LAYERS)
    for part in LAYERS:
        for path in sorted((root / part).rglob("*.py")):
            words = path.relative_to(root).with_suffix("").parts
            name = ".".join(words[:-1] if words[-1] == "__init__" else words)
            sources[name] = ast.parse(path.read_text(encoding="utf-8"), str(path))
            if words[-1] == "__init__":
                packages.add(name)
                structure.summaries[name] = (ast.get_docstring(sources[name]) or "").partition("\n")[0]
    known = set(sources) | packages
    for name, tree in sources.items():
        structure.imports[name] = set(imported(tree, known)) - {name}
        structure.opened[name] = list(opened(tree))
    return structure


def imported(tree: ast.Module, known: set[str]) -> Iterator[str]:
    """The project's modules that a module imports, wherever the import stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None and not node.level:
            # `from package import module` is the module; `from module import name` is the module too
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [n if n.removeprefix(f"{NAMESPACE}.") in known else node.module for n in names]
        else:
            continue
        for name in names:
            if name.startswith(f"{NAMESPACE}."):
                short = name.removeprefix(f"{NAMESPACE}.")
                while short not in known:
                    # `import package.module.name` and names that only exist at run time
                    short, dot, _ = short.rpartition(".")
                    if not dot:
                        raise ImportError(f"{name} is not in the four parts")
                yield short


def opened(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and name of every call that opens a file; the readers and writers of the project itself do not count."""
    own: set[str] = set()
    foreign: set[str] = set()
    buffers: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            ours = isinstance(node, ast.ImportFrom) and (node.module or "").startswith(NAMESPACE)
            names = {alias.asname or alias.name.partition(".")[0] for alias in node.names}
            (own if ours else foreign).update(names)
        elif isinstance(node, ast.Assign) and ast.unparse(node.value) == "io.BytesIO()":
            buffers.update(ast.unparse(target) for target in node.targets)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or (node.args and ast.unparse(node.args[0]) in buffers):
            continue
        called = node.func
        if isinstance(called, ast.Name):
            # another bare name is an argument or a function of the module itself
            if called.id == "open" or (called.id in foreign and called.id in OPENERS):
                yield node.lineno, called.id
        elif isinstance(called, ast.Attribute) and called.attr in OPENERS and ast.unparse(called.value) not in own:
            yield node.lineno, ast.unparse(called)


def circles(imports: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or through others (Tarjan's strong components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(imports.get(name, ())):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                found.append(sorted(group))

    for name in sorted(imports):
        if name not in index:
            visit(name)
    return sorted(found)


def layer(module: str) -> int:
    """Number of a module's layer, 0 for the highest."""
    return LAYERS.index(module.partition(".")[0])


def faults(structure: Structure) -> list[str]:
    """What goes against the rules, one sentence each."""
    found = [f"import circle: {', '.join(group)}" for group in circles(structure.imports)]
    for module, others in sorted(structure.imports.items()):
        found += [
            f"{module} imports {other}, which is a higher layer"
            for other in sorted(others)
            if layer(other) < layer(module)
        ]
    for module, calls in sorted(structure.opened.items()):
        if module.startswith("stages.") and room(module) not in FILE_ROOMS and module not in OPENED_BY_DESIGN:
            found += [f"{module} opens a file in line {line}: {name}" for line, name in calls]
    return found


def room(module: str, packages: Iterable[str] = ()) -> str:
    """The package that a module lies in, such as ``pipeline`` or ``pipeline.record``."""
    return module if module in packages else module.rpartition(".")[0] or module


def diagram(structure: Structure) -> str:
    """The layers as boxes: each package with what it is for and the packages that it uses."""
    uses: dict[str, set[str]] = {name: set() for name in structure.summaries}
    for module, others in structure.imports.items():
        own = room(module, structure.summaries)
        uses[own].update({room(other, structure.summaries) for other in others} - {own})
    text = []
    for part in LAYERS:
        text.append("┌" + "─" * WIDTH + "┐")
        for name in sorted(package for package in uses if package.partition(".")[0] == part):
            below = sorted(uses[name], key=lambda other: (layer(other), other))
            label = f" {name.replace('.', '/') + '/':<19}"
            text += _beside(label, structure.summaries[name])
            text += _beside(
                " " * len(label), "uses " + (", ".join(b.replace(".", "/") for b in below) or "none of them")
            )
        text.append("└" + "─" * WIDTH + "┘")
        if part != LAYERS[-1]:
            text.append(" " * (WIDTH // 2) + "▼")
    return "\n".join(text)


def _beside(label: str, text: str) -> list[str]:
    """Lines of a box: the label, and the text wrapped beside it."""
    rows = textwrap.wrap(text, WIDTH - len(label) - 1)
    return [f"│{(label if k == 0 else ' ' * len(label)) + row:<{WIDTH}}│" for k, row in enumerate(rows)]


BEGIN, END = "<!-- structure: begin -->", "<!-- structure: end -->"


def with_diagram(page: str, drawn: str) -> str:
    """The text of a page with the diagram between its two marks."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page needs the marks {BEGIN} and {END}")
    return f"{before}{BEGIN}\n```text\n{drawn}\n```\n{END}{after}"


def main() -> int:
    """Print, check or write the structure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    structure = read_structure()
    if given.check:
        found = faults(structure)
        sys.stdout.write("".join(f"{fault}\n" for fault in found))
        return int(bool(found))
    drawn = diagram(structure)
    if given.write:
        page = ROOT / "docs" / "architecture.md"
        page.write_text(with_diagram(page.read_text(encoding="utf-8"), drawn), encoding="utf-8")
    else:
        sys.stdout.write(f"{drawn}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The layers: imports run strictly downward, function-level and type-only ones included.

Rows are those of docs/architecture.md. A unit is a module or a folder right under `vtts_rt/`;
two units of one row never import each other, files inside one folder may, without cycles.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

ROWS: dict[int, tuple[str, ...]] = {
    11: ("__main__",),
    10: ("cli",),
    9: ("cluster",),
    8: ("server", "train", "integrations"),
    7: ("rollout", "evaluation", "report", "bench"),
    6: ("runtime",),
    5: ("rounds",),
    4: ("engine",),
    3: ("models", "data"),
    2: ("ops", "video", "perception"),
    1: (
        *("types", "errors", "checks", "checkout", "config", "files", "process"),
        *("sampling", "sampling_rules", "sdk"),
    ),
    0: ("kernels", "_C", "_build_info"),
}
# One noun in several files without a folder of its own: file -> unit.
PART_OF = {"environment": "cli", "rollout_command": "cli", "workers": "cluster"}
ROW = {unit: row for row, units in ROWS.items() for unit in units}
# config checks its values with checks and types.require and names the literals of types.
SAME_ROW = {("config", "types"), ("config", "checks"), ("checks", "types")}
SAME_ROW |= {("sampling", "types"), ("types", "sampling_rules"), ("types", "errors")}
# Compiled and generated code is behind ops; what was built is also reported by the CLI.
ROW_0_USERS = {"kernels": {"ops"}, "_C": {"ops"}, "_build_info": {"ops", "cli"}}

# pyproject.toml's dependencies, and what transformers itself always brings.
BASE_DEPENDENCIES = {"torch", "transformers", "safetensors", "numpy", "av", "rich"}
BASE_DEPENDENCIES |= {"tokenizers", "huggingface_hub", "PIL"}
KERNEL_DEPENDENCIES = {"torch", "triton"}
# Modules that define a class on one of an optional dependency: only functions import them.
IMPORTED_LATE = {"vtts_rt.train.trl": {"trl", "datasets"}}
MAX_LINES = 420

SOURCES = {
    **{path: path.relative_to(ROOT) for path in sorted((ROOT / "vtts_rt").rglob("*.py"))},
    **{
        path: Path("vtts_rt") / path.relative_to(ROOT)
        for path in sorted((ROOT / "kernels").rglob("*.py"))
    },
}


def module_name(installed: Path) -> str:
    """Dotted name of a file at its installed path (`kernels/` installs as vtts_rt.kernels)."""
    parts = installed.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(installed): path for path, installed in SOURCES.items()}
PACKAGES = {name for name, path in MODULES.items() if path.name == "__init__.py"}
TREES = {name: ast.parse(path.read_text(), str(path)) for name, path in MODULES.items()}


def lazy_homes() -> dict[str, str]:
    """The PEP 562 table of vtts_rt/__init__.py: public name -> module it lives in."""
    for node in TREES["vtts_rt"].body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_MODULES":
            table: dict[str, tuple[str, ...]] = ast.literal_eval(node.value)
            return {name: module for module, names in table.items() for name in names}
    raise AssertionError("vtts_rt/__init__.py must hold the _MODULES table")


HOMES = lazy_homes()


def absolute(module: str, node: ast.ImportFrom) -> str:
    """The dotted module an ImportFrom names, relative imports resolved."""
    if node.level == 0:
        return node.module or ""
    package = module.split(".") if module in PACKAGES else module.split(".")[:-1]
    base = package[: len(package) - node.level + 1]
    return ".".join([*base, *([node.module] if node.module else [])])


def targets_of(module: str, node: ast.AST) -> Iterator[str]:
    """Dotted names of what one statement or expression of `module` imports."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = absolute(module, node)
        for alias in node.names:
            whole = f"{base}.{alias.name}"
            if base == "vtts_rt" and alias.name in HOMES:
                yield HOMES[alias.name]
            elif whole in MODULES or whole.removeprefix("vtts_rt.") in ROW:
                yield whole
            else:
                yield base
    elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "vtts_rt":
        # `vtts_rt.Runtime` loads its home as an import would.
        if node.attr in HOMES:
            yield HOMES[node.attr]
        elif node.attr in ROW:
            yield f"vtts_rt.{node.attr}"
    elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in (
        "import_module",
        "__import__",
    ):
        first = node.args[0] if node.args else None
        if isinstance(first, ast.Constant) and isinstance(first.value, str):
            yield first.value


def imports(module: str) -> list[tuple[int, str]]:
    """(line, dotted target) of every import in a module, wherever it stands."""
    return [
        (getattr(node, "lineno", 0), target)
        for node in ast.walk(TREES[module])
        for target in targets_of(module, node)
    ]


def unit_of(dotted: str) -> str | None:
    """The unit a dotted name belongs to; None outside the package and for its lazy root."""
    parts = dotted.split(".")
    if parts[0] != "vtts_rt" or len(parts) == 1:
        return None
    return PART_OF.get(parts[1], parts[1])


def edges() -> list[tuple[str, str, str, str]]:
    """(importing unit, imported unit, place, target) of every import that crosses units."""
    found = []
    for module in MODULES:
        source = unit_of(module)
        if source is None:
            continue  # the lazy root: test_the_lazy_root_imports_nothing
        for line, target in imports(module):
            to = unit_of(target)
            if to is not None and to != source:
                where = f"{MODULES[module].relative_to(ROOT)}:{line}"
                found.append((source, to, where, target))
    return found


def test_every_module_has_a_row() -> None:
    unknown = sorted({unit_of(m) or "" for m in MODULES} - set(ROW) - {""})
    assert not unknown, f"not in the table of layers: {unknown}"


def test_imports_by_name_name_a_literal() -> None:
    """A computed name would escape this file; the CLI and the lazy root are above all rows, and
    what `checkout` imports is above the package."""
    computed = [
        f"{module}:{node.lineno}"
        for module in MODULES
        if unit_of(module) not in (None, "cli", "checkout")
        for node in ast.walk(TREES[module])
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__")
        and not isinstance(node.args[0], ast.Constant)
    ]
    assert not computed, computed


def test_every_folder_is_a_package() -> None:
    """Without `__init__.py` a folder would be left out of wheels."""
    folders = {path.parent for path in SOURCES}
    assert not [str(f.relative_to(ROOT)) for f in folders if not (f / "__init__.py").exists()]


def test_imports_run_strictly_downward() -> None:
    wrong = [
        f"{where}: {source} (row {ROW[source]}) imports {target}"
        for source, to, where, target in edges()
        if (source, to) not in SAME_ROW and ROW.get(to, 99) >= ROW[source]
    ]
    assert not wrong, "\n".join(wrong)


def test_compiled_code_is_reached_through_ops_only() -> None:
    wrong = [
        f"{where}: {source} imports {target}"
        for source, to, where, target in edges()
        if source not in ROW_0_USERS.get(to, {source})
    ]
    assert not wrong, "\n".join(wrong)


def test_families_are_known_to_the_registry_only() -> None:
    """Nothing outside its folder imports a family, writes its name, a special token or the size of
    its merged tokens and patch rows."""
    folders = [path.parent for path in (ROOT / "vtts_rt/models").glob("*/__init__.py")]
    names = re.compile("|".join([*(folder.name for folder in folders), r"<\|\w+\|>"]), re.I)
    sizes = {28, 28 * 28, 1176, 1536}
    homes = {ROOT / "vtts_rt/models/registry.py"}
    wrong = [
        str(path.relative_to(ROOT))
        for path, installed in SOURCES.items()
        if not {path, *path.parents} & {*homes, *folders, ROOT / "vtts_rt/bench"}
        and (
            names.search(text := path.read_text())
            or sizes & {n.value for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Constant)}
        )
    ]
    assert folders and not wrong, wrong


def test_engine_never_reaches_video() -> None:
    graph: dict[str, set[str]] = {}
    for source, to, _, _ in edges():
        graph.setdefault(source, set()).add(to)
    reached, frontier = set(), {"engine"}
    while frontier:
        unit = frontier.pop()
        reached.add(unit)
        frontier |= graph.get(unit, set()) - reached
    assert "video" not in reached, f"engine reaches {sorted(reached)}"


def test_the_lazy_root_imports_nothing() -> None:
    """Its table and its TYPE_CHECKING block are the one exception to the rows."""
    eager = []
    for node in TREES["vtts_rt"].body:
        guarded = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if not guarded:
            eager += [t for sub in ast.walk(node) for t in targets_of("vtts_rt", sub)]
    assert not [name for name in eager if name.split(".")[0] not in sys.stdlib_module_names]


def test_the_lazy_table_is_the_public_list() -> None:
    names: dict[str, str] = {}
    for node in ast.walk(TREES["vtts_rt"]):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vtts_rt"):
            names.update((alias.name, node.module or "") for alias in node.names)
    assert names == HOMES, "the TYPE_CHECKING block and _MODULES must name the same modules"


def test_no_import_cycles() -> None:
    graph = {
        m: sorted({t for _, t in imports(m) if t in MODULES} - {m, "vtts_rt"}) for m in MODULES
    }
    graph["vtts_rt"] = []
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for target in graph[module]:
                visit(target, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_kernels_import_torch_and_triton_only() -> None:
    wrong = [
        f"{module}:{line}: {target}"
        for module in MODULES
        if unit_of(module) == "kernels"
        for line, target in imports(module)
        if unit_of(target) != "kernels"
        and target.split(".")[0] not in KERNEL_DEPENDENCIES | sys.stdlib_module_names
    ]
    assert not wrong, "\n".join(wrong)


def module_level(tree: ast.AST) -> Iterator[ast.AST]:
    """Nodes that run at import: not inside functions, not under TYPE_CHECKING."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from module_level(child)


def third_party(module: str) -> list[str]:
    """Top-level packages outside the standard library that importing `module` imports itself."""
    roots = {
        target.split(".")[0]
        for node in module_level(TREES[module])
        if not isinstance(node, ast.Attribute)
        for target in targets_of(module, node)
    }
    return sorted(roots - sys.stdlib_module_names - {"vtts_rt"})


def test_optional_dependencies_are_imported_late() -> None:
    wrong = {
        module: extra
        for module in MODULES
        if unit_of(module) != "kernels"
        and (
            extra := set(third_party(module)) - BASE_DEPENDENCIES - IMPORTED_LATE.get(module, set())
        )
    }
    assert not wrong, wrong


def test_modules_over_optional_dependencies_are_imported_late() -> None:
    wrong = [
        (module, target)
        for module in MODULES
        for node in module_level(TREES[module])
        if not isinstance(node, ast.Attribute)
        for target in targets_of(module, node)
        if target in IMPORTED_LATE
    ]
    assert not wrong, wrong


def test_private_names_stay_in_their_modules() -> None:
    """Of the package and of bench/; compiled modules have names with an underscore."""
    bench = sorted((ROOT / "bench").rglob("*.py"))
    trees = {MODULES[module]: tree for module, tree in TREES.items()}
    trees |= {path: ast.parse(path.read_text(), str(path)) for path in bench}
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {alias.name} of {node.module}"
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if re.match("_[^_]", alias.name) and alias.name not in ROW
    ]
    assert not wrong, "\n".join(wrong)


def test_perception_is_pure_python() -> None:
    wrong = {
        module: names
        for module in MODULES
        if unit_of(module) == "perception"
        and (
            names := {t.split(".")[0] for _, t in imports(module)} & {"torch", "av", "transformers"}
        )
    }
    assert not wrong, wrong


FOLDERS = ("vtts_rt", "kernels", "csrc", "bench", "tests")
SUFFIXES = {".py", ".cpp", ".cc", ".c", ".h", ".cu", ".cuh"}


@pytest.mark.parametrize("folder", FOLDERS)
def test_files_can_be_read_in_one_sitting(folder: str) -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in SUFFIXES and (lines := len(path.read_text().splitlines())) > MAX_LINES
    }
    assert not long, f"more than {MAX_LINES} lines: {long}"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("def f():\n    from vtts_rt.runtime import Runtime", ["vtts_rt.runtime"]),
        ("if TYPE_CHECKING:\n    from vtts_rt import Runtime", ["vtts_rt.runtime"]),
        ("import vtts_rt\nvtts_rt.Runtime", ["vtts_rt", "vtts_rt.runtime"]),
        ("from vtts_rt import runtime", ["vtts_rt.runtime"]),
        ("from ..runtime import Runtime", ["vtts_rt.runtime"]),
        ("from .. import runtime", ["vtts_rt.runtime"]),
        ("import importlib\nimportlib.import_module('vtts_rt.cli')", ["importlib", "vtts_rt.cli"]),
        ("from vtts_rt import __version__", ["vtts_rt"]),
    ],
)
def test_the_walker_sees_every_kind_of_import(code: str, expected: list[str]) -> None:
    found = [t for node in ast.walk(ast.parse(code)) for t in targets_of("vtts_rt.ops.x", node)]
    assert sorted(found) == sorted(expected)

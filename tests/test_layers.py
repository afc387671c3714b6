"""The layers are the table in CONTRIBUTING.md, from the ground up: imports point to earlier rows only."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
MODULES = {
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (REPOSITORY / "megagpt").rglob("*.py")
}
MAP = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Tests")[0]
ROWS = re.findall(r"^\| (`.+?`) \|", MAP, re.MULTILINE)
# The package itself holds the version only.
LAYERS = ["megagpt", *(f"megagpt.{name}" for row in ROWS for name in re.findall(r"`(\w+)(?:\.py|/)`", row))]


def imports(module: str) -> set[str]:
    """The other modules of megagpt that a module names in an import, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name if name in MODULES else name.rpartition(".")[0] for name in names} & MODULES.keys() - {module}


def layer(module: str) -> int:
    return LAYERS.index(".".join(module.split(".")[:2]))


def test_the_map_names_each_layer_once() -> None:
    assert sorted(LAYERS) == sorted({".".join(module.split(".")[:2]) for module in MODULES})


def test_imports_point_to_lower_layers() -> None:
    arrows = [(module, name) for module in MODULES for name in imports(module)]
    upward = [f"{module} imports {name}" for module, name in arrows if layer(name) > layer(module)]
    assert not upward, f"against the map in CONTRIBUTING.md: {'; '.join(upward)}"


def test_modules_do_not_import_in_a_circle() -> None:
    TopologicalSorter({module: imports(module) for module in MODULES}).prepare()  # CycleError names the circle

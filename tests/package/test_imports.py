"""The packages of `apd/`, here called rooms, and what each may import. docs/reading-the-code.md describes them."""

import ast
from graphlib import TopologicalSorter

from paths import ROOT

FILES = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in sorted((ROOT / "apd").rglob("*.py"))}
MODULES = {name.removesuffix(".__init__"): path for name, path in FILES.items()}

CORE = "kinds config text decoding "
# Each room with what it may import besides itself. `apd` itself is the table of public names.
ROOMS = {
    "kinds": "",
    "extras": "",
    "text": "",
    "config": "kinds",
    "included": "",
    "decoding": "kinds config",
    "strategies": CORE,
    "models": CORE,
    "generation": CORE
    + "show included",  # an output holds a trace, which draws itself; a warning says what the pair knows
    "show": CORE,
    "many": "generation",  # an old path
    "embedded": "included",  # an old path
    "sampler": CORE + "strategies models generation included",
    "inspection": CORE + "strategies models generation included sampler apd",
    "integrations": CORE + "extras strategies models generation included sampler apd",
    "serve": CORE + "extras strategies models generation sampler integrations show included",
    "cli": CORE + "extras strategies models generation included sampler apd show inspection integrations serve",
    "__main__": "cli",
    "apd": CORE + "strategies models generation included sampler inspection",
}


def imported(node: ast.AST, *, late: bool) -> set[str]:
    """The modules that run with this node; with `late` also those that its functions import when they are called."""
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return set()
    if isinstance(node, ast.FunctionDef) and not late:
        return set()
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"imports are absolute: {ast.unparse(node)}"
        names = [f"{node.module}.{alias.name}" for alias in node.names]
        return {name if name in MODULES else str(node.module) for name in names}
    return set().union(*(imported(child, late=late) for child in ast.iter_child_nodes(node)))


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def test_a_room_imports_only_what_is_below_it() -> None:
    for module, path in MODULES.items():
        names = imported(ast.parse(path.read_text("utf-8")), late=True)
        assert not {name for name in names if name.split(".")[0] in ("benchmarks", "tests", "examples")}, module
        rooms = {room(name) for name in names if name.split(".")[0] == "apd"} - {room(module)}
        assert rooms <= set(ROOMS[room(module)].split()), module


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {name: imported(ast.parse(path.read_text("utf-8")), late=False) for name, path in MODULES.items()}
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_paths_of_release_0_1_0_still_lead_where_they_led() -> None:
    from apd import APDSampler, embedded, included, many
    from apd.embedded import tasks
    from apd.generation.many import Generated

    assert many.Generated is Generated
    assert {name: getattr(embedded, name) for name in embedded.__all__} == {
        name: getattr(included, name) for name in included.__all__
    }
    assert tasks.instances is included.tasks.instances and tasks.EXAMPLE_PROMPTS is included.tasks.EXAMPLE_PROMPTS
    assert APDSampler.from_embedded.__func__ is APDSampler.from_included.__func__

"""The rooms of fewstep/: what may import what, what starts in a blink, and which words are gone."""

import ast
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A group may import itself and what is before it. The longest of these names that fits is a module's room.
ORDER = """errors settings
models.specs models.sources images prompts lora.types
request
models lora
generation
coglet web training
evaluation
miniature
benchmark
cli predict train fewstep""".splitlines()
RANK = {room: rank for rank, group in enumerate(ORDER) for room in group.split()}
# The first load none of HEAVY at any time, the others not before they are used.
LIGHT = "errors settings models.specs models.sources images prompts lora.types request coglet web".split()
ALSO_LIGHT = "lora.fetch lora.resolve models.manifest generation.batcher cli.web cli.predict".split()
HEAVY = {"torch", "diffusers", "transformers", "peft", "accelerate", "numpy"}
GONE = re.compile("wish(es)?|painters?|crews?|told", re.IGNORECASE)
NO_NAMES = re.compile(r"""//.*|"(\\.|[^"\\])*"|`(\\.|[^`\\])*`""")  # of JavaScript
FILES = [ROOT / "predict.py", ROOT / "train.py", *sorted((ROOT / "fewstep").rglob("*.*"))]
SOURCES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in FILES
    if path.suffix in (".py", ".js", ".css", ".html")
}
parse = cache(ast.parse)


def modules(sources):
    """The trees of all modules, by names without the package's own."""
    paths = {
        path.removesuffix(".py").removesuffix("/__init__"): path for path in sources if path.endswith(".py")
    }
    return {short(name.replace("/", ".")): parse(sources[path]) for name, path in paths.items()}


def short(name):
    return name.removeprefix("fewstep.")


def imports(tree, loaded):
    """All that a module imports, at any depth; `loaded` leaves out what only the type checker reads."""
    nodes = list(ast.walk(tree))
    checks = [node for node in nodes if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
    unread = {node for check in checks if loaded for part in check.body for node in ast.walk(part)}
    plain = [node for node in nodes if isinstance(node, ast.Import) and node not in unread]
    sourced = [node for node in nodes if isinstance(node, ast.ImportFrom) and node not in unread]
    assert not any(node.level for node in sourced), "an import is relative"
    names = [short(name.name) for node in plain for name in node.names]
    return names + [short(f"{node.module}.{name.name}") for node in sourced for name in node.names]


def within(name, rooms):
    """The longest of `rooms` that is or holds `name`, or nothing."""
    return max((room for room in rooms if f"{name}.".startswith(f"{room}.")), key=len, default="")


def graph(sources, loaded=False):
    """The modules of ours that each imports."""
    trees = modules(sources)
    found = {name: {within(other, trees) for other in imports(tree, loaded)} for name, tree in trees.items()}
    return {name: others - {"", name} for name, others in found.items()}


def upward(sources):
    room = {name: within(name, RANK) for name in modules(sources)}
    edges = [(a, b) for a, others in graph(sources).items() for b in others if room[a] and room[b]]
    homeless = [f"{name} is in no room" for name in room if not room[name]]
    return homeless + [f"{a} imports {b}" for a, b in edges if RANK[room[b]] > RANK[room[a]]]


def circles(sources):
    try:
        TopologicalSorter(graph(sources)).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def heavy(sources):
    """What light modules reach, by way of all that is imported in functions too."""
    ours, trees = graph(sources, loaded=True), modules(sources)
    reached = {name for name in trees if within(name, LIGHT)}
    while more := {other for name in reached for other in ours[name]} - reached:
        reached |= more
    return [
        f"{name}: {other}" for name in reached for other in imports(trees[name], True) if within(other, HEAVY)
    ]


def twins(sources):
    trees = modules({path: text for path, text in sources.items() if path.startswith("fewstep")})
    classes = (node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    return [name for name, n in Counter(one.name for one in classes).items() if n > 1 and name[0] != "_"]


def gone(sources):
    names = {(path, word) for path in sources for word in re.findall(r"\w+", path)}
    for path, text in sources.items():
        if path.endswith(".py"):
            nodes = [node for node in ast.walk(parse(text)) if not isinstance(node, ast.Constant)]
            fields = {str(field) for node in nodes for _, field in ast.iter_fields(node)}
            names |= {(path, field) for field in fields if field.isidentifier()}
        elif path.endswith(".js"):
            names |= {(path, word) for word in re.findall(r"\w+", NO_NAMES.sub("", text))}
    parts = [(path, name, part) for path, name in names for part in re.findall("[A-Z]?[a-z]+|[A-Z]+", name)]
    return sorted({f"{path} {name}" for path, name, part in parts if GONE.fullmatch(part)})


def crowded(sources):
    direct = [path for path in sources if str(Path(path).parent) == "fewstep"]
    return direct[10:] + [path for path, text in sources.items() if text.count("\n") > 350]


CHECKS = {check.__name__: check for check in (upward, circles, heavy, twins, gone, crowded)}
PLANTED = """upward | lora/types.py: if TYPE_CHECKING: from fewstep.models import hub | models/hub.py:
upward | web/app.py: def f(): import fewstep.cli.web | cli/web.py:
upward | utils.py:
circles | a.py: if TYPE_CHECKING: from fewstep import b | b.py: def f(): import fewstep.a
heavy | web/a.py: def f(): from fewstep import a | a.py: def f(): from torch import nn
twins | a.py: class A: ... | web/b.py: class A: ...
gone | a.py: def f(*, oneWish): ...
gone | a.py: from b import crew_size
gone | told.css:
gone | a.js: let x = wish.y;"""


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_the_house_is_in_order(check):
    assert check(SOURCES) == []


@pytest.mark.parametrize("planted", PLANTED.splitlines())
def test_a_planted_fault_is_found(planted):
    check, *files = planted.split(" | ")

    assert CHECKS[check](
        {f"fewstep/{path}": text.strip() for path, _, text in (file.partition(":") for file in files)}
    )


def test_more_than_ten_files_or_350_lines_are_found():
    assert crowded({f"fewstep/{i}.py": "" for i in range(11)})
    assert crowded({"fewstep/web/static/a.css": "\n" * 351})


def loaded_by(names):
    """What a fresh Python says that imports modules, up to the first with which something heavy comes."""
    script = f"""import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    if heavy := sorted({HEAVY} & set(sys.modules)): sys.exit(f"{{name}} loads {{heavy}}")"""
    command = [sys.executable, "-c", script, *(f"fewstep.{name}" for name in names)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    return done.stdout + done.stderr


def test_light_modules_load_nothing_heavy_when_they_are_imported():
    assert loaded_by([*(name for name in modules(SOURCES) if within(name, LIGHT)), *ALSO_LIGHT]) == ""
    assert "loads ['numpy']" in loaded_by(["miniature.world.canvas"])

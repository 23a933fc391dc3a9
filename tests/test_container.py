"""What a Cog build copies: the code, the served weights and nothing else; and that it starts."""

import fnmatch
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tiny import as_downloaded, make_folder

from fewstep.models.save import save_model
from fewstep.models.specs import MODELS

ROOT = Path(__file__).resolve().parents[1]
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def ignored(path: str, patterns: list[str]) -> bool:
    """Docker's rules, as far as the file uses them: the last pattern that matches the path or a parent."""
    parents = [path, *(str(parent) for parent in Path(path).parents)][:-1]
    found = False
    for pattern in patterns:
        plain = pattern.removeprefix("!").removeprefix("**/")
        anywhere = pattern.startswith("**/")
        for parent in parents:
            name = Path(parent).name if anywhere else parent
            # Docker's * stops at a slash.
            if name.count("/") == plain.count("/") and fnmatch.fnmatch(name, plain):
                found = not pattern.startswith("!")
    return found


def copied_tree(target: Path) -> list[str]:
    """Copy what git tracks and the build would copy; the paths."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    kept = [path for path in listed.stdout.splitlines() if not ignored(path, patterns)]
    for path in kept:
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, target / path)
    assert not ignored("weights/sdxl/unet/config.json", patterns)
    assert ignored("weights/.downloads/x", patterns) and ignored("fewstep/__pycache__/x.pyc", patterns)
    return kept


def test_the_tree_that_a_build_copies_starts_and_generates(tmp_path):
    tree, spec = tmp_path / "src", MODELS["sdxl"]
    kept = copied_tree(tree)
    save_model(spec, as_downloaded(spec, make_folder(spec, tmp_path / "original")), tree / "weights")
    arguments = ["-i", "prompt=a red house", "-i", "steps=1", "-o", tmp_path / "out.png"]
    done = subprocess.run(
        [tree / "scripts" / "predict", *arguments],
        env={**os.environ, "PATH": PATH, "FEWSTEP_MODEL": "sdxl", "TMPDIR": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.png").read_bytes()[:4] == b"\x89PNG"
    assert {"predict.py", "cog.yaml", "requirements.txt", "fewstep/generation/pipeline.py"} <= set(kept)
    assert not any(path.startswith(("tests/", "docs/", "weights/", ".github/", ".ci/")) for path in kept)

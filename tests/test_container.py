"""What a Cog build copies and a push sees: the code, the served weights, nothing else; and that it starts."""

import fnmatch
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny import as_downloaded, make_folder

from fewstep.errors import InvalidRequest
from fewstep.models.save import save_model
from fewstep.models.specs import MODELS
from fewstep.request import Inputs
from fewstep.settings import Settings

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


@pytest.fixture
def checkout(tmp_path):
    """A checkout with an environment and SDXL's weights, and a Cog that says what it sees."""
    folder = tmp_path / "checkout"
    subprocess.run(["git", "clone", "--quiet", ROOT, folder], check=True)
    for path in ("weights/sdxl/manifest.json", "weights/sdxl/unet/x.safetensors", ".venv/lib/x"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(path)
    cog = tmp_path / "bin" / "cog"
    cog.parent.mkdir()
    cog.write_text(
        '#!/bin/sh\necho "$@"\necho $(git status --short)\necho $(find weights -type f | sort)\n'
        "echo $(ls -a)\nexit $FAILS\n"
    )
    cog.chmod(0o755)
    return folder


@pytest.mark.parametrize("fails", [0, 3])
def test_a_push_sees_a_clean_tree_with_the_served_weights_alone(checkout, tmp_path, fails):
    environ = os.environ | {"PATH": f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}", "FAILS": str(fails)}
    command = [checkout / "scripts" / "push", "r8.im/me/fewstep"]
    done = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == fails, done.stderr
    arguments, changed, weights, names = done.stdout.splitlines()
    assert arguments == "push r8.im/me/fewstep --separate-weights" and changed == ""
    assert weights.split() == ["weights/sdxl/manifest.json", "weights/sdxl/unet/x.safetensors"]
    assert {"predict.py", "cog.yaml", ".dockerignore"} <= set(names.split()) - {".venv"} == set(names.split())
    assert not (checkout / "build" / "push").exists()
    assert (checkout / "weights" / "sdxl" / "manifest.json").exists()  # a link of it was removed, not itself


def test_a_push_without_weights_says_how_to_get_them(checkout, tmp_path):
    shutil.rmtree(checkout / "weights" / "sdxl")
    environ = os.environ | {"PATH": f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}"}
    command = [checkout / "scripts" / "push", "r8.im/me/fewstep"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert done.returncode == 1 and "scripts/save-weights sdxl" in done.stderr


def test_the_managed_weights_that_are_described_are_what_cog_knows_and_the_container_reads():
    page = (ROOT / "docs" / "container.md").read_text()
    [snippet] = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)]
    assert snippet.keys() == {"model", "weights"} and snippet["model"].startswith("r8.im/")
    assert not snippet.keys() & yaml.safe_load((ROOT / "cog.yaml").read_text()).keys()
    [weights] = snippet["weights"]
    assert weights.keys() == {"name", "source", "target"} and weights["source"].keys() == {"uri"}
    served = Settings.from_env({}).weights_root.relative_to(ROOT) / MODELS["sdxl"].name
    assert weights["source"]["uri"] == str(served)
    assert weights["target"] == f"/src/{served}"  # Cog's images have the code there


CONFIG = yaml.safe_load((ROOT / "cog-safe-push.yaml").read_text())
CHECKS = {"exact_string", "match_url", "match_prompt", "jq_query", "error_contains"}


def test_what_is_tried_before_a_push_has_only_fields_that_cog_safe_push_knows():
    known = {"model", "test_model", "test_hardware", "predict", "train", "parallel"}
    assert CONFIG.keys() <= known
    predict = {"compare_outputs", "predict_timeout", "test_cases", "fuzz"}
    assert CONFIG["predict"].keys() <= predict
    assert CONFIG["predict"]["fuzz"].keys() <= {"fixed_inputs", "disabled_inputs", "iterations"}


@pytest.mark.parametrize("case", CONFIG["predict"]["test_cases"], ids=lambda case: case["inputs"]["prompt"])
def test_every_case_that_is_tried_before_a_push_is_answered_as_it_says(case):
    assert case.keys() <= {"inputs"} | CHECKS and len(case) <= 2
    try:
        Inputs.create(MODELS["sdxl"], **case["inputs"])
    except InvalidRequest as error:
        assert case["error_contains"] in str(error)
    else:
        assert "error_contains" not in case

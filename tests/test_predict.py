"""predict.py as Cog reads it: its schema, and its literals against the limits that Request enforces."""

import ast
import json
import tomllib
from pathlib import Path
from typing import Any

import yaml
from schema_maker import golden_files

from fewstep import request
from fewstep.coglet.adapter import COG_VERSION
from fewstep.coglet.server import CONCURRENCY, SCHEMA
from fewstep.models.specs import MODELS
from fewstep.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
SCHEMAS = json.loads(SCHEMA.read_text())["components"]["schemas"]
INPUTS: dict[str, Any] = SCHEMAS["Input"]["properties"]


def test_the_golden_files_are_the_makers() -> None:
    for path, text in golden_files().items():
        assert path.read_text() == text, "the inputs changed; if that is meant: python3 tests/schema_maker.py"


def test_ranges_are_those_of_request() -> None:
    numbers = {name: entry for name, entry in INPUTS.items() if "minimum" in entry}
    assert {name: (entry["minimum"], entry["maximum"]) for name, entry in numbers.items()} == {
        "steps": request.STEPS,
        "guidance": request.GUIDANCE,
        "seed": (0, request.SEED_MAX),
        "num_outputs": request.NUM_OUTPUTS,
        "width": request.SIDE,
        "height": request.SIDE,
        "prompt_strength": request.STRENGTH,
        "style_scale": request.STYLE_SCALE,
        "extra_style_scale": request.STYLE_SCALE,
        "lcm_scale": request.LCM_SCALE,
        "clip_skip": (0, max(spec.max_clip_skip for spec in MODELS.values())),
        "output_quality": request.QUALITY,
    }
    assert INPUTS["prompt"]["maxLength"] == request.PROMPT_MAX_CHARS
    assert INPUTS["negative_prompt"]["maxLength"] == request.PROMPT_MAX_CHARS


def test_choices_are_those_of_request() -> None:
    assert tuple(SCHEMAS["aspect_ratio"]["enum"]) == request.ASPECT_CHOICES
    assert tuple(SCHEMAS["output_format"]["enum"]) == request.FORMATS


def test_inputs_and_defaults_are_those_of_request() -> None:
    defaults = request.Inputs.create.__kwdefaults__
    assert {name: entry["default"] for name, entry in INPUTS.items() if "default" in entry} == defaults
    assert SCHEMAS["Input"]["required"] == ["prompt"]
    assert all(entry["description"] for entry in INPUTS.values())


def test_setup_takes_no_weights() -> None:
    """Cog passes COG_WEIGHTS to a setup() that has such a parameter; ours come from the image."""
    tree = ast.parse((ROOT / "predict.py").read_text())
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.AsyncFunctionDef)}
    assert [argument.arg for argument in functions["setup"].args.args] == ["self"]
    assert ast.unparse(functions["predict"].decorator_list[0]) == f"cog.concurrent(max={CONCURRENCY})"


def test_versions_are_pinned_once_and_alike() -> None:
    cog_yaml = yaml.safe_load((ROOT / "cog.yaml").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert cog_yaml["build"]["sdk_version"] == COG_VERSION
    assert project["optional-dependencies"]["serve"] == [f"cog=={COG_VERSION}", f"coglet=={COG_VERSION}"]
    extras = [pin for extra in project["optional-dependencies"].values() for pin in extra]
    assert all(pin.count("==") == 1 for pin in pins + extras)
    assert not {"cog", "coglet"} & {pin.partition("==")[0] for pin in pins}  # Cog would strip them


def test_cog_yaml_has_only_keys_that_cog_knows() -> None:
    cog_yaml = yaml.safe_load((ROOT / "cog.yaml").read_text())
    assert set(cog_yaml) == {"build", "environment", "predict", "train"}
    assert set(cog_yaml["build"]) == {"gpu", "cuda", "python_version", "python_requirements", "sdk_version"}
    assert cog_yaml["predict"] == "predict.py:Predictor"
    settings = Settings.from_env(dict(line.split("=", 1) for line in cog_yaml["environment"]))
    assert (settings.model, settings.device, settings.engine) == ("sdxl", "cuda", "compiled")

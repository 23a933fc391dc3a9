"""Generate once and print the paths of the files, one a line: scripts/predict -i prompt="a red house" -o out.webp

It starts the server of a Cog container with our Predictor, asks it once, and stops it; the flags are those of
`cog predict`. FEWSTEP_MODEL chooses the model.
"""

import argparse
import base64
import binascii
import hashlib
import io
import json
import mimetypes
import os
import re
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fewstep.cli.run import command_parser, say
from fewstep.coglet.server import SCHEMA, code_and_sentence, end_as_by_ctrl_c, free_port, running_server
from fewstep.errors import FewstepError, Refused
from fewstep.models.vocabulary import unknown_words_sentence

Inputs = dict[str, Any]
LONGEST_MESSAGE = 500
LOG_TAIL = 30
SIGNATURES = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"RIFF": "image/webp"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Generate as the command line says; 0 when every file is written."""
    end_as_by_ctrl_c()
    schemas = json.loads(SCHEMA.read_text(encoding="utf-8"))["components"]["schemas"]
    properties = dict(sorted(schemas["Input"]["properties"].items(), key=lambda item: item[1]["x-order"]))
    options = _parser(properties).parse_args(arguments)
    try:
        inputs = _read_inputs(options, properties, schemas)
        recipe, environ = None, {**os.environ}
        if options.recipe:
            from fewstep.images.metadata import read_recipe  # imports Pillow, which --help must do without

            recipe = read_recipe(options.recipe)
            inputs = _follow(recipe, inputs, environ)
        target = check_target(options.output)
        suffix = target.suffix.lower().removeprefix(".").replace("jpeg", "jpg")
        if suffix in schemas["output_format"]["enum"]:  # -o image.png asks for a png
            inputs.setdefault("output_format", suffix)
        for path, content in name_files(_ask(inputs, environ), target):
            path.write_bytes(content)
            if recipe:
                _say_what_changed(recipe, content)
            sys.stdout.write(f"{path}\n")
    except FewstepError as error:
        say(str(error)[:LONGEST_MESSAGE])
        return 1
    except OSError as error:
        say(f"cannot use {error.filename}: {error.strerror}")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _parser(properties: Inputs) -> argparse.ArgumentParser:
    width = max(map(len, properties)) + 2
    lines = [f"  {name:{width}}{entry['description']}" for name, entry in properties.items()]
    parser = command_parser("scripts/predict", __doc__, epilog="\n".join(["inputs:", *lines]))
    add = parser.add_argument
    add("-i", "--input", action="append", default=[], metavar="NAME=VALUE", help="an input; @FILE reads a file")
    text = "paint again what this picture was painted from; -i overrides"
    add("--recipe", type=Path, metavar="IMAGE", help=text)
    add("--json", metavar="FILE", help="the inputs as a JSON object: FILE, @FILE, @- (stdin), or {...}")
    text = "the file; several become PATH.0, PATH.1 before the suffix (output)"
    add("-o", "--output", metavar="PATH", help=text)
    return parser


def _read_inputs(options: argparse.Namespace, properties: Inputs, enumerations: Inputs) -> Inputs:
    if options.json is not None and options.input:
        raise Refused("give the inputs either as -i NAME=VALUE or as --json, not both")
    inputs = {} if options.json is None else _read_json(options.json)
    for name, equals, value in (pair.partition("=") for pair in options.input):
        if not equals:
            raise Refused(f"-i needs NAME=VALUE, such as -i steps=4; {name!r} has no '='")
        if name in inputs:
            raise Refused(f"{name} is given twice")
        inputs[name] = value
    for name, value in inputs.items():
        if name not in properties:
            raise Refused(f"there is no input {name!r}; the inputs are {', '.join(properties)}")
        if options.json is None:
            inputs[name] = convert(name, value, properties[name], enumerations)
    return inputs


def _read_json(written: str) -> Inputs:
    try:
        if written == "@-":
            text = sys.stdin.read()
        elif written.lstrip().startswith("{"):
            text = written
        else:
            text = Path(written.removeprefix("@")).read_text(encoding="utf-8")
        inputs = json.loads(text)
    except OSError as error:
        raise Refused(f"--json reads the inputs from {error.filename}: {error.strerror}") from None
    except ValueError as error:
        raise Refused(f"--json needs a JSON object of inputs: {error}") from None
    if not isinstance(inputs, dict):
        raise Refused("--json needs a JSON object of inputs")
    return inputs


def convert(name: str, value: str, entry: Inputs, enumerations: Inputs) -> Any:
    """Return `value` as the JSON type that the schema gives the input; the range is the server's to check.

    A value @FILE is the file: as a data URL for an input that takes files, otherwise as its text.
    """
    if value.startswith("@"):
        value = _read_file(Path(value[1:]), as_url=entry.get("format") == "uri")
    kind = entry.get("type") or enumerations[name]["type"]
    if kind == "boolean":
        if value.lower() not in ("true", "false"):
            raise Refused(f"{name} is either true or false")
        return value.lower() == "true"
    if kind == "string":
        return value
    try:
        return int(value) if kind == "integer" else float(value)
    except ValueError:
        number = "a whole number" if kind == "integer" else "a number"
        raise Refused(f"{name} must be {number}, such as -i {name}={entry.get('minimum', 1)}") from None


def _read_file(path: Path, as_url: bool) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise Refused(f"cannot read {path}: {error.strerror}") from None
    if not as_url:
        return content.decode(errors="replace").rstrip("\n")
    by_content = (kind for start, kind in SIGNATURES.items() if content.startswith(start))
    kind = mimetypes.guess_type(path.name, strict=False)[0] or next(by_content, None)
    if not kind or not kind.startswith("image/"):  # coglet would refuse it by quoting all of it
        raise Refused(f"{path} is not a picture as JPEG, PNG or WebP")
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def check_target(written: str | None) -> Path:
    """Return where the output goes, before anything slow starts. Raises Refused if it cannot be written."""
    target = Path(written or "output")
    if target.is_dir():
        target = target / "output"
    if not target.parent.is_dir():
        raise Refused(f"-o names {target}, but there is no folder {target.parent}")
    if not os.access(target if target.exists() else target.parent, os.W_OK):
        raise Refused(f"-o names {target}, which cannot be written")
    return target


def name_files(outputs: list[str], target: Path) -> list[tuple[Path, bytes]]:
    """Return the files' paths and contents: `target` for one output, `stem.i.suffix` for several, as Cog does.

    A target without a suffix gets the outputs' own.
    """
    files = []
    for index, url in enumerate(outputs):
        head, _, body = url.partition(";base64,")
        suffix = target.suffix or mimetypes.guess_extension(head.removeprefix("data:")) or ""
        number = f".{index}" if len(outputs) > 1 else ""
        try:
            content = base64.b64decode(body, validate=True)
        except binascii.Error:
            raise Refused("the server's answer holds no file") from None
        files.append((target.with_name(f"{target.stem}{number}{suffix}"), content))
    return files


def _follow(recipe: Inputs, given: Inputs, environ: dict[str, str]) -> Inputs:
    """Return the recipe's inputs, overridden by `given`. Raises Refused when it cannot be followed."""
    from fewstep.images.metadata import inputs_of

    model = environ["FEWSTEP_MODEL"] = environ.get("FEWSTEP_MODEL") or recipe["model"]
    if model != recipe["model"]:
        raise Refused(f"the picture was painted by {recipe['model']}; set FEWSTEP_MODEL to that, or unset it")
    for name in ("image", "mask"):
        wanted = recipe.get(f"{name}_sha256")
        try:
            sent = base64.b64decode(str(given.get(name, "")).partition(";base64,")[2], validate=True)
        except ValueError:  # no base64
            sent = b""
        if wanted and wanted != hashlib.sha256(sent).hexdigest():
            fix = f"give that very one, as -i {name}=@FILE"
            raise Refused(f"it was painted from another file as {name}; {fix}")
    inputs = inputs_of(recipe)
    if given.get("aspect_ratio", "custom") != "custom":
        del inputs["width"], inputs["height"]
    return inputs | given


def _say_what_changed(recipe: Inputs, content: bytes) -> None:
    """Say whether the weights or styles in the metadata of `content` are others than the recipe's."""
    from fewstep.images.metadata import read_recipe

    try:
        now = read_recipe(io.BytesIO(content))
    except FewstepError:  # the server keeps no recipes
        return
    if now["revision"] != recipe["revision"]:
        say("the weights are others than the picture was painted by")
    if [style["sha256"] for style in now["styles"]] != [style["sha256"] for style in recipe["styles"]]:
        say("the styles are others than the picture was painted with")


def _ask(inputs: Inputs, environ: Mapping[str, str]) -> list[str]:
    """Return the outputs as data URLs, by way of a server of our own."""
    model = environ.get("FEWSTEP_MODEL")
    chosen = f"model {model}" if model else "model miniature, since FEWSTEP_MODEL is not set"
    with tempfile.TemporaryDirectory(prefix="fewstep-") as folder, open(Path(folder) / "log", "w+b") as log:
        environ = {**environ, "FEWSTEP_OUTPUTS": str(Path(folder) / "outputs"), "NO_COLOR": "1"}
        began = time.monotonic()
        say(f"starting the server ({chosen})")
        try:
            with running_server(port=free_port(), log=log, environ=environ) as server:
                server.wait_ready()
                ready = time.monotonic()
                say(f"ready after {ready - began:.1f} s; painting")
                status, answer = server.post("/predictions", {"id": uuid.uuid4().hex, "input": inputs})
                _report(status, answer, time.monotonic() - ready, model or "miniature")
                outputs: list[str] = answer["output"]
                return outputs
        except FewstepError as error:
            if not re.match(r"\[(?!internal)[a-z_]+\]|the server refused", str(error)):
                log.seek(0)
                tail = log.read().decode(errors="replace").splitlines()[-LOG_TAIL:]
                say("\n".join(["the end of the server's log:", *tail]))
            raise


def _report(status: int, answer: Any, seconds: float, model: str) -> None:
    """Say how it went, and which words mean nothing to `model`; Refused with the server's reason when nothing
    was painted."""
    if status == 422 and isinstance(answer, dict):
        reasons = [f"{'.'.join(detail['loc'][2:])}: {detail['msg']}" for detail in answer["detail"]]
        raise Refused(f"the server refused the inputs: {'; '.join(reasons)}")
    if status != 200 or answer.get("status") != "succeeded":
        text = str(answer.get("error") if isinstance(answer, dict) else answer)
        raise Refused(code_and_sentence(text))
    metrics = answer["metrics"]
    size = f"{metrics['width']}x{metrics['height']}"
    say(f"painted {size} in {metrics['steps']} steps with seed {metrics['seed']}: {seconds:.2f} s")
    if unknown := metrics.get("unknown_words"):
        say(unknown_words_sentence(model, unknown))


if __name__ == "__main__":
    sys.exit(main())

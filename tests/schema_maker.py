"""Make the OpenAPI schema of a `predict.py` from its source, as Cog's build does: nothing of it is run.

An input was added or changed: `python3 tests/schema_maker.py` writes the golden files anew.

Cog's reader drops in silence what it cannot resolve: a bound that names a constant, a description in
parentheses or in two adjacent strings, a number with underscores. Here each of these is an error, so that
the schema made from a file is the schema that Cog makes of it.
"""

import ast
import io
import json
import re
import tokenize
from pathlib import Path
from typing import Any

Json = dict[str, Any]

ROOT = Path(__file__).resolve().parents[1]
PLAIN = ROOT / "fewstep" / "benchmark" / "plain"
SAMPLE = ROOT / "tests" / "data" / "schema_sample.json"
OF_EVERY_MODEL = "PredictionRequest PredictionResponse Status HTTPValidationError ValidationError".split()

# Of an input's type: its schema, and the Python types that a literal of it may have.
TYPES: dict[str, tuple[Json, tuple[type, ...]]] = {
    "str": ({"type": "string"}, (str,)),
    "int": ({"type": "integer"}, (int,)),
    "float": ({"type": "number"}, (int, float)),
    "bool": ({"type": "boolean"}, (bool,)),
    "Path": ({"type": "string", "format": "uri"}, ()),
}
PATH = TYPES["Path"][0]
# Input()'s keyword -> the schema's, with the Python types that its literal may have.
KEYWORDS: dict[str, tuple[str, tuple[type, ...]]] = {
    "description": ("description", (str,)),
    "ge": ("minimum", (int, float)),
    "le": ("maximum", (int, float)),
    "min_length": ("minLength", (int,)),
    "max_length": ("maxLength", (int,)),
    "regex": ("pattern", (str,)),
}
Function = ast.FunctionDef | ast.AsyncFunctionDef
PLAIN_STRING = re.compile(r"""(r?)(["'])(?!\2)(.*)\2|""\Z|''\Z""")
PLAIN_NUMBER = re.compile(r"\d+(\.\d+)?([eE][+-]?\d+)?")


def make_schema(path: Path, training: Path | None = None) -> Json:
    """The schema that Cog's static reader makes of the class in `path` that defines predict(), and of the
    function train() in `training`.

    Raises ValueError, with file and line, for whatever Cog would refuse, misread or drop.
    """
    schema = _Reader(path).schema()
    if training:
        schemas, paths = schema["components"]["schemas"], schema["paths"]
        response = _of_training(schemas["PredictionResponse"])
        request = {**_of_training(schemas["PredictionRequest"])}
        request["properties"] = {name: request["properties"][name] for name in ("id", "input")}
        schemas |= {"TrainingRequest": request, "TrainingResponse": response}
        schemas |= _Reader(training).training()
        paths |= {_of_training(path): _of_training(paths[path]) for path in paths if "predictions" in path}
    return schema


def _of_training(part: Any) -> Any:
    """What Cog says of predictions, said of trainings."""
    text = json.dumps(part).replace("prediction", "training").replace("Prediction", "Training")
    text = text.replace("predict", "train").replace("Predict", "Train")
    for name in ("Input", "Output"):
        text = text.replace(f'/schemas/{name}"', f'/schemas/Training{name}"')
    return json.loads(text)


def golden_files() -> dict[Path, str]:
    """The text of every schema that is shipped, by its path."""
    ours, plain = ROOT / "fewstep" / "coglet", PLAIN / ".cog"
    schemas = {
        ours / "openapi_schema.json": make_schema(ROOT / "predict.py", ROOT / "train.py"),
        plain / "openapi_schema.json": make_schema(PLAIN / "predict.py"),
    }
    return {path: json.dumps(schema, indent=2, sort_keys=True) + "\n" for path, schema in schemas.items()}


class _Reader:
    def __init__(self, path: Path) -> None:
        self._name = path.name
        self._source = path.read_text(encoding="utf-8")
        self._tree = ast.parse(self._source)
        self._from_cog = {
            alias.name
            for node in self._tree.body
            if isinstance(node, ast.ImportFrom) and node.module == "cog"
            for alias in node.names
            if alias.asname is None
        }

    def schema(self) -> Json:
        classes = (node for node in self._tree.body if isinstance(node, ast.ClassDef))
        predict = self._function("predict", [node for found in classes for node in found.body])
        inputs, enumerations = self._inputs("Input", predict, predict.args.args[1:])
        return _document(inputs, self._output(predict), enumerations)

    def training(self) -> Json:
        """What `train:` in cog.yaml adds, which the server holds trainings to."""
        train = self._function("train", self._tree.body)
        inputs, enumerations = self._inputs("TrainingInput", train, train.args.args)
        weights = {"title": "Weights", **PATH}
        output = {"title": "Output", "type": "object", "properties": {"weights": weights}}
        output["required"] = ["weights"]
        return {"TrainingInput": inputs, "TrainingOutput": output, **enumerations}

    def _function(self, name: str, nodes: list[ast.stmt]) -> Function:
        found = [node for node in nodes if isinstance(node, Function) and node.name == name]
        if len(found) != 1:
            raise ValueError(f"{self._name}: one function must be {name}(), but {len(found)} are")
        return found[0]

    def _inputs(self, title: str, function: Function, parameters: list[ast.arg]) -> tuple[Json, Json]:
        """The inputs of a function, and what they may choose from."""
        arguments, called = function.args, f"{function.name}()"
        if arguments.kwonlyargs or arguments.vararg or arguments.kwarg or arguments.posonlyargs:
            raise self._error(function, f"{called} takes plain named inputs only")
        if len(arguments.defaults) != len(parameters):
            raise self._error(function, f"every input of {called} needs '= Input(...)'")
        properties: Json = {}
        enumerations: Json = {}
        for order, (parameter, value) in enumerate(zip(parameters, arguments.defaults, strict=True)):
            properties[parameter.arg] = self._input(parameter, value, enumerations) | {"x-order": order}
        inputs: Json = {"title": title, "type": "object", "properties": properties}
        if required := [name for name, entry in properties.items() if "default" not in entry]:
            inputs["required"] = required
        return inputs, enumerations

    def _input(self, parameter: ast.arg, value: ast.expr, enumerations: Json) -> Json:
        type_name, optional = self._annotation(parameter)
        schema, types = TYPES[type_name]
        given = self._keywords(parameter.arg, value)
        choices = given.pop("choices", None)
        default = given.pop("default", ...)
        if default is ... and optional:
            raise self._error(value, f"{parameter.arg} may be None, so it needs default=None")
        if default is not ... and not _suits(default, types, optional):
            raise self._error(value, f"{parameter.arg}'s default is no {type_name}")
        entry: Json = {KEYWORDS[keyword][0]: literal for keyword, literal in given.items()}
        if default is not ...:
            entry["default"] = default
        if optional:
            entry["nullable"] = True
        if choices is None:
            return entry | schema | {"title": parameter.arg.replace("_", " ").title()}
        if not choices or not all(_suits(choice, types, False) for choice in choices):
            raise self._error(value, f"{parameter.arg}'s choices are not all of type {type_name}")
        described = {"title": parameter.arg, "description": "An enumeration."}
        enumerations[parameter.arg] = described | {"enum": choices} | schema
        return entry | {"allOf": [{"$ref": f"#/components/schemas/{parameter.arg}"}]}

    def _annotation(self, parameter: ast.arg) -> tuple[str, bool]:
        written = "" if parameter.annotation is None else ast.unparse(parameter.annotation)
        name = written.removesuffix(" | None")
        if name not in TYPES:
            allowed = ", ".join(TYPES)
            raise self._error(parameter, f"{parameter.arg} must be one of {allowed}, or that '| None'")
        if name == "Path" and name not in self._from_cog:
            raise self._error(parameter, f"{parameter.arg}'s Path must be imported by 'from cog import Path'")
        return name, name != written

    def _keywords(self, name: str, value: ast.expr) -> Json:
        if not isinstance(value, ast.Call) or ast.unparse(value.func) != "Input" or value.args:
            raise self._error(value, f"{name} needs '= Input(...)' with named arguments only")
        given: Json = {}
        for keyword in value.keywords:
            if keyword.arg not in (*KEYWORDS, "default", "choices"):
                raise self._error(keyword.value, f"{name}: Input() has no use for '{keyword.arg}' here")
            literal = self._literal(keyword)
            if keyword.arg in KEYWORDS and not _suits(literal, KEYWORDS[keyword.arg][1], False):
                raise self._error(keyword.value, f"{name}: {keyword.arg} has the wrong type")
            if keyword.arg == "choices" and not isinstance(literal, list):
                raise self._error(keyword.value, f"{name}: choices must be a list of literals")
            given[keyword.arg] = literal
        return given

    def _literal(self, keyword: ast.keyword) -> Any:
        """The value of a literal that Cog's reader and Python read alike; anything else is an error."""
        segment = ast.get_source_segment(self._source, keyword) or ""
        text = segment.partition("=")[2]
        previous = ""
        for token in tokenize.generate_tokens(io.StringIO(f"({text})").readline):
            kind = tokenize.tok_name[token.type]
            plain = {"STRING": PLAIN_STRING, "NUMBER": PLAIN_NUMBER}.get(kind)
            if plain is not None and not plain.fullmatch(token.string):
                raise self._error(keyword.value, f"{keyword.arg}: Cog misreads {kind.lower()}s so written")
            if kind == "STRING" and "\\" in token.string and not token.string.startswith("r"):
                raise self._error(keyword.value, f"{keyword.arg}: Cog keeps backslashes as they are written")
            if kind == "STRING" == previous:
                raise self._error(keyword.value, f"{keyword.arg}: Cog does not join adjacent strings")
            previous = kind
        if text.lstrip().startswith("("):
            raise self._error(keyword.value, f"{keyword.arg}: Cog drops what stands in parentheses")
        try:
            return _as_json(ast.literal_eval(keyword.value))
        except ValueError:
            raise self._error(keyword.value, f"{keyword.arg} must be a literal: Cog runs no code") from None

    def _output(self, predict: Function) -> Json:
        if predict.returns is None or ast.unparse(predict.returns) != "list[Path]":
            raise self._error(predict, "predict() must return list[Path]")
        return {"title": "Output", "type": "array", "items": PATH}

    def _error(self, node: ast.expr | ast.stmt | ast.arg, sentence: str) -> ValueError:
        return ValueError(f"{self._name}:{node.lineno}: {sentence}")


def _suits(literal: object, types: tuple[type, ...], optional: bool) -> bool:
    if literal is None:
        return optional
    # bool is an int to Python, but not to JSON.
    return type(literal) in types


def _as_json(literal: Any) -> Any:
    """Whole floats become integers, as Cog writes them."""
    if isinstance(literal, list):
        return [_as_json(item) for item in literal]
    return int(literal) if isinstance(literal, float) and literal.is_integer() else literal


def _document(inputs: Json, output: Json, enumerations: Json) -> Json:
    """What Cog makes of its sample, with these inputs and outputs in the place of the sample's."""
    document: Json = json.loads(SAMPLE.read_text(encoding="utf-8"))
    schemas = document["components"]["schemas"]
    kept = {name: schemas[name] for name in schemas if name in OF_EVERY_MODEL}
    document["components"]["schemas"] = kept | {"Input": inputs, "Output": output} | enumerations
    return document


if __name__ == "__main__":
    for path, text in golden_files().items():
        path.write_text(text, encoding="utf-8")

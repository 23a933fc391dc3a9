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

TYPES: dict[str, Json] = {
    "str": {"type": "string"},
    "int": {"type": "integer"},
    "float": {"type": "number"},
    "bool": {"type": "boolean"},
    "Path": {"type": "string", "format": "uri"},
}
# Input()'s keyword -> the schema's, with the Python types that its literal may have.
KEYWORDS: dict[str, tuple[str, tuple[type, ...]]] = {
    "description": ("description", (str,)),
    "ge": ("minimum", (int, float)),
    "le": ("maximum", (int, float)),
    "min_length": ("minLength", (int,)),
    "max_length": ("maxLength", (int,)),
    "regex": ("pattern", (str,)),
}
DEFAULT_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "Path": (),
}
PLAIN_STRING = re.compile(r"""(r?)(["'])(?!\2)(.*)\2|""\Z|''\Z""")
PLAIN_NUMBER = re.compile(r"\d+(\.\d+)?([eE][+-]?\d+)?")


def make_schema(path: Path, training: Path | None = None) -> Json:
    """The schema that Cog's static reader makes of the class in `path` that defines predict(), and of the
    function train() in `training`.

    Raises ValueError, with file and line, for whatever Cog would refuse, misread or drop.
    """
    schema = _Reader(path).schema()
    if training:
        schema["components"]["schemas"] |= _Reader(training).training()
    return schema


def golden_files() -> dict[Path, str]:
    """The text of every schema that is shipped, by its path."""
    schemas = {
        ROOT / "fewstep" / "coglet" / "openapi_schema.json": make_schema(
            ROOT / "predict.py", ROOT / "train.py"
        ),
        PLAIN / ".cog" / "openapi_schema.json": make_schema(PLAIN / "predict.py"),
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
        predict = self._predict()
        inputs, enumerations = self._inputs("Input", predict, predict.args.args[1:])
        return _document(inputs, self._output(predict), enumerations)

    def training(self) -> Json:
        """What `train:` in cog.yaml adds, which the server holds trainings to."""
        found = [
            node for node in self._tree.body if isinstance(node, ast.FunctionDef) and node.name == "train"
        ]
        if len(found) != 1:
            raise ValueError(f"{self._name}: one function must be train(), but {len(found)} are")
        inputs, enumerations = self._inputs("TrainingInput", found[0], found[0].args.args)
        output = _object("TrainingOutput", weights={"title": "Weights", **TYPES["Path"]})
        return {"TrainingInput": inputs, "TrainingOutput": output, **enumerations}

    def _inputs(
        self, title: str, function: ast.FunctionDef | ast.AsyncFunctionDef, parameters: list[ast.arg]
    ) -> tuple[Json, Json]:
        """The inputs of a function, and what they may choose from."""
        arguments, called = function.args, f"{function.name}()"
        if arguments.kwonlyargs or arguments.vararg or arguments.kwarg or arguments.posonlyargs:
            raise self._error(function, f"{called} takes plain named inputs only")
        if len(arguments.defaults) != len(parameters):
            raise self._error(function, f"every input of {called} needs '= Input(...)'")
        properties: Json = {}
        enumerations: Json = {}
        required: list[str] = []
        for order, (parameter, value) in enumerate(zip(parameters, arguments.defaults, strict=True)):
            name = parameter.arg
            entry = self._input(parameter, value, enumerations)
            properties[name] = entry | {"x-order": order}
            if "default" not in entry:
                required.append(name)
        inputs: Json = {"title": title, "type": "object", "properties": properties}
        if required:
            inputs["required"] = required
        return inputs, enumerations

    def _predict(self) -> ast.FunctionDef | ast.AsyncFunctionDef:
        found = [
            node
            for scope in self._tree.body
            if isinstance(scope, ast.ClassDef)
            for node in scope.body
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == "predict"
        ]
        if len(found) != 1:
            raise ValueError(f"{self._name}: one class must define predict(), but {len(found)} do")
        return found[0]

    def _input(self, parameter: ast.arg, value: ast.expr, enumerations: Json) -> Json:
        type_name, optional = self._annotation(parameter)
        given = self._keywords(parameter.arg, value)
        choices = given.pop("choices", None)
        default = given.pop("default", ...)
        if default is ... and optional:
            raise self._error(value, f"{parameter.arg} may be None, so it needs default=None")
        if default is not ... and not _suits(default, DEFAULT_TYPES[type_name], optional):
            raise self._error(value, f"{parameter.arg}'s default is no {type_name}")
        entry: Json = {KEYWORDS[keyword][0]: literal for keyword, literal in given.items()}
        if default is not ...:
            entry["default"] = default
        if optional:
            entry["nullable"] = True
        if choices is None:
            return entry | TYPES[type_name] | {"title": parameter.arg.replace("_", " ").title()}
        if not choices or not all(_suits(choice, DEFAULT_TYPES[type_name], False) for choice in choices):
            raise self._error(value, f"{parameter.arg}'s choices are not all of type {type_name}")
        enumerations[parameter.arg] = {
            "title": parameter.arg,
            "description": "An enumeration.",
            "enum": choices,
        } | TYPES[type_name]
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

    def _output(self, predict: ast.FunctionDef | ast.AsyncFunctionDef) -> Json:
        if predict.returns is None or ast.unparse(predict.returns) != "list[Path]":
            raise self._error(predict, "predict() must return list[Path]")
        return {"title": "Output", "type": "array", "items": TYPES["Path"]}

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


def _reference(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _object(title: str, **properties: Json) -> Json:
    return {"title": title, "type": "object", "properties": properties}


def _text(title: str, **more: str) -> Json:
    return {"title": title, "type": "string", **more}


def _schemas(inputs: Json, output: Json) -> Json:
    """What every Cog model has besides its enumerations."""
    location = {"anyOf": [{"type": "string"}, {"type": "integer"}]}
    statuses = ["starting", "processing", "succeeded", "canceled", "failed"]
    return {
        "Input": inputs,
        "Output": output,
        "PredictionRequest": _object("PredictionRequest", id=_text("Id"), input=_reference("Input")),
        "PredictionResponse": _object(
            "PredictionResponse",
            input=_reference("Input"),
            output=_reference("Output"),
            id=_text("Id"),
            version=_text("Version"),
            created_at=_text("Created At", format="date-time"),
            started_at=_text("Started At", format="date-time"),
            completed_at=_text("Completed At", format="date-time"),
            status=_text("Status"),
            error=_text("Error"),
            logs=_text("Logs"),
            metrics={"title": "Metrics", "type": "object"},
        ),
        "Status": _text("Status", description="An enumeration.") | {"enum": statuses},
        "HTTPValidationError": _object(
            "HTTPValidationError",
            detail={"title": "Detail", "type": "array", "items": _reference("ValidationError")},
        ),
        "ValidationError": _object(
            "ValidationError",
            loc={"title": "Location", "type": "array", "items": location},
            msg=_text("Message"),
            type=_text("Error Type"),
        )
        | {"required": ["loc", "msg", "type"]},
    }


def _operation(summary: str, operation: str, answer: Json, **more: Any) -> Json:
    responses = {"200": _response("Successful Response", answer)}
    if more:  # whatever takes a body or a parameter can refuse it
        responses["422"] = _response("Validation Error", _reference("HTTPValidationError"))
    return {"summary": summary, "operationId": operation, "responses": responses, **more}


def _response(description: str, schema: Json) -> Json:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _document(inputs: Json, output: Json, enumerations: Json) -> Json:
    body = {"content": {"application/json": {"schema": _reference("PredictionRequest")}}}
    identifier = {"name": "prediction_id", "in": "path", "required": True, "schema": _text("Prediction Id")}
    predict = _operation(
        "Predict",
        "predict_predictions_post",
        _reference("PredictionResponse"),
        description="Run a single prediction on the model",
        requestBody=body,
    )
    cancel = _operation(
        "Cancel", "cancel_predictions__prediction_id__cancel_post", {}, parameters=[identifier]
    )
    return {
        "openapi": "3.0.2",
        "info": {"title": "Cog", "version": "dev"},
        "paths": {
            "/": {"get": _operation("Root", "root__get", {})},
            "/health-check": {"get": _operation("Healthcheck", "healthcheck_health_check_get", {})},
            "/predictions": {"post": predict},
            "/predictions/{prediction_id}/cancel": {"post": cancel},
        },
        "components": {"schemas": _schemas(inputs, output) | enumerations},
    }


if __name__ == "__main__":
    for path, text in golden_files().items():
        path.write_text(text, encoding="utf-8")

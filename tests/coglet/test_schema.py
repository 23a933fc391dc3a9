"""The golden schemas' maker against Cog's own generator, and against what that generator drops in silence."""

import json
from pathlib import Path

import pytest
from schema_maker import make_schema

DATA = Path(__file__).parents[1] / "data"
SOURCE = """
from cog import BasePredictor, Input, Path

class Predictor(BasePredictor):
    def predict(self, {parameter}) -> list[Path]:
        pass
"""


def test_the_sample_gives_what_cogs_generator_gives() -> None:
    expected = json.loads((DATA / "schema_sample.json").read_text())
    assert make_schema(DATA / "schema_sample.py") == expected


@pytest.mark.parametrize(
    ("parameter", "reason"),
    [
        ("x: int = Input(le=MOST)", "must be a literal"),
        ("x: int = Input(le=2 * 2)", "must be a literal"),
        ("x: int = Input(le=2_000)", "misreads number"),
        ("x: int = Input(le=0x10)", "misreads number"),
        ('x: int = Input(description=("a"))', "parentheses"),
        ('x: int = Input(description="a " "b")', "adjacent strings"),
        ('x: int = Input(description=("a " "b"))', "adjacent strings"),
        ('x: int = Input(description=f"a")', "misreads string"),
        ('x: int = Input(description="""a""")', "misreads string"),
        (r'x: int = Input(description="a\tb")', "backslashes"),
        ("x: str = Input(choices=list(SIZES))", "must be a literal"),
        ('x: str = Input(choices=("a", "b"))', "parentheses"),
        ('x: str = Input(choices=["a" "b"])', "adjacent strings"),
        ('x: int = Input(choices=["a"])', "not all of type int"),
        ("x: str = Input(choices=[])", "not all of type str"),
        ("x: int = Input(default=DEFAULT)", "must be a literal"),
        ("x: int = Input(default=1.5)", "default is no int"),
        ("x: int = Input(default=True)", "default is no int"),
        ("x: int = Input(default=None)", "default is no int"),
        ("x: int | None = Input(ge=1)", "needs default=None"),
        ("x: int = Input(4)", "named arguments only"),
        ("x: int = 4", "named arguments only"),
        ("x: int", "needs '= Input"),
        ("x=Input()", "must be one of"),
        ("x: Literal['a'] = Input()", "must be one of"),
        ("x: int = Input(ge=True)", "wrong type"),
        ("x: int = Input(multiple_of=8)", "no use for 'multiple_of'"),
        ("*, x: int = Input(ge=1)", "plain named inputs"),
    ],
)
def test_what_cog_drops_or_refuses_is_an_error(tmp_path: Path, parameter: str, reason: str) -> None:
    source = tmp_path / "predict.py"
    source.write_text(SOURCE.format(parameter=parameter))
    with pytest.raises(ValueError, match=reason):
        make_schema(source)


def test_a_path_that_is_not_cogs_is_an_error(tmp_path: Path) -> None:
    source = tmp_path / "predict.py"
    text = SOURCE.format(parameter="x: Path = Input()")
    source.write_text(text.replace("Input, Path", "Input\nfrom pathlib import Path"))
    with pytest.raises(ValueError, match="from cog import Path"):
        make_schema(source)


def test_negative_and_fractional_bounds_are_kept(tmp_path: Path) -> None:
    source = tmp_path / "predict.py"
    source.write_text(SOURCE.format(parameter='x: float = Input(ge=-0.5, le=1e3, regex=r"\\d")'))
    entry = make_schema(source)["components"]["schemas"]["Input"]["properties"]["x"]
    assert (entry["minimum"], entry["maximum"], entry["pattern"]) == (-0.5, 1000, r"\d")

"""fewstep/cli/predict.py and serve.py: what they make of a command line before anything starts."""

import base64
import hashlib
import json
from pathlib import Path

import pytest
from PIL import Image

from fewstep.cli import benchmark, predict, serve
from fewstep.errors import Refused
from fewstep.images.codec import encode_image
from fewstep.images.metadata import save_options

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = json.loads((ROOT / "tests" / "data" / "schema_sample.json").read_text())["components"]["schemas"]


def convert(name, value):
    return predict.convert(name, value, SAMPLE["Input"]["properties"][name], SAMPLE)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("steps", "4", 4),
        ("steps", "99", 99),  # the server says what the range is
        ("guidance", "1.5", 1.5),
        ("prompt", "4", "4"),
        ("prompt", "a=b", "a=b"),
        ("aspect_ratio", "16:9", "16:9"),
        ("disable_safety_checker", "True", True),
        ("disable_safety_checker", "false", False),
    ],
)
def test_values_become_the_types_of_the_schema(name, value, expected):
    converted = convert(name, value)
    assert converted == expected and type(converted) is type(expected)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("steps", "four", "a whole number"),
        ("steps", "2.5", "a whole number"),
        ("guidance", "much", "a number"),
        ("disable_safety_checker", "1", "true or false"),
        ("image", "@missing.png", "cannot read missing.png"),
    ],
)
def test_a_value_of_another_type_is_refused(name, value, reason):
    with pytest.raises(Refused, match=reason):
        convert(name, value)


def test_a_file_is_a_data_url_for_a_file_input_and_text_for_any_other(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89")
    (tmp_path / "a.txt").write_text("a red house\n")
    assert convert("image", f"@{tmp_path}/a.png") == "data:image/png;base64,iQ=="
    assert convert("prompt", f"@{tmp_path}/a.txt") == "a red house"
    (tmp_path / "photo").write_bytes(b"\xff\xd8\xff\xe0")
    assert convert("image", f"@{tmp_path}/photo").startswith("data:image/jpeg;base64,")
    with pytest.raises(Refused, match=r"a\.txt is not a picture as JPEG, PNG or WebP"):
        convert("image", f"@{tmp_path}/a.txt")


def urls(*contents):
    return [f"data:image/webp;base64,{base64.b64encode(content).decode()}" for content in contents]


@pytest.mark.parametrize(
    ("contents", "target", "names"),
    [
        ([b"a"], "some/out.webp", ["some/out.webp"]),
        ([b"a", b"b"], "out.webp", ["out.0.webp", "out.1.webp"]),  # as Cog does
        ([b"a"], "output", ["output.webp"]),
    ],
)
def test_outputs_are_named_by_the_target_and_numbered_if_several(contents, target, names):
    named = predict.name_files(urls(*contents), Path(target))
    assert named == list(zip(map(Path, names), contents, strict=True))


def test_a_folder_as_target_holds_the_output(tmp_path):
    assert predict.check_target(str(tmp_path)) == tmp_path / "output"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["-i", "prompt=x", "-i", "stepz=4"], "no input 'stepz'; the inputs are prompt, steps, guidance"),
        (["-i", "prompt"], "NAME=VALUE"),
        (["-i", "prompt=x", "-i", "prompt=y"], "prompt is given twice"),
        (["-i", "prompt=x", "-i", "steps=x"], "steps must be a whole number"),
        (["-i", "prompt=x", "--json", "{}"], "not both"),
        (["--json", "[1]"], "--json"),
        (["--json", "missing.json"], "--json reads the inputs from missing.json"),
        (["--json", '{"stepz": 4}'], "no input 'stepz'"),
        (["-i", "prompt=x", "-o", "missing/out.webp"], "no folder missing"),
    ],
)
def test_a_wrong_command_line_is_explained_before_anything_starts(arguments, reason, capsys, monkeypatch):
    monkeypatch.setattr(predict, "running_server", None)
    assert predict.main(arguments) == 1
    captured = capsys.readouterr()
    assert reason in captured.err and captured.out == ""


@pytest.fixture
def asked(monkeypatch):
    """The inputs that the server would be asked with."""
    asked = []
    monkeypatch.setattr(predict, "_ask", lambda inputs, environ: asked.append(inputs) or [])
    return asked


def test_json_gives_the_inputs_from_a_file(tmp_path, asked):
    inputs = {"prompt": "x", "steps": 2}
    (tmp_path / "inputs.json").write_text(json.dumps(inputs))
    for written in (f"@{tmp_path}/inputs.json", f"{tmp_path}/inputs.json", json.dumps(inputs)):
        assert predict.main(["--json", written, "-o", str(tmp_path / "out")]) == 0
    assert asked == [inputs] * 3


@pytest.mark.parametrize(
    ("name", "given", "asked_for"),
    [
        ("out.png", {}, {"output_format": "png"}),
        ("out.JPEG", {}, {"output_format": "jpg"}),
        ("out.png", {"output_format": "webp"}, {"output_format": "webp"}),
        ("out.tif", {}, {}),
        ("out", {}, {}),
    ],
)
def test_the_format_follows_the_suffix_unless_it_is_given(tmp_path, asked, name, given, asked_for):
    inputs = {"prompt": "x", **given}
    assert predict.main(["--json", json.dumps(inputs), "-o", str(tmp_path / name)]) == 0
    assert asked == [{"prompt": "x", **asked_for}]


@pytest.mark.parametrize("port", ["x", "0", "65536", "-1"])
def test_serve_refuses_a_port_that_is_none(port, capsys, monkeypatch):
    monkeypatch.setenv("PORT", port)
    assert serve.main([]) == 1
    assert "PORT must be" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "unread"),
    [
        (["full", "--model", "miniature"], "the suite full does not read --model"),
        (["page", "--out", "a.csv"], "the suite page does not read --out"),
        (["gpu", "--rounds", "2"], "the suite gpu does not read --rounds"),
    ],
)
def test_an_option_of_another_benchmark_is_refused(arguments, unread, capsys, monkeypatch):
    for name in ("_run", "_measure_gpu"):
        monkeypatch.setattr(benchmark, name, None)
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(arguments)
    assert unread in capsys.readouterr().err


@pytest.mark.parametrize(("failed", "status"), [([], 0), (["whole", "quality"], 1)])
def test_a_benchmark_with_stages_that_failed_says_which(failed, status, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "_measure_gpu", lambda started, **options: failed)
    assert benchmark.main(["gpu"]) == status
    assert ("2 stages failed, and their rows say why: whole, quality" in capsys.readouterr().err) == bool(
        failed
    )


class TestRecipe:
    """--recipe, up to what is asked of the server."""

    SENT = b"the picture that it was painted from"

    @pytest.fixture
    def asked(self, tmp_path, monkeypatch):
        recipe = {"fewstep": "0.1.0", "model": "miniature", "revision": "c0ffee", "prompt": "a house"}
        recipe |= {"seed": 3, "negative_prompt": "", "steps": 4, "guidance": 1.0, "width": 152, "height": 104}
        recipe |= {"lcm_scale": 1.0, "styles": [{"style": "flat", "style_scale": 0.5, "sha256": "ab"}]}
        recipe |= {"prompt_strength": 0.4, "image_sha256": hashlib.sha256(self.SENT).hexdigest()}

        def image(recipe):
            return encode_image(Image.new("RGB", (16, 16)), "webp", 90, **save_options(recipe, "webp"))

        (tmp_path / "old.webp").write_bytes(image(recipe))
        (tmp_path / "sent.webp").write_bytes(self.SENT)
        asked = []

        def ask(inputs, environ):
            asked.append((inputs, environ["FEWSTEP_MODEL"]))
            return urls(image({**recipe, "revision": "other"}))

        monkeypatch.setattr(predict, "_ask", ask)
        monkeypatch.chdir(tmp_path)
        return asked

    def test_its_inputs_are_asked_for_and_others_take_their_place(self, asked, capsys):
        arguments = ["--recipe", "old.webp", "-i", "image=@sent.webp", "-i", "seed=9", "-o", "new.webp"]
        assert predict.main(arguments) == 0
        [(inputs, model)] = asked
        assert ([inputs.pop("image")], model) == (urls(self.SENT), "miniature")
        assert inputs == {
            **{"prompt": "a house", "negative_prompt": "", "seed": 9, "steps": 4, "guidance": 1.0},
            **{"aspect_ratio": "custom", "width": 152, "height": 104, "lcm_scale": 1.0},
            **{"prompt_strength": 0.4, "style": "flat", "style_scale": 0.5, "output_format": "webp"},
        }
        assert "the weights are others" in capsys.readouterr().err

    def test_another_shape_takes_the_place_of_the_size(self, asked):
        arguments = ["--recipe", "old.webp", "-i", "image=@sent.webp", "-i", "aspect_ratio=1:1"]
        assert predict.main(arguments) == 0
        [(inputs, _)] = asked
        assert inputs["aspect_ratio"] == "1:1" and not {"width", "height"} & inputs.keys()

    @pytest.mark.parametrize(
        ("arguments", "model", "said"),
        [
            ([], "", "painted from another file as image; give that very one, as -i image=@FILE"),
            (["-i", "image=@old.webp"], "", "painted from another file as image"),
            (["-i", "image=https://x.org/a.png"], "", "painted from another file as image"),
            (["-i", "image=@sent.webp"], "sdxl", "painted by miniature; set FEWSTEP_MODEL to that"),
        ],
    )
    def test_what_cannot_be_followed_is_refused_before_anything_starts(
        self, asked, monkeypatch, capsys, arguments, model, said
    ):
        monkeypatch.setenv("FEWSTEP_MODEL", model)
        assert predict.main(["--recipe", "old.webp", *arguments]) == 1
        assert said in capsys.readouterr().err and asked == []

    @pytest.mark.parametrize(
        ("name", "said"),
        [("sent.webp", "holds no recipe"), ("none.webp", "cannot use none.webp: No such file")],
    )
    def test_a_file_without_a_recipe_is_refused(self, asked, capsys, name, said):
        assert predict.main(["--recipe", name]) == 1
        assert said in capsys.readouterr().err and asked == []

import logging
import re
from dataclasses import fields
from pathlib import Path

import pytest

from fewstep.errors import SettingsError
from fewstep.settings import OF_SCRIPTS, Settings, Shape

REPOSITORY = Path(__file__).resolve().parents[1]


def test_nothing_set_gives_the_defaults():
    settings = Settings.from_env({})
    assert settings == Settings()
    assert (settings.model, settings.weights_root) == ("miniature", REPOSITORY / "weights")
    assert (settings.device, settings.dtype, settings.verify) == ("auto", "auto", "sha256")
    assert (settings.deadline_s, settings.max_batch) == (120.0, 8)


# Of every field: its variable, a value that is not the default, and what is read of it where that differs.
GIVEN = {
    "model": ("FEWSTEP_MODEL", "sdxl"),
    "weights_root": ("FEWSTEP_WEIGHTS", "/w", Path("/w")),
    "output_root": ("FEWSTEP_OUTPUTS", "/o", Path("/o")),
    "device": ("FEWSTEP_DEVICE", "cuda"),
    "dtype": ("FEWSTEP_DTYPE", "bf16"),
    "engine": ("FEWSTEP_ENGINE", "openvino"),
    "openvino_size": ("FEWSTEP_OPENVINO_SIZE", "512x768", (512, 768)),
    "vae": ("FEWSTEP_VAE", "tiny"),
    "compiled": (
        "FEWSTEP_COMPILED",
        "1024x768, 512x512x4,512x512x2g",
        (Shape(1024, 768), Shape(512, 512, 4), Shape(512, 512, 2, guided=True)),
    ),
    "verify": ("FEWSTEP_VERIFY", "size"),
    "deadline_s": ("FEWSTEP_DEADLINE_S", "7.5", 7.5),
    "max_batch": ("FEWSTEP_MAX_BATCH", "3", 3),
    "memory_gb": ("FEWSTEP_MEMORY", "12", 12),
    "coglet_root": ("FEWSTEP_COGLET_ROOT", "/c", Path("/c")),
    "safety": ("FEWSTEP_SAFETY", "vit"),
    "allow_unsafe": ("FEWSTEP_ALLOW_UNSAFE", "1", True),
    "recipes": ("FEWSTEP_RECIPES", "off", False),
    "styles_root": ("FEWSTEP_STYLES", "/s", Path("/s")),
    "style_hosts": ("FEWSTEP_STYLE_HOSTS", "example.org, *.example.net", ("example.org", "*.example.net")),
    "style_repos": ("FEWSTEP_STYLE_REPOS", "me/private", ("me/private",)),
    "style_cache": ("FEWSTEP_STYLE_CACHE", "/f", Path("/f")),
    "style_disk_bytes": ("FEWSTEP_STYLE_DISK_GB", "5", 5_000_000_000),
    "style_memory_bytes": ("FEWSTEP_STYLE_MEMORY_GB", "1", 1_000_000_000),
    "hf_endpoint": ("HF_ENDPOINT", "https://mirror.example/", "https://mirror.example"),
    "hf_token": ("HF_TOKEN", "secret-1"),
    "web_data": ("FEWSTEP_WEB_DATA", "/d", Path("/d")),
    "database_url": ("DATABASE_URL", "secret-2"),
    "api_key": ("FEWSTEP_API_KEY", "secret-3"),
    "operator_key": ("FEWSTEP_OPERATOR_KEY", "secret-4"),
    "chat_key": ("OPENAI_API_KEY", "secret-5"),
    "chat_url": ("OPENAI_BASE_URL", "https://chat.example"),
    "chat_model": ("FEWSTEP_CHAT_MODEL", "other"),
    "replicate_token": ("REPLICATE_API_TOKEN", "secret-6"),
}


def test_every_field_is_read_from_its_variable_and_secrets_are_not_shown():
    settings = Settings.from_env({variable: text for variable, text, *_ in GIVEN.values()})
    for name in (field.name for field in fields(Settings)):
        assert getattr(settings, name) == GIVEN[name][-1] != getattr(Settings(), name)
    assert "secret" not in repr(settings)


def test_the_process_environment_is_the_default(monkeypatch):
    monkeypatch.setenv("FEWSTEP_MAX_BATCH", "5")
    assert Settings.from_env().max_batch == 5


def test_an_empty_variable_counts_as_unset():
    names = ("FEWSTEP_DEVICE", "FEWSTEP_MAX_BATCH", "FEWSTEP_WEIGHTS", "FEWSTEP_COGLET_ROOT")
    assert Settings.from_env(dict.fromkeys(names, "")) == Settings()


def test_a_relative_folder_is_fixed_when_it_is_read_and_not_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = Settings.from_env({"FEWSTEP_OUTPUTS": "out"})
    monkeypatch.chdir("/")
    assert settings.output_root == tmp_path / "out" and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("FEWSTEP_DEVICE", "qqq", "auto, cpu, cuda"),
        ("FEWSTEP_DTYPE", "fp8-qqq", "auto, fp32, bf16, fp16"),
        ("FEWSTEP_MEMORY", "8GB", "a whole number from 1 to 10000"),
        ("FEWSTEP_ENGINE", "tensorrt", "torch, compiled, compiled-fp8, openvino, openvino-int8"),
        ("FEWSTEP_OPENVINO_SIZE", "512qqq", "such as 512x768"),
        ("FEWSTEP_OPENVINO_SIZE", "512x-8", "such as 512x768"),
        ("FEWSTEP_OPENVINO_SIZE", "516x512", "multiples of 8"),
        ("FEWSTEP_VAE", "qqq", "full, tiny"),
        ("FEWSTEP_COMPILED", "qqq", "such as 1024x1024"),
        ("FEWSTEP_COMPILED", "512x512,", "such as 1024x1024"),
        ("FEWSTEP_COMPILED", "512x516", "multiples of 8"),
        ("FEWSTEP_COMPILED", "512x512x0", "such as 1024x1024"),
        ("FEWSTEP_COMPILED", ",".join(f"512x512x{n}" for n in range(1, 10)), "more than 8"),
        ("FEWSTEP_VERIFY", "qqq", "sha256, size"),
        ("FEWSTEP_DEADLINE_S", "qqq", "above 0"),
        ("FEWSTEP_DEADLINE_S", "0", "above 0"),
        ("FEWSTEP_DEADLINE_S", "-1", "above 0"),
        ("FEWSTEP_DEADLINE_S", "nan", "above 0"),
        ("FEWSTEP_DEADLINE_S", "inf", "at most 86400"),
        ("FEWSTEP_MAX_BATCH", "qqq", "1 to 64"),
        ("FEWSTEP_MAX_BATCH", "0", "1 to 64"),
        ("FEWSTEP_MAX_BATCH", "65", "1 to 64"),
        ("FEWSTEP_MAX_BATCH", "2.5", "1 to 64"),
    ],
)
def test_a_bad_value_is_refused_by_variable_and_choices(name, value, allowed):
    with pytest.raises(SettingsError) as caught:
        Settings.from_env({name: value})
    text = str(caught.value)
    assert name in text and allowed in text and "qqq" not in text


def test_a_misspelt_variable_is_warned_of_by_name_only(caplog):
    with caplog.at_level(logging.WARNING, logger="fewstep"):
        Settings.from_env(
            {
                "FEWSTEP_DEVISE": "a-secret",
                "OTHER": "y",
                "FEWSTEP_DEVICE": "cpu",
                "FEWSTEP_PYTHON": "x",
                "FEWSTEP_TORCH_INDEX": "x",
            }
        )
    assert [record.args for record in caplog.records] == [("FEWSTEP_DEVISE",)]
    assert "a-secret" not in caplog.text


def test_none_switches_fetching_of_styles_off():
    assert Settings.from_env({"FEWSTEP_STYLE_HOSTS": "none"}).style_hosts == ()
    assert "huggingface.co" in Settings.from_env({}).style_hosts


def test_every_variable_has_a_line_in_the_documentation():
    page = (REPOSITORY / "docs" / "settings.md").read_text()
    rows = re.findall(r"^\| (`[A-Z_]+`(?:, `[A-Z_]+`)*) \|", page, re.MULTILINE)
    assert set(re.findall("[A-Z_]+", " ".join(rows))) == {variable for variable, *_ in GIVEN.values()}
    assert all(f"`{variable}` is " in page for variable in OF_SCRIPTS)


@pytest.mark.parametrize(
    ("name", "value", "engine"),
    [("FEWSTEP_OPENVINO_SIZE", "512x512", "openvino"), ("FEWSTEP_COMPILED", "512x512", "compiled")],
)
def test_what_only_another_engine_reads_is_said(name, value, engine, caplog):
    Settings.from_env({name: value, "FEWSTEP_ENGINE": engine})
    assert not caplog.records
    Settings.from_env({name: value})
    assert f"{name} is set, but FEWSTEP_ENGINE is torch" in caplog.text

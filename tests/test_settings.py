import logging
import os
import re
from dataclasses import fields
from pathlib import Path

import pytest

from fewstep.errors import SettingsError
from fewstep.settings import Settings, Shape

REPOSITORY = Path(__file__).resolve().parents[1]


def test_nothing_set_gives_the_defaults():
    settings = Settings.from_env({})

    assert settings == Settings()
    assert settings.model == "miniature"
    assert settings.weights_root == REPOSITORY / "weights"
    assert (settings.device, settings.dtype, settings.verify) == ("auto", "auto", "sha256")
    assert (settings.deadline_s, settings.max_batch) == (120.0, 8)


def test_every_field_is_read_from_the_environment(tmp_path):
    environ = {
        "FEWSTEP_MODEL": "sdxl",
        "FEWSTEP_WEIGHTS": str(tmp_path / "w"),
        "FEWSTEP_OUTPUTS": str(tmp_path / "o"),
        "FEWSTEP_DEVICE": "cuda",
        "FEWSTEP_DTYPE": "bf16",
        "FEWSTEP_ENGINE": "openvino",
        "FEWSTEP_OPENVINO_SIZE": "512x768",
        "FEWSTEP_VAE": "tiny",
        "FEWSTEP_COMPILED": "1024x768, 512x512x4,512x512x2g",
        "FEWSTEP_VERIFY": "size",
        "FEWSTEP_DEADLINE_S": "7.5",
        "FEWSTEP_MAX_BATCH": "3",
        "FEWSTEP_COGLET_ROOT": str(tmp_path / "c"),
        "FEWSTEP_SAFETY": "vit",
        "FEWSTEP_ALLOW_UNSAFE": "1",
        "FEWSTEP_STYLES": str(tmp_path / "s"),
        "FEWSTEP_STYLE_HOSTS": "example.org, *.example.net",
        "FEWSTEP_STYLE_REPOS": "me/private",
        "FEWSTEP_STYLE_CACHE": str(tmp_path / "f"),
        "FEWSTEP_STYLE_DISK_GB": "5",
        "FEWSTEP_STYLE_MEMORY_GB": "1",
        "FEWSTEP_RECIPES": "off",
        "HF_ENDPOINT": "https://mirror.example/",
        "HF_TOKEN": "hf_secret",
    }

    settings = Settings.from_env(environ)

    assert settings == Settings(
        "sdxl",
        tmp_path / "w",
        tmp_path / "o",
        "cuda",
        "bf16",
        "size",
        7.5,
        3,
        tmp_path / "c",
        safety="vit",
        allow_unsafe=True,
        styles_root=tmp_path / "s",
        style_hosts=("example.org", "*.example.net"),
        style_repos=("me/private",),
        style_cache=tmp_path / "f",
        style_disk_bytes=5_000_000_000,
        style_memory_bytes=1_000_000_000,
        recipes=False,
        engine="openvino",
        openvino_size=(512, 768),
        vae="tiny",
        compiled=(Shape(1024, 768), Shape(512, 512, 4), Shape(512, 512, 2, guided=True)),
        hf_endpoint="https://mirror.example",
        hf_token="hf_secret",
    )
    assert "hf_secret" not in repr(settings)
    untouched = [f.name for f in fields(Settings) if getattr(settings, f.name) == getattr(Settings(), f.name)]
    assert untouched == []


def test_the_process_environment_is_the_default(monkeypatch):
    monkeypatch.setenv("FEWSTEP_MAX_BATCH", "5")

    assert Settings.from_env().max_batch == 5


def test_an_empty_variable_counts_as_unset():
    assert (
        Settings.from_env(
            {"FEWSTEP_DEVICE": "", "FEWSTEP_MAX_BATCH": "", "FEWSTEP_WEIGHTS": "", "FEWSTEP_COGLET_ROOT": ""}
        )
        == Settings()
    )


def test_a_relative_folder_is_fixed_when_it_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = Settings.from_env({"FEWSTEP_OUTPUTS": "out"})
    monkeypatch.chdir("/")

    assert settings.output_root == tmp_path / "out"


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("FEWSTEP_MODEL", "qqq", "miniature"),
        ("FEWSTEP_DEVICE", "qqq", "auto, cpu, cuda"),
        ("FEWSTEP_DTYPE", "fp8-qqq", "auto, fp32, bf16, fp16"),
        ("FEWSTEP_ENGINE", "tensorrt", "torch, compiled, openvino, openvino-int8"),
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

    assert name in str(caught.value)
    assert allowed in str(caught.value)
    assert "qqq" not in str(caught.value)


def test_a_misspelt_variable_is_warned_of_by_name_only(caplog):
    with caplog.at_level(logging.WARNING, logger="fewstep"):
        Settings.from_env(
            {"FEWSTEP_DEVISE": "a-secret", "FEWSTEP_TORCH_INDEX": "x", "OTHER": "y", "FEWSTEP_DEVICE": "cpu"}
        )

    assert [record.args for record in caplog.records] == [("FEWSTEP_DEVISE",)]
    assert "a-secret" not in caplog.text


def test_reading_settings_creates_nothing(tmp_path):
    Settings.from_env({"FEWSTEP_OUTPUTS": str(tmp_path / "o"), "FEWSTEP_WEIGHTS": str(tmp_path / "w")})

    assert os.listdir(tmp_path) == []


def test_none_switches_fetching_of_styles_off():
    assert Settings.from_env({"FEWSTEP_STYLE_HOSTS": "none"}).style_hosts == ()
    assert "huggingface.co" in Settings.from_env({}).style_hosts


def test_every_variable_has_a_line_in_the_documentation():
    result, page = (REPOSITORY / "docs" / "settings.md").read_text().split("The page (")
    for text, module, read in (
        (result, "settings.py", r'read\.\w+\(\s*"([A-Z_]+)"'),
        (page, "web/settings.py", r'environ\.get\("([A-Z_]+)"'),
    ):
        written = re.findall(r"^\| (`[A-Z_]+`(?:, `[A-Z_]+`)*) \|", text, re.MULTILINE)
        source = (REPOSITORY / "fewstep" / module).read_text()
        assert set(re.findall("[A-Z_]+", " ".join(written))) == set(re.findall(read, source))


@pytest.mark.parametrize(
    ("name", "value", "engine"),
    [("FEWSTEP_OPENVINO_SIZE", "512x512", "openvino"), ("FEWSTEP_COMPILED", "512x512", "compiled")],
)
def test_what_only_another_engine_reads_is_said(name, value, engine, caplog):
    Settings.from_env({name: value, "FEWSTEP_ENGINE": engine})
    assert not caplog.records
    Settings.from_env({name: value})
    assert f"{name} is set, but FEWSTEP_ENGINE is torch" in caplog.text

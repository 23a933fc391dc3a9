"""Samplers side by side on the miniature, and the meters for models that cannot be judged."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small import drawn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from fewstep.cli.evaluate import main
from fewstep.evaluation.compare import samplers, table
from fewstep.evaluation.metrics import clip_score, feature_distance
from fewstep.generation.load import load_pipeline
from fewstep.models.specs import get_model
from fewstep.settings import Settings
from fewstep.training.distill import FullStudent, make_full_student
from fewstep.training.networks import load_base

SETTINGS = Settings(verify="size", dtype="fp32")
MINIATURE = SETTINGS.weights_root / "miniature"
NAMES = ["DDIM", "DPM-Solver++", "DDIM, trailing", "DPM-Solver++, trailing", "LCM", "LCM-LoRA"]


def load():
    return load_base("miniature", SETTINGS, torch.device("cpu"))


@pytest.fixture(scope="module")
def lcm(tmp_path_factory) -> Path:
    """A full LCM that has learnt nothing yet: its teacher."""
    folder = tmp_path_factory.mktemp("lcm")
    make_full_student(load().unet, FullStudent(width=64)).save_pretrained(folder)
    return folder


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


@pytest.mark.numeric
def test_every_sampler_is_another_solvers_agree_in_many_steps_and_the_last_is_the_containers(lcm):
    prompt = ["a red house in a meadow with mountains at sunset"]
    few, many = {}, {}
    for sampler in samplers(load, 2.0, MINIATURE / "lcm_lora.safetensors", lcm):
        few[sampler.name] = pixels(sampler.generate(prompt, steps=2)[0])
        if sampler.name in ("DDIM", "DPM-Solver++"):
            many[sampler.name] = pixels(sampler.generate(prompt, steps=50)[0])
    assert list(few) == NAMES
    assert all(np.abs(a - b).mean() > 0.5 for i, a in enumerate(few.values()) for b in list(few.values())[:i])
    assert np.abs(many["DDIM"] - many["DPM-Solver++"]).mean() < 5
    [theirs] = sampler.generate(prompt, steps=4)
    [ours] = load_pipeline(get_model("miniature"), SETTINGS).images(prompt, [1000])
    assert np.abs(pixels(theirs) - pixels(ours)).mean() < 1  # bf16


@pytest.mark.slow
def test_the_command_writes_table_plot_and_grid(lcm, tmp_path, monkeypatch):
    monkeypatch.setenv("FEWSTEP_VERIFY", "size")
    sizes = ["--captions", "6", "--steps", "1", "4", "--teacher-steps", "20"]
    assert main(["--out", str(tmp_path), "--lcm", str(lcm), *sizes]) == 0
    rows = list(csv.DictReader((tmp_path / "scores.csv").read_text().splitlines()))
    asked = [(name, steps) for name in NAMES for steps in ("1", "4")]
    asked.insert(2, ("DDIM", "20"))  # the teacher
    assert [(row["sampler"], row["steps"]) for row in rows] == asked
    right = {(row["sampler"], row["steps"]): float(row["all_right"]) for row in rows}
    assert right["LCM-LoRA", "4"] >= 80 > right["DDIM", "1"]
    assert right["DDIM", "20"] >= 80
    assert "| LCM-LoRA |" in (tmp_path / "README.md").read_text()
    with Image.open(tmp_path / "grid.webp") as sheet:
        assert sheet.size == (2 * 260 - 4, 6 * 260 - 4)
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps must be at least 1"),
        (["--model", "sdxl"], "--prompts is needed"),
        (["--model", "sdxl", "--prompts", "x"], "nothing measures these pictures"),
        (["--prompts", "x"], "nothing measures these pictures"),
        (["--features", "x"], "--features and --real go together"),
        (["--lcm", "nowhere"], "there is nothing at the path of --lcm"),
        (["--lora", "nowhere"], "there is nothing at the path of --lora"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(arguments, message, capsys, tmp_path):
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), *arguments])
    assert message in capsys.readouterr().err


def test_a_table_has_samplers_down_and_steps_across():
    rows = [{"sampler": name, "steps": n, "x": n + 0.05} for name in "ab" for n in (2, 1)][:3]
    assert table(rows, "x") == "|  | 1 | 2 |\n| --- | ---: | ---: |\n| a | 1.1 | 2.0 |\n| b |  | 2.0 |"


def drawings(count: int, colour: str = "red") -> list[Image.Image]:
    return [drawn("house", i, colour=colour) for i in range(count)]


@pytest.mark.numeric
def test_features_tell_like_sets_from_unlike_ones(tmp_path):
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ViTModel(ViTConfig(image_size=32, patch_size=8, **small)).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    real = [tmp_path / f"{i}.png" for i in range(40)]
    for path, drawing in zip(real, drawings(40), strict=True):
        drawing.save(path)
    measure = feature_distance(tmp_path / "vit", real)
    sets = drawings(40), drawings(80)[40:], drawings(40, "blue")
    same, like, other = (measure(images)["feature_distance"] for images in sets)
    assert abs(same) < 1e-4 and same < like < other


@pytest.mark.numeric
def test_the_clip_score_is_a_hundred_cosines(tmp_path):
    torch.manual_seed(1)  # with which not all cosines are below 0
    tokenizer = CLIPTokenizer.from_pretrained(MINIATURE / "tokenizer")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text = small | {"vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}
    text |= {"eos_token_id": tokenizer.eos_token_id}
    vision = small | {"image_size": 32, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    model.save_pretrained(tmp_path)
    crop = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = CLIPProcessor(image_processor=crop, tokenizer=tokenizer)
    processor.save_pretrained(tmp_path)
    prompts, pictures = [f"a {i} house" for i in range(30)], drawings(30)
    score = clip_score(tmp_path, prompts)(pictures)["clip_score"]
    expected = []
    with torch.inference_mode():
        for prompt, picture in zip(prompts, pictures, strict=True):
            one = model(**processor(text=[prompt], images=[picture], return_tensors="pt", padding=True))
            expected.append(max(0.0, float(torch.cosine_similarity(one.text_embeds, one.image_embeds))))
    assert score == pytest.approx(100 * float(np.mean(expected)), abs=0.01) and score > 1

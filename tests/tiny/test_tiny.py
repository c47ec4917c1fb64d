"""The embedded model as it ships: loads everywhere, is small, and answers."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from tiny import recipe
from tiny.episodes import scene_metadata

from vtts_rt.config import PerceptionConfig
from vtts_rt.data.needle import make_scene
from vtts_rt.models.base import ForwardBatch
from vtts_rt.models.mrope import MropePositions, build_position_ids
from vtts_rt.models.qwen2_5_vl import GEOMETRY
from vtts_rt.models.qwen2_5_vl.chat import CHAT
from vtts_rt.models.registry import checkpoint_dtype, load_extras, load_model
from vtts_rt.models.tokenizer import Tokenizer, encode_prompt
from vtts_rt.ops.patchify import PatchifyJob, patchify
from vtts_rt.perception.prompts import prompts_from_dict
from vtts_rt.perception.strategy import build_prompt, plan_round
from vtts_rt.runtime import Runtime

ASSETS = Path(str(files("vtts_rt") / "assets"))
FOLDER = ASSETS / "tiny"


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 10_000_000
    assert (ASSETS / "clip.mp4").stat().st_size < 600_000
    assert checkpoint_dtype("tiny") == torch.bfloat16
    model = load_model("tiny")
    assert 1e6 <= sum(p.numel() for p in model.parameters()) <= 4e6


def test_the_files_follow_the_recipe() -> None:
    extras = load_extras(FOLDER)
    perception = recipe.perception_fields()
    assert extras == {"dtype": recipe.DTYPE, "perception": perception, "prompts": recipe.PROMPTS}
    model, raw = load_model("tiny"), recipe.make_tokenizer()
    config = recipe.model_config(raw)
    assert model.config.vision == config.vision
    # The weights that ship are those of plain clips, which had other sections.
    assert model.config.language == replace(config.language, mrope_section=(1, 2, 13))
    assert model.config.eos_token_ids == config.eos_token_ids
    assert Tokenizer.from_pretrained(FOLDER, CHAT).token_id("<glue>") == raw.token_to_id("<glue>")


def test_logits_equal_transformers() -> None:
    """On a real first round: 84 px views of a clip, each its own vision segment."""
    import torchvision_shim

    torchvision_shim.install()
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    scene = make_scene(1, "held_out", footage=False)
    plan = plan_round("append", recipe.PERCEPTION, [scene_metadata(scene)], [], 0)
    prompt = build_prompt(
        recipe.PERCEPTION,
        CHAT,
        prompts_from_dict(recipe.PROMPTS),
        plan,
        (),
        question="Which pattern is on the red card?",
        options=("red green / blue yellow", "green red / blue yellow"),
    )
    encoded = encode_prompt(Tokenizer.from_pretrained(FOLDER, CHAT), prompt)
    backend = AutoTokenizer.from_pretrained(str(FOLDER))
    marker = "<|vision_start|><|video_pad|><|vision_end|>"
    expanded = CHAT.text(prompt).replace(
        marker, marker.replace("<|video_pad|>", "<|video_pad|>" * 9)
    )
    assert backend(expanded)["input_ids"] == encoded.token_ids
    jobs = [
        PatchifyJob(scene.frame(p.frame_a), scene.frame(p.frame_b), s.box, s.resized_hw)
        for s in plan.segments
        for p in s.pairs
    ]
    rows = patchify(jobs, GEOMETRY)
    grids = [segment.grid_thw for segment in plan.segments]
    ids = torch.tensor(encoded.token_ids)
    ours = load_model("tiny", dtype="float32")
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(str(FOLDER), dtype=torch.float32)
    positions = build_position_ids(encoded, MropePositions("release", 2.0))
    with torch.no_grad():
        features = ours.visual(rows, grids)
        vision = ours.vision_rows(ids, features)
        hidden = ours(ForwardBatch(ids, vision, positions, [0, len(ids)]))
        expected = theirs(
            input_ids=ids[None],
            attention_mask=torch.ones_like(ids)[None],
            pixel_values_videos=rows,
            video_grid_thw=torch.tensor(grids),
            second_per_grid_ts=torch.ones(len(grids)),
            mm_token_type_ids=(ids == ours.config.video_token_id).long()[None] * 2,
        ).logits[0]
        torch.testing.assert_close(ours.logits(hidden), expected, atol=1e-4, rtol=1e-4)


def test_it_answers_the_shipped_clip() -> None:
    about = json.loads((ASSETS / "clip.json").read_text())
    with Runtime.from_pretrained("tiny", dtype="float32") as runtime:
        answer = runtime.ask(ASSETS / "clip.mp4", about["question"], options=about["options"])
    assert answer.option == about["answer"]
    assert len(answer.rounds) == 3 and answer.strategy == "append"
    widths = [r.plan.views[0].box.x1 - r.plan.views[0].box.x0 for r in answer.rounds]
    assert widths == sorted(widths, reverse=True) and widths[2] < widths[0] / 4


def test_a_run_of_more_rounds_begins_as_one_of_fewer() -> None:
    """What `evaluate(together=True)` rests on; five rounds have few tokens."""
    about = json.loads((ASSETS / "clip.json").read_text())

    def texts(runtime: Runtime, rounds: int) -> list[str]:
        runtime.clear_caches()
        perception = PerceptionConfig(max_rounds=rounds)
        answer = runtime.ask(
            ASSETS / "clip.mp4", about["question"], options=about["options"], perception=perception
        )
        assert len(answer.rounds[-1].transcript.token_ids) < 1600
        return [r.text for r in answer.rounds]

    with Runtime.from_pretrained("tiny", dtype="float32") as runtime:
        most = texts(runtime, 5)
        assert len(most) >= 3 and all(texts(runtime, k) == most[:k] for k in (1, 2))


@pytest.mark.slow
def test_looking_again_helps() -> None:
    """A small sample of the bar; docs/tiny.md has the table over 500 clips."""
    from vtts_rt.evaluation.needle import evaluate

    with Runtime.from_pretrained("tiny", dtype="float32") as runtime:
        result = evaluate(runtime, seed=10_000, num=16, rounds=(1, 3), footage=False, together=True)
    first, third = result["rounds"]
    assert third["accuracy"] >= first["accuracy"] + 0.15

from __future__ import annotations

import numpy as np
import pytest
from tiny import recipe
from tiny.episodes import Episode, make_drill, make_episode, scene_metadata
from tiny.tokenizer import save_tokenizer

from vtts_rt.data.needle import (
    Difficulty,
    grid_place,
    make_question,
    make_scene,
    pattern_text,
)
from vtts_rt.models.mrope import MropePositions, build_position_ids
from vtts_rt.models.qwen2_5_vl.chat import CHAT
from vtts_rt.models.tokenizer import EncodedPrompt, Tokenizer, encode_prompt
from vtts_rt.perception.clue import parse_clue
from vtts_rt.perception.plan import RoundHistory
from vtts_rt.perception.prompts import prompts_from_dict
from vtts_rt.perception.strategy import build_prompt, plan_round

TEMPLATES = prompts_from_dict(recipe.PROMPTS)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(recipe.make_tokenizer(), folder)
    return Tokenizer.from_pretrained(folder, CHAT)


def _episode(
    tokenizer: Tokenizer, seed: int, level: Difficulty = "far", **options: object
) -> Episode:
    return make_episode(
        make_scene(seed, footage=False, difficulty=level),
        0,
        tokenizer=tokenizer,
        perception=recipe.PERCEPTION,
        templates=TEMPLATES,
        seed=0,
        **options,  # type: ignore[arg-type]
    )


def test_episodes_are_what_the_rounds_would_show(tokenizer: Tokenizer) -> None:
    """Token for token, replayed through policy, layout and clue parser as the runtime does."""
    for seed, level in enumerate(("far", "near", "twin", "twin", "glance")):
        episode = _episode(tokenizer, seed, level)
        question = make_question(episode.scene, 0, 0)
        video = scene_metadata(episode.scene)
        history: list[RoundHistory] = []
        whole: EncodedPrompt | None = None
        shown = episode.transcript
        ids = shown.token_ids.tolist()
        for index in range(len(episode.verdicts)):
            plan = plan_round("append", recipe.PERCEPTION, [video], history, index)
            words = {"question": question.text, "options": question.options}
            prompt = build_prompt(recipe.PERCEPTION, CHAT, TEMPLATES, plan, history, **words)
            part = encode_prompt(tokenizer, prompt)
            whole = part if whole is None else whole + part
            assert ids[: len(whole)] == whole.token_ids
            end = ids.index(tokenizer.encode("<|im_end|>")[0], len(whole))
            answer = ids[len(whole) : end]
            whole = whole.extended(answer)
            history.append(RoundHistory(plan, parse_clue(tokenizer.decode(answer))))
        assert whole is not None and len(ids) == len(whole) + 1
        positions = build_position_ids(whole, MropePositions("release", 2.0))
        np.testing.assert_array_equal(shown.position_ids[:, :-1], positions.numpy())
        assert shown.spans == whole.spans


ONE_LOOK, TWO, THREE = ("read",), ("card", "read"), ("card", "mark", "read")


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        ("glance", {ONE_LOOK}),
        ("near", {TWO}),
        ("far", {THREE}),
        ("twin", {TWO, THREE, ("card", "blank", *TWO), ("card", "blank", *THREE)}),
    ],
)
def test_the_level_says_how_many_looks_an_ideal_viewer_needs(
    tokenizer: Tokenizer, level: Difficulty, expected: set[tuple[str, ...]]
) -> None:
    episodes = [_episode(tokenizer, seed, level, jitter=0.0) for seed in range(24)]
    stages = [tuple(episode.stages) for episode in episodes]
    assert sum(found in expected for found in stages) >= 23
    assert expected <= set(stages)
    assert all(episode.clues[-1] == -1 for episode in episodes)  # who has read stops


def _said(tokenizer: Tokenizer, episode: Episode) -> list[str]:
    """What the model says in each round."""
    ids = episode.transcript.token_ids
    ends = [*np.flatnonzero(ids == tokenizer.token_id("<|im_end|>")), len(ids)]
    texts = []
    for answer in episode.answers:
        end = min(end for end in ends if end > answer)
        start = max(np.flatnonzero(ids[:answer] == tokenizer.token_id("<think>")))
        texts.append(tokenizer.decode(ids[start:end].tolist()))
    return texts


def test_the_other_card_is_looked_at_after_a_blank_one(tokenizer: Tokenizer) -> None:
    """In reading order; the whole frame is shown between, at the same spans but finer."""
    found = (_episode(tokenizer, seed, "twin", jitter=0.0) for seed in range(20))
    episode = next(e for e in found if "blank" in e.stages)
    blank, marked = episode.scene.blanks[0], episode.scene.cards[0]
    side = episode.scene.width
    assert grid_place(blank.box, side) < grid_place(marked.box, side)
    assert [v.card for v in episode.verdicts[:3]] == [blank, blank, marked]
    first, second, third, *_ = _said(tokenizer, episode)
    spans = first[first.index("[(") : first.index("]") + 1]
    assert second.startswith("<think> none mark</think>")
    assert second.endswith(f"<glue>{spans}</glue>")
    assert third.startswith("<think> card</think>") and "]</glue>" in third
    rounds = zip(episode.transcript.spans, episode.rounds, strict=True)
    looks = [span.segment for span, index in rounds if index == 2]
    assert {look.box.x1 - look.box.x0 for look in looks} == {side}
    times = [look.pairs[0].time_seconds for look in looks]
    assert max(np.diff(times)) <= 1.0


def test_a_view_beside_the_card_leads_back_to_the_same_card(tokenizer: Tokenizer) -> None:
    episode = _episode(tokenizer, 2, "far", jitter=1.0, miss=1.0)
    assert episode.stages[:3] == ["card", "lost", "card"]
    assert _said(tokenizer, episode)[1].startswith("<think> none card</think>")
    assert episode.verdicts[2].card == episode.verdicts[0].card


def test_what_is_trained_on(tokenizer: Tokenizer) -> None:
    episode = _episode(tokenizer, 1, jitter=0.0)
    shown = episode.transcript
    said = tokenizer.decode(shown.token_ids[episode.weights == 1.0].tolist())
    card = episode.scene.cards[0]
    assert f"<think> {pattern_text(card.pattern)}</think>" in said
    assert said.count("<glue>[(") == 2 and said.count("<glue></glue>") == 1
    assert (episode.weights[episode.answers] == np.array([0.1, 0.1, 5.0], np.float32)).all()
    assert ((episode.weights > 0) == shown.generated).all()
    for span in shown.spans:
        rows = (
            shown.position_ids[1, span.start : span.start + 9] - shown.position_ids[1, span.start]
        )
        assert rows.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_jitter_is_shown_but_not_trained_on(tokenizer: Tokenizer) -> None:
    episode = _episode(tokenizer, 1, jitter=1.0)
    clues = [clue for clue in episode.clues if clue >= 0]
    assert not episode.weights[clues].any() and episode.transcript.generated[clues].all()
    assert (episode.weights > 0).any()


def test_rounds_can_stand_alone(tokenizer: Tokenizer) -> None:
    whole = _episode(tokenizer, 1, jitter=0.0)
    third = _episode(tokenizer, 1, jitter=0.0, skip_rounds=2)
    assert third.stages == whole.stages[2:]
    rounds = zip(whole.transcript.spans, whole.rounds, strict=True)
    tail = [span.segment for span, index in rounds if index == 2]
    assert [span.segment for span in third.transcript.spans] == tail


def test_drills_end_with_the_letter(tokenizer: Tokenizer) -> None:
    scene = make_scene(1, footage=False)
    drill = make_drill(
        scene, 2, tokenizer=tokenizer, perception=recipe.PERCEPTION, templates=TEMPLATES,
        question_seed=5,
    )  # fmt: skip
    question = make_question(scene, 2, 5)
    text = tokenizer.decode(drill.transcript.token_ids.tolist())
    assert text.endswith(f"<answer>{'ABCD'[question.answer]}")
    assert drill.weights.sum() == drill.weights[-1] == 5.0

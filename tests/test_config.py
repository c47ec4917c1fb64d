"""PerceptionConfig: what is left to the model, what is resolved, what is refused."""

from __future__ import annotations

import copy
import pickle
from dataclasses import fields, replace
from typing import Any

import pytest
from utils import QWEN3_VL, resolved

from vtts_rt.config import PerceptionConfig, ResolvedPerception
from vtts_rt.models.qwen2_5_vl import GEOMETRY
from vtts_rt.types import Geometry

RECIPE: dict[str, Any] = {"strategy": "refresh", "max_rounds": 2, "sample_fps": 0.5}


def test_both_configs_have_the_same_settings() -> None:
    names = [f.name for f in fields(PerceptionConfig)]
    assert ["geometry", *names] == [f.name for f in fields(ResolvedPerception)]
    assert PerceptionConfig().given() == {}
    assert repr(PerceptionConfig(max_rounds=2)) == "PerceptionConfig(max_rounds=2)"
    assert all(getattr(resolved(), name) is not None for name in names)


@pytest.mark.parametrize(("geometry", "pixels"), [(GEOMETRY, 128 * 28**2), (QWEN3_VL, 128 * 32**2)])
def test_pixel_budgets_are_counted_in_tokens_of_the_model(geometry: Geometry, pixels: int) -> None:
    config = PerceptionConfig().resolve(geometry)
    assert (config.min_pixels, config.total_pixels) == (pixels, 12 * pixels)
    given = PerceptionConfig(total_pixels=50_000).resolve(geometry, {"min_pixels": 1000})
    assert (given.min_pixels, given.total_pixels) == (1000, 50_000)


def test_settings_are_resolved_for_a_geometry() -> None:
    for wrong in (None, RECIPE):
        with pytest.raises(ValueError, match="PerceptionConfig: geometry must be a Geometry, got"):
            PerceptionConfig().resolve(wrong)  # type: ignore[arg-type]


def test_given_values_come_before_the_recipe_and_the_recipe_before_our_defaults() -> None:
    found = PerceptionConfig(max_rounds=5).resolve(GEOMETRY, RECIPE)
    assert found == resolved(strategy="refresh", max_rounds=5, sample_fps=0.5)
    assert (
        PerceptionConfig(strategy=None, max_rounds=3).resolve(GEOMETRY, RECIPE).strategy
        == "refresh"
    )


@pytest.mark.parametrize(
    "remake", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c)), replace]
)
def test_copies_leave_to_the_model_what_was_left_to_it(remake: Any) -> None:
    config = PerceptionConfig(strategy="append")
    assert remake(config) == config and remake(config).given() == {"strategy": "append"}
    replaced = replace(remake(config), max_rounds=3)
    expected = PerceptionConfig(strategy="append", max_rounds=3).resolve(GEOMETRY, RECIPE)
    assert replaced.resolve(GEOMETRY, RECIPE) == expected
    assert remake(expected) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "best"}, "strategy must be one of official, .*, got 'best'"),
        ({"strategy": ["append"]}, "strategy must be one of"),
        ({"max_rounds": 0}, "max_rounds must be an integer in 1..64, got 0"),
        ({"max_rounds": True}, "max_rounds must be an integer"),
        ({"max_rounds": 2.0}, "max_rounds must be an integer"),
        ({"sample_fps": "2"}, "sample_fps must be a number in .*, got '2'"),
        ({"sample_fps": float("nan")}, "sample_fps must be a number"),
        ({"sample_fps": 5e-324}, "sample_fps must be a number in"),
        ({"min_frames": 3}, "min_frames must be an even integer >= 2, got 3"),
        ({"max_frames": "8"}, "max_frames must be an even integer"),
        ({"min_pixels": 0}, "min_pixels must be an integer >= 1"),
        ({"min_pixels": 10**400}, "min_pixels must be an integer >= 1, below"),
        ({"total_pixels": 10**400}, "total_pixels must be an integer >= 1, below"),
        ({"total_pixels": 1e6}, "total_pixels must be an integer >= 1"),
        ({"key_ratio": 0}, "key_ratio must be a number in"),
        ({"focus_frames": 5}, "focus_frames must be an even integer >= 0"),
        ({"focus_margin_cells": -1.0}, "focus_margin_cells must be a number in"),
        ({"parity": "qwen"}, "parity must be one of release, transformers, got 'qwen'"),
        ({"text_first": 1}, "text_first must be True or False, got 1"),
        ({"time_labels": "no"}, "time_labels must be True or False"),
        ({"sticky_clues": "yes"}, "sticky_clues must be True or False"),
        ({"stop_when_stable": 0}, "stop_when_stable must be True or False"),
        ({"constrain_clues": 1}, "constrain_clues must be True or False"),
        ({"dialect": "conann"}, "dialect must be one that goes on .*r1.5, longvt.*, got 'conann'"),
        *(
            ({"dialect": name}, f"dialect must be one that goes on by new prompts .*got '{name}'")
            for name in ("paravt", "dynframe", "ego-r1", "open-o3-video", "video-thinker")
        ),
        ({"dialect": ["r1.5"]}, "dialect must be one"),
        ({"prompts": 3}, "prompts must be the path of a file, got 3"),
    ],
)
def test_a_bad_value_is_named_wherever_it_comes_from(
    settings: dict[str, Any], message: str
) -> None:
    message = f"^PerceptionConfig: {message}"
    with pytest.raises(ValueError, match=message):
        PerceptionConfig(**settings)
    with pytest.raises(ValueError, match=message):
        ResolvedPerception(**{"geometry": GEOMETRY, "min_pixels": 1, "total_pixels": 1, **settings})
    with pytest.raises(ValueError, match=message):
        PerceptionConfig().resolve(GEOMETRY, settings)


def test_settings_that_do_not_go_together_are_refused_when_resolved() -> None:
    message = "max_frames must be >= min_frames .8., got 6"
    with pytest.raises(ValueError, match=message):
        PerceptionConfig(max_frames=6).resolve(GEOMETRY, {"min_frames": 8})
    for strategy, name in [
        ("official", "stop_when_stable"),
        ("append", "sticky_clues"),
        ("grid", "sticky_clues"),
    ]:
        given: dict[str, Any] = {name: True}
        message = f"{name} must be left out with strategy {strategy}"
        with pytest.raises(ValueError, match=message):
            PerceptionConfig(**given).resolve(GEOMETRY, {"strategy": strategy})
        with pytest.raises(ValueError, match=message):
            PerceptionConfig(strategy=strategy, **given).resolve(GEOMETRY)  # type: ignore[arg-type]
        assert not getattr(
            PerceptionConfig(**{name: False}).resolve(GEOMETRY, {"strategy": strategy}), name
        )  # type: ignore[arg-type]


def test_a_switch_of_the_recipe_counts_for_its_own_strategies_only() -> None:
    recipe = {"strategy": "append", "stop_when_stable": True}
    assert PerceptionConfig().resolve(GEOMETRY, recipe).stop_when_stable
    assert not PerceptionConfig(strategy="official").resolve(GEOMETRY, recipe).stop_when_stable
    recipe = {"strategy": "official", "sticky_clues": True}
    assert PerceptionConfig().resolve(GEOMETRY, recipe).sticky_clues
    assert not PerceptionConfig(strategy="append").resolve(GEOMETRY, recipe).sticky_clues


def test_an_unknown_setting_of_a_recipe_is_named() -> None:
    with pytest.raises(ValueError, match="setting must be one of .*, got 'nope'"):
        PerceptionConfig().resolve(GEOMETRY, {"nope": 1})


def test_a_dialect_that_goes_on_by_turns_implies_the_strategy() -> None:
    assert PerceptionConfig(dialect="longvt").resolve(GEOMETRY).strategy == "append"
    assert PerceptionConfig().resolve(GEOMETRY, {"dialect": "videozoomer"}).strategy == "append"
    grid = PerceptionConfig(dialect="r1.5").resolve(GEOMETRY, {"strategy": "grid"})
    assert grid.strategy == "grid"
    with pytest.raises(ValueError, match="strategy must be append with dialect longvt, got 'grid'"):
        PerceptionConfig(dialect="longvt", strategy="grid").resolve(GEOMETRY)
    constrained = PerceptionConfig(dialect="longvt", constrain_clues=True)
    with pytest.raises(ValueError, match=r"must be left out with dialect longvt .it is for r1.5."):
        constrained.resolve(GEOMETRY)
    recipe = {"strategy": "append", "constrain_clues": True}
    assert not PerceptionConfig(dialect="longvt").resolve(GEOMETRY, recipe).constrain_clues

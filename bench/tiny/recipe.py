"""The embedded model's recipe: shapes, tokenizer, perception settings, wording."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tokenizers import Tokenizer as RawTokenizer

from tiny.tokenizer import build_tokenizer
from vtts_rt.config import PerceptionConfig
from vtts_rt.data.needle import CARD_COLOURS, MARK_COLOURS
from vtts_rt.models.config import LanguageConfig, ModelConfig
from vtts_rt.models.qwen2_5_vl import GEOMETRY, Qwen2_5_VL, VisionConfig
from vtts_rt.models.qwen2_5_vl.chat import CHAT, END_OF_TEXT

# 12 pairs a round, every view 84 x 84 px (3 x 3 tokens): 7200 px a frame of a full round.
RECIPE = PerceptionConfig(
    strategy="append",
    max_rounds=3,
    sample_fps=1.0,
    min_frames=4,
    max_frames=24,
    min_pixels=4900,
    total_pixels=12 * 7200,
    focus_frames=24,
    focus_margin_cells=1.0,
    parity="transformers",  # the resize it was trained on
)
PERCEPTION = RECIPE.resolve(GEOMETRY)


def wide_recipe(times: int) -> PerceptionConfig:
    """One round with `times` as many frame pairs, each as large: the baseline of looking again."""
    assert RECIPE.max_frames is not None and RECIPE.total_pixels is not None
    return replace(
        RECIPE,
        max_rounds=1,
        sample_fps=float(times),
        max_frames=times * RECIPE.max_frames,
        total_pixels=times * RECIPE.total_pixels,
    )


PROMPTS = {
    "system": "",
    "question": "{question}\n",
    "options": "{options}\n",
    "option": "{letter}. {text}",
    "task": "",
    "cue_look": "",
    "cue_final": "",
}
# What README.md's accuracies were taken in, whatever the processor multiplies.
DTYPE = {"cpu": "float32"}

PREPROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
    "patch_size": GEOMETRY.patch_px,
    "temporal_patch_size": GEOMETRY.frames_per_pair,
    "merge_size": GEOMETRY.merge,
    "min_pixels": PERCEPTION.min_pixels,
    "max_pixels": PERCEPTION.total_pixels // 12,
    "image_mean": list(GEOMETRY.mean),
    "image_std": list(GEOMETRY.std),
}

VISION_STEPS = 6000
SKETCH_STEPS = 4000
LANGUAGE_STEPS = 3000
NUM_CLIPS = 2500
NUM_QUESTIONS = 1000  # of GRPO

# Rows and columns each get a fast pair of rotary dims. With the (1, 2, 13) of the shipped weights
# columns turn by 0.27 a token: they were known after 1,000 steps and more, these after 450.
MROPE_SECTION = (1, 1, 14)

VISION = VisionConfig(
    depth=4,
    hidden_size=128,
    num_heads=4,
    intermediate_size=256,
    out_hidden_size=128,
    window_size=112,
    fullatt_block_indexes=(3,),
)


def perception_fields(wide: int = 1) -> dict[str, Any]:
    """The settings that go with the checkpoint; wide: see `wide_recipe`."""
    return (RECIPE if wide == 1 else wide_recipe(wide)).given()


def make_tokenizer() -> RawTokenizer:
    """The tokenizer of the embedded model: the words of needle are tokens of their own."""
    words = ["system", "user", "assistant", "Which", "card", "mark", "none", "unclear"]
    colours = dict.fromkeys([*CARD_COLOURS, *MARK_COLOURS])
    words += [
        f" {word}" for word in (*colours, "card", "pattern", "is", "on", "the", "mark", "none")
    ]
    return build_tokenizer(words)


def language_config(vocab_size: int) -> LanguageConfig:
    """The language model.

    rope_theta and mrope_section are not Qwen's: with theta 1e6 and the sections in Qwen's
    proportion, rows and columns turn by at most 0.03 rad a token, so that a 3 x 3 view has no
    rows and columns; here they turn by 0.65 and 0.42.
    """
    return LanguageConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_theta=1000.0,
        mrope_section=MROPE_SECTION,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
    )


def model_config(tokenizer: RawTokenizer) -> ModelConfig:
    """The whole model for a tokenizer."""

    def token(name: str) -> int:
        index = tokenizer.token_to_id(name)
        assert index is not None
        return index

    return ModelConfig(
        model_type=Qwen2_5_VL.model_type,
        geometry=GEOMETRY,
        vision=VISION,
        language=language_config(tokenizer.get_vocab_size()),
        image_token_id=token(CHAT.image_pad),
        video_token_id=token(CHAT.video_pad),
        vision_start_token_id=token(CHAT.vision_start),
        vision_end_token_id=token(CHAT.vision_end),
        eos_token_ids=(token(CHAT.end_of_turn), token(END_OF_TEXT)),
    )

"""The chat format and the special tokens of Qwen2.5-VL (its tokenizer_config.json)."""

from __future__ import annotations

from vtts_rt.perception.chat import ChatFormat

# In the vocabulary's order; those of tool calls are left out.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
END_OF_TEXT = SPECIAL_TOKENS[0]

CHAT = ChatFormat(
    turn_open="<|im_start|>{role}\n",
    turn_close="<|im_end|>\n",
    end_of_turn="<|im_end|>",
    vision_start="<|vision_start|>",
    vision_end="<|vision_end|>",
    image_pad="<|image_pad|>",
    video_pad="<|video_pad|>",
    control="<|",
    time_label="<{seconds}s>",  # ours; `<12.0s>` is about four tokens
    system="You are a helpful assistant.",
)

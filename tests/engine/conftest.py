from __future__ import annotations

from typing import Any

import pytest
import torch
from utils import VOCAB_SIZE, tiny_tokenizer

from vtts_rt.models.config import LanguageConfig, ModelConfig
from vtts_rt.models.qwen2_5_vl import GEOMETRY, Qwen2_5_VL, VisionConfig
from vtts_rt.models.qwen2_5_vl.chat import CHAT
from vtts_rt.models.registry import from_config
from vtts_rt.models.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(tiny_tokenizer(), CHAT)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer, request: pytest.FixtureRequest) -> Any:
    """Small and random; float32, or of the dtype that `in_dtypes` gives."""
    config = ModelConfig(
        model_type=Qwen2_5_VL.model_type,
        geometry=GEOMETRY,
        vision=VisionConfig(2, 32, 2, 48, 32, fullatt_block_indexes=(1,)),
        language=LanguageConfig(VOCAB_SIZE, 32, 64, 2, 4, 2, 1e4, (1, 1, 2)),
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        vision_start_token_id=tokenizer.vision_start_token_id,
        vision_end_token_id=tokenizer.vision_end_token_id,
        eos_token_ids=tuple(tokenizer.eos_token_ids),
    )
    model = from_config(config, dtype=getattr(request, "param", torch.float32))
    with torch.no_grad():  # wide weights: a wrong token changes the answer
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.ndim == 2 else 1)
    return model

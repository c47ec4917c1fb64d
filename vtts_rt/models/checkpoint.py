"""Hugging Face model folders: finding them, reading and writing everything but the tensors."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from vtts_rt.config import LanguageConfig, ModelConfig, PerceptionConfig, VisionConfig
from vtts_rt.types import MERGE_SIZE, PATCH_SIZE, TEMPORAL_PATCH_SIZE, require

EMBEDDED = ("tiny",)  # models that ship with the package, under assets/
MODEL_TYPE = "qwen2_5_vl"
EXTRAS = "vtts.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_CONNECT_SECONDS = 5.0
# Mirrors transformers' default for configs that do not say (Qwen2_5_VLRotaryEmbedding).
_DEFAULT_MROPE_SECTION = (16, 24, 24)


def resolve_model(model: str | Path) -> Path:
    """The folder of a model: "tiny", a directory, or a hub id (cached, else downloaded).

    ValueError for a name that can be none of these or that the hub does not know; RuntimeError
    for a hub id that is not cached when the hub cannot be reached.
    """
    name = str(model)
    if name in EMBEDDED:
        folder = Path(str(files("vtts_rt") / "assets" / name))
        if not (folder / "config.json").is_file():
            raise RuntimeError(
                f"load_model: the embedded model {name!r} is not in this installation "
                f"({folder}); reinstall vtts_rt, or pass the directory of a checkpoint"
            )
        return folder
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    is_id = not folder.exists() and _HUB_ID.fullmatch(name) is not None
    require("load_model", "model", name, is_id, "'tiny', a directory that exists or a hub id")
    return _from_hub(name)


def _from_hub(name: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except FileNotFoundError:
        pass  # not cached
    wanted = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
    try:
        # Asked first because a download would retry for minutes where there is no network.
        HfApi().model_info(name, timeout=_CONNECT_SECONDS)
        return Path(snapshot_download(name, allow_patterns=wanted))
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"load_model: model must be 'tiny', a directory that exists or a known hub id, "
            f"got {name!r}"
        ) from error
    except Exception as error:  # every transport has its own error types
        raise RuntimeError(
            f"load_model: {name!r} is neither a directory nor in the hub cache, and the hub "
            f"cannot be reached ({type(error).__name__}); pass a directory, or run "
            f"`hf download {name}` where there is a network"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. ValueError if it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"load_model: {path.name} must be a readable JSON file, got {str(path)!r} ({error})"
        ) from error
    require("load_model", path.name, type(value).__name__, isinstance(value, dict), "an object")
    result: dict[str, Any] = value
    return result


def load_extras(folder: str | Path) -> dict[str, Any]:
    """Our own settings beside a checkpoint, or {}: `perception` holds PerceptionConfig fields,
    `prompts` wording, both objects."""
    path = Path(folder) / EXTRAS
    if not path.is_file():
        return {}
    extras = read_json(path)
    for name, value in extras.items():
        what = f"{EXTRAS} {name}"
        require("load_model", what, type(value).__name__, isinstance(value, dict), "an object")
    return extras


def read_eos_token_ids(folder: Path) -> tuple[int, ...]:
    """Stop tokens: of generation_config.json, else of config.json, else ()."""
    for name in ("generation_config.json", "config.json"):
        if not (folder / name).is_file():
            continue
        config = read_json(folder / name)
        for scope in (config, config.get("text_config") or {}):
            found = scope.get("eos_token_id")
            if found is not None:
                return tuple(int(i) for i in (found if isinstance(found, list) else [found]))
    return ()


def read_hf_config(folder: Path) -> Any:
    """transformers' Qwen2_5_VLConfig of a checkpoint, nested or flat.

    ValueError if config.json is missing, unreadable or of another model type.
    """
    path = folder / "config.json"
    require("load_model", "model", str(folder), path.is_file(), "a folder with config.json")
    raw = read_json(path)
    kind = raw.get("model_type")
    require("load_model", "model_type", kind, kind == MODEL_TYPE, repr(MODEL_TYPE))
    from transformers import Qwen2_5_VLConfig

    try:
        return Qwen2_5_VLConfig.from_dict(raw)
    except Exception as error:  # the validators' own types differ between releases
        raise ValueError(
            f"load_model: config.json must be a valid Qwen2.5-VL config, got {error}"
        ) from error


def read_model_config(folder: Path) -> ModelConfig:
    """The ModelConfig of a checkpoint folder.

    ValueError for what the family does not have: another patch geometry or activation, scaled
    rotary positions, sliding windows in the language model.
    """
    hf = read_hf_config(folder)
    vision, text = hf.vision_config, hf.text_config
    geometry = (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
    expected = (PATCH_SIZE, MERGE_SIZE, TEMPORAL_PATCH_SIZE)
    rope = text.rope_parameters

    def check(argument: str, value: object, ok: bool, rule: str) -> None:
        require("load_model", argument, value, ok, rule)

    check("patch, merge and temporal size", geometry, geometry == expected, str(expected))
    for part in (vision, text):
        check("hidden_act", part.hidden_act, part.hidden_act == "silu", "'silu'")
    kind = rope.get("rope_type", "default")
    check("rope_type", kind, kind == "default", "'default'")
    layers = set(text.layer_types)
    check("layer_types", sorted(layers), layers == {"full_attention"}, "all full_attention")
    heads = (text.hidden_size, text.num_attention_heads)
    check("hidden_size", heads[0], heads[0] % heads[1] == 0, f"a multiple of {heads[1]} heads")
    section = tuple(int(n) for n in rope.get("mrope_section", _DEFAULT_MROPE_SECTION))
    check("mrope_section", section, len(section) == 3, "three numbers")
    return ModelConfig(
        vision=VisionConfig(
            depth=vision.depth,
            hidden_size=vision.hidden_size,
            num_heads=vision.num_heads,
            intermediate_size=vision.intermediate_size,
            out_hidden_size=vision.out_hidden_size,
            window_size=vision.window_size,
            fullatt_block_indexes=tuple(vision.fullatt_block_indexes),
            tokens_per_second=vision.tokens_per_second,
        ),
        language=LanguageConfig(
            vocab_size=text.vocab_size,
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            num_hidden_layers=text.num_hidden_layers,
            num_attention_heads=text.num_attention_heads,
            num_key_value_heads=text.num_key_value_heads,
            rope_theta=float(rope["rope_theta"]),
            mrope_section=(section[0], section[1], section[2]),
            rms_norm_eps=text.rms_norm_eps,
            tie_word_embeddings=bool(hf.tie_word_embeddings),
            max_position_embeddings=text.max_position_embeddings,
        ),
        image_token_id=hf.image_token_id,
        video_token_id=hf.video_token_id,
        vision_start_token_id=hf.vision_start_token_id,
        vision_end_token_id=hf.vision_end_token_id,
        eos_token_ids=read_eos_token_ids(folder),
        perception=PerceptionConfig.of_recipe(load_extras(folder).get("perception", {})).given(),
    )


def write_hf_config(config: ModelConfig, folder: Path, dtype: str) -> None:
    """config.json, generation_config.json and, with perception settings, vtts.json.

    dtype: name of the tensors' dtype, e.g. "bfloat16".
    """
    from transformers import GenerationConfig, Qwen2_5_VLConfig

    vision, language = config.vision, config.language
    eos = list(config.eos_token_ids)
    hf = Qwen2_5_VLConfig(
        vision_config={
            "depth": vision.depth,
            "hidden_size": vision.hidden_size,
            "num_heads": vision.num_heads,
            "intermediate_size": vision.intermediate_size,
            "out_hidden_size": vision.out_hidden_size,
            "window_size": vision.window_size,
            "fullatt_block_indexes": list(vision.fullatt_block_indexes),
            "tokens_per_second": int(vision.tokens_per_second),
        },
        text_config={
            "vocab_size": language.vocab_size,
            "hidden_size": language.hidden_size,
            "intermediate_size": language.intermediate_size,
            "num_hidden_layers": language.num_hidden_layers,
            "num_attention_heads": language.num_attention_heads,
            "num_key_value_heads": language.num_key_value_heads,
            "rms_norm_eps": language.rms_norm_eps,
            "max_position_embeddings": language.max_position_embeddings,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": language.rope_theta,
                "mrope_section": list(language.mrope_section),
            },
            "bos_token_id": None,
            "eos_token_id": eos[0] if eos else None,
        },
        image_token_id=config.image_token_id,
        video_token_id=config.video_token_id,
        vision_start_token_id=config.vision_start_token_id,
        vision_end_token_id=config.vision_end_token_id,
        tie_word_embeddings=language.tie_word_embeddings,
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        dtype=dtype,
    )
    folder.mkdir(parents=True, exist_ok=True)
    hf.save_pretrained(folder)
    GenerationConfig(eos_token_id=eos or None).save_pretrained(folder)
    if config.perception:
        extras = {**load_extras(folder), "perception": config.perception}
        (folder / EXTRAS).write_text(json.dumps(extras, indent=2) + "\n", encoding="utf-8")

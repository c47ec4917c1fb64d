"""Hugging Face model folders: finding them, reading and writing everything but the tensors."""

from __future__ import annotations

import errno
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, fields
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from vtts_rt.config import PerceptionConfig
from vtts_rt.models.config import LanguageConfig, ModelConfig, TowerConfig
from vtts_rt.sampling import generation_config, generation_defaults
from vtts_rt.types import Geometry, SamplingParams, require

EMBEDDED = ("tiny",)  # models that ship with the package, under assets/
# The recipe: a field of config.json, which transformers keeps when it loads and saves a model, or
# a file of its own, which counts where both are there.
EXTRAS, EXTRAS_FILE = "vtts_rt", "vtts.json"
ADAPTER_CONFIG = "adapter_config.json"
Shape = TypeVar("Shape", bound=LanguageConfig | TowerConfig)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_CONNECT_SECONDS = 5.0
_MAX_JSON_BYTES = 256 << 20  # an index of a million tensors takes about 100 MB
# Most of each number in config.json. Those of layers are compared with the files later on; here
# they only keep transformers from building a list of that length.
_MAX_SIZE, _MAX_LAYERS = 1 << 24, 1 << 12
_SIZES = dict.fromkeys(("depth", "mlp_ratio", "num_hidden_layers"), _MAX_LAYERS) | dict.fromkeys(
    (
        *("embed_dim", "head_dim", "hidden_size", "intermediate_size", "out_hidden_size"),
        *("max_position_embeddings", "num_position_embeddings", "vocab_size", "window_size"),
        *("num_attention_heads", "num_heads", "num_key_value_heads"),
    ),
    _MAX_SIZE,
)


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


# A download that ends for want of a place for it.
_STORE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)


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
        info = HfApi().model_info(name, timeout=_CONNECT_SECONDS)
        there = [file.rfilename for file in info.siblings or ()]
        if not any(file.endswith(".safetensors") for file in there):
            wanted.append("*.bin")  # counts only where there is no other
        return Path(snapshot_download(name, allow_patterns=wanted))
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"load_model: model must be 'tiny', a directory that exists or a known hub id, "
            f"got {name!r}"
        ) from error
    except Exception as error:  # every transport has its own error types
        if getattr(error, "errno", None) in _STORE_ERRORS:
            raise RuntimeError(
                f"load_model: {name!r} cannot be stored in the hub cache: {error}"
            ) from error
        raise RuntimeError(
            f"load_model: {name!r} is neither a directory nor in the hub cache, and the hub "
            f"cannot be reached ({type(error).__name__}); pass a directory, or run "
            f"`hf download {name}` where there is a network"
        ) from error


def base_folder(folder: Path) -> Path:
    """The folder of the weights: `folder`, or the base that its adapter names if it holds nothing
    else, as in transformers. ValueError if that cannot be had."""
    path = folder / ADAPTER_CONFIG
    if (folder / "config.json").is_file() or not path.is_file():
        return folder
    base = read_json(path).get("base_model_name_or_path")
    named = isinstance(base, str) and base != ""
    require("load_model", f"{ADAPTER_CONFIG} base_model_name_or_path", base, named, "a model")
    found = resolve_model(str(base))
    whole = (found / "config.json").is_file() and adapter_in(found) is None
    rule = "a folder with config.json and no adapter of its own"
    require("load_model", f"base of {ADAPTER_CONFIG}", base, whole, rule)
    return found


def adapter_in(folder: Path) -> Path | None:
    """`folder` if it holds an adapter. ValueError for half of one."""
    names = [ADAPTER_CONFIG, "adapter_model.safetensors", "adapter_model.bin"]
    config, *weights = [(folder / name).is_file() for name in names]
    if not config and not any(weights):
        return None
    rule = f"both {ADAPTER_CONFIG} and adapter_model.safetensors or neither"
    require("load_model", "adapter", str(folder), config and any(weights), rule)
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. ValueError if it is not one."""
    try:
        size = path.stat().st_size
        rule = f"at most {_MAX_JSON_BYTES} bytes"
        require("load_model", path.name, size, size <= _MAX_JSON_BYTES, rule)
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"load_model: {path.name} must be a readable JSON file, got {str(path)!r} ({error})"
        ) from error
    require("load_model", path.name, type(value).__name__, isinstance(value, dict), "an object")
    result: dict[str, Any] = value
    return result


def load_extras(folder: str | Path) -> dict[str, Any]:
    """The recipe of a checkpoint, or {}: `perception` holds PerceptionConfig fields, `prompts`
    wording, `dtype` what "auto" takes by type of device; all are objects. The file vtts.json if
    there is one, else config.json's `vtts_rt`; of an adapter without a config.json, its base's."""
    path = base_folder(Path(folder)) / EXTRAS_FILE
    if path.is_file():
        extras, where = read_json(path), EXTRAS_FILE
    else:
        path = path.with_name("config.json")
        extras = (read_json(path) if path.is_file() else {}).get(EXTRAS) or {}
        where = f"{path.name} {EXTRAS}"
        got = type(extras).__name__
        require("load_model", where, got, isinstance(extras, dict), "an object")
    for name, value in extras.items():
        what = f"{where} {name}"
        require("load_model", what, type(value).__name__, isinstance(value, dict), "an object")
    return extras


def read_eos_token_ids(folder: Path) -> tuple[int, ...]:
    """Stop tokens: of generation_config.json, else of config.json, else ()."""
    for name in ("generation_config.json", "config.json"):
        if not (folder / name).is_file():
            continue
        config = read_json(folder / name)
        for scope in scopes(config, "text_config"):
            found = scope.get("eos_token_id")
            if found is not None:
                ids = found if isinstance(found, list) else [found]
                whole = all(type(index) is int and index >= 0 for index in ids)
                require("load_model", f"{name} eos_token_id", found, whole, "one or more ids >= 0")
                return tuple(ids)
    return ()


def read_generation_defaults(folder: Path) -> SamplingParams:
    """What generation_config.json says of sampling; without that file config.json, as older
    checkpoints have it. ValueError for what is not supported, by name."""
    files = [folder / name for name in ("generation_config.json", "config.json")]
    return generation_defaults(read_json(next(path for path in files if path.is_file())))


def scopes(config: dict[str, Any], *names: str) -> list[dict[str, Any]]:
    """A config and those of its members that are configs themselves."""
    return [config, *(part for name in names if isinstance(part := config.get(name), dict))]


def read_model_type(folder: Path) -> object:
    """What config.json says as `model_type`. ValueError if the file is missing or unreadable."""
    path = folder / "config.json"
    require("load_model", "model", str(folder), path.is_file(), "a folder with config.json")
    return read_json(path).get("model_type")


def read_hf_config(folder: Path) -> Any:
    """transformers' own config of a checkpoint, nested or flat, whose model type it knows.

    ValueError if config.json is not valid, quantized, or has sizes that no model has.
    """
    raw = read_json(folder / "config.json")
    kind = raw["model_type"]
    quantized = raw.get("quantization_config")
    rule = "absent: load the unquantized model and pass quantization="
    require("load_model", "config.json quantization_config", quantized, quantized is None, rule)
    _check_sizes(raw)
    from transformers import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[kind].from_dict(raw)
    except Exception as error:  # the validators' own types differ between releases
        raise ValueError(
            f"load_model: config.json must be a valid {kind} config, got {error}"
        ) from error


def architecture(model_type: str) -> str:
    """Name of transformers' class of whole models of a type."""
    from transformers.models.auto import modeling_auto

    return str(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type])


def _check_sizes(raw: dict[str, Any]) -> None:
    for scope in scopes(raw, "text_config", "vision_config"):
        for name, value in scope.items():
            if (most := _SIZES.get(name)) is not None and value is not None:
                whole = isinstance(value, int) and not isinstance(value, bool)
                fits = whole and 1 <= value <= most
                require("load_model", f"config.json {name}", value, fits, f"in 1..{most}")


def model_config(
    folder: Path, hf: Any, geometry: Geometry, vision: TowerConfig, fixed: Mapping[str, Any]
) -> ModelConfig:
    """The ModelConfig of a checkpoint folder; hf: its `read_hf_config`; geometry, vision: what the
    family makes of it; fixed: `VideoLM.language_fields`.

    ValueError for what no family has: another patch geometry, scaled rotary positions, sliding
    windows in the language model; and for numbers that no model has.
    """
    text = hf.text_config
    language = _language_config(text, bool(hf.tie_word_embeddings), fixed)
    names = ("patch_size", "spatial_merge_size", "temporal_patch_size")
    sizes = tuple(getattr(hf.vision_config, name) for name in names)
    expected = (geometry.patch_px, geometry.merge, geometry.frames_per_pair)
    check("patch, merge and temporal size", sizes, sizes == expected, str(expected))
    for name in ("image_token_id", "video_token_id"):
        index = getattr(hf, name)
        check(name, index, 0 <= index < text.vocab_size, f"in 0..{text.vocab_size - 1}")
    return ModelConfig(
        model_type=hf.model_type,
        geometry=geometry,
        vision=vision,
        language=language,
        image_token_id=hf.image_token_id,
        video_token_id=hf.video_token_id,
        vision_start_token_id=hf.vision_start_token_id,
        vision_end_token_id=hf.vision_end_token_id,
        eos_token_ids=read_eos_token_ids(folder),
        perception=PerceptionConfig.of_recipe(load_extras(folder).get("perception", {})).given(),
        sampling=read_generation_defaults(folder),
    )


def _language_config(text: Any, tied: bool, fixed: Mapping[str, Any]) -> LanguageConfig:
    rope = text.rope_parameters
    kind = rope.get("rope_type", "default")
    check("rope_type", kind, kind == "default", "'default'")
    layers = set(getattr(text, "layer_types", None) or ["full_attention"])
    check("layer_types", sorted(layers), layers == {"full_attention"}, "all full_attention")
    hidden, heads = text.hidden_size, text.num_attention_heads
    said: Any = getattr(text, "head_dim", None)
    if not hasattr(type(text), "head_dim"):  # else it is free
        check("hidden_size", hidden, hidden % heads == 0, f"a multiple of {heads} heads")
        check("head_dim", said, said in (None, hidden // heads), "hidden_size / heads")
    section = rope.get("mrope_section", fixed["mrope_section"])
    three = isinstance(section, (list, tuple)) and len(section) == 3
    three = three and all(type(n) is int and n >= 0 for n in section)
    check("mrope_section", section, three, "three numbers")
    theta, eps = rope.get("rope_theta"), text.rms_norm_eps
    check("rope_theta", theta, positive(theta), "a number > 0")
    check("rms_norm_eps", eps, positive(eps), "a number > 0")
    own = {"rope_theta": float(theta), "mrope_section": tuple(section), "head_dim": said or 0}
    return from_hf(LanguageConfig, text, **{**fixed, **own}, tie_word_embeddings=tied)


def from_hf(kind: type[Shape], part: Any, **own: Any) -> Shape:
    """A config of ours: `own` fields, the others those that transformers' has by the same name."""
    names = [field.name for field in fields(kind) if field.name not in own]
    found = {name: getattr(part, name) for name in names if hasattr(part, name)}
    found = {name: tuple(v) if isinstance(v, list) else v for name, v in found.items()}
    return kind(**found, **own)


def check(argument: str, value: object, ok: bool, rule: str) -> None:
    """`require` of a setting in config.json."""
    require("load_model", argument, value, ok, rule)


def positive(value: object) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0.0 < value <= sys.float_info.max  # type: ignore[operator]


def write_hf_config(
    config: ModelConfig, folder: Path, dtype: str, extras: dict[str, Any] | None = None
) -> None:
    """config.json with the recipe in it, and generation_config.json.

    dtype: name of the tensors' dtype, e.g. "bfloat16". extras: the recipe; None keeps that in the
    folder, with the perception settings of `config` if it has any.
    """
    from transformers import CONFIG_MAPPING

    theirs = CONFIG_MAPPING[config.model_type]
    eos, text = list(config.eos_token_ids), asdict(config.language)
    rope = {"rope_type": "default", "rope_theta": text.pop("rope_theta")}
    rope["mrope_section"] = list(text.pop("mrope_section"))
    if config.language.mrope_interleaved:
        rope["mrope_interleaved"] = True  # vLLM reads it; transformers' class knows
    tied = text.pop("tie_word_embeddings")
    known = theirs.sub_configs["text_config"]  # without what the family fixes
    text = {name: value for name, value in text.items() if hasattr(known, name)}
    ends = {"bos_token_id": None, "eos_token_id": eos[0] if eos else None}
    hf = theirs(
        vision_config=config.vision.to_hf(),
        text_config={**text, **ends, "rope_parameters": rope},
        image_token_id=config.image_token_id,
        video_token_id=config.video_token_id,
        vision_start_token_id=config.vision_start_token_id,
        vision_end_token_id=config.vision_end_token_id,
        tie_word_embeddings=tied,
        architectures=[architecture(config.model_type)],
        dtype=dtype,
    )
    if extras is None:
        extras = load_extras(folder)
        if config.perception:
            extras = {**extras, "perception": config.perception}
    if extras:
        setattr(hf, EXTRAS, extras)
    folder.mkdir(parents=True, exist_ok=True)
    hf.save_pretrained(folder)
    (folder / EXTRAS_FILE).unlink(missing_ok=True)  # it would count instead
    settings = {"eos_token_id": eos} if eos else {}
    told = json.dumps({**settings, **generation_config(config.sampling)}, indent=2) + "\n"
    (folder / "generation_config.json").write_text(told, encoding="utf-8")

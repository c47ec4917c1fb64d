"""`vtts-rt train grpo --config FILE`: GRPO on the rows of a manifest, by TRL, with our rollouts."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import logging
import math
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from vtts_rt.checks import CommandParser, Rule, check, check_same, is_number, is_whole
from vtts_rt.config import PerceptionConfig
from vtts_rt.data.command import tell_bad
from vtts_rt.data.frames import check_openable
from vtts_rt.data.rows import BadRows, OnBad, Row, read_manifest, sift
from vtts_rt.files import write_whole
from vtts_rt.models.checkpoint import load_extras, resolve_model
from vtts_rt.models.registry import DTYPES
from vtts_rt.perception.prompts import prompts_from_dict, resolve_prompts
from vtts_rt.rollout.rewards import BY_TASK, check_rewards, find_reward, weights_of_task
from vtts_rt.runtime import Runtime
from vtts_rt.train.groups import Example
from vtts_rt.train.settings import WHAT, TrainRound
from vtts_rt.types import SamplingParams, require

logger = logging.getLogger(__name__)


def _texts(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(name, str) for name in value)


_PATH: Rule = (lambda v: isinstance(v, str | Path) and str(v) != "", "a path")
_TABLE: Rule = (_texts, "a table of names and values")
_RULES: dict[str, Rule] = {
    "model": (_PATH[0], "'tiny', a directory or a hub id"),
    "manifest": _PATH,
    "output": _PATH,
    "rewards": (
        lambda v: v is None or (_texts(v) and all(map(is_number, v.values()))),
        "a table of names and weights, or left out for the published ones of each task",
    ),
    "dtype": (lambda v: v in ("auto", *DTYPES), f"auto or one of {', '.join(DTYPES)}"),
    "max_tokens": (lambda v: is_whole(v) and v >= 1, "a whole number >= 1"),
    "train_round": (("all", "last").__contains__, "all or last"),
    "lora": (lambda v: v is None or _texts(v), "a table of peft's LoraConfig, or left out"),
    **dict.fromkeys(("perception", "grpo"), _TABLE),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpoRecipe:
    """What a configuration file says.

    model, manifest: to start from, and what to ask; output: where checkpoints, TensorBoard's log
    and, at the end, `model` go. rewards, train_round: as VttsGRPOTrainer. perception:
    fields of PerceptionConfig; dtype: of the runtime; max_tokens: of a round. lora: fields of
    peft's LoraConfig; without target_modules, the language model's linear layers. grpo: fields of
    TRL's GRPOConfig.
    Relative paths start from the working directory. ValueError names the first that is not allowed.
    """

    model: str | Path = "tiny"
    manifest: str | Path
    output: str | Path
    rewards: Mapping[str, float] | None = None
    perception: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "auto"
    max_tokens: int = 512
    train_round: TrainRound = "all"
    lora: Mapping[str, Any] | None = None
    grpo: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check(WHAT, _RULES, {f.name: getattr(self, f.name) for f in fields(self)})


# Of the language model, by transformers' names; the towers of some families share the last ones.
_LINEAR = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
# Fields of GRPOConfig that others of the config say.
_INSTEAD = {
    "output_dir": "output",
    "reward_weights": "rewards",
    "max_completion_length": "max_tokens",
}
# What TRL or transformers set otherwise: bf16 on any machine, a log every 10 steps, no log file.
_DEFAULTS: Mapping[str, Any] = {"bf16": False, "logging_steps": 1, "report_to": "tensorboard"}
SETTINGS_FILE = "settings.json"
# Of `grpo`, what may be another when a run goes on: how long it is, what it keeps and tells, and
# where and how it computes.
_FREE = re.compile(
    r"max_steps|num_train_epochs|use_cpu|run_name|report_to|disable_tqdm|num_completions_to_print|"
    r"gradient_checkpointing.*|dataloader_(num_workers|p.*)|torch_compile.*|ddp_.*|"
    r"(save|log|logging|eval|hub|push|trackio)_.*|project|per_device_eval_batch_size"
)


def read_recipe(path: str | Path) -> GrpoRecipe:
    """A configuration in YAML. ValueError for one that cannot be read, names or values."""
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """YAML 1.2's floats: 1e-6 too, which 1.1 takes for a text."""

    number = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    try:
        said = yaml.load(Path(path).read_text(encoding="utf-8"), Loader)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        told = " ".join(str(error).split())
        raise ValueError(f"{WHAT}: config must be a readable YAML file, got {told}") from None
    require(WHAT, "config", said, _texts(said), "a table of names and values")
    _names("config", said, GrpoRecipe)
    for name in ("manifest", "output"):
        require(WHAT, name, said.get(name), name in said, "in the config")
    return GrpoRecipe(**said)


def _names(table: str, values: Mapping[str, Any], kind: type) -> None:
    """ValueError for a name that is no field of `kind`, and for what is no number where the field
    is one."""
    known = {f.name: f.default for f in fields(kind) if f.init}
    unknown = [name for name in values if name not in known]
    require(WHAT, table, unknown, not unknown, f"of fields of {kind.__name__}")
    for name, value in values.items():
        ok = value is None or not is_number(known[name])
        ok = ok or (is_number(value) and math.isfinite(value))
        require(WHAT, name, value, ok, "a finite number")


def read_examples(
    manifest: str | Path,
    on_bad: OnBad = "raise",
    rewards: Mapping[str, float] | None = None,
) -> list[Example]:
    """All rows of a manifest. on_bad: of rows that cannot be taken, whose media file cannot be
    opened, or, where there are `rewards`, that hold nothing to compare with: BadRows tells all of
    them by file and row, "skip" leaves them out and logs how many. ValueError for a manifest
    without rows, and for a reward that is none."""
    require(WHAT, "manifest", str(manifest), Path(manifest).is_file(), "a file")
    for name in weights_of_task(WHAT, rewards or {}, "tg"):
        find_reward(name)

    def check_row(row: Row, task: str) -> None:
        if rewards:
            check_rewards("row", rewards, row, task, is_sized=False)

    sets = read_manifest(manifest, on_bad=on_bad)
    rows = [item for entry in sets for item in entry.placed(check_row=check_row)]
    good, _ = sift(check_openable(rows), on_bad)
    require(WHAT, "manifest", str(manifest), len(good) > 0, "one with rows")
    return [Example(item.media, item.row, item.task) for item in good]


def _adapter(lora: Mapping[str, Any]) -> dict[str, Any]:
    return {"target_modules": _LINEAR, **lora}


def trainer_of(recipe: GrpoRecipe, runtime: Runtime, examples: Sequence[Example]) -> Any:
    """The VttsGRPOTrainer of a recipe. RuntimeError with the install line without TRL or peft."""
    check_torchvision()
    try:
        import peft
        from transformers import AutoTokenizer, PrinterCallback
        from trl import GRPOConfig

        from vtts_rt.train.progress import RichProgress
        from vtts_rt.train.trl import VttsGRPOTrainer
    except ImportError as error:
        raise RuntimeError(f"{WHAT}: {error}; pip install 'vtts_rt[trl]'") from error
    _names("grpo", recipe.grpo, GRPOConfig)
    _names("perception", recipe.perception, PerceptionConfig)
    for name, instead in _INSTEAD.items():
        value, rule = recipe.grpo.get(name), f"left out: {instead} of the config says it"
        require(WHAT, name, value, name not in recipe.grpo, rule)
    size = recipe.grpo.get("num_generations", 8)
    ok = is_whole(size) and size >= 2
    require(WHAT, "num_generations", size, ok, ">= 2, as advantages compare the members of a group")
    device = runtime.engine.model.device.type
    given = {**_DEFAULTS, "use_cpu": device == "cpu", **recipe.grpo}
    given.update(output_dir=str(recipe.output), disable_tqdm=True)
    adapter = None
    if recipe.lora is not None:
        _names("lora", recipe.lora, peft.LoraConfig)
        adapter = peft.LoraConfig(**_adapter(recipe.lora))
    folder = str(resolve_model(recipe.model))
    warnings.filterwarnings("ignore", message=".*'rollout_func', which is an experimental")
    trainer = VttsGRPOTrainer(
        folder,
        runtime,
        examples,
        recipe.rewards,
        GRPOConfig(**given),
        perception=PerceptionConfig(**recipe.perception),
        sampling=SamplingParams(max_tokens=recipe.max_tokens),
        train_round=recipe.train_round,
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=adapter,
        callbacks=[RichProgress()],
    )
    trainer.remove_callback(PrinterCallback)  # it comes where tqdm is off
    return trainer


def check_torchvision() -> None:
    """transformers takes torchvision where it is installed, and needs none. RuntimeError where one
    is that does not import, as a wheel for CUDA beside a torch for the CPU."""
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # RuntimeError of operators, ImportError and OSError of libraries
        told = " ".join(str(error).split())
        raise RuntimeError(
            f"{WHAT}: torchvision does not import beside torch {torch.__version__} ({told}): "
            "pip uninstall torchvision, which is not needed, or install the build for this torch"
        ) from error


def settings_of(recipe: GrpoRecipe, trainer: Any) -> dict[str, Any]:
    """What the numbers of a run follow from, by name, as JSON values: the weights that it starts
    from and the rows, by their hashes, and the settings of rollouts, rewards and the trainer; of
    GRPOConfig and LoraConfig what the recipe gives."""
    model, rows = trainer.runtime.engine.model, hashlib.sha256()
    for example in trainer.examples:
        rows.update(json.dumps([example.task, example.row.as_dict()]).encode())
    own = prompts_from_dict(load_extras(resolve_model(recipe.model)).get("prompts", {}))
    perception = asdict(trainer.perception)
    del perception["prompts"]  # a path: what stands there counts
    given = {**_DEFAULTS, **recipe.grpo}
    config = {name: value for name, value in given.items() if not _FREE.fullmatch(name)}
    batch = "per_device_train_batch_size"
    config.pop(batch, None)
    config[f"{batch} x processes"] = getattr(trainer.args, batch) * trainer.args.world_size
    tables = {
        "perception": perception,
        "prompts": asdict(resolve_prompts(trainer.perception, own, model.chat)),
        "lora": {} if recipe.lora is None else _adapter(recipe.lora),
        "grpo": config,
    }
    found = {
        "dtype": str(model.dtype).removeprefix("torch."),
        "model": model.weights_hash(),
        "manifest": f"{len(trainer.examples)} rows, SHA-256 {rows.hexdigest()[:16]}",
        "rewards": recipe.rewards and dict(recipe.rewards),
        "max_tokens": recipe.max_tokens,
        "train_round": recipe.train_round,
        "lora": recipe.lora is not None,
    }
    for table, values in tables.items():
        found |= {f"{table}.{name}": value for name, value in values.items()}
    return _plain(found)


def check_resumed(folder: Path, settings: Mapping[str, Any]) -> None:
    """ValueError for settings (`settings_of`) that are others than those of the checkpoints in
    `folder`, naming the first. Checkpoints of a version that kept none are taken as they are."""
    path = folder / SETTINGS_FILE
    if not path.is_file():
        return
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        kept = str(error)
    require(WHAT, str(path), kept, _texts(kept), "a JSON object")
    # What one side leaves out has its default there.
    unsaid = [(n, v) for n, v in _unsaid().items() if n in kept.keys() | settings.keys()]
    before, now = ({**own, **{n: v for n, v in unsaid if n not in own}} for own in (kept, settings))
    check_same(WHAT, f"the checkpoints in {folder}", before, now)


def _unsaid() -> dict[str, Any]:
    from peft import LoraConfig
    from trl import GRPOConfig

    found: dict[str, Any] = {}
    for table, config in (("grpo", GRPOConfig), ("lora", LoraConfig)):
        for f in fields(config):
            made = f.default_factory
            found[f"{table}.{f.name}"] = f.default if made is MISSING else made()
    return _plain(found)


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives them back."""
    plain: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return plain


def run(recipe: GrpoRecipe, on_bad: OnBad = "raise") -> list[dict[str, Any]]:
    """Train, going on from the last checkpoint in the output folder if there is one, and write
    `model` there. Returns what was logged, by step. on_bad: as `read_examples`. ValueError where
    the settings that decide its numbers (`settings_of`) are others than those of the
    checkpoints."""
    check_torchvision()
    rewards = {BY_TASK: 1.0} if recipe.rewards is None else recipe.rewards
    examples = read_examples(recipe.manifest, on_bad, rewards)
    cuda = torch.cuda.is_available() and not recipe.grpo.get("use_cpu")
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu"  # torchrun sets it
    with Runtime.from_pretrained(recipe.model, dtype=recipe.dtype, device=device) as runtime:
        trainer = trainer_of(recipe, runtime, examples)
        from transformers.trainer_utils import get_last_checkpoint

        output = Path(recipe.output)
        last = get_last_checkpoint(str(output)) if output.is_dir() else None
        settings = settings_of(recipe, trainer)
        if last is not None:
            check_resumed(output, settings)
            logger.info("going on from %s", last)
        trainer.accelerator.wait_for_everyone()
        if trainer.accelerator.is_main_process:
            output.mkdir(parents=True, exist_ok=True)
            write_whole(output / SETTINGS_FILE, json.dumps(settings, indent=1) + "\n")
        trainer.train(resume_from_checkpoint=last)
        trainer.save_model(str(output / "model"))
        history: list[dict[str, Any]] = trainer.state.log_history
    return history


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = CommandParser(prog="vtts-rt train grpo", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="YAML")
    text = "leave out rows that cannot be taken, rewarded or opened, and count them"
    parser.add_argument("--skip-bad", action="store_true", help=text)
    args = parser.parse_args(argv)
    logging.getLogger("vtts_rt").setLevel(logging.INFO)
    try:
        run(read_recipe(args.config), "skip" if args.skip_bad else "raise")
    except BadRows as error:
        return tell_bad("train grpo", error)
    return 0

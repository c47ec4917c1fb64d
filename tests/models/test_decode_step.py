"""One native call for all layers gives the bits of the layers called one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from vtts_rt.models import language as module
from vtts_rt.models.attention import PagedKV, plan_calls
from vtts_rt.models.config import LanguageConfig
from vtts_rt.models.language import ForwardBatch, LanguageModel
from vtts_rt.models.layers import Linear, Packable, RMSNorm
from vtts_rt.models.quantize import quantize_language
from vtts_rt.ops.decode_step import MAX_ROWS

_C = pytest.importorskip("vtts_rt._C", reason="built without the native extension")

CONFIG = LanguageConfig(
    vocab_size=97,
    hidden_size=60,
    intermediate_size=38,
    num_hidden_layers=3,
    num_attention_heads=5,
    num_key_value_heads=1,
    rope_theta=1e4,
    mrope_section=(2, 1, 1),
    head_dim=8,
)
PAGE = 4


class Calls:
    """How often the one call was taken."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self._run = module.decode_step
        monkeypatch.setattr(module, "decode_step", self)

    def __call__(self, *args: object, **kwargs: object) -> Tensor:
        self.count += 1
        return self._run(*args, **kwargs)  # type: ignore[arg-type]


def make(config: LanguageConfig, kind: str = "float32") -> LanguageModel:
    """kind: a dtype, then what is done to matrices."""
    dtype, *changes = kind.split(", ")
    torch.manual_seed(0)
    model = LanguageModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.to(getattr(torch, dtype))
    if "int8" in changes:
        quantize_language(model, "int8")
    if "packed" in changes:
        pack(model)
    return model


def pack(model: LanguageModel) -> None:
    for part in model.modules():
        if isinstance(part, Packable):
            part.pack()


def run(
    model: LanguageModel, news: list[int], keys: list[int], rows: list[int] | None
) -> tuple[Tensor, Tensor]:
    """(hidden states, pages) of `news` new tokens of sequences that have `keys` keys then."""
    config = model.config
    random = torch.Generator().manual_seed(sum(keys))
    wide = max(-(-k // PAGE) for k in keys)
    num_pages = wide * len(keys) + 2
    pages = torch.randn(
        (config.num_hidden_layers, 2, num_pages, PAGE, config.num_key_value_heads, config.head_dim),
        generator=random,
    ).to(model.norm.weight.dtype)
    table = torch.randperm(num_pages, generator=random)[: wide * len(keys)].view(len(keys), wide)
    slots = []
    for place, (num_new, num_keys) in enumerate(zip(news, keys, strict=True)):
        index = torch.arange(num_keys - num_new, num_keys)
        slots.append(table[place, index // PAGE] * PAGE + index % PAGE)
    total = sum(news)
    batch = ForwardBatch(
        torch.randint(0, 97, (total,), generator=random),
        None,
        torch.randint(0, 50, (3, total), generator=random),
        [0, *torch.tensor(news).cumsum(0).tolist()],
        PagedKV(pages, torch.cat(slots), plan_calls(table.tolist(), news, keys, PAGE)),
        None if rows is None else torch.tensor(rows, dtype=torch.int64),
    )
    return model(batch), pages


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("news", "keys", "rows"),
    [
        ([1], [1], None),
        ([1], [23], [0]),
        ([3, 1, 2], [17, 5, 30], None),
        ([3, 1, 2], [17, 5, 30], [2, 3, 5]),
        ([16], [16], [15]),
        ([0, 2], [4, 2], None),
        ([4], [9], []),
    ],
)
@pytest.mark.parametrize(("heads", "qk_norm"), [((5, 1), False), ((3, 3), True), ((6, 2), True)])
@pytest.mark.parametrize(
    "kind", ["float32", "float32, int8, packed", "bfloat16, packed", "bfloat16, int8, packed"]
)
@torch.inference_mode()
def test_the_bits_are_those_of_the_layers(
    threads: int,
    news: list[int],
    keys: list[int],
    rows: list[int] | None,
    heads: tuple[int, int],
    qk_norm: bool,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        sizes = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
        model = make(replace(CONFIG, qk_norm=qk_norm, qkv_bias=not qk_norm, **sizes), kind)
        calls = Calls(monkeypatch)
        together, written = run(model, news, keys, rows)
        assert calls.count == 1
        monkeypatch.setattr(module, "usable", lambda x, head_dim: False)
        one_by_one, expected = run(model, news, keys, rows)
        assert calls.count == 1
        assert torch.equal(together, one_by_one) and torch.equal(written, expected)
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
def test_what_it_cannot_do_goes_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    model = make(CONFIG)
    run(model, [257], [257], None)  # more rows
    run(model, [40], [40], [39])  # most of which nobody reads
    monkeypatch.setenv("VTTS_RT_BACKEND", "rmsnorm=reference")
    run(model, [1], [9], None)
    monkeypatch.delenv("VTTS_RT_BACKEND")
    assert calls.count == 0
    run(model, [1], [9], None)
    assert calls.count == 1
    run(model, [256], [300], None)
    assert calls.count == 2
    run(make(replace(CONFIG, intermediate_size=37), "bfloat16"), [1], [9], None)  # odd channels
    quantize_language(model, "fp8")
    run(model, [1], [9], None)
    assert calls.count == 2


@pytest.mark.parametrize(
    "mistake",
    ["weights", "a weight's shape", "page dtype", "KV heads", "layers", "slots", "slot dtype"],
)
@torch.inference_mode()
def test_what_does_not_fit_is_left_to_the_ops_which_check(
    mistake: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Addresses alone would read and write past the ends."""
    calls = Calls(monkeypatch)
    model = make(CONFIG)
    pages, slots = torch.zeros(3, 2, 6, PAGE, 1, 8), torch.tensor([4, 12])
    if mistake == "weights":
        model = model.bfloat16()
    elif mistake == "a weight's shape":
        mlp = model.layers[2].mlp
        mlp.down_proj.weight = torch.nn.Parameter(mlp.down_proj.weight[:, :-1].contiguous())
    elif mistake == "page dtype":
        pages = pages.bfloat16()
    elif mistake == "KV heads":
        pages = torch.zeros(3, 2, 6, PAGE, 2, 8)
    elif mistake == "layers":
        pages = pages[:2]
    elif mistake == "slots":
        slots = slots[:1]
    else:
        slots = slots.int()
    kv = PagedKV(pages, slots, plan_calls([[0, 1], [2, 3]], [1, 1], [5, 5], PAGE))
    ids, positions = torch.tensor([3, 4]), torch.zeros(3, 2, dtype=torch.int64)
    batch = ForwardBatch(ids, None, positions, [0, 1, 2], kv)
    if mistake in ("weights", "page dtype", "slot dtype"):
        assert torch.isfinite(model(batch)).all()  # rounds, and takes any integers, as ever
    else:
        with pytest.raises((ValueError, RuntimeError, IndexError)):
            model(batch)
    assert calls.count == 0


def test_replaced_weights_count_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses are kept from step to step: whatever is replaced has to be noticed."""
    calls = Calls(monkeypatch)
    model = make(CONFIG)
    seen: list[Tensor] = []

    def changes() -> bool:
        with torch.inference_mode():
            seen.append(run(model, [1], [9], None)[0].float())
        return not any(torch.equal(seen[-1], earlier) for earlier in seen[:-1])

    mlp = model.layers[1].mlp
    assert changes() and not changes()
    mlp.down_proj.weight = torch.nn.Parameter(2 * mlp.down_proj.weight.detach())
    assert changes() and not changes()
    mlp.down_proj.weight.data = 2 * mlp.down_proj.weight.detach()
    assert changes() and not changes()
    mlp.down_proj.weight.data.mul_(2)
    assert changes() and not changes()
    mlp.gate_up_proj = Linear(60, 76, bias=False)
    assert changes() and not changes()
    model.layers[0].self_attn.q_norm = RMSNorm(8, 1e-6)
    model.layers[0].self_attn.k_norm = RMSNorm(8, 1e-6)
    assert changes() and not changes()
    mlp.down_proj.pack()
    assert not changes() and calls.count == len(seen) - 1, "some are packed, others not"
    pack(model)
    assert not changes()
    model.bfloat16()
    assert changes() and not changes()
    assert calls.count == len(seen) - 1


def test_the_native_call_refuses_slots_outside_the_pool_and_too_many_rows() -> None:
    ints = torch.tensor([8, 0, 1])
    floats = torch.zeros(64)
    at, numbers = floats.data_ptr(), ints.data_ptr()

    def call(num_rows: int) -> None:
        sizes, pool = (8, 8, 1, 1, 8), (2, 4)
        places = (at, num_rows, at, at, numbers, numbers, 1, numbers, numbers, 1, at)
        _C.decode_step(
            [], at, sizes, 1e-6, 1.0, *places, pool, at, "float32", "float32", False, 1, "auto"
        )

    with pytest.raises(ValueError, match="slots must be inside the pool of 8, got 8"):
        call(1)
    with pytest.raises(ValueError, match="num_rows must be at most 256, got 257"):
        call(MAX_ROWS + 1)

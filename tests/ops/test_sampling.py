from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from op_cases import cases
from op_cases.case import error_of
from triton_tools import check_interpreted, run_triton

from vtts_rt.ops.dispatch import backends
from vtts_rt.ops.sampling import (
    SampleParams,
    gumbel_noise,
    processed_logits,
    sample,
    sample_token,
)
from vtts_rt.sampling import ResolvedSampling
from vtts_rt.types import SamplingParams

GREEDY, HOT = ResolvedSampling(), ResolvedSampling(temperature=1.3, seed=2**63 - 1)
FILTERED = ResolvedSampling(temperature=0.7, top_k=50, top_p=0.9, seed=5)


def draw(logits: torch.Tensor, params: ResolvedSampling, position: int, member: int = 0) -> int:
    return sample_token(logits, params, member=member, round_index=0, position=position)[0]


def test_greedy_takes_the_maximum_and_reports_its_log_probability() -> None:
    logits = torch.tensor([0.0, 2.0, 1.0])
    token, logprob = sample_token(logits, ResolvedSampling(), member=0, round_index=0, position=0)
    assert token == 1
    assert logprob == pytest.approx(float(logits.log_softmax(0)[1]), abs=1e-6)


@pytest.mark.parametrize("size", [1, 7, 1024, 151_936])
def test_greedy_agrees_with_torch_on_any_size(size: int) -> None:
    logits = 5 * torch.randn(size)
    logits[size // 2] = logits[size - 1] = 30.0  # equal maxima: the first counts
    token, logprob = sample_token(logits, ResolvedSampling(), member=0, round_index=0, position=0)
    assert token == size // 2
    assert logprob == pytest.approx(float(logits.double().log_softmax(0)[token]), abs=1e-6)


@pytest.mark.parametrize("params", [GREEDY, HOT, FILTERED], ids=["greedy", "sampled", "filtered"])
def test_every_instruction_set_and_number_of_threads(params: ResolvedSampling) -> None:
    _C = pytest.importorskip("vtts_rt._C", reason="built without the native extension")
    logits = 3 * torch.randn(9, 5001)
    logits[:, ::3] = -torch.inf
    places = {"members": range(9), "rounds": [2] * 9, "positions": range(9)}
    expected = sample(logits, [params] * 9, **places, backend="reference")
    own = SampleParams.of([params] * 9, logits.device)
    noise = torch.tensor([[params.seed, row, 2, row] for row in range(9)])
    for isa, num_threads in (("auto", 1), ("auto", 3), ("scalar", 1)):
        tokens, logprobs = torch.zeros(9, dtype=torch.int64), torch.zeros(9)
        columns = (own.temperature, own.top_k, own.top_p.contiguous(), noise, tokens, logprobs)
        addresses = (column.data_ptr() for column in columns)
        shape = (*logits.shape, logits.stride(0))
        _C.sample(logits.data_ptr(), shape, *addresses, num_threads, isa, "float32")
        assert torch.equal(tokens, expected[0])
        assert torch.allclose(logprobs, expected[1], atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lead", [1.0, 5.0, 9.0])
def test_top_p_keeps_what_the_reference_keeps(dtype: torch.dtype, lead: float) -> None:
    """Of the vocabulary of Qwen2.5, with many ties; also where the cut is among small weights."""
    logits = torch.randn(2, 151_936).to(dtype)
    logits[:, 1000:1030] += lead * torch.linspace(0.3, 1, 30)
    logits[0, 5000:] = 0.5  # the sum of equals rounds worst
    params = [ResolvedSampling(1.0, top_p=p, seed=3) for p in (0.7, 0.95)]
    places = {"members": [0, 1], "rounds": [0, 0], "positions": [3, 4]}
    found = sample(logits, params, **places, backend="auto")
    expected = sample(logits, params, **places, backend="reference")
    assert torch.equal(found[0], expected[0])
    # The probability of all that is kept is in it: one token more or less shows.
    assert torch.allclose(found[1], expected[1], atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_chooses_the_same_in_any_batch(dtype: torch.dtype) -> None:
    logits = (3 * torch.randn(6, 20_000)).to(dtype)
    params = [GREEDY, HOT, FILTERED, replace(HOT, top_p=0.9), replace(HOT, top_k=7), HOT]
    places = {"members": [1] * 6, "rounds": [2] * 6, "positions": [3] * 6}
    tokens, logprobs = sample(logits, params, **places)
    for row, own in enumerate(params):
        token, logprob = sample_token(logits[row], own, member=1, round_index=2, position=3)
        assert (tokens[row], logprobs[row]) == (token, logprob)


def test_greedy_does_not_hide_a_nan() -> None:
    logits = torch.randn(40)
    logits[17] = torch.nan
    token, logprob = sample_token(logits, ResolvedSampling(), member=0, round_index=0, position=0)
    assert token == 17 and logprob != logprob


def test_noise_is_a_function_of_its_coordinates_alone() -> None:
    def noise(seed: int = 1, member: int = 2, round_index: int = 3, position: int = 4):
        return gumbel_noise(
            50, seed=seed, member=member, round_index=round_index, position=position
        )

    assert torch.equal(noise(), noise())
    for other in (noise(seed=9), noise(member=9), noise(round_index=9), noise(position=9)):
        assert not torch.equal(noise(), other)
    assert bool(noise(position=2**63 - 1).isfinite().all())


def test_samples_follow_the_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    params = ResolvedSampling(temperature=0.7, seed=5)
    counts = torch.zeros(4)
    for position in range(4000):
        counts[draw(logits, params, position)] += 1
    expected = (logits / 0.7).softmax(0)
    # Four standard deviations of a binomial share.
    bound = 4 * (expected * (1 - expected) / 4000).sqrt()
    assert bool(((counts / 4000 - expected).abs() < bound).all())


def test_top_k_and_top_p_keep_the_head() -> None:
    logits = torch.tensor([3.0, 2.0, 1.0, 0.0])
    top_k = processed_logits(logits, ResolvedSampling(temperature=1.0, top_k=2))
    assert top_k.isfinite().tolist() == [True, True, False, False]
    # softmax is 0.64, 0.24, 0.09, 0.03: the second is still needed to reach 0.7
    top_p = processed_logits(logits, ResolvedSampling(temperature=1.0, top_p=0.7))
    assert top_p.isfinite().tolist() == [True, True, False, False]
    only = processed_logits(logits, ResolvedSampling(temperature=1.0, top_p=1e-6))
    assert only.isfinite().tolist() == [True, False, False, False]


def test_log_probability_is_of_the_processed_distribution() -> None:
    logits = torch.tensor([3.0, 2.0, 1.0, 0.0], dtype=torch.bfloat16)
    params = ResolvedSampling(temperature=0.5, top_k=2, seed=3)
    token, logprob = sample_token(logits, params, member=0, round_index=1, position=2)
    expected = torch.tensor([6.0, 4.0]).log_softmax(0)
    assert token in (0, 1)
    assert logprob == pytest.approx(float(expected[token]), abs=1e-6)


def test_members_of_a_group_differ() -> None:
    logits = torch.zeros(1000)
    params = ResolvedSampling(temperature=1.0)
    assert len({draw(logits, params, 0, member) for member in range(8)}) == 8


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_k", -1),
        ("max_tokens", 0),
        ("seed", -1),
    ],
)
def test_bad_parameters_are_named(argument: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"SamplingParams: {argument} must be"):
        SamplingParams(**{argument: value})


@pytest.mark.parametrize("backend", [b for b in backends("sampling", "cpu") if b != "triton"])
def test_a_batch_chooses_what_each_row_would(backend: str) -> None:
    for case in cases("sampling", "cpu", "check"):
        if case.takes(backend):
            assert error_of(case, backend).within, (case.name, case.dtype)
    logits = torch.randn(3, 9)
    params = [ResolvedSampling(temperature=t, top_k=4, seed=s) for t, s in ((0, 1), (1, 2), (2, 3))]
    tokens, logprobs = sample(
        logits, params, members=[0, 1, 2], rounds=[3, 4, 5], positions=[6, 7, 8], backend=backend
    )
    assert (tokens.dtype, logprobs.dtype) == (torch.int64, torch.float32)
    for row in range(3):
        token, logprob = sample_token(
            logits[row], params[row], member=row, round_index=3 + row, position=6 + row
        )
        assert tokens[row] == token and logprobs[row] == pytest.approx(logprob, abs=1e-6)


@pytest.mark.parametrize("axis", ["seed", "member", "round_index", "position"])
def test_noise_is_uniform_along_every_coordinate(axis: str) -> None:
    counts = torch.zeros(8)
    for value in range(2000):
        coordinates = {"seed": 1, "member": 0, "round_index": 0, "position": 0, axis: value}
        counts[gumbel_noise(8, **coordinates).argmax()] += 1
    # Chi-square with 7 degrees of freedom passes 29.9 once in 10,000.
    assert float(((counts - 250) ** 2 / 250).sum()) < 29.9


def test_parameters_on_the_device_are_those_of_a_list() -> None:
    logits = torch.randn(4, 50)
    listed = [ResolvedSampling(t, p, k, seed=9) for t, p, k in ((0, 1, 0), (1, 0.5, 0), (2, 1, 3))]
    listed.append(ResolvedSampling(0.3, 0.9, 7, seed=2**63 - 1))
    places = {"members": [0, 1, 2, 3], "rounds": [1, 1, 2, 2], "positions": [5, 6, 7, 8]}
    expected = sample(logits, listed, **places)
    params = SampleParams.of(listed, logits.device)
    tensors = {name: torch.tensor(numbers) for name, numbers in places.items()}
    found = sample(logits, params, **tensors)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert params.has_filters and not SampleParams.of(listed[:1], logits.device).has_filters
    empty = sample(logits[:0], [], members=[], rounds=[], positions=[])
    assert [len(column) for column in empty] == [0, 0]


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"logits": torch.zeros(2, 0)}, r"logits must be \(N, V\) of a float dtype"),
        ({"logits": torch.zeros(2)}, r"logits must be \(N, V\) of a float dtype"),
        ({"logits": torch.zeros(2, 3).long()}, r"logits must be \(N, V\) of a float dtype"),
        ({"params": [ResolvedSampling()]}, r"temperature must be \(2, torch.float32, 'cpu'\)"),
        ({"members": [0]}, r"members must be \(2, torch.int64, 'cpu'\), got \(1, "),
        ({"rounds": [0, -1]}, r"rounds must be in \[0, 2\*\*63\), got \[0, -1\]"),
        ({"positions": torch.zeros(2)}, r"positions must be \(2, torch.int64, 'cpu'\)"),
        ({"backend": "cuda"}, "backend must be auto, triton, cpu, reference"),
    ],
)
def test_bad_batches_are_named(change: dict, rule: str) -> None:
    good = {"logits": torch.zeros(2, 3), "params": [ResolvedSampling()] * 2}
    good |= {"members": [0, 0], "rounds": [0, 0], "positions": [0, 0]}
    with pytest.raises(ValueError, match=f"sampling: {rule}"):
        sample(**{**good, **change})


ODD_ROWS = """
import torch
from vtts_rt.ops.sampling import sample
from vtts_rt.sampling import ResolvedSampling

inf, nan = torch.inf, torch.nan
odd = [[-inf] * 6, [0, nan, inf, 1, 2, nan], [1, inf, 0, inf, 2, 1], [-0.0, 0.0, -1, -2, -3, 0.0]]
for params in (ResolvedSampling(), ResolvedSampling(temperature=0.5, seed=4)):
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.tensor(odd, dtype=dtype)
        args = {"members": [0] * 4, "rounds": [0] * 4, "positions": [0, 1, 2, 3]}
        tokens, logprobs = sample(logits, [params] * 4, **args, backend="triton")
        expected = sample(logits, [params] * 4, **args, backend="reference")
        assert torch.equal(tokens, expected[0]), (tokens, expected)
        torch.testing.assert_close(logprobs, expected[1], equal_nan=True, atol=1e-6, rtol=0)

seeds = range(300)
logits = torch.randn(len(seeds), 40).mT.contiguous().mT  # a row's values are not adjacent
params = [ResolvedSampling(temperature=1.0 + seed % 3, seed=seed**6) for seed in seeds]
args = {name: [seed % n for seed in seeds] for name, n in (("members", 5), ("rounds", 7))}
args["positions"] = list(seeds)
tokens, logprobs = sample(logits, params, **args, backend="triton")
expected = sample(logits, params, **args, backend="reference")
assert torch.equal(tokens, expected[0])
assert (logprobs - expected[1]).abs().max() < 1e-5
assert len(tokens.unique()) == 40
"""


@pytest.mark.slow
def test_triton_under_the_interpreter() -> None:
    assert check_interpreted("sampling") == 48
    run_triton(ODD_ROWS, interpret=True)

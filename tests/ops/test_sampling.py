from __future__ import annotations

import pytest
import torch

from vtts_rt.ops.sampling import gumbel_noise, processed_logits, sample_token
from vtts_rt.types import SamplingParams


def draw(logits: torch.Tensor, params: SamplingParams, position: int, member: int = 0) -> int:
    return sample_token(logits, params, member=member, round_index=0, position=position)[0]


def test_greedy_takes_the_maximum_and_reports_its_log_probability() -> None:
    logits = torch.tensor([0.0, 2.0, 1.0])
    token, logprob = sample_token(logits, SamplingParams(), member=0, round_index=0, position=0)
    assert token == 1
    assert logprob == pytest.approx(float(logits.log_softmax(0)[1]), abs=1e-6)


@pytest.mark.parametrize("size", [1, 7, 1024, 151_936])
def test_greedy_agrees_with_torch_on_any_size(size: int) -> None:
    logits = 5 * torch.randn(size)
    logits[size // 2] = logits[size - 1] = 30.0  # equal maxima: the first counts
    token, logprob = sample_token(logits, SamplingParams(), member=0, round_index=0, position=0)
    assert token == size // 2
    assert logprob == pytest.approx(float(logits.double().log_softmax(0)[token]), abs=1e-6)


def test_greedy_on_any_instruction_set_and_with_infinities() -> None:
    _C = pytest.importorskip("vtts_rt._C", reason="built without the native extension")
    logits = torch.randn(3001)
    logits[::3] = -torch.inf
    expected = int(logits.argmax()), float(logits.double().logsumexp(0))
    for isa in ("auto", "scalar"):
        token, logprob = _C.greedy(logits.data_ptr(), logits.numel(), isa)
        assert token == expected[0]
        assert logprob == pytest.approx(float(logits[token]) - expected[1], abs=1e-6)


def test_greedy_does_not_hide_a_nan() -> None:
    logits = torch.randn(40)
    logits[17] = torch.nan
    token, logprob = sample_token(logits, SamplingParams(), member=0, round_index=0, position=0)
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
    params = SamplingParams(temperature=0.7, seed=5)
    counts = torch.zeros(4)
    for position in range(4000):
        counts[draw(logits, params, position)] += 1
    expected = (logits / 0.7).softmax(0)
    # Four standard deviations of a binomial share.
    bound = 4 * (expected * (1 - expected) / 4000).sqrt()
    assert bool(((counts / 4000 - expected).abs() < bound).all())


def test_top_k_and_top_p_keep_the_head() -> None:
    logits = torch.tensor([3.0, 2.0, 1.0, 0.0])
    top_k = processed_logits(logits, SamplingParams(temperature=1.0, top_k=2))
    assert top_k.isfinite().tolist() == [True, True, False, False]
    # softmax is 0.64, 0.24, 0.09, 0.03: the second is still needed to reach 0.7
    top_p = processed_logits(logits, SamplingParams(temperature=1.0, top_p=0.7))
    assert top_p.isfinite().tolist() == [True, True, False, False]
    only = processed_logits(logits, SamplingParams(temperature=1.0, top_p=1e-6))
    assert only.isfinite().tolist() == [True, False, False, False]


def test_log_probability_is_of_the_processed_distribution() -> None:
    logits = torch.tensor([3.0, 2.0, 1.0, 0.0], dtype=torch.bfloat16)
    params = SamplingParams(temperature=0.5, top_k=2, seed=3)
    token, logprob = sample_token(logits, params, member=0, round_index=1, position=2)
    expected = torch.tensor([6.0, 4.0]).log_softmax(0)
    assert token in (0, 1)
    assert logprob == pytest.approx(float(expected[token]), abs=1e-6)


def test_members_of_a_group_differ() -> None:
    logits = torch.zeros(1000)
    params = SamplingParams(temperature=1.0)
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

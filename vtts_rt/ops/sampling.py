"""Choosing the next token, with noise that depends on nothing but its own coordinates.

    token = argmax(processed + gumbel(seed, member, round, position))
    processed = top_p(top_k(logits / temperature))          as transformers' warpers, to the bit

Penalties and bans, which come before that, are in logits.py.

Gumbel-max with counter-based noise makes a sample a pure function of the logits and of
(seed, member, round, position): batching, preemption and drafts cannot change it.

`sample` chooses for a batch where its logits are; a seed gives the same tokens on every backend.

Legend: N rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vtts_rt.ops import native
from vtts_rt.ops.dispatch import Backend, anything, register, triton_supports
from vtts_rt.sampling import ResolvedSampling
from vtts_rt.types import require


def gumbel_noise(size: int, *, seed: int, member: int, round_index: int, position: int) -> Tensor:
    """Standard Gumbel noise for one token choice.

    size: V. seed, member, round_index, position: each in [0, 2**63).
    Returns (V,) float32 on the CPU. Philox (numpy) with key (seed, member) and counter
    (0, 0, round_index, position): no two choices share a stream.
    """
    bits = np.random.Philox(
        key=np.array([seed, member], dtype=np.uint64),
        counter=np.array([0, 0, round_index, position], dtype=np.uint64),
    )
    uniform = np.random.Generator(bits).random(size)  # float64 in [0, 1)
    # 2**-54 keeps log finite at 0 without moving any other value by more than rounding does.
    return torch.from_numpy(-np.log(-np.log(uniform + 2.0**-54))).float()


def processed_logits(logits: Tensor, params: ResolvedSampling) -> Tensor:
    """Logits after temperature, top-k and top-p; masked tokens are -inf.

    logits: (V,) any float dtype. Returns (V,) float32; softmax of it is what is sampled
    from. Temperature 0 leaves the distribution as it is (the choice is the maximum).
    """
    scores = logits.float()
    if params.temperature == 0.0:
        return scores
    # A number would become a product with its reciprocal on a GPU: other bits, other tokens.
    scores = scores / scores.new_full((1,), params.temperature)
    if 0 < params.top_k < scores.numel():
        floor = scores.topk(params.top_k).values[-1]
        scores = scores.masked_fill(scores < floor, -torch.inf)
    if params.top_p < 1.0:
        # From the least likely on, whose sum rounds less, and of equals from the first on; the
        # likeliest stays. Of 151,936 scores numpy sorts in 1 ms, torch with their places in 50.
        ordered = torch.from_numpy(np.sort(scores.cpu().numpy())).to(scores.device)
        num = int((ordered.softmax(0).cumsum(0)[:-1] <= 1.0 - params.top_p).sum())
        dropped, equal = scores < ordered[num], scores == ordered[num]
        dropped[equal.nonzero()[: num - int(dropped.sum()), 0]] = True
        scores = scores.masked_fill(dropped, -torch.inf)
    return scores


def chosen_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """(N,) float32: log-probability of each row's token under the model's own distribution.

    logits: (N, V) any float dtype; tokens: (N,) int64.
    """
    return logits.float().log_softmax(1).gather(1, tokens[:, None])[:, 0]


class SampleParams(NamedTuple):
    """Sampling of the rows of a batch on the device of their logits, for CUDA graphs: what a graph
    was recorded with is changed in place.

    temperature: (N,) float32; top_p: (N,) float64; top_k, seed: (N,) int64. has_filters: False
    where no row has a top-k or top-p, which spares sorting the logits.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    seed: Tensor
    has_filters: bool = True

    @classmethod
    def of(cls, params: Sequence[ResolvedSampling], device: torch.device) -> SampleParams:
        """Moved there without waiting for the device."""
        floats = torch.tensor([[p.temperature, p.top_p] for p in params], dtype=torch.float64)
        integers = torch.tensor([[p.top_k for p in params], [p.seed for p in params]])
        temperature, top_p = floats.view(-1, 2).T.to(device, non_blocking=True)
        top_k, seed = integers.to(device, torch.int64, non_blocking=True)
        has_filters = any(p.temperature > 0 and (p.top_k > 0 or p.top_p < 1.0) for p in params)
        return cls(temperature.float(), top_k, top_p, seed, has_filters)


_FLOATS = {"temperature": torch.float32, "top_p": torch.float64}


class _Coordinates(NamedTuple):
    """Of each row's noise, (N,) int64."""

    members: Tensor
    rounds: Tensor
    positions: Tensor


def _batch_processed(logits: Tensor, params: SampleParams) -> Tensor:
    """`processed_logits` of every row: (N, V) -> (N, V) float32."""
    samples, size = params.temperature > 0, logits.shape[1]
    scores = logits.float() / torch.where(samples, params.temperature, 1.0)[:, None]
    ordered, order = scores.sort(dim=1, stable=True)
    kept = torch.where(samples & (params.top_k > 0), params.top_k, size).clamp(max=size)
    ordered = ordered.masked_fill(ordered < ordered.gather(1, size - kept[:, None]), -torch.inf)
    tail = torch.where(samples & (params.top_p < 1.0), 1.0 - params.top_p, -1.0).float()
    drop = ordered.softmax(1).cumsum(1) <= tail[:, None]
    drop[:, -1] = False
    return scores.scatter_(1, order, ordered.masked_fill(drop, -torch.inf))


def _triton(
    logits: Tensor, params: SampleParams, coordinates: _Coordinates
) -> tuple[Tensor, Tensor]:
    from vtts_rt.kernels import sampling as kernel

    scores = _batch_processed(logits, params) if params.has_filters else logits
    chosen: tuple[Tensor, Tensor] = kernel.sample(
        scores if scores.stride(1) == 1 else scores.contiguous(),
        params.temperature.contiguous(),
        params.seed.contiguous(),
        tuple(column.contiguous() for column in coordinates),
        divide=not params.has_filters,
    )
    return chosen


def sampling_ref(
    logits: Tensor, params: SampleParams, coordinates: _Coordinates
) -> tuple[Tensor, Tensor]:
    """Row by row in torch and numpy: what the other backends must equal."""
    choices = [
        _choose(row, ResolvedSampling(temperature, top_p, top_k, seed=seed), *place)
        for row, temperature, top_k, top_p, seed, *place in zip(
            logits, *(column.tolist() for column in (*params[:4], *coordinates)), strict=True
        )
    ]
    tokens = torch.tensor([token for token, _ in choices], dtype=torch.int64)
    logprobs = torch.tensor([logprob for _, logprob in choices], dtype=torch.float32)
    return tokens.to(logits.device), logprobs.to(logits.device)


def _choose(
    logits: Tensor, params: ResolvedSampling, member: int, round_index: int, position: int
) -> tuple[int, float]:
    scores, size = processed_logits(logits, params), logits.numel()
    if params.temperature == 0.0:
        token = int(scores.argmax())
    else:
        place = {"member": member, "round_index": round_index, "position": position}
        noise = gumbel_noise(size, seed=params.seed, **place)
        token = int((scores + noise.to(scores.device)).argmax())
    return token, float(scores.log_softmax(0)[token])


def _cpu(logits: Tensor, params: SampleParams, coordinates: _Coordinates) -> tuple[Tensor, Tensor]:
    from vtts_rt import _C

    rows = native.adjacent(logits if logits.dtype in native.STORAGE else logits.float())
    temperature, top_k, top_p = (column.contiguous() for column in params[:3])
    noise = torch.stack((params.seed, *coordinates), dim=1)
    tokens = torch.empty(len(rows), dtype=torch.int64)
    logprobs = torch.empty(len(rows))
    columns = (temperature, top_k, top_p, noise, tokens, logprobs)
    addresses = (column.data_ptr() for column in columns)
    shape, num_threads = (*rows.shape, rows.stride(0)), torch.get_num_threads()
    _C.sample(rows.data_ptr(), shape, *addresses, num_threads, "auto", native.STORAGE[rows.dtype])
    if (tokens < 0).any():
        left = (tokens < 0).nonzero()[:, 0]
        temperature, top_k, top_p, seed = (column[left] for column in params[:4])
        own = SampleParams(temperature, top_k, top_p, seed)
        places = _Coordinates(*(column[left] for column in coordinates))
        tokens[left], logprobs[left] = sampling_ref(logits[left], own, places)
    return tokens, logprobs


_OP = register(
    "sampling",
    Backend("triton", triton_supports, _triton),
    Backend("cpu", native.supports, _cpu),
    Backend("reference", anything, sampling_ref),
)


def sample(
    logits: Tensor,
    params: SampleParams | Sequence[ResolvedSampling],
    *,
    members: Tensor | Sequence[int],
    rounds: Tensor | Sequence[int],
    positions: Tensor | Sequence[int],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Choose a token for every row.

    logits: (N, V) any float dtype, taken as float32, 1 <= V < 2**31. params: of each row. members,
    rounds, positions: of each row, the coordinates of its noise (index in a rollout group, round,
    index of the token among those generated in it): numbers in [0, 2**63) or (N,) int64 on the
    logits' device (not checked there: the host would wait).
    backend: "auto", "triton" (CUDA; the host does not wait), "cpu" (native, CPU) or "reference"
        (row by row in torch and numpy, any device). All choose the same tokens, but for scores that
        noise brings within a rounding of each other; top-k and top-p keep the same ones. ("cpu"
        leaves a row to the reference where another order of sums could move the cut of its top-p,
        and where it holds a NaN or an infinite maximum.) A row's bits do not depend on others.

    Returns (tokens (N,) int64, log-probabilities (N,) float32 under the processed distribution,
    natural logs), both on the logits' device. The first of equal maxima is chosen; a NaN is above
    all, and its log-probability is NaN, as is that of a row of nothing but -inf (token 0).
    Raises ValueError on shapes, dtypes or devices that do not match, RuntimeError on an unusable
    backend.
    """
    got = (*logits.shape, logits.dtype)
    fits = logits.dim() == 2 and 1 <= logits.shape[1] < 2**31 and logits.is_floating_point()
    require("sampling", "logits", got, fits, "(N, V) of a float dtype")
    if not isinstance(params, SampleParams):
        params = SampleParams.of(params, logits.device)
    given = {"members": members, "rounds": rounds, "positions": positions}
    coordinates = _Coordinates(
        *(_column(name, numbers, logits.device) for name, numbers in given.items())
    )
    for name, column in {**params._asdict(), **coordinates._asdict()}.items():
        if name != "has_filters":
            dtype = _FLOATS.get(name, torch.int64)
            got = (*column.shape, column.dtype, str(column.device))
            wanted = (len(logits), dtype, str(logits.device))
            require("sampling", name, got, got == wanted, f"{wanted}")
    chosen: tuple[Tensor, Tensor] = _OP(logits.device.type, backend, logits, params, coordinates)
    return chosen


def _column(name: str, numbers: Tensor | Sequence[int], device: torch.device) -> Tensor:
    if isinstance(numbers, Tensor):
        return numbers
    fits = all(0 <= number < 2**63 for number in numbers)
    require("sampling", name, list(numbers), fits, "in [0, 2**63)")
    return torch.tensor(numbers, dtype=torch.int64).to(device, non_blocking=True)


def sample_token(
    logits: Tensor,
    params: ResolvedSampling,
    *,
    member: int,
    round_index: int,
    position: int,
    backend: str = "auto",
) -> tuple[int, float]:
    """`sample` for one row of logits, (V,): token id and log-probability, on the host."""
    places = {"members": [member], "rounds": [round_index], "positions": [position]}
    token, logprob = sample(logits[None], [params], **places, backend=backend)
    return int(token), float(logprob)

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny.loop import LoopConfig, learning_rate, train
from torch import Tensor, nn
from torch.utils.data import Dataset


class _Numbers(Dataset[Tensor]):
    def __getitem__(self, index: int) -> Tensor:
        return torch.randn(8, 4, generator=torch.Generator().manual_seed(index))


def _run(
    folder: Path, steps: int, stop_after: int | None = None, workers: int = 0, **made_with: Any
) -> nn.Linear:
    torch.manual_seed(0)
    model = nn.Linear(4, 1)

    def loss_of(batch: Tensor, progress: float) -> tuple[Tensor, dict[str, float]]:
        assert 0 <= progress < 1
        loss = (model(batch).squeeze(-1) - batch.sum(-1)).square().mean()
        return loss, {"error": float(loss.detach()), "absent": float("nan")}

    config = LoopConfig(steps, 0.05, warmup_steps=3, workers=workers, log_every=5, save_every=4)
    train("fit", model, _Numbers(), loss_of, config, folder, stop_after, made_with)
    return model


def _equal(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("workers", [0, 1])
def test_resuming_is_exact(tmp_path: Path, workers: int) -> None:
    gc.collect()  # memory of runtimes that ended: Linux refuses to fork a process of too much
    whole = _run(tmp_path / "a", 12)
    _run(tmp_path / "b", 12, stop_after=7, workers=workers)
    resumed = _run(tmp_path / "b", 12, workers=workers)
    assert _equal(whole, resumed)
    assert not _equal(whole, _run(tmp_path / "c", 12, stop_after=7))


@pytest.mark.parametrize(
    ("steps", "made_with", "message"),
    [
        (4, {"seed": 1}, "seed must be 0, that of .*fit.pt, got 1"),
        (5, {"seed": 0}, "steps must be 4, that of .*fit.pt, got 5"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    tmp_path: Path, steps: int, made_with: dict[str, Any], message: str
) -> None:
    _run(tmp_path, 4, stop_after=2, seed=0)
    with pytest.raises(ValueError, match=f"train tiny: {message}"):
        _run(tmp_path, steps, **made_with)
    state = torch.load(tmp_path / "fit.pt", weights_only=True)
    assert state.pop("made_with")["seed"] == 0 and state["step"] == 2
    torch.save(state, tmp_path / "fit.pt")  # as an earlier version wrote it
    _run(tmp_path, steps, **made_with)
    assert torch.load(tmp_path / "fit.pt", weights_only=True)["step"] == steps


def test_a_finished_stage_is_not_trained_again(tmp_path: Path) -> None:
    done = _run(tmp_path, 6)
    log = (tmp_path / "log.jsonl").read_text()
    assert _equal(done, _run(tmp_path, 6))
    assert (tmp_path / "log.jsonl").read_text() == log


def test_training_learns_and_logs(tmp_path: Path) -> None:
    _run(tmp_path, 60)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(5, 61, 5))
    assert lines[-1]["error"] < 0.2 * lines[0]["error"]
    assert "absent" not in lines[0]


def test_learning_rate_rises_and_falls() -> None:
    config = LoopConfig(100, 1.0, warmup_steps=10, min_factor=0.1)
    rates: list[Any] = [learning_rate(config, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == pytest.approx(0.98, abs=0.02)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)
    assert all(a > b for a, b in zip(rates[9:], rates[10:], strict=False))

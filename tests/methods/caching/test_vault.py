"""A budget of bytes for snapshots: what is held, what is moved, and that nothing changes but the place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import make, run
from torch import Tensor

from diffeff.errors import ConfigError
from diffeff.methods.caching.cache import CacheMethod
from diffeff.methods.caching.feature_cache import FeatureCache
from diffeff.methods.caching.published.fora import FORA
from diffeff.methods.caching.track import Moment, Snapshot
from diffeff.methods.caching.vault import HostMemory, Vault
from diffeff.pipeline import DiffEffPipeline


class Shelf:
    """A second memory that takes everything, and counts."""

    def __init__(self) -> None:
        self.there: list[int] = []
        self.returned: list[int] = []

    def takes(self, x: Tensor) -> bool:
        return True

    def put(self, x: Tensor) -> Tensor:
        self.there.append(x.numel() * x.element_size())
        return x.clone()

    def back(self, x: Tensor, device: torch.device) -> Tensor:
        self.returned.append(x.numel() * x.element_size())
        return x.to(device, copy=True)


def snapshot(index: int, value: float = 0.0) -> Snapshot:
    return Snapshot(Moment(index, 0.0, index, 9), (torch.full((4,), value), None))


@pytest.fixture
def shelf(monkeypatch: pytest.MonkeyPatch) -> Shelf:
    found = Shelf()
    monkeypatch.setattr(CacheMethod, "shelf", found)
    return found


def nothing() -> int:
    return 0


# --- the vault ----------------------------------------------------------------------------------------------------
def test_the_oldest_go_first_and_come_back_as_they_were() -> None:
    vault, kept = Vault(32, Shelf()), [snapshot(i, float(i)) for i in range(4)]
    for one in kept:
        vault.add(one)
        vault.settle(vault, nothing)
    assert [vault.holds(one) for one in kept] == [False, False, True, True]
    assert (vault.on_device, vault.offloaded, vault.moved_out) == (32, 32, 2)
    tensors = vault.fetch(kept[1])
    assert torch.equal(tensors[0], torch.full((4,), 1.0))  # type: ignore[arg-type]
    assert tensors[1] is None
    assert not vault.holds(kept[1])  # used where it is, and still on the shelf
    assert vault.fetch(kept[3]) is kept[3].tensors
    assert vault.brought_back == 1


def test_what_replaces_an_absent_one_takes_its_place() -> None:
    """Otherwise every renewal would push another one out that is about to be renewed itself."""
    vault, kept = Vault(32, Shelf()), [snapshot(i) for i in range(4)]
    for one in kept:
        vault.add(one)
        vault.settle(vault, nothing)
    for i in range(4):
        new = snapshot(10 + i)
        vault.add(new, instead_of=kept[i])
        vault.settle(vault, nothing)
        kept[i] = new
    assert [vault.holds(one) for one in kept] == [False, False, True, True]
    assert vault.moved_out == 4  # two at first, two renewed
    assert (vault.on_device, vault.offloaded) == (32, 32)


def test_a_few_rows_of_a_larger_tensor_do_not_keep_all_of_it() -> None:
    vault, whole = Vault(1 << 20, Shelf()), torch.arange(8.0)
    half = Snapshot(Moment(0, 0.0, 0, 9), (whole[:4],))
    vault.add(half)
    assert half.tensors[0] is not None
    assert half.tensors[0].untyped_storage().nbytes() == vault.on_device == 16
    assert torch.equal(half.tensors[0], whole[:4])


def test_what_cannot_be_moved_stays_and_is_told() -> None:
    vault, one = Vault(4, HostMemory()), snapshot(0)
    vault.add(one)
    vault.settle(vault, nothing)
    assert vault.holds(one)
    assert "held 16 bytes against a cache_memory of 4" in vault.excess
    assert "in host memory already" in vault.excess
    crowded = Vault(20, Shelf())
    crowded.add(snapshot(0))
    crowded.settle(crowded, lambda: 24)
    assert crowded.offloaded == 16
    assert "indicators compare it" in crowded.excess


# --- caches under a budget ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["wan", "sd"])
@pytest.mark.parametrize("config", [{"interval": 2}, {"interval": 3}])
def test_a_budget_changes_places_and_no_bit(family: str, config: dict[str, Any], shelf: Shelf) -> None:
    pipe = DiffEffPipeline(make(family), plan=[FORA(**config)])
    free = run(family, pipe, steps=9)
    assert pipe.report is not None
    needed = pipe.report.methods[0].details["bytes_held"]
    budget = needed // 3
    pipe.apply([FORA(**config, cache_memory=str(budget))])
    assert torch.equal(run(family, pipe, steps=9), free)
    details = pipe.report.methods[0].details
    memory = details["memory"]
    assert memory["budget"] == budget
    assert 0 < memory["on_device"] <= budget
    assert details["bytes_held"] <= needed
    assert needed <= memory["on_device"] + memory["offloaded"] < 1.1 * needed  # peaks of sizes that differ
    assert memory["moved_out"] == len(shelf.there) > 0
    assert memory["brought_back"] == len(shelf.returned) > 0
    assert not any("cache_memory" in text for text in pipe.report.warnings)


@pytest.mark.parametrize("predictor", ["linear", "cubic"])
def test_histories_of_several_snapshots_are_kept_within_it(predictor: str, shelf: Shelf) -> None:
    options: dict[str, Any] = {"interval": 2, "site": "segment", "predictor": predictor, "first": 2}
    pipe = DiffEffPipeline(make("wan"), plan=[FeatureCache(**options)])
    free = run("wan", pipe, steps=10)
    assert pipe.report is not None
    needed = pipe.report.methods[0].details["transformer"]["bytes_held"]
    pipe.apply([FeatureCache(**options, cache_memory=str(needed // 2))])
    assert torch.equal(run("wan", pipe, steps=10), free)
    details = pipe.report.methods[0].details
    assert details["memory"]["on_device"] <= needed // 2
    assert details["transformer"]["bytes_held"] <= needed // 2
    assert details["memory"]["offloaded"] >= needed // 2


def test_an_indicator_that_holds_the_snapshot_is_counted_once_it_has_gone(shelf: Shelf) -> None:
    options: dict[str, Any] = {"policy": "threshold", "threshold": 1e-9, "first": 1, "last": 1}
    pipe = DiffEffPipeline(make("wan"), plan=[FeatureCache(**options, cache_memory="1")])
    run("wan", pipe, steps=10)
    assert pipe.report is not None
    memory = pipe.report.methods[0].details["memory"]
    assert memory["on_device"] > 1
    assert any("indicators compare it" in text for text in pipe.report.warnings)


def test_on_the_host_there_is_nowhere_to_go_and_the_report_says_so() -> None:
    pipe = DiffEffPipeline(make("wan"), plan=[FORA()])
    free = run("wan", pipe, steps=9)
    pipe.apply([FORA(cache_memory="1KB")])
    assert torch.equal(run("wan", pipe, steps=9), free)
    assert pipe.report is not None
    memory = pipe.report.methods[0].details["memory"]
    assert (memory["moved_out"], memory["offloaded"]) == (0, 0)
    assert memory["on_device"] > 1000
    assert any("in host memory already" in text for text in pipe.report.warnings)


def test_amounts_are_checked_when_the_config_is_made() -> None:
    assert FORA(cache_memory="2MiB").cache_bytes == 2 * 2**20
    assert FORA().cache_bytes is None
    with pytest.raises(ConfigError, match="no amount of memory"):
        FORA(cache_memory="lots")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_snapshots_leave_the_gpu_for_pinned_memory() -> None:
    vault = Vault(0, HostMemory())
    kept = [Snapshot(Moment(i, 0.0, i, 9), (torch.full((1 << 20,), float(i), device="cuda"),)) for i in range(3)]
    before = torch.cuda.memory_allocated()
    for one in kept:
        vault.add(one)
        vault.settle(vault, nothing)
    assert before - torch.cuda.memory_allocated() >= 3 * 4 * (1 << 20)
    for i, one in enumerate(kept):
        assert one.tensors[0] is not None
        assert one.tensors[0].is_pinned()
        (found,) = vault.fetch(one)
        assert found is not None
        assert found.is_cuda
        assert bool((found == float(i)).all())

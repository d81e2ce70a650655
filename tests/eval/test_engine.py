"""Engines: the same numbers in one process and in two Ray workers; errors, deaths, early ends, bad arguments."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffeff.errors import ConfigError, DiffEffError, MissingExtra, UnknownName
from diffeff.eval import ray_engine
from diffeff.eval.engine import LocalEngine, open_engine
from diffeff.eval.ray_engine import RayEngine, WorkerLost


@dataclass(frozen=True)
class Network:
    """A setup as the evaluation has them: a frozen spec that builds something from torch. Notes every build."""

    seed: int
    log: Path | None = None

    def __call__(self) -> Any:
        import torch

        if self.log is not None:
            with self.log.open("a") as file:
                file.write(f"{os.getpid()}\n")
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(96, 64, generator=generator)


def project(weights: Any, item: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    import torch

    result: np.ndarray[Any, Any] = torch.softmax(torch.from_numpy(item) @ weights, dim=-1).numpy()
    return result


def rows(count: int) -> Iterator[np.ndarray[Any, Any]]:
    for i in range(count):
        yield np.random.default_rng(i).standard_normal((33, 96), dtype=np.float32)


def nothing() -> None:
    return None


def with_pid(state: None, item: Any) -> tuple[Any, int]:
    return item, os.getpid()


def picky(state: None, item: int) -> int:
    if item == 3:
        raise ConfigError("item 3 is not to my taste")
    return 10 * item


def broken_setup() -> None:
    raise FileNotFoundError("weights.pth")


class Stubborn(Exception):
    """Cannot be pickled back: its constructor wants two arguments."""

    def __init__(self, what: str, where: str) -> None:
        super().__init__(f"{what} at {where}")


def stubborn(state: None, item: int) -> int:
    raise Stubborn("stuck", f"item {item}")


def dies_once(state: None, item: tuple[int, Path]) -> int:
    number, mark = item
    if number == 2 and not mark.exists():
        mark.touch()
        os._exit(1)
    return number


def always_dies(state: None, item: int) -> int:
    if item == 1:
        os._exit(1)
    return item


def where(state: None, item: int) -> str:
    return str(Path.cwd())


def slow(state: None, item: int) -> int:
    if item:
        time.sleep(120)
    return os.getpid()


@pytest.fixture(scope="module")
def ray() -> Iterator[RayEngine]:
    """One engine of two workers for all tests: they are meant to serve one map after the other."""
    cloudpickle = pytest.importorskip("ray.cloudpickle")
    module = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(module)  # workers cannot import tests
    with RayEngine(2, threads=1, address="local") as engine:
        yield engine
    cloudpickle.unregister_pickle_by_value(module)


def collect(engine: Any, function: Any, items: Any, setup: Callable[[], Any] = nothing) -> dict[int, Any]:
    return dict(engine.map(function, items, setup=setup))


def gather(found: dict[int, Any], results: Iterator[tuple[int, Any]]) -> None:
    """Keeps what came before an error."""
    for index, value in results:
        found[index] = value


def gone(pid: int) -> bool:
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        status = Path(f"/proc/{pid}/stat")
        if status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.1)
    return False


def test_local_maps_in_order_and_reads_lazily() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for i in range(5):
            taken.append(i)
            yield i

    with open_engine() as engine:
        results = engine.map(lambda state, item: state + item, items(), setup=lambda: 100)
        assert next(results) == (0, 100)
        assert taken == [0]
        assert list(results) == [(1, 101), (2, 102), (3, 103), (4, 104)]


def test_local_keeps_the_state_of_an_equal_setup_and_drops_it_for_another(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with LocalEngine() as engine:
        for seed in (0, 0, 1):
            collect(engine, project, rows(2), Network(seed, log))
    assert len(log.read_text().splitlines()) == 2


def test_local_builds_nothing_when_there_is_nothing_to_do() -> None:
    with LocalEngine() as engine:
        assert collect(engine, picky, [], broken_setup) == {}


def test_local_sets_and_restores_threads() -> None:
    import torch

    before = torch.get_num_threads()
    with open_engine("local", threads=before + 1) as engine:
        assert collect(engine, lambda state, item: torch.get_num_threads(), [0]) == {0: before + 1}
        assert engine.describe() == {"engine": "local", "workers": 1, "threads": before + 1, "events": []}
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "ray", "workers": 0}, "workers=0"),
        ({"name": "local", "workers": 2}, "Use the engine 'ray'"),
        ({"threads": 0}, "threads=0"),
        ({"name": "ray", "gpus": 1.5}, r"gpus=1\.5"),
        ({"name": "ray", "gpus": -1}, "gpus=-1"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_engine(**options)


def test_an_unknown_engine_names_the_known_ones() -> None:
    with pytest.raises(UnknownName, match="Did you mean 'ray'"):
        open_engine("rya")


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"diffeff\[ray\]"):
        open_engine("ray", workers=2)


def test_two_ray_workers_give_the_same_bits_as_one_process(ray: RayEngine, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with open_engine("local", threads=1) as local:
        expected = collect(local, project, rows(9), Network(7))
    found = collect(ray, project, rows(9), Network(7, log))
    assert found.keys() == expected.keys()
    for index, value in expected.items():
        assert np.array_equal(found[index], value)
        assert found[index].flags.writeable
    builds = log.read_text().splitlines()
    assert len(builds) == len(set(builds)) <= 2  # once per worker
    assert str(os.getpid()) not in builds


def test_ray_workers_stay_for_the_next_map_and_keep_an_equal_setups_state(ray: RayEngine, tmp_path: Path) -> None:
    log = tmp_path / "log"
    first = {pid for _, pid in collect(ray, with_pid, range(8)).values()}
    assert {pid for _, pid in collect(ray, with_pid, range(8)).values()} <= first | set(_pids(ray))
    collect(ray, project, rows(6), Network(1, log))
    collect(ray, project, rows(6), Network(1, log))
    builds = log.read_text().splitlines()
    assert len(builds) == len(set(builds))


def _pids(engine: RayEngine) -> list[int]:
    return [pid for _, pid in collect(engine, with_pid, range(8)).values()]


def test_ray_has_no_more_items_in_flight_than_workers(ray: RayEngine) -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for i in range(50):
            taken.append(i)
            yield i

    for received, _ in enumerate(ray.map(with_pid, items(), setup=nothing), 1):
        assert len(taken) <= received + ray.workers


def test_an_error_arrives_as_it_is_after_the_finished_results(ray: RayEngine) -> None:
    found: dict[int, int] = {}
    with pytest.raises(ConfigError, match="not to my taste") as error:
        gather(found, ray.map(picky, range(6), setup=nothing))
    assert type(error.value) is ConfigError
    assert "picky" in error.value.__notes__[0]
    assert {0, 1, 2} <= found.keys()
    assert all(value == 10 * index for index, value in found.items())


def test_an_error_of_the_setup_arrives_as_it_is(ray: RayEngine) -> None:
    with pytest.raises(FileNotFoundError, match=r"weights\.pth"):
        collect(ray, picky, range(3), broken_setup)


def test_an_error_that_cannot_travel_keeps_its_words(ray: RayEngine) -> None:
    with pytest.raises(DiffEffError, match="Stubborn: stuck at item 0"):
        collect(ray, stubborn, [0])


def test_what_cannot_be_sent_is_named(ray: RayEngine) -> None:
    lock = threading.Lock()
    with pytest.raises(ConfigError, match="the item 0 cannot be sent"):
        collect(ray, with_pid, [lock])
    with pytest.raises(ConfigError, match="the setup cannot be sent"):
        collect(ray, with_pid, [0], lambda: lock)


def test_a_dead_workers_item_is_done_by_another(ray: RayEngine, tmp_path: Path) -> None:
    before = len(ray.events)
    found = collect(ray, dies_once, [(i, tmp_path / "mark") for i in range(6)])
    assert found == {i: i for i in range(6)}
    assert len(ray.events) == before + 1
    assert "a worker died at item 2" in ray.events[-1]
    assert ray.describe()["events"] == ray.events


def test_an_item_that_kills_every_worker_is_named_and_the_rest_arrives(ray: RayEngine) -> None:
    found: dict[int, int] = {}
    with pytest.raises(WorkerLost, match="3 workers died one after the other at item 1") as error:
        gather(found, ray.map(always_dies, range(4), setup=nothing))
    assert len(str(error.value)) < 300
    assert found == {0: 0, 2: 2, 3: 3}


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to one process there")
def test_ctrl_c_ends_the_workers(ray: RayEngine) -> None:
    results = ray.map(slow, [0, 1, 2, 3], setup=nothing)
    _, pid = next(results)
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        next(results)
    assert gone(pid)
    assert collect(ray, picky, [1, 2]) == {0: 10, 1: 20}  # and the engine can still be used


def test_relative_paths_mean_the_same_files(ray: RayEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray._end_workers()
    monkeypatch.chdir(tmp_path)
    assert collect(ray, where, [0]) == {0: str(tmp_path)}
    ray._end_workers()


def test_leaving_the_loop_keeps_a_worker_that_has_nothing_to_do(ray: RayEngine) -> None:
    pids = [next(value for _, value in ray.map(with_pid, [0], setup=nothing))[1] for _ in range(2)]
    assert pids[0] == pids[1]


@pytest.mark.skipif(sys.platform == "win32", reason="processes are looked up the POSIX way")
def test_leaving_the_loop_ends_the_workers(ray: RayEngine) -> None:
    results = ray.map(slow, [0, 1, 2], setup=nothing)
    _, pid = next(results)
    results.close()  # type: ignore[attr-defined]
    assert gone(pid)


def test_a_cluster_that_is_there_is_joined_and_left_running(ray: RayEngine) -> None:
    import ray as library

    collect(ray, picky, [1])
    ray._end_workers()  # make room
    with open_engine("ray", workers=5, threads=1) as second:
        assert collect(second, picky, [1, 2]) == {0: 10, 1: 20}
        assert second.workers == 2
        assert second.events == ["2 workers instead of 5: the Ray cluster has no room for more"]
        assert second.describe()["cluster"] == ray.describe()["cluster"]
    assert library.is_initialized()


def test_a_cluster_without_gpus_is_refused_for_workers_that_need_one(ray: RayEngine) -> None:
    import ray as library

    collect(ray, picky, [1])
    if library.cluster_resources().get("GPU"):
        pytest.skip("there is a GPU")
    with (
        open_engine("ray", workers=2, gpus=1) as second,
        pytest.raises(ConfigError, match="no room for a worker of 1 CPU and 1 GPU"),
    ):
        collect(second, picky, [1])


def test_a_worker_of_another_version_is_refused(ray: RayEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_engine, "__version__", "0.0.1")
    with pytest.raises(ConfigError, match=r"the caller 0\.0\.1: install the same version"):
        collect(ray, picky, [1])


class FakeRay:
    """As much of Ray as starting needs; `exists` plays a cluster that `ray start` has made."""

    def __init__(self, *, exists: bool) -> None:
        self.exists = exists
        self.calls: list[dict[str, Any]] = []

    def init(self, **options: Any) -> None:
        self.calls.append(options)
        if self.exists and "num_cpus" in options:
            raise ValueError("When connecting to an existing cluster, num_cpus must not be provided.")


def test_a_cluster_of_ray_start_is_joined_else_one_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    fresh, there = FakeRay(exists=False), FakeRay(exists=True)
    ray_engine._start(fresh, None, 3)
    ray_engine._start(there, None, 3)
    assert [call.get("num_cpus") for call in fresh.calls] == [3]
    assert [call.get("num_cpus") for call in there.calls] == [3, None]
    assert fresh.calls[0]["include_dashboard"] is False
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


def test_an_address_where_nobody_listens_fails_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(DiffEffError, match="cannot reach or start the Ray cluster"):
            ray_engine._start(FakeRay(exists=True), None, 2)

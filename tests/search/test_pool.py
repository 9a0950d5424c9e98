"""Workers on Ray: results in order, deaths survived, errors passed on."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray.exceptions

from search.pool import Job
from search.ray_pool import RayPool
from search.worker import Setup
from spaces.errors import UserError
from tests.search.fake_workers import FakeWorker


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayPool]:
    setup = Setup("none", "none", str(tmp_path_factory.mktemp("marks")))
    made = RayPool(setup, 2, kind=FakeWorker)
    yield made
    made.close()


def test_results_come_in_the_order_of_the_jobs(pool: RayPool) -> None:
    seen: list[int] = []
    results = pool.run([("double", (i,)) for i in range(20)], lambda i, result: seen.append(i))
    assert results == [2 * i for i in range(20)]
    assert sorted(seen) == list(range(20))


def test_a_worker_that_dies_costs_a_retry_and_no_result(pool: RayPool) -> None:
    pool.broadcast("learn", "calibration")
    results = pool.run([("die_once", (i,)) if i % 3 == 0 else ("double", (i,)) for i in range(9)])
    assert results == [i if i % 3 == 0 else 2 * i for i in range(9)]
    # Workers started in place of dead ones have been told what the dead ones knew.
    assert pool.run([("knows", ())] * 4) == [["calibration"]] * 4


def test_a_job_that_kills_every_worker_ends_in_one_line(pool: RayPool) -> None:
    with pytest.raises(UserError, match="died 3 times") as caught:
        pool.run([("die", ())])
    assert "\n" not in str(caught.value)


def test_files_that_are_out_of_reach_are_asked_for_again(
    pool: RayPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("search.ray_pool._TICK", 0.01)
    assert pool.run([("lose_files", (7, 2)), ("double", (1,))]) == [7, 2]
    with pytest.raises(UserError, match="files of the study did not reach"):
        pool.run([("lose_files", (8, 10**6))])


def test_an_error_of_a_job_arrives_as_it_was_raised(pool: RayPool) -> None:
    with pytest.raises(UserError, match="holds no text"):
        pool.run([("refuse", ())])


def test_the_pool_works_on_after_errors(pool: RayPool) -> None:
    assert pool.run([("double", (21,))]) == [42]


def test_ray_listens_on_loopback_only(pool: RayPool) -> None:
    pool.run([("double", (1,))])
    own = [psutil.Process(), *psutil.Process().children(recursive=True)]
    listening = [
        connection.laddr.ip.removeprefix("::ffff:")
        for process in own
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) > 3  # the head, the node, its workers
    assert {*listening} == {"127.0.0.1"}


@pytest.mark.slow
@pytest.mark.parametrize("part", ["raylet", "gcs_server"])
def test_a_ray_that_dies_is_started_anew(
    pool: RayPool, part: str, record_property: Callable[[str, object], None]
) -> None:
    before = psutil.Process().children(recursive=True)
    victims = [p for p in before if part in " ".join(p.cmdline()[:1])]
    assert victims
    blow, went_on = threading.Timer(0.3, lambda: [p.kill() for p in victims]), list[float]()
    begun = time.monotonic()
    blow.start()
    jobs = [("slowly", (i, 0.25)) for i in range(20)]
    assert pool.run(jobs, lambda i, _: went_on.append(time.monotonic())) == list(range(20))
    assert not [p for p in before if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert len(went_on) == 20
    gaps = [later - earlier for earlier, later in zip([begun, *went_on], went_on, strict=False)]
    fault = {"fault": f"kill -9 of {part} of a local Ray", "injected": 1, "lost": 0, "seconds": max(gaps)}
    record_property("fault", json.dumps(fault))


class Away:
    """A worker's seat on another node, whose file server is out of reach at first."""

    def __init__(self, misses: int) -> None:
        self.misses = misses
        self.worker = FakeWorker(Setup("none", "none", "none"))

    def run(self, job: Job, lessons: Sequence[Job]) -> Any:
        if self.misses:
            self.misses -= 1
            raise ray.exceptions.ActorUnavailableError("out of reach", None)
        for method, args in [*lessons, job]:
            found = getattr(self.worker, method)(*args)
        return found


def pool_of(seat: Away) -> RayPool:
    """A pool without a cluster, whose only worker sits there."""

    def get(job: Callable[[], Any]) -> Any:
        try:
            return job()
        except ray.exceptions.RayError as error:
            raise ray.exceptions.RayTaskError("run", "", error) from error

    remote = SimpleNamespace(remote=lambda *args: partial(seat.run, *args))
    member = SimpleNamespace(
        actor=SimpleNamespace(run=remote), arrival=SimpleNamespace(home=True), busy=False, told=0
    )
    made = object.__new__(RayPool)
    made._ray = SimpleNamespace(
        wait=lambda refs, **options: (refs[:1], []), get=get, exceptions=ray.exceptions
    )
    made._broadcasts, made._anywhere = [], frozenset()
    made.session = SimpleNamespace(dead=lambda: False)  # type: ignore[assignment]
    made.staff = SimpleNamespace(tend=lambda: None, members=[member])  # type: ignore[assignment]
    return made


@pytest.mark.parametrize("misses", [0, 1, 3])
def test_a_worker_that_missed_its_files_is_told_everything_once(
    misses: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("search.ray_pool._TICK", 0.001)
    seat = Away(0)
    made = pool_of(seat)
    made.broadcast("learn", "calibration")
    assert made.run([("knows", ())]) == [["calibration"]]
    seat.misses = misses
    made.broadcast("learn", "base")
    made.broadcast("learn", "texts")
    for _ in range(2):
        assert made.run([("knows", ())]) == [["calibration", "base", "texts"]]


def test_an_address_without_a_cluster_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--ray-address"):
        RayPool(Setup("none", "none", str(tmp_path)), 1, address="127.0.0.1:1", kind=FakeWorker)

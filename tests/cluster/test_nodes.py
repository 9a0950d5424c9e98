"""Workers of a pool when nodes come and go, and when memory is short; on Ray nodes of one machine."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from search.ray_pool import RayPool
from search.worker import Setup
from spaces.errors import UserError
from tests.search.fake_workers import FakeWorker

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    for name in ("model", "cache"):
        (tmp_path / name).mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return Setup(str(tmp_path / "model"), "model", str(tmp_path / "cache"))


@pytest.fixture
def cluster() -> Iterator[object]:
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield made
    made.shutdown()


def keep_busy(pool: RayPool, size: int, seconds: float = 90.0) -> float:
    """Runs jobs until the pool has so many workers; the seconds until then."""
    begun = time.monotonic()
    while pool.size != size:
        assert pool.run([("slowly", (i, 0.2)) for i in range(4)]) == [0, 1, 2, 3]
        assert time.monotonic() - begun < seconds
    return time.monotonic() - begun


def test_a_pool_shrinks_and_grows_with_the_cluster(
    cluster: object,
    setup: Setup,
    capsys: pytest.CaptureFixture[str],
    record_property: Callable[[str, object], None],
) -> None:
    node = cluster.add_node(num_cpus=1)  # type: ignore[attr-defined]
    pool = RayPool(setup, 2, cluster.address, FakeWorker)  # type: ignore[attr-defined]
    try:
        pool.broadcast("learn", "bank")
        assert pool.run([("slowly", (i, 0.2)) for i in range(20)]) == list(range(20))
        cluster.remove_node(node, allow_graceful=False)  # type: ignore[attr-defined]
        seconds = keep_busy(pool, 1)
        assert "goes on with 1 of 2 workers" in capsys.readouterr().out
        cluster.add_node(num_cpus=1)  # type: ignore[attr-defined]
        keep_busy(pool, 2)
        assert "all workers again" in capsys.readouterr().out
        assert pool.run([("knows", ())] * 4) == [["bank"]] * 4
        # A job that no other node may run has gone to the driver's node.
        assert pool.run([("stay", ())] * 3) == [pool.session.node] * 3
    finally:
        pool.close()
    fault = {"fault": "a Ray node killed", "injected": 1, "lost": 0, "seconds": round(seconds, 1)}
    record_property("fault", json.dumps(fault))


def test_more_workers_than_the_cluster_has_cpus_are_as_many_as_fit(
    cluster: object, setup: Setup, capsys: pytest.CaptureFixture[str]
) -> None:
    pool = RayPool(setup, 3, cluster.address, FakeWorker)  # type: ignore[attr-defined]
    try:
        assert pool.run([("double", (4,))]) == [8]
        assert pool.size == 1
        assert "1 of 3 workers" in capsys.readouterr().out
    finally:
        pool.close()


def test_a_pool_short_of_memory_goes_on_with_fewer_before_it_gives_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_memory_usage_threshold", "0.01")  # whatever is used is too much
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "200")
    pool = RayPool(Setup("none", "none", str(tmp_path)), 2, kind=FakeWorker)
    try:
        with pytest.raises(UserError, match="fewer --workers"):
            pool.run([("slowly", (i, 8.0)) for i in range(4)])
        assert "goes on with 1 of 2 workers (one was killed for lack of memory)" in capsys.readouterr().out
    finally:
        pool.close()

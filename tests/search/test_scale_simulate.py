from __future__ import annotations

from dataclasses import replace

import pytest

from search.scale.machines import CPU_NODE, cached, this_machine
from search.scale.simulate import Account, Cluster, Simulation
from search.scale.stages import Stage, Wave
from search.scale.work import Work

PLAIN = cached(this_machine(4, 2**40, 2**40))


def run(cluster: Cluster, *waves: Wave, seed: int = 0) -> Account:
    return Simulation(cluster, seed).run([Stage("trials", waves)])


def seconds(cluster: Cluster, *waves: Wave) -> float:
    return run(cluster, *waves).seconds["trials"]


def jobs(*durations: float) -> Wave:
    return Wave(tuple(Work(d) for d in durations))


def test_jobs_go_to_whoever_is_free_and_a_wave_waits_for_its_last() -> None:
    one, two = Cluster(PLAIN, 1, 1, 0.0), Cluster(PLAIN, 1, 2, 0.0)
    assert seconds(one, jobs(5, 1, 2)) == 8
    assert seconds(two, jobs(5, 1, 2)) == 5
    # The worker that is done at 1 waits for the other one before the next wave.
    assert seconds(two, jobs(5, 1), jobs(1, 5)) == 10
    assert seconds(two, jobs(5, 1, 1, 5)) == 7


def test_the_driver_works_alone_and_speed_is_the_cores() -> None:
    wave = Wave((Work(4.0), Work(4.0)), driver=3.0)
    assert seconds(Cluster(PLAIN, 1, 2, 0.0), wave) == 7
    assert seconds(Cluster(replace(PLAIN, core=2.0), 1, 2, 0.0), wave) == 3.5


def test_workers_share_the_cores_of_their_node() -> None:
    two_cores, wave = replace(PLAIN, cores=2), jobs(*[1.0] * 16)
    assert seconds(Cluster(two_cores, 1, 2, 0.0), wave) == 8
    assert seconds(Cluster(two_cores, 1, 16, 0.0), wave) == 8
    assert seconds(Cluster(two_cores, 2, 8, 0.0), wave) == 4
    assert seconds(Cluster(two_cores, 1, 1, 0.0), wave) == 16


def test_disk_and_memory_are_shared_by_the_workers_of_a_node() -> None:
    slow = replace(PLAIN, reading=10.0, writing=5.0, bandwidth=20.0)
    reading = Wave((Work(1.0, read=20.0),) * 2)
    assert seconds(Cluster(slow, 1, 1, 0.0), reading) == 6
    assert seconds(Cluster(slow, 1, 2, 0.0), reading) == 5
    assert seconds(Cluster(slow, 2, 1, 0.0), Wave((Work(1.0, written=10.0),) * 2)) == 3
    traffic = Wave((Work(1.0, traffic=40.0),) * 2)
    assert seconds(Cluster(slow, 1, 1, 0.0), traffic) == 4
    assert seconds(Cluster(slow, 1, 2, 0.0), traffic) == 4


def test_the_checkpoint_reaches_one_node_after_the_other_and_once() -> None:
    cluster = Cluster(replace(PLAIN, network=10.0), 3, 1, 0.0, checkpoint=100)
    assert seconds(cluster, jobs(1, 1, 1)) == 21
    assert seconds(cluster, jobs(1, 1, 1), jobs(1, 1, 1)) == 22
    assert seconds(cluster, jobs(1)) == 1, "the driver's node has it"


def test_a_failed_node_loses_its_job_and_no_other() -> None:
    healthy = Cluster(PLAIN, 2, 1, 0.0)
    wave = jobs(*[600.0] * 40)
    found = run(replace(healthy, failures=1.0), wave)
    assert found.lost > 0
    assert found.busy == 40 * 600, "every job is done once in the end"
    assert found.seconds["trials"] > seconds(healthy, wave)
    slower = run(replace(healthy, failures=1.0, restart=3000.0), wave)
    assert slower.seconds["trials"] > found.seconds["trials"] + 1000


def test_failures_come_at_the_stated_rate() -> None:
    cluster = Cluster(PLAIN, 4, 1, 0.0, failures=2.0, restart=0.0)
    found = run(cluster, jobs(*[36.0] * 40_000))
    hours = found.hours * cluster.nodes
    assert found.lost / hours == pytest.approx(2.0, rel=0.1)


def test_stragglers_keep_the_mean_and_a_seed_repeats_them() -> None:
    cluster = Cluster(PLAIN, 1, 1, 0.5)
    found = run(cluster, jobs(*[1.0] * 20_000))
    assert found.busy == pytest.approx(20_000, rel=0.03)
    assert run(cluster, jobs(*[1.0] * 50), seed=3) == run(cluster, jobs(*[1.0] * 50), seed=3)
    assert run(cluster, jobs(*[1.0] * 50), seed=3) != run(cluster, jobs(*[1.0] * 50), seed=4)
    # A barrier waits for the slowest of a wave.
    wide = Cluster(PLAIN, 1, 8, 0.5)
    assert seconds(wide, *[jobs(*[1.0] * 8)] * 20) > 1.5 * seconds(wide, jobs(*[1.0] * 160))


def test_no_more_workers_than_a_node_holds() -> None:
    from compression.checkpoint import open_target
    from search.memory import run_bytes

    model = open_target("deepseek-v3")
    count = CPU_NODE.workers(model, stream=True)
    assert 0 < count < CPU_NODE.cores
    assert run_bytes(model, count, True) <= CPU_NODE.memory < run_bytes(model, count + 2, True)
    assert replace(CPU_NODE, memory=10**9).workers(model, stream=True) == 0

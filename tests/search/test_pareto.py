"""The front is what comparing every pair finds, and its pictures are whole files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from search.pareto import Point, dominates, front, write_html, write_png

# Few distinct values, so that ties and duplicates are common.
POINTS = st.lists(st.tuples(*(st.integers(0, 4).map(float) for _ in range(3))), max_size=12)


def beaten(p: Point, q: Point) -> bool:
    """Whether `q` is nowhere worse than `p` and somewhere better: less KL, fewer bytes, more speed."""
    nowhere_worse = q[0] <= p[0] and q[1] <= p[1] and q[2] >= p[2]
    return nowhere_worse and (q[0] < p[0] or q[1] < p[1] or q[2] > p[2])


@given(POINTS)
def test_the_front_holds_exactly_the_points_no_other_beats(points: list[Point]) -> None:
    expected = {i for i, p in enumerate(points) if not any(beaten(p, q) for q in points)}
    found = front(points)
    assert set(found) == expected
    assert len(found) == len(expected)
    assert [points[i][0] for i in found] == sorted(points[i][0] for i in found)


@given(POINTS.filter(bool))
def test_every_point_is_on_the_front_or_beaten_by_one_that_is(points: list[Point]) -> None:
    best = [points[i] for i in front(points)]
    assert best
    assert all(p in best or any(dominates(q, p) for q in best) for p in points)


def test_more_speed_is_better_and_more_of_the_rest_is_worse() -> None:
    assert dominates((1, 1, 2), (1, 1, 1))
    assert dominates((1, 1, 1), (2, 1, 1))
    assert dominates((1, 1, 1), (1, 2, 1))
    assert not dominates((1, 1, 1), (1, 1, 1))
    assert not dominates((1, 2, 1), (2, 1, 1))


def trial(number: int, kl: float, baseline: str | None = None) -> dict[str, Any]:
    scores = {
        "kl": kl,
        "kl_se": 0.01,
        "target_bytes": 10**9 * (5 - number),
        "tokens_per_second": 10.0 + number,
    }
    return {"number": number, "baseline": baseline, "portable": number % 2 == 0, "scores": scores}


def test_pictures_are_whole_files_that_need_no_network(tmp_path: Path) -> None:
    trials = [trial(0, 0.5, "uniform"), trial(1, 0.25), trial(2, 0.125)]
    write_html(trials, [2, 1], "tiny <b>", 10**10, tmp_path / "new" / "front.html")
    write_png(trials, [2, 1], "tiny", 10**10, tmp_path / "front.png")
    page = (tmp_path / "new" / "front.html").read_text("utf-8")
    assert page.rstrip().endswith("</html>")
    assert "<script src=" not in page.replace("'", '"')
    assert all(f"KL {t['scores']['kl']:.4f}" in page for t in trials)
    assert (tmp_path / "front.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not list(tmp_path.rglob("*.part"))

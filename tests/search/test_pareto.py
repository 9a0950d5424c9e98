"""The front is what comparing every pair finds; its pictures are whole files whose names can be read."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from search.labels import leader, overlap, place
from search.pareto import Point, Words, by_size, by_speed, corners, dominates, front, front_of, marks
from search.pareto_html import write_html
from search.pareto_png import write_png

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


def trial(number: int, kl: float, baseline: str | None = None, state: str = "COMPLETE") -> dict[str, Any]:
    scores = {
        "kl": kl,
        "kl_se": 0.01,
        "target_bytes": 10**9 * (5 - number),
        "tokens_per_second": 10.0 + number,
    }
    return {
        "number": number, "baseline": baseline, "portable": number % 2 == 0, "scores": scores, "state": state,
    }  # fmt: skip


def result(*trials: dict[str, Any]) -> dict[str, Any]:
    return {
        "trials": list(trials), "front": front_of(trials), "winners": {"portable": 2, "ragged": None},
        "budget_bytes": 5 * 10**9, "target": "big", "model": "small <b>", "device": "laptop",
    }  # fmt: skip


def test_a_trial_is_marked_as_what_it_is() -> None:
    found = marks(
        result(trial(0, 0.5, "uniform"), trial(1, 0.25), trial(2, 0.6), trial(3, 0.1, state="PRUNED"))
    )
    assert [m.form for m in found] == ["portable", "ragged", "portable", "ragged"]
    assert [m.on_front for m in found] == [False, True, True, False]
    assert [m.complete for m in found] == [True, True, True, False]
    assert [m.label for m in found] == ["uniform", None, "winner, portable", None]
    assert (found[0].gigabytes, found[0].speed) == (5.0, 10.0)


def test_a_panel_has_the_front_of_its_own_two_measures() -> None:
    found = marks(result(trial(0, 0.1), trial(1, 0.3), trial(2, 0.2)))
    assert [m.number for m in by_size(found)] == [2, 0]  # ascending size: trial 1 is larger and worse than 2
    assert [m.number for m in by_speed(found)] == [0, 2]


def test_steps_never_claim_what_no_trial_reached() -> None:
    size = [(1.0, 0.5), (2.0, 0.2)]
    assert corners(size, first_along=True) == [(1.0, 0.5), (2.0, 0.5), (2.0, 0.2)]  # up to 2 GB, KL is 0.5
    speed = [(1.0, 0.2), (2.0, 0.5)]
    assert corners(speed, first_along=False) == [(1.0, 0.2), (1.0, 0.5), (2.0, 0.5)]  # above 1 token/s too


def test_words_say_units_and_where_stopped_trials_went() -> None:
    words = Words.of(result(trial(0, 0.5), trial(3, 0.1, state="PRUNED")), "are left out")
    assert "(GB)" in words.size
    assert "(tokens/s)" in words.speed
    assert "nats" in words.kl
    assert "1 stopped early" in words.note
    assert "left out" in words.note


def test_page_needs_no_network_and_shows_every_complete_trial(tmp_path: Path) -> None:
    trials = [trial(0, 0.5, "uniform"), trial(1, 0.25), trial(2, 0.125), trial(3, 0.0625, state="PRUNED")]
    write_html(result(*trials), tmp_path / "new" / "front.html")
    page = (tmp_path / "new" / "front.html").read_text("utf-8")
    assert page.rstrip().endswith("</html>")
    assert "<script src=" not in page.replace("'", '"')
    assert "small &lt;b&gt; for big within 5 GB" in page
    assert "small <b>" not in page.split("<script")[0]
    assert all(f"KL {t['scores']['kl']:.4f}" in page for t in trials)
    assert '"legendonly"' in page  # what was stopped early
    assert not list(tmp_path.rglob("*.part"))


def test_picture_is_a_whole_png_even_of_a_single_trial(tmp_path: Path) -> None:
    for trials in ([trial(2, 0.125)], [trial(0, 0.5, "uniform"), trial(1, 0.25), trial(2, 0.125)]):
        write_png(result(*trials), tmp_path / "front.png")
        data = (tmp_path / "front.png").read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        assert data[-8:-4] == b"IEND"
    assert not list(tmp_path.rglob("*.part"))


def boxes(centres: list[Any], sizes: list[Any]) -> list[Any]:
    return [
        (x - w / 2, y - h / 2, x + w / 2, y + h / 2) for (x, y), (w, h) in zip(centres, sizes, strict=True)
    ]


@given(st.lists(st.tuples(st.floats(100, 700), st.floats(100, 500)), min_size=2, max_size=8))
def test_names_stay_in_the_frame_and_off_each_other(anchors: list[tuple[float, float]]) -> None:
    sizes = [(90.0, 14.0)] * len(anchors)
    centres = place(anchors, sizes, [8.0] * len(anchors), (0.0, 0.0, 800.0, 600.0), anchors)
    found = boxes(centres, sizes)
    for a, b in itertools.combinations(found, 2):
        assert overlap(a, b) == 0
    assert all(b[0] >= 0 and b[1] >= 0 and b[2] <= 800 and b[3] <= 600 for b in found)


def test_a_name_is_joined_to_its_point_where_it_is_away_from_it() -> None:
    assert leader((0, 0), (60, 0), (100, 14), 8) is None
    start, end = leader((0, 0), (0, 100), (100, 14), 8) or ((), ())
    assert start == (0, 8)
    assert end == (0, 93)

"""The report of a finished study, and what it is made of."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import numpy as np
import pytest

from search.evidence_jobs import evidence_file
from search.options import parse
from search.rebuild import OpenStudy
from search.report import __main__ as command
from search.report import tables
from search.report.build import build, write
from search.report.diagnosis import findings
from search.report.facts import Facts
from search.report.page import Heading, Page, Picture, Table, Text
from search.report.reproduce import command_of
from search.report.words import summary
from spaces.errors import UserError
from spaces.space import Space

Finished = tuple[list[str], Path, dict]


@pytest.fixture(scope="module")
def facts(finished: Finished) -> Facts:
    _, out, _ = finished
    return Facts.read(OpenStudy.open("tiny", str(out / "study.journal")), "best")


@pytest.fixture(scope="module")
def worst(finished: Finished, facts: Facts) -> Facts:
    """The most damaged baseline, of which the run measured no evidence."""
    result = finished[2]
    number = max(result["baselines"].values(), key=lambda n: result["finals"][str(n)]["report"]["kl"])
    return Facts.read(facts.opened, str(number))


def test_the_run_leaves_a_report_and_evidence_of_its_winners(finished: Finished, facts: Facts) -> None:
    _, out, result = finished
    assert (out / "report.html").stat().st_size > 100_000
    assert (out / "report.md").read_text("utf-8").startswith("# ")
    for number in {n for n in result["winners"].values() if n is not None}:
        record = next(t for t in result["trials"] if t["number"] == number)
        key = Facts.read(facts.opened, str(number)).candidate.key
        used = result["repairs"][str(number)]["used"]
        assert evidence_file(out / "cache", key, used).exists(), record["number"]


def test_the_page_needs_no_other_file_and_no_network(finished: Finished) -> None:
    page = (finished[1] / "report.html").read_text("utf-8")
    # Libraries carry addresses in their comments; what a browser would load are these attributes.
    body = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert not re.findall(r'(?:src|href)="(?!#|data:)', body)
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', body)
    assert len(pictures) >= 8
    assert all(base64.b64decode(p).startswith(b"\x89PNG") for p in pictures)


def test_markdown_has_the_same_sections_and_its_pictures_beside_it(finished: Finished) -> None:
    _, out, _ = finished
    text, page = (out / "report.md").read_text("utf-8"), (out / "report.html").read_text("utf-8")
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert headings == re.findall(r"<h2[^>]*>([^<]+)</h2>", page)
    pictures = re.findall(r"\]\(([^)]+\.png)\)", text)
    assert len(pictures) >= 9
    assert all((out / p).read_bytes().startswith(b"\x89PNG") for p in pictures)


def test_the_summary_says_the_figures_of_the_result(facts: Facts, finished: Finished) -> None:
    result, text = finished[2], " ".join(summary(facts))
    number = facts.number
    assert f"{facts.trial['scores']['target_bytes']:,} bytes" in text
    scores = result["finals"][str(number)]["report"]
    if facts.repaired:
        scores = result["repairs"][str(number)]["report"]
    assert f"{scores['kl']:.4f}" in text
    assert f"{result['base']['report']['perplexity']:.2f}" in text
    assert tables.domains(facts)[0][0] in text


def test_the_comparison_has_every_baseline_with_its_paired_interval(facts: Facts, finished: Finished) -> None:
    result, table = finished[2], tables.comparison(facts)
    labels = {row[0] for row in table.rows}
    assert {f"baseline {name}" for name, n in result["baselines"].items() if n not in facts.winners} <= labels
    own = [row for i, row in enumerate(table.rows) if i in table.strong]
    assert [row[3] for row in own] == ["0"]
    other = next(r for r in tables.rivals(facts) if r[3] is not facts.own)
    mean, half = tables.interval(np.array(other[3].windows) - facts.own.windows)
    assert any(row[3] == f"{mean:+.4f} ± {half:.4f}" for row in table.rows)


def test_bytes_by_role_add_up_to_the_file(facts: Facts) -> None:
    found = tables.bytes_by_role(facts)
    size = facts.target.file_bytes(facts.target_plan)
    assert size == facts.trial["scores"]["target_bytes"]
    data = sum(now for _, _, now in found.values())
    assert 0 < size - data < 0.3 * size  # metadata and padding, of which a tiny model has much
    assert all(whole >= pruned >= now for role, (whole, pruned, now) in found.items() if "norms" not in role)


def test_domains_are_weighted_means_of_the_windows(facts: Facts) -> None:
    rows = tables.domains(facts)
    mean = sum(kl * n for _, kl, _, n in rows) / sum(n for *_, n in rows)
    assert mean == pytest.approx(facts.own.kl, abs=1e-5)
    assert [r[1] for r in rows] == sorted((r[1] for r in rows), reverse=True)


def test_a_trial_without_evidence_is_measured_and_set_beside_the_winner(worst: Facts, facts: Facts) -> None:
    levers = {p["name"]: p["kl"] for p in worst.evidence["parts"] if p["kind"] == "only"}
    assert evidence_file(worst.opened.worker.cache, worst.candidate.key, False).exists()
    said = " ".join(f.text for f in findings(worst))
    costly = max(levers, key=lambda n: levers[n])
    first = {"experts": "Pruning", "types": "Quantization", "top-k": "Fewer active experts"}
    assert f"{first[costly]} costs most" in said
    assert f"the portable winner, trial {facts.result['winners']['portable']}, keeps" in said
    assert "winner, trial" not in " ".join(f.text for f in findings(facts))


def test_other_budgets_are_cheaper_the_larger_they_are(facts: Facts) -> None:
    (said,) = [f.text for f in findings(facts) if f.text.startswith("Other budgets")]
    ratios = [float(x) for x in re.findall(r"([\d.]+) x", said)]
    assert len(ratios) >= 2
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[0] > 1 > ratios[-1]


def test_a_report_measures_no_costs(facts: Facts, tmp_path: Path) -> None:
    before = (facts.opened.worker.cache / "option_costs.jsonl").read_bytes()
    assert facts.costs.costs.size
    assert (facts.opened.worker.cache / "option_costs.jsonl").read_bytes() == before
    lost = Facts(facts.opened, facts.result, facts.number)
    lost.space = Space(facts.space.inventory, facts.space.rankings, types=("Q4_K", "Q8_0"))
    lost.errors = {k: v for k, v in facts.errors.items() if k[1] in ("Q4_K", "Q8_0")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(facts.opened.worker, "cache", tmp_path)
        with pytest.raises(UserError, match="option costs are not complete"):
            _ = lost.costs


def test_the_command_to_reproduce_it_is_the_same_study(facts: Facts) -> None:
    command = command_of(facts.opened.settings)
    assert command[:3] == ["python", "-m", "search.run"]
    again = vars(parse(command[3:]))
    known = facts.opened.settings
    for name in (
        "budget",
        "target",
        "context",
        "runtime",
        "trials",
        "sampler",
        "seed",
        "study",
        "repair",
        "export",
    ):
        assert again[name] == known[name], name
    assert [str(again[n]) for n in ("model", "out", "text", "calibration")] == [
        known[n] for n in ("model", "out", "text", "calibration")
    ]
    small = {**known, "device": {**known["device"], "memory": 12 * 10**9}, "export": False, "tasks": []}
    changed = parse(command_of(small)[3:])
    assert (changed.device.memory, changed.export, changed.tasks) == (12 * 10**9, False, ())


@pytest.mark.parametrize(
    ("kl", "speed", "lever", "signs"),
    [
        (0.01, 50.0, "types", set()),
        (2.0, 50.0, "experts", {"collapse from over-pruning"}),
        (2.0, 50.0, "types", {"collapse from too few bits"}),
        (2.0, 50.0, "top-k", {"collapse from too few active experts"}),
        (0.01, 2.0, "types", {"too slow"}),
        (0.0, 50.0, "types", set()),
    ],
)
def test_signs_of_failure(
    facts: Facts, kl: float, speed: float, lever: str, signs: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [{"kind": "all", "name": "", "kl": kl}]
    for name in ("experts", "top-k", "types"):
        alone = kl if name == lever else 0.0
        parts += [
            {"kind": "only", "name": name, "kl": alone},
            {"kind": "without", "name": name, "kl": kl - alone},
        ]
    parts += [{"kind": "role", "name": "attention", "kl": kl}, {"kind": "layer types", "name": "1", "kl": kl}]
    parts += [{"kind": "layer experts", "name": "1", "kl": 0.0}]
    mass = 0.5 if lever == "experts" else 0.99
    expected = signs | ({"router starved"} if lever == "experts" else set())
    routing = [{"layer": 1, "kept_mass": mass, "agreement": 0.9}]
    changed = Facts(facts.opened, facts.result, facts.number)
    changed.evidence = {"parts": parts, "routing": routing}
    changed.trial = {**facts.trial, "scores": {**facts.trial["scores"], "tokens_per_second": speed}}
    changed.own = tables.Quality(kl, 0.0, 1.0, 1.0, None)
    assert {f.sign for f in findings(changed)} - {""} == expected


def test_a_trial_of_the_command_line_is_written_where_it_was_asked_for(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = finished
    journal, target = str(out / "study.journal"), tmp_path / "page.html"
    monkeypatch.setattr(
        "sys.argv", ["report", "--study", "tiny", "--storage", journal, "--trial", "0", "--out", str(target)]
    )
    command.main()
    assert target.exists()
    assert (tmp_path / "page.md").exists()
    assert "costs most" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--out", "page.pdf"], "must end in .html"),
        (["--trial", "9999"], "no trial of that number"),
        (["--trial", "first"], "must be best or a trial's number"),
    ],
)
def test_what_cannot_be_reported_is_refused(
    finished: Finished, arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    journal = str(finished[1] / "study.journal")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["report", "--study", "tiny", "--storage", journal, *arguments])
    with pytest.raises(UserError, match=said):
        command.main()
    assert not list(tmp_path.iterdir())


def test_an_unfinished_study_is_told_to_finish(facts: Facts, tmp_path: Path) -> None:
    settings = {**facts.opened.settings, "out": str(tmp_path)}
    with pytest.raises(UserError, match="finished study"):
        Facts.read(OpenStudy(facts.opened.study, settings, facts.opened.worker), "best")


def test_pages_escape_what_they_are_given(tmp_path: Path) -> None:
    page = Page("a <b> & c")
    page.add(Heading("<script>"), Text("1 < 2 & 3"), Table(("x|y", "z"), [["<i>", "a|b"]], (0,)))
    page.add(Picture("p", b"\x89PNG", 'say "hi"'))
    page.write_html(tmp_path / "p.html")
    page.write_markdown(tmp_path / "p.md")
    text = (tmp_path / "p.html").read_text("utf-8")
    assert "<script>" not in text
    assert "1 &lt; 2 &amp; 3" in text
    assert 'alt="say &quot;hi&quot;"' in text
    assert "| **<i>** | **a\\|b** |" in (tmp_path / "p.md").read_text("utf-8")
    assert (tmp_path / "p_pictures" / "p.png").exists()


def test_writing_twice_gives_the_same_page(facts: Facts, tmp_path: Path) -> None:
    first, _ = write(facts, tmp_path / "a.html")
    build(facts).write_html(tmp_path / "b.html")
    ids = re.compile(r"[0-9a-f]{8}-[0-9a-f-]{27}")  # plotly names its divisions at random
    pages = [ids.sub("", p.read_text("utf-8")) for p in (first, tmp_path / "b.html")]
    assert pages[0] == pages[1]

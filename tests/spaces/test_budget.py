"""Sizes are read as people write them, or refused in one line; a budget must fit its device."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from spaces.budget import Budget, format_size, parse_size
from spaces.errors import UserError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1B", 1), ("103GB", 103 * 10**9), ("96GiB", 96 * 2**30), ("1.5 TB", 15 * 10**11), ("512 MiB", 2**29),
        ("2kb", 2000), ("2kib", 2048), ("  7 MB ", 7 * 10**6), ("0.5GiB", 2**29), ("1TiB", 2**40),
        ("671000000000B", 671 * 10**9), ("103.40GB", 103_400_000_000), ("9007199254740992 B", 2**53),
    ],
)  # fmt: skip
def test_size_is_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "103", "GB", "-1GB", "+1GB", "0GB", "0.0 TB", "0.1B", "1e3GB", "1,000GB", "1_000GB", ".5GB",
        "1.GB", "1..2GB", "103 G", "103GBs", "103 G B", "1PB", "1 KBi", "nan GB", "infGB", "0x10GB",
        "1GB 1GB",
        "9" * 70 + "B", "1GB\x00", "٫5GB",
    ],
)  # fmt: skip
def test_what_is_not_a_size_is_refused_in_one_line_that_names_the_option(text: str) -> None:
    with pytest.raises(UserError, match=r"^--budget: ") as error:
        parse_size(text, "--budget")
    assert "\n" not in str(error.value)
    assert "103GB" in str(error.value)


@pytest.mark.parametrize("text", ["5iB", "1Kıb", "1Kİb"])
def test_a_unit_that_only_looks_like_one_is_refused(text: str) -> None:
    with pytest.raises(UserError):
        parse_size(text)


@settings(deadline=None, max_examples=200)
@given(
    st.one_of(
        st.text(max_size=80), st.from_regex(r"[0-9]{0,9}\.?[0-9]{0,9} ?([kmgpKMGTP]i?)?[bB]?", fullmatch=True)
    )
)
@example("1" * 63 + "B")
def test_any_text_is_a_positive_size_or_a_user_error(text: str) -> None:
    with contextlib.suppress(UserError):
        size = parse_size(text)
        assert isinstance(size, int)
        assert size > 0


@pytest.mark.parametrize(
    ("text", "size"),
    [("1.001KB", 1001), ("9007199254740993B", 2**53 + 1), ("8.2000000001TB", 8_200_000_000_100)],
)
def test_a_size_is_exact_to_the_byte(text: str, size: int) -> None:
    assert parse_size(text) == size


@settings(deadline=None)
@given(st.integers(1, 10**15 - 1))
def test_a_formatted_size_reads_back_within_half_a_percent(size: int) -> None:
    text = format_size(size)
    assert parse_size(text) == pytest.approx(size, rel=0.005)
    assert parse_size(format_size(size).replace(" ", "")) == parse_size(text)


@settings(deadline=None)
@given(st.integers(1, 10**15 - 1), st.integers(1, 10**15 - 1))
def test_a_larger_size_never_reads_back_smaller(a: int, b: int) -> None:
    small, large = sorted((a, b))
    assert parse_size(format_size(small)) <= parse_size(format_size(large)) + 1  # one byte of rounding


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (103_000_000_000, "103.0 GB"), (1_342_274_019_328, "1.34 TB")],
)
def test_sizes_are_shown_in_decimal_units(size: int, text: str) -> None:
    assert format_size(size) == text


BUDGET = Budget(
    weights=100, device_memory=160, context=4096, kv_cache=30, compute_buffer=20, reserve=10
)  # fits to the byte


def test_a_budget_that_fits_to_the_byte_passes() -> None:
    BUDGET.check()
    assert BUDGET.overhead == 60
    assert BUDGET.limit == 100


@pytest.mark.parametrize("name", ["weights", "kv_cache", "compute_buffer", "reserve"])
def test_one_byte_more_of_anything_is_refused_with_a_remedy(name: str) -> None:
    tight = replace(BUDGET, **{name: getattr(BUDGET, name) + 1})
    with pytest.raises(UserError, match="lower --budget or --context, or raise --device-memory"):
        tight.check()


def test_the_limit_is_what_the_device_leaves_where_that_is_less() -> None:
    assert replace(BUDGET, device_memory=150).limit == 90
    assert replace(BUDGET, device_memory=1000).limit == 100

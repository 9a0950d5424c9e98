"""Profiles say what they must, and time follows the formula."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spaces.devices import DEFAULT_DEVICE, DEVICES, Device, core_rates, device
from spaces.errors import UserError
from spaces.quant_types import LADDER, SHORT_LADDER

RESULTS = Path(__file__).parents[2] / "experiments/results/decode_speed.json"
CPU = Device("cpu", "A CPU", 100, 1000.0, "test", efficiency=0.5, rates={"Q4_K": 10.0, "Q8_0": 1e9})
TIERS = Device(
    "tiers", "Both", 100, 1000.0, "test", efficiency=0.5, rates={"Q4_K": 10.0}, gpu_memory=20,
    host_bandwidth=100.0,
)  # fmt: skip


@pytest.mark.parametrize("profile", DEVICES.values(), ids=DEVICES)
def test_a_profile_is_whole_and_survives_json(profile: Device) -> None:
    assert DEVICES[profile.name] is profile
    assert profile.source
    assert profile.title
    assert profile.memory > 10**9
    assert profile.bandwidth > 10**9
    assert 0 < profile.efficiency <= 1
    assert (profile.gpu_memory is None) == (profile.host_bandwidth == 0)
    assert profile.gpu_memory is None or 0 < profile.gpu_memory < profile.memory
    assert (profile.rates is None) == (profile.cores == 0)
    # A study keeps the device as its fields.
    assert Device(**json.loads(json.dumps(vars(profile)))) == profile


def test_an_unknown_device_is_refused_with_the_nearest() -> None:
    assert device(DEFAULT_DEVICE).name == DEFAULT_DEVICE
    with pytest.raises(UserError, match=r"--device.*ddr5-desktop-96"):
        device("ddr5-desktop-69")


def test_the_slower_of_reading_and_decoding_is_the_time() -> None:
    assert CPU.seconds(1000) == 2.0  # 1000 bytes at half of 1000 bytes/s
    assert CPU.seconds(1000, 10, "Q4_K") == 2.0
    assert CPU.seconds(1000, 40, "Q4_K") == 4.0  # 40 weights at 10 a second
    assert CPU.seconds(1000, 40, "Q8_0") == 2.0
    assert CPU.seconds(1000, 40, "Q6_K") == 2.0  # no rate: bound by memory


def test_a_gpu_is_bound_by_memory_and_its_host_by_the_slower() -> None:
    assert TIERS.seconds(1000, 1000, "Q4_K") == 2.0
    assert TIERS.seconds(1000, 100, "Q4_K", host=True) == 20.0
    assert TIERS.seconds(1000, 1000, "Q4_K", host=True) == 100.0


def test_a_desktops_rates_are_the_measured_ones_times_its_cores() -> None:
    found = json.loads(RESULTS.read_text("utf-8"))
    rates = core_rates()
    assert rates.keys() >= {*LADDER, *SHORT_LADDER, "MXFP4"}
    for name, rate in rates.items():
        assert rate == pytest.approx(found["rates"][name] / found["threads"], rel=2e-3)  # both are rounded
        for desktop in ("ddr5-desktop-96", "rtx-5090-ddr5-128"):
            profile = device(desktop)
            assert (profile.rates or {})[name] == pytest.approx(rate * profile.cores)


def test_fewer_bits_are_not_always_faster() -> None:
    rates = core_rates()
    assert rates["IQ3_S"] < rates["Q4_K"] / 2
    assert rates["IQ1_S"] < rates["Q4_K"]

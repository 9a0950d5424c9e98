"""A headless Chromium and an MLflow server on this machine, for looking at what a study shows."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spaces.errors import UserError

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars",
)  # fmt: skip

_NO_ASSISTANT = """
try { localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true') } catch {}
"""
"""MLflow opens a chat panel on the first visit; not where it believes it was here before."""


def missing() -> str | None:
    """What a browser needs and this machine lacks; None where it has everything."""
    if not any(map(shutil.which, _NAMES)):
        return f"no Chromium on PATH (looked for {', '.join(_NAMES)})"
    if not shutil.which("chromedriver"):
        return "no chromedriver on PATH (Debian: apt install chromium-driver)"
    return None


@contextmanager
def browser(width: int = 1280, height: int = 900) -> Iterator[Any]:
    """A Selenium driver whose page has that size, with a profile of its own.

    Raises:
        UserError: There is no Chromium, or no driver of it.
    """
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    lack = missing()
    if lack is not None:
        raise UserError(f"browser: {lack}; install it")
    options = webdriver.ChromeOptions()
    options.binary_location = next(filter(None, map(shutil.which, _NAMES)))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*_FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        try:
            resize(driver, width, height)
            driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": _NO_ASSISTANT})
            yield driver
        finally:
            driver.quit()


def resize(driver: Any, width: int, height: int) -> None:
    """Gives the page a size, whatever the window's frame takes."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def shown(driver: Any, css: str, text: str = "", patience: float = 60) -> Any:
    """The first visible element a CSS selector finds, with some text in it, as soon as it is there.

    Raises:
        TimeoutException: It does not come.
    """
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.support.ui import WebDriverWait

    def find(page: Any) -> Any:
        found = page.find_elements("css selector", css)
        return next((e for e in found if e.is_displayed() and text in e.text), False)

    ignored = (StaleElementReferenceException,)
    wait = WebDriverWait(driver, patience, 0.3, ignored)
    return wait.until(find, f"no {css!r} with {text!r} on {driver.current_url}")


@contextmanager
def mlflow_ui(uri: str, patience: float = 120) -> Iterator[str]:
    """`mlflow ui` of a backend store on a free port; its address.

    Raises:
        UserError: It did not start in `patience` seconds.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [
        sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri, "--host", "127.0.0.1",
        "--port", str(port), "--workers", "1",
    ]  # fmt: skip
    environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w+") as log:
        # In a group of its own: the server's children go with it.
        server = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            _wait(address, server, patience, Path(log.name))
            yield address
        finally:
            os.killpg(server.pid, 15)
            server.wait(30)


def _wait(address: str, server: subprocess.Popen[bytes], patience: float, log: Path) -> None:
    until = time.monotonic() + patience
    while time.monotonic() < until and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.3)
    tail = log.read_text("utf-8").strip().splitlines()[-1:]
    raise UserError(f"mlflow ui: not up after {patience:.0f} s at {address} ({' '.join(tail)})")

"""A real browser without a window, for the page's tests, pictures and measurements: Chromium, driven by selenium."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_QUIET = (  # nothing but the page that is asked for
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-default-apps",
    "--force-device-scale-factor=1", "--hide-scrollbars",
)  # fmt: skip


def missing() -> str | None:
    """Why no browser can be had, or None."""
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "selenium is not installed (pip install 'fasttc[test]')"
    if _program("chromium", "chromium-browser", "google-chrome") is None:
        return "no Chromium found (apt-get install chromium chromium-driver)"
    if _program("chromedriver") is None:
        return "no chromedriver found (apt-get install chromium-driver)"
    return None


def _program(*names: str) -> str | None:
    return next((found for name in names if (found := shutil.which(name))), None)


@contextmanager
def browser(width: int = 1440, height: int = 900, downloads: Path | None = None) -> Iterator[Any]:
    """A fresh Chromium with a window of the given inner size; selenium's driver of it.

    Raises:
        ValueError: no browser can be had; the message says what to install.
    """
    if reason := missing():
        raise ValueError(f"browser: {reason}")
    from selenium import webdriver

    os.environ["SE_OFFLINE"] = os.environ["SE_AVOID_STATS"] = (
        "true"  # selenium's helper would ask the network
    )
    options = webdriver.ChromeOptions()
    options.binary_location = _program("chromium", "chromium-browser", "google-chrome") or ""
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    if downloads is not None:
        options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    with tempfile.TemporaryDirectory(prefix="fasttc-browser-", ignore_cleanup_errors=True) as profile:
        for argument in (*_QUIET, f"--user-data-dir={profile}", f"--window-size={width},{height}"):
            options.add_argument(argument)
        service = webdriver.ChromeService(executable_path=_program("chromedriver"))
        driver = webdriver.Chrome(options=options, service=service)
        try:
            driver.execute_cdp_cmd(
                "Emulation.setDeviceMetricsOverride",
                {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
            )
            yield driver
        finally:
            driver.quit()


def ready(driver: Any, seconds: float = 20) -> float:
    """Waits until the page is drawn; returns the milliseconds from navigation to the frame after its first drawing."""
    from selenium.webdriver.support.ui import WebDriverWait

    script = "return document.documentElement.dataset.ready"
    return float(
        WebDriverWait(driver, seconds, poll_frequency=0.02).until(lambda d: d.execute_script(script))
    )


def complaints(driver: Any) -> list[str]:
    """What the browser's console holds: errors and refusals of the page's policy, and warnings."""
    return [entry["message"] for entry in driver.get_log("browser")]

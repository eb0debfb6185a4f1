"""A real browser on a page of ours: Debian's chromium and chromium-driver, driven by selenium.

with opened_browser() as browser:
    browser.open(path, width=380, dark=True)
    assert browser.script("return document.title") == "Report: out"
"""

from __future__ import annotations

import base64
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


class Browser:
    """One window."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(
        self, path: Path, *, width: int = 1280, height: int = 900, dark: bool = False, javascript: bool = True
    ) -> None:
        """A page from disk. Under 600 pixels it is a phone."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not javascript})
        self.driver.get("about:blank")
        self.driver.get_log("browser")
        self.driver.get(path.as_uri())

    def script(self, text: str, *values: Any) -> Any:
        """What a piece of JavaScript returns."""
        return self.driver.execute_script(text, *values)

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def shown(self, selector: str) -> list[Any]:
        """The elements that are there to be seen."""
        return [one for one in self.driver.find_elements("css selector", selector) if one.is_displayed()]

    def press(self, *keys: str) -> None:
        """Keys, on whatever has the focus."""
        self.driver.switch_to.active_element.send_keys(*keys)

    @property
    def messages(self) -> list[str]:
        """What the browser has said since the page was opened: errors, and what the page's policy refused."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def screenshot(self, path: Path) -> None:
        """Of what the window shows, as PNG."""
        taken = self.driver.execute_cdp_cmd("Page.captureScreenshot", {})
        path.write_bytes(base64.b64decode(taken["data"]))


@contextmanager
def opened_browser() -> Iterator[Browser]:
    """A browser with a profile of its own, which is gone afterwards."""
    from selenium import webdriver

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM or ""
        for word in (
            "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
            "--disable-component-update", "--no-first-run", f"--user-data-dir={profile}",
        ):  # fmt: skip
            options.add_argument(word)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        try:
            yield Browser(driver)
        finally:
            driver.quit()

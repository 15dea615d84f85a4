"""Open a report in headless Chromium and print how large it is and how long it takes until everything is drawn.

python -m tools.measure_report --report=runs/quickstart/report.html --rounds=5
"""

import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from absl import flags

from aether.errors import InputError
from launch import cli

OPTIONS = (
    "headless=new",
    "no-sandbox",
    "disable-gpu",
    "disable-quic",
    "no-first-run",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
)
LOADED = "const t = performance.timing; return t.loadEventEnd - t.navigationStart"

FLAGS = cli.new_flags()
flags.DEFINE_string("report", "", "the page", FLAGS)
flags.DEFINE_integer("rounds", 5, "times to open it, each in a new browser", lower_bound=1, flag_values=FLAGS)


def open_browser(folder: str) -> Any:
    """Start a browser that keeps its files in `folder` and its messages.

    Raises:
      InputError: selenium, chromium or chromedriver is not installed.
    """
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    try:
        from selenium import webdriver
    except ImportError:
        webdriver = None
    if not (webdriver and chromium and driver):
        raise InputError("This needs selenium (pip install selenium), and chromium and chromedriver of the system.")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for word in (*OPTIONS, f"user-data-dir={folder}"):
        options.add_argument(f"--{word}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options, webdriver.ChromeService(driver))


def main(values: flags.FlagValues) -> None:
    """Print one line of JSON."""
    path = Path(cli.require(values, "report", "runs/quickstart/report.html"))
    if not path.is_file():
        raise InputError(f"--report is {path}, which is no file; launch.explain writes one.")
    times, messages = [], []
    for _ in range(values.rounds):
        with tempfile.TemporaryDirectory() as folder:
            browser = open_browser(folder)
            try:
                browser.get(path.absolute().as_uri())
                times.append(browser.execute_script(LOADED))
                messages += browser.get_log("browser")
            finally:
                browser.quit()
    record = dict(bytes=path.stat().st_size, milliseconds=statistics.median(times), slowest=max(times))
    print(json.dumps(record | dict(messages=len(messages))))


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, __doc__))

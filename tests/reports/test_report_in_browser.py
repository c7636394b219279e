"""The report in headless Chromium, at phone and at desktop width."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from spd.reports.report import write_report
from tests.made_up_run import add_figures, make_run

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--enable-logging=stderr", "--hide-scrollbars", "--window-size=1300,1000"),
)
MEASURE = """
onload = () => {
  document.title = JSON.stringify([...document.querySelectorAll("iframe")].map((frame) => {
    const page = frame.contentDocument, width = page.documentElement.clientWidth;
    const wide = [...page.querySelectorAll("body *")].filter(
      (element) => !element.closest(".scroll") && element.getBoundingClientRect().right > width);
    const images = [...page.images];
    return {
      width, scroll: page.documentElement.scrollWidth, wide: wide.map((e) => e.outerHTML),
      images: images.length, broken: images.filter((image) => !image.naturalWidth).length,
    };
  }));
};
"""


def in_browser(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    profile = f"--user-data-dir={directory / 'profile'}"
    return subprocess.run(
        [CHROMIUM, *QUIET, profile, *arguments], capture_output=True, text=True, timeout=120
    )


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium or Chrome on PATH")
def test_in_a_browser_nothing_overflows_and_the_console_is_silent(tmp_path: Path):
    """At phone and at desktop width, with all details open."""
    long = "a_very_long_name_without_any_break_" * 4
    run = make_run(tmp_path, **{"target/config.yaml": f"kind: {long}\n"})
    add_figures(run)
    text = write_report(run).read_text(encoding="utf-8").replace("<details>", "<details open>")
    frames = "".join(
        f'<iframe style="width: {width}px; height: 900px; border: 0"'
        f' srcdoc="{html.escape(text)}"></iframe>'
        for width in (360, 1280)
    )
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(f"<!doctype html><title>-</title>{frames}<script>{MEASURE}</script>")
    done = in_browser(tmp_path, "--dump-dom", wrapper.as_uri())
    (title,) = re.findall("<title>(.*?)</title>", done.stdout[:2000] + done.stdout[-2000:])[:1]
    phone, desktop = json.loads(html.unescape(title))
    assert (phone["width"], desktop["width"]) == (360, 1280)
    for page in (phone, desktop):
        assert page["wide"] == [] and page["scroll"] == page["width"]
        assert (page["images"], page["broken"]) == (3, 0)
    assert "CONSOLE" not in done.stderr


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium or Chrome on PATH")
def test_the_browser_paints_the_page(tmp_path: Path):
    run = make_run(tmp_path)
    write_report(run)
    picture = tmp_path / "page.png"
    done = in_browser(tmp_path, f"--screenshot={picture}", (run / "report.html").as_uri())
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
    assert "CONSOLE" not in done.stderr

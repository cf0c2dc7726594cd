"""A page in a real browser (Debian's chromium), with what it said on its console."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

PROBE = """
<script>window.addEventListener('load',function(){
 var drawn=Array.from(document.querySelectorAll('svg')).filter(function(svg){
  var hidden=svg.closest('details:not([open])');if(hidden){hidden.open=true}
  var box=svg.getBoundingClientRect();if(hidden){hidden.open=false}
  return box.width>100&&box.height>50&&svg.querySelectorAll('path').length>3}).length;
 var page=document.documentElement;
 var copy=document.querySelector('button.copy');if(copy){copy.click()}
 document.title='PROBE '+JSON.stringify({drawn:drawn,wide:page.scrollWidth>page.clientWidth+1})
});</script>
"""
PHONE = "390,900"


@dataclass(frozen=True)
class Shown:
    """What became of a page on a narrow screen.

    Args:
        console: messages and errors, none of which a page should have.
        drawn_figures: figures that take up room and hold shapes (closed details are opened).
        page_wider_than_window: the reader would have to scroll the whole page sideways.
    """

    console: list[str]
    drawn_figures: int
    page_wider_than_window: bool


def find_browser() -> str:
    """The browser's path; skips the test where there is none."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        pytest.skip("chromium is not installed: install chromium to run the page in a browser")
    return found


def browse(page: Path, scratch: Path, window: str = PHONE) -> Shown:
    """Open ``page`` from disk, with a probe added to a copy of it."""
    copy = scratch / "probed.html"
    text = page.read_text(encoding="utf-8")
    copy.write_text(text.replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    command = [
        find_browser(), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={scratch / 'profile'}", f"--window-size={window}",
        "--enable-logging=stderr", "--v=0", "--virtual-time-budget=5000", "--dump-dom",
        copy.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    said = re.search(r"<title>PROBE (\{.*?\})</title>", done.stdout)
    assert said is not None, "the page's scripts did not run to the end"
    values = json.loads(said[1])
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return Shown(console, values["drawn"], values["wide"])

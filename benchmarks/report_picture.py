"""A picture of a report, as a browser shows it: the top of a run's report.html, as PNG."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from browser import Browser

WIDTH, HEIGHT = 1100, 1300  # some 190 KB


def main() -> None:
    page, picture = map(Path, sys.argv[1:])
    program = shutil.which("chromium")
    if program is None:
        raise SystemExit("chromium is not installed")
    with Browser(program) as browser:
        browser.open(page, WIDTH, HEIGHT)
        picture.write_bytes(browser.screenshot())


if __name__ == "__main__":
    main()

"""The built site: every public name has its place, formulas render offline, nothing is cut off."""

from __future__ import annotations

import functools
import html
import http.server
import importlib
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SITE = ROOT / "site"
PAGES = sorted(str(page.relative_to(SITE)) for page in SITE.rglob("*.html")) if SITE.is_dir() else []
MODULES = (
    "ntkops",
    "ntkops.operators",
    "ntkops.projections",
    "ntkops.solvers",
    "ntkops.spectra",
    "ntkops.estimators",
    "ntkops.curvature",
    "ntkops.regression",
    "ntkops.distill",
    "ntkops.functional",
    "ntkops.plotting",
    "ntkops.gp",
    "ntkops.checkpoint",
    "ntkops.results",
    "ntkops.errors",
)
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")

built = pytest.mark.skipif(not PAGES, reason="the site is not built: run make docs first")
browsed = pytest.mark.skipif(BROWSER is None, reason="chromium is not installed")


def anchors() -> set[str]:
    found: set[str] = set()
    for page in PAGES:
        found |= set(re.findall(r'id="(ntkops[\w.]*)"', (SITE / page).read_text(encoding="utf-8")))
    return found


@built
@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_an_anchor(module: str) -> None:
    known = {name.rsplit(".", 1)[-1] for name in anchors()}
    assert [name for name in importlib.import_module(module).__all__ if name not in known] == []


@built
def test_the_names_of_the_package_are_anchors_by_their_own_path() -> None:
    known = anchors()
    names = importlib.import_module("ntkops").__all__
    assert [name for name in names if f"ntkops.{name}" not in known] == []


@built
def test_no_private_or_dunder_name_is_an_anchor() -> None:
    assert [name for name in anchors() if re.search(r"\._", name)] == []


@built
def test_formulas_need_no_network() -> None:
    for page in PAGES:
        text = (SITE / page).read_text(encoding="utf-8")
        assert not re.search(r'<(?:script|link)[^>]+(?:src|href)="https?://[^"]*\.(?:js|css)', text), page


def code_lines() -> Iterator[tuple[str, str]]:
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        inside = False
        for line in page.read_text(encoding="utf-8").splitlines():
            if line.lstrip().startswith("```"):
                inside = not inside
            elif inside:
                yield str(page.relative_to(ROOT)), line


def test_code_blocks_fit_into_80_columns() -> None:
    assert [(page, line) for page, line in code_lines() if len(line) > 80] == []


# in a browser

MEASURE = """
<!doctype html><body style="margin:0"><iframe id="frame" style="border:0;height:900px"></iframe>
<script>
const pages = PAGES_HERE, frame = document.getElementById("frame"), found = [];
function load(page, width) {
  return new Promise((done) => {
    frame.style.width = width + "px";
    frame.onload = done;
    frame.src = "/" + page;
  });
}
function plain(inside) {
  const walker = inside.createTreeWalker(inside.body, NodeFilter.SHOW_TEXT), left = [];
  while (walker.nextNode()) {
    const parent = walker.currentNode.parentElement;
    if (parent.closest("pre, code, script, style, noscript, .katex, textarea")) continue;
    const text = walker.currentNode.data.trim();
    if (/\\$|\\\\[()[\\]]|\\\\[a-zA-Z]+/.test(text)) left.push(text);
  }
  return left;
}
(async () => {
  for (const page of pages) {
    for (const width of [1400, 400]) {
      await load(page, width);
      const inside = frame.contentDocument, root = inside.documentElement;
      const wide = [...inside.querySelectorAll("pre")].filter((box) => box.scrollWidth > box.clientWidth + 1);
      found.push({
        page, width,
        text: plain(inside),
        wide: wide.map((box) => box.textContent.slice(0, 80)),
        sideways: root.scrollWidth - root.clientWidth,
        bare: [...inside.querySelectorAll(".formula")].filter((box) => !box.querySelector(".katex")).length,
        errors: inside.querySelectorAll(".katex-error").length,
        formulas: inside.querySelectorAll(".katex").length,
      });
    }
  }
  document.body.innerHTML = "";
  const result = document.createElement("pre");
  result.id = "found";
  result.textContent = JSON.stringify(found);
  document.body.append(result);
})();
</script>
"""


class Handler(http.server.SimpleHTTPRequestHandler):
    """The site, and a page that looks at all its pages."""

    def do_GET(self) -> None:
        if self.path != "/measure":
            super().do_GET()
            return
        body = MEASURE.replace("PAGES_HERE", json.dumps(PAGES)).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What a browser without a network sees of every page at two widths."""
    assert BROWSER is not None
    handler = functools.partial(Handler, directory=str(SITE))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command = [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            "--window-size=1500,1000",
            "--virtual-time-budget=120000",
            "--dump-dom",
            f"http://127.0.0.1:{server.server_port}/measure",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
        server.shutdown()
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, done.stdout[-2000:]
    result: list[dict[str, Any]] = json.loads(html.unescape(found[1]))
    assert len(result) == 2 * len(PAGES)
    return result


@built
@browsed
@pytest.mark.slow  # minutes on a busy machine
def test_formulas_render(measured: list[dict[str, Any]]) -> None:
    assert {one["page"]: one["text"] for one in measured if one["text"]} == {}
    assert [one["page"] for one in measured if one["bare"] or one["errors"]] == []
    seen = {one["page"]: one["formulas"] for one in measured}
    assert seen["api/quantities.html"] > 3
    assert all(count for page, count in seen.items() if re.search(r"notebooks/0[12]", page))


@built
@browsed
@pytest.mark.slow  # minutes on a busy machine
def test_code_is_not_cut_off_and_no_page_scrolls_sideways(measured: list[dict[str, Any]]) -> None:
    assert {one["page"]: one["wide"] for one in measured if one["width"] == 1400 and one["wide"]} == {}
    assert {one["page"]: one["sideways"] for one in measured if one["width"] == 400 and one["sideways"]} == {}

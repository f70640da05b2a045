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
def test_arguments_have_types_that_mean_something() -> None:
    page = (SITE / "api/operators.html").read_text(encoding="utf-8")
    taken = {
        "model": ("ModelLike", "InputsLike", "ParamsLike", "OutputLike", "GroupLike", "BatchDim"),
        "operators": ("OutputChoice", "ProjectionLike"),
        "engines": ("EngineChoice",),
    }
    known = anchors()
    for room, names in taken.items():
        for name in names:
            link = rf'<a [^>]*href="[^"]*#ntkops\.{room}\.{name}"[^>]*>\s*(<span[^>]*>)?{name}<'
            assert f"ntkops.{room}.{name}" in known and re.search(link, page), name


@built
def test_what_is_returned_is_one_thing() -> None:
    for page in PAGES:
        text = (SITE / page).read_text(encoding="utf-8")
        for table in re.findall(r"<b>Returns:</b>.*?</table>|>Returns:<.*?</table>", text, re.DOTALL):
            assert table.count("<tr") <= 2, (page, re.sub(r"<[^>]+>|\s+", " ", table)[:200])


@built
def test_figures_of_other_libraries_are_those_of_the_benchmarks() -> None:
    page = (SITE / "other_libraries.html").read_text(encoding="utf-8")
    assert "<!--" not in page.split("<article", 1)[1].split("</article", 1)[0]
    results = json.loads((ROOT / "benchmarks/results/exact_kernels.json").read_text(encoding="utf-8"))
    ratios = [case["ratio"]["cpu"]["median"] for case in results["kernels"] if case["kind"] == "all"]
    assert ratios
    for ratio in ratios:
        assert f">{ratio:.0f}×<" in page or f">{ratio:.2g}×<" in page
    for library in (
        "torch.func",
        "neural-tangents",
        "NNGeometry",
        "curvlinops",
        "TRAK",
        "kpflow",
        "laplace-torch",
    ):
        assert f"<strong>{library}</strong>" in page


@built
@pytest.mark.parametrize("page", PAGES)
def test_no_formula_is_taken_for_emphasis(page: str) -> None:
    text = (SITE / page).read_text(encoding="utf-8").split("<article", 1)[-1]
    displayed = re.findall(r"<p>\$\$(.*?)</p>", text, re.DOTALL)
    assert [formula for formula in displayed if "<" in formula] == []


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
    for page in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for cell in json.loads(page.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                for line in "".join(cell["source"]).splitlines():
                    yield str(page.relative_to(ROOT)), line


def test_code_blocks_fit_into_80_columns() -> None:
    assert [(page, line) for page, line in code_lines() if len(line) > 80] == []


# In a browser, which dumps a page once it has all of it: an image, which comes when everything was looked at,
# among it.
MEASURE = """
<!doctype html><body style="margin:0"><iframe id="frame" style="border:0;height:900px"></iframe>
<img src="/wait">
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
  fetch("/found");
})();
</script>
"""


# Types each phrase into the site's own search, and reads the pages that it lists.
SEARCH = """
<!doctype html><body><iframe id="frame" src="/index.html" style="width:1400px;height:900px"></iframe>
<img src="/wait">
<script>
const phrases = PHRASES_HERE, frame = document.getElementById("frame"), found = {};
const pause = (ms) => new Promise((done) => setTimeout(done, ms));
frame.onload = async () => {
  const inside = frame.contentDocument, field = inside.querySelector("[data-md-component=search-query]");
  const listed = () => [...inside.querySelectorAll(".md-search-result__item")].map(
    (item) => item.querySelector("a").href);
  function ask(text) {
    field.value = text;
    field.dispatchEvent(new Event("keyup"));
  }
  inside.getElementById("__search").click();  // which loads the index
  field.dispatchEvent(new Event("focus"));
  for (const phrase of phrases) {
    ask("");
    for (let i = 0; i < 200 && listed().length; i++) await pause(20);
    ask(phrase);
    for (let i = 0; i < 500 && !listed().length; i++) await pause(20);
    await pause(100);
    found[phrase] = listed().slice(0, 3).map((href) => new URL(href).pathname.slice(1));
  }
  document.body.innerHTML = "";
  const result = document.createElement("pre");
  result.id = "found";
  result.textContent = JSON.stringify(found);
  document.body.append(result);
  fetch("/found");
};
</script>
"""

# For each how-to, what somebody would type who wants to do just that. Written before the site was searched.
PHRASES = {
    "06_training_dynamics": (
        "rich or lazy training",
        "learning curves of the linearised network",
        "training dynamics of a CNN",
    ),
    "10_recurrent": (
        "recurrent network hidden states",
        "GRU kernel over time",
        "vanishing gradients in time",
    ),
    "07_pinn": ("physics-informed network", "PINN loss weights", "boundary and residual loss"),
    "11_lora": ("fine-tune a transformer with LoRA", "kernel of adapters", "low-rank fine-tuning"),
    "12_uncertainty": (
        "calibration plot",
        "uncertainty of predictions",
        "Gaussian process with gpytorch",
    ),
    "09_attribution": (
        "data attribution",
        "wrong labels in the training set",
        "TRAK influence scores",
    ),
    "05_distillation": ("distil a data set", "pictures of distilled images", "fewer training points"),
    "08_graph": ("graph neural network", "kernel between nodes", "node classification"),
    "13_streaming": ("data larger than memory", "two processes torchrun", "stream batches from disk"),
    "14_regulariser": (
        "NTK regulariser",
        "differentiate through the kernel",
        "penalty on the kernel during training",
    ),
}


FOUND = threading.Event()


class Handler(http.server.SimpleHTTPRequestHandler):
    """The site, and pages that look at it."""

    def do_GET(self) -> None:
        phrases = [phrase for some in PHRASES.values() for phrase in some]
        own = {
            "/measure": MEASURE.replace("PAGES_HERE", json.dumps(PAGES)),
            "/search": SEARCH.replace("PHRASES_HERE", json.dumps(phrases)),
        }
        if self.path in ("/wait", "/found"):
            FOUND.set() if self.path == "/found" else FOUND.wait(230)
            self.send_error(404)
            return
        if self.path not in own:
            super().do_GET()
            return
        body = own[self.path].encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def browse(page: str, profile: Path) -> Any:
    """Return what a page of ours finds in a browser without a network."""
    assert BROWSER is not None
    FOUND.clear()
    handler = functools.partial(Handler, directory=str(SITE))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command = [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={profile}",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            "--window-size=1500,1000",
            "--dump-dom",
            f"http://127.0.0.1:{server.server_port}/{page}",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
        server.shutdown()
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, done.stdout[-2000:]
    return json.loads(html.unescape(found[1]))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What is seen of every page at two widths."""
    result: list[dict[str, Any]] = browse("measure", tmp_path_factory.mktemp("profile"))
    assert len(result) == 2 * len(PAGES)
    return result


@built
@browsed
def test_the_search_finds_every_how_to(tmp_path: Path) -> None:
    found = browse("search", tmp_path)
    missed = {
        phrase: found[phrase]
        for name, phrases in PHRASES.items()
        for phrase in phrases
        if f"notebooks/{name}.html" not in found[phrase]
    }
    assert missed == {}


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

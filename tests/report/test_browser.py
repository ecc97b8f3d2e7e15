"""The script of the page in a real browser: zoom, smoothing, log scale, hidden runs, a phone."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from modern_llm.report.page import write_report
from tests.report.test_page import BROWSER, browse

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed to render the page in"),
]


def found(page: Path, folder: Path, script: str, *options: str) -> dict:
    """Return what a script at the end of a copy of the page puts into `found`."""
    copy = folder / "copy.html"
    tail = f"<script>const found = {{}}; {script}; document.title = JSON.stringify(found);</script>"
    copy.write_text(page.read_text().replace("</body>", tail + "</body>"))
    done = browse(copy, folder, "--dump-dom", *options)
    assert "CONSOLE" not in done.stderr, done.stderr
    title = re.search("<title>(.*?)</title>", done.stdout)[1]
    return json.loads(title.replace("&amp;", "&").replace("&lt;", "<"))


@pytest.fixture
def two(make_run, tmp_path) -> Path:
    page = tmp_path / "report.html"
    write_report([make_run("a"), make_run("b", beta=0.3)], page)
    return page


CONTROLS = """
const svg = panels[0].svg, box = svg.getBoundingClientRect();
const drawn = () => ({
  still: panels[0].still.some(e => e.style.display !== "none"),
  lines: panels[0].layer.querySelectorAll("polyline").length,
  labels: [...panels[0].layer.querySelectorAll("text")].map(e => e.textContent),
});
const set = (id, value, type) => {
  find(id).value = value;
  find(id).dispatchEvent(new Event(type));
};
const point = (type, share) => svg.dispatchEvent(new PointerEvent(type, {
  clientX: box.left + box.width * share, clientY: box.top + 50, pointerId: 1, bubbles: true}));
svg.setPointerCapture = () => {};
found.before = drawn();
set("smoothing", 0.5, "input"); found.smoothed = drawn(); set("smoothing", 0, "input");
find("log").click(); found.log = drawn(); find("log").click();
point("pointerdown", .4); point("pointermove", .6); point("pointerup", .6);
found.zoomed = {...drawn(), from: state.from, to: state.to, range: find("from").value};
panels[1].figure.dispatchEvent(new KeyboardEvent("keydown", {key: "-"})); found.wider = state.from;
set("from", 10, "change"); set("to", 20, "change"); found.typed = [state.from, state.to];
find("reset").click(); found.reset = drawn();
document.querySelector("button.run").click(); found.hidden = drawn();
panels[0].show(20); found.read = panels[0].readout.textContent;
document.querySelector("button.run").click(); found.after = drawn();
"""


def test_controls_draw_the_panels_again_and_give_the_drawing_back(two, tmp_path):
    states = found(two, tmp_path, CONTROLS, "--window-size=1280,1600")
    plain = {"still": True, "lines": 0, "labels": []}
    assert states["before"] == states["reset"] == states["after"] == plain
    # Two runs with training and evaluation; the values behind smoothed training lines.
    assert states["smoothed"]["lines"] == 6 and states["log"]["lines"] == 4
    assert not states["smoothed"]["still"] and not states["log"]["still"]
    assert states["log"]["labels"][:2] == ["0.4", "0.6"]
    zoomed = states["zoomed"]
    assert 10 < zoomed["from"] < 25 < zoomed["to"] < 40 and zoomed["lines"] == 4
    assert int(zoomed["range"]) == int(zoomed["from"]) + 1
    assert states["wider"] < zoomed["from"] and states["typed"] == [10, 20]
    assert states["hidden"]["lines"] == 2
    assert "beta=0.3" in states["read"] and "beta=0.1" not in states["read"]


PHONE = """
for (const part of document.querySelectorAll("details")) part.open = true;
found.width = [document.documentElement.clientWidth, document.documentElement.scrollWidth];
found.scrolling = [...document.querySelectorAll(".wide")].map(e => e.scrollWidth > e.clientWidth);
"""


def test_a_page_of_390_pixels_does_not_scroll_sideways_but_its_tables_do(two, tmp_path):
    # Chromium has no window below 500 pixels: a frame has.
    inner = tmp_path / "inner.html"
    tail = f"<script>const found = {{}}; {PHONE}; parent.postMessage(found, '*');</script></body>"
    inner.write_text(two.read_text().replace("</body>", tail))
    outer = tmp_path / "outer.html"
    outer.write_text(
        "<title>none</title><script>onmessage = event => { document.title = "
        "JSON.stringify(event.data); };</script>"
        '<iframe src="inner.html" style="width: 390px; height: 3000px; border: 0"></iframe>'
    )
    done = browse(outer, tmp_path, "--dump-dom", "--window-size=500,3000")
    result = json.loads(re.search("<title>(.*?)</title>", done.stdout)[1])
    assert result["width"] == [390, 390]
    assert any(result["scrolling"])


LIVE = """
found.live = find("live") && find("live").checked;
"""


def test_a_page_of_an_active_run_loads_itself_again(make_run, tmp_path):
    folder, page = make_run(), tmp_path / "report.html"
    (folder / "outcome.json").unlink()
    write_report([folder], page, refresh=10)
    assert found(page, tmp_path, LIVE) == {"live": True}
    write_report([folder], page)
    assert found(page, tmp_path, LIVE) == {"live": None}

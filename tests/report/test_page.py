"""The report page: whole, safe, small, fast; one run or several; and in a real browser."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from modern_llm.cli import main
from modern_llm.report.figures import PANELS, thinned
from modern_llm.report.page import LIMIT, duration, write_report
from modern_llm.report.runs import ReportError, read_runs
from modern_llm.report.values import dropped

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(shutil.which, NAMES), None)


class Outline(html.parser.HTMLParser):
    """Ids, titles of figures, and everything that would be fetched."""

    def __init__(self, text: str):
        super().__init__()
        self.ids: list[str] = []
        self.focusable = 0
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append(tag)
        if "id" in found:
            self.ids.append(found["id"])
        self.focusable += found.get("tabindex") == "0"
        for name in ("src", "href", "xlink:href"):
            value = found.get(name) or ""
            if value and not value.startswith(("#", "data:")):
                self.fetched.append(value)


def test_one_run_stands_in_one_file_with_everything(make_run):
    folder = make_run()
    result = write_report([folder], folder / "report.html")
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert result["bytes"] == len(text.encode()) < LIMIT
    page = Outline(text)
    assert page.fetched == [] and "@import" not in text and not re.search(r"url\((?!#)", text)
    assert len(page.ids) == len(set(page.ids))
    for title in ("Loss", "Reward accuracy", "Reward margin", "Rewards", "Log-probs of the answers",
                  "Tokens per second", "Peak memory, GB", "Learning rate", "Gradient norm",
                  "Length of sample answers, tokens"):  # fmt: skip
        assert f"<h3>{title}</h3>" in text, title
    assert page.tags.count("figure") == result["panels"] == 11
    assert page.focusable >= result["panels"]
    for part in (
        "dpo.beta",
        "models/&lt;sft&gt;",
        "2.13.0",
        "123,456",
        "equal responses",
        "45.0 s",
    ):
        assert part in text, part


def test_texts_of_models_are_texts(make_run):
    folder = make_run()
    write_report([folder], folder / "report.html")
    text = (folder / "report.html").read_text()
    assert "Is &lt;b&gt;this&lt;/b&gt; safe?" in text and "<b>this" not in text
    assert text.count("</script>") == 2


def test_several_runs_are_named_by_what_differs(make_run, tmp_path):
    folders = [make_run(f"r{beta}", beta=beta) for beta in (0.05, 0.1, 0.3)]
    result = write_report(folders, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert result["runs"] == 3
    assert [run.label for run in read_runs(folders)] == ["beta=0.05", "beta=0.1", "beta=0.3"]
    row = re.search(r'<th scope="row">dpo.beta</th>(.*?)</tr>', text)[1]
    assert re.findall("<td>(.*?)</td>", row) == ["0.05", "0.1", "0.3"]
    points = json.loads(re.search(r'id="points">(.*?)</script>', text, re.S)[1])
    names = {s["name"] for s in points["panel1"]["series"]}
    assert "beta=0.3 training" in names and "beta=0.05 evaluation" in names


def table(text: str, label: str) -> list[list[str]]:
    """Return the texts of a table's rows, its head included."""
    part = text.split(f'aria-label="{label}"')[1].split("</table>")[0]
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in part.split("<tr")[1:]]
    return [[re.sub("<[^>]*>", "", cell).strip() for cell in row] for row in rows]


def test_twenty_runs_have_a_colour_each(make_run, tmp_path):
    folders = [make_run(f"r{n}", steps=3, beta=n / 100 + 0.01) for n in range(20)]
    write_report(folders, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    light = text.split("@media")[0]
    colours = {number: re.search(rf"--run{number}: ([^;]+);", light)[1] for number in range(32)}
    assert len(set(colours.values())) == 32


def test_warnings_are_shown_with_their_advice(make_run, tmp_path):
    folder = make_run()
    write_report([folder], folder / "report.html")
    text = " ".join((folder / "report.html").read_text().split())
    assert "<li>the rate is high<br><strong>Advice:</strong> try 5e-6<br>" in text
    assert text.index("before the first step") < text.index("the gradient norm is 0<br><span")
    (folder / "warnings.jsonl").unlink()
    write_report([folder], folder / "report.html")
    assert "Warnings</h2>" not in (folder / "report.html").read_text()
    pair = [make_run("a", beta=0.1), make_run("b", beta=0.2)]
    write_report(pair, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert text.count("the rate is high") == 1
    assert "beta=0.1 (before the first step); beta=0.2 (before the first step)" in text


def test_the_configuration_is_collapsed_and_marks_what_differs_from_the_defaults(make_run):
    folder = make_run()
    write_report([folder], folder / "report.html")
    text = (folder / "report.html").read_text()
    part = text.split('id="configuration"')[1].split("</section>")[0]
    assert "<details>" in part and "<details open" not in part
    assert "5 options, 2 not at their default" in part
    rows = [row for row in part.split("<tr")[1:]]
    assert [re.search('scope="row">(.*?)<', row)[1] for row in rows[:2]] == [
        "dpo.beta", "train.learning_rate"
    ]  # fmt: skip
    assert [' class="changed"' in row for row in rows] == [True, True, False, False, False]
    assert [row.count("(not the default)") for row in rows] == [1, 1, 0, 0, 0]
    # A run of an earlier version did not record them.
    summary = json.loads((folder / "summary.json").read_text())
    del summary["changed"]
    (folder / "summary.json").write_text(json.dumps(summary))
    write_report([folder], folder / "report.html")
    assert "default" not in table((folder / "report.html").read_text(), "Options")[0][0]
    assert "not at their default" not in (folder / "report.html").read_text()


@pytest.mark.parametrize(
    ("drops", "words"),
    [
        ({}, "none"),
        ({"equal responses": 10}, "10 of 1,000 rows (1.0%): 10 equal responses"),
        ({"empty": 1500, "corrupt": 2}, "1,502 of 1,000 rows (150.2%): 1,500 empty, 2 corrupt"),
    ],
)
def test_dropped_rows_are_told_in_words(drops, words):
    assert dropped({"rows": 1000, "drops": drops}) == words
    assert dropped({"rows": 0, "drops": {"x": 1}}) == "1: 1 x"


def test_ties_are_the_last_panel():
    assert PANELS[-1].title == "Ties"


def test_a_followed_report_is_written_until_the_run_ends(make_run, monkeypatch, capsys):
    folder = make_run()
    outcome = (folder / "outcome.json").read_text()
    (folder / "outcome.json").unlink()
    pages = []

    def sleep(seconds):
        assert seconds == 10
        pages.append((folder / "report.html").read_text())
        if len(pages) == 2:
            with (folder / "metrics.jsonl").open("a") as file:
                file.write('{"step": 51, "loss": 0.123}\n')
        if len(pages) == 3:
            (folder / "outcome.json").write_text(outcome)
        assert len(pages) < 9

    monkeypatch.setattr(time, "sleep", sleep)
    assert main(["report", str(folder), "--follow"]) == 0
    assert len(pages) == 3 and pages[0] == pages[1] != pages[2]
    assert all('id="live" value="10"' in page for page in pages) and "0.123" in pages[2]
    assert 'id="live"' not in (folder / "report.html").read_text()
    assert "written every 10 s; Ctrl-C ends it" in capsys.readouterr().out


def test_an_interrupt_ends_following_with_a_page_that_stays(make_run, monkeypatch):
    folder = make_run()
    (folder / "outcome.json").unlink()

    def sleep(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", sleep)
    assert main(["report", str(folder), "--follow"]) == 0
    assert 'id="live"' not in (folder / "report.html").read_text()


def test_the_points_are_the_runs_numbers(make_run):
    folder = make_run(steps=40)
    write_report([folder], folder / "report.html")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    text = (folder / "report.html").read_text()
    points = json.loads(re.search(r'id="points">(.*?)</script>', text, re.S)[1])
    loss = points["panel1"]["series"][0]
    assert loss["x"] == [r["step"] for r in records]
    assert loss["y"] == pytest.approx([r["loss"] for r in records], rel=1e-3)
    evaluation = points["panel1"]["series"][1]
    assert evaluation["x"] == [10, 20, 30, 40]


def test_thinning_keeps_means_extremes_and_the_end():
    steps = np.arange(1.0, 10_001)
    values = np.random.default_rng(0).normal(size=10_000)
    x, mean, low, high = thinned(steps, values, 300)
    assert len(x) == 300 and x[-1] == 10_000
    assert low.min() == values.min() and high.max() == values.max()
    sizes = np.diff(np.append(0, x))
    assert (mean * sizes).sum() == pytest.approx(values.sum())
    assert (low <= mean).all() and (mean <= high).all()


def test_ten_thousand_steps_take_under_five_seconds(make_run):
    folder = make_run("long", steps=10_000)
    began = time.process_time()
    assert main(["report", str(folder)]) == 0
    assert time.process_time() - began < 5
    assert (folder / "report.html").stat().st_size < LIMIT


def test_twenty_runs_stay_under_the_limit(make_run, tmp_path):
    folders = [make_run(f"r{n}", steps=400, beta=n / 100 + 0.01) for n in range(20)]
    assert write_report(folders, tmp_path / "report.html")["bytes"] < LIMIT


def test_a_killed_run_has_a_report(make_run):
    folder = make_run()
    for name in ("outcome.json", "summary.json", "samples.jsonl", "config.yaml"):
        (folder / name).unlink()
    lines = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(lines + '{"step": 51, "los')
    write_report([folder], folder / "report.html")
    assert "no outcome yet" in (folder / "report.html").read_text()
    (folder / "metrics.jsonl").write_text("")
    assert write_report([folder], folder / "report.html")["panels"] == 0


def test_bad_folders_are_all_named_in_one_line(make_run, tmp_path, capsys):
    folder = make_run()
    words = [str(folder), str(folder / ".." / "run"), str(tmp_path / "nowhere")]
    assert main(["report", *words, "--output", str(tmp_path / "x.html")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "nowhere: is not a run folder" in line and "is named twice" in line
    assert not (tmp_path / "x.html").exists()
    assert main(["report"]) == 2
    assert "no run folder is named" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_status_3(make_run, capsys):
    folder = make_run()
    assert main(["report", str(folder), "--output", str(folder / "no" / "x.html")]) == 3
    assert "cannot write" in capsys.readouterr().err


def test_reading_refuses_nothing_at_all():
    with pytest.raises(ReportError, match="no run folder is named"):
        read_runs([])


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.25, "4.2 s"), (200, "3 min 20 s"), (7512, "2 h 05 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


# In a browser


def browse(page: Path, folder: Path, *options: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
         "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}",
         "--virtual-time-budget=3000", *options, page.resolve().as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


# What a person does with the keyboard, done by a script at the end of a copy of the page.
KEYS = """<script>
const figure = document.querySelector("figure");
figure.focus();
const said = [];
for (const key of ["End", "ArrowLeft", "Home", "ArrowRight"]) {
  figure.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
  said.push(figure.querySelector(".readout").textContent);
}
document.getElementById("theme").click();
document.title = JSON.stringify({
  said, focused: document.activeElement === figure, wide: document.body.scrollWidth,
  theme: document.documentElement.dataset.theme,
});
</script></body>"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed to render the page in")
def test_a_browser_shows_it_light_and_dark_on_a_desk_and_on_a_phone(make_run, tmp_path):
    from matplotlib.image import imread

    folders = [make_run("a"), make_run("b", beta=0.3)]
    page = tmp_path / "report.html"
    write_report(folders, page)
    paper = {}
    for name, options in {
        "desk": ["--window-size=1280,1600"],
        "phone": ["--window-size=500,1600"],
        "dark": ["--window-size=1280,1600", "--blink-settings=preferredColorScheme=0"],
    }.items():
        shot = tmp_path / f"{name}.png"
        done = browse(page, tmp_path, f"--screenshot={shot}", *options)
        assert "CONSOLE" not in done.stderr, done.stderr
        pixels = imread(shot)[..., :3]
        assert pixels.shape[0] == 1600
        # The paper is one colour; text and curves are many others.
        assert len(np.unique((pixels * 255).astype(int).reshape(-1, 3), axis=0)) > 50
        paper[name] = pixels[2, 2].mean()
    assert paper["desk"] == paper["phone"] > 0.9 > 0.2 > paper["dark"]

    copy = tmp_path / "keys.html"
    copy.write_text(page.read_text().replace("</body>", KEYS))
    done = browse(copy, tmp_path, "--dump-dom", "--window-size=500,900")
    assert "CONSOLE" not in done.stderr, done.stderr
    found = json.loads(re.search("<title>(.*?)</title>", done.stdout)[1].replace("&amp;", "&"))
    assert [text.split(":")[0] for text in found["said"]] == [
        "step 50", "step 49", "step 1", "step 2"
    ]  # fmt: skip
    assert "training" in found["said"][0]
    assert found["focused"] and found["theme"] == "dark"
    assert found["wide"] <= 500

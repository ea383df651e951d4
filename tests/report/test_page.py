"""The page as text: small, self-contained, complete, in the order of every output."""

from __future__ import annotations

import base64
import hashlib
import html
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from compat import cli, store
from compat.reports import log
from compat.reports.history import History
from compat.reports.html import LIMIT_BYTES, page
from compat.reports.templating import Templates
from compat.result import FAILED, Result
from tests.report.made import CHECKS, COMBOS, HOSTILE, finding, made, some_weeks

ROOT = Path(__file__).parents[2]


def text_of(page: str) -> str:
    body = page[page.index("<body>") :].partition("<script>")[0]
    return html.unescape(re.sub(r"<[^>]*>", " ", body))


def test_two_hundred_runs_with_their_output_stay_below_500_kb():
    runs = [made(n, (COMBOS[n % 7],), {"VRAM": "x" * 600} if n % 3 == 0 else {}) for n in range(200)]
    for number, run in enumerate(runs):
        run.output = "first words\n" + "".join(f"line {number} {at}\n" for at in range(200))
    made_page = page(History(runs))
    assert len(made_page.encode("utf-8")) < LIMIT_BYTES == 500_000
    assert made_page.count('<details class="run"') == 200
    for run in runs:  # the last kilobyte of each, and not the rest
        assert html.escape(run.output[-1024:].strip("\n")) in made_page
    assert "first words" not in made_page


def test_output_that_grows_when_it_is_escaped_is_cut_further_and_says_so():
    runs = [made(n, (COMBOS[n % 7],), output="<" * 5000) for n in range(200)]
    made_page = page(History(runs))
    assert len(made_page.encode("utf-8")) < LIMIT_BYTES
    assert made_page.count('<details class="run"') == 200 and "[…] &lt;&lt;" in made_page


def test_runs_beyond_those_in_detail_are_counted():
    runs = [made(n, output="") for n in range(230)]
    assert "30 older runs are in the charts and in" in text_of(page(History(runs)))


def test_the_order_is_verdict_breakages_waived_not_run_trend():
    runs = some_weeks()
    text = text_of(page(History(runs)))
    places = [
        text.index(words)
        for words in ("Failed", "Checks now", "New breakages", "LOAD.key_renamed", "pooling is meant",
                      "the target has no VQADataset", "FLOPs, forward", "UserWarning: torch_dtype")
    ]  # fmt: skip
    assert places == sorted(places)


def test_the_matrix_shows_every_combo_and_check_as_they_are_now():
    runs = [
        made(0, COMBOS[:2], {"VRAM": "it was broken"}),
        made(1, COMBOS[:1]),
        made(2, COMBOS[2:3], checks=CHECKS[:3]),
    ]
    made_page = page(History(runs))
    table = made_page[made_page.index("<tbody>") : made_page.index("</tbody>")]
    rows = {re.search(r'scope="row">([^<]*)', row)[1]: row for row in table.split("<tr>")[1:]}
    assert list(rows) == list(CHECKS)
    told = re.findall(r'class="(passed|failed|none)"', rows["VRAM"])
    assert told == ["passed", "failed", "none"]  # mended since, still broken, never asked
    assert re.findall(r'href="#([^"]*)"', rows["VRAM"]) == [runs[1].id, runs[0].id]
    assert "29 of 29 checks" not in made_page and "28 of 29 checks pass, 1 fails, in 3 combos" in made_page


def test_what_an_imported_log_said_is_over_once_a_run_asked_the_same():
    old = made(0, ("unknown",), {"VRAM": "long ago"}, scale="unknown", source="OLD.md:3")
    text = text_of(page(History([old])))
    assert "Failed" in text and "12 of 13 checks pass, 1 fails, in 1 combo" in text
    text = text_of(page(History([old, made(1, checks=CHECKS[:12])])))
    assert "12 of 13 checks pass, 1 fails, in 2 combos" in text and "unknown" in text
    text = text_of(page(History([old, made(1)])))
    assert "13 of 13 checks pass, in 1 combo" in text and "long ago" not in text.partition("Runs")[0]


def test_a_finding_shows_rule_path_old_new_why_and_fix():
    run = made(0, findings=[finding()])
    text = text_of(page(History([run])))
    for words in ("LOAD.key_renamed", "state.decoder.blocks.{0..29}", "q_proj.weight → query.weight",
                  "Older checkpoints do not load strictly.", "Keep the name, or map the old key"):  # fmt: skip
        assert words in text
    assert "Failed" in text and text.count("Nothing is waived.") == 1


def test_only_the_newest_failures_are_new():
    runs = [
        made(0),
        made(1, failed={"VRAM": "old trouble"}),
        made(2, failed={"VRAM": "old trouble", "Edge Cases": "new one"}),
    ]
    text = text_of(page(History(runs)))
    assert (
        text.index("New breakages")
        < text.index("new one")
        < text.index("Failing for longer")
        < text.index("old trouble")
    )


def test_what_was_not_run_is_told_with_its_reason():
    run = made(0, skipped={"Data Pipeline": "the target has no data set"}, incomplete="interrupted from the keyboard")
    run.facts = {"siglip2-smollm2": {"not_measured": {"flops": "no formula for the FLOPs of my_attention"}}}
    text = text_of(page(History([run])))
    part = text[
        text.index("Not run", text.index("Nothing is waived")) : text.index("Trend", text.index("Nothing is waived"))
    ]
    for words in ("the target has no data set", "no formula for the FLOPs", "interrupted from the keyboard"):
        assert words in part


def test_each_figure_and_check_has_a_chart():
    runs = [made(n) for n in range(4)]
    made_page = page(History(runs))
    assert made_page.count('class="line"') == 7 and made_page.count('class="strip"') == len(CHECKS)
    for words in ("FLOPs, forward", "Peak memory, training step", "Generated tokens", "Run time"):
        assert re.search(rf"<title>{words}: [^<]*4 runs</title>", made_page)
    points = re.search(r'<polyline points="([^"]*)"', made_page)[1].split()
    assert len(points) == 4


def test_the_policy_names_the_style_and_the_script_and_nothing_else():
    made_page = page(History([made(0)]))
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', made_page)[1])
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy and "http" not in policy
    for tag in ("style", "script"):
        [inside] = re.findall(rf"<{tag}>(.*?)</{tag}>", made_page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert not re.search(r"(src|href)=\"(?!#|data:)|url\(|@import|\bon\w+=|style=\"", made_page)


def hostile_run():
    run = made(0, failed={"VRAM": HOSTILE}, output=HOSTILE, notes=[HOSTILE], incomplete=HOSTILE, findings=[
        finding(path=HOSTILE, old=HOSTILE, new=HOSTILE, why=HOSTILE, fix=HOSTILE, rule=HOSTILE, combo=HOSTILE),
        finding(waived=HOSTILE),
    ])  # fmt: skip
    run.target["label"] = run.target["commit"] = HOSTILE
    run.combos = ["siglip2-smollm2", HOSTILE]
    run.environment = {"torch": HOSTILE, "device": HOSTILE}
    run.facts = {HOSTILE: {"not_measured": {HOSTILE: HOSTILE}}}
    run.cost = {"siglip2-smollm2": {"flops_forward": "many"}}
    return run


def test_hostile_text_opens_no_tag_and_ends_none():
    plain, hostile = (page(History([run])) for run in (made(0, failed={"VRAM": "x"}), hostile_run()))
    inside = re.sub(r'"[^"]*"', '""', hostile)
    assert {name.lower() for name in re.findall(r"<(\w+)", inside)} <= {
        name.lower() for name in re.findall(r"<(\w+)", re.sub(r'"[^"]*"', '""', plain))
    } | {"p", "b", "a", "span", "li", "ul", "pre", "h3", "dl", "dt", "dd", "br"}
    assert hostile.count("<script>") == 1 == hostile.count("</script>") and "<img" not in hostile
    assert "\x1b" not in hostile and "\u202e" not in hostile and "\x00" not in hostile
    hostile.encode("utf-8")


def test_a_megabyte_in_every_place_still_fits():
    noise = "<b>|`" * 2**18
    run = made(0, (noise,), {"VRAM": noise}, target=noise, output=noise, incomplete=noise, source=noise, findings=[
        finding(**dict.fromkeys(("rule", "path", "old", "new", "why", "fix", "combo"), noise)), finding(waived=noise),
    ])  # fmt: skip
    run.results.append(Result(noise, noise, FAILED, noise, combo=noise))
    run.environment = {"torch": noise, "device": noise}
    run.facts = {noise: {"not_measured": {noise: noise}}}
    assert len(page(History([run])).encode("utf-8")) < LIMIT_BYTES
    assert len(log.entry(run, "x.json").encode("utf-8")) < 20_000


def test_a_file_that_is_no_run_is_named_and_costs_nothing_else(tmp_path):
    store.save(made(0), tmp_path)
    (tmp_path / "20260901T000000Z-broken.json").write_text("{")
    history = History.read(tmp_path)
    assert len(history.runs) == 1
    assert "Not read: 20260901T000000Z-broken.json" in " ".join(text_of(page(history)).split())


def test_the_command_writes_the_page_and_says_how_large_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    store.save(made(0))
    assert cli.main(["report"]) == 0
    assert re.fullmatch(r"\.compat/report\.html: 1 runs, \d+ kB\n", capsys.readouterr().out)
    assert cli.main(["report", "-o", "elsewhere.html"]) == 0
    ages = [re.sub("made [^<]*", "", Path(p).read_text("utf-8")) for p in (".compat/report.html", "elsewhere.html")]
    assert ages[0] == ages[1]


def test_open_hands_the_page_to_the_browser(tmp_path, monkeypatch):
    import webbrowser

    opened = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(webbrowser, "open", lambda url: opened.append(url) or True)
    store.save(made(0))
    assert cli.main(["report", "--open"]) == 0
    assert opened == [(tmp_path / ".compat" / "report.html").as_uri()]


def test_without_runs_there_is_a_sentence_and_exit_3(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report"]) == 3
    assert "there are no runs in .compat/runs: compat run makes one" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_exit_3(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    store.save(made(0))
    assert cli.main(["report", "-o", "no/such/folder.html"]) == 3
    assert "no/such/folder.html was not written" in capsys.readouterr().err


def test_a_template_of_ones_own_replaces_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store.save(made(0))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "page.html.j2").write_text("<h1>{{ view.headline }}</h1>{{ runs[0].output }}")
    assert cli.main(["report", "--template", "mine", "-o", "page.html"]) == 0
    assert (tmp_path / "page.html").read_text() == "<h1>13 of 13 checks pass, in 1 combo</h1>"


@pytest.mark.parametrize(
    "inside", ["{% for %}", "{{ view.nothing }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}"]
)
def test_a_broken_or_prying_template_is_named_and_nothing_is_written(tmp_path, monkeypatch, capsys, inside):
    monkeypatch.chdir(tmp_path)
    store.save(made(0))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "page.html.j2").write_text(inside)
    assert cli.main(["report", "--template", "mine", "-o", "page.html"]) in (2, 3)
    assert "mine/page.html.j2, line 1" in capsys.readouterr().err and not (tmp_path / "page.html").exists()


def test_the_page_needs_neither_torch_nor_numpy_nor_pytest(tmp_path):
    store.save(made(0), tmp_path / ".compat" / "runs")
    ask = (
        "import sys\nfrom compat.cli import main\nmain(['report'])\n"
        "print([n for n in ('torch', 'numpy', 'pytest', 'rich', 'transformers') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", ask], cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}
    )
    assert done.stdout.endswith("\n[]\n"), done.stdout + done.stderr


def test_a_few_runs_render_in_a_third_of_a_second():
    """Time on the processor, so that a busy machine does not matter; reading and imports are in the benchmark."""
    history, templates = History(some_weeks()[:6]), Templates()
    page(history, templates)
    began = time.process_time()
    page(History(some_weeks()[:6]))
    assert time.process_time() - began < 0.3

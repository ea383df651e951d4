"""The page in headless Chromium: it draws, it filters, it reads without scripts, and nothing hostile runs."""

from __future__ import annotations

import os

import pytest

from compat.reports.history import History
from compat.reports.html import page
from tests.report.browser import Browser, executable
from tests.report.made import some_weeks
from tests.report.test_page import hostile_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if executable() is None:
        # On a user's machine a browser is no part of the project; in CI the page goes nowhere untried.
        assert not os.environ.get("NEEDS_BROWSER"), "NEEDS_BROWSER is set, as .ci/run does, and there is no chromium"
        pytest.skip("no chromium here; apt-get install chromium")
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page(History(some_weeks())), encoding="utf-8")
    return path


def test_no_error_is_logged_and_every_chart_has_a_size(browser, file):
    browser.open(file)
    browser.value("document.querySelectorAll('details').forEach((one) => { one.open = true })")
    charts = browser.value(
        "[...document.querySelectorAll('.line polyline, .strip path')].map((one) => {"
        " const box = one.getBoundingClientRect(), style = getComputedStyle(one);"
        " return [box.width, box.height, style.stroke + style.fill] })"
    )
    assert len(charts) > 7 * 20
    assert all(width > 3 and height >= 0 and "rgb(0, 0, 0)" not in colour for width, height, colour in charts)
    assert sum(height > 10 for _, height, _ in charts) > 50  # lines that rise, cells that are full
    assert browser.said == []


def test_the_script_may_not_do_more_than_it_was_written_for(browser, file):
    """The policy is in force: what is added later neither runs nor loads."""
    browser.open(file)
    browser.value(
        "(() => { const one = document.createElement('script'); one.textContent = 'window.ran = true';"
        " document.body.append(one);"
        " document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"ran = 1\">'); })()"
    )
    assert browser.value("typeof ran") == "undefined"
    assert any("Content Security Policy" in text for text in browser.said)


def test_filters_show_what_was_asked_for(browser, file):
    browser.open(file)
    shown = "[...document.querySelectorAll('details.run')].filter((one) => one.offsetParent !== null).length"
    assert (
        browser.value(shown) == 48 and browser.value("document.getElementById('count').textContent") == "48 of 48 runs"
    )
    choose = (
        "(id, value) => { const one = document.getElementById(id);"
        " one.value = value; one.dispatchEvent(new Event('input')) }"
    )
    browser.value(f"({choose})('combo', 'granite-docling')")
    assert browser.value(shown) == 6 and browser.value("document.getElementById('count').textContent") == "6 of 48 runs"
    browser.value(f"({choose})('combo', '')")
    browser.value(f"({choose})('verdict', 'failed')")
    assert browser.value(shown) == 4  # three of one combo in the past, one now
    browser.value(f"({choose})('words', 'argmax token')")
    assert browser.value(shown) == 1
    rows = "[...document.querySelectorAll('.matrix tbody tr')].filter((one) => one.offsetParent !== null).length"
    assert browser.value(rows) == 13
    browser.value("document.getElementById('failing').click()")
    assert browser.value(rows) == 1


def test_a_link_in_the_matrix_opens_its_run(browser, file):
    browser.open(file)
    browser.value("document.querySelector('.matrix a.failed').click()")
    browser.value("new Promise((done) => setTimeout(done, 50))")
    assert browser.value("document.querySelector('details.run[open]').textContent.includes('311 != 87')")


def test_it_reads_without_scripts(browser, file):
    browser.open(file, scripts=False)
    browser.call("DOM.enable")
    root = browser.call("DOM.getDocument", depth=-1)["root"]["nodeId"]
    [bar, *_] = browser.call("DOM.querySelectorAll", nodeId=root, selector=".filters")["nodeIds"]
    attributes = browser.call("DOM.getAttributes", nodeId=bar)["attributes"]
    assert "hidden" in attributes  # controls that could do nothing are not shown
    runs = browser.call("DOM.querySelectorAll", nodeId=root, selector="details.run")["nodeIds"]
    assert len(runs) == 48
    for run in (runs[0], runs[-1]):
        assert browser.call("DOM.getBoxModel", nodeId=run)["model"]["height"] > 20
    browser.call("DOM.disable")


def test_it_works_by_keyboard(browser, file):
    browser.open(file)
    focused = (
        "(document.activeElement.getAttribute('href') || document.activeElement.id || document.activeElement.tagName)"
    )
    seen = []
    for _ in range(9):
        browser.key("Tab", 9)
        seen.append(browser.value(focused))
    assert seen[:6] == ["#verdict-now", "#breakages", "#waived", "#not-run", "#trend", "#runs"] and "failing" in seen
    assert browser.value("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    browser.value("document.querySelector('details.run summary').focus()")
    browser.key("Enter", 13, "\r")
    assert browser.value("document.querySelector('details.run').open") is True


@pytest.mark.parametrize("width", [360, 390, 768])
def test_nothing_sticks_out_on_a_phone(browser, file, width):
    browser.open(file, width=width)
    browser.value("document.querySelectorAll('details').forEach((one) => { one.open = true })")
    assert browser.value("document.documentElement.scrollWidth") == width


@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out_in_light_and_dark(browser, file, dark):
    """Contrast of every text against what is behind it, as WCAG counts it: 4.5 and more."""
    browser.open(file, dark=dark)
    colours = browser.value(
        "[...document.querySelectorAll('b, span, td > *, p, code, dd, dt, h2, th, figcaption, summary, a')]"
        ".filter((one) => one.textContent.trim() && one.offsetParent).map((one) => { let at = one, behind;"
        " do { behind = getComputedStyle(at).backgroundColor; at = at.parentElement }"
        " while (at && behind === 'rgba(0, 0, 0, 0)');"
        " return [getComputedStyle(one).color, behind] })"
    )
    pairs = {tuple(pair) for pair in colours}
    assert len(pairs) > 6
    light = browser.value("getComputedStyle(document.body).backgroundColor")
    assert (luminance(light) < 0.1) is dark
    assert not [pair for pair in pairs if contrast(*pair) < 4.5]


def luminance(colour: str) -> float:
    parts = [float(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_hostile_text_is_text(browser, tmp_path):
    path = tmp_path / "hostile.html"
    path.write_text(page(History([hostile_run()])), encoding="utf-8")
    browser.open(path)
    browser.value("document.querySelectorAll('details').forEach((one) => { one.open = true })")
    assert browser.value("document.title").startswith("Incomplete: ") or browser.value("document.title").startswith(
        "Failed: "
    )
    assert browser.value("document.scripts.length") == 1 and browser.value("document.images.length") == 0
    assert browser.value("document.body.innerText.includes(\"<script>document.title='pwned'</script>\")")
    assert browser.value("document.querySelectorAll('main > section').length") == 6
    assert browser.said == []

"""Laws of pages in a real browser, offline: `make pages` has what this needs.

Screenshots of every page stay in build/pages, to be looked at.
"""

import shutil
from pathlib import Path

import pytest
from page_runs import make_run, run_like

from lclm.cli.main import main

pytestmark = pytest.mark.browser

SHOTS = Path(__file__).parents[2] / "build" / "pages"
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
).split()
VIEWS = [(width, scheme) for width in (360, 1280) for scheme in ("light", "dark")]
LOOK = """() => {
  const box = e => e.getBoundingClientRect();
  const name = e => e.tagName + '.' + e.className + ' ' + e.textContent.slice(0, 40);
  const rgb = c => c.match(/[\\d.]+/g).map(Number);
  const light = c => rgb(c).slice(0, 3).map(v => v / 255)
    .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const behind = e => {
    const c = getComputedStyle(e).backgroundColor, at = rgb(c);
    return at.length == 4 && !at[3] && e.parentElement ? behind(e.parentElement) : c;
  };
  const contrast = e => {
    const [a, b] = [light(getComputedStyle(e).color), light(behind(e))];
    return (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
  };
  const all = s => [...document.querySelectorAll(s)];
  const words = all('body *').filter(e => box(e).width && [...e.childNodes]
    .some(n => n.nodeType == 3 && n.data.trim()));
  const crossing = (a, b) => box(a).left < box(b).right && box(b).left < box(a).right
    && box(a).top < box(b).bottom && box(b).top < box(a).bottom;
  const labels = all('.plot').flatMap(p => {
    const of = [...p.querySelectorAll('.x, .y')];
    return of.flatMap((a, i) => of.slice(i + 1).filter(b => crossing(a, b)));
  });
  return {
    width: document.scrollingElement.scrollWidth,
    pictures: all('img, svg, .plot, .heat').length,
    flat: all('img, svg, .plot, .heat').filter(e => !(box(e).width && box(e).height))
      .map(name),
    wide: all('.wide').filter(e => box(e).right > innerWidth).map(name),
    small: words.filter(e => parseFloat(getComputedStyle(e).fontSize) < 12).map(name),
    faint: words.filter(e => contrast(e) < 4.5).map(e => contrast(e) + ' ' + name(e)),
    outside: all('.plot span').filter(e => box(e).left < 0 || box(e).right > innerWidth)
      .map(name),
    crossed: labels.map(name),
  };
}"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless chromium without a network, driven over its DevTools protocol."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.fail(
            "no chromium in PATH: `apt-get install -y chromium`, then again",
            pytrace=False,
        )
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.fail(
            "playwright is not installed: `make pages` installs it", pytrace=False
        )
    with sync_playwright() as driver:
        context = driver.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("profile"),
            executable_path=chromium,
            headless=True,
            args=FLAGS,
        )
        context.set_offline(True)
        yield context
        context.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory, tokenizer):
    """A run with every figure, and a comparison of it with another."""
    folder = tmp_path_factory.mktemp("pages")
    first = make_run(folder, tokenizer, options=":points=5")
    second = run_like(first)
    out = folder / "compare"
    assert main(["compare", str(first), str(second), f"--out={out}"]) == 0
    return {"run": first / "report.html", "compare": out / "report.html"}


@pytest.mark.parametrize(("width", "scheme"), VIEWS)
@pytest.mark.parametrize("which", ["run", "compare"])
def test_a_page_is_whole_quiet_and_readable(browser, pages, which, width, scheme):
    page = browser.new_page()
    page.set_viewport_size({"width": width, "height": 800})
    page.emulate_media(color_scheme=scheme)
    asked, said = [], []
    page.on("request", lambda r: asked.append(r.url))
    page.on("console", lambda m: said.append(f"{m.type}: {m.text}"))
    page.on("pageerror", lambda e: said.append(str(e)))
    page.goto(pages[which].as_uri())
    page.locator("summary").click()
    found = page.evaluate(LOOK)
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"{which}-{width}-{scheme}.png", full_page=True)
    page.close()
    assert [u for u in asked if not u.startswith("data:")] == [pages[which].as_uri()]
    assert said == []
    assert found.pop("width") <= width
    assert found.pop("pictures") > 8
    assert found == {name: [] for name in found}


def test_numbers_of_a_figure_can_be_saved_from_the_page(browser, pages):
    page = browser.new_page()
    page.goto(pages["run"].as_uri())
    with page.expect_download() as told:
        page.get_by_role("link", name="loss_by_position.csv").click()
    beside = pages["run"].with_name("loss_by_position.csv")
    assert Path(told.value.path()).read_bytes() == beside.read_bytes()
    page.close()


def test_a_wide_table_scrolls_by_keyboard_inside_its_own_box(browser, pages):
    page = browser.new_page()
    page.set_viewport_size({"width": 360, "height": 800})
    page.goto(pages["compare"].as_uri())
    box = page.locator(".wide").first
    box.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("document.activeElement.scrollLeft > 0", timeout=5000)
    assert page.evaluate("scrollX") == 0
    page.close()

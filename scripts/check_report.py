"""Open reports in a headless Chromium and check what no parser can: nothing to install in the library for it.

    python -m venv browser && browser/bin/pip install playwright axe-playwright-python   # and a chromium on the machine
    browser/bin/python scripts/check_report.py --chromium /usr/bin/chromium RUN_REPORT.html --hostile HOSTILE.html \
        --large LARGE.html --shots docs/report

`scripts/make_reports.py` writes the hostile and the large report. Exit code 1 and a line for each thing that failed.
"""

import argparse
import sys
import time
from pathlib import Path

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, sync_playwright

SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
failures: list[str] = []


def check(fact: bool, text: str) -> None:
    print(("ok      " if fact else "FAILED  ") + text)
    if not fact:
        failures.append(text)


def opened(browser, path: Path, size="desktop", scheme="light", scale=1.0) -> tuple[Page, list[str], list[str]]:
    width, height = SIZES[size]
    phone = {"is_mobile": True, "has_touch": True} if size == "phone" else {}
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, device_scale_factor=scale, **phone
    )
    page = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda m: said.append(f"{m.type}: {m.text}") if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: said.append(f"exception: {e}"))
    page.on("request", lambda r: asked.append(r.url))
    page.goto(path.resolve().as_uri())
    page.wait_for_timeout(300)
    return page, said, asked


def look(browser, path: Path, shots: Path) -> None:
    """Every size and scheme: no message, no request, no sideways scrolling, no axe finding; pictures."""
    shots.mkdir(parents=True, exist_ok=True)
    for size in SIZES:
        for scheme in ("light", "dark"):
            page, said, asked = opened(browser, path, size, scheme)
            name = f"{size}, {scheme}"
            page.screenshot(path=shots / f"top-{size}-{scheme}.png")
            page.evaluate("document.querySelector('#h-tokens').scrollIntoView()")
            page.wait_for_timeout(300)
            token = page.locator(".heat .t").nth(3)
            token.tap() if size == "phone" else token.hover()
            page.screenshot(path=shots / f"tokens-{size}-{scheme}.png")
            check(not said, f"{name}: no console message {said[:2]}")
            check(len(asked) == 1, f"{name}: nothing but the file is asked for {asked[1:3]}")
            wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
            check(wide <= 0, f"{name}: no sideways scrolling ({wide} px)")
            page.keyboard.press("Escape")
            found = Axe().run(page).response["violations"]
            check(not found, f"{name}: axe finds nothing {[(v['id'], v['nodes'][0]['html'][:150]) for v in found]}")
            if page.locator(".switch[aria-pressed=true]").count():
                page.locator("#stack").click()
                page.locator(".chip").nth(1).click()
                page.evaluate("document.querySelector('#h-tokens').scrollIntoView()")
                page.screenshot(path=shots / f"single-{size}-{scheme}.png")
                found = Axe().run(page).response["violations"]
                check(not found, f"{name}, one layer: axe finds nothing {[(v['id'], len(v['nodes'])) for v in found]}")
            page.context.close()


def use(browser, path: Path) -> None:
    """Hover, keyboard, buttons."""
    page, _, _ = opened(browser, path)
    page.evaluate("document.querySelector('#h-tokens').scrollIntoView()")
    page.wait_for_timeout(300)
    card = page.locator("#card")
    first = page.locator(".heat .text").first
    check(not card.is_visible(), "no card before anything is pointed at")
    first.locator(".t").nth(2).hover()
    check(card.is_visible() and "token 3 of" in card.inner_text(), "hover shows the token's values")
    rows = card.locator("tr").count()
    check(rows == page.locator(".chip").count(), f"the card has a row for every layer ({rows})")
    page.keyboard.press("Escape")
    check(not card.is_visible(), "Escape hides the card")
    first.locator(".t").first.focus()
    check("token 1 of" in card.inner_text(), "focus shows the first token")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    check("token 3 of" in card.inner_text(), "arrow keys move")
    page.keyboard.press("End")
    last = first.locator(".t").count()
    check(f"token {last} of" in card.inner_text() or f"–{last}" in card.inner_text(), "End goes to the last token")
    check(page.evaluate("document.activeElement.getAttribute('aria-describedby')") == "card", "the card describes it")
    page.keyboard.press("Tab")
    other = "document.activeElement.closest('.side') === document.querySelectorAll('.heat .side')[1]"
    check(page.evaluate(other), "Tab goes on to the next response, not to every token")
    colours = "[...document.querySelectorAll('.heat .t')].slice(0, 40).map(t => getComputedStyle(t).backgroundColor)"
    if page.locator(".switch[aria-pressed=true]").count():
        page.locator("#stack").click()
    before = page.evaluate(colours)
    page.locator(".chip").last.click()
    check(before != page.evaluate(colours), "another layer, other colours")
    check(page.locator(".legend").count() == 1 and len(set(before)) > 2, "one legend, several shades")
    page.context.close()


def attack(browser, path: Path) -> None:
    """A report made of hostile strings: they are text everywhere, and every token is the text it should be."""
    page, said, asked = opened(browser, path)
    for group in page.locator(".heat").all():
        group.scroll_into_view_if_needed()
        page.wait_for_timeout(30)
        check(group.locator(".side:not(:has(.t))").count() == 0, "each response of a prompt has tokens")
    for token in page.locator(".heat .text .t:first-child").all()[:80]:
        token.focus()
    check(page.evaluate("window.pwned === undefined && parent.pwned === undefined"), "no script of a text ran")
    check(not said and len(asked) == 1, f"no message, no request {said[:2]} {asked[1:3]}")
    strange = page.locator(
        "iframe, img, object, embed, base, form, svg[onload], main script:not([type='application/json'])"
    )
    check(strange.count() == 0, "no element came out of a text")
    check(page.locator("h1").count() == 1, "one headline")
    page.context.close()


def weigh(browser, path: Path) -> None:
    """200 responses of 2000 tokens."""
    started = time.perf_counter()
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.goto(path.resolve().as_uri())
    page.wait_for_selector(".heat .t")
    seconds = time.perf_counter() - started
    check(
        seconds <= 3.0, f"{path.stat().st_size / 1e6:.1f} MB open with coloured tokens in {seconds:.2f} s (at most 3)"
    )
    worst = page.evaluate(
        """async () => {
          let worst = 0, last = performance.now();
          for (let i = 0; i < 60; i++) {
            scrollBy(0, innerHeight * 0.8);
            await new Promise((done) => requestAnimationFrame(done));
            worst = Math.max(worst, performance.now() - last);
            last = performance.now();
          }
          return worst;
        }"""
    )
    check(worst < 500, f"scrolling: longest frame {worst:.0f} ms")
    page.evaluate("scrollTo(0, document.documentElement.scrollHeight / 2)")
    page.wait_for_timeout(500)
    count = page.evaluate("document.querySelectorAll('.t').length")
    check(0 < count < 60_000, f"{count} of the tokens are elements at a time")
    context.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("report", type=Path)
    parser.add_argument("--hostile", type=Path)
    parser.add_argument("--large", type=Path)
    parser.add_argument("--shots", type=Path, default=Path("shots"))
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    words = parser.parse_args()
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=words.chromium, args=["--no-sandbox"])
        look(browser, words.report, words.shots)
        use(browser, words.report)
        if words.hostile:
            attack(browser, words.hostile)
        if words.large:
            weigh(browser, words.large)
        browser.close()
    print(f"{len(failures)} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

"""The ledger of ``examples/ledger`` in a real browser: each button pressed, and the balances read from the database."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from examples.ledger import views
from examples.ledger.application import Ledger
from tests.test_ledger import Books, Visitor, make_new_books, open_ledger, wait_until

pytest.importorskip("selenium")

from selenium.common.exceptions import StaleElementReferenceException, WebDriverException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

# Text whose contrast to what is behind it is below 4.5:1 (WCAG 2.2, 1.4.3).
FAINT_TEXT = """
const luminance = ([r, g, b]) => {
  const [x, y, z] = [r, g, b].map((c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * x + 0.7152 * y + 0.0722 * z;
};
const numbers = (colour) => colour.match(/[0-9.]+/g).map(Number);
const background = (element) => {
  for (; element; element = element.parentElement) {
    const colour = numbers(getComputedStyle(element).backgroundColor);
    if (colour.length === 3 || colour[3] === 1) return colour;
  }
};
const hasText = (element) =>
  [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
return [...document.body.querySelectorAll("*")].filter(hasText).flatMap((element) => {
  const [a, b] = [numbers(getComputedStyle(element).color), background(element)].map(luminance);
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  return ratio < 4.5 ? [`${element.textContent.trim()}: ${ratio}`] : [];
});
"""


class Browser:
    """The page as a person meets it."""

    def __init__(self, driver: Any, url: str, downloads: Path) -> None:
        self.driver = driver
        self.url = url
        self.downloads = downloads

    def open(self) -> None:
        self.driver.get(f"{self.url}/")

    def find(self, selector: str) -> Any:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        try:
            return str(self.find(selector).text)
        except StaleElementReferenceException:  # the panel has just been refreshed
            return self.text(selector)

    def press(self, label: str) -> None:
        """Press the button that stays on this page, or downloads something."""
        [button] = [b for b in self.driver.find_elements(By.TAG_NAME, "button") if b.text == label]
        button.click()

    def press_and_follow(self, label: str) -> None:
        """Press the button that leads to another page."""
        with self.next_page():
            self.press(label)

    def go_back_to_the_ledger(self) -> None:
        with self.next_page():
            self.driver.find_element(By.LINK_TEXT, "Back to the ledger").click()
        assert self.text("h1") == "The ledger"

    @contextmanager
    def next_page(self) -> Iterator[None]:
        """Wait, after this block, until the page that it leads to is there in full."""
        before = self.find("html").id
        yield
        wait_until(lambda: self._page_is_complete(before))

    def _page_is_complete(self, other_than: str) -> bool:
        try:
            state = self.driver.execute_script("return document.readyState")
            return bool(state == "complete" and self.find("html").id != other_than)
        except WebDriverException:  # between the two
            return False

    def let_downloads(self, behaviour: str) -> None:
        parameters = {"behavior": behaviour, "downloadPath": str(self.downloads)}
        self.driver.execute_cdp_cmd("Browser.setDownloadBehavior", parameters)

    def downloaded(self, name: str) -> bytes:
        path = self.downloads / name
        # Chromium writes under another name until it has it all, then makes an empty file of this name, and puts the
        # other one in its place.
        wait_until(lambda: path.exists() and path.stat().st_size)
        return path.read_bytes()

    def prefer(self, **features: str) -> None:
        """Have the media features of the person's system, such as ``color_scheme="dark"``."""
        media = [{"name": f"prefers-{name.replace('_', '-')}", "value": value} for name, value in features.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})

    def resize(self, width: int, height: int) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


@pytest.fixture
def books(tmp_path: Path) -> Books:
    return Books(tmp_path / "ledger.sqlite")


@pytest.fixture(scope="module")
def new_books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_new_books(tmp_path_factory.mktemp("new"))


@pytest.fixture
def ledger(new_books: Path, books: Books) -> Iterator[Ledger]:
    with open_ledger(new_books, books) as ledger:
        yield ledger


@pytest.fixture
def server(ledger: Ledger, waitress_server: Callable[..., Any]) -> Any:
    return waitress_server(ledger.application)


@pytest.fixture
def visitor(server: Any) -> Visitor:
    visitor = Visitor(server.host, server.port)
    visitor.open()
    return visitor


@pytest.fixture
def browser(server: Any, chromium: Any, tmp_path: Path) -> Iterator[Browser]:
    browser = Browser(chromium, server.url, tmp_path / "downloads")
    browser.let_downloads("allow")
    yield browser
    browser.let_downloads("default")
    browser.prefer()
    chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    chromium.get("about:blank")  # before the server is gone that the page asks every second


@pytest.fixture(params=["with JavaScript", "without JavaScript"])
def page(request: pytest.FixtureRequest, browser: Browser) -> Browser:
    without = request.param == "without JavaScript"
    browser.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": without})
    browser.open()
    return browser


class TestButtons:
    def test_transfer(self, page, books):
        before = books.balances
        Select(page.find("#source")).select_by_visible_text("Grace")
        Select(page.find("#target")).select_by_visible_text("Alan")
        page.find("#amount").send_keys("3.21")
        page.find("#memo").send_keys("Tea & cake")

        page.press_and_follow("Transfer")

        assert page.text("main .good") == "Transferred £3.21 from Grace to Alan."
        assert page.text("#latest tr") == "Alan Tea & cake £3.21"
        assert books.balances == {**before, "Grace": before["Grace"] - 321, "Alan": before["Alan"] + 321}

    def test_a_mistake_in_the_form(self, page, books):
        before = books.state
        page.find("#amount").send_keys("a lot")
        page.press_and_follow("Transfer")
        assert page.text("#problem") == "The amount must be a number of pounds, such as 12 or 12.50."
        assert page.find("#amount").get_attribute("value") == "a lot"
        wait_until(lambda: page.driver.switch_to.active_element == page.find("#amount"))
        assert books.state == before

    def test_what_is_not_kept(self, page, books):
        before = books.state
        for label, heading in [
            ("Transfer, then answer 500", "500: the view says no"),
            ("Debit, then crash", "500: something went wrong"),
            ("Transfer without approval", "500: something went wrong"),
            ("Try without keeping", "Dry run"),
        ]:
            page.press_and_follow(label)
            assert page.text("h1") == heading
            assert books.state == before
            page.go_back_to_the_ledger()
        assert page.text("#requests").count("rolled back") == 4
        assert page.text("#receipts") == "None yet."
        assert page.text("#connections") == "0"
        assert page.text("#verdict").startswith("The books add up: ")

    def test_transfer_with_a_receipt(self, page, books):
        before = books.balances
        page.press_and_follow("Transfer with a receipt")
        assert page.text("#receipts") == "£10.00 from Ada to Grace"
        assert books.balances == {**before, "Ada": before["Ada"] - 1000, "Grace": before["Grace"] + 1000}

    def test_two_transfers_that_collide(self, page, books):
        before = books.balances
        page.press_and_follow("Transfer and collide")
        assert page.text("main .good").endswith("; attempt 2 got through.")
        assert "POST /cases/collision 303 committed attempt 2" in page.text("#requests")
        assert page.text("#receipts") == "£10.00 from Ada to Grace"
        assert books.balances == {
            **before,
            "Ada": before["Ada"] - 1500,
            "Grace": before["Grace"] + 1000,
            "Alan": before["Alan"] + 500,
        }

    def test_stream_the_statement(self, page, books):
        page.press("Stream the statement")
        lines = page.downloaded("statement.csv").decode().splitlines()
        assert lines[-1] == f"rows,{books.entries}"
        assert len(lines) == books.entries + 2

    def test_download_the_report_to_its_end(self, page, books):
        before = books.balances
        page.press("Download the report")
        assert len(page.downloaded("annual-report.txt")) == views.REPORT_PAGES * 2000
        wait_until(lambda: books.balances["Ada"] == before["Ada"] - views.REPORT_FEE)

    def test_download_the_report_and_have_the_browser_cancel_it(self, page, visitor, ledger, books):
        ledger.views.pause = 0.05
        before = books.state
        page.let_downloads("deny")
        page.press("Download the report")
        line = visitor.seen("/cases/download")
        assert (line["status"], line["outcome"]) == ("200 cancelled", "rolled back")
        assert books.state == before

    def test_download_then_cancel(self, browser, ledger, books):
        ledger.views.pause = 0.05
        before = books.state
        browser.open()

        browser.press("Download, then cancel")

        wait_until(lambda: browser.text("#download-news").startswith("Cancelled after "))
        # The panel tells by itself what became of it.
        wait_until(lambda: "/cases/download 200 cancelled rolled back" in browser.text("#requests"))
        assert browser.text("#news") == "POST /cases/download: 200 cancelled, rolled back"
        assert books.state == before
        assert browser.text("#connections") == browser.text("#units") == "0"

    def test_there_is_no_button_that_needs_javascript_without_it(self, page):
        labels = {button.text for button in page.driver.find_elements(By.TAG_NAME, "button")}
        has_javascript = "Live" in page.text("#freshness") or "Download, then cancel" in labels
        expected = {case.button for case in views.CASES} | {"Transfer"}
        assert labels == expected | ({"Download, then cancel"} if has_javascript else set())


class TestLivePanel:
    def test_it_shows_what_others_do_and_what_the_job_does(self, browser, visitor, ledger, books):
        browser.open()
        wait_until(lambda: browser.text("#freshness") == "Live: refreshed every second.")

        visitor.send("/cases/crash")
        visitor.send("/cases/after-commit")
        visitor.send("/cases/collision")
        ledger.start_jobs(every=0.01)
        visitor.seen("interest")
        ledger.close()

        # The job came last, so with it all of them must be there.
        wait_until(lambda: "job interest done committed" in browser.text("#requests"))
        assert "POST /cases/crash 500 rolled back" in browser.text("#requests")
        assert "POST /cases/after-commit 303 committed" in browser.text("#requests")
        assert "POST /cases/collision 303 committed attempt 2" in browser.text("#requests")
        assert browser.text("#news") == "POST /cases/collision: 303, committed, attempt 2"

        ada = books.ids["Ada"]
        shown = f"£{books.balances['Ada'] / 100:,.2f}"
        wait_until(lambda: browser.text(f"[data-account='{ada}']") == shown)

    def test_it_tells_when_the_books_do_not_add_up(self, browser, books):
        browser.open()
        books.query("UPDATE accounts SET balance = balance + 1 WHERE name = 'Alan'")
        wait_until(lambda: browser.text("#verdict").endswith("not the sum of its entries: Alan."))
        assert "bad" in browser.find("#verdict").get_attribute("class")

    def test_it_tells_when_the_server_is_gone(self, browser, server):
        browser.open()
        server.stop()
        wait_until(lambda: browser.text("#freshness") == "The server does not answer. Still trying.")


class TestPage:
    def test_everything_can_be_reached_and_pressed_by_keyboard(self, browser):
        browser.open()
        browser.find("body").send_keys(Keys.TAB)
        reached = []
        while (focused := browser.driver.switch_to.active_element).tag_name != "body":
            reached.append(focused.get_attribute("name") or focused.get_attribute("aria-labelledby") or focused.text)
            assert focused.value_of_css_property("outline-style") == "solid"
            assert len(reached) < 50
            focused.send_keys(Keys.TAB)
        assert reached == [
            *("source", "target", "amount", "memo", "Transfer"),
            *(case.button for case in views.CASES),
            *("Download, then cancel", "requests-caption"),
        ]

        with browser.next_page():
            browser.find("#cases-dry-run button").send_keys(Keys.ENTER)
        assert browser.text("h1") == "Dry run"

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_all_text_is_legible(self, browser, visitor, scheme):
        browser.prefer(color_scheme=scheme, reduced_motion="reduce")
        visitor.send("/cases/collision")
        visitor.send("/cases/crash")
        browser.open()
        assert browser.driver.execute_script(FAINT_TEXT) == []
        browser.find("#amount").send_keys("a lot")
        browser.press_and_follow("Transfer")
        assert browser.driver.execute_script(FAINT_TEXT) == []

    def test_no_width_needs_sideways_scrolling(self, browser, visitor):
        visitor.send("/cases/refused-commit")
        visitor.send("/cases/collision")
        browser.open()
        for width in (320, 360, 800, 1280, 1920):
            browser.resize(width, 800)
            assert browser.driver.execute_script("return document.documentElement.scrollWidth") <= width

    def test_the_browser_knows_how_long_the_database_took(self, browser):
        browser.open()
        script = "return performance.getEntriesByType('navigation')[0].serverTiming.map((each) => each.toJSON())"
        database, commit, attempts = browser.driver.execute_script(script)
        assert (database["name"], commit["name"], attempts["name"]) == ("db", "commit", "attempts")
        assert int(database["description"].removeprefix("statements: ")) >= 1
        assert database["duration"] > commit["duration"] > 0
        assert attempts["description"] == "1"

    def test_nothing_comes_from_elsewhere_and_nothing_is_complained_of(self, browser):
        browser.driver.get_log("browser")  # what others have left there
        browser.open()
        wait_until(lambda: browser.text("#freshness").startswith("Live"))
        loaded = browser.driver.execute_script(
            "return performance.getEntriesByType('resource').map((resource) => resource.name)"
        )
        assert f"{browser.url}/static/style.css" in loaded
        assert all(name.startswith(f"{browser.url}/") for name in loaded)
        assert browser.driver.get_log("browser") == []

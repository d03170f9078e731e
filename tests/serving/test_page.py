"""The page in a real browser: from an image to an answer with its kept tokens, and all that may go wrong on the way."""

from __future__ import annotations

import base64
import io
import re
import shutil
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from tests.bundles import export
from tests.pictures import random_picture
from tests.schedules import schedule_for
from tests.serving.server import RunningServer, running, slowed, until
from tests.serving.test_levels import DOUBTFUL, SURE
from trio_edge.profiling.page.page import SCHEME
from trio_edge.runtime.bundle.schedule import Schedule, Stage
from trio_edge.runtime.pipeline import Pipeline
from trio_edge.serving.answers.worker import kept_report
from trio_edge.serving.settings import ServerSettings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from selenium.webdriver import Chrome
    from selenium.webdriver.remote.webelement import WebElement

PAGE = Path(__file__).parents[2] / "serving" / "page" / "index.html"
BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    BROWSER is None or DRIVER is None,
    reason="needs Chromium and its driver: apt-get install chromium chromium-driver; runs where they are installed",
)
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--no-first-run", "--window-size=1200,1000",
    "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",
)  # fmt: skip
PHONE = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
PICTURE = random_picture(48, 48)
SHAPES = PAGE.parents[2] / "examples" / "pictures" / "shapes-96x96.png"
LEAST_TARGET = 24  # CSS pixels: WCAG 2.2, 2.5.8
LEAST_CONTRAST = 4.5  # WCAG 2.2, 1.4.3


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    """One browser for all tests."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER)) as driver:
        yield driver


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images, and of files that are none."""
    folder = tmp_path_factory.mktemp("images")
    PICTURE.save(folder / "small.png")
    random_picture(600, 300).save(folder / "large.png")
    random_picture(200, 200).save(folder / "whole.jpg")
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:-400])
    (folder / "cut.png").write_bytes((folder / "small.png").read_bytes()[:60])
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "notes.txt").write_text("no image")
    upright, exif = random_picture(48, 24), Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    upright.save(folder / "turned.jpg", exif=exif)
    return folder


class Page:
    """The page as a reader sees and uses it."""

    def __init__(self, driver: Chrome, url: str) -> None:
        self.driver = driver
        driver.get(url)
        # Between two servers the driver may come back before the new page stands.
        until(lambda: bool(self.all("#send")))

    def until_ready(self) -> Page:
        until(lambda: self["send"].is_enabled())
        return self

    def __getitem__(self, name: str) -> WebElement:
        return self.driver.find_element("id", name)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements("css selector", selector)

    def texts(self, selector: str) -> list[str]:
        return [found.text for found in self.all(selector)]

    def add(self, *paths: Path) -> None:
        """Choose files, and wait for the page's word on each."""
        for path in paths:
            before = len(self.all("#images li"))
            self["file"].send_keys(str(path))
            until(lambda before=before: self["problem"].text or len(self.all("#images li")) != before)  # type: ignore[misc]

    def ask(self, text: str, *, other: str = "") -> None:
        """Ask, and wait for all answers or errors."""
        self.begin(text, other=other)
        self.until_done()

    def begin(self, text: str, *, other: str = "") -> None:
        self.driver.execute_script("document.getElementById('other').value = arguments[0]", other)
        self["question"].send_keys(text)
        self["send"].click()

    def until_done(self) -> None:
        until(lambda: bool(self.all(".panel")) and self["send"].is_displayed())

    def drawn(self, panel: int = 0) -> tuple[int, int]:
        """Return the number of drawn boxes, and of those from the overview."""
        inside = self.all(".panel")[panel]
        return tuple(len(inside.find_elements("css selector", kind)) for kind in (".kept", ".overview"))  # type: ignore[return-value]

    def boxes(self) -> list[list[float]]:
        """Return the drawn boxes in pixels of the image, without those from the overview."""
        drawn = [
            [float(box.get_dom_attribute(name)) for name in ("x", "y", "width", "height")]
            for box in self.all(".kept")
        ]
        return [[x, y, x + width, y + height] for x, y, width, height in drawn]

    def choose_stage(self, number: int) -> None:
        self.driver.execute_script("arguments[0].click()", self.all(".stages input")[number])


@pytest.fixture
def page(browser: Chrome, server: RunningServer) -> Page:
    browser.get_log("browser")
    return Page(browser, server.url).until_ready()


@contextmanager
def page_of(browser: Chrome, models: dict[str, Any], **settings: Any) -> Iterator[tuple[Page, RunningServer]]:
    """Open the page of a server of its own."""
    with running(models, ServerSettings(**settings)) as server:
        yield Page(browser, server.url), server


def stages_of(pipeline: Pipeline, *asked: Any) -> list[dict[str, Any]]:
    answer = pipeline.generate(*asked)
    assert answer.text
    report = kept_report(answer, pipeline.manifest.schedule.stages)
    return report["images"][0]["stages"]  # type: ignore[no-any-return]


@needs_browser
def test_an_uploaded_image_gets_the_pipelines_own_answers_next_to_each_other(
    page: Page, pipeline: Pipeline, keep_all_bundle: Path, files: Path
) -> None:
    page.add(files / "small.png")
    page.ask("w1 w2", other="full")
    with Pipeline.from_bundle(keep_all_bundle) as keep_all:
        own = [one.generate(PICTURE, "w1 w2").text for one in (pipeline, keep_all)]
    assert page.texts(".answer") == own
    assert own[0] != own[1]
    assert [text.split()[0] for text in page.texts(".panel h3")] == ["reduced", "full"]
    assert page["said"].get_attribute("textContent") == f"full: {own[1]}"


@needs_browser
def test_the_overlay_has_a_box_for_each_kept_token_of_the_chosen_stage(
    page: Page, pipeline: Pipeline, files: Path
) -> None:
    page.add(files / "small.png")
    page.ask("w1 w2", other="full")
    stages = stages_of(pipeline, PICTURE, "w1 w2")
    assert [stage["kept"] for stage in stages] == [51, 14, 6]
    assert page.texts(".panel:first-child .stages label") == ["all: 51", "layer 1: 14", "layer 2: 6"]
    for number, stage in reversed(list(enumerate(stages))):
        page.choose_stage(number)
        assert page.drawn() == (len(stage["boxes"]), len(stage["overview_boxes"]))
        assert f"{stage['kept']} of 51 visual tokens" in page.texts(".caption")[0]
    assert page.drawn(1) == page.drawn(0)  # all of them


@needs_browser
def test_a_box_lies_where_its_token_is(page: Page, pipeline: Pipeline, files: Path) -> None:
    page.add(files / "small.png")
    page.ask("w1 w2")
    image = page.all(".shown img")[0].rect
    scale = image["width"] / PICTURE.width
    drawn = [(box.rect["x"] - image["x"], box.rect["y"] - image["y"]) for box in page.all(".kept")]
    expected = [(scale * x, scale * y) for x, y, _, _ in stages_of(pipeline, PICTURE, "w1 w2")[-1]["boxes"]]
    assert len(drawn) > 0
    for place, wanted in zip(drawn, expected, strict=True):
        assert place == pytest.approx(wanted, abs=2)


@needs_browser
def test_a_photo_that_lies_on_its_side_is_shown_and_marked_upright(page: Page, files: Path) -> None:
    page.add(files / "turned.jpg")
    page.ask("w1")
    image, overlay = page.all(".shown img")[0].rect, page.all(".shown svg")[0]
    assert overlay.get_dom_attribute("viewBox") == "0 0 24 48"
    assert image["height"] == pytest.approx(2 * image["width"], abs=1)


@needs_browser
def test_numbers_and_times_come_with_the_answer(page: Page, files: Path) -> None:
    page.add(files / "small.png")
    page.ask("w1 w2", other="full")
    first, second = page.texts(".numbers")
    assert "51 → 14 → 6" in first
    assert re.search(r"first token\n[\d.,]+ ms", first)
    assert "→" not in second
    graphs = [text.split()[0] for text in page.texts(".panel:first-child .legend li")]
    assert graphs == ["vision", "prefix", "select_1", "segment_1", "select_2", "suffix", "head", "outside"]
    widths = [
        sum(part.rect["width"] for part in bar.find_elements("css selector", "span"))
        for bar in page.all(".bar")
    ]
    assert max(widths) == pytest.approx(page.all(".bar")[0].rect["width"], abs=2)  # one scale for both


@needs_browser
@pytest.mark.parametrize(
    ("name", "problem"),
    [
        (
            "broken.png",
            "broken.png: expected an image, got a broken one or one that this browser cannot show",
        ),
        ("notes.txt", "notes.txt: expected a PNG, JPEG, WebP, GIF or BMP image, got text/plain"),
    ],
)
def test_a_file_that_is_no_image_is_told_in_one_line(
    page: Page, files: Path, name: str, problem: str
) -> None:
    page.add(files / name)
    assert page["problem"].text == problem
    assert not page.all("#images li")
    page.add(files / "small.png")
    assert page["problem"].text == ""


@needs_browser
@pytest.mark.parametrize("name", ["cut.png", "cut.jpg"])
def test_a_broken_image_that_the_browser_shows_is_told_by_the_server(
    page: Page, files: Path, name: str
) -> None:
    page.add(files / name)
    page.ask("w1")
    (problem,) = page.texts(".panel .problem")
    assert "expected" in problem
    assert len(problem.splitlines()) == 1
    assert page.texts(".answer") == [""]
    assert not page.all(".shown svg")


@needs_browser
def test_an_error_of_the_server_is_told_in_one_line_and_the_question_stays(page: Page, files: Path) -> None:
    page.add(files / "small.png")
    page.ask("w1 " * 70)
    (problem,) = page.texts(".panel .problem")
    assert "w1" not in problem
    assert "token" in problem
    assert len(problem.splitlines()) == 1
    assert page["question"].get_attribute("value") == "w1 " * 70
    page["question"].clear()
    page.ask("w1")
    assert page.texts(".panel .problem") == ["", ""]
    assert page.texts(".answer")[0]


@pytest.fixture
def deciding(browser: Chrome, decider: RunningServer) -> Page:
    """The page of the packaged model, which can answer its questions."""
    browser.get_log("browser")
    page = Page(browser, decider.url).until_ready()
    page.driver.execute_script("document.querySelector('[name=mode][value=decide]').click()")
    return page


def fill(page: Page, row: int, kind: str, text: str, answers: str = "") -> None:
    from selenium.webdriver.support.ui import Select

    inside = page.all("#questions li")[row]
    Select(inside.find_element("css selector", "select")).select_by_value(kind)
    asked, named = inside.find_elements("css selector", "input")
    asked.send_keys(text)
    if answers:
        named.send_keys(answers)
    assert named.is_displayed() == (kind != "predicate")


@needs_browser
def test_probabilities_of_the_reduced_and_the_full_model_stand_next_to_each_other(
    deciding: Page, deciding_bundles: dict[str, Path]
) -> None:
    from trio_edge.runtime.decisions.questions import Question

    page, shapes = deciding, PAGE.parents[2] / "examples" / "pictures" / "shapes-96x96.png"
    assert not page["question"].is_displayed()
    assert page["send"].text == "Decide"
    page.add(shapes)
    fill(page, 0, "predicate", "is there a star ?")
    for row, kind, text, answers in (
        (1, "choice", "what color is the digit 3 ?", "red, green,blue,"),
        (2, "score", "how many circles are there ?", "zero, one, two"),
    ):
        page["add-question"].click()
        fill(page, row, kind, text, answers)
    page["send"].click()
    page.until_done()
    assert [text.split()[0] for text in page.texts(".panel h3")] == ["reduced", "full"]
    questions = [
        Question.yes_no("is there a star ?"),
        Question.choice("what color is the digit 3 ?", ["red", "green", "blue"]),
        Question.score("how many circles are there ?", ["zero", "one", "two"]),
    ]
    expected, shares, kept = [], list[float](), list[str]()
    for bundle in deciding_bundles.values():
        with Pipeline.from_bundle(bundle) as pipeline:
            for decision in pipeline.decide(shapes, questions):
                shares += decision.probabilities
                named = decision.by_name().items()
                numbers = (decision.statistics.visual_tokens, *decision.statistics.kept_tokens)
                expected.append("\n".join(f"{name}\n{100 * share:.1f} %" for name, share in named))
            if bundle == deciding_bundles["reduced"]:
                last = kept_report(decision, pipeline.manifest.schedule.stages)["images"][0]["stages"][-1]
                drawn = (len(last["boxes"]), len(last["overview_boxes"]))
            kept.append(" → ".join(map(str, numbers)))
    assert page.texts(".shares") == expected
    bars = [bar.rect["width"] for bar in page.all(".share")]
    filled = [bar.rect["width"] for bar in page.all(".share span")]
    assert [inner / outer for inner, outer in zip(filled, bars)] == pytest.approx(shares, abs=0.03)
    assert all("these answers have" in text for text in page.texts(".decision .soft"))
    assert [text.splitlines()[1] for text in page.texts(".numbers")] == kept
    assert not page.all(".decision .button")  # all questions share a selection
    labels = page.texts(".panel:first-child .stages label")
    assert [label.split(": ")[1] for label in labels] == kept[0].split(" → ")
    assert page.drawn() == drawn
    assert page.texts(".panel:last-child .stages label") == ["all: 192"]
    assert [line for line in page.driver.get_log("browser") if line["level"] in ("WARNING", "SEVERE")] == []


@needs_browser
def test_each_question_with_a_selection_of_its_own_draws_it(browser: Chrome) -> None:
    from trio_edge.runtime.decisions.questions import Question

    shapes = PAGE.parents[2] / "examples" / "pictures" / "shapes-96x96.png"
    texts = ["what color is the digit 3 ?", "what color is the star ?"]
    bundle = export("tiny", schedule=schedule_for(1 / 9, num_layers=16, num_visual=192), dtype="float32")
    with page_of(browser, {"reduced": partial(Pipeline.from_bundle, bundle)}) as (page, _):
        page.until_ready()
        page.driver.execute_script("document.querySelector('[name=mode][value=decide]').click()")
        page.add(shapes)
        page["add-question"].click()
        for row, text in enumerate(texts):
            fill(page, row, "choice", text, "red, green, blue")
        page["send"].click()
        page.until_done()
        with Pipeline.from_bundle(bundle) as pipeline:
            choices = [Question.choice(text, ["red", "green", "blue"]) for text in texts]
            stages = pipeline.manifest.schedule.stages
            decisions = pipeline.decide(shapes, choices)
            first, second = (
                kept_report(one, stages)["images"][0]["stages"][-1]["boxes"] for one in decisions
            )
        assert first != second
        assert page.boxes() == first
        page.all(".decision .button")[1].click()
        assert page.boxes() == second
        page.all(".decision .button")[0].click()
        assert page.boxes() == first


@needs_browser
def test_a_question_that_the_server_refuses_is_told_and_stays(deciding: Page) -> None:
    page = deciding
    fill(page, 0, "choice", "what color is the star ?", "red, maroon")
    page["send"].click()
    page.until_done()
    assert {text[:15] for text in page.texts(".panel .problem")} == {"label 'maroon':"}
    assert page.all("#questions input")[0].get_attribute("value") == "what color is the star ?"
    page.all("#questions button")[0].click()
    assert not page.all("#questions li")
    page["send"].click()  # nothing to ask
    assert len(page.all(".turn")) == 1
    page.driver.execute_script("document.querySelector('[name=mode][value=ask]').click()")
    page.ask("is there a star ?")
    assert page.texts(".answer")[0] in ("yes", "no")


@needs_browser
def test_on_a_phone_the_form_of_questions_fits(deciding: Page) -> None:
    page = deciding
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
    try:
        page["example"].click()
        until(lambda: len(page.all("#images li")) == 1)
        assert len(page.all("#questions li")) == 2
        page["send"].click()
        page.until_done()
        assert page.driver.execute_script("return document.documentElement.scrollWidth") == PHONE["width"]
        touched = [
            one.rect
            for one in page.all(
                "button, .button, select, input:not(.unseen, .button > *)"
            )  # the label is touched
            if one.is_displayed()
        ]
        assert all(min(rect["width"], rect["height"]) >= LEAST_TARGET for rect in touched)
        assert len(page.texts(".decision")) == 4
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@needs_browser
def test_a_server_that_has_gone_is_told(browser: Chrome, reduced_bundle: Path) -> None:
    with page_of(browser, {"reduced": partial(Pipeline.from_bundle, reduced_bundle)}) as (page, _):
        page.until_ready()
    page.ask("w1")
    (problem,) = page.texts(".panel .problem")
    assert re.fullmatch(r"The server 127\.0\.0\.1:\d+ cannot be reached: Failed to fetch", problem)


@needs_browser
def test_a_server_that_is_killed_while_it_answers_is_named(browser: Chrome, reduced_bundle: Path) -> None:
    def slow() -> Pipeline:
        return slowed(Pipeline.from_bundle(reduced_bundle), 0.25)

    with page_of(browser, {"reduced": slow}) as (page, server):
        page.until_ready().begin("w1")
        until(lambda: len(page.texts(".answer")[0].split()) >= 2)
        for protocol in list(server.connections):
            protocol.transport.abort()
        until(lambda: page.texts(".panel .problem") != [""])
    (problem,) = page.texts(".panel .problem")
    assert re.fullmatch(r"The server 127\.0\.0\.1:\d+ ended before the answer did\.", problem)


@needs_browser
def test_a_page_without_answers_says_what_it_shows(page: Page) -> None:
    assert "the visual tokens that each stage keeps" in page["nothing"].text
    page.ask("w1")
    assert not page["nothing"].is_displayed()
    page["restart"].click()
    assert page["nothing"].is_displayed()


@needs_browser
def test_a_long_question_takes_three_lines(page: Page) -> None:
    page.ask("w1 " * 60)
    heading = page.all(".turn h2")[0]
    line = float(heading.value_of_css_property("line-height").removesuffix("px"))
    assert heading.rect["height"] <= 3.2 * line
    assert heading.get_attribute("title") == "w1 " * 60


@needs_browser
def test_the_overlay_can_be_switched_off(page: Page, files: Path) -> None:
    page.add(files / "small.png")
    page.ask("w1")
    overlay, switch = page.all(".shown svg")[0], page.all(".drawn")[0]
    assert overlay.is_displayed()
    switch.click()
    page.choose_stage(0)  # another stage stays switched off, too
    assert not page.all(".shown svg")[0].is_displayed()
    switch.click()
    assert page.all(".shown svg")[0].is_displayed()


@needs_browser
def test_an_answer_is_copied_as_it_came(page: Page) -> None:
    page.ask("w1")
    page.driver.execute_script(
        "navigator.clipboard.writeText = (text) => { window.copied = text; return Promise.resolve(); };"
        "document.querySelector('.answer').textContent = '**a**\\n\\n  <b>'"
    )
    page.all(".copy")[0].click()
    until(lambda: page.texts(".copy") == ["Copied"])
    assert page.driver.execute_script("return window.copied") == "**a**\n\n  <b>"


@needs_browser
def test_the_speed_of_a_few_tokens_is_not_told(page: Page) -> None:
    for limit, is_told in (("7", False), ("8", True)):
        page["restart"].click()
        page.driver.execute_script(f"document.getElementById('max-tokens').value = '{limit}'")
        page.ask("w1 w2")
        (numbers,) = page.texts(".numbers")
        assert re.search(rf"\+ {limit}$", numbers, re.MULTILINE)
        assert ("tokens/s" in numbers) == is_told


@needs_browser
def test_two_tabs_at_once_get_an_answer_each(
    page: Page, pipeline: Pipeline, server: RunningServer, files: Path
) -> None:
    first = page.driver.current_window_handle
    page.add(files / "small.png")
    page.driver.switch_to.new_window("tab")
    try:
        second = Page(page.driver, server.url).until_ready()
        second.add(files / "large.png")
        second.begin("w3 w4", other="full")
        page.driver.switch_to.window(first)
        page.begin("w1 w2", other="full")
        page.until_done()
        assert page.texts(".answer")[0] == pipeline.generate(PICTURE, "w1 w2").text
        page.driver.switch_to.window(page.driver.window_handles[-1])
        second.until_done()
        assert second.texts(".answer")[0] == pipeline.generate(files / "large.png", "w3 w4").text
    finally:
        page.driver.close()
        page.driver.switch_to.window(first)


@needs_browser
@pytest.mark.parametrize("way", ["button", "Escape"])
def test_cancelling_ends_the_answer_here_and_in_the_server(
    browser: Chrome, reduced_bundle: Path, way: str
) -> None:
    from selenium.webdriver.common.keys import Keys

    def slow() -> Pipeline:
        return slowed(Pipeline.from_bundle(reduced_bundle), 0.25)  # 10 s for the whole answer

    with page_of(browser, {"reduced": slow}) as (page, server):
        page.until_ready().begin("w1")
        until(lambda: len(page.texts(".answer")[0].split()) >= 2)  # it streams
        if way == "button":
            page["cancel"].click()
        else:
            page["question"].send_keys(Keys.ESCAPE)
        until(lambda: page.texts(".panel .problem") == ["Cancelled."])
        until(lambda: server.workers["reduced"]._running == {}, seconds=2)
        assert page["send"].is_displayed()
        assert not page["cancel"].is_displayed()
        assert 2 <= len(page.texts(".answer")[0].split()) < 20


@needs_browser
def test_the_keyboard_alone_is_enough(page: Page, pipeline: Pipeline) -> None:
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    def press(*keys: str) -> None:
        ActionChains(page.driver).send_keys(*keys).perform()

    def focused() -> WebElement:
        return page.driver.switch_to.active_element

    def walk_to(name: str) -> None:
        for _ in range(30):
            press(Keys.TAB)
            if focused().get_attribute("id") == name:
                return
        pytest.fail(f"Tab does not reach {name}")

    walk_to("file")
    walk_to("example")
    press(Keys.ENTER)
    until(lambda: len(page.all("#images li")) == 1)
    assert focused() == page["question"]
    walk_to("send")
    press(Keys.ENTER)
    page.until_done()
    assert len(page.texts(".answer")) == 2
    assert focused() == page["send"]
    for _ in range(30):
        press(Keys.TAB)
        if focused().get_attribute("type") == "radio":
            break
    before = page.drawn()
    press(Keys.ARROW_LEFT)
    assert page.drawn()[0] + page.drawn()[1] > sum(before)
    outline = page.driver.execute_script(
        "return getComputedStyle(document.activeElement.closest('label')).outlineStyle"
    )
    assert outline == "solid"  # the focus can be seen


@needs_browser
def test_enter_asks_and_shift_enter_begins_a_line(page: Page) -> None:
    from selenium.webdriver.common.keys import Keys

    page["question"].send_keys("w1", Keys.SHIFT + Keys.ENTER)
    assert page["question"].get_attribute("value") == "w1\n"
    assert not page.all(".panel")
    page["question"].send_keys(Keys.NULL, "w2", Keys.ENTER)
    page.until_done()
    assert page.texts(".turn h2") == ["w1 w2"]


@needs_browser
def test_on_a_phone_nothing_is_cut_and_everything_can_be_touched(page: Page, files: Path) -> None:
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
    try:
        page.add(files / "large.png")
        page.ask("w1 w2", other="full")
        page.driver.execute_script("document.querySelector('#ask details').open = true")
        assert page.driver.execute_script("return document.documentElement.scrollWidth") == PHONE["width"]
        touched = page.all("button, .button, select, textarea, input[type=number], summary")
        sizes = [(one.tag_name, one.text, one.rect) for one in touched if one.is_displayed()]
        assert len(sizes) > 10
        assert [size for size in sizes if min(size[2]["width"], size[2]["height"]) < LEAST_TARGET] == []
        panels = [panel.rect for panel in page.all(".panel")]
        assert panels[1]["y"] > panels[0]["y"] + panels[0]["height"]  # one below the other
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@needs_browser
@pytest.mark.parametrize(
    ("kind", "create"),
    [
        ("paste", "new ClipboardEvent('paste', {clipboardData: data, bubbles: true, cancelable: true})"),
        ("drop", "new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true})"),
    ],
    ids=["paste", "drop"],
)
def test_an_image_can_be_pasted_and_dropped(page: Page, pipeline: Pipeline, kind: str, create: str) -> None:
    file = io.BytesIO()
    PICTURE.save(file, "PNG")
    page.driver.execute_script(
        "const bytes = Uint8Array.from(atob(arguments[0]), (letter) => letter.charCodeAt(0));"
        "const data = new DataTransfer(); data.items.add(new File([bytes], 'x.png', {type: 'image/png'}));"
        f"document.getElementById('question').dispatchEvent({create})",
        base64.b64encode(file.getvalue()).decode(),
    )
    until(lambda: len(page.all("#images li")) == 1)
    page.ask("w1 w2")
    assert page.texts(".answer") == [pipeline.generate(PICTURE, "w1 w2").text], kind


@needs_browser
def test_the_camera_takes_a_photo_and_is_switched_off(page: Page) -> None:
    page["open-camera"].click()
    until(lambda: page.driver.execute_script("return document.getElementById('video').videoWidth > 0"))
    page["shoot"].click()
    until(lambda: len(page.all("#images li")) == 1)
    assert page.driver.execute_script(
        "return camera.getTracks().every((track) => track.readyState === 'ended')"
    )
    page.ask("w1")
    assert page.texts(".answer")[0]
    assert page.drawn() != (0, 0)


@needs_browser
def test_a_further_question_knows_the_conversation(page: Page, pipeline: Pipeline, files: Path) -> None:
    page.add(files / "small.png")
    page.ask("w1 w2")
    first = page.texts(".answer")[0]
    page.ask("w3")
    assert page.texts(".answer")[0] == pipeline.generate(PICTURE, "w3", history=[("w1 w2", first)]).text
    page.driver.execute_script("document.getElementById('history').checked = false")
    page.ask("w3")
    assert page.texts(".answer")[0] == pipeline.generate(PICTURE, "w3").text
    assert page.texts(".turn h2") == ["w3", "w3", "w1 w2"]
    page["restart"].click()
    assert not page.all(".turn, #images li")


@needs_browser
def test_one_bundle_shows_its_levels_next_to_each_other(
    browser: Chrome, levelled: RunningServer, levelled_bundle: Path
) -> None:
    from selenium.webdriver.support.ui import Select

    page = Page(browser, levelled.url).until_ready()
    names = [f"tiny@{level}" for level in ("auto", "base", "quick", "usual", "full")]
    assert [option.text.split()[0] for option in page.all("#model option")] == names
    assert page.all("#model option")[0].text == "tiny@auto (from quick up, if in doubt)"
    assert page.all("#model option")[4].text == "tiny@full (192 tokens a layer)"
    assert [page[name].get_attribute("value") for name in ("model", "other")] == ["tiny@usual", "tiny@full"]
    page.add(SHAPES)
    with Pipeline.from_bundle(levelled_bundle) as own:
        for text, first, levels in (
            (DOUBTFUL, "tiny@usual", ["usual", "full"]),
            (DOUBTFUL, "tiny@auto", ["quick → full", "full"]),
            (SURE, "tiny@auto", ["quick", "full"]),
        ):
            Select(page["model"]).select_by_value(first)
            page["restart"].click()
            page.add(SHAPES)
            page.ask(text, other="tiny@full")
            assert [found.split()[0] for found in page.texts(".panel h3")] == [first, "tiny@full"]
            assert page.texts(".answer") == [
                own.generate(SHAPES, text, level=name.split("@")[1]).text for name in (first, "tiny@full")
            ]
            shown = [re.search(r"^level\n(.+)$", found, re.MULTILINE) for found in page.texts(".numbers")]
            assert [found and found[1] for found in shown] == levels
    stages = page.texts(".panel:first-child .stages label")
    assert stages == ["all: 192", "layer 1: 6", "layer 5: 2", "layer 8: 1"]
    page.driver.execute_script("document.querySelector('[name=mode][value=decide]').click()")
    fill(page, 0, "predicate", DOUBTFUL)
    page["send"].click()
    page.until_done()
    assert len(page.texts(".shares")) == 2
    assert all(re.search(r"^level\n.*full$", found, re.MULTILINE) for found in page.texts(".numbers")[:2])


@needs_browser
def test_a_model_next_to_itself_is_asked_once(page: Page) -> None:
    page.ask("w1", other="reduced")
    assert len(page.all(".panel")) == 1


@needs_browser
def test_limits_that_are_set_are_sent(page: Page) -> None:
    page.driver.execute_script("document.querySelector('#ask details').open = true")
    page["max-tokens"].send_keys("3")
    page["temperature"].send_keys("0.5")
    page.ask("w1")
    assert re.search(r"\+ 3$", page.texts(".numbers")[0], re.MULTILINE)
    page["max-tokens"].send_keys("9999")
    page["question"].send_keys("w1")
    page["send"].click()  # the browser itself tells what is too much
    assert len(page.all(".turn")) == 1


@needs_browser
def test_an_image_is_sent_smaller_only_if_that_is_asked_for(page: Page, files: Path) -> None:
    page.add(files / "large.png")
    page.ask("w1")
    assert page.all(".shown svg")[0].get_dom_attribute("viewBox") == "0 0 600 300"
    page.driver.execute_script("document.querySelector('#ask details').open = true")
    page["longest"].find_element("css selector", "[value='512']").click()
    page.ask("w1")
    assert page.all(".shown svg")[0].get_dom_attribute("viewBox") == "0 0 512 256"


@needs_browser
def test_several_images_have_an_overlay_each(browser: Chrome, checkpoint: Path, files: Path) -> None:
    stages = (Stage(layer=1, keep=14), Stage(layer=2, keep=6))
    bundle = export(checkpoint, schedule=Schedule(stages=stages, budget="image"), max_images=3)
    with page_of(browser, {"several": partial(Pipeline.from_bundle, bundle)}) as (page, _):
        page.until_ready().add(files / "small.png", files / "large.png")
        page.ask("w1 w2")
        with Pipeline.from_bundle(bundle) as pipeline:
            own = pipeline.generate([PICTURE, files / "large.png"], "w1 w2")
            assert page.texts(".answer") == [own.text]
        boxes = [len(svg.find_elements("css selector", ".kept, .overview")) for svg in page.all(".shown svg")]
        kept = kept_report(own, stages)["images"]
        assert boxes == [
            len(one["stages"][-1]["boxes"] + one["stages"][-1]["overview_boxes"]) for one in kept
        ]
        page.add(files / "small.png", files / "turned.jpg")
        assert (
            page["problem"].text == "turned.jpg: expected at most 3 images for this model; remove one first"
        )
        page.all("#images button")[0].click()
        assert len(page.all("#images li")) == 2


@needs_browser
def test_the_key_is_asked_for_only_where_it_is_needed(
    page: Page, browser: Chrome, reduced_bundle: Path
) -> None:
    assert not page["key-form"].is_displayed()
    models = {"reduced": partial(Pipeline.from_bundle, reduced_bundle)}
    with page_of(browser, models, api_keys=("secret",)) as (locked, _):
        until(lambda: locked["key-form"].is_displayed())
        assert not locked["model"].is_displayed()
        assert locked["served"].text == "api key: expected this server's, got another or none"
        locked["key"].send_keys("secret\n")
        locked.until_ready().ask("w1")
        assert locked.texts(".answer")[0]
        assert not locked["key-form"].is_displayed()


@needs_browser
def test_nothing_is_fetched_and_nothing_of_others_runs(
    page: Page, server: RunningServer, files: Path
) -> None:
    page.add(files / "small.png")
    page.ask("<img src=x onerror=document.title='run'>")
    assert page.driver.title == "trio-serve"
    assert page.texts(".turn h2") == ["<img src=x onerror=document.title='run'>"]
    fetched = page.driver.execute_script(
        "return performance.getEntriesByType('resource').map((one) => one.name)"
    )
    assert {name for name in fetched if not name.startswith("data:")} == {
        f"{server.url}/v1/models", f"{server.url}/v1/chat/completions",
    }  # fmt: skip
    assert [line for line in page.driver.get_log("browser") if line["level"] in ("WARNING", "SEVERE")] == []
    page.driver.execute_script(
        "const script = document.createElement('script'); script.textContent = 'document.title = \"run\"';"
        "document.body.append(script); document.body.setAttribute('onclick', 'document.title = \"run\"')"
    )
    page.driver.execute_script("document.body.click()")
    assert page.driver.title == "trio-serve"
    assert "Content Security Policy" in page.driver.get_log("browser")[0]["message"]


def test_the_page_has_the_colours_of_the_profile_and_enough_contrast() -> None:
    blocks = re.findall(r":root \{(.*?)\}", PAGE.read_text(), re.DOTALL)
    light, dark = (dict(re.findall(r"--(\w+): (#\w+);", block)) for block in blocks)
    assert light == {name: pair[0] for name, pair in SCHEME.items()}
    assert dark == {name: pair[1] for name, pair in SCHEME.items()}
    pairs = [(ink, paper) for ink in ("text", "soft", "c3") for paper in ("back", "box")] + [("back", "c0")]
    for scheme in (light, dark):
        assert min(contrast(scheme[ink], scheme[paper]) for ink, paper in pairs) >= LEAST_CONTRAST


def contrast(one: str, other: str) -> float:
    """Return WCAG's contrast ratio of two colours."""
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

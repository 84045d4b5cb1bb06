"""The page in a real browser, as a person uses it, on the real server."""

import base64
import json
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Locator, Page, Request, Route, expect

from latentac.serving.process import ServerProcess
from tests.browser import browser as started
from tools.golang import Unavailable

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

READY_SECONDS = 240.0
DRAW_MS = 120_000
ARMS = ("base", "trained", "steered")
CONTROLS = "button, input, select, textarea, summary, progress, [tabindex]"

CONTRASTS = """() => {
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const luminance = (colour) => numbers(colour).slice(0, 3).map((value) => value / 255)
    .map((value) => (value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4))
    .reduce((sum, value, index) => sum + value * [0.2126, 0.7152, 0.0722][index], 0);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const colour = getComputedStyle(node).backgroundColor;
      if (numbers(colour)[3] !== 0) return colour;
    }
  };
  const texts = [...document.body.querySelectorAll("*")].filter((node) =>
    node.checkVisibility() && !node.closest("svg, .unseen") &&
    [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim()));
  return texts.map((node) => {
    const [one, other] = [getComputedStyle(node).color, behind(node)].map(luminance);
    return [node.textContent.trim().slice(0, 40), (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05)];
  });
}"""
"""What each piece of text contrasts with what is behind it, as WCAG 2 defines it."""


@pytest.fixture(scope="module")
def server(exported_folder: Path) -> Iterator[ServerProcess]:
    with ServerProcess(exported_folder, ready_seconds=READY_SECONDS) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    try:
        with started() as running:
            yield running
    except Unavailable as error:
        pytest.skip(str(error))


Visit = Callable[..., Page]


@pytest.fixture
def visit(browser: Browser, server: ServerProcess) -> Iterator[Visit]:
    """Opens the page, each time in a browser that knows nothing yet. At the end: nothing was complained of in the
    console but refusals, which are part of the conversation, and nobody else was talked to."""
    contexts: list[BrowserContext] = []
    complaints: list[str] = []

    def complain(message: ConsoleMessage) -> None:
        refused = re.search(r"status of (422|429|503)", message.text)
        if message.type in ("error", "warning") and not refused:
            complaints.append(message.text)

    def check(request: Request) -> None:
        if not request.url.startswith((f"{server.address}/", "data:")):
            complaints.append(f"a request to {request.url}")

    def visit(fragment: str = "", **options: Any) -> Page:
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", complain)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", check)
        page.goto(f"{server.address}/{fragment}")
        expect(page.get_by_role("button", name="Generate", exact=True)).to_be_enabled()
        return page

    yield visit
    for context in contexts:
        context.close()
    assert not complaints


def test_a_model_that_is_not_in_production_says_so(
    browser: Browser, server: ServerProcess, exported_folder: Path, tmp_path: Path
) -> None:
    """At the top of the page; one in production has no such line."""
    folder, notice = tmp_path / "model", "held: for inspection only, not in production"
    shutil.copytree(exported_folder, folder)
    content = json.loads((folder / "latentac.json").read_text())
    (folder / "latentac.json").write_text(json.dumps({**content, "notice": notice}))
    with ServerProcess(folder, ready_seconds=READY_SECONDS) as inspected, browser.new_context() as context:
        page = context.new_page()
        page.goto(inspected.address)
        expect(page.locator("header")).to_contain_text(notice)
        page.goto(server.address)
        expect(page.get_by_role("button", name="Generate", exact=True)).to_be_enabled()
        expect(page.locator("#notice")).to_be_hidden()


def status(page: Page) -> Locator:
    return page.get_by_role("status")


def steering_weight(page: Page, reward: str = "shapes_verifier") -> Locator:
    return page.get_by_role("spinbutton", name=reward)


def draw(page: Page, prompt: str | None = None) -> None:
    """Types, draws by the button, and waits for the images."""
    if prompt is not None:
        page.get_by_role("textbox", name="Prompt").fill(prompt)
    page.get_by_role("button", name="Generate", exact=True).click()
    expect(status(page)).to_contain_text("3 images generated in", timeout=DRAW_MS)


def images(page: Page) -> dict[str, str]:
    """Arm -> the image on the page, as a data URL."""
    found = {}
    for arm in ARMS:
        found[arm] = page.locator(f"figure[data-arm={arm}] img").get_attribute("src") or ""
        assert found[arm].startswith("data:image/png;base64,")
    return found


def test_a_steering_weight_moves_the_steered_image_alone(visit: Visit, server: ServerProcess) -> None:
    """Three images of one prompt and seed, those that the endpoint answers with; at 0 the steered one is plain."""
    page = visit()
    steering_weight(page).fill("0")
    draw(page, "a red circle")
    plain = images(page)
    assert plain["steered"] == plain["trained"]
    steering_weight(page).fill("4.5")
    expect(page.get_by_text("The settings have changed since")).to_be_visible()
    draw(page)
    steered = images(page)
    assert (steered["base"], steered["trained"]) == (plain["base"], plain["trained"])
    assert steered["steered"] != plain["steered"]
    expect(page.get_by_text("The settings have changed since")).to_be_hidden()
    for arm, policy, weights in (("base", "base", None), ("steered", "trained", {"shapes_verifier": 4.5})):
        method = {"steering": weights} if weights else {"method": "none"}
        answer = server.predict({"prompt": "a red circle", "seed": 0, "policy": policy, **method})
        assert steered[arm] == f"data:image/png;base64,{answer['images'][0]}"
        facts = page.locator(f"figure[data-arm={arm}] .facts")
        value = f"{answer['values']['shapes_verifier'][0][-1]:.3g}"
        expect(facts).to_have_text(re.compile(rf"^NFE {answer['nfe']}value {re.escape(value)}\d*[\d.]+ s$"))


def test_a_method_brings_its_own_defaults(visit: Visit, server: ServerProcess) -> None:
    """Of the steering weights and the particles, where nobody has changed them; what was changed stays."""
    with urllib.request.urlopen(f"{server.address}/v1/images/options", timeout=30) as answer:
        options = json.load(answer)
    strengths, [reward, *_] = options["defaults"]["strengths"], options["rewards"]
    expected = reward["default_weight"] * strengths["resampling"] / strengths[options["defaults"]["method"]]
    particles = next(method["particles"] for method in options["methods"] if method["name"] == "resampling")
    page = visit()
    page.get_by_label("Method", exact=True).select_option("resampling")
    assert float(steering_weight(page).input_value()) == pytest.approx(expected)
    expect(page.get_by_label("Particles", exact=True)).to_have_value(str(particles))
    steering_weight(page).fill("2.5")
    page.get_by_label("Method", exact=True).select_option("value_gradient")
    expect(steering_weight(page)).to_have_value("2.5")
    page.get_by_role("button", name="Defaults").click()
    assert float(steering_weight(page).input_value()) == pytest.approx(reward["default_weight"])


def test_the_critics_values_grow_while_it_draws(visit: Visit) -> None:
    """A point a step, told as words and as a table too; and for each reward."""
    page = visit()
    page.get_by_label("Steps", exact=True).fill("60")
    page.get_by_role("textbox", name="Prompt").press("Enter")
    line = page.locator("#curve [data-arm=steered] polyline")
    lengths = set()
    expect(line).to_be_attached(timeout=DRAW_MS)
    while "Generating" in status(page).inner_text():
        lengths.add(len((line.get_attribute("points") or "").split()))
    expect(status(page)).to_contain_text("3 images generated in")
    assert len(lengths) > 3, f"drawn at once: {lengths}"
    assert len((line.get_attribute("points") or "").split()) == 60
    curve = page.get_by_role("img", name="The critic's value of shapes_verifier over 60 denoising steps")
    name = curve.get_attribute("aria-label") or ""
    assert all(f"{arm} from" in name for arm in ARMS)
    expect(curve).to_contain_text("denoising step")
    expect(page.locator("#value-axis")).to_contain_text("shapes_verifier: share of images")
    page.get_by_text("The values as a table").click()
    table = page.get_by_role("table")
    expect(table.get_by_role("row")).to_have_count(61)
    expect(table.get_by_role("row").first).to_have_text("Stepbasetrainedsteered")
    page.get_by_label("Reward", exact=True).select_option("jpeg_compressibility")
    expect(page.get_by_role("img", name="The critic's value of jpeg_compressibility")).to_contain_text("steered -")
    expect(page.locator("#value-axis")).to_contain_text("jpeg_compressibility: minus kB")


def test_what_is_wrong_is_reported_beside_its_field(visit: Visit) -> None:
    """In the server's words, with the remedy; the first of them has the focus, and typing takes the mark away."""
    page = visit()
    prompt, steps = page.get_by_role("textbox", name="Prompt"), page.get_by_label("Steps", exact=True)
    prompt.fill("")
    steps.fill("999")
    page.get_by_label("Seed", exact=True).fill("seven")
    steering_weight(page).fill("1000")
    page.get_by_role("button", name="Generate", exact=True).click()
    expect(status(page)).to_contain_text("None of 3 images generated")
    expect(prompt).to_be_focused()
    for control, found in (
        (prompt, r"prompt = \"\": .+\. Write what the image shall show\."),
        (steps, r"num_steps = 999: is above this model's limit\. Use at most 100\."),
        (page.get_by_label("Seed", exact=True), r"seed = \"seven\": .+\. Use a whole number from 0"),
        (steering_weight(page), r"steering\.shapes_verifier = 1000: is too strong\. Use a number"),
    ):
        expect(control).to_have_attribute("aria-invalid", "true")
        expect(control).to_have_accessible_description(re.compile(found))
    page.keyboard.type("a red circle")
    expect(prompt).not_to_have_attribute("aria-invalid", "true")
    expect(page.get_by_text("Write what the image shall show")).to_be_hidden()
    expect(steps).to_have_attribute("aria-invalid", "true")
    steps.fill("4")
    page.get_by_label("Seed", exact=True).fill("7")
    steering_weight(page).fill("1")
    draw(page)
    expect(page.locator("[aria-invalid=true]")).to_have_count(0)


def test_a_link_leads_to_the_same_images(visit: Visit) -> None:
    """In another browser, with every setting, once they are drawn; the seed has more digits than a number of
    JavaScript."""
    page = visit()
    page.get_by_label("Seed", exact=True).fill("9223372036854775807")
    page.get_by_label("Method", exact=True).select_option("resampling")
    page.get_by_label("Particles", exact=True).fill("3")
    page.get_by_label("Steps", exact=True).fill("6")
    page.get_by_label("Guidance scale (CFG)", exact=True).fill("2.5")
    steering_weight(page).fill("3.75")
    steering_weight(page, "jpeg_compressibility").fill("-0.5")
    draw(page, "“a” & 5% <b>")
    link = page.get_by_role("textbox", name="A link to these settings").input_value()
    assert page.url == link
    other = visit(link[link.index("#") :])
    other.get_by_role("button", name="Generate", exact=True).click()
    expect(status(other)).to_contain_text("3 images generated in", timeout=DRAW_MS)
    assert images(other) == images(page)
    expect(other.get_by_label("Particles", exact=True)).to_have_value("3")
    assert other.get_by_label("Seed", exact=True).input_value() == "9223372036854775807"
    assert other.get_by_role("textbox", name="A link to these settings").input_value() == link
    expect(other.get_by_role("alert")).to_be_hidden()


def test_a_link_to_another_model_says_so(visit: Visit) -> None:
    """What it asks for and this model has not, or that the images may differ."""
    page = visit("#prompt=a+red+circle&num_steps=2&steering.beauty=2&method=magic")
    expect(page.get_by_role("alert")).to_have_text(
        "The link has settings that this model does not have: the method magic, a weight for beauty."
    )
    page = visit("#prompt=a+red+circle&num_steps=2&version=other")
    expect(page.get_by_role("alert")).to_contain_text(
        "The link was made with version other; this is version some-version."
    )


def test_a_link_draws_nothing_by_itself(visit: Visit) -> None:
    """Any website may open one, and lead a page that it has opened to the next one, without the person's doing."""
    asked: list[str] = []
    page = visit("#prompt=a+red+circle&num_steps=2")
    page.on("request", lambda request: asked.append(request.method))
    expect(status(page)).to_contain_text("press Generate")
    expect(page.get_by_role("textbox", name="Prompt")).to_have_value("a red circle")
    page.evaluate("location.hash = 'prompt=a+blue+circle&num_steps=2'")
    expect(page.get_by_role("textbox", name="Prompt")).to_have_value("a blue circle")
    expect(status(page)).to_contain_text("press Generate")
    page.wait_for_timeout(500)  # in which it would have asked
    assert "POST" not in asked
    expect(page.get_by_text("Not generated yet")).to_have_count(3)


def test_without_a_seed_the_page_takes_a_new_one(visit: Visit) -> None:
    """The same for all three images, shown and in the link; so two draws give two images."""
    page = visit()
    seed, found = page.get_by_label("Seed", exact=True), []
    for _ in range(2):
        seed.fill("")
        draw(page, "a red circle")
        expect(seed).to_have_value(re.compile(r"^\d+$"))
        assert f"seed={seed.input_value()}" in page.url
        found.append((seed.input_value(), images(page)["trained"]))
    assert found[0][0] != found[1][0]
    assert found[0][1] != found[1][1]


def test_earlier_draws_come_back(visit: Visit) -> None:
    """With their settings and images, undrawn, and also after the page was loaded again; until they are forgotten."""
    page = visit()
    page.get_by_label("Steps", exact=True).fill("4")
    draw(page, "a red circle")
    first = images(page)
    page.get_by_role("button", name="New seed").click()
    draw(page, "a blue square")
    second = images(page)
    assert first["trained"] != second["trained"]
    earlier = page.get_by_role("region", name="Earlier draws").get_by_role("listitem").get_by_role("button")
    expect(earlier).to_have_count(2)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.method))
    earlier.filter(has=page.get_by_alt_text("a red circle, seed 0")).click()
    expect(page.get_by_role("textbox", name="Prompt")).to_have_value("a red circle")
    expect(page.get_by_label("Seed", exact=True)).to_have_value("0")
    assert images(page) == first
    assert "POST" not in asked
    page.goto(page.url.partition("#")[0])
    expect(earlier).to_have_count(2)
    earlier.first.click()
    expect(page.get_by_role("textbox", name="Prompt")).to_have_value("a blue square")
    assert images(page) == second
    page.get_by_role("button", name="Delete them").click()
    expect(earlier).to_have_count(0)


def test_the_keyboard_is_enough(visit: Visit) -> None:
    """Tab leads from the prompt to the weight, arrows turn it, Enter draws; one sees where one is all the way."""
    page = visit()

    def tab_to(target: Locator) -> None:
        for _ in range(40):
            page.keyboard.press("Tab")
            assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
            if target.evaluate("node => node === document.activeElement"):
                return
        pytest.fail("Tab never led there")

    tab_to(page.get_by_role("textbox", name="Prompt"))
    page.keyboard.press("Control+a")
    page.keyboard.type("a green triangle")
    slider = page.get_by_role("slider", name="Weight of shapes_verifier")
    tab_to(slider)
    before = float(steering_weight(page).input_value())
    page.keyboard.press("ArrowRight")
    assert float(steering_weight(page).input_value()) > before
    expect(slider).to_have_attribute("aria-valuetext", f"{steering_weight(page).input_value()} standard deviations")
    page.keyboard.press("Enter")
    expect(status(page)).to_contain_text("3 images generated in", timeout=DRAW_MS)
    expect(page.get_by_alt_text("steered: a green triangle")).to_be_visible()
    expect(slider).to_be_focused()


def test_stop_stops(visit: Visit) -> None:
    """By the button or by Escape; the server has then time for the next draw at once."""
    page = visit()
    stop = page.get_by_role("button", name="Stop")
    for way in (stop.click, lambda: page.keyboard.press("Escape")):
        page.get_by_label("Steps", exact=True).fill("100")
        page.get_by_role("textbox", name="Prompt").press("Enter")
        expect(page.locator("figure .state", has_text="Step").first).to_be_visible(timeout=DRAW_MS)
        way()
        expect(status(page)).to_have_text("Stopped.")
        expect(page.locator("figure .state")).to_have_text(["Stopped"] * 3)
        expect(stop).to_be_hidden()
    expect(page.get_by_role("button", name="Generate", exact=True)).to_be_enabled()
    page.get_by_label("Steps", exact=True).fill("2")
    draw(page)


def test_a_busy_server_is_asked_again(visit: Visit) -> None:
    """After the time that it names, told as it passes."""
    page = visit()
    refused: list[str] = []

    def busy(route: Route) -> None:
        if len(refused) < 3:
            refused.append(route.request.url)
            route.fulfill(
                status=429, headers={"Retry-After": "2"}, json={"error": "The queue is full.", "problems": []}
            )
        else:
            route.continue_()

    page.route("**/v1/images/stream", busy)
    page.get_by_label("Steps", exact=True).fill("2")
    page.get_by_role("textbox", name="Prompt").press("Enter")
    expect(page.locator("figure[data-arm=base] .state")).to_have_text(re.compile(r"busy\. Trying again in [12] s"))
    expect(status(page)).to_contain_text("3 images generated in", timeout=DRAW_MS)


def test_a_server_that_is_gone_is_reported(browser: Browser, server: ServerProcess) -> None:
    """When the page is opened, where trying again is one press; and while one draws, with what has broken."""
    images = "**/v1/images/*"
    with browser.new_context() as context:
        page = context.new_page()
        alert, button = page.get_by_role("alert"), page.get_by_role("button", name="Generate", exact=True)
        page.route(images, lambda route: route.abort())
        page.goto(server.address)
        expect(alert).to_contain_text("The server cannot be reached")
        expect(button).to_be_disabled()
        page.unroute(images)
        page.get_by_role("button", name="Try again").click()
        expect(button).to_be_enabled()
        expect(alert).to_be_hidden()
        for code, body, found in (
            (500, "oh", "The server answered 500"),
            (200, "event: queued\ndata: {}\n\n", "The connection ended before the image was complete"),
            (200, "event: step\ndata: {\n\n", "The connection to the server was lost"),
        ):
            page.route(images, partial(Route.fulfill, status=code, body=body))
            button.click()
            expect(alert).to_contain_text(found)
            expect(status(page)).to_contain_text("None of 3 images generated")
            page.unroute(images)


def test_the_curl_line_makes_the_steered_image(visit: Visit, tmp_path: Path) -> None:
    """Pasted into a shell as it is, with quotes in the prompt; a refusal is told there too."""
    page = visit()
    page.get_by_label("Steps", exact=True).fill("4")
    steering_weight(page).fill("2")
    draw(page, """it's "$A" `id` \\""")
    line = page.get_by_role("textbox", name="The steered image with curl")
    subprocess.run(["bash", "-c", line.input_value()], cwd=tmp_path, check=True, timeout=120)
    assert (tmp_path / "image.png").read_bytes() == base64.b64decode(images(page)["steered"].partition(",")[2])
    page.get_by_label("Steps", exact=True).fill("999")
    done = subprocess.run(["bash", "-c", line.input_value()], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, "above this model's limit" in done.stderr) == (1, True)


@pytest.mark.parametrize("colour_scheme", ["light", "dark"])
def test_a_phone_and_a_reader_can_use_it(visit: Visit, colour_scheme: str) -> None:
    """At 360 pixels nothing leaves the screen, before and after a draw and with an error; each control has a name, each
    text the contrast of WCAG AA."""
    page = visit(viewport={"width": 360, "height": 740}, color_scheme=colour_scheme, reduced_motion="reduce")

    def check() -> None:
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        for control in page.locator(CONTROLS).all():
            if control.is_visible():
                expect(control).to_have_accessible_name(re.compile(r"\S"))
        poor = [(text, round(contrast, 2)) for text, contrast in page.evaluate(CONTRASTS) if contrast < 4.5]
        assert not poor

    check()
    page.get_by_label("Steps", exact=True).fill("4")
    page.get_by_label("Method", exact=True).select_option("best_of_n")
    draw(page)
    page.get_by_text("The values as a table").click()
    check()
    page.get_by_role("textbox", name="Prompt").fill("long" * 300)
    page.get_by_role("button", name="Generate", exact=True).click()
    expect(page.get_by_text("has 1200 characters")).to_be_visible()
    check()
    identifiers = page.locator("[id]").evaluate_all("nodes => nodes.map((node) => node.id)")
    assert len(identifiers) == len(set(identifiers))


@pytest.mark.parametrize("width", [360, 980, 1180, 1600])
def test_nothing_sticks_out_of_its_section(visit: Visit, width: int) -> None:
    """Controls end where their section ends, in one column and in two."""
    page = visit(viewport={"width": width, "height": 900})
    outside = page.locator(CONTROLS).evaluate_all(
        """controls => controls.map(one => [one, one.closest("section, fieldset, form")])
            .filter(([one, part]) => part && one.offsetParent)
            .filter(([one, part]) => one.getBoundingClientRect().right > part.getBoundingClientRect().right + 1)
            .map(([one]) => one.id || one.textContent)"""
    )
    assert outside == []

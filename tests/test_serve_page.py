"""The page in a browser, end to end: what is picked is drawn, seen being drawn, and to the bit."""

from __future__ import annotations

import re

import pytest
from serve_cases import app, chromium, decoded, idle, model, over, pixels_of, running
from session_cases import SECONDS, Gated, wait_for
from starlette.applications import Starlette
from starlette.routing import Mount

from ddpm_fast.serving import Limits

playwright = pytest.importorskip("playwright.sync_api")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(chromium() is None, reason="no Chromium here; CHROMIUM names one"),
]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(
            executable_path=chromium(),
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Opens pages; at the end of a test none of them has said anything, or asked elsewhere."""
    contexts, said = [], []

    def open_page(url, **options):
        context = browser.new_context(**options)
        contexts.append(context)
        context.set_default_timeout(1000 * SECONDS)
        page = context.new_page()
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("console", lambda message: said.append(message.text))
        page.on(
            "request",
            lambda request: (
                None if request.url.startswith((origin, "blob:")) else said.append(request.url)
            ),
        )
        origin = re.match(r"http://[^/]+/", url)[0]
        page.goto(url)
        page.locator("#about:not(:empty)").wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    # The browser's own words: of requests that were refused, of these tests' looks at pixels
    of_itself = ("Failed to load resource", "Canvas2D: Multiple readback operations")
    assert [line for line in said if not line.startswith(of_itself)] == []


@pytest.fixture
def server():
    with running(app(name="a zoo")) as client:
        yield f"{client.base_url}/"


def picture(page, tile=0):
    """Of a tile as it is shown: [H, W] of bytes in a list."""
    return (
        page.locator(".tile canvas")
        .nth(tile)
        .evaluate("c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]")
    )


def shown(image):
    """The same of an image, opaque."""
    height, width, _ = image.shape
    flat = image.reshape(height * width, 3).tolist()
    return [value for pixel in flat for value in (*pixel, 255)]


def test_images_are_drawn_live_and_end_as_those_of_programs(open_page):
    gate = Gated(model)
    application = app(gate)
    with running(application) as client:
        page = open_page(f"{client.base_url}/")
        assert page.title() == "a model · ddpm-fast"
        page.select_option("#class", label="a bird")
        page.fill("#seed", str(2**64 - 1))
        page.fill("#sample_ids", "4711-4712, 7")
        page.fill("#steps", "50")
        page.click("#draw")
        tiles = page.locator(".tile")
        gate.let(2)
        tiles.nth(2).wait_for()
        assert tiles.count() == 3
        seen = [[0] * 80]

        def shows_another_step():
            page.wait_for_timeout(100)
            if picture(page) not in seen:
                return True
            gate.let()  # a frame is of a step that begins after the server has asked for it
            return False

        for _ in range(3):
            wait_for(shows_another_step)
            seen.append(picture(page))
        step = page.locator("progress").first.evaluate("bar => bar.value")
        assert 0 < step < 50
        assert page.locator(".tile.done").count() == 0
        assert page.locator("#cancel").is_enabled()
        gate.open()
        page.locator(".tile.done").nth(2).wait_for()
        assert "Drew 3 images" in page.inner_text("#told")
        assert page.locator("#cancel").is_disabled()
        for tile, i in enumerate((4711, 4712, 7)):
            assert picture(page, tile) == shown(pixels_of(2**64 - 1, i, 3, 50))
            caption = tiles.nth(tile).inner_text().replace("\u00a0", " ")
            for part in (f"Image {i}", "class a bird", f"seed {2**64 - 1}", "50 steps"):
                assert part in caption
            with page.expect_download() as download:
                tiles.nth(tile).get_by_text("Save").click()
            file = download.value.path().read_bytes()
            asked = {"seed": 2**64 - 1, "sample_ids": [i], "class": 3, "steps": 50, "format": "png"}
            assert file == client.post("/api/images", json=asked).content
            address = tiles.nth(tile).locator(".caption a").get_attribute("href")
            assert client.get(address).content == file


def test_each_class_in_turn_with_guidance(open_page, server):
    page = open_page(server)
    assert page.input_value("#sample_ids") == "0-3"
    assert page.input_value("#steps") == "10"
    page.fill("#guidance_scale", "2,5")
    page.keyboard.press("Enter")
    page.locator(".tile.done").nth(3).wait_for()
    for tile in range(4):
        assert picture(page, tile) == shown(pixels_of(0, tile, tile, 10, 2.5))


def test_a_view_is_in_its_address_and_can_be_shared(open_page, server):
    page = open_page(server)
    page.select_option("#class", label="dog")
    page.fill("#seed", "12")
    page.fill("#sample_ids", "5")
    page.fill("#steps", "7")
    page.get_by_text("the state").click()
    page.click("#draw")
    page.locator(".tile.done").wait_for()
    other = open_page(page.url)
    other.locator(".tile.done").wait_for()  # without a click
    assert picture(other) == picture(page) == shown(pixels_of(12, 5, 1, 7))
    for field in ("class", "seed", "sample_ids", "steps"):
        assert other.input_value(f"#{field}") == page.input_value(f"#{field}")
    assert other.locator("input[value=x_t]").is_checked()


def test_its_states_can_be_seen_again_and_either_of_the_two(open_page):
    with running(app(lambda x, t, class_labels: over(t.to(x.dtype) / 50, x) + 0 * x)) as client:
        page = open_page(f"{client.base_url}/?sample_ids=3&steps=50&seed=4")
        page.locator(".tile.done").wait_for()
        final = picture(page)
        move = "(slider, to) => { slider.value = to; slider.dispatchEvent(new Event('input')); }"
        page.locator("#time").evaluate(move, 300)
        if page.locator(".tile.done").count() == 0:  # a frame came on the way
            guess = picture(page)
            page.get_by_text("the state").click()
            assert picture(page) != guess
        page.locator("#time").evaluate(move, 1000)
        page.locator(".tile.done").wait_for()
        assert picture(page) == final


def test_a_cancelled_request_is_given_up(open_page):
    gate = Gated(model)
    application = app(gate)
    service = application.state.service
    with running(application) as client:
        page = open_page(f"{client.base_url}/")
        page.click("#draw")
        gate.let(2)
        page.locator(".tile").nth(3).wait_for()
        page.keyboard.press("Escape")
        page.locator(".tile.cancelled").nth(3).wait_for()
        wait_for(lambda: service.requests == 0)
        gate.open()
        wait_for(lambda: idle(service))
        assert service.status()["drawn"] == 0
        assert page.inner_text("#told") == "Cancelled"
        page.click("#draw")
        page.locator(".tile.done").nth(3).wait_for()


def test_a_page_that_is_closed_is_given_up(open_page):
    gate = Gated(model)
    application = app(gate)
    service = application.state.service
    with running(application) as client:
        page = open_page(f"{client.base_url}/")
        page.click("#draw")
        gate.reached()
        wait_for(lambda: service.drawing == 1)
        page.close()
        wait_for(lambda: service.requests == 0)
        gate.open()
        wait_for(lambda: idle(service))
        wait_for(lambda: service.status()["cancelled"] == 4)


MISTAKES = [
    ("seed", "-3", "18446744073709551615"),
    ("seed", "a", "Must be an integer"),
    ("steps", "51", "1 … 50"),
    ("sample_ids", "0-12", "at most 12 images"),
    ("sample_ids", "", "at least one number"),
    ("sample_ids", "5-3", "goes upwards"),
    ("sample_ids", str(2**63), "9223372036854775807"),
    ("guidance_scale", "much", "Must be a number"),
    ("guidance_scale", "1e999", "Must be a number"),
    ("guidance_scale", "Infinity", "Must be a number"),
    ("guidance_scale", "0x10", "Must be a number"),
    ("guidance_scale", "1000", "-100 … 100"),
]


def test_mistakes_are_told_beside_their_field(open_page, server):
    page = open_page(server)
    for field, value, said in MISTAKES:
        before = page.input_value(f"#{field}")
        page.fill(f"#{field}", value)
        page.click("#draw")
        error = page.locator(f"#{field}-error:not(:empty)")
        error.wait_for()
        assert said in error.inner_text()
        assert page.locator(".error:not(:empty)").count() == 1
        assert page.get_attribute(f"#{field}", "aria-invalid") == "true"
        assert f"{field}-error" in page.get_attribute(f"#{field}", "aria-describedby")
        assert page.locator(":focus").get_attribute("id") == field
        page.fill(f"#{field}", before)
    page.click("#draw")
    page.locator(".tile.done").first.wait_for()
    assert page.locator("[aria-invalid]").count() == 0
    assert page.locator(".error:not(:empty)").count() == 0


def test_where_there_is_no_room_the_page_says_so(open_page):
    gate = Gated(model)
    with running(app(gate, Limits(max_batch=2, max_waiting=0))) as client:
        page, other = open_page(f"{client.base_url}/"), open_page(f"{client.base_url}/")
        page.click("#draw")
        gate.reached()
        other.fill("#seed", "1")
        other.click("#draw")
        other.locator("#error:not(:empty)").wait_for()
        assert "No room for 2 images" in other.inner_text("#error")
        gate.open()
        page.locator(".tile.done").nth(1).wait_for()


def test_a_model_that_fails_is_told_on_the_tile(open_page):
    def spoiled(x, t, class_labels):
        return model(x, t, class_labels) / (over(class_labels.to(x.dtype), x) != 1).to(x.dtype)

    with running(app(spoiled)) as client:
        page = open_page(f"{client.base_url}/")
        page.click("#draw")
        page.locator(".tile.done").nth(2).wait_for()
        page.locator(".tile.failed").wait_for()
        assert page.locator(".tile").nth(1).get_attribute("class") == "tile failed"


def test_a_server_that_goes_away_is_told_where_the_state_is(open_page):
    gate = Gated(model)
    with running(app(gate)) as client:
        page = open_page(f"{client.base_url}/")
        page.click("#draw")
        gate.let(2)
        page.locator(".tile").nth(3).wait_for()
        gate.open()
        page.route("**/api/**", lambda route: route.abort())  # none is heard of any more
        page.locator(".tile.done").nth(3).wait_for()
        page.click("#draw")
        page.get_by_text("The server went away").first.wait_for()
        assert page.inner_text("#told") == "The server went away"
        page.locator("#load.bad").wait_for()


def test_a_page_without_its_model_offers_to_try_again(browser, server):
    page = browser.new_page()
    try:
        page.route("**/api/model", lambda route: route.abort())
        page.goto(server)
        page.locator("#again").wait_for()
        assert "does not answer" in page.inner_text("#error")
        page.unroute("**/api/model")
        page.click("#again")
        page.locator("#about:not(:empty)").wait_for()
        assert page.locator("#again").is_hidden()
        assert page.inner_text("#error") == ""
    finally:
        page.close()


TOO_WIDE = """() => [...document.querySelectorAll(".tile, .tile .caption, form, header")]
    .filter((each) => each.scrollWidth > each.clientWidth + 1).map((each) => each.outerHTML)"""
COLOURS = """() => ["body", "form", ".address", "#about", "#draw"].map((name) => {
    const element = document.querySelector(name);
    const back = (each) => getComputedStyle(each).backgroundColor;
    let behind = element;
    while (back(behind) === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
    return [getComputedStyle(element).color, back(behind)];
})"""


def test_it_fits_and_can_be_read(open_page, server):
    page = open_page(f"{server}?sample_ids=0-11&seed={2**64 - 1}&guidance_scale=1.5")
    page.locator(".tile.done").nth(11).wait_for()
    for width in (320, 480, 768, 1280):
        page.set_viewport_size({"width": width, "height": 700})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(TOO_WIDE) == []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for ink, paper in page.evaluate(COLOURS):
            assert contrast(ink, paper) >= 4.5


def contrast(*colours):
    """WCAG 2's, of two CSS colours."""
    levels = []
    for colour in colours:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        levels.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(levels) + 0.05) / (min(levels) + 0.05)


def test_all_of_it_by_keyboard_and_with_a_name(open_page, server):
    page = open_page(server)
    page.click("#draw")
    page.locator(".tile.done").nth(3).wait_for()
    page.locator("h1").click()
    reached = set()
    for _ in range(24):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate("document.activeElement.id || document.activeElement.textContent")
        )
    wanted = {"class", "sample_ids", "seed", "dice", "steps", "steps-slider", "guidance_scale"}
    assert wanted | {"draw", "time", "Save", "Copy link"} <= reached
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("input, select, button, canvas, progress")]
            .filter((each) => !each.labels?.length && !each.getAttribute("aria-label")
                && !each.textContent.trim()).map((each) => each.outerHTML)"""
    )
    assert nameless == []
    assert page.locator("#told").get_attribute("role") == "status"
    label = page.locator("canvas").nth(1).get_attribute("aria-label")
    assert label == "Image 1 · class dog: finished"


def test_without_classes_and_guidance_their_fields_are_not_there(open_page):
    with running(app(lambda x, t: 0.5 * x, classes=None, guidance=False)) as client:
        page = open_page(f"{client.base_url}/")
        assert page.locator("#class-field").is_hidden()
        assert page.locator("#guidance_scale-field").is_hidden()
        page.click("#draw")
        page.locator(".tile.done").nth(7).wait_for()
        assert "class" not in page.inner_text("#tiles")
        (image,) = client.post("/api/images", json={}).json()["images"]
        assert picture(page) == shown(decoded(image["png"]))


def test_another_seed_at_a_click_and_a_link_to_copy(open_page, server):
    page = open_page(server, permissions=["clipboard-read", "clipboard-write"])
    page.fill("#sample_ids", "3")
    page.click("#dice")
    page.locator(".tile.done").wait_for()
    seed = page.input_value("#seed")
    assert seed != "0"
    page.get_by_text("Copy link").click()
    page.get_by_text("Copied").wait_for()
    url = page.evaluate("navigator.clipboard.readText()")
    assert url.startswith(f"{server}api/images/{seed}/3.png?")


def test_under_a_prefix_as_a_part_of_another_application(open_page):
    outer = Starlette(routes=[Mount("/draw", app(allowed_hosts=None))])
    outer.state.service = outer.routes[0].app.state.service
    with running(outer) as client:
        page = open_page(f"{client.base_url}/draw/?sample_ids=2")
        page.locator(".tile.done").wait_for()
        assert picture(page) == shown(pixels_of(0, 2, 2, 10))
        with page.expect_popup() as popup:
            page.get_by_text("Image 2").click()
        popup.value.wait_for_load_state()
        assert "/draw/api/images/0/2.png" in popup.value.url
        assert popup.value.title().startswith("2.png")

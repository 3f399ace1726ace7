"""Recordings and their player: the format, the static figure, and the canvas in a real browser."""

import base64
import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from flserving.api.doctor import find_chromium
from flserving.errors import ConfigError
from flserving.lab import style
from flserving.lab.queueing.simulate import simulate_batching
from flserving.lab.widgets import player as player_module
from flserving.lab.widgets.player import Player, play
from flserving.lab.widgets.recording import (
    Box,
    Frame,
    Recording,
    batch_recording,
    cache_recording,
    draw_frame,
)

GROWING = Recording(
    lanes=("worker 0", "worker 1"),
    frames=tuple(Frame(f"{now} ms", now=float(now)) for now in (0, 4, 10)),
    x_label="time (ms)",
    boxes=(
        Box("worker 0", 0, 6, "3", "batch"),
        Box("worker 1", 2, 10, "8", "full"),
        Box("worker 0", 7, 9, "1", "batch"),
    ),
)
CACHE = cache_recording(
    [
        ("a", False, "a"),
        ("b", False, "ab"),
        ("a", True, "ba"),
        ("c", False, "ac"),
        ("d", False, "cd"),
    ],
    capacity=2,
)


# ------------------------------------------------------------------------------------------- format


def test_boxes_of_the_recording_grow_with_now():
    extents = [[(box.start, box.end) for box in GROWING.visible(index)] for index in range(3)]
    assert extents == [[(0, 0)], [(0, 4), (2, 4)], [(0, 6), (2, 10), (7, 9)]]
    whole = Recording(GROWING.lanes, (Frame("all"),), "time (ms)", GROWING.boxes)
    assert whole.visible(0) == list(GROWING.boxes)


def test_kinds_keep_their_colours_and_can_be_ordered():
    assert list(GROWING.colours().items()) == [
        ("batch", style.COLOURS[0]),
        ("full", style.COLOURS[1]),
    ]
    ordered = Recording(GROWING.lanes, GROWING.frames, "t", GROWING.boxes, kinds=("full",))
    assert list(ordered.colours()) == ["full", "batch"]


def test_extent_comes_from_the_boxes_or_is_given():
    assert GROWING.extent() == (0, 10)
    assert Recording(("a",), (Frame("f"),), "t").extent() == (0, 1)
    assert Recording(("a",), (Frame("f", (Box("a", 3, 3),)),), "t").extent() == (3, 4)
    assert Recording(("a",), (Frame("f"),), "t", x_range=(2, 9)).extent() == (2, 9)


def test_as_dict_is_json_and_refers_by_number():
    packed = json.loads(json.dumps(GROWING.as_dict()))
    assert packed["lanes"] == ["worker 0", "worker 1"] and packed["x_range"] == [0, 10]
    assert packed["kinds"] == [["batch", style.COLOURS[0]], ["full", style.COLOURS[1]]]
    assert packed["boxes"][1] == [1, 2, 10, "8", 1, ""]
    assert packed["frames"][1] == {"caption": "4 ms", "now": 4.0, "boxes": []}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": ()}, "0 frames"),
        ({"lanes": ()}, "at least one of each"),
        ({"lanes": ("a", "a")}, "no lane twice"),
        ({"boxes": (Box("b", 0, 1),)}, r"lies in no lane: the lanes are \('a',\)"),
        ({"boxes": (Box("a", 1, 0),)}, "no extent"),
        ({"frames": (Frame("f", (Box("a", 0, float("nan")),)),)}, "no extent"),
        ({"boxes": (Box("a", 0, 1),) * 20_001}, "20001 boxes"),
        ({"frames": (Frame("f"),) * 2001}, "in 2001 frames"),
    ],
)
def test_a_broken_recording_is_refused(change, message):
    good = {"lanes": ("a",), "frames": (Frame("f"),), "x_label": "t"}
    with pytest.raises(ConfigError, match=message):
        Recording(**good | change)


# ----------------------------------------------------------------------------------------- builders


def test_cache_recording_tells_hits_misses_and_evictions():
    assert [frame.caption for frame in CACHE.frames] == [
        "before the first request: the cache is empty",
        "request 1: a is a miss, loaded",
        "request 2: b is a miss, loaded",
        "request 3: a is a hit",
        "request 4: c is a miss, loaded; b evicted",
        "request 5: d is a miss, loaded; a evicted",
    ]
    assert CACHE.frames[3].boxes == (
        Box("in memory", 0, 1, "b", "kept", "b"),
        Box("in memory", 1, 2, "a", "hit", "a"),
    )
    assert CACHE.frames[4].boxes[-1] == Box("evicted", 0, 1, "b", "evicted", "b")
    assert CACHE.extent() == (0, 2)
    assert cache_recording([], 3).extent() == (0, 3)


def test_batch_recording_shows_what_was_simulated():
    arrival_s = np.array([0.0, 0.001, 0.002, 0.003, 0.02])
    trace = simulate_batching(arrival_s, lambda n: 0.01, max_batch_size=3)
    recording = batch_recording(trace, max_batch_size=3)
    assert recording.lanes == ("arrivals", "worker 0")
    batches = [
        (box.start, box.end, box.label, box.kind)
        for box in recording.boxes
        if box.lane == "worker 0"
    ]
    assert batches == [
        (0, 10, "1", "part-filled batch"),
        (10, 20, "3", "full batch"),
        (20, 30, "1", "part-filled batch"),
    ]
    captions = {frame.now: frame.caption for frame in recording.frames}
    assert captions[3.0] == "3.0 ms: 3 waiting, 1 of 1 workers busy"
    assert captions[30.0] == "30.0 ms: 0 waiting, 0 of 1 workers busy"
    assert (
        batch_recording(simulate_batching(np.array([]), lambda n: 1.0), 3)
        .frames[0]
        .caption.startswith("0.0 ms")
    )


# ------------------------------------------------------------------------------------ static figure


def test_draw_frame_draws_the_visible_boxes():
    figure = draw_frame(GROWING, 1)
    (ax,) = figure.axes
    drawn = [
        (patch.get_x(), patch.get_x() + patch.get_width())
        for patch in ax.patches
        if patch.get_width()
    ]
    assert drawn == [(0, 4), (2, 4)]
    assert ax.get_title(loc="left") == "4 ms" and ax.get_xlabel() == "time (ms)"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["batch", "full"]
    assert [text.get_text() for text in ax.texts] == ["3", "8"]
    assert draw_frame(CACHE).axes[0].get_title(loc="left").startswith("request 5")


def test_long_labels_are_shortened_and_ticks_stay_visible():
    boxes = (
        Box("a", 0, 10, "a label that does not fit into its box", "x"),
        Box("a", 50, 50, "tick", "x"),
    )
    (ax,) = draw_frame(Recording(("a",), (Frame("f", boxes),), "t", x_range=(0, 100))).axes
    assert [text.get_text() for text in ax.texts] == ["a label…"]
    assert ax.patches[1].get_width() > 0


# ------------------------------------------------------------------------------------------- widget


def test_player_sends_the_recording_and_bounds_its_index():
    player = Player(GROWING, interval_ms=50)
    assert player.recording == GROWING.as_dict() and (player.index, player.playing) == (0, False)
    player.index = 99
    assert player.index == 2
    player.index = -1
    assert player.index == 0
    assert "export default" in player._esm and ".flserving-player" in player._css
    assert "http" not in player._esm + player._css  # no CDN


@pytest.mark.parametrize("interval_ms", [0, 10**6])
def test_player_refuses_a_pace_that_nobody_can_follow(interval_ms):
    with pytest.raises(ConfigError, match=f"interval_ms is {interval_ms}"):
        play(GROWING, interval_ms=interval_ms)


def test_static_switch_draws_every_frame_and_shows_nothing(monkeypatch):
    assert isinstance(play(GROWING), Player)
    monkeypatch.setenv("FLSERVING_STATIC", "1")
    drawn = []
    monkeypatch.setattr(
        player_module, "draw_frame", lambda r, index: drawn.append(index) or Figure()
    )
    assert play(GROWING) is None
    assert drawn == [0, 1, 2]


# ------------------------------------------------------------------------------------------ browser

MODEL = """
class Model {  // what anywidget hands to a view: get, set, save_changes, on, off; change events come at once
  constructor(state) { this.state = state; this.handlers = {}; this.saved = []; }
  get(name) { return this.state[name]; }
  set(name, value) {
    if (this.state[name] === value) return;
    this.state[name] = value;
    for (const handler of this.handlers['change:' + name] ?? []) handler();
  }
  save_changes() { this.saved.push(this.state.index); }
  on(event, handler) { (this.handlers[event] ??= []).push(handler); }
  off(event, handler) { this.handlers[event] = this.handlers[event].filter(known => known !== handler); }
}
window.start = async (source, recording, views) => {
  const { default: widget } = await import('data:text/javascript;base64,' + source);
  window.model = new Model({ recording, index: 0, playing: false, interval_ms: 60 });
  window.stopModel = widget.initialize({ model });
  window.stopViews = [];
  for (let i = 0; i < views; i++) {
    const el = document.body.appendChild(document.createElement('div'));
    window.stopViews.push(widget.render({ model, el }));
  }
};
window.area = (colour) => {  // pixels of this colour in the first canvas
  const canvas = document.querySelector('canvas');
  const [r, g, b] = [1, 3, 5].map(at => parseInt(colour.slice(at, at + 2), 16));
  const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
  let count = 0;
  for (let i = 0; i < data.length; i += 4) count += data[i] === r && data[i + 1] === g && data[i + 2] === b;
  return count;
};
"""


@pytest.fixture(scope="module")
def chromium():
    if find_chromium() is None:
        pytest.skip("no chromium: install it (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=find_chromium(), args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium):
    """``opened(recording, views=1, motion=False)``: the player's own files on a bare page, without
    JupyterLab."""
    folder, pages, errors = Path(player_module.__file__).parent, [], []

    def open_page(recording, views=1, motion=False):
        page = chromium.new_page(
            viewport={"width": 900, "height": 700},
            reduced_motion="no-preference" if motion else "reduce",
        )
        page.on("pageerror", lambda error: errors.append(str(error)))
        pages.append(page)
        page.set_content(
            f"<style>{(folder / 'player.css').read_text()}</style><body data-jp-theme-light=true></body>"
        )
        page.evaluate(MODEL + "null")
        source = base64.b64encode((folder / "player.js").read_bytes()).decode()
        page.evaluate(
            "([source, recording, views]) => start(source, recording, views)",
            [source, recording.as_dict(), views],
        )
        return page

    yield open_page
    for page in pages:
        page.close()
    assert not errors


def caption(page):
    return page.locator(".flserving-player-caption").first.inner_text()


def pixels(page):
    return page.locator("canvas").first.evaluate("canvas => canvas.toDataURL()")


@pytest.mark.browser
def test_buttons_slider_and_keys_move_through_the_frames(opened):
    page = opened(CACHE)
    assert caption(page) == "before the first request: the cache is empty"
    seen = {pixels(page)}
    for expected in ("request 1: a is a miss, loaded", "request 2: b is a miss, loaded"):
        page.get_by_role("button", name="Step forward").click()
        assert caption(page) == expected and pixels(page) not in seen
        seen.add(pixels(page))
    page.get_by_role("button", name="Step back").click()
    assert caption(page).startswith("request 1") and pixels(page) in seen
    page.get_by_role("slider", name="Frame").fill("4")
    assert caption(page).startswith("request 4") and page.get_by_text("5 / 6").is_visible()
    assert page.get_by_role("img", name="request 4: c is a miss").is_visible()
    assert page.get_by_role("slider").get_attribute("aria-valuetext").startswith("request 4")
    page.evaluate("window.leaked = 0; document.addEventListener('keydown', () => window.leaked++)")
    page.get_by_role("group", name="Player").focus()
    for key, index in (
        ("End", 5),
        ("ArrowRight", 5),
        ("ArrowLeft", 4),
        ("Home", 0),
        ("ArrowLeft", 0),
        ("ArrowRight", 1),
    ):
        page.keyboard.press(key)
        assert page.evaluate("model.get('index')") == index, key
    assert page.evaluate("window.leaked") == 0  # a notebook's shortcuts never see these keys
    page.keyboard.press("x")
    assert page.evaluate("window.leaked") == 1  # and keep all others
    assert page.evaluate("document.querySelector('[data-lm-suppress-shortcuts=true]') !== null")
    assert page.evaluate("model.saved.at(-1)") == 1  # the kernel is told


@pytest.mark.browser
def test_playing_steps_through_every_frame_once_and_stops_however_many_views(opened):
    page = opened(CACHE, views=2)
    page.evaluate("window.seen = []; model.on('change:index', () => seen.push(model.get('index')))")
    page.get_by_role("button", name="Play").first.click()
    page.wait_for_function("() => !model.get('playing')")
    assert page.evaluate("window.seen") == [1, 2, 3, 4, 5]
    assert (
        page.get_by_role("button", name="Play").count() == 2
        and page.get_by_role("button", name="Pause").count() == 0
    )
    page.get_by_role("group").first.focus()
    page.keyboard.press(" ")  # at the end: from the start again
    assert page.evaluate("window.seen[5]") == 0
    page.get_by_role("button", name="Step forward").first.click()  # whoever steps wants to look
    assert page.evaluate("model.get('playing')") is False


@pytest.mark.browser
def test_the_canvas_shows_the_boxes_of_the_frame_to_scale(opened):
    page = opened(GROWING)
    whole = []
    for index in range(3):
        page.evaluate(f"model.set('index', {index})")
        whole.append(
            [
                page.evaluate("colour => area(colour)", colour)
                for colour in GROWING.colours().values()
            ]
        )
    length = [
        [
            sum(box.end - box.start for box in GROWING.visible(index) if box.kind == kind)
            for kind in ("batch", "full")
        ]
        for index in range(3)
    ]
    per_ms = whole[2][1] / length[2][1]  # one box of 8 ms
    # corners and labels cost a little
    assert whole[1] == pytest.approx([per_ms * 4, per_ms * 2], rel=0.08)
    assert whole[2][0] == pytest.approx(per_ms * length[2][0], rel=0.08)


@pytest.mark.browser
def test_boxes_slide_to_their_new_place_and_end_where_they_belong(opened):
    still, moving = opened(CACHE), opened(CACHE, motion=True)
    for page in (still, moving):
        page.evaluate("model.set('index', 2)")
    moving.wait_for_timeout(400)
    assert pixels(still) == pixels(moving)
    at_once = [
        page.evaluate("model.set('index', 3), document.querySelector('canvas').toDataURL()")
        for page in (still, moving)
    ]
    assert at_once[0] != at_once[1]  # still where they were
    moving.wait_for_timeout(400)
    assert pixels(still) == pixels(moving)


@pytest.mark.browser
def test_colours_follow_the_theme_and_width_follows_the_cell(opened):
    page = opened(CACHE)
    light = pixels(page)
    page.add_style_tag(
        content="body { --jp-ui-font-color1: #fff; --jp-layout-color2: #333; --jp-border-color2: #666 }"
    )
    page.evaluate("document.body.dataset.jpThemeLight = 'false'")
    page.wait_for_function(
        "light => document.querySelector('canvas').toDataURL() !== light", arg=light
    )
    page.evaluate(
        "document.body.style.display = 'none'; document.body.dataset.jpThemeLight = 'true'"
    )  # as a new theme does
    page.evaluate("() => new Promise(requestAnimationFrame)")
    page.evaluate("document.body.style.display = ''")
    page.wait_for_timeout(100)
    wide = page.evaluate("document.querySelector('canvas').width")
    assert wide == page.locator(".flserving-player").bounding_box()["width"] - 8
    page.set_viewport_size({"width": 500, "height": 700})
    page.wait_for_function(f"() => document.querySelector('canvas').width < {wide}")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


@pytest.mark.browser
def test_a_closed_view_leaves_nothing_behind(opened):
    page = opened(CACHE, views=2)
    own = page.evaluate("Object.values(model.handlers).flat().length")
    page.evaluate("stopViews.forEach(stop => stop())")
    left = page.evaluate("Object.values(model.handlers).flat().length")
    assert (own, left) == (2 + 2 * 3, 2)  # the clock's two handlers belong to the model
    page.evaluate("model.set('playing', true); stopModel(); window.at = model.get('index')")
    page.wait_for_timeout(200)
    assert page.evaluate("model.get('index') === window.at")


@pytest.mark.browser
def test_another_recording_replaces_the_first(opened):
    page = opened(CACHE)
    page.evaluate("model.set('index', 5)")  # more than the next one has frames
    page.evaluate("recording => model.set('recording', recording)", GROWING.as_dict())
    assert caption(page) == "10 ms" and page.get_by_text("3 / 3").is_visible()
    assert page.locator(".flserving-player-legend").inner_text().split() == ["batch", "full"]

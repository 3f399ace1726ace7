// Plays a recording (recording.py: Recording.as_dict) on a canvas. One clock per model, any number of views.
const LANE_PX = 40, AXIS_PX = 40, SLIDE_MS = 250;
const ICONS = {  // drawn, because not every system has a font with these signs
  back: "M4 2h2v12H4zM14 2v12L6 8z", forward: "M10 2h2v12h-2zM2 2v12l8-6z",
  play: "M3 2v12l11-6z", pause: "M3 2h4v12H3zM9 2h4v12H9z",
};

function element(tag, className, parent, attributes = {}) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  parent.append(made);
  return made;
}

function setIcon(button, name, title) {
  button.innerHTML = `<svg viewBox="0 0 16 16" width="12" height="12" aria-hidden="true"><path fill="currentColor" d="${ICONS[name]}"/></svg>`;
  button.title = title;
  button.setAttribute("aria-label", title);
}

function goTo(model, index) {
  const last = model.get("recording").frames.length - 1;
  model.set("index", Math.max(0, Math.min(last, index)));
  model.save_changes();
}

function toggle(model) {
  const playing = !model.get("playing");
  if (playing && model.get("index") >= model.get("recording").frames.length - 1) goTo(model, 0);
  model.set("playing", playing);
  model.save_changes();
}

// The boxes of a frame as {lane, start, end, label, kind, key}; those of the recording are cut at the frame's "now".
function boxesOf(recording, index) {
  const frame = recording.frames[index], now = frame.now ?? Infinity;
  const shared = recording.boxes.filter((box) => box[1] <= now).map((box) => [box[0], box[1], Math.min(box[2], now), ...box.slice(3)]);
  return [...shared, ...frame.boxes].map(([lane, start, end, label, kind, key]) => ({ lane, start, end, label, kind, key }));
}

// Boxes on their way: each keyed box between where it was and where it belongs (share 0 to 1).
function between(before, after, share) {
  const eased = 1 - (1 - share) ** 3;
  const was = new Map(before.filter((box) => box.key).map((box) => [box.key, box]));
  return after.map((box) => {
    const old = was.get(box.key);
    if (!old) return box;
    const mix = (name) => old[name] + (box[name] - old[name]) * eased;
    return { ...box, lane: mix("lane"), start: mix("start"), end: mix("end") };
  });
}

// Ticks at 1, 2 or 5 times a power of ten, about `wanted` of them.
function ticks(low, high, wanted) {
  const raw = (high - low) / Math.max(1, wanted), power = 10 ** Math.floor(Math.log10(raw));
  const round = power * [1, 2, 5, 10].find((factor) => factor * power >= raw * 0.999);
  const step = high - low >= 3 ? Math.max(1, round) : round; // places and requests are whole
  const found = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + 1e-9 * step; n++) found.push(Number((n * step).toPrecision(12)));
  return found;
}

function inkOn(colour) {
  const [red, green, blue] = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16) / 255);
  return 0.299 * red + 0.587 * green + 0.114 * blue > 0.45 ? "#000" : "#fff";
}

function fitted(context, text, width) {
  if (context.measureText(text).width <= width) return text;
  for (let length = text.length - 1; length > 0; length--) {
    const shorter = text.slice(0, length) + "…";
    if (context.measureText(shorter).width <= width) return shorter;
  }
  return "";
}

function paint(canvas, host, recording, boxes, now) {
  const theme = getComputedStyle(host), colour = (name) => theme.getPropertyValue(`--player-${name}`).trim();
  if (!host.clientWidth) return; // not laid out: hidden, or its theme is just being replaced
  const width = Math.max(200, host.clientWidth - 8), height = recording.lanes.length * LANE_PX + AXIS_PX;
  const scale = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  context.font = `12px ${theme.fontFamily}`;
  context.textBaseline = "middle";
  const left = 12 + Math.min(width / 4, Math.max(...recording.lanes.map((lane) => context.measureText(lane).width)));
  const right = width - 14, bottom = height - AXIS_PX;
  const [low, high] = recording.x_range, x = (value) => left + ((value - low) / (high - low)) * (right - left);

  recording.lanes.forEach((lane, number) => {
    context.fillStyle = colour("lane");
    context.fillRect(left, number * LANE_PX + 4, right - left, LANE_PX - 8);
    context.fillStyle = colour("text");
    context.textAlign = "right";
    context.fillText(fitted(context, lane, left - 10), left - 8, (number + 0.5) * LANE_PX);
  });
  context.textAlign = "center";
  for (const tick of ticks(low, high, (right - left) / 80)) {
    context.fillStyle = colour("line");
    context.fillRect(x(tick), 0, 1, bottom + 4);
    context.fillStyle = colour("faint");
    context.fillText(String(tick), x(tick), bottom + 13);
  }
  context.fillStyle = colour("faint");
  context.fillText(recording.x_label, (left + right) / 2, bottom + 30);
  for (const box of boxes) {
    const ink = recording.kinds[box.kind][1], from = x(box.start), top = box.lane * LANE_PX + 6;
    const wide = Math.max(2, x(box.end) - from - 1);
    context.fillStyle = ink;
    context.beginPath();
    context.roundRect(from, top, wide, LANE_PX - 12, Math.min(4, wide / 2));
    context.fill();
    context.fillStyle = inkOn(ink);
    if (box.label && wide > 8) context.fillText(fitted(context, box.label, wide - 6), from + wide / 2, top + LANE_PX / 2 - 6);
  }
  if (now !== null && now !== undefined) {
    context.fillStyle = colour("text");
    context.fillRect(x(now) - 0.5, 0, 1.5, bottom);
  }
}

function initialize({ model }) {
  let timer = null;
  const follow = () => {
    clearInterval(timer);
    if (!model.get("playing")) return;
    timer = setInterval(() => {
      goTo(model, model.get("index") + 1);
      if (model.get("index") < model.get("recording").frames.length - 1) return;
      model.set("playing", false);
      model.save_changes();
    }, model.get("interval_ms"));
  };
  model.on("change:playing", follow);
  model.on("change:interval_ms", follow);
  follow();
  return () => clearInterval(timer);
}

function render({ model, el }) {
  // JupyterLab's own shortcuts (space scrolls, arrows change cells) must not act on keys meant for the player.
  const host = element("div", "flserving-player", el, { tabindex: "0", role: "group", "aria-label": "Player", "data-lm-suppress-shortcuts": "true" });
  const bar = element("div", "flserving-player-bar", host);
  const back = element("button", "", bar, { type: "button" });
  const playButton = element("button", "", bar, { type: "button" });
  const forward = element("button", "", bar, { type: "button" });
  const slider = element("input", "", bar, { type: "range", min: "0", step: "1", "aria-label": "Frame" });
  const count = element("span", "flserving-player-count", bar);
  const caption = element("div", "flserving-player-caption", host, { "aria-live": "polite" });
  const canvas = element("canvas", "", host, { role: "img" });
  const legend = element("div", "flserving-player-legend", host);
  setIcon(back, "back", "Step back");
  setIcon(forward, "forward", "Step forward");

  const still = window.matchMedia("(prefers-reduced-motion: reduce)");
  let shown = [], animation = 0;
  const show = (slide) => {
    const recording = model.get("recording"), last = recording.frames.length - 1;
    const index = Math.min(model.get("index"), last), frame = recording.frames[index];
    slider.max = String(last);
    slider.value = String(index);
    slider.setAttribute("aria-valuetext", frame.caption);
    count.textContent = `${index + 1} / ${last + 1}`;
    caption.textContent = frame.caption;
    canvas.setAttribute("aria-label", frame.caption);
    cancelAnimationFrame(animation);
    const from = shown, to = boxesOf(recording, index), began = performance.now();
    const step = (time) => {
      const share = slide && !still.matches ? Math.min(1, Math.max(0, (time - began) / SLIDE_MS)) : 1;
      shown = between(from, to, share);
      paint(canvas, host, recording, shown, frame.now);
      if (share < 1) animation = requestAnimationFrame(step);
    };
    step(began);
  };
  const showButton = () => {
    const playing = model.get("playing");
    setIcon(playButton, playing ? "pause" : "play", playing ? "Pause" : "Play");
  };
  const showLegend = () => {
    legend.replaceChildren();
    for (const [kind, colour] of model.get("recording").kinds) {
      if (!kind) continue;
      const entry = element("span", "", legend);
      element("i", "", entry).style.background = colour;
      entry.append(kind);
    }
  };

  const stop = () => model.get("playing") && toggle(model);
  const jump = (index) => (stop(), goTo(model, index));
  back.onclick = () => jump(model.get("index") - 1);
  forward.onclick = () => jump(model.get("index") + 1);
  playButton.onclick = () => toggle(model);
  slider.oninput = () => jump(Number(slider.value));
  host.onkeydown = (event) => {
    const moves = { ArrowLeft: () => jump(model.get("index") - 1), ArrowRight: () => jump(model.get("index") + 1),
                    Home: () => jump(0), End: () => jump(Infinity), " ": () => toggle(model) };
    if (!moves[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === " " && event.target.tagName === "BUTTON") return; // a button answers the space bar itself
    event.preventDefault();
    event.stopPropagation();
    moves[event.key]();
  };

  const onIndex = () => show(true), onRecording = () => (showLegend(), show(false));
  model.on("change:index", onIndex);
  model.on("change:playing", showButton);
  model.on("change:recording", onRecording);
  const resized = new ResizeObserver(() => show(false));
  resized.observe(host);
  const themed = new MutationObserver(() => requestAnimationFrame(() => show(false))); // once the new theme is laid out
  themed.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light", "data-jp-theme-name", "class"] });
  showButton();
  showLegend();
  show(false);
  return () => {
    cancelAnimationFrame(animation);
    resized.disconnect();
    themed.disconnect();
    model.off("change:index", onIndex);
    model.off("change:playing", showButton);
    model.off("change:recording", onRecording);
  };
}

export default { initialize, render };

// A canvas to draw a digit on. This page itself asks the REST API for the probabilities; where it cannot, the kernel does.
const SIDE = 8, FULL = 16, BLOCK = 4, FINE = SIDE * BLOCK;  // a pixel counts the inked ones of its 4 x 4 finer pixels
const PEN = 2.5, CANVAS_PX = 256, TIMEOUT_MS = 5000;
const LOOPBACK = ["localhost", "127.0.0.1", "[::1]"];
const WAYS = { browser: "your browser asked the REST API", kernel: "the kernel asked for your browser" };

function element(tag, className, parent, attributes = {}) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  parent.append(made);
  return made;
}

// The ink: a bitmap of 32 x 32, as the people of the data set's images filled it.
function drawing() {
  const bits = new Uint8Array(FINE * FINE);
  const dot = (x, y) => {
    for (let row = Math.max(0, Math.floor(y - PEN)); row < Math.min(FINE, y + PEN); row++)
      for (let col = Math.max(0, Math.floor(x - PEN)); col < Math.min(FINE, x + PEN); col++)
        if (Math.hypot(col + 0.5 - x, row + 0.5 - y) <= PEN) bits[row * FINE + col] = 1;
  };
  const place = (pixel, number) => {  // index of the number-th finer pixel of a pixel
    const row = Math.floor(pixel / SIDE) * BLOCK + Math.floor(number / BLOCK);
    return row * FINE + (pixel % SIDE) * BLOCK + (number % BLOCK);
  };
  const numbers = [...Array(FULL).keys()], pixels = [...Array(SIDE * SIDE).keys()];
  return {
    line(from, to) {
      const steps = Math.ceil(Math.hypot(to[0] - from[0], to[1] - from[1]) * 2) || 1;
      for (let n = 0; n <= steps; n++) dot(...[0, 1].map((axis) => from[axis] + ((to[axis] - from[axis]) * n) / steps));
    },
    fill(pixel, ink) { numbers.forEach((number) => { bits[place(pixel, number)] = number < ink ? 1 : 0; }); },
    pixels: () => pixels.map((pixel) => numbers.reduce((ink, number) => ink + bits[place(pixel, number)], 0)),
  };
}

// Why this page cannot call the address, in plain words; "" if nothing speaks against it.
function obstacle(url) {
  const page = window.location, there = new URL(url);
  if (LOOPBACK.includes(there.hostname) && !LOOPBACK.includes(page.hostname))
    return `This page comes from ${page.hostname || "a program, not from a web address"}, and the endpoint listens only on the computer of the kernel: your browser cannot reach it.`;
  if (page.protocol === "https:" && there.protocol === "http:" && !LOOPBACK.includes(there.hostname))
    return "This page came over https, and a browser lets such a page call no http address.";
  return "";
}

async function fetchAnswer(url, headers, pixels) {
  const features = { name: "features", datatype: "FP32", shape: [1, pixels.length], data: pixels };
  const reply = await fetch(url, {
    method: "POST",
    headers: { ...headers, "Content-Type": "application/json" },
    body: JSON.stringify({ inputs: [features], outputs: [{ name: "probabilities" }] }),
    credentials: "omit",
    signal: AbortSignal.timeout(TIMEOUT_MS),
  });
  const said = await reply.json();
  if (!reply.ok) return { error: `The server answered ${reply.status}: ${said.error}` };
  return { version: said.model_version, probabilities: said.outputs[0].data };
}

function render({ model, el }) {
  const host = element("div", "flserving-draw", el, { role: "group", "aria-label": "Draw a digit", "data-lm-suppress-shortcuts": "true" });
  const left = element("div", "flserving-draw-left", host), right = element("div", "flserving-draw-right", host);
  const canvas = element("canvas", "", left, {
    tabindex: "0", role: "application",
    "aria-label": "Drawing of 8 by 8 pixels. Arrow keys move, space draws, with shift the arrows draw, delete erases.",
  });
  const buttons = element("div", "flserving-draw-buttons", left);
  const [clear, example, wayButton] = ["Clear", "Example", ""].map((text) => {
    const button = element("button", "", buttons, { type: "button" });
    button.textContent = text;
    return button;
  });
  const bars = [...Array(10).keys()].map((digit) => {
    const row = element("div", "flserving-draw-row", right);
    element("span", "", row).textContent = digit;
    const bar = element("i", "", element("div", "", row)), text = element("b", "", row);
    return (probability, best) => {
      row.classList.toggle("flserving-draw-best", best);
      bar.style.width = `${100 * (probability ?? 0)}%`;
      text.textContent = probability === undefined ? "" : `${Math.round(100 * probability)} %`;
    };
  });
  const status = element("div", "flserving-draw-status", right, { role: "status" });
  const note = element("div", "flserving-draw-note", host);

  const view = Math.random().toString(36).slice(2), ink = drawing();
  let cursor = [3, 3], last = null, shown = 0, requests = 0, hurdle = obstacle(model.get("url"));
  let way = hurdle ? "kernel" : "browser", headers = null, busy = false, dirty = false, closed = false, waiting = null;

  const paint = () => {
    const scale = window.devicePixelRatio || 1, theme = getComputedStyle(host), size = CANVAS_PX / SIDE;
    canvas.width = canvas.height = Math.round(CANVAS_PX * scale);
    const pen = canvas.getContext("2d"), colour = (name) => theme.getPropertyValue(`--draw-${name}`).trim();
    pen.scale(scale, scale);
    ink.pixels().forEach((value, pixel) => {
      const x = (pixel % SIDE) * size, y = Math.floor(pixel / SIDE) * size;
      pen.globalAlpha = 1;
      pen.fillStyle = colour("paper");
      pen.fillRect(x, y, size, size);
      pen.globalAlpha = value / FULL;
      pen.fillStyle = colour("text");
      pen.fillRect(x, y, size, size);
      pen.globalAlpha = 0.6;
      pen.strokeStyle = colour("line");
      pen.strokeRect(x + 0.5, y + 0.5, size - 1, size - 1);
    });
    if (document.activeElement !== canvas || !canvas.matches(":focus-visible")) return;
    pen.globalAlpha = 1;
    pen.lineWidth = 3;
    pen.strokeStyle = colour("browser");
    pen.strokeRect(cursor[0] * size + 2, cursor[1] * size + 2, size - 4, size - 4);
  };

  const showWay = () => {
    host.dataset.way = way;
    wayButton.textContent = way === "browser" ? "By the kernel" : "By the browser";
    note.textContent = way === "kernel" && hurdle ? `${hurdle} So the kernel asks, and sends the answer here.` : "";
  };
  const show = (answer, ms) => {
    const { version, probabilities = [], error } = answer, best = probabilities.indexOf(Math.max(...probabilities));
    bars.forEach((bar, digit) => bar(probabilities[digit], digit === best));
    status.setAttribute("role", error ? "alert" : "status");
    status.textContent = error ?? (ms === undefined ? "Draw a digit, as tall as the box." :
      `${best}, says version ${version}. Request ${requests}: ${WAYS[way]}, ${ms.toFixed(1)} ms there and back.`);
    if (!error) model.set("answer", ms === undefined ? {} : { way, version, prediction: best, probabilities, ms, requests });
  };

  const throughKernel = (pixels) => new Promise((resolve) => {
    const timer = setTimeout(() => waiting?.({ error: "No answer from the kernel: it is busy, or it was stopped." }), 2 * TIMEOUT_MS);
    waiting = (answer) => { clearTimeout(timer); waiting = null; resolve(answer); };
    model.send({ kind: "infer", view, pixels });
  });
  const fromBrowser = async (pixels) => {
    try {
      return await fetchAnswer(model.get("url"), headers, pixels);
    } catch (error) {  // no answer, or none that this page may read: a browser does not tell a page which
      hurdle = `Your browser got no answer from ${new URL(model.get("url")).host} (${error.message}).`;
      way = "kernel";
      showWay();
      return throughKernel(pixels);
    }
  };
  // One request at a time, always with the newest ink: a slow answer costs pictures between, and delays none.
  const update = async () => {
    dirty = true;
    host.dataset.state = "busy";
    if (headers === null) status.textContent = "Waiting until the kernel lets this page in.";
    if (busy || headers === null) return;
    busy = true;
    while (dirty && !closed) {
      dirty = false;
      const pixels = ink.pixels(), began = performance.now();
      if (!pixels.some(Boolean)) { show({}); continue; }
      requests += 1;
      const answer = await (way === "browser" ? fromBrowser : throughKernel)(pixels);
      if (!closed) show(answer, performance.now() - began);
    }
    busy = false;
    if (closed) return;
    model.set("pixels", ink.pixels());
    model.save_changes();
    host.dataset.state = "idle";
  };
  const changed = () => (paint(), update());
  const load = (pixels) => (pixels.forEach((value, pixel) => ink.fill(pixel, value)), changed());

  const at = (event) => {
    const box = canvas.getBoundingClientRect();
    return [((event.clientX - box.left) / box.width) * FINE, ((event.clientY - box.top) / box.height) * FINE];
  };
  canvas.onpointerdown = (event) => {
    if (event.button !== 0) return;
    canvas.setPointerCapture(event.pointerId);
    last = at(event);
    ink.line(last, last);
    changed();
  };
  canvas.onpointermove = (event) => {
    if (last === null) return;
    for (const step of event.getCoalescedEvents?.() ?? [event]) ink.line(last, (last = at(step)));
    changed();
  };
  canvas.onpointerup = canvas.onpointercancel = () => { last = null; };
  canvas.onkeydown = (event) => {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }, move = moves[event.key];
    if (!(move || [" ", "Delete", "Backspace"].includes(event.key)) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    event.stopPropagation();
    const centre = () => cursor.map((place) => (place + 0.5) * BLOCK), before = centre();
    if (move) cursor = cursor.map((place, axis) => Math.max(0, Math.min(SIDE - 1, place + move[axis])));
    if (move && !event.shiftKey) return paint();
    if (move || event.key === " ") ink.line(before, centre());
    else ink.fill(cursor[1] * SIDE + cursor[0], 0);
    changed();
  };
  canvas.onfocus = canvas.onblur = paint;
  clear.onclick = () => load(Array(SIDE * SIDE).fill(0));
  example.onclick = () => load(model.get("examples")[shown++ % model.get("examples").length]);
  wayButton.onclick = () => { way = way === "browser" ? "kernel" : "browser"; showWay(); update(); };
  example.hidden = !model.get("examples").length;

  const onMessage = (message) => {
    if (message.view !== view) return;
    if (message.kind === "answer") return void waiting?.(message);
    headers = message.headers;  // never part of the widget's state: a saved notebook must not hold the token
    if (message.refused) { hurdle = message.refused; way = "kernel"; showWay(); }
    if (dirty) update();
  };
  const onPixels = () => model.get("pixels").some((value, pixel) => value !== ink.pixels()[pixel]) && !busy && load(model.get("pixels"));
  const themed = new MutationObserver(() => requestAnimationFrame(paint));
  themed.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light", "data-jp-theme-name", "class"] });
  model.on("msg:custom", onMessage);
  model.on("change:pixels", onPixels);
  showWay();
  show({});
  load(model.get("pixels"));
  model.send({ kind: "hello", view, origin: window.location.origin });
  return () => {
    closed = true;
    themed.disconnect();
    model.off("msg:custom", onMessage);
    model.off("change:pixels", onPixels);
  };
}

export default { render };

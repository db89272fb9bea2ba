// The page's controls, and what becomes of them.

import { Refusal, get, live, numbers } from "./requests.js";
import { Tiles } from "./tiles.js";

const $ = (id) => document.getElementById(id);
const FIELDS = ["class", "sample_ids", "seed", "steps", "guidance_scale"];
const FRAMES = 48;
const LOOK = 3000; // ms between looks at how busy the server is
const DECIMAL = /^[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$/i;

const form = $("form");
let model = null;
let tiles = null;
let stop = null; // of what is being drawn

// The model ------------------------------------------------------------------------------------

async function begin() {
  clear();
  $("again").hidden = true;
  try {
    model = await get("api/model");
  } catch (error) {
    tell(error instanceof Refusal ? error : new Refusal("the server does not answer"));
    $("again").hidden = false;
    return;
  }
  document.title = `${model.name} · ddpm-fast`;
  $("name").textContent = model.name;
  const [channels, height, width] = model.shape;
  const colour = ["grey", "grey, alpha", "RGB", "RGBA"][channels - 1];
  $("about").textContent =
    `${width} × ${height} ${colour} · ${model.method.toUpperCase()} · on ${model.device}`;
  if (model.classes) {
    $("class").append(
      new Option("each in turn", ""),
      ...model.classes.map((name, i) => new Option(name, i)),
    );
    $("class-field").hidden = false;
  }
  $("guidance_scale-field").hidden = !model.guidance.available;
  const some = model.classes ? Math.min(model.classes.length, 20) : 8;
  const shown = Math.min(model.limits.images, some);
  const asked = new URLSearchParams(location.search);
  const initial = {
    class: "",
    sample_ids: shown > 1 ? `0-${shown - 1}` : "0",
    seed: "0",
    steps: String(model.steps.default),
    guidance_scale: model.guidance.default ?? "",
    ...Object.fromEntries(asked),
  };
  for (const name of FIELDS) form.elements[name].value = initial[name];
  if (form.elements.class.selectedIndex < 0) form.elements.class.value = "";
  if (initial.watch === "x_t") form.elements.watch.value = "x_t";
  slide();
  look();
  setInterval(look, LOOK);
  if (asked.size) draw();
}

async function look() {
  if (document.hidden) return;
  try {
    const { running, waiting } = await get("api/status");
    const queue = waiting ? `, ${waiting} waiting` : "";
    $("load").textContent = running + waiting ? `drawing ${running}${queue}` : "idle";
    $("load").className = "well";
  } catch {
    $("load").textContent = "no answer";
    $("load").className = "bad";
  }
}

// What is asked for ----------------------------------------------------------------------------

function asked() {
  const values = Object.fromEntries(new FormData(form));
  const request = {
    seed: values.seed.trim() || "0",
    sample_ids: numbers(values.sample_ids, model.limits.images),
    steps: values.steps.trim() || String(model.steps.default),
    watch: "both",
    frames: Math.min(FRAMES, model.limits.frames),
  };
  if (model.classes && values.class !== "") request.class = Number(values.class);
  if (model.guidance.available) {
    const scale = values.guidance_scale.trim().replace(",", ".");
    const finite = DECIMAL.test(scale) && Number.isFinite(Number(scale)); // JSON has no others
    request.guidance_scale = scale === "" ? null : finite ? Number(scale) : scale;
  }
  return request;
}

/** In the address bar, so that a view can be shared. */
function remember() {
  const values = new FormData(form);
  const query = new URLSearchParams();
  for (const name of [...FIELDS, "watch"]) {
    const value = values.get(name);
    if (value !== null && value !== "" && !$(`${name}-field`)?.hidden) query.set(name, value);
  }
  history.replaceState(null, "", `?${query}`);
}

async function draw() {
  clear();
  let request;
  try {
    request = asked();
  } catch (error) {
    tell(error);
    return;
  }
  remember();
  stop?.abort();
  const mine = (stop = new AbortController());
  busy(true);
  try {
    for await (const event of live(request, mine.signal)) {
      if (mine.signal.aborted) break;
      await happened(event);
    }
  } catch (error) {
    if (mine.signal.aborted) {
      if (stop === mine) say("Cancelled");
    } else {
      const refused = error instanceof Refusal;
      tell(refused ? error : new Refusal("the server went away"));
      if (stop === mine) say(refused ? "Not drawn" : "The server went away");
      if (!refused) look();
    }
  }
  if (stop !== mine) return; // somebody has asked for others
  tiles?.cancel();
  stop = null;
  busy(false);
}

async function happened(event) {
  if (event.event === "begin") {
    tiles?.forget();
    tiles = new Tiles($("tiles"), model.shape, event.images);
    tiles.watch = form.elements.watch.value;
    $("time").value = 1000;
    setTimeout(look, 300);
    $("empty").hidden = true;
    $("bar").hidden = false;
    // Below the form, where there is no room beside it
    if ($("view").offsetTop > form.offsetTop) $("view").scrollIntoView();
  } else if (event.event === "frame") {
    await tiles.frame(event);
  } else if (event.event === "image") {
    await tiles.finish(event.image, event.png);
  } else if (event.event === "failed") {
    tiles.fail(event.image, event.message);
  }
  const count = tiles.tiles.length;
  const what = count === 1 ? "the image" : `${count} images`;
  if (event.event === "end") {
    say(`Drew ${event.failed ? `${event.drawn} of ` : ""}${what}`);
  } else if (event.event === "waiting" && !event.running) {
    say(`Waiting for a place: ${event.waiting} wait`);
  } else {
    say(`Drawing ${what}${count > 1 ? `, ${tiles.finished} finished` : ""}`);
  }
}

// What is said ---------------------------------------------------------------------------------

function say(text) {
  if ($("told").textContent !== text) $("told").textContent = text;
}

function busy(now) {
  $("cancel").disabled = !now;
  $("view").setAttribute("aria-busy", now);
}

function clear() {
  $("error").textContent = "";
  for (const name of FIELDS) {
    $(`${name}-error`).textContent = "";
    form.elements[name].removeAttribute("aria-invalid");
  }
}

/** Beside its field, where it has one. */
function tell(error) {
  const field = FIELDS.includes(error.field) ? error.field : null;
  const said = $(field ? `${field}-error` : "error");
  said.textContent = error.message.charAt(0).toUpperCase() + error.message.slice(1);
  if (field) {
    form.elements[field].setAttribute("aria-invalid", "true");
    form.elements[field].focus();
  }
}

// Steps are chosen on a logarithmic scale: 1 … 10 is as wide as 100 … 1000.

function slide() {
  const value = Number(form.elements.steps.value) || 1;
  $("steps-slider").value = (100 * Math.log(value)) / Math.log(Math.max(2, model.steps.most));
}

$("steps-slider").addEventListener("input", () => {
  const value = Math.max(2, model.steps.most) ** ($("steps-slider").value / 100);
  const coarse = value < 20 ? 1 : value < 200 ? 5 : 50;
  const rounded = Math.max(1, Math.round(value / coarse) * coarse);
  form.elements.steps.value = Math.min(model.steps.most, rounded);
});
form.elements.steps.addEventListener("input", slide);

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (model) draw();
});
$("dice").addEventListener("click", () => {
  form.elements.seed.value = crypto.getRandomValues(new Uint32Array(1))[0];
  if (model) draw();
});
$("cancel").addEventListener("click", () => stop?.abort());
$("again").addEventListener("click", begin);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop?.abort();
});
for (const choice of form.elements.watch) {
  choice.addEventListener("change", () => {
    tiles?.watched(form.elements.watch.value);
    if (location.search) remember();
  });
}
$("time").addEventListener("input", () => tiles?.replay($("time").value / 1000));
addEventListener("pagehide", () => stop?.abort());

begin();

// The images of a view: their frames as they come, shown one after the other at a pace to see.

import { bytes } from "./requests.js";

const PACE = 60; // ms that a frame is seen at least: a fast model's come in no time at all
const MOST_BEHIND = 90; // frames; beyond it some are passed over
const MOST_KEPT = 240; // for the replay; beyond it every other one goes

const element = (name, properties = {}, ...children) => {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
};

const bitmap = (text) => createImageBitmap(new Blob([bytes(text)], { type: "image/png" }));

class Tile {
  constructor(told, [, height, width]) {
    this.told = told;
    this.frames = []; // of this image: {step, frame, place}
    this.shown = -1; // which of them; frames.length: the image
    this.final = null;
    this.canvas = element("canvas", { width, height });
    this.canvas.setAttribute("role", "img");
    this.progress = element("progress", { max: told.steps, value: 0 });
    this.progress.setAttribute("aria-label", `Steps of image ${told.id}`);
    const title = `Image ${told.id}`;
    const described = [`seed\u00a0${told.seed}`, `${told.steps}\u00a0steps`];
    if (told.class_name !== undefined) described.unshift(`class ${told.class_name}`);
    if (told.guidance_scale !== undefined) described.push(`guided\u00a0${told.guidance_scale}`);
    this.name = told.class_name === undefined ? title : `${title} · class ${told.class_name}`;
    this.copy = element("button", { type: "button", textContent: "Copy link" });
    this.copy.addEventListener("click", () => this.#copied());
    this.save = element("a", { textContent: "Save", title: "as PNG" });
    this.save.setAttribute("aria-disabled", "true");
    for (const each of [this.copy, this.save]) {
      each.setAttribute("aria-label", `${each.textContent}: ${this.name}`);
    }
    this.element = element(
      "li",
      { className: "tile waiting" },
      this.canvas,
      this.progress,
      element(
        "p",
        { className: "caption" },
        element("a", { textContent: title, href: told.url, target: "_blank" }),
        element("span", { className: "address", textContent: described.join(" · ") }),
      ),
      element("div", { className: "links" }, this.copy, this.save),
    );
    this.#say("waits");
  }

  /** The finished image. */
  async finish(png) {
    const blob = new Blob([bytes(png)], { type: "image/png" });
    this.final = await createImageBitmap(blob);
    this.save.href = URL.createObjectURL(blob);
    this.save.download = `${this.told.seed}-${this.told.id}.png`;
    this.save.removeAttribute("aria-disabled");
  }

  end(kind, message) {
    if (this.final || this.element.matches(".failed, .cancelled")) return;
    this.element.classList.remove("waiting");
    this.element.classList.add(kind);
    this.element.querySelector(".address").textContent = message;
    this.#say(message);
  }

  /** Frame number k of this image; one beyond the last is the image. */
  show(k, watch) {
    this.shown = k;
    const context = this.canvas.getContext("2d");
    const { width, height } = this.canvas;
    context.imageSmoothingEnabled = false;
    context.clearRect(0, 0, width, height);
    const done = k >= this.frames.length && this.final !== null;
    if (done) {
      context.drawImage(this.final, 0, 0, width, height);
    } else if (k >= 0 && this.frames.length) {
      const { frame, place } = this.frames[Math.min(k, this.frames.length - 1)];
      const sheet = frame[watch];
      const w = sheet.width / frame.columns;
      const h = sheet.height / frame.rows;
      const left = (place % frame.columns) * w;
      const top = Math.floor(place / frame.columns) * h;
      context.drawImage(sheet, left, top, w, h, 0, 0, width, height);
    }
    const { steps } = this.told;
    const step = done ? steps : (this.frames[Math.min(k, this.frames.length - 1)]?.step ?? 0);
    this.progress.value = step;
    const ended = done || this.element.matches(".failed, .cancelled");
    this.element.classList.toggle("waiting", k < 0 && !ended);
    this.element.classList.toggle("done", done);
    this.#say(done ? "finished" : `step ${step} of ${steps}`);
  }

  #say(what) {
    this.canvas.setAttribute("aria-label", `${this.name}: ${what}`);
  }

  async #copied() {
    const url = new URL(this.told.url, document.baseURI).href;
    try {
      await navigator.clipboard.writeText(url);
    } catch {
      // Only pages of https and of this machine may: by a selection, then
      const text = element("textarea", { value: url });
      document.body.append(text);
      text.select();
      document.execCommand("copy");
      text.remove();
    }
    this.copy.textContent = "Copied";
    setTimeout(() => { this.copy.textContent = "Copy link"; }, 1500);
  }

  forget() {
    this.final?.close();
    if (this.save.href) URL.revokeObjectURL(this.save.href);
  }
}

/** All images of a request. */
export class Tiles {
  constructor(list, shape, images) {
    this.tiles = images.map((told) => new Tile(told, shape));
    this.watch = "x0";
    this.time = null; // 0 … 1 where somebody replays
    this.frames = [];
    list.replaceChildren(...this.tiles.map((tile) => tile.element));
    list.classList.toggle("few", images.length <= 4);
    list.classList.toggle("many", images.length > 24);
    this.still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    this.last = 0;
    this.playing = requestAnimationFrame((now) => this.#play(now));
  }

  get finished() {
    return this.tiles.filter((tile) => tile.final).length;
  }

  async frame(event) {
    const [x0, x_t] = await Promise.all([bitmap(event.x0), bitmap(event.x_t)]);
    const rows = Math.ceil(event.images.length / event.columns);
    const frame = { x0, x_t, columns: event.columns, rows };
    this.frames.push(frame);
    event.images.forEach((i, place) => {
      this.tiles[i].frames.push({ step: event.steps[place], frame, place });
    });
    if (this.frames.length > MOST_KEPT) this.#thin();
  }

  finish(i, png) {
    return this.tiles[i].finish(png);
  }

  fail(i, message) {
    this.tiles[i].end("failed", message);
  }

  cancel() {
    for (const tile of this.tiles) tile.end("cancelled", "cancelled");
  }

  /** Shows a moment of all trajectories, 0 … 1; at 1 they go on by themselves. */
  replay(time) {
    this.time = time >= 1 ? null : time;
    for (const tile of this.tiles) this.#place(tile);
  }

  watched(watch) {
    this.watch = watch;
    for (const tile of this.tiles) tile.show(tile.shown, watch);
  }

  forget() {
    cancelAnimationFrame(this.playing);
    for (const tile of this.tiles) tile.forget();
    for (const frame of this.frames) this.#close(frame);
  }

  #place(tile) {
    if (this.time === null) {
      tile.show(tile.frames.length, this.watch);
      return;
    }
    const step = Math.max(1, this.time * tile.told.steps);
    tile.show(Math.max(0, tile.frames.findLastIndex((each) => each.step <= step)), this.watch);
  }

  #play(now) {
    this.playing = requestAnimationFrame((then) => this.#play(then));
    if (now - this.last < PACE || this.time !== null) return;
    this.last = now;
    for (const tile of this.tiles) {
      const last = tile.final ? tile.frames.length : tile.frames.length - 1;
      const behind = last - tile.shown;
      if (behind <= 0) continue;
      tile.show(this.still ? last : tile.shown + Math.ceil(behind / MOST_BEHIND), this.watch);
    }
  }

  #thin() {
    const dropped = new Set(this.frames.filter((_, k) => k % 2));
    this.frames = this.frames.filter((frame) => !dropped.has(frame));
    for (const tile of this.tiles) {
      const seen = tile.frames.slice(0, tile.shown);
      tile.shown -= seen.filter((each) => dropped.has(each.frame)).length;
      tile.frames = tile.frames.filter((each) => !dropped.has(each.frame));
    }
    for (const frame of dropped) this.#close(frame);
  }

  #close(frame) {
    frame.x0.close();
    frame.x_t.close();
  }
}

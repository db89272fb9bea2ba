// What the page asks of the server, and what it is told.

/** An error of the server's: {"error": {"field": …, "message": …}}. */
export class Refusal extends Error {
  constructor(message, field = null) {
    super(message);
    this.field = field;
  }
}

async function refusal(response) {
  try {
    const { error } = await response.json();
    return new Refusal(error.message, error.field ?? null);
  } catch {
    return new Refusal(`the server answered with status ${response.status}`);
  }
}

export async function get(path) {
  const response = await fetch(path, { cache: "no-store" });
  if (!response.ok) throw await refusal(response);
  return response.json();
}

/** The events of a live view, in order; it reads no faster than they are taken. */
export async function* live(asked, signal) {
  const response = await fetch("api/live", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(asked),
    signal,
  });
  if (!response.ok) throw await refusal(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const lines = text.split("\n");
    text = lines.pop();
    for (const line of lines) yield exact(JSON.parse(line));
  }
}

/** Seeds and numbers of images as strings: a number has 53 bits; their address has them all. */
function exact(event) {
  for (const told of event.event === "begin" ? event.images : []) {
    [, told.seed, told.id] = /(\d+)\/(\d+)\.png/.exec(told.url);
    told.url = told.url.slice(1); // from where the page is, behind a proxy too
  }
  return event;
}

/** "0-3, 7" as ["0", "1", "2", "3", "7"]: strings, for numbers of more than 53 bits. */
export function numbers(text, most) {
  const found = [];
  for (const part of text.split(/[\s,;]+/).filter(Boolean)) {
    const match = /^(\d{1,19})(?:[-–…](\d{1,19}))?$/.exec(part);
    if (!match) throw new Refusal(`takes numbers and ranges, 0-9; got ${part}`, "sample_ids");
    const first = BigInt(match[1]);
    const last = BigInt(match[2] ?? match[1]);
    if (last < first) throw new Refusal(`a range goes upwards; got ${part}`, "sample_ids");
    if (last - first >= BigInt(most) || found.length + Number(last - first) >= most) {
      throw new Refusal(`takes at most ${most} images`, "sample_ids");
    }
    for (let i = first; i <= last; i++) found.push(String(i));
  }
  if (!found.length) throw new Refusal("takes at least one number", "sample_ids");
  return found;
}

/** Bytes of base64. */
export function bytes(text) {
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}

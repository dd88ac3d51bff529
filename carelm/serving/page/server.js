// What the page asks the server, and what it says when it refuses.

export const at = id => document.getElementById(id);
const KEY = "carelm-key";  // in sessionStorage: gone with the tab

/** What went wrong, in words for the reader; `wait` are the seconds after which another try makes sense, `isOfText` says that
    another text would do. */
export class Refusal extends Error {
  constructor(message, wait = 0, isOfText = false) {
    super(message);
    this.wait = wait;
    this.isOfText = isOfText;
  }
}

function unreachable(error) {
  if (error.name === "AbortError") throw error;
  throw new Refusal("The server cannot be reached. Is it running?");
}

/** A response that is well; with the key, which is asked for where the server wants one. */
export async function request(path, { body, signal } = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const response = await fetch(path, {
      method: body ? "POST" : "GET",
      headers: { ...(body && { "Content-Type": "application/json" }), ...(key && { Authorization: `Bearer ${key}` }) },
      body: body && JSON.stringify(body),
      signal,
    }).catch(unreachable);
    if (response.ok) return response;
    if (response.status === 401) await askForKey(key);
    else throw await refusalOf(response);
  }
}

async function refusalOf(response) {
  const said = await response.json().then(found => found.error.message, () => `status ${response.status}`);
  if (response.status !== 429) return new Refusal(`The server refuses: ${said}`, 0, [400, 413].includes(response.status));
  return new Refusal(`The server is busy: ${said}`, Number(response.headers.get("Retry-After")) || 1);
}

let asking = null;  // two answers that are refused at once ask for one key

async function askForKey(tried) {
  if (sessionStorage.getItem(KEY) !== tried) return;  // another request has got it in the meantime
  asking ??= new Promise((resolve, reject) => {
    at("keywords").textContent = tried ? "The server does not accept that key." : "The server asks for its key. It is kept until this tab is closed.";
    at("key").value = "";
    at("keydialog").returnValue = "";
    at("keydialog").showModal();
    at("keydialog").onclose = () => {
      asking = null;
      if (!at("keydialog").returnValue) return reject(new Refusal("The server answers only with its key."));
      sessionStorage.setItem(KEY, at("key").value);
      resolve();
    };
  });
  await asking;
}

/** The data of each server-sent event, however the bytes were cut on their way. */
export async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", data = [];
  for (;;) {
    const { value, done } = await reader.read().catch(unreachable);
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines.map(line => line.replace(/\r$/, ""))) {
      if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
      if (line === "" && data.length) yield data.splice(0).join("\n");
    }
  }
}

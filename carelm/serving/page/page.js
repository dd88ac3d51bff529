// The chat page. It asks the gateway, shows the answers as they come and sends what people say of them.
// What a model or a person has written reaches the page through textContent and value alone: it is never read as HTML.

import { Refusal, at, events, request } from "./server.js";
import * as shop from "./shop.js";

const log = at("log");
const MODEL = "carelm-model";  // in sessionStorage: gone with the tab

let turns = [];  // {values, answers: [answer, ...]}: one answer, or two side by side
let fields = [at("question")];  // what a person fills in: one text, or one for each column of the recipe's template
let columns = null;
let hasShop = false;  // whether this server answers from documents
const running = new Set();  // an AbortController for each answer that is being written

/** The conversation before a turn as the model at that side has seen it, and the turn's question, or what the model read of it. */
function messagesUpTo(turn, side, asked = null) {
  const messages = [];
  for (const earlier of turns.slice(0, turns.indexOf(turn))) {
    const answer = earlier.answers[side] ?? earlier.answers[0];  // before there was a second model, both have seen the first's
    const content = answer.edited ?? answer.text;
    if (content) messages.push({ role: "user", content: contentOf(earlier) }, { role: "assistant", content });
  }
  return [...messages, { role: "user", content: asked ?? contentOf(turn) }];
}

/** A question as the API takes it: its text, or a JSON object of columns. */
function contentOf({ values }) {
  return columns ? JSON.stringify(Object.fromEntries(columns.map((name, i) => [name, values[i]]))) : values[0];
}

/** Writes to the log what `change` writes, and stays at its end where the reader is there. */
function keepingPlace(change) {
  const isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 48;
  change();
  if (isAtEnd) log.scrollTop = log.scrollHeight;
}

async function write(answer) {
  const { box, parts } = answer;
  const controller = new AbortController();
  running.add(controller);
  showRunning();
  answer.text = parts.text.textContent = "";
  shop.showSources(answer, answer.sources = []);
  answer.asked = null;
  answer.isWhole = false;
  resetFeedback(answer);
  parts.note.hidden = parts.actions.hidden = true;
  box.setAttribute("aria-busy", "true");
  let note = "", wait = null;
  try {
    const body = { model: answer.model, messages: messagesUpTo(answer.turn, answer.side), stream: true };
    const [path, asked] = hasShop ? ["v1/shop/chat", shop.asked(body)] : ["v1/chat/completions", body];
    const response = await request(path, { body: asked, signal: controller.signal });
    note = await read(response, answer);
  } catch (error) {
    note = error.name === "AbortError" ? "stopped" : answer.text ? `The answer broke off: ${error.message}` : error.message;
    wait = error.wait ?? 0;
    if (error.isOfText && fields.every(field => !field.value)) fields.forEach((field, i) => field.value = answer.turn.values[i]);
    if (note !== "stopped" && !(error instanceof Refusal)) console.error(error);
  } finally {
    running.delete(controller);
    box.removeAttribute("aria-busy");
    showRunning();
  }
  keepingPlace(() => {
    showNote(answer, note, wait);
    parts.actions.hidden = !answer.text;
    parts.edit.hidden = parts.up.hidden = hasShop && answer.asked === null;  // no model was asked: there is nothing to learn from
  });
  if (answer.box.isConnected) at("finished").append(paragraph(`${answer.model}: ${answer.text} ${note}`));
}

/** Shows an answer as it comes; returns what is to be said of it. */
async function read(response, answer) {
  const notes = [];
  if (response.headers.has("x-dropped-messages")) notes.push("the oldest messages are left out: the model's window is full");
  if (response.headers.has("x-message-cut")) notes.push("the model has not seen all of it: the longest message is cut to fit the window");
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return notes.join("; ");
    const { error, choices, sources, asked, text, answer: whole, cited, finish_reason } = JSON.parse(data);
    if (error) throw new Refusal(error.message);
    if (sources) {
      shop.showSources(answer, answer.sources = sources);
      answer.asked = asked;
    }
    if (cited) shop.showSources(answer, answer.sources, cited);
    const choice = choices?.[0];
    const piece = choice?.delta.content ?? text ?? "", end = choice?.finish_reason ?? finish_reason;
    answer.text += piece;
    keepingPlace(() => answer.parts.text.append(piece));
    if (end === "length") notes.push("cut off at the length limit");
    if (end === "stop") answer.isWhole = true;
    if (whole !== undefined) return notes.join("; ");
  }
  throw new Refusal("The server has ended the connection.");
}

function paragraph(text) {
  const made = document.createElement("p");
  made.textContent = text;
  return made;
}

/** A line under the answer; `wait`, in seconds, where it can be tried again. */
function showNote({ parts }, note, wait) {
  const { note: line, retry } = parts;
  line.hidden = !note;
  line.firstElementChild.textContent = note;
  retry.hidden = wait === null;
  retry.disabled = wait > 0;
  retry.textContent = wait > 0 ? `Try again in ${wait} s` : "Try again";
  if (wait > 0) setTimeout(() => retry.disabled && showNote({ parts }, note, wait - 1), 1000);
}

function showRunning() {
  at("send").hidden = running.size > 0;
  at("stop").hidden = !running.size;
}

function stop() {
  for (const controller of running) controller.abort();
  fields[0].focus();
}

function ask(values) {
  for (const button of log.querySelectorAll(".retry")) button.remove();  // the conversation has gone on
  at("hint").hidden = true;
  at("finished").replaceChildren();
  const section = at("turn-shape").content.cloneNode(true).firstElementChild;
  section.querySelector(".question").textContent = columns ? columns.map((name, i) => `${name}: ${values[i]}`).join("\n") : values[0];
  const models = [at("model").value, at("other").value].filter(Boolean);
  const turn = { values, answers: [] };
  turn.answers = models.map((model, side) => newAnswer(turn, model, side));
  section.querySelector(".answers").append(...turn.answers.map(answer => answer.box));
  turns.push(turn);
  at("turns").append(section);
  turn.answers.forEach(write);
  log.scrollTop = log.scrollHeight;
}

function newAnswer(turn, model, side) {
  const box = at("answer-shape").content.cloneNode(true).firstElementChild;
  const parts = Object.fromEntries(
    ["text", "sources", "draft", "note", "retry", "actions", "copy", "edit", "up", "down", "said", "feedback", "edited", "comment", "error", "cancel"]
      .map(name => [name, box.querySelector(`.${name}`)]),
  );
  const answer = { turn, model, side, box, parts, text: "", sources: [], edited: null, mark: null };
  box.querySelector("h3").textContent = model;
  parts.retry.onclick = () => {
    fields[0].focus();  // the button goes
    write(answer);
  };
  parts.copy.onclick = () => copy(answer);
  parts.edit.onclick = () => openEdit(answer);
  parts.up.onclick = () => mark(answer, "good");
  parts.down.onclick = () => mark(answer, "bad");
  parts.cancel.onclick = () => closeFeedback(answer);
  parts.feedback.onsubmit = event => {
    event.preventDefault();
    sendFeedback(answer);
  };
  parts.feedback.onkeydown = event => {
    if (event.key === "Escape" && !event.isComposing) closeFeedback(answer);
  };
  return answer;
}

async function copy({ edited, text, parts }) {
  try {
    await navigator.clipboard.writeText(edited ?? text);
    parts.said.textContent = "Copied.";
  } catch {  // a browser gives the clipboard to pages of https and of this machine only
    getSelection().selectAllChildren(parts.text);
    parts.said.textContent = "Selected: press Ctrl+C.";
  }
}

function mark(answer, mark) {
  answer.mark = answer.mark === mark ? null : mark;
  showMark(answer);
  answer.parts.feedback.hidden = false;
  answer.parts.comment.focus();
}

function showMark({ mark, parts }) {
  parts.up.setAttribute("aria-pressed", mark === "good");
  parts.down.setAttribute("aria-pressed", mark === "bad");
}

function openEdit({ text, parts }) {
  const field = parts.edited.querySelector("textarea");
  if (parts.edited.hidden) field.value = text;
  parts.feedback.hidden = parts.edited.hidden = false;
  parts.edit.setAttribute("aria-expanded", "true");
  field.focus();
}

function resetFeedback(answer) {
  const { parts } = answer;
  answer.mark = null;
  showMark(answer);
  parts.feedback.reset();
  parts.error.textContent = "";
  parts.feedback.hidden = parts.edited.hidden = true;
  parts.edit.setAttribute("aria-expanded", "false");
}

function closeFeedback(answer) {
  resetFeedback(answer);
  answer.parts.edit.focus();
}

async function sendFeedback(answer) {
  const { parts, text, mark } = answer;
  const field = parts.edited.querySelector("textarea"), comment = parts.comment.value.trim() || null;
  const edited = parts.edited.hidden || field.value === text ? null : field.value;
  parts.error.textContent = "";
  if (edited !== null && !edited.trim()) return void (parts.error.textContent = "Write an answer, or cancel.");
  if (!edited && !mark && !comment) return void (parts.error.textContent = "Change the answer, rate it or write a comment.");
  if (mark === "good" && !edited && !answer.isWhole) {
    openEdit(answer);
    return void (parts.error.textContent = "The answer has no end, and would teach to end like that: write its end, or take the mark back.");
  }
  const send = parts.feedback.querySelector(".main");
  send.disabled = true;
  try {
    const body = { model: answer.model, messages: messagesUpTo(answer.turn, answer.side, answer.asked), answer: text, mark, whole: answer.isWhole, comment, edited };
    const response = await request("v1/feedback", { body });
    const { saved } = await response.json();
    showSaved(answer, edited, saved);
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    parts.error.textContent = `Not saved. ${error.message}`;
  } finally {
    send.disabled = false;
  }
}

/** One row is written for an answer: what is saved can be read, and no more be changed. */
function showSaved(answer, edited, saved) {
  const { parts } = answer;
  keepingPlace(() => {
    parts.feedback.hidden = true;
    parts.retry.remove();
    for (const button of [parts.edit, parts.up, parts.down]) button.disabled = true;
    parts.said.textContent = `Saved to ${saved}. To change it, change its row there.`;
    if (edited === null) return;
    answer.edited = parts.text.textContent = edited;
    parts.draft.hidden = false;
    parts.draft.querySelector("p").textContent = answer.text;
    answer.box.querySelector("h3").textContent = `${answer.model}, edited by you`;
  });
  parts.copy.focus();
}

async function loadModels() {
  let names, more;
  try {
    const { data, ...others } = await (await request("v1/models")).json();
    more = others;
    names = data.map(model => model.id);
    columns = data[0].columns ?? null;
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    const again = document.createElement("button");
    again.textContent = "Try again";
    again.onclick = () => {
      at("turns").replaceChildren();
      loadModels();
    };
    const line = paragraph(error.message);
    line.className = "note row";
    line.append(again);
    return at("turns").replaceChildren(line);
  }
  for (const select of [at("model"), at("other")]) select.append(...names.map(name => new Option(name, name)));
  const before = sessionStorage.getItem(MODEL);
  at("model").value = names.includes(before) ? before : names.find(name => name !== "base") ?? names[0];
  at("beside").hidden = names.length < 2;
  if (columns) makeFields();
  hasShop = Boolean(more.shop);
  shop.begin(more);
  at("send").disabled = false;
  modelsChosen();
}

/** A field for each column of the recipe's template. */
function makeFields() {
  fields = columns.map(name => {
    const field = document.createElement("textarea");
    Object.assign(field, { name, rows: 1, onkeydown: keys });
    field.setAttribute("aria-describedby", "keys");
    return field;
  });
  at("fields").replaceChildren(...fields.map(field => {
    const label = document.createElement("label");
    label.append(field.name, field);
    return label;
  }));
  fields[0].focus();
}

/** A model is not compared with itself. */
function modelsChosen() {
  sessionStorage.setItem(MODEL, at("model").value);
  for (const option of at("other").options) option.disabled = option.value === at("model").value;
  if (at("other").value === at("model").value) at("other").value = "";
  document.body.classList.toggle("two", at("other").value !== "");
}

at("model").onchange = at("other").onchange = modelsChosen;
at("stop").onclick = stop;
const isUnsent = () => document.querySelector(".feedback:not([hidden])") !== null;  // an edit, a mark or a comment
window.onbeforeunload = event => {
  if (isUnsent()) event.preventDefault();
};
at("new").onclick = () => {
  if (isUnsent() && !confirm("Your feedback is not sent yet. Begin a new chat all the same?")) return;
  stop();
  turns = [];
  at("turns").replaceChildren();
  at("finished").replaceChildren();
  at("hint").hidden = false;
};
at("composer").onsubmit = event => {
  event.preventDefault();
  const values = fields.map(field => field.value.trim());
  if (running.size || at("send").disabled) return;
  const missing = values.indexOf("");
  if (missing >= 0) return fields[missing].focus();
  for (const field of fields) field.value = "";
  fields[0].focus();
  ask(values);
};

function keys(event) {
  if (event.isComposing || event.keyCode === 229) return;  // Enter ends a word of an input method (229: Safari)
  if (event.key === "Escape") stop();
  if (event.key !== "Enter" || event.shiftKey) return;
  event.preventDefault();
  at("composer").requestSubmit();
}

at("question").onkeydown = keys;
at("send").disabled = true;  // until there is a model
loadModels();

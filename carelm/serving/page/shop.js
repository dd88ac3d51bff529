// What the page shows of a shop: the sources of an answer, and past tickets that are like a new one.
// What a document, a ticket or a model says reaches the page through textContent alone: it is never read as HTML.

import { Refusal, at, request } from "./server.js";

const percent = share => `${Math.round(100 * share)} %`;

/** Shows what this server has of a shop, of what its list of models says. */
export function begin({ shop, tickets }) {
  for (const [name, values] of [["product", shop?.filters.product ?? []], ["ticketproduct", tickets?.products ?? []]]) {
    at(name).append(...values.map(value => new Option(value, value)));
    at(name).parentElement.hidden = !values.length;
  }
  at("tabs").hidden = !tickets;
  if (tickets && !tickets.has_matcher) at("ticketnote").append(" No model here says which of them are the same.");
}

/** The body of a question to the shop's route. */
export function asked(body) {
  const product = at("product").value;
  return product ? { ...body, filters: { product } } : body;
}

/** Shows the sources of an answer, each folded; those that it cites stand out. */
export function showSources({ parts }, sources, cited = []) {
  parts.sources.hidden = !sources.length;
  const open = [...parts.sources.querySelectorAll("details")].map(details => details.open);
  const shown = sources.map((source, i) => {
    const details = at("source-shape").content.cloneNode(true).firstElementChild;
    details.querySelector("summary").textContent = `[${source.number}] ${placeOf(source)}`;
    details.querySelector("p").textContent = source.passage;
    details.classList.toggle("cited", cited.includes(source.number));
    details.open = open[i] ?? false;
    return details;
  });
  parts.sources.replaceChildren(parts.sources.firstElementChild, ...shown);
}

/** Where a passage stands: "Returns, page 2, Lamps (returns.pdf)". */
function placeOf({ document, title, product, page, heading }) {
  const parts = [title, product, page && `page ${page}`, heading].filter(Boolean);
  const place = [...new Set(parts)].join(", ");
  return place ? `${place} (${document})` : document;
}

function show(isTickets) {
  for (const [id, isShown] of [["log", !isTickets], ["composer", !isTickets], ["matches", isTickets], ["ticketform", isTickets]])
    at(id).hidden = !isShown;
  at("tochat").setAttribute("aria-pressed", !isTickets);
  at("totickets").setAttribute("aria-pressed", isTickets);
  at(isTickets ? "ticket" : "question")?.focus();
}

at("tochat").onclick = () => show(false);
at("totickets").onclick = () => show(true);
at("ticket").onkeydown = event => {
  if (event.isComposing || event.key !== "Enter" || event.shiftKey) return;
  event.preventDefault();
  at("ticketform").requestSubmit();
};
at("ticketform").onsubmit = async event => {
  event.preventDefault();
  const text = at("ticket").value.trim(), product = at("ticketproduct").value || null;
  if (!text || at("match").disabled) return at("ticket").focus();
  at("match").disabled = true;
  at("found").replaceChildren();
  at("ticketnote").textContent = "Looking for past tickets ...";
  try {
    const { matches } = await (await request("v1/tickets/match", { body: { text, product } })).json();
    at("ticketnote").textContent = matches.length ? `${matches.length} past tickets, the most alike first` : "No past ticket is like it.";
    at("found").append(...matches.map(shownMatch));
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    at("ticketnote").textContent = error.message;
  } finally {
    at("match").disabled = false;
  }
};

function shownMatch({ ticket_id, question, resolution, same, probability, reason }) {
  const box = at("match-shape").content.cloneNode(true).firstElementChild;
  const write = (name, text) => Object.assign(box.querySelector(name), { textContent: text, hidden: false });
  write("h3", ticket_id);
  write(".asked", question);
  write(".text", resolution);
  if (same !== null) write(".verdict", `${same ? "The same" : "Not the same"}, says the model: the same with ${percent(probability)}`);
  box.classList.toggle("same", same === true);
  if (reason) write(".reason", `Its reason: ${reason}`);
  return box;
}

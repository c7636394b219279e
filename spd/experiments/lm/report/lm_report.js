"use strict";
/* The browser of subcomponents. Draws the rows in sight and the one subcomponent that is open; all
   text from the run goes through textContent.

   data: {sites: [{name, C, alive, reads?, writes?}], positions, across, tokens: [text], rows: [row]}
   row:  {site, c, mean, active, highest, agree, flipped, reads?, writes?,   (token: place in `tokens`)
          shares: [[token, share]], means: [[token, mean, count]], companions: [[row, jaccard, share]],
          contexts: [[place of the middle token, two hex digits per token, token, token, …]]} */

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const list = byId("list"), rowsBox = byId("rows"), detail = byId("detail");
const search = byId("search"), siteChoice = byId("site"), found = byId("found");

const commonLength = (() => {
  const names = data.sites.map((site) => site.name.split("."));
  let n = 0;
  while (names.every((parts) => n < parts.length - 1 && parts[n] === names[0][n])) n++;
  return names.length ? names[0].slice(0, n).join(".").length + (n ? 1 : 0) : 0;
})();
const all = data.rows.map((row, index) => {
  const name = `${data.sites[row.site].name}/${row.c}`;
  return {
    ...row, index, name, short: name.slice(commonLength), density: row.active / data.positions,
    words: null,
  };
});
const indexOf = new Map(all.map((row) => [row.name, row.index]));
const state = { key: "selective", falling: true, shown: [], open: null };

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const SIGNS = { "\n": "↵", "\t": "⇥" };
const inLine = (text) => // control characters have pictures of their own from U+2400 on
  text.replace(/[\0-\x1f]/g, (c) => SIGNS[c] || String.fromCharCode(0x2400 + c.charCodeAt(0)));
const spaces = (run) => (run.length > 3 ? `␣×${run.length} ` : "␣".repeat(run.length));
const alone = (token) => inLine(data.tokens[token]).replace(/^ +| +$/g, spaces);
const percent = (x) => `${x >= 0.0995 ? (100 * x).toFixed(0) : (100 * x).toPrecision(2)} %`;
const number = (x) =>
  (x !== 0 && Math.abs(x) < 0.001 ? x.toExponential(1) : x.toPrecision(Math.abs(x) < 1 ? 2 : 3)).replace("-", "−");

// --- the list ------------------------------------------------------------------------------------

function haystack(row) {
  if (row.words === null) {
    const ends = [...(row.reads || []), ...(row.writes || [])];
    const tokens = [row.shares, row.means, ...ends].flat().map(([token]) => data.tokens[token]);
    row.words = [row.name, ...tokens].join("\n").toLowerCase();
  }
  return row.words;
}

const SELECTIVE = 0.1; // on at no larger fraction of the positions
const orders = {
  selective: (a, b) => (a.density <= SELECTIVE) - (b.density <= SELECTIVE) || a.mean - b.mean,
  name: (a, b) => a.site - b.site || a.c - b.c,
  mean: (a, b) => a.mean - b.mean,
  density: (a, b) => a.density - b.density,
};

function refresh() {
  const terms = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  const order = orders[state.key], sign = state.falling ? -1 : 1;
  state.shown = all
    .filter((row) => siteChoice.value === "" || row.site === Number(siteChoice.value))
    .filter((row) => terms.every((term) => haystack(row).includes(term)))
    .sort((a, b) => sign * order(a, b) || a.index - b.index);
  found.textContent =
    state.shown.length === 1 ? "1 subcomponent" : `${state.shown.length.toLocaleString("en")} subcomponents`;
  for (const button of document.querySelectorAll(".heads button")) {
    const chosen = button.dataset.key === state.key;
    button.textContent = button.dataset.label + (chosen ? (state.falling ? " ↓" : " ↑") : "");
    button.setAttribute("aria-pressed", chosen);
  }
  list.scrollTop = 0;
  rowsBox.style.height = `${state.shown.length * rowHeight()}px`;
  drawRows(true);
}

const rowHeight = () => 3.25 * parseFloat(getComputedStyle(document.documentElement).fontSize);
let drawn = [0, 0];

function drawRows(anew) {
  const height = rowHeight();
  const from = Math.max(0, Math.floor(list.scrollTop / height) - 5);
  const to = Math.min(state.shown.length, Math.ceil((list.scrollTop + list.clientHeight) / height) + 5);
  if (!anew && drawn[0] === from && drawn[1] === to) return;
  drawn = [from, to];
  rowsBox.replaceChildren(...state.shown.slice(from, to).map((row, i) => drawRow(row, from + i, height)));
  markOpen();
}

function drawRow(row, place, height) {
  const made = element(
    "div",
    {
      class: "row", role: "option", id: `row-${row.index}`, "data-index": row.index, title: row.name,
      "aria-posinset": place + 1, "aria-setsize": state.shown.length,
    },
    element("span", { class: "name" }, row.short),
    element("span", { class: "number" }, number(row.mean)),
    element("span", { class: "number" }, percent(row.density)),
    element("span", { class: "words" }, row.shares.slice(0, 6).map(([token]) => alone(token)).join("  ")),
  );
  made.style.top = `${place * height}px`;
  return made;
}

function markOpen() {
  for (const row of rowsBox.children)
    row.setAttribute("aria-selected", Number(row.dataset.index) === state.open);
  const active = byId(`row-${state.open}`);
  if (active) list.setAttribute("aria-activedescendant", active.id);
  else list.removeAttribute("aria-activedescendant");
}

function bringIntoSight() {
  const place = state.shown.findIndex((row) => row.index === state.open);
  if (place < 0) return;
  const top = place * rowHeight(), bottom = top + rowHeight();
  if (top < list.scrollTop) list.scrollTop = top;
  else if (bottom > list.scrollTop + list.clientHeight) list.scrollTop = bottom - list.clientHeight;
  drawRows(false);
}

// --- one subcomponent ----------------------------------------------------------------------------

function open(index) {
  state.open = index;
  detail.replaceChildren(...drawDetail(all[index]));
  detail.setAttribute("aria-label", all[index].name);
  bringIntoSight();
  markOpen();
}

function drawDetail(row) {
  const site = data.sites[row.site];
  const back = element("button", { type: "button", class: "back" }, "Back to the list");
  back.addEventListener("click", () => { list.focus(); list.scrollIntoView({ block: "center" }); });
  const fact = (label, value) => element("li", {}, `${label} `, element("strong", {}, value));
  const title = element("a", { href: `#${encodeURI(row.name)}` }, row.name);
  return [
    back,
    element("h3", {}, title),
    element(
      "ul", { class: "facts" },
      fact("mean importance", number(row.mean)),
      fact("density", `${percent(row.density)} (${row.active.toLocaleString("en")} of ${data.positions.toLocaleString("en")})`),
      fact("highest importance", Math.min(1, row.highest).toFixed(2)),
    ),
    element("h4", {}, "Where it matters most"),
    note("The pieces of text with its highest importance, no two alike. The darker a token, the more important the subcomponent is there; the framed one is the highest, its importance stands in front."),
    element("ol", { class: "contexts" }, ...row.contexts.map(drawContext)),
    element("h4", {}, "Tokens it matters on"),
    note("How its importance is divided among tokens, and the tokens with the highest mean importance, of those seen at least five times."),
    element(
      "div", { class: "pairs" },
      table("share of its importance", row.shares.map(([token, x]) => [alone(token), percent(x)])),
      table("mean importance (times seen)", row.means.map(([token, x, n]) => [alone(token), `${number(x)} (${n})`])),
    ),
    ...drawEnds("What V reads", row.reads, readsNote(site, row), ["highest", "lowest"]),
    ...drawEnds("What U writes", row.writes, writesNote(site, row), ["raises", "lowers"]),
    element("h4", {}, "Companions"),
    note(`The subcomponents most often active (importance above 0.1) where it is. Overlap: positions at which both are active, of those at which either is. In brackets: of its own positions, the fraction the other shares.${data.across ? "" : " Of its own matrix only: there are too many to count all pairs."}`),
    row.companions.length ? drawCompanions(row) : note("None."),
  ];
}

const note = (text) => element("p", { class: "quiet" }, text);

function drawContext([middle, shades, ...tokens]) {
  const at = (i) => parseInt(shades.slice(2 * i, 2 * i + 2), 16) / 255;
  const spans = tokens.map((token, i) => {
    const span = element("span", { class: i === middle ? "token middle" : "token" }, inLine(data.tokens[token]));
    if (at(i) > 0) {
      span.style.setProperty("--g", (0.1 + 0.9 * at(i)).toFixed(2));
      span.title = `importance ${at(i).toFixed(2)}`;
    }
    return span;
  });
  return element(
    "li", {}, element("span", { class: "value" }, at(middle).toFixed(2)), element("span", { class: "text" }, ...spans),
  );
}

function table(heading, rows) {
  const body = rows.map(([label, value]) =>
    element("tr", {}, element("th", { scope: "row" }, label), element("td", {}, value)));
  const contents = rows.length
    ? element("table", {}, element("tbody", {}, ...body))
    : note("None.");
  return element("div", {}, element("h5", {}, heading), contents);
}

const signs = (row) =>
  `Signs are such that its inner activation is positive where it is active (${percent(row.agree)} of the time).`;

function readsNote(site, row) {
  if (row.reads === undefined)
    return `Not shown: ${site.reads || "no module embeds the tokens"}.`;
  return site.reads === "tokens"
    ? `The entries of V: the inner activation on each token. ${signs(row)}`
    : `The inner activation if the token's embedding alone were in the residual stream, normalised as for this matrix. ${signs(row)}`;
}

function writesNote(site, row) {
  if (row.writes === undefined)
    return `Not shown: ${site.writes || "no module embeds the tokens"}.`;
  return site.writes === "logits"
    ? `The entries of U: what an inner activation of 1 adds to each token's logit. ${signs(row)}`
    : `What U adds to each token's logit, straight through the final normalisation's gain and the unembedding, for an inner activation of 1. ${signs(row)}`;
}

function drawEnds(heading, ends, text, titles) {
  const made = [element("h4", {}, heading), note(text)];
  if (ends === undefined) return made;
  const shown = (end) => end.map(([token, x]) => [alone(token), number(x)]);
  made.push(element("div", { class: "pairs" }, ...ends.map((end, i) => table(titles[i], shown(end)))));
  return made;
}

function drawCompanions(row) {
  const lines = row.companions.map(([index, jaccard, share]) => {
    const other = all[index];
    const link = element("a", { href: `#${encodeURI(other.name)}` }, other.name);
    const words = other.shares.slice(0, 4).map(([token]) => alone(token)).join("  ");
    return element(
      "tr", {}, element("th", { scope: "row" }, link, ` ${words}`),
      element("td", {}, `${percent(jaccard)} (${percent(share)})`),
    );
  });
  return element("div", { class: "pairs" }, element("table", {}, element("tbody", {}, ...lines)));
}

// --- links, mouse and keys -----------------------------------------------------------------------

const narrow = () => matchMedia("(max-width: 56rem)").matches;
let pending = 0;

function show(index) {
  open(index);
  clearTimeout(pending); // an arrow key held down must not flood the address bar
  pending = setTimeout(() => location.replace(`#${encodeURI(all[index].name)}`), 250);
}

function followLink() {
  let name = location.hash.slice(1);
  try { name = decodeURI(name); } catch { return; }
  const index = indexOf.get(name);
  if (index === undefined || index === state.open) return;
  if (!state.shown.some((row) => row.index === index)) {
    search.value = siteChoice.value = "";
    refresh();
  }
  open(index);
  const { top } = detail.getBoundingClientRect();
  if (narrow() || top < 0) detail.scrollIntoView();
  else if (top > innerHeight / 2) byId("subcomponents").scrollIntoView();
}

list.addEventListener("scroll", () => drawRows(false), { passive: true });
list.addEventListener("click", (event) => {
  const row = event.target.closest(".row");
  if (!row) return;
  show(Number(row.dataset.index));
  if (narrow()) {
    detail.scrollIntoView();
    detail.focus({ preventScroll: true });
  }
});
list.addEventListener("keydown", (event) => {
  const last = state.shown.length - 1;
  const place = state.shown.findIndex((row) => row.index === state.open);
  const page = Math.max(1, Math.floor(list.clientHeight / rowHeight()) - 1);
  const to = {
    ArrowDown: place + 1, ArrowUp: place < 0 ? 0 : place - 1, PageDown: place + page, PageUp: place - page, Home: 0, End: last,
  }[event.key];
  if (event.key === "Enter" && state.open !== null) {
    detail.scrollIntoView({ block: "nearest" });
    detail.focus({ preventScroll: true });
  } else if (to !== undefined && last >= 0) {
    event.preventDefault();
    show(state.shown[Math.min(last, Math.max(0, to))].index);
  }
});
detail.addEventListener("keydown", (event) => {
  if (event.key === "Escape") list.focus();
});
search.addEventListener("input", refresh);
siteChoice.addEventListener("change", refresh);
for (const button of document.querySelectorAll(".heads button"))
  button.addEventListener("click", () => {
    const { key } = button.dataset;
    state.falling = state.key === key ? !state.falling : key !== "name";
    state.key = key;
    refresh();
  });
addEventListener("hashchange", followLink);
addEventListener("resize", () => {
  rowsBox.style.height = `${state.shown.length * rowHeight()}px`;
  drawRows(true);
});

data.sites.forEach((site, i) =>
  siteChoice.append(element("option", { value: i }, `${site.name} (${site.alive})`)));
byId("browser").hidden = false;
refresh();
followLink();
if (state.open === null && state.shown.length) open(state.shown[0].index);

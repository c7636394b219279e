"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const SVG = "http://www.w3.org/2000/svg";
  const CELL = 15, GAP = 26, ROW = 58, LEFT = 178, FOOT = 44, PER_LINE = 8;
  const make = (name, attributes, parent) => {
    const element = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (parent) parent.append(element);
    return element;
  };
  const $ = (id) => document.getElementById(id);
  const shown = (text) => text.replaceAll("\n", "⏎").replaceAll("\t", "⇥");
  const short = (text, n) => ([...text].length > n ? [...text].slice(0, n - 1).join("") + "…" : text);

  // --- places: a cell for each row and column, as wide as its fullest row and as high as it needs

  const cells = new Map();
  data.nodes.forEach((node, i) => {
    const key = node.row + " " + node.column;
    if (!cells.has(key)) cells.set(key, []);
    cells.get(key).push(i);
  });
  const columns = data.columns.map((_, column) => {
    let most = 3;
    for (let row = 0; row < data.rows.length; row++)
      most = Math.max(most, Math.min((cells.get(row + " " + column) || []).length, PER_LINE));
    return most * CELL + GAP;
  });
  const lefts = [LEFT];
  for (const width of columns) lefts.push(lefts.at(-1) + width);
  const heights = data.rows.map((_, row) => {
    let lines = 1;
    for (let column = 0; column < columns.length; column++)
      lines = Math.max(lines, Math.ceil((cells.get(row + " " + column) || []).length / PER_LINE));
    return ROW + (lines - 1) * CELL;
  });
  const used = data.rows.map((_, row) => data.nodes.some((node) => node.row === row));
  const tops = [];
  let y = 20;
  for (let row = data.rows.length - 1; row >= 0; row--) {
    tops[row] = y;
    if (used[row]) y += heights[row];
  }
  const width = lefts.at(-1) + 20, height = y + FOOT;
  const place = [];
  for (const [key, members] of cells) {
    const [row, column] = key.split(" ").map(Number);
    members.forEach((i, n) => {
      place[i] = [lefts[column] + (n % PER_LINE) * CELL + CELL / 2, tops[row] + 18 + Math.floor(n / PER_LINE) * CELL];
    });
  }

  // --- the picture

  const svg = make("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img" });
  document.querySelector(".picture").append(svg);
  data.rows.forEach((name, row) => {
    if (!used[row]) return;
    if (row % 2) make("rect", { class: "band", x: 0, y: tops[row], width, height: heights[row] }, svg);
    const label = make("text", { x: 8, y: tops[row] + 22, class: "quiet" }, svg);
    label.textContent = name.length > 24 ? "…" + name.slice(-23) : name;
    make("title", {}, label).textContent = name;
  });
  data.columns.forEach((text, column) => {
    const label = make("text", { x: lefts[column], y: height - 16 }, svg);
    label.textContent = short(shown(text), 12);
    make("title", {}, label).textContent = text;
  });
  const edges = make("g", {}, svg);
  const lines = data.edges.map(([source, target, , share]) => {
    const [x1, y1] = place[source], [x2, y2] = place[target], bend = (y1 - y2) / 2;
    return make("path", {
      class: "edge " + (share > 0 ? "more" : "less"),
      d: `M ${x1} ${y1} C ${x1} ${y1 - bend} ${x2} ${y2 + bend} ${x2} ${y2}`,
      "stroke-width": (0.5 + 5 * Math.abs(share)).toFixed(2),
    });
  });
  const marks = data.nodes.map((node, i) => {
    const [x, y] = place[i];
    if (node.kind === "component")
      make("rect", { class: "back", x: x - 5, y: y - 5, width: 10, height: 10 }, svg);
    const mark = node.kind === "component"
      ? make("rect", { x: x - 5, y: y - 5, width: 10, height: 10 }, svg)
      : make("circle", { cx: x, cy: y, r: 5.5 }, svg);
    mark.setAttribute("class", "node");
    mark.setAttribute("tabindex", "0");
    mark.setAttribute("role", "button");
    mark.setAttribute("aria-label", nameOf(i));
    mark.setAttribute("data-node", i);
    if (node.kind === "component") mark.style.fillOpacity = 0.1 + 0.9 * Math.min(1, node.g);
    return mark;
  });

  function nameOf(i) {
    const node = data.nodes[i], at = data.columns.length > 1 ? ` at ${node.column} “${shown(data.columns[node.column])}”` : "";
    if (node.kind === "component") return `${data.rows[node.row]}:${node.index}${at}`;
    return `${node.kind} “${shown(node.text)}”${at}`;
  }

  // --- pointing and pinning

  let pinned = null, least = 0.02;
  function cell(row, text) {
    const element = document.createElement("td");
    element.textContent = text;
    row.append(element);
  }
  function table(heading, list, end) {
    const box = $("detail");
    const title = document.createElement("h3");
    title.textContent = `${heading} (${list.length})`;
    const rows = document.createElement("table");
    for (const i of list.slice(0, 12)) {
      const row = document.createElement("tr");
      cell(row, nameOf(data.edges[i][end]));
      cell(row, `${(100 * data.edges[i][3]).toFixed(1)} %`);
      cell(row, data.edges[i][2].toPrecision(3));
      rows.append(row);
    }
    box.append(title, rows);
  }
  function visible() {
    return data.edges.map((_, i) => i).filter((i) => Math.abs(data.edges[i][3]) >= least);
  }
  function look(chosen) {
    const box = $("detail"), own = visible();
    const into = own.filter((i) => data.edges[i][1] === chosen), from = own.filter((i) => data.edges[i][0] === chosen);
    const on = new Set([...into, ...from]);
    lines.forEach((line, i) => line.classList.toggle("on", on.has(i)));
    edges.classList.toggle("chosen", chosen !== null);
    marks.forEach((mark, i) => {
      mark.classList.toggle("on", i === chosen);
      mark.classList.toggle("pinned", i === pinned);
    });
    box.replaceChildren();
    if (chosen === null) return;
    const title = document.createElement("h2"), node = data.nodes[chosen];
    title.textContent = nameOf(chosen);
    const facts = document.createElement("p");
    facts.textContent = node.kind === "component"
      ? `importance ${node.g}, ‖U‖ V·x ${node.a}` : `value ${node.a}`;
    box.append(title, facts);
    table("From", into, 0);
    table("To", from, 1);
  }
  function redraw() {
    const own = visible();
    edges.replaceChildren(...own.map((i) => lines[i]));
    $("least").textContent = `${(100 * least).toFixed(1)} %`;
    $("counts").textContent = `${data.nodes.length} nodes, ${own.length} of ${data.edges.length} edges`
      + (data.left_out ? `; ${data.left_out} less important subcomponents are left out` : "");
    look(pinned);
  }
  const nodeOf = (event) => {
    const found = event.target.closest("[data-node]");
    return found ? Number(found.dataset.node) : null;
  };
  svg.addEventListener("pointerover", (event) => {
    const i = nodeOf(event);
    if (i !== null) look(i);
  });
  svg.addEventListener("pointerout", (event) => {
    if (nodeOf(event) !== null) look(pinned);
  });
  svg.addEventListener("focusin", (event) => {
    const i = nodeOf(event);
    if (i !== null) look(i);
  });
  const pin = (i) => {
    pinned = pinned === i ? null : i;
    look(pinned);
  };
  svg.addEventListener("click", (event) => pin(nodeOf(event)));
  svg.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    pin(nodeOf(event));
  });
  $("threshold").value = Math.round(100 * Math.sqrt(least));
  $("threshold").addEventListener("input", (event) => {
    least = (event.target.value / 100) ** 2;
    redraw();
  });
  redraw();
})();

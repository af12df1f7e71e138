"use strict";
// Text reaches the page through textContent alone: what a transcript holds stays text.

const PAGE_SIZE = 20;

function readBlock(id) {
  const block = document.getElementById(id);
  return block === null ? null : JSON.parse(block.textContent);
}

function make(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

// Curves: the values at the step nearest to the pointer, or chosen by the arrow keys.

function showValue(value, isPercent) {
  return isPercent ? (100 * value).toFixed(2) + " %" : String(Number(value.toPrecision(4)));
}

function describePoint(panel, step) {
  const lines = ["step " + step.toLocaleString("en")];
  for (const curve of panel.curves) {
    const point = curve.points.find((candidate) => candidate[0] === step);
    if (!point) continue;
    const [, value, low, high] = point;
    const limits = low === null || high === null
      ? "" : " [" + showValue(low, panel.percent) + ", " + showValue(high, panel.percent) + "]";
    lines.push(curve.name + " " + showValue(value, panel.percent) + limits);
  }
  return lines.join("\n");
}

function startPlot(plot, panel) {
  const steps = [...new Set(panel.curves.flatMap((curve) => curve.points.map((point) => point[0])))];
  steps.sort((a, b) => a - b);
  const canvas = plot.querySelector(".canvas");
  const cursor = plot.querySelector(".cursor");
  const tip = plot.querySelector(".tip");
  let place = steps.length - 1;

  function show() {
    const share = steps[place] / panel.last;
    cursor.style.left = 100 * share + "%";
    tip.textContent = describePoint(panel, steps[place]);
    tip.classList.toggle("left", share > 0.5);
    cursor.hidden = tip.hidden = false;
  }
  function hide() {
    cursor.hidden = tip.hidden = true;
  }
  function follow(event) {
    const box = canvas.getBoundingClientRect();
    const wanted = panel.last * (event.clientX - box.left) / box.width;
    place = steps.reduce((best, step, at) => Math.abs(step - wanted) < Math.abs(steps[best] - wanted) ? at : best, 0);
    show();
  }
  plot.addEventListener("pointermove", follow);
  plot.addEventListener("pointerdown", follow);
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("focus", show);
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: place - 1, ArrowRight: place + 1, Home: 0, End: steps.length - 1 };
    if (event.key === "Escape") hide();
    if (!(event.key in moves)) return;
    event.preventDefault();
    place = Math.min(Math.max(moves[event.key], 0), steps.length - 1);
    show();
  });
}

// Tables: a click on a heading sorts by that column, another one the other way round.

function startTable(table) {
  const body = table.tBodies[0];
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    const button = make("button", "", heading.textContent);
    button.type = "button";
    heading.replaceChildren(button);
    button.addEventListener("click", () => {
      const isAscending = heading.getAttribute("aria-sort") === "descending";
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", isAscending ? "ascending" : "descending");
      const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const isNumeric = heading.classList.contains("number");
      const rows = [...body.rows].sort((a, b) =>
        isNumeric ? Number(key(a)) - Number(key(b)) : key(a).localeCompare(key(b)));
      body.append(...(isAscending ? rows : rows.reverse()));
    });
  });
}

// Utterances: filtered, sorted and shown a page at a time.

function fold(text) {
  return text.normalize("NFC").toLocaleLowerCase();
}

const KINDS = { worst: "among the worst", random: "drawn at random" };
const SORTS = {
  rate: (a, b) => b.rate - a.rate || b.errors - a.errors,
  errors: (a, b) => b.errors - a.errors || b.rate - a.rate,
  characters: (a, b) => b.characterRate - a.characterRate,
  longest: (a, b) => b.seconds - a.seconds,
  shortest: (a, b) => a.seconds - b.seconds,
  id: (a, b) => a.id.localeCompare(b.id, undefined, { numeric: true }),
};

// Pieces of a word are equal and different in turn.
function makeWord(className, pieces) {
  const word = make("span", className);
  if (typeof pieces === "string") {
    word.textContent = pieces;
  } else {
    pieces.forEach((piece, at) => word.append(at % 2 ? make("mark", "", piece) : piece));
  }
  return word;
}

function makePair(pair) {
  const [said, found] = typeof pair === "string" ? [pair, pair] : pair;
  const kind = typeof pair === "string" ? "" : said === null ? " inserted" : found === null ? " lost" : " replaced";
  const made = make("span", "pair" + kind);
  made.append(makeWord("said", said ?? "–"), makeWord("found", found ?? "–"));
  return made;
}

function count(number, unit) {
  return number + " " + unit + (number === 1 ? "" : "s");
}

function side(utterance, at) {
  return utterance.pairs
    .map((pair) => typeof pair === "string" ? pair : Array.isArray(pair[at]) ? pair[at].join("") : pair[at])
    .filter((word) => word !== null)
    .join(" ");
}

function makeUtterance(utterance, clips) {
  const item = make("li", "utterance");
  const header = make("header");
  header.append(make("bdi", "", utterance.id));
  if (utterance.kind) header.append(make("span", "badge", KINDS[utterance.kind]));
  const facts = make("p", "quiet");
  if (utterance.seconds !== null) facts.append(make("span", "", utterance.seconds.toFixed(1) + " s"));
  facts.append(
    make("span", "", "WER " + (100 * utterance.rate).toFixed(1) + " %"),
    make("span", "", count(utterance.errors, "error") + " in " + count(utterance.words, "word")),
    make("span", "", "CER " + (100 * utterance.characterRate).toFixed(1) + " %"));
  header.append(facts);
  const spoken = make("p", "hidden", "reference: " + side(utterance, 0) + ". hypothesis: " + side(utterance, 1) + ".");
  const aligned = make("div", "aligned");
  aligned.dir = "auto";
  aligned.setAttribute("aria-hidden", "true");
  aligned.append(...utterance.pairs.map(makePair));
  item.append(header, spoken, aligned);
  if (!utterance.pairs.length) aligned.append(make("span", "quiet", "no words, neither said nor found"));
  if (Object.hasOwn(clips, utterance.id)) {
    const player = make("audio");
    player.controls = true;
    player.preload = "metadata";
    player.setAttribute("aria-label", "clip " + utterance.id);
    player.src = "data:audio/mpeg;base64," + clips[utterance.id];
    item.append(player);
  }
  return item;
}

function startExplorer(explorer) {
  const { utterances, facets } = readBlock(explorer.dataset.utterances);
  const clips = readBlock(explorer.dataset.clips) ?? {};
  const find = (name) => explorer.querySelector("[data-control=" + name + "]");
  const [text, kind, group, order] = ["text", "kind", "group", "order"].map(find);
  const list = explorer.querySelector(".list");
  const status = explorer.querySelector(".status");
  const more = explorer.querySelector(".more");
  for (const utterance of utterances) {
    utterance.searched = fold([utterance.id, side(utterance, 0), side(utterance, 1)].join("\n"));
  }
  let found = [];
  let numShown = 0;

  function showMore() {
    const next = found.slice(numShown, numShown + PAGE_SIZE);
    list.append(...next.map((utterance) => makeUtterance(utterance, clips)));
    numShown += next.length;
    more.hidden = numShown >= found.length;
    status.textContent = found.length
      ? found.length.toLocaleString("en") + " of " + utterances.length.toLocaleString("en") + " utterances, "
        + numShown.toLocaleString("en") + " shown"
      : "no utterance matches";
  }
  function matchesGroup(utterance) {
    if (group === null || group.value === "") return true;
    const [facet, value] = group.value.split(",").map(Number);
    return utterance.groups[facet] === facets[facet].values[value];
  }
  function apply() {
    const wanted = fold(text.value.trim());
    found = utterances.filter((utterance) => utterance.searched.includes(wanted) && matchesGroup(utterance)
      && (kind === null || kind.value === "" || utterance.kind === kind.value));
    found.sort(SORTS[order.value]);
    list.replaceChildren();
    numShown = 0;
    showMore();
  }
  for (const control of [text, kind, group, order]) control?.addEventListener("input", apply);
  more.addEventListener("click", () => {
    const first = numShown;
    showMore();
    const item = list.children[first];
    item.tabIndex = -1;
    item.focus();
  });
  apply();
}

const panels = readBlock("panels") ?? [];
for (const plot of document.querySelectorAll(".plot")) startPlot(plot, panels[Number(plot.dataset.panel)]);
for (const table of document.querySelectorAll("table.sortable")) startTable(table);
for (const explorer of document.querySelectorAll(".explorer")) startExplorer(explorer);

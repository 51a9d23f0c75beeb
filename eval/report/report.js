// Draws the plots and shows the questions of the report. Everything comes from the page's JSON block, and every text of
// it reaches the page as text (textContent), never as markup.
"use strict";

const DATA = JSON.parse(document.getElementById("data").textContent);
const PAGE_OF_CARDS = 24;
const $ = (id) => document.getElementById(id);

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

const plain = (name) => name.replaceAll("_", " ");
const levelName = (level) => (/^l[123]$/.test(level) ? level.toUpperCase() : plain(level));

// ---- plots

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

function coloured(figure) {
  const { data, layout } = structuredClone(figure);
  for (const trace of data) {
    const own = colour(trace.meta.side);
    trace.marker = { ...trace.marker, color: own };
    if (trace.marker.line) trace.marker.line.color = own;
    if (trace.marker.pattern) Object.assign(trace.marker.pattern, { fgcolor: own, bgcolor: colour("paper"), fillmode: "overlay" });
    if (trace.type === "bar") trace.marker.line = { color: own, width: 1 };
    if (trace.line) trace.line.color = own;
    if (trace.error_x) trace.error_x.color = own;
  }
  const axis = { gridcolor: colour("line"), linecolor: colour("strong-line"), zerolinecolor: colour("line") };
  for (const shape of layout.shapes || []) shape.line.color = colour("ink");
  const text = { color: colour("ink"), family: getComputedStyle(document.body).fontFamily, size: 12 };
  return {
    data,
    layout: {
      ...layout, font: text, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", dragmode: false,
      xaxis: { ...axis, ...layout.xaxis, fixedrange: true }, yaxis: { ...axis, ...layout.yaxis, fixedrange: true },
      hoverlabel: { align: "left", bgcolor: colour("paper"), bordercolor: colour("strong-line"), font: text },
    },
  };
}

const drawn = new Map();

function draw(id, figure, width) {
  drawn.set(id, figure);
  const { data, layout } = coloured(figure);
  Plotly.newPlot($(id), data, width ? { ...layout, width } : layout, { displayModeBar: false, responsive: !width });
}

function drawAll(width) {
  for (const [id, figure] of drawn) draw(id, figure, width && id.startsWith("loss") ? width / 2 : width);
}

function option(value, text) {
  const made = element("option", "", text);
  made.value = value;
  return made;
}

function startPlots() {
  if (!DATA.views.length) return;
  const tasks = [...new Set(DATA.views.map((view) => view.task))];
  for (const task of tasks) $("view-task").append(option(task, task ? DATA.tasks[task] : "All, overall"));
  const chooseLevel = () => {
    const level = document.querySelector("input[name=level]:checked").value;
    const view = DATA.views.find((each) => each.task === $("view-task").value && each.level === level);
    draw("forest", view.forest);
    draw("bars", view.bars);
  };
  const chooseTask = () => {
    const views = DATA.views.filter((view) => view.task === $("view-task").value);
    const preferred = views.find((view) => view.level === "l2") || views[0];
    $("view-levels").querySelectorAll("label").forEach((label) => label.remove());
    for (const view of views) {
      const label = element("label");
      const radio = element("input");
      Object.assign(radio, { type: "radio", name: "level", value: view.level, checked: view === preferred });
      label.append(radio, ` ${view.label}`);
      $("view-levels").append(label);
    }
    chooseLevel();
  };
  $("view-task").value = (DATA.views.find((view) => view.level === "l2") || DATA.views[0]).task;
  $("view-task").addEventListener("change", chooseTask);
  $("view-levels").addEventListener("change", chooseLevel);
  chooseTask();
  DATA.losses.forEach((loss, index) => draw(`loss-${index}`, loss.figure));
}

// ---- questions

function pictures(flip) {
  if (!flip.images.length) return null;
  const box = element("div", "pictures");
  for (const place of flip.images) {
    if (place === null) {
      box.append(element("p", "gone", "Image not available"));
      continue;
    }
    const image = element("img");
    Object.assign(image, { loading: "lazy", decoding: "async", alt: `Image of question ${flip.key}` });
    image.src = `data:image/jpeg;base64,${DATA.images[place]}`;
    box.append(image);
  }
  return box;
}

function mark(correct) {
  const made = element("span", `mark ${correct ? "yes" : "no"}`, correct ? "✓" : "✗");
  made.setAttribute("role", "img");
  made.setAttribute("aria-label", correct ? "right" : "wrong");
  return made;
}

function sideLabel(side) {
  return element("span", `side ${side}`, DATA.names[side]);
}

/** Rows are models, with the predictions of all passes in one cell each: what fits on a small card. */
function shortAnswers(flip) {
  const table = element("table", "answers");
  const body = table.createTBody();
  for (const side of ["a", "b"]) {
    const row = body.insertRow();
    const head = element("th");
    head.scope = "row";
    head.append(sideLabel(side));
    row.append(head);
    const cell = row.insertCell();
    for (const [number, pass] of flip.passes.entries()) {
      const answer = pass[side];
      const said = answer.prediction ?? (answer.response.trim() ? "unparsed" : "no answer");
      if (number) cell.append("  ");
      cell.append(`${said.length > 60 ? `${said.slice(0, 60)}…` : said} `, mark(answer.correct));
    }
  }
  return table;
}

function answerCell(cell, pass, side) {
  const { response, prediction, correct } = pass[side];
  const read = prediction === null ? "unparsed" : prediction;
  const meant = prediction !== null && pass.options[prediction];
  cell.append(mark(correct), ` ${read}${meant ? `. ${meant}` : ""}`);
  if (response.trim() !== read) cell.append(element("span", "raw", `said: ${response.trim() || "nothing"}`));
}

/** A row a pass: what is right and what both answered, in full. */
function longAnswers(flip) {
  const box = element("div", "answers-box scroll");
  const table = element("table", "answers");
  box.append(table);
  const head = table.createTHead().insertRow();
  for (const text of [flip.passes.length > 1 ? "pass" : "", "right answer", "a", "b"]) {
    const cell = element("th");
    cell.scope = "col";
    cell.append(text === "a" || text === "b" ? sideLabel(text) : text);
    head.append(cell);
  }
  const body = table.createTBody();
  for (const [number, pass] of flip.passes.entries()) {
    const row = body.insertRow();
    const first = element("th", "", flip.passes.length > 1 ? String(number + 1) : "");
    first.scope = "row";
    row.append(first);
    const right = pass.answer.map((answer) => (pass.options[answer] ? `${answer}. ${pass.options[answer]}` : answer));
    row.insertCell().textContent = [...new Set(right)].join(" / ");
    for (const side of ["a", "b"]) answerCell(row.insertCell(), pass, side);
  }
  return box;
}

function card(flip, open) {
  const made = element("article", `card ${flip.right}`);
  const head = element("div", "head");
  const title = element("h3");
  const label = open ? element("button") : title;
  label.append(element("span", "", "Only "), sideLabel(flip.right), element("span", "unseen", `: ${flip.question.slice(0, 80)}`));
  if (open) {
    label.type = "button";
    label.addEventListener("click", open);
    title.append(label);
  }
  const place = [DATA.tasks[flip.task], ...Object.values(flip.categories).slice(-2).map(plain), flip.key];
  head.append(title, element("p", "place", place.join(" · ")));
  const shown = pictures(flip);
  const body = element("div", "body");
  body.append(element("p", "question", flip.question));
  const options = element("ul", "options");
  for (const [letter, text] of Object.entries(flip.options)) {
    options.append(element("li", flip.answer.includes(letter) ? "right" : "", `${letter}. ${text}`));
  }
  body.append(options);
  made.append(head);
  if (shown) made.append(shown);
  else made.classList.add("textonly");
  made.append(body, open ? shortAnswers(flip) : longAnswers(flip));
  return made;
}

const searchable = new Map();

/** All texts of a question in lower case; made when a search first asks for it. */
function textOf(flip) {
  if (!searchable.has(flip)) {
    const texts = [flip.key, flip.question, ...Object.values(flip.options), ...flip.answer];
    for (const pass of flip.passes) texts.push(pass.a.response, pass.b.response);
    searchable.set(flip, texts.join("\n").toLowerCase());
  }
  return searchable.get(flip);
}

let matching = [];
let cardsShown = 0;
let current = 0;

function fillTasks() {
  const counts = new Map();
  for (const flip of DATA.flips) counts.set(flip.task, (counts.get(flip.task) || 0) + 1);
  $("filter-task").append(option("", `all (${DATA.flips.length})`));
  for (const [task, count] of counts) $("filter-task").append(option(task, `${DATA.tasks[task]} (${count})`));
}

/** Names by level, with their counts among the questions of the chosen benchmark and direction. */
function fillCategories(flips) {
  const chosen = $("filter-category").value;
  const levels = new Map();
  for (const flip of flips) {
    for (const [level, name] of Object.entries(flip.categories)) {
      if (!levels.has(level)) levels.set(level, new Map());
      levels.get(level).set(name, (levels.get(level).get(name) || 0) + 1);
    }
  }
  const select = $("filter-category");
  select.replaceChildren(option("", `all (${flips.length})`));
  for (const level of DATA.levels.filter((each) => levels.has(each))) {
    const group = element("optgroup");
    group.label = levelName(level);
    for (const [name, count] of [...levels.get(level)].sort(([a], [b]) => DATA.categories.indexOf(a) - DATA.categories.indexOf(b))) {
      group.append(option(JSON.stringify([level, name]), `${plain(name)} (${count})`));
    }
    select.append(group);
  }
  if ([...select.options].some((each) => each.value === chosen)) select.value = chosen;
}

function filter() {
  const direction = document.querySelector("input[name=direction]:checked").value;
  const task = $("filter-task").value;
  const words = $("filter-text").value.trim().toLowerCase();
  const some = DATA.flips.filter((flip) => (!direction || flip.right === direction) && (!task || flip.task === task));
  fillCategories(some);
  const [level, name] = $("filter-category").value ? JSON.parse($("filter-category").value) : [];
  matching = some.filter((flip) => (!level || flip.categories[level] === name) && (!words || textOf(flip).includes(words)));
  cardsShown = 0;
  $("cards").replaceChildren();
  showMore();
}

function showMore() {
  const until = Math.min(cardsShown + PAGE_OF_CARDS, matching.length);
  const made = document.createDocumentFragment();
  for (let place = cardsShown; place < until; place++) made.append(card(matching[place], () => view(place)));
  $("cards").append(made);
  cardsShown = until;
  $("count").textContent = matching.length ? `${cardsShown.toLocaleString("en")} of ${matching.length.toLocaleString("en")} questions shown` : "No question matches.";
  $("more").hidden = cardsShown === matching.length;
}

function view(place) {
  current = place;
  $("viewed").replaceChildren(card(matching[place]));
  $("position").textContent = `${(place + 1).toLocaleString("en")} of ${matching.length.toLocaleString("en")}`;
  $("previous").disabled = place === 0;
  $("next").disabled = place === matching.length - 1;
  if (!$("viewer").open) $("viewer").showModal();
  $("viewer").scrollTop = 0;
}

function step(by) {
  if (current + by >= 0 && current + by < matching.length) view(current + by);
}

function closed() {
  $("viewed").replaceChildren();
  while (cardsShown <= current) showMore();
  const opened = $("cards").children[current];
  if (opened) opened.querySelector("button").focus();
}

function startGallery() {
  fillTasks();
  for (const control of [$("filter-task"), $("filter-category"), ...document.querySelectorAll("input[name=direction]")]) {
    control.addEventListener("change", filter);
  }
  let typing;
  $("filter-text").addEventListener("input", () => {
    clearTimeout(typing);
    typing = setTimeout(filter, 150);
  });
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  $("more").addEventListener("click", () => {
    const first = cardsShown;
    showMore();
    $("cards").children[first].querySelector("button").focus();
  });
  $("previous").addEventListener("click", () => step(-1));
  $("next").addEventListener("click", () => step(1));
  $("close").addEventListener("click", () => $("viewer").close());
  $("viewer").addEventListener("close", closed);
  document.addEventListener("keydown", (event) => {
    if (!$("viewer").open || event.ctrlKey || event.metaKey || event.altKey) return;
    const by = { ArrowRight: 1, j: 1, ArrowLeft: -1, k: -1 }[event.key];
    if (by) {
      event.preventDefault();
      step(by);
    }
  });
  filter();
}

// ---- print: the first cards of what is filtered, and plots as wide as the paper

const PAPER_WIDTH = 690;
let printing = false;

function beforePrint() {
  printing = true;
  const made = matching.slice(0, DATA.print_cards).map((flip) => card(flip, () => {}));
  made.forEach((each) => each.querySelectorAll("img").forEach((image) => (image.loading = "eager")));
  $("cards").replaceChildren(...made);
  drawAll(PAPER_WIDTH);
}

function afterPrint() {
  printing = false;
  const before = Math.max(cardsShown, PAGE_OF_CARDS);
  cardsShown = 0;
  $("cards").replaceChildren();
  while (cardsShown < Math.min(before, matching.length)) showMore();
  drawAll();
}

startPlots();
startGallery();
window.addEventListener("beforeprint", beforePrint);
window.addEventListener("afterprint", afterPrint);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawAll());
// Plotly measures its place while the page is still being laid out, and afterwards follows the window only.
const watch = new ResizeObserver((entries) => {
  for (const entry of entries) if (entry.target.data && !printing) Plotly.Plots.resize(entry.target);
});
for (const id of drawn.keys()) watch.observe($(id));

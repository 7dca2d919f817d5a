// The page of `clip-cid review`. It asks the program that served it, and nobody else.
// What the data say (keys, captions) is only ever set as text.

const ONE_PAGE = 24;
const STEPS = 1000; // of the slider
const MOST_LEAVES = 120; // of a tree that is drawn
const SETTLE = 250; // milliseconds of a slider at rest before the sets are asked for
const SCALES = { cosine: "cosine", squared_euclidean: "squared Euclidean", euclidean: "Euclidean" };
const DECISIONS = {
  not_duplicates: "not duplicates",
  keep: "keep",
  keep_all: "keep all",
  remove_all: "remove all",
};

const $ = (id) => document.getElementById(id);
const view = {
  squared: null, scale: null, order: "size", page: 0, seed: 1, text: "", source: "", kind: "",
  least: "2", most: "", decided: "", set: null,
};
let about = null;
let cards = []; // the sets of the page
let totalSets = 0;
let shownAt = null; // the threshold of the sets on the page
let opened = null; // the set that is shown
let focused = 0; // place of the image that decisions mean
let left = null; // the row on the left, if a pair was asked for
const marked = new Set();

// --- Asking

class Refused extends Error {
  constructor(status, body) {
    super([body.problem, body.fix].filter(Boolean).join(" "));
    this.status = status;
    this.body = body;
  }
}

async function ask(path, parameters = {}, decide = null) {
  const query = new URLSearchParams(Object.entries(parameters).filter(([, value]) => value !== "" && value !== null));
  const options = decide === null ? {} : {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(decide),
  };
  let response;
  try {
    response = await fetch(`api/${path}?${query}`, options);
  } catch {
    throw new Error("The program does not answer: it was ended, or is busy. Confirmed decisions are saved.");
  }
  const body = await response.json();
  if (!response.ok) throw new Refused(response.status, body);
  return body;
}

// Of questions that follow each other quickly the newest is asked when the one before is answered.
function newest(question, show) {
  let waiting = null;
  let busy = false;
  return async (...of) => {
    waiting = of;
    if (busy) return;
    busy = true;
    try {
      while (waiting !== null) {
        const now = waiting;
        waiting = null;
        const answer = await question(...now);
        if (waiting === null) show(answer);
      }
    } catch (error) {
      tell(error.message);
    } finally {
      busy = false;
    }
  };
}

// --- Words and elements

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (key === "class") made.className = value;
    else if (value !== null && value !== false) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

function picture(row, { full = false, alt = "", kept = false } = {}) {
  const image = element("img", { src: `${full ? "full" : "small"}/${row}`, alt, loading: full ? "eager" : "lazy" });
  const frame = element("span", { class: kept ? "frame kept" : "frame" }, image);
  image.addEventListener("error", () => frame.classList.add("absent"));
  if (full) image.addEventListener("load", () => image.classList.toggle("tiny", image.naturalHeight <= 128));
  return frame;
}

const onScale = (squared, scale = view.scale) =>
  scale === "cosine" ? squared / 2 : scale === "euclidean" ? Math.sqrt(squared) : squared;
const distance = (squared) => (squared === null ? "–" : onScale(squared).toPrecision(4));
const count = (number) => number.toLocaleString("en");
const counted = (number, noun) => `${count(number)} ${noun}${number === 1 ? "" : "s"}`;

let silence = 0;
function tell(text, action = null, act = null) {
  const message = $("message");
  message.replaceChildren(text);
  if (action !== null) message.append(element("button", { type: "button", onclick: act }, action));
  (document.querySelector("dialog[open]") ?? document.body).append(message); // what is outside of an open dialog takes no click
  message.popover = "manual"; // above the dialog
  message.hidden = false;
  message.hidePopover();
  message.showPopover();
  clearTimeout(silence);
  silence = setTimeout(hush, action === null ? 6000 : 15000);
}
function hush() {
  const message = $("message");
  if (message.popover) message.hidePopover();
  message.hidden = true;
}

// --- The address remembers what is shown

function remember() {
  const parts = Object.entries(view).filter(([, value]) => value !== null && value !== "");
  history.replaceState(null, "", `#${new URLSearchParams(parts)}`);
}

function recall() {
  const parts = new URLSearchParams(location.hash.slice(1));
  for (const name of Object.keys(view)) if (parts.has(name)) view[name] = parts.get(name);
  for (const name of ["squared", "page", "seed", "set"]) if (view[name] !== null) view[name] = Number(view[name]);
  if (!Number.isFinite(view.squared) || view.squared === null) view.squared = about.squared;
  view.squared = Math.min(Math.max(view.squared, 0), about.limit);
  if (!(view.scale in SCALES)) view.scale = about.metric;
  if (!about.orders.includes(view.order)) view.order = about.orders[0];
}

// --- Threshold

const moveTo = newest((parameters) => ask("threshold", parameters), showThreshold);
const settle = { timer: 0, soon() { clearTimeout(this.timer); this.timer = setTimeout(() => loadSets(), SETTLE); } };

function showThreshold(answer) {
  view.squared = answer.squared;
  const place = (STEPS * onScale(answer.squared, about.metric)) / about.limit_on_scale;
  if (document.activeElement !== $("slider")) $("slider").value = place;
  for (const end of ["x1", "x2"]) $("curve-now").setAttribute(end, place);
  $("slider").setAttribute("aria-valuetext", `${answer.on[view.scale]} ${SCALES[view.scale]}`);
  if (document.activeElement !== $("value")) $("value").value = short(answer.on[view.scale]);
  $("share").textContent = `${(100 * answer.share).toFixed(2)} %`;
  $("share").title = `${count(answer.removed)} of ${count(about.images)} images`;
  $("set-count").textContent = count(answer.sets);
  for (const scale of Object.keys(SCALES)) $(`on-${scale}`).textContent = answer.on[scale];
  if (answer.squared !== shownAt) settle.soon();
  $("before").disabled = !answer.joined_last.length;
  $("after").disabled = !answer.joined_next.length;
  $("before").dataset.squared = stepBefore(answer);
  $("after").dataset.squared = answer.joined_next[0]?.squared ?? "";
  showPairs($("joined-last"), answer.joined_last);
  showPairs($("joined-next"), answer.joined_next);
  remember();
}

// The largest threshold at which the pair that was joined last is apart.
function stepBefore(answer) {
  const last = answer.joined_last[0]?.squared;
  if (last === undefined) return "";
  const below = answer.joined_last.find((link) => link.squared < last);
  return below === undefined ? nextBelow(last) : below.squared;
}

function nextBelow(number) {
  if (number === 0) return 0;
  const bits = new BigInt64Array(1);
  const floats = new Float64Array(bits.buffer);
  floats[0] = number;
  bits[0] -= 1n;
  return floats[0];
}

const short = (number) => String(Number(number.toPrecision(6)));

function showPairs(list, links) {
  list.replaceChildren(...links.map((link) => element("li", {}, element("button", {
    type: "button",
    "aria-label": `Images ${link.left} and ${link.right}`,
    onclick: () => openSet(link.left, [link.left, link.right]),
  }, element("span", { class: "two" }, picture(link.left), picture(link.right)), element("small", {}, distance(link.squared))))));
}

function drawCurve() {
  const top = Math.max(...about.curve, 1e-9);
  const points = about.curve.map((share, place) =>
    `${(STEPS * place) / (about.curve.length - 1)} ${100 - (92 * share) / top}`);
  $("curve-area").setAttribute("d", `M 0 100 L ${points.join(" L ")} L ${STEPS} 100 Z`);
  const run = (STEPS * onScale(about.squared, about.metric)) / about.limit_on_scale;
  for (const end of ["x1", "x2"]) $("curve-run").setAttribute(end, run);
}

// --- Sets

const loadSets = newest(() => {
  const { squared, order, page, seed, text, source, kind, least, most, decided } = view;
  return ask("sets", { squared, order, page, seed, text, source, kind, least, most, decided });
}, showSets);

function showSets(answer) {
  cards = answer.sets;
  totalSets = answer.total;
  shownAt = answer.squared;
  const pages = Math.max(1, Math.ceil(answer.total / ONE_PAGE));
  const of = answer.total === answer.all ? "" : ` of ${count(answer.all)}`;
  $("total").textContent = `${counted(answer.total, "set")}${of}, page ${count(answer.page + 1)} of ${count(pages)}`;
  $("previous").disabled = answer.page === 0;
  $("next").disabled = answer.page + 1 >= pages;
  $("kept-count").textContent = answer.kept === null ? "balance.max_radius decides" : count(answer.kept);
  $("sets").replaceChildren(...cards.map(card));
  document.body.dataset.ready = "yes";
  remember();
}

function card(set) {
  const kept = new Set(set.kept);
  const numbers = element("span", { class: "line" },
    element("b", {}, counted(set.size, "image")),
    element("span", { title: "the longest link of the set" }, `link ${distance(set.weakest)}`),
    set.width === null ? null : element("span", { title: "between the two that are farthest apart" }, `width ${distance(set.width)}`),
    set.known ? element("span", {}, `${count(set.kept_count)} kept`) : null,
    set.decided ? element("span", { class: "keep" }, "decided") : null);
  return element("li", {}, element("button", {
    class: set.decided ? "card decided" : "card", type: "button", onclick: () => openSet(set.row),
  },
  element("span", { class: "strip" }, ...set.rows.map((row) => picture(row, { kept: kept.has(row) }))),
  numbers, element("span", { class: "caption" }, set.caption)));
}

// --- One set

async function openSet(row, pair = null, page = 0) {
  let answer;
  try {
    answer = await ask("set", { squared: view.squared, row, page });
  } catch (error) {
    tell(error.message);
    return;
  }
  const same = opened !== null && opened.row === answer.row && opened.page === answer.page;
  opened = answer;
  view.set = row;
  if (!same) marked.clear();
  left = pair === null ? null : pair[0];
  const wanted = pair === null ? row : pair[1];
  focused = opened.images.findIndex((image) => image.row === wanted);
  if (pair === null && !same) focused = Math.min(1, opened.images.length - 1);
  focused = Math.max(0, focused);
  if (!$("set").open) $("set").showModal();
  showSet(pair);
  if (!same) $("set").scrollTop = 0;
  $("members").focus({ preventScroll: true });
  remember();
}

function showSet(pair = null) {
  $("set-title").textContent = opened.size === 1 ? "One image, alone at this threshold" : `A set of ${counted(opened.size, "image")}`;
  $("set-facts").textContent = opened.size === 1 ? "" : [
    `longest link ${distance(opened.weakest)}`,
    opened.width === null ? "" : `widest pair ${distance(opened.width)}`,
    opened.grows_at === null ? "" : `grows at ${distance(opened.grows_at)}`,
    SCALES[view.scale],
  ].filter(Boolean).join(" · ");
  $("members").replaceChildren(...opened.images.map(member));
  $("member-pager").hidden = opened.pages < 2;
  $("member-page").textContent = `${opened.page + 1} of ${opened.pages}`;
  $("set-decisions").replaceChildren(...opened.decisions.map(decisionLine));
  showMerges();
  drawTree();
  focusOn(focused, pair);
}

function member(image, place) {
  const kept = image.kept_for === image.row;
  const badge = (text, kind) => element("span", { class: `badge ${kind}` }, text);
  const state = kept ? badge("kept", "keep") : image.kept_for < 0 ? badge("removed", "remove") : null;
  const note = kept || image.to_kept === null ? "" : `${distance(image.to_kept)} ${image.kind}`;
  return element("li", {
    class: marked.has(image.row) ? "member marked" : "member", role: "option", id: `image-${image.row}`, tabindex: "-1",
    "aria-selected": "false", title: image.key, onclick: () => focusOn(place),
  }, picture(image.row, { alt: image.key, kept }),
  element("p", {}, state, image.decided ? badge(`decided: ${image.decided}`, image.decided) : null, note),
  element("p", { class: "caption" }, image.caption || image.key));
}

function decisionLine(line) {
  const more = line.images > line.keys.length ? ` and ${line.images - line.keys.length} more` : "";
  return element("li", {}, `${DECISIONS[line.decision]}: ${line.keys.join(", ")}${more}`,
    element("button", { type: "button", onclick: () => inTurn(() => undo(line.id)) }, "Undo"));
}

function focusOn(place, pair = null) {
  if (!opened.images.length) return;
  focused = (place + opened.images.length) % opened.images.length;
  const image = opened.images[focused];
  document.querySelectorAll("#members [aria-selected=true]").forEach((item) => item.setAttribute("aria-selected", "false"));
  const item = $(`image-${image.row}`);
  item?.setAttribute("aria-selected", "true");
  $("members").setAttribute("aria-activedescendant", `image-${image.row}`);
  item?.scrollIntoView({ block: "nearest" });

  if (pair === null) left = null;
  const other = left ?? (image.kept_for >= 0 && image.kept_for !== image.row ? image.kept_for : null);
  const right = pair === null ? image.row : pair[1];
  compare(other, right);
}

let compared = "";
async function compare(one, other) {
  compared = `${one} ${other}`;
  show($("left"), one);
  show($("right"), other);
  $("between").textContent = "";
  if (one === null) {
    $("between").textContent = opened.size > 1 ? "This image is kept." : "";
    return;
  }
  const link = opened.links.find((some) => [some.left, some.right].includes(one) && [some.left, some.right].includes(other));
  const image = opened.images.find((some) => some.row === other && some.kept_for === one);
  const squared = link?.squared ?? image?.to_kept ?? null;
  const words = [squared === null ? "" : `${distance(squared)} apart (${SCALES[view.scale]})`];
  if (link) words.push("linked directly");
  else if (squared !== null && squared > view.squared) words.push("farther than the threshold: joined through others");
  else if (squared !== null) words.push("joined through nearer ones");
  $("between").textContent = words.filter(Boolean).join(" · ");
  const mine = compared;
  try {
    const { kind } = await ask("kind", { row: one, other });
    const known = { perceptual: "nearly the same pixels", semantic: "other pixels" }[kind];
    if (mine === compared && known) $("between").textContent += ` · ${known} (${kind})`;
  } catch { /* the pictures themselves say it */ }
}

function show(figure, row) {
  const known = opened.images.find((image) => image.row === row);
  if (row === null) {
    figure.replaceChildren();
    return;
  }
  const words = known ? [known.key, known.caption].filter(Boolean).join(" · ") : `image ${row}`;
  const state = known?.kept_for === row ? element("span", { class: "badge keep" }, "kept") : null;
  figure.replaceChildren(picture(row, { full: true, alt: words }), element("figcaption", {}, state, words));
}

// --- How it was joined

// Every link joins two groups that were apart until then: with their sizes and, for the tree, their places.
function joins() {
  const groups = new Map();
  const find = (row) => {
    let group = groups.get(row);
    if (group === undefined) groups.set(row, (group = { rows: [row], height: 0, leaf: row }));
    while (group.into) group = group.into;
    return group;
  };
  return opened.links.map((link) => {
    const [one, other] = [find(link.left), find(link.right)];
    const made = { rows: one.rows.concat(other.rows), height: link.squared, parts: [one, other], link };
    one.into = other.into = made;
    return { link, sizes: [one.rows.length, other.rows.length], made };
  });
}

function showMerges() {
  const shown = opened.all_links > opened.links.length ? [] : joins().reverse().slice(0, 60);
  const key = new Map(opened.images.map((image) => [image.row, image.caption || image.key]));
  const name = (row) => `${key.get(row) ?? `image ${row}`}`.slice(0, 60);
  $("merges").replaceChildren(...shown.map(({ link, sizes }) => element("li", {}, element("button", {
    type: "button", onclick: () => openSet(opened.row, [link.left, link.right], opened.page),
  },
  element("b", {}, distance(link.squared)),
  element("span", {}, `${count(sizes[0])} + ${count(sizes[1])}`),
  element("span", {}, `${name(link.left)} — ${name(link.right)}`)))));
}

function drawTree() {
  const tree = $("tree");
  tree.replaceChildren();
  const leaves = opened.size;
  const drawn = leaves > 1 && leaves <= MOST_LEAVES && opened.links.length === opened.all_links;
  $("tree-note").textContent = leaves < 2 ? "" : drawn
    ? "Two groups are joined by the nearest pair of images between them. The dashed line is the threshold; below the tree, each join: the distance of that pair, the images in both groups, and the pair."
    : `A tree of ${count(leaves)} images is not drawn.`;
  tree.setAttribute("height", drawn ? 20 * leaves + 24 : 0);
  if (!drawn) return;

  const width = Math.max(240, Math.min(tree.parentElement.clientWidth - 32, 1200));
  const room = Math.min(260, width * 0.42);
  tree.setAttribute("viewBox", `0 0 ${width} ${20 * leaves + 24}`);
  const top = Math.max(onScale(view.squared), onScale(opened.links.at(-1).squared), 1e-12);
  const x = (squared) => room + ((width - room - 8) * onScale(squared)) / top;
  const key = new Map(opened.images.map((image) => [image.row, image.caption || image.key]));
  const add = (name, attributes, text = "") => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [attribute, value] of Object.entries(attributes)) made.setAttribute(attribute, value);
    made.textContent = text;
    tree.append(made);
  };

  let line = 0;
  const place = (group) => {
    if (!group.parts) {
      const y = 20 * line++ + 12;
      add("text", { x: room - 6, y: y + 4, "text-anchor": "end" }, (key.get(group.leaf) ?? "").slice(0, Math.floor(room / 7)));
      return y;
    }
    const [one, other] = group.parts.map(place);
    const at = x(group.height);
    const [from, to] = group.parts.map((part) => x(part.height));
    add("path", { d: `M ${from} ${one} H ${at} V ${other} H ${to}` });
    return (one + other) / 2;
  };
  place(joins().at(-1).made);
  const limit = x(view.squared);
  add("path", { class: "limit", d: `M ${limit} 0 V ${20 * leaves + 10}` });
}

// --- Decisions

async function decide(decision, rows) {
  try {
    const answer = await ask("decide", {}, { decision, rows });
    marked.clear();
    showDecisions(answer);
    tell(`Saved: ${DECISIONS[decision]}.`);
  } catch (error) {
    const earlier = error instanceof Refused ? error.body.undo : undefined;
    if (earlier === undefined) {
      tell(error.message);
      return;
    }
    tell(error.message, "Undo that", () => inTurn(() => undo(earlier)));
    showDecisions(await ask("decisions")); // another page may have decided
  }
  await again();
}

async function undo(id = null) {
  try {
    const answer = await ask("undo", {}, { id });
    showDecisions(answer);
    tell(answer.undone === null ? "There is nothing to undo." : `Undone: ${DECISIONS[answer.undone]}.`);
  } catch (error) {
    tell(error.message);
    return;
  }
  await again();
}

// After a decision other sets are there, in which the image that was looked at stays in view.
async function again() {
  if ($("set").open) await openSet(opened.images[focused]?.row ?? opened.row, null, 0);
  await moveTo({ squared: view.squared });
  await loadSets();
}

function showDecisions(answer) {
  const gone = answer.gone ? `; ${counted(answer.gone, "image")} decided about not here, such as ${answer.gone_key}` : "";
  $("saved").textContent = `${counted(answer.count, "decision")} in ${about.file}${gone}`;
  $("saved").dataset.count = answer.count;
  $("undo").disabled = !answer.count;
}

async function wholeSet() {
  const rows = opened.images.map((image) => image.row);
  for (let page = 0; rows.length < opened.size; page += 1) {
    if (page !== opened.page) rows.push(...(await ask("set", { squared: view.squared, row: opened.row, page })).images.map((image) => image.row));
  }
  return rows;
}

const acts = {
  keep: () => decide("keep", [opened.images[focused].row]),
  apart() {
    const image = opened.images[focused];
    const rows = marked.size ? [...marked] : [...new Set([left ?? image.kept_for, image.row])];
    if (rows.length < 2 || rows.includes(-1)) tell("Not duplicates of what? Go to an image that is not kept, or mark two with m.");
    else return decide("not_duplicates", rows);
  },
  "keep-all": async () => decide("keep_all", await wholeSet()),
  "remove-all": async () => decide("remove_all", await wholeSet()),
  mark() {
    const { row } = opened.images[focused];
    if (!marked.delete(row)) marked.add(row);
    $(`image-${row}`).classList.toggle("marked", marked.has(row));
  },
  undo: () => undo(),
  close: () => $("set").close(),
  earlier: () => step(-1),
  later: () => step(1),
  more: () => openSet(opened.row, null, Math.min(opened.page + 1, opened.pages - 1)),
  fewer: () => openSet(opened.row, null, Math.max(opened.page - 1, 0)),
};

async function step(by) {
  const here = cards.findIndex((set) => set.row === opened.row);
  let next = here < 0 ? 0 : here + by;
  if (next < 0 || next >= cards.length) {
    const page = view.page + by;
    if (page < 0 || page * ONE_PAGE >= totalSets) {
      tell(by > 0 ? "That was the last set." : "That was the first set.");
      return;
    }
    view.page = page;
    await loadSets();
    next = by > 0 ? 0 : cards.length - 1;
  }
  if (cards[next]) await openSet(cards[next].row);
}

// One act after the other: a key pressed while a decision is being saved waits for its set.
let turn = Promise.resolve();
function inTurn(act) {
  turn = turn.then(act).catch((error) => tell(error.message));
}

// --- Keys

const inSet = {
  ArrowRight: () => focusOn(focused + 1), ArrowLeft: () => focusOn(focused - 1),
  J: acts.later, K: acts.earlier, k: acts.keep, d: acts.apart, a: acts["keep-all"], x: acts["remove-all"], m: acts.mark,
};
const anywhere = {
  u: () => undo(),
  "[": () => $("before").click(),
  "]": () => $("after").click(),
  "?": () => $("keys").showModal(),
};

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || $("keys").open) return;
  if (event.target.matches("input:not([type=range]), select")) return;
  if (event.target.matches("input") && event.key.startsWith("Arrow")) return;
  const act = ($("set").open && inSet[event.key]) || anywhere[event.key]; // looked up now, done in turn
  if (act) {
    event.preventDefault();
    inTurn(() => ($("set").open || anywhere[event.key] ? act() : null));
  } else if (event.key === "/" && !$("set").open) {
    event.preventDefault();
    $("text").focus();
  } else if (event.key === "J" && cards.length && !$("set").open) {
    openSet(cards[0].row);
  }
});

// --- Begin

function listen() {
  $("slider").addEventListener("input", () => {
    moveTo({ scale: about.metric, value: (about.limit_on_scale * $("slider").value) / STEPS });
    view.page = 0;
    settle.soon();
  });
  $("exact").addEventListener("submit", (event) => {
    event.preventDefault();
    $("value").blur();
    jump({ scale: view.scale, value: $("value").value.trim() });
  });
  for (const id of ["before", "after"]) $(id).addEventListener("click", () => jump({ squared: $(id).dataset.squared }));
  $("as-balanced").addEventListener("click", () => jump({ squared: about.squared }));
  $("scale").addEventListener("change", async () => {
    view.scale = $("scale").value;
    await moveTo({ squared: view.squared });
    await loadSets();
  });
  for (const id of ["order", "source", "kind", "decided", "least", "most", "text"]) {
    $(id).addEventListener("input", () => {
      view[id] = $(id).value;
      view.page = 0;
      if (id === "order") view.seed = Math.floor(Math.random() * 1e6);
      settle.soon();
    });
  }
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  $("previous").addEventListener("click", () => { view.page -= 1; loadSets(); });
  $("next").addEventListener("click", () => { view.page += 1; loadSets(); });
  $("undo").addEventListener("click", () => inTurn(() => undo()));
  $("help").addEventListener("click", () => $("keys").showModal());
  $("set").addEventListener("close", () => { view.set = null; opened = null; remember(); });
  document.querySelectorAll("[data-act]").forEach((button) => button.addEventListener("click", () => inTurn(() => acts[button.dataset.act]())));
}

async function jump(parameters) {
  view.page = 0;
  await moveTo(parameters);
  await loadSets();
  if ($("set").open) await openSet(opened.row);
}

function options(select, names) {
  select.append(...names.map(([value, text]) => element("option", { value }, text)));
}

async function begin() {
  about = await ask("about");
  document.title = `Review of ${about.name}`;
  $("name").textContent = about.name;
  recall();
  options($("scale"), Object.entries(SCALES));
  options($("order"), about.orders.map((order) => [order, order]));
  options($("source"), about.sources.map((source) => [source, source]));
  options($("kind"), about.kinds.map((kind) => [kind, kind]));
  for (const id of ["scale", "order", "source", "kind", "decided", "least", "most", "text"]) $(id).value = view[id];
  drawCurve();
  listen();
  const asked = view.set;
  await Promise.all([moveTo({ squared: view.squared }), loadSets(), ask("decisions").then(showDecisions)]);
  if (asked !== null) await openSet(asked);
}

begin().catch((error) => tell(error.message));

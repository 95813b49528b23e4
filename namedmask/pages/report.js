// SPDX-License-Identifier: MIT
// The script of a run's page: search, score cuts, verdicts, the enlarged view. `namedmask review` serves the same page:
// tiles are then fetched when they come into view, and verdicts are sent to the server at once.
"use strict";
document.documentElement.classList.remove("no-script");

const find = (selector, root = document) => root.querySelector(selector);
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const data = JSON.parse(find("#data").textContent);
const gallery = find("#masks-by-category"), list = find(".contents"), dialog = find("dialog");
const tiles = () => all("section:not([hidden]) .tile:not([hidden])", gallery);
const counted = value => value.toLocaleString("en-US");

// -- search for categories and photos, order of the categories

const entries = [...list.children].map((item, number) => ({
  item, number, section: all(".category")[number], name: find(".name", item).textContent, ...item.dataset,
}));
const orders = {
  order: (a, b) => a.order - b.order,
  name: (a, b) => a.name.localeCompare(b.name),
  count: (a, b) => b.count - a.count,
  mean: (a, b) => (a.mean || Infinity) - (b.mean || Infinity),
};
const searched = () => find("#find").value.trim().toLowerCase();
find("#find").addEventListener("input", async () => {
  const query = searched(), found = data.served && query ? await categoriesWith(query) : [];
  if (query !== searched()) return;  // meanwhile, something else is searched for
  for (const { item, section, name } of entries) {
    const photo = name.toLowerCase().includes(query) ? "" : query;  // a category that matches shows all of its masks
    const shown = data.served ? !photo || found.includes(Number(section.dataset.category)) : showPhotos(section, photo);
    item.hidden = section.hidden = !shown;
    if (data.served && shown && (section.dataset.photo ?? "") !== photo) {
      section.dataset.photo = photo;
      restart(section);
    }
  }
  const none = find("#no-match");
  none.hidden = entries.some(({ item }) => !item.hidden);
  none.textContent = `No category and no photo ${data.served ? "" : "on this page "}matches “${find("#find").value.trim()}”.`;
});
async function categoriesWith(photo) {
  const answer = await fetch(`search?${new URLSearchParams({ photo })}`).catch(() => undefined);
  return answer?.ok ? answer.json() : [];
}
function showPhotos(section, photo) {
  const matches = all(".tile", section).filter(tile => {
    tile.hidden = !find(".name", tile).textContent.toLowerCase().includes(photo);
    return !tile.hidden;
  });
  for (const part of all(".tiles", section)) part.previousElementSibling.hidden = !find(".tile:not([hidden])", part);
  return !photo || matches.length > 0;
}
find("#sort").addEventListener("change", event => {
  entries.sort(orders[event.target.value]);
  list.append(...entries.map(entry => entry.item));
  gallery.append(...entries.map(entry => entry.section));
});

// -- verdicts: by photo and category, with the score of the mask (null: the run has no such mask)

const keyOf = tile => JSON.parse(tile.dataset.key);
const review = new Map(data.review.map(([photo, category, verdict, score]) =>
  [JSON.stringify([photo, category]), { photo, category, verdict, score }]));
const inGallery = tile => document.getElementById(tile.id) ?? tile;  // it may have been loaded again meanwhile
const verdictOf = tile => review.get(JSON.stringify(keyOf(tile)))?.verdict;
const history = [];  // what undo restores
const unsaved = new Map();  // verdicts (null: none) that the server, or a download, does not have

function show(tile) {
  const verdict = verdictOf(tile);
  tile.dataset.verdict = verdict ?? "";
  for (const button of all(".verdicts button", tile)) button.setAttribute("aria-pressed", button.value === verdict);
  if (tile.id === current?.id) showVerdicts();
}
function decide(tile, verdict, remember = true) {
  const [photo, category] = keyOf(tile), key = JSON.stringify([photo, category]), before = review.get(key)?.verdict;
  if (verdict === "detector" && !("choice" in tile.dataset)) return;
  if (remember) history.push({ tile, verdict: before });
  if (verdict) review.set(key, { photo, category, verdict, score: Number(tile.dataset.score) });
  else review.delete(key);
  unsaved.set(key, { photo, category, verdict: verdict ?? null });
  show(inGallery(tile));
  showCuts();
  if (data.served) save();
}
function undo() {
  const last = history.pop();
  if (!last) return;
  const tile = inGallery(last.tile);
  decide(tile, last.verdict, false);
  if (dialog.open) enlarge(tile);
  else find(".frame", tile).focus();
}
const toggle = (tile, verdict) => decide(tile, verdictOf(tile) === verdict ? undefined : verdict);

let sending = false;
async function save() {
  if (!data.served) {
    const lines = [...review.values()].map(({ photo, category, verdict }) => JSON.stringify({ photo, category, verdict }));
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob(lines.map(line => line + "\n"), { type: "application/jsonl" }));
    link.download = "review.jsonl";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
    unsaved.clear();
    return showStatus("Downloaded: put review.jsonl into the run folder.");
  }
  if (sending) return;
  sending = true;
  try {
    while (unsaved.size) {
      const sent = [...unsaved].slice(0, 100);  // the server limits the size of a request
      const answer = await fetch("review", {
        method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(sent.map(([, one]) => one)),
      });
      if (!answer.ok) throw new Error(await answer.text());
      for (const [key, one] of sent) if (unsaved.get(key) === one) unsaved.delete(key);
    }
    showStatus("Saved.");
  } catch (error) {
    showStatus(`Not saved: ${error.message}`, true);
  } finally {
    sending = false;
  }
}
function showStatus(text, failed = false) {
  const status = find("#status");
  status.textContent = text;
  status.classList.toggle("failed", failed);
  find("#save").hidden = data.served && !failed;
}
addEventListener("beforeunload", event => {
  if (unsaved.size) event.preventDefault();
});

// -- score cuts

const cutOf = new Map();  // number of a category -> step of its slider
const atLeast = (score, step) => score >= data.cuts[step];
function stay(counts, reviewed, step) {
  // A mask without a verdict stays by its score, an accepted one always, a rejected one never.
  return reviewed.reduce((count, { verdict, score }) => count + (verdict !== "reject") - atLeast(score, step), counts[step]);
}
function showCuts() {
  let stays = 0, total = 0;
  const reviewed = new Map(data.categories.map(([name]) => [name, []]));
  for (const one of review.values()) if (one.score !== null) reviewed.get(one.category).push(one);
  for (const section of all(".category")) {
    const number = section.dataset.category, step = cutOf.get(number) ?? 0;
    const [name, counts] = data.categories[number], left = stay(counts, reviewed.get(name), step);
    stays += left;
    total += counts[0];
    const output = find("output", section);
    if (output) output.textContent = `${counted(left)} of ${counted(counts[0])} stay at ${data.cuts[step]}`;
    for (const tile of all(".tile", section)) {
      const verdict = verdictOf(tile);
      tile.classList.toggle("out", verdict ? verdict === "reject" : !atLeast(Number(tile.dataset.score), step));
    }
  }
  const overall = find("#review input"), steps = new Set(all(".category input").map(input => input.value));
  find("#review output").textContent = `${counted(stays)} of ${counted(total)} stay` +
    (steps.size > 1 ? " with the cuts of the categories" : ` with --min-score ${data.cuts[overall.value]}`);
  const verdicts = { accept: 0, reject: 0, detector: 0 };
  for (const { verdict, score } of review.values()) if (score !== null) verdicts[verdict] += 1;
  find("#counts").textContent = `${counted(verdicts.accept)} accepted, ${counted(verdicts.reject)} rejected` +
    (verdicts.detector ? `, ${counted(verdicts.detector)} with the detector's mask` : "");
  find("#undo").disabled = !history.length;
}
document.addEventListener("input", event => {
  if (event.target.type !== "range") return;
  const { value, dataset } = event.target;
  if (dataset.category) cutOf.set(dataset.category, Number(value));
  else for (const input of all(".category input[type=range]")) {
    input.value = value;
    cutOf.set(input.dataset.category, Number(value));
  }
  showCuts();
});

// -- the enlarged view

let current;
function showVerdicts() {
  const verdict = verdictOf(current);
  for (const button of all(".verdicts button", dialog)) {
    button.setAttribute("aria-pressed", button.value === verdict);
    button.hidden = button.value === "detector" && !("choice" in current.dataset);
  }
}
function enlarge(tile) {
  current = tile;
  const [photo, category] = keyOf(tile), link = find("#enlarged");
  link.textContent = `${category} · ${find(".name", tile).textContent}`;
  link.href = `#${tile.id}`;
  const views = find(".views", dialog), content = find("template", tile)?.content.cloneNode(true);
  const scale = content ? find(".scale", content) : undefined;
  find(".explained", dialog).replaceChildren(...[find(".hint", tile)?.cloneNode(true), scale].filter(Boolean));
  views.replaceChildren(...(content ? all(".view", content) : [find(".frame", tile).cloneNode(true)]));
  const copied = find(".photo:not(:has(img))", views);
  if (copied) copied.replaceWith(find(".photo", tile).cloneNode(true));
  const bases = all(".photo img:not(.mask)", views);  // one picture, with the masks of several stages
  for (const base of bases.slice(1)) base.src = bases[0].src;
  showVerdicts();
  window.history.replaceState(null, "", `#${tile.id}`);
  if (!dialog.open) dialog.showModal();
}
dialog.addEventListener("scroll", event => {  // views move together
  if (!event.target.matches(".scroll-view")) return;
  for (const view of all(".scroll-view", dialog)) {
    view.scrollTo(event.target.scrollLeft, event.target.scrollTop);
  }
}, true);
dialog.addEventListener("close", () => find(".frame", inGallery(current))?.focus());
dialog.addEventListener("click", event => {
  const button = event.target.closest("button");
  if (event.target === dialog || button?.id === "close") dialog.close();
  else if (button?.dataset.step) move(Number(button.dataset.step));
  else if (button?.id === "full") full();
  else if (button) toggle(current, button.value);
});
function full() {
  find("#full").setAttribute("aria-pressed", dialog.classList.toggle("full"));
}
function openLinked() {
  const id = location.hash.slice(1);
  if (!id.startsWith("mask/") || (dialog.open && current.id === id)) return;
  const tile = document.getElementById(id);
  if (tile) enlarge(tile);
  else if (data.served) {
    fetch(`linked?mask=${encodeURIComponent(id)}`).then(async answer => {
      if (answer.ok) enlarge(prepare(await answer.text())[0]);
    });
  }
}
addEventListener("hashchange", openLinked);

// -- mouse and keys

async function move(by) {
  const from = inGallery(current), linked = !from.isConnected;  // opened by its address, and not loaded in the gallery
  if (linked && by < 0) return;
  const [, category] = keyOf(from), number = data.categories.findIndex(([name]) => name === category);
  const part = linked ? find(`.category[data-category="${number}"] .tiles`, gallery) : from.parentElement;
  const more = by > 0 && find(".more[data-from]", part);
  if (more && more === (linked ? part.firstElementChild : from.nextElementSibling)) await load(more);
  const shown = tiles(), first = shown.findIndex(tile => part.contains(tile));
  const next = shown[linked ? first : shown.indexOf(from) + by];
  if (!next) return;
  if (dialog.open) enlarge(next);
  else find(".frame", next).focus();
}
function moveByRow(tile, down) {
  const from = tile.getBoundingClientRect();
  const below = tiles().map(other => [other, other.getBoundingClientRect()])
    .filter(([, box]) => down ? box.top > from.top + 1 : box.top < from.top - 1);
  const distance = ([, box]) => Math.abs(box.top - from.top) * 10 + Math.abs(box.left - from.left);
  below.sort((a, b) => distance(a) - distance(b));
  if (below.length) find(".frame", below[0][0]).focus();
}
document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input[type=search], input[type=range], select")) return;
  const focused = document.activeElement.closest(".tile");
  if (!dialog.open && focused) current = focused;
  const tile = dialog.open || focused ? current : undefined;
  const verdict = { a: "accept", r: "reject", d: "detector" }[event.key];
  if (event.key === "u") undo();
  else if (event.key === "m") find("#masks").click();
  else if (event.key === "f" && dialog.open) full();
  else if (verdict && tile) {
    if (verdict === "detector" && !("choice" in tile.dataset)) return;
    decide(tile, verdict);
    move(1);
  } else if (/^Arrow(Left|Right|Up|Down)$/.test(event.key)) {
    if (!tile) {
      const seen = tiles().find(one => one.getBoundingClientRect().bottom > 0);
      if (!seen || document.activeElement !== document.body) return;
      find(".frame", seen).focus();
    } else if (event.key === "ArrowLeft" || event.key === "ArrowRight") move(event.key === "ArrowRight" ? 1 : -1);
    else if (dialog.open) return;
    else moveByRow(tile, event.key === "ArrowDown");
  } else if ((event.key === "Enter" || event.key === " ") && event.target.matches(".tile .frame")) enlarge(tile);
  else return;
  event.preventDefault();
});
gallery.addEventListener("click", event => {
  const tile = event.target.closest(".tile"), button = event.target.closest(".verdicts button");
  if (!tile) return;
  if (button) toggle(tile, button.value);
  else if (event.target.closest(".frame")) enlarge(tile);
});
find("#undo").addEventListener("click", undo);
find("#save").addEventListener("click", save);

// -- tiles

function prepare(html) {
  const holder = document.createElement("template");
  holder.innerHTML = html;
  const prepared = all("li", holder.content);
  prepared.filter(item => item.matches(".tile")).forEach(prepareTile);
  return prepared;
}
function prepareTile(tile) {
  const frame = find(".frame", tile);
  frame.tabIndex = 0;
  frame.setAttribute("role", "button");
  show(tile);
}
gallery.addEventListener("error", async event => {  // a photo that has gone or changed; the server says why
  const frame = event.target.closest(".frame");
  if (!frame || event.target.matches(".mask")) return;
  const answer = await fetch(event.target.src).catch(() => undefined), reason = document.createElement("p");
  reason.textContent = `Cannot be shown: ${answer ? await answer.text() : "the server has ended"}`;
  frame.classList.add("broken");
  find(".photo", frame)?.replaceWith(reason);
}, true);
const watcher = new IntersectionObserver(seen => {
  for (const { isIntersecting, target } of seen) if (isIntersecting) load(target);
}, { rootMargin: "600px" });
async function load(more) {
  watcher.unobserve(more);
  const section = more.closest(".category");
  const { category, photo = "" } = section.dataset;
  const query = { category, photo, from: more.dataset.from, show: find("#show").value };
  const answer = await fetch(`tiles?${new URLSearchParams(query)}`).catch(() => undefined);
  if (!more.isConnected) return;  // another order was chosen meanwhile
  if (!answer?.ok) {
    more.textContent = answer ? await answer.text() : "The server has ended: run `namedmask review` again.";
    return;
  }
  more.replaceWith(...prepare(await answer.text()));
  all(".more[data-from]", section).forEach(item => watcher.observe(item));
  showCuts();
}
function restart(section) {
  for (const tiles of all(".tiles", section)) {
    const more = document.createElement("li");
    more.className = "more";
    more.dataset.from = 0;
    tiles.replaceChildren(more);
    watcher.observe(more);
  }
}
find("#show")?.addEventListener("change", () => all(".category").forEach(restart));
all(".tile").forEach(prepareTile);
all(".more[data-from]", gallery).forEach(more => watcher.observe(more));
if (data.served) find("#save").hidden = true;
showCuts();
openLinked();

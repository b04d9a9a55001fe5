"use strict";
// The files of a dataset, in parts that are there while they are in view; captions that are edited.

const $ = (id) => document.getElementById(id);
const box = $("items"), address = box.dataset.address;
const PART = 24; // files that are asked for at once
const drafts = new Map(); // id of a file -> text that is not saved, and the mark of what it began with
let version = null, chosen = null;

async function ask(from = 0, count = 0, signal = undefined) {
  const query = new URLSearchParams({ text: $("text").value, only: $("only").value, from, count });
  const answer = await fetch(`${address}items?${query}`, { signal });
  if (!answer.ok) throw new Error(answer.status);
  return answer.json();
}

// ---- how the dataset stands
const WORDS = {
  ready: "", measuring: translate("measuring …"), failed: translate("It cannot be measured:"), gone: translate("It is not there (any more):"),
  outside: translate("It, or files that it names, lie outside the folders that this page was started with. This command shows them too:"),
};

const TOTALS = { faults: translate("faults"), remarks: translate("remarks") };

function showState(news) {
  const how = news.how ?? (news.decodes ? translate("whole files were read") : translate("only headers were read: damaged, black and equal clips are found by reading whole files"));
  const progress = news.state === "measuring" ? translate("measuring %(n)s files … %(seconds)s s", { n: news.media.toLocaleString("en"), seconds: news.seconds }) : WORDS[news.state];
  $("state").textContent = news.state === "ready" ? how : progress;
  $("told").hidden = !(news.error || news.command);
  $("told").textContent = news.command ?? news.error ?? "";
  const names = { "": translate("files"), dropped: translate("dropped"), uncaptioned: translate("without a caption"), outdated: translate("caches out of date") };
  const counts = Object.entries(news.counts ?? {}).filter(([name]) => name in names);
  const tiles = [...counts.map(([name, count]) => [names[name], count]), ...Object.entries(news.totals ?? {}).map(([name, count]) => [TOTALS[name] ?? name, count])];
  if (news.items !== undefined) tiles.splice(1, 0, [translate("items to train on"), news.items]);
  $("tiles").replaceChildren(...(news.version ? tiles : []).map(([name, count]) => {
    const tile = make("div", name, "tile");
    tile.prepend(make("b", count.toLocaleString("en")));
    return tile;
  }));
  const lines = [...(news.outside ? [translate("%(n)s files lie outside the folders and are not shown", { n: news.outside })] : []), ...(news.remarks ?? [])];
  $("remarks").hidden = !lines.length;
  $("remarks").firstChild.textContent = translateCount(lines.length, "%(n)s remark on the dataset", "%(n)s remarks on the dataset");
  $("remarks").lastChild.replaceChildren(...lines.map((line) => make("li", line)));
  if ($("measure")) {
    $("measure").ariaDisabled = news.state !== "ready" && news.state !== "failed"; // it keeps the focus
    if (version === null && news.model) $("model").value = news.model;
    if (version === null) $("decodes").checked = !!news.decodes;
  }
}

async function look() {
  const news = await ask();
  showState(news);
  if (news.chosen === undefined) lay(0);
  else if (news.chosen !== chosen) lay(news.chosen);
  else if (news.version !== version) for (const part of box.children) if (part.isIn) load(part);
  version = news.version ?? null;
  return news.state === "measuring" ? 1000 : 4000;
}

async function goOn(wait) {
  setTimeout(async () => goOn(document.hidden ? 4000 : await look().catch(() => 8000)), wait);
}

// ---- parts: those near the view are loaded, others are empty and as high as they were
const watcher = watchParts(load, "600px", 120);

function lay(count) {
  chosen = count;
  watcher.disconnect();
  box.replaceChildren(...Array.from({ length: Math.ceil(count / PART) }, (_, at) => {
    const part = make("section", "", "part");
    part.from = at * PART;
    part.style.height = `${Math.min(PART, count - at * PART) * (innerWidth < 640 ? 32 : 19)}rem`;
    watcher.observe(part);
    return part;
  }));
}

async function load(part) {
  part.stop?.abort();
  part.stop = new AbortController();
  const news = await ask(part.from, PART, part.stop.signal).catch(() => null);
  if (!news?.files || !part.isIn) return;
  const there = new Map([...part.children].map((one) => [one.dataset.id, one]));
  const cards = news.files.map((file) => fill(there.get(file.id) ?? $("file").content.firstElementChild.cloneNode(true), file));
  if (cards.some((card, at) => part.children[at] !== card) || part.children.length !== cards.length) part.replaceChildren(...cards);
  part.style.height = "";
}

// ---- a file
function fill(card, file) {
  card.dataset.id = file.id;
  card.file = file;
  const [first] = file.pictures;
  const text = card.querySelector("textarea"), draft = drafts.get(file.id);
  card.querySelector("h3").textContent = first.name;
  card.querySelector(".facts").textContent = facts(file);
  const shots = JSON.stringify([file.pictures, file.fit, file.size]);
  if (card.shots !== shots) {
    card.shots = shots;
    card.querySelector(".shots").replaceChildren(...file.pictures.map((picture, at) => shot(picture, at, file)));
  }
  if (!draft && text.value !== file.caption.text) text.value = file.caption.text;
  if (draft) text.value = draft.text;
  text.readOnly = !file.caption.can_edit;
  text.setAttribute("aria-label", translate("Caption of %(name)s", { name: first.name }));
  card.querySelector(".ask").hidden = !file.caption.can_edit;
  card.querySelector(".where").textContent = file.caption.where || (file.captions.length ? translate("trained as: %(text)s", { text: file.captions.join(" | ") }) : "");
  card.querySelector(".told").replaceChildren(...lines(file));
  showButtons(card);
  box.dispatchEvent(new CustomEvent("filled", { detail: card })); // the card itself may not be in it yet
  return card;
}

function facts(file) {
  const size = file.size ? `${file.size.join(" × ")}` : "", into = file.fit ? ` → ${file.fit.bucket.join(" × ")}` : "";
  const cut = file.cut_percent >= 0.5 ? translate("%(n)s % cut off", { n: Math.round(file.cut_percent) }) : "";
  const frames = file.kind === "video" && file.frames ? translate("%(n)s frames at %(fps)s fps", { n: file.frames, fps: file.fps ?? "?" }) : "";
  const items = file.kind === "video" ? file.lengths.map(([length, count]) => translate("%(count)s × %(length)s frames", { count, length })).join(", ") : "";
  return [size + into, cut, frames, items && translate("trained: %(items)s", { items }), file.has_mask && translate("with a mask"), file.table && translate("table %(name)s", { name: file.table })].filter(Boolean).join(" · ");
}

function shot(picture, at, file) {
  const figure = make("figure", "", at ? "shot more" : "shot"), isMask = file.has_mask && at === file.pictures.length - 1;
  const name = !at ? picture.name : isMask ? translate("mask %(name)s", { name: picture.name }) : translate("reference %(name)s", { name: picture.name });
  if (!at && file.size) figure.style.setProperty("--shape", file.size[0] / file.size[1]);
  const view = make("div", "", "view");
  figure.append(view);
  if (picture.address) {
    const image = make("img");
    Object.assign(image, { loading: "lazy", decoding: "async", alt: translate("first frame of %(name)s", { name }), src: picture.address });
    image.addEventListener("error", () => image.replaceWith(make("span", translate("no image"), "note")));
    view.append(image);
  } else view.append(make("span", translate("no image"), "note"));
  const fit = file.fit;
  if (!at && fit && file.cut_percent >= 0.5) {
    const crop = make("i", "", "crop"), percent = (value, whole) => `${100 * value / whole}%`;
    Object.assign(crop.style, { left: percent(fit.crop[0], fit.resized[0]), top: percent(fit.crop[1], fit.resized[1]), width: percent(fit.bucket[0], fit.resized[0]), height: percent(fit.bucket[1], fit.resized[1]) });
    crop.title = translate("what the model sees");
    view.append(crop);
  }
  if (at) figure.append(make("figcaption", name));
  return figure;
}

const CACHES = { latents: translate("latents"), text: translate("text"), valid: translate("valid"), stale: translate("stale"), missing: translate("missing"), unknown: translate("unknown") };

function lines(file) {
  const found = [];
  if (file.dropped) found.push(make("li", translate("dropped: %(reason)s", { reason: file.dropped }), "bad"));
  if (file.short) found.push(make("li", file.short, "warn"));
  for (const text of file.faults) if (text !== file.dropped) found.push(make("li", text, "bad"));
  for (const text of file.remarks) if (text !== file.dropped && text !== file.short) found.push(make("li", text, "warn"));
  const caches = file.dropped || !file.caches ? [] : Object.entries(file.caches);
  if (file.caches && !caches.length && !file.dropped) found.push(make("li", translate("not cached yet")));
  for (const [tag, { media, text }] of caches) for (const [what, [state, why]] of [["latents", media], ["text", text]]) {
    const line = make("li", "", state === "valid" ? "good" : "warn");
    line.append(make("b", `${CACHES[what]} ${CACHES[state] ?? state}`), why ? `: ${why}` : "", make("span", tag ? ` · ${tag}` : "", "faint"));
    found.push(line);
  }
  return found;
}

// ---- captions
function showButtons(card) {
  const isDraft = drafts.has(card.dataset.id), { saves } = card.file.caption;
  const active = document.activeElement; // asked for before a button of it is hidden
  card.querySelector("[data-what=save]").ariaDisabled = !isDraft; // a button that is disabled would lose the focus
  card.querySelector("[data-what=undo]").ariaDisabled = !isDraft && !saves;
  card.querySelector("[data-what=back]").hidden = saves < 2;
  if (card.contains(active) && !active.checkVisibility()) card.querySelector("textarea").focus({ preventScroll: true });
}

async function write(card, what, have) {
  const text = card.querySelector("textarea").value, said = card.querySelector(".said");
  said.textContent = "…";
  const body = JSON.stringify({ what, text, have });
  const answer = await fetch(`${address}caption/${card.dataset.id}`, { method: "POST", body }).catch(() => null);
  if (!answer || !answer.headers.get("content-type").includes("json")) {
    said.textContent = answer ? await answer.text() : translate("The server does not answer.");
    return;
  }
  const { error, file } = await answer.json();
  said.className = `note said ${error ? "bad" : "good"}`;
  said.textContent = error || { save: translate("saved"), undo: translate("undone"), back: translate("as it was") }[what];
  if (answer.status === 409 && file) {
    card.theirs = file;
    card.querySelector(".conflict").hidden = false;
    card.querySelector(".conflict pre").textContent = file.caption.text;
  }
  if (!answer.ok) return;
  drafts.delete(card.dataset.id);
  card.querySelector(".conflict").hidden = true;
  fill(card, file);
  ask().then(showState).catch(() => {}); // the counts above
}

document.addEventListener("htmx:after:request", ({ target, detail }) => {
  if (target === document || !target.matches(".enqueue") || !detail.ctx.response?.raw.ok) return;
  const link = Object.assign(document.createElement("a"), { href: `${ROOT}/queue`, textContent: translate("It is in the queue") });
  target.querySelector("button").replaceWith(link);
  link.focus({ preventScroll: true }); // it stands where the button was
});

function act(card, what) {
  const draft = drafts.get(card.dataset.id), caption = card.file.caption;
  if (what === "save" && draft) write(card, what, draft.have);
  if (what === "mine") write(card, "save", card.theirs.caption.mark);
  if (what === "back") write(card, what, caption.mark);
  if (what === "undo" && !draft) write(card, what, caption.mark);
  if (what === "theirs" || (what === "undo" && draft)) {
    drafts.delete(card.dataset.id);
    card.querySelector(".conflict").hidden = true;
    card.querySelector(".said").textContent = "";
    fill(card, what === "theirs" ? card.theirs : card.file);
  }
}

box.addEventListener("click", (event) => {
  const { what } = event.target.dataset;
  if (what && event.target.ariaDisabled !== "true") act(event.target.closest(".file"), what);
});

box.addEventListener("input", (event) => {
  if (!event.target.matches(".caption textarea")) return;
  const card = event.target.closest(".file"), { text, mark } = card.file.caption, { id } = card.dataset;
  if (event.target.value === text) drafts.delete(id);
  else drafts.set(id, { text: event.target.value, have: drafts.get(id)?.have ?? mark });
  card.querySelector(".said").textContent = "";
  showButtons(card);
});

box.addEventListener("keydown", (event) => {
  const card = event.target.closest(".file");
  if (!card || !event.target.matches("textarea, .keys input")) return;
  const isSave = (event.ctrlKey || event.metaKey) && (event.key === "Enter" || event.key === "s");
  const way = event.altKey ? { ArrowDown: 1, ArrowUp: -1 }[event.key] : 0;
  if (isSave) act(card, "save");
  if (way) {
    const texts = [...box.querySelectorAll(".caption textarea")], next = texts[texts.indexOf(card.querySelector("textarea")) + way];
    next?.focus();
    next?.scrollIntoView({ block: "center" });
  }
  if (isSave || way) event.preventDefault();
});

addEventListener("beforeunload", (event) => { if (drafts.size) event.preventDefault(); });

// ---- what is shown, and measuring
let typing;
$("choose").addEventListener("submit", (event) => event.preventDefault());
for (const name of ["text", "only"]) $(name).addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(() => { chosen = null; look().catch(() => {}); }, 200);
});
$("measure")?.addEventListener("click", async () => {
  if ($("measure").ariaDisabled === "true") return;
  const body = JSON.stringify({ decodes: $("decodes").checked, model: $("model").value });
  await fetch(`${address}measure`, { method: "POST", body });
  look().catch(() => {});
});
goOn(0);

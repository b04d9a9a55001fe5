"use strict";
// The parts of the page New below its form: search in the table of keys, "back", and parts that follow a file.

const KEPT = `typed ${new URLSearchParams(location.search).get("folder")}`; // in the storage of this tab: what is not yet saved
const keyFields = () => [...document.querySelectorAll("#setting-rows input, #setting-rows select")];
// fields that are saved by a button; those of the memory are written when they change
const fieldsOf = (part) => [...part.querySelectorAll("form:not(#memory-form) :is(input, select, textarea)[name]:not([type=hidden])")];
const nameOf = (field) => `${field.form.id} ${field.name}`;
const valueOf = (field) => field.type === "checkbox" ? field.checked : field.value;

function defaultOf(field) {
  if (field.type === "checkbox") return field.defaultChecked;
  return field.options ? [...field.options].find((option) => option.defaultSelected)?.value ?? "" : field.defaultValue;
}

function setValue(field, value) {
  if (field.type === "checkbox") field.checked = value;
  else field.value = value;
}

const isEdited = (field) => valueOf(field) !== defaultOf(field);
const markEdited = () => keyFields().forEach((field) => field.closest("tr").classList.toggle("edited", isEdited(field)));

// ---- the table: search over names and helps, and what was typed is marked
const wordsIn = (text) => text.normalize("NFKC").toLowerCase().replaceAll("_", " "); // letters of full width count as the usual ones

// Names of other programs for a setting, each with its place among the settings that it stands for.
const namesOf = (row) => Object.entries(JSON.parse(row.dataset.words ?? "{}")).map(([name, rank]) => [wordsIn(name), rank]);

// How near a row is to what was typed: 0 is the nearest.
function nearness(row, typed) {
  const key = wordsIn(row.querySelector("th code")?.textContent ?? ""), names = namesOf(row);
  if (key === typed) return 0;
  const least = (found) => Math.min(...found.map(([, rank]) => rank));
  const same = least(names.filter(([name]) => name === typed)), alike = least(names.filter(([name]) => name.includes(typed)));
  if (same < Infinity) return 1 + same;
  if (key.includes(typed)) return 40;
  return alike < Infinity ? 60 + alike : 100;
}

function filterRows(field) {
  const typed = wordsIn(field.value).trim().replace(/\s+/g, " "), words = typed.split(" ").filter(Boolean);
  const list = document.querySelector(field.dataset.find), rows = [...list?.querySelectorAll("tr") ?? []];
  let count = 0;
  rows.forEach((row, place) => { row.dataset.place ??= place; });
  for (const row of rows) {
    const text = wordsIn(`${row.textContent} ${row.dataset.help ?? ""}`) + namesOf(row).map(([name]) => ` ${name}`).join("");
    const isOffered = !row.dataset.idle || !typed || wordsIn(row.querySelector("th code").textContent) === typed; // one that the run ignores is shown to who names it
    row.hidden = !isOffered || !words.every((word) => text.includes(word));
    row.near = typed && !row.hidden && row.querySelector("th") ? nearness(row, typed) + (row.dataset.idle ? 1000 : 0) : 0;
    count += !row.hidden;
  }
  const sorted = [...rows].sort((one, other) => one.near - other.near || one.dataset.place - other.dataset.place);
  if (sorted.some((row, place) => row !== rows[place])) list.append(...sorted);
  if (!field.dataset.count) return;
  document.getElementById(field.dataset.count).textContent = !rows.length ? "" : words.length ? translate("%(count)s of %(n)s keys", { count, n: rows.length }) : translate("%(n)s keys", { n: rows.length });
}

document.addEventListener("input", (event) => {
  const part = event.target.closest(".later");
  if (event.target.dataset.find) {
    event.stopPropagation(); // the search changes no key
    if (event.target.value) document.getElementById(event.target.dataset.opens).open = true;
    filterRows(event.target);
  } else if (part) {
    markEdited();
    keepTyped(part);
  }
}, true);

document.addEventListener("click", ({ target }) => {
  if (target.dataset?.back === undefined) return;
  const field = target.closest("tr").querySelector("input, select");
  field.value = target.dataset.back;
  field.dispatchEvent(new Event("input", { bubbles: true }));
  field.focus();
});

// a key of dataset.toml leads to its text, which is folded
document.addEventListener("click", (event) => {
  if (!event.target.matches?.(".in_text")) return;
  const text = document.querySelector(event.target.hash);
  event.preventDefault();
  text.closest("details").open = true;
  text.focus();
});

// ---- what is typed outlasts a reload, such as that of Check and Start, until it is saved
const readTyped = () => JSON.parse(sessionStorage.getItem(KEPT) ?? "{}");

function keepTyped(part) {
  const typed = readTyped();
  for (const field of fieldsOf(part)) {
    delete typed[nameOf(field)];
    if (isEdited(field)) typed[nameOf(field)] = [defaultOf(field), valueOf(field)];
  }
  sessionStorage.setItem(KEPT, JSON.stringify(typed));
}

// Puts what was typed before the reload into a part; where the file has another value since, that one stays.
function restoreTyped(part) {
  const typed = readTyped();
  for (const field of fieldsOf(part)) {
    const [before, value] = typed[nameOf(field)] ?? [];
    if (value === undefined || before !== defaultOf(field)) continue;
    setValue(field, value);
    field.dispatchEvent(new Event("input", { bubbles: true })); // shows what would be saved
  }
}

// ---- a part that is read again keeps what was typed; a choice that was not touched follows the file
let untouched = [];
document.addEventListener("htmx:before:swap", () => { untouched = keyFields().filter((field) => field.options && !isEdited(field)); });
document.addEventListener("htmx:after:swap", ({ target }) => {
  for (const field of untouched) if (field.isConnected) setValue(field, defaultOf(field));
  untouched = [];
  for (const field of document.querySelectorAll("[data-find]")) filterRows(field);
  const part = target.closest?.(".later");
  if (part?.querySelector("[data-run-mark]")) {
    if (part.restored) keepTyped(part);
    else restoreTyped(part);
    part.restored = true;
    followFile(part);
  }
  markEdited();
});

// ---- a button saves what its form holds: no preview answers meanwhile, and none of what is saved follows
const saving = new WeakSet();
const isSave = (element) => /^\/new\/(samples|settings)\/save$/.test(element.getAttribute?.("hx-post") ?? "");
document.addEventListener("htmx:config:request", (event) => {
  const form = event.target.closest?.("form"), isLook = event.target.matches?.(".look");
  if (!form || !(isLook || isSave(event.target))) return;
  const isAsShown = ![...form.elements].some((field) => field.name && field.type !== "hidden" && isEdited(field));
  if (saving.has(form) || isLook && isAsShown && !form.querySelector(".changes :is(pre, [role=alert]:not(:empty))")) event.preventDefault();
});
document.addEventListener("htmx:before:request", ({ target }) => { if (isSave(target)) saving.add(target); });
document.addEventListener("htmx:finally:request", ({ target }) => {
  if (!isSave(target)) return;
  saving.delete(target);
  if ([...target.elements].some((field) => field.name && field.type !== "hidden" && isEdited(field))) target.dispatchEvent(new Event("input", { bubbles: true }));
});
document.addEventListener("keydown", (event) => { if (event.key === "Enter" && event.target.dataset?.find) event.preventDefault(); });

// ---- Check and Start take what is saved: what is not is said before they do, once
let wasWarned = false;
document.addEventListener("input", ({ target }) => { if (target.closest(".later")) wasWarned = false; });
document.addEventListener("htmx:before:request", (event) => {
  const isTaking = event.target.closest?.("form.takes");
  const isUnsaved = [...document.querySelectorAll(".later")].some((part) => fieldsOf(part).some(isEdited));
  if (!isTaking || !isUnsaved || wasWarned) return;
  event.preventDefault();
  wasWarned = true;
  document.getElementById("refused").textContent = translate("Below, among the samples or settings, is something that you have typed and not saved. It takes no part yet. Save it first, or press the button once more to go on without it.");
});

// When one part has written run.toml, the others are read again.
function followFile(part) {
  const { runMark } = part.querySelector("[data-run-mark]").dataset;
  for (const other of document.querySelectorAll(".later")) {
    const shown = other.querySelector("[data-run-mark]")?.dataset.runMark;
    if (other !== part && shown !== undefined && shown !== runMark) htmx.trigger(other, "refresh");
  }
}

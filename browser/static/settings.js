"use strict";
// The parts of the page New below its form: search in the table of keys, "back", and parts that follow a file.

// ---- the table: search over names and helps, and what was typed is marked
function filterRows(field) {
  const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
  const rows = [...document.querySelectorAll(`${field.dataset.find} tr`)];
  let count = 0;
  for (const row of rows) {
    const text = `${row.textContent} ${row.dataset.help ?? ""}`.toLowerCase();
    row.hidden = !words.every((word) => text.includes(word));
    count += !row.hidden;
  }
  document.getElementById("setting-count").textContent = words.length ? `${count} of ${rows.length} keys` : `${rows.length} keys`;
}

const isEdited = (field) => field.options ? !field.selectedOptions[0]?.defaultSelected : field.value !== field.defaultValue;
const keyFields = () => [...document.querySelectorAll("#setting-rows input, #setting-rows select")];
const markEdited = () => keyFields().forEach((field) => field.closest("tr").classList.toggle("edited", isEdited(field)));

document.addEventListener("input", (event) => {
  if (event.target.dataset.find) {
    event.stopPropagation(); // the search changes no key
    filterRows(event.target);
  } else if (event.target.closest("#setting-rows")) markEdited();
}, true);

document.addEventListener("click", ({ target }) => {
  if (target.dataset?.back === undefined) return;
  const field = target.closest("tr").querySelector("input, select");
  field.value = target.dataset.back;
  field.dispatchEvent(new Event("input", { bubbles: true }));
  field.focus();
});

// ---- a part that a swap replaces keeps what was typed; a choice that was not touched follows the file
let untouched = [];
document.addEventListener("htmx:before:swap", () => { untouched = keyFields().filter((field) => field.options && !isEdited(field)); });
document.addEventListener("htmx:after:swap", () => {
  for (const field of untouched) if (field.isConnected) field.value = [...field.options].find((option) => option.defaultSelected)?.value ?? "";
  untouched = [];
  const find = document.querySelector("[data-find]");
  if (find) filterRows(find);
  markEdited();
});

// ---- when one part has written run.toml, the others are read again
document.addEventListener("htmx:after:swap", ({ target }) => {
  const place = target.closest?.(".later"), mark = place?.querySelector("[data-run-mark]")?.dataset.runMark;
  if (mark === undefined) return;
  for (const other of document.querySelectorAll(".later")) {
    const shown = other.querySelector("[data-run-mark]")?.dataset.runMark;
    if (other !== place && shown !== undefined && shown !== mark) htmx.trigger(other, "refresh");
  }
});

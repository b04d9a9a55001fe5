"use strict";
const inWords = globalThis.translate ?? ((text) => text); // a page that needs no server is in English
// A button copies the command above it, and a click on a clip that plays by itself holds it.
document.addEventListener("click", async ({ target }) => {
  const copy = target.closest(".copy"), clip = target.closest("video[autoplay]");
  if (copy) copy.textContent = await copyText(copy.closest(".command").querySelector("pre").textContent) ? inWords("Copied") : inWords("Select the text above");
  if (clip && !clip.closest("a")) (clip.paused ? clip.play() : clip.pause());
});

// The size of samples, and whether those of all steps are shown: the browser keeps both, for all pages.
const CHOSEN = { ".size input": "size of samples", ".every input": "all steps" };

function recall(name) {
  try { return localStorage.getItem(name); } catch { return null; } // a file may keep nothing
}

function showChosen() {
  for (const [selector, name] of Object.entries(CHOSEN)) {
    const value = recall(name);
    for (const field of document.querySelectorAll(selector)) {
      field.closest("label").hidden = false;
      if (value !== null && field.type === "checkbox") field.checked = value === "true";
      else if (value !== null) field.value = value;
    }
  }
  const size = +(recall("size of samples") ?? 1);
  if (size >= 0.5 && size <= 3) document.documentElement.style.setProperty("--size", size);
}

document.addEventListener("input", ({ target }) => {
  const name = Object.entries(CHOSEN).find(([selector]) => target.matches(selector))?.[1];
  if (!name) return;
  const value = target.type === "checkbox" ? target.checked : target.value;
  if (target.type !== "checkbox") document.documentElement.style.setProperty("--size", value);
  try { localStorage.setItem(name, value); } catch { /* it counts for this page */ }
});
document.addEventListener("htmx:after:swap", showChosen);
showChosen();

// Arrow keys move through a table of samples.
document.addEventListener("keydown", (event) => {
  const cell = event.target.closest?.(".grid td");
  const way = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
  if (!cell || !way) return;
  const rows = [...document.querySelectorAll(".grid tbody tr:last-child")];
  const row = rows[rows.indexOf(cell.parentElement) + way[0]];
  const seen = (one) => [...one.cells].filter((each) => each.checkVisibility());
  const link = row && seen(row)[seen(cell.parentElement).indexOf(cell) + way[1]]?.querySelector("a");
  if (link) { link.focus(); event.preventDefault(); }
});

async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text); // over https and on this machine only
    return true;
  } catch {
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    const isDone = document.execCommand("copy");
    area.remove();
    return isDone;
  }
}

// The line of the machine is asked for every few seconds: it says when nobody answers any more. Its last answer has the command.
document.addEventListener("htmx:error", ({ target }) => {
  if (target.id !== "machine") return;
  target.dataset.command ??= target.querySelector("[data-command]")?.dataset.command ?? inWords("the command that started it");
  const command = Object.assign(document.createElement("code"), { textContent: target.dataset.command });
  const [before, after] = inWords("The server of this page does not answer. Start it again with: %(command)s A training goes on without it.").split("%(command)s");
  target.replaceChildren(before, command, after);
});

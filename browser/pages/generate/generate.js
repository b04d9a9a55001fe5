"use strict";
// The form Generate: dropped files, shapes, sliders, the lock of the seed, and an address that keeps the form.

const field = (name) => document.getElementById(name);

function say(text) {
  const said = field("said");
  if (said) said.textContent = text;
}

function changed(input) {
  input.dispatchEvent(new Event("input", { bubbles: true }));
}

// ---- beside the results the form is as high as what is left of the window, so that Make stays in view
const fitForm = () => field("page").style.setProperty("--above", `${Math.max(0, field("page").parentElement.getBoundingClientRect().top)}px`);
for (const event of ["scroll", "resize"]) addEventListener(event, fitForm, { passive: true });
document.addEventListener("htmx:after:swap", fitForm);
fitForm();

// ---- the address names the draft, so that a reload shows what was typed
document.addEventListener("htmx:after:request", ({ detail }) => {
  const address = detail.ctx?.request?.action ?? "";
  const draft = document.querySelector("#make [name=draft]");
  if (draft && address.startsWith(`${ROOT}/generate/`) && detail.ctx.response?.raw.ok && /(form|make|four)$/.test(address)) {
    history.replaceState(null, "", `${ROOT}/generate?draft=${draft.value}`);
  }
});

// ---- another model: its answer brings fields and command, and what was asked for the fields before is dropped
let isRefilling = false;
document.addEventListener("change", ({ target }) => {
  if (target.id !== "source") return;
  isRefilling = true;
  field("command").dispatchEvent(new Event("htmx:abort"));
}, true);
document.addEventListener("htmx:finally:request", ({ target }) => {
  if (target.id === "source") isRefilling = false;
});
document.addEventListener("htmx:before:request", (event) => {
  if (event.target.id === "command" && isRefilling) event.preventDefault();
});

// ---- the seed: a typed one is locked; without the lock each result has another
document.addEventListener("input", ({ target }) => {
  if (target.id === "seed") field("lock").checked = target.value.trim() !== "";
  if (target.matches("input[type=range][data-for]")) {
    const number = document.getElementsByName(target.dataset.for)[0];
    number.value = target.value;
    target.closest("li").querySelector("[name=lora]").checked = true;
  }
  if (target.name?.startsWith("strength ")) {
    const slider = [...document.querySelectorAll("input[type=range]")].find((one) => one.dataset.for === target.name);
    if (slider) slider.value = target.value;
  }
});

document.addEventListener("change", ({ target }) => {
  if (target.id === "lock") {
    const seed = field("seed");
    if (!target.checked) seed.value = "";
    else if (!seed.value.trim()) seed.value = crypto.getRandomValues(new Uint32Array(1))[0];
    const isLocked = target.checked;
    changed(seed);
    target.checked = isLocked;
  }
  if (target.name === "lora") moveLora(target);
  if (target.matches(".chooser")) takeFiles(target.dataset.for, target.files).then(() => { target.value = ""; });
});

// ---- shapes: small drawings that set both sides
document.addEventListener("click", ({ target }) => {
  const shape = target.closest?.(".shapes button");
  if (!shape) return;
  [field("width").value, field("height").value] = [shape.dataset.width, shape.dataset.height];
  changed(field("width"));
});
document.addEventListener("input", ({ target }) => {
  if (!["width", "height"].includes(target.id)) return;
  for (const shape of document.querySelectorAll(".shapes button")) {
    shape.setAttribute("aria-pressed", shape.dataset.width === field("width").value.trim() && shape.dataset.height === field("height").value.trim());
  }
});

// ---- LoRAs: chosen ones stand above, the others in a list with a search
function moveLora(box) {
  const row = box.closest("li"), isOther = row.closest("ul").id !== "chosen_loras" && !row.closest("#add_lora");
  const list = box.checked ? field("chosen_loras") : field("add_lora")?.querySelector("ul");
  if (!list || isOther || row.parentElement === list) return;
  if (box.checked) list.append(row);
  else list.prepend(row);
  field("add_lora").querySelector("small").textContent = field("add_lora").querySelectorAll("li").length;
  (box.checkVisibility() ? box : field("add_lora").querySelector("summary")).focus({ preventScroll: true }); // in a closed list
}
document.addEventListener("input", (event) => {
  if (event.target.id !== "find_lora") return;
  event.stopPropagation(); // the search changes nothing of the form
  const words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const row of field("add_lora").querySelectorAll("li")) row.hidden = !words.every((word) => row.dataset.words.includes(word));
}, true);
document.addEventListener("change", (event) => { if (event.target.id === "find_lora") event.stopPropagation(); }, true);
document.addEventListener("keydown", (event) => { if (event.target.id === "find_lora" && event.key === "Enter") event.preventDefault(); });

// ---- what is on its way is said until it is made, or something else is typed
document.addEventListener("input", ({ target }) => { if (target.closest("#make")) field("on_its_way").textContent = ""; });
let wasMaking = false;
document.addEventListener("htmx:after:swap", () => {
  const isMaking = document.querySelector("#work > .jobs > li") !== null, way = field("on_its_way");
  if (wasMaking && !isMaking && way?.textContent) way.textContent = field("ended")?.querySelector(".died") ? "" : translate("Made: the newest of the results.");
  wasMaking = isMaking;
});

// ---- files
async function send(address, file) {
  say(translate("%(name)s is read …", { name: file.name }));
  try {
    const answer = await fetch(`${address}?name=${encodeURIComponent(file.name)}`, { method: "POST", body: file });
    const text = await answer.text();
    let row;
    try { row = JSON.parse(text); } catch { row = { said: text }; }
    say(answer.ok ? "" : `${file.name}: ${row.said}`);
    return answer.ok ? row : null;
  } catch {
    say(translate("%(name)s could not be sent: it is too large, or the server is not there.", { name: file.name }));
    return null;
  }
}

async function takeFiles(name, files) {
  const input = field(name);
  for (const file of files) {
    const row = await send(`${ROOT}/generate/file`, file);
    if (!row) return;
    input.value = input.matches("textarea") ? `${input.value.trim()}\n${row.path}`.trim() : row.path;
    changed(input);
  }
}

document.addEventListener("dragover", (event) => {
  const types = event.dataTransfer?.types ?? [];
  if (!types.includes("Files") && !(types.includes("text/uri-list") && event.target.closest?.(".drop"))) return;
  event.preventDefault();
  for (const one of document.querySelectorAll(".drop.over")) one.classList.remove("over");
  event.target.closest?.(".drop")?.classList.add("over");
});
document.addEventListener("dragleave", ({ target }) => target.closest?.(".drop")?.classList.remove("over"));
// A result of this page is dragged by its address.
async function resultOf(address) {
  const url = new URL(address, location.href);
  if (url.origin !== location.origin || !url.pathname.startsWith(`${ROOT}/result/`)) return [];
  const answer = await fetch(url);
  return answer.ok ? [new File([await answer.blob()], url.pathname.split("/").pop())] : [];
}

document.addEventListener("drop", async (event) => {
  const place = event.target.closest?.(".drop");
  place?.classList.remove("over");
  let files = event.dataTransfer?.files ?? [];
  const address = event.dataTransfer?.getData("text/uri-list");
  if (!files.length && !(place && address)) return;
  event.preventDefault();
  if (!files.length) files = await resultOf(address).catch(() => []);
  if (!files.length) return;
  if (place) {
    await takeFiles(place.dataset.drop, files);
    return;
  }
  const row = await send(`${ROOT}/generate/settings`, files[0]);
  if (row) location.assign(row.address);
});

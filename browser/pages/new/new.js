"use strict";
// The page New: fields stay in the address, files are dropped, rows of the table and file names lead to fields.
{
  const find = (id) => document.getElementById(id);
  const form = find("new"), rows = find("items"), dropping = find("dropping");
  const MARKED = ["mark", "shown", "folder", "family", "task", "trigger", "name", "steps"];

  // ---- what is typed stays in the address, so that a reload keeps it
  const remember = () => {
    const fields = new URLSearchParams();
    for (const [name, value] of new FormData(form)) if (value && (MARKED.includes(name) || name.startsWith("file_"))) fields.set(name, value);
    history.replaceState(null, "", `${ROOT}/new?${fields}`);
  };
  form.addEventListener("input", ({ target }) => { if (target.name) remember(); });
  form.addEventListener("change", ({ target }) => { if (target.name) remember(); });
  // The field of the folder is a field of the form, and stands above the pictures.
  for (const kind of ["input", "change"]) find("folder").addEventListener(kind, () => form.dispatchEvent(new Event(kind)));

  // The page opens again at the same place, with the focus where it was, and with what was done.
  const PLACE = `place ${location.pathname}`;
  const keepPlace = (said) => sessionStorage.setItem(PLACE, JSON.stringify({ y: scrollY, focused: document.activeElement?.id, said }));
  document.addEventListener("htmx:after:request", ({ target, detail }) => {
    const headers = detail.ctx.response?.raw.headers;
    if (target !== form || !headers?.get("hx-redirect")) return;
    keepPlace(decodeURIComponent(headers.get("x-reelsmith-said") ?? ""));
  });
  const place = JSON.parse(sessionStorage.getItem(PLACE) ?? "null");
  sessionStorage.removeItem(PLACE);
  if (place) {
    if (find("written")) find("written").textContent = place.said;
    find(place.focused ?? "")?.focus({ preventScroll: true });
    scrollTo(0, place.y);
  }
  form.addEventListener("input", () => { for (const id of ["written", "said", "refused"]) find(id)?.replaceChildren(); });

  const change = (field, value) => {
    field.value = value;
    field.dispatchEvent(new Event("input", { bubbles: true }));
    field.dispatchEvent(new Event("change", { bubbles: true }));
  };

  // The tasks of a model come from the server: one of them is taken once they are there. Another model may have one of the same name.
  const take = async (family, task) => {
    if (find("family").value !== family) change(find("family"), family);
    for (let tries = 0; tries < 100 && find("task").dataset.family !== family; tries += 1) await new Promise((done) => setTimeout(done, 50));
    if (find("task").dataset.family === family) change(find("task"), task);
  };

  // A folder of the list keeps the model that was chosen before; a described one has its own.
  document.addEventListener("click", (event) => {
    const link = event.target.closest(".folders a[href*='folder=']");
    if (!link || link.dataset.described || event.ctrlKey || event.metaKey || event.shiftKey) return;
    const fields = new URLSearchParams(link.search);
    for (const [name, value] of new FormData(form)) if (value && (["family", "task", "trigger", "steps"].includes(name) || name.startsWith("file_"))) fields.set(name, value);
    if (fields.has("family")) { event.preventDefault(); location.assign(`${ROOT}/new?${fields}`); }
  });

  document.addEventListener("click", (event) => {
    const { target } = event;
    const card = target.closest(".model-cards .take");
    if (card) take(card.dataset.family, card.dataset.task);
    else if (target.matches(".take")) {
      take(target.dataset.family ?? find("family").value, target.dataset.task).then(() => {
        find("task").focus({ preventScroll: true }); // the table leads to the fields
        find("task").scrollIntoView({ block: "center" });
      });
    }
    if (target.matches(".take_name")) {
      change(find("name"), target.dataset.name);
      find("name").focus(); // the button goes away
    }
    if (target.matches(".take_kind") && find("train")) {
      change(find("train"), target.dataset.kind);
      find("train").focus(); // the button at the bottom now writes it
    }
    const tile = target.closest("a.find");
    if (tile && rows && find("strip").dataset.rows === form.dataset.rows) { // else another folder was typed
      event.preventDefault();
      find("captions").open = true;
      find("captions").scrollIntoView();
      change(find("text"), tile.dataset.text);
    }
    if (target.matches("a.button[href^='#']")) lead(event, document.querySelector(target.hash));
    if (target.matches(".leave")) move(JSON.parse(target.dataset.names), "out");
    if (target.matches(".return")) move([target.dataset.name], "back");
    if (target.matches("button.out")) move([target.closest(".file").file.pictures[0].name], "out");
  });
  // The button leads to a place of this page: a part that is folded opens, and a field is ready to be typed into.
  function lead(event, place) {
    if (!place) return;
    event.preventDefault();
    if (place.tagName === "DETAILS") place.open = true;
    (place.querySelector("input:not([type=hidden]), button") ?? place).focus({ preventScroll: true });
    place.scrollIntoView({ block: "center" });
  }
  const showCaptions = () => {
    if (location.hash !== "#captions" || !find("captions")) return;
    find("captions").open = true;
    find("captions").scrollIntoView();
  };
  addEventListener("hashchange", showCaptions);
  showCaptions();

  // ---- tabs below the pictures: one part is open, or none
  for (const tab of document.querySelectorAll(".tabs button")) {
    const part = find(tab.getAttribute("aria-controls"));
    tab.addEventListener("click", () => { part.open = !part.open; });
    part.addEventListener("toggle", () => tab.setAttribute("aria-expanded", part.open));
  }

  // The count of files without a caption follows the captions that are saved.
  if (find("tiles")) {
    let shown = "";
    new MutationObserver(() => {
      const counts = find("tiles").textContent;
      if (shown && counts !== shown) htmx.trigger(find("content"), "refresh");
      shown = counts;
    }).observe(find("tiles"), { childList: true });
  }

  // ---- files that are left out, and put back
  async function move(names, what) {
    for (const name of names) {
      const address = `${form.dataset.rows}move`;
      const answer = await fetch(address, { method: "POST", body: JSON.stringify({ what, name }) }).catch(() => null);
      const { error } = answer?.headers.get("content-type")?.includes("json") ? await answer.json() : { error: translate("The server does not answer.") };
      if (error) {
        find("said").textContent = error;
        return;
      }
    }
    reload();
  }

  const hasDrafts = () => typeof drafts !== "undefined" && drafts.size > 0;
  let isReloading = false; // what is begun on the old page would be lost
  function reload() {
    if (!hasDrafts()) {
      isReloading = true;
      keepPlace(find("written")?.textContent ?? "");
      location.reload();
    }
    else find("said").textContent = translate("Save the captions that you have changed, then load this page again to see more.");
  }

  // ---- the button is grey from a change of a field to the answer about it; a press in between waits, and counts if the step is the same then
  let latest = null, pressed = ""; // the request about what is in the fields, if it is on its way or answered; the step that was pressed meanwhile
  const rest = (isResting) => {
    const leads = find("leads");
    if (leads.dataset.step === "busy") return; // it is grey anyway
    leads.toggleAttribute("data-resting", isResting);
    for (const button of leads.querySelectorAll(".press :is(button, a)")) button.toggleAttribute("aria-disabled", isResting);
    for (const button of leads.querySelectorAll(".press [aria-disabled]")) button.setAttribute("aria-disabled", "true");
  };
  for (const kind of ["input", "change"]) form.addEventListener(kind, () => { latest = null; rest(true); }, true);
  document.addEventListener("htmx:before:request", ({ target, detail }) => { if (target.id === "leads") latest = detail.ctx; });
  document.addEventListener("htmx:after:swap", ({ target }) => { if (target.id === "leads" && !latest) rest(true); }); // it is about fields before
  document.addEventListener("htmx:finally:request", ({ detail }) => {
    if (!latest || detail.ctx !== latest) return;
    rest(false); // also where the server did not answer: a press then says so
    if (pressed && pressed === find("leads").dataset.step) find("step")?.click();
    pressed = "";
  });
  document.addEventListener("click", (event) => {
    const button = event.target.closest("#leads[data-resting] .press :is(button, a)");
    if (!button) return;
    event.preventDefault();
    event.stopImmediatePropagation();
    pressed = button.id === "step" ? find("leads").dataset.step : "";
  }, true);

  // ---- the button goes on by itself to what needs a person: after a description or a download the files are checked
  const GOING = "going on in"; // the folder in which this tab has pressed the button
  document.addEventListener("click", ({ target }) => {
    if (target.id === "step" || target.id === "describe" && document.activeElement !== target) sessionStorage.setItem(GOING, find("leads").dataset.folder); // Enter in a field presses the second
    if (target.matches("[aria-disabled=true]")) find("said").textContent = translate("It goes on by itself as soon as this is done.");
  }, true);
  function goOn() {
    const { step, folder } = find("leads").dataset, isGoing = sessionStorage.getItem(GOING) === folder;
    if (isReloading || step === "busy" || step === "describe") return; // it works, or has not begun
    if (isGoing && step === "check" && !find("next").querySelector(".warn")) find("step")?.click();
    sessionStorage.removeItem(GOING); // a check is begun once
  }
  addEventListener("load", () => setTimeout(goOn)); // after the timer with which htmx begins: the form would be sent without it

  // When the folder has been looked at, from this page or another one, there is more on the page; when a run has ended, a name is taken and speeds are known.
  const isBusy = () => find("progress").dataset.busy === "yes";
  let { looked, standing } = find("progress").dataset, wasBusy = isBusy();
  document.addEventListener("htmx:after:swap", ({ target }) => {
    if (target.id === "leads") goOn();
    const isOther = standing !== find("progress").dataset.standing;
    if (isOther) for (const id of ["said", "refused"]) find(id).replaceChildren(); // they were about the state before
    if (isOther || ["kind", "files"].includes(target.id)) htmx.trigger(find("leads"), "refresh"); // other fields
    ({ standing } = find("progress").dataset);
    if (wasBusy && !isBusy()) for (const id of ["free", "hours"]) htmx.trigger(find(id), "refresh");
    wasBusy = isBusy();
    const now = find("progress").dataset.looked;
    if (now.split(" ").some((mark) => !looked.includes(mark))) reload();
    looked = now;
  });

  // ---- files are sent one after another; a folder that is dropped is opened, those in it are not
  const filesOf = (entry) => new Promise((done) => {
    if (entry.isFile) entry.file((file) => done([file]), () => done([]));
    else done([]);
  });
  const inside = (folder) => new Promise((done) => {
    const reader = folder.createReader(), all = [];
    const more = () => reader.readEntries((entries) => {
      if (!entries.length) return done(all);
      all.push(...entries);
      return more();
    }, () => done(all));
    more();
  });
  async function list(items) {
    const entries = [...items].map((item) => item.webkitGetAsEntry?.() ?? null), files = [...items].map((item) => item.getAsFile?.());
    const found = [];
    for (const [at, entry] of entries.entries()) {
      if (!entry) { if (files[at]) found.push(files[at]); }
      else for (const inner of entry.isDirectory ? await inside(entry) : [entry]) found.push(...await filesOf(inner));
    }
    return found;
  }

  async function answerOf(file, asked) {
    const answer = await asked.catch(() => null);
    if (!answer || [502, 503, 504].includes(answer.status)) return { isBroken: true, error: `${file.name}: ${translate("The server does not answer.")}` };
    const isJson = answer.headers.get("content-type")?.includes("json");
    return isJson ? answer.json() : { error: `${file.name}: ${await answer.text()}` };
  }

  // A large file goes in pieces: after a break it goes on from what has arrived, also when it is dropped again.
  async function sendPieces(file, into, tell) {
    const address = (at) => `${dropping.dataset.piece}?${new URLSearchParams({ into, name: file.name, size: file.size, changed: file.lastModified, at })}`;
    let told = await answerOf(file, fetch(address(0)));
    for (let breaks = 0, at = told.at ?? 0; told.isBroken || told.at !== undefined;) {
      if (told.isBroken) {
        breaks += 1;
        if (breaks > 5) {
          find("into").value = into;
          return { error: translate("%(name)s: the connection broke at %(part)s. Drop it again: it goes on from there.", { name: file.name, part: `${Math.floor(100 * at / file.size)} %` }) };
        }
        await new Promise((done) => setTimeout(done, 500 * 2 ** breaks));
        told = await answerOf(file, fetch(address(0)));
        continue;
      }
      if (told.at > at) breaks = 0;
      at = told.at;
      tell(Math.floor(100 * at / file.size));
      told = await answerOf(file, fetch(address(at), { method: "POST", body: file.slice(at, at + Number(dropping.dataset.pieceBytes)) }));
    }
    return told;
  }

  let isSending = false;
  async function send(files) {
    if (isSending || !files.length) return;
    isSending = true;
    const refusals = find("refusals"), status = find("dropped"), into = find("into").value || dropping.dataset.folder;
    const isName = find("put") && into !== dropping.dataset.folder && !/[\\/]/.test(into), word = isName ? into.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "") : "";
    let folder = "", taken = 0;
    refusals.replaceChildren();
    find("source").open = true; // what arrives, and what is refused, is said in it
    status.textContent = translate("%(at)s of %(n)s: %(name)s", { at: 1, n: files.length, name: files[0].name });
    status.scrollIntoView({ block: "nearest" });
    for (const [at, file] of files.entries()) {
      status.textContent = translate("%(at)s of %(n)s: %(name)s", { at: at + 1, n: files.length, name: file.name });
      const tell = (percent) => { status.textContent = `${translate("%(at)s of %(n)s: %(name)s", { at: at + 1, n: files.length, name: file.name })} · ${percent} %`; };
      const told = file.size > Number(dropping.dataset.pieceBytes) ? await sendPieces(file, folder || into, tell)
        : await answerOf(file, fetch(`${dropping.dataset.upload}?${new URLSearchParams({ into: folder || into, name: file.name })}`, { method: "POST", body: file }));
      if (told.error) refusals.append(Object.assign(document.createElement("li"), { textContent: told.error }));
      else { taken += 1; folder = told.folder; }
    }
    isSending = false;
    status.textContent = translate("%(taken)s of %(n)s taken", { taken, n: files.length });
    if (!folder) return;
    const fields = new URLSearchParams(location.search);
    fields.delete("mark");
    fields.set("folder", folder);
    if (word && !fields.has("trigger")) fields.set("trigger", word);
    const address = `${ROOT}/new?${fields}`;
    if (taken === files.length && !hasDrafts()) { location.assign(address); return; }
    status.append(" · ", Object.assign(document.createElement("a"), { href: address, textContent: translate("show them") }));
  }

  // Files that are dropped while no folder is chosen are asked what they show, unless that is said already.
  let waiting = [];
  function takeIn(files, name = "") {
    if (!find("put") || find("into").value || !files.length) return send(files);
    waiting = files;
    find("source").open = true;
    find("into").value = name;
    find("into").focus();
    find("put").hidden = false;
    find("dropped").textContent = translateCount(files.length, "%(n)s file: what is it?", "%(n)s files: what are they?");
    return Promise.resolve();
  }
  const put = () => {
    const files = waiting;
    waiting = [];
    find("put").hidden = true;
    return send(files);
  };

  if (dropping) {
    find("drop").addEventListener("change", ({ target }) => { takeIn([...target.files]).then(() => { target.value = ""; }); });
    find("put")?.addEventListener("click", put);
    find("into").addEventListener("keydown", ({ key }) => { if (key === "Enter" && waiting.length) put(); });
    document.addEventListener("dragover", (event) => { event.preventDefault(); dropping.classList.add("over"); });
    document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) dropping.classList.remove("over"); });
    document.addEventListener("drop", async (event) => {
      event.preventDefault();
      dropping.classList.remove("over");
      const dropped = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry?.() ?? null);
      const name = dropped.length === 1 && dropped[0]?.isDirectory ? dropped[0].name : "";
      takeIn(await list(event.dataTransfer.items), name);
    });
  }
}

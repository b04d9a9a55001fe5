"use strict";
// The results of all days, in parts that are there while they are near the view; what their buttons do.

(() => {
  const box = document.getElementById("results"), shelf = document.getElementById("shelf");
  const sheet = document.getElementById("sheet"), content = document.getElementById("sheet-content");
  if (!box || !shelf) return;
  const address = box.dataset.address, form = document.getElementById("sift");
  const chosen = new Map(); // id of a result to compare -> its name and address
  let mark = "", last = 0;

  const query = (more = {}) => new URLSearchParams({ ...Object.fromEntries(new FormData(form)), ...more });

  // ---- the days, and their parts
  const watcher = watchParts(load, "700px", 80);

  async function look() {
    const answer = await fetch(`${address}?${query({ have: mark, compared: [...chosen.keys()].join(" ") })}`);
    if (answer.status === 204) return 3000;
    if (!answer.ok) return 8000;
    const news = await answer.json();
    if (news.mark !== mark) lay(news);
    for (const id of news.gone) chosen.delete(id);
    if (news.gone.length) showChosen();
    mark = news.mark;
    return news.unread ? 300 : 3000;
  }

  function lay(news) {
    const count = news.chosen === news.all ? `${news.all.toLocaleString("en")}` : translate("%(chosen)s of %(all)s", { chosen: news.chosen.toLocaleString("en"), all: news.all.toLocaleString("en") });
    document.getElementById("counted").textContent = news.unread ? `${count} · ${translate("%(n)s are still being read", { n: news.unread.toLocaleString("en") })}` : count;
    fillChoices(form.elements.of, translate("all runs"), news.runs);
    fillChoices(form.elements.model, translate("all models"), news.models);
    const earlier = [...shelf.querySelectorAll(".part")];
    const rows = [];
    let first = 0, place = 0;
    for (const [day, number] of news.days) {
      rows.push(make("h3", day, "day"));
      for (let at = 0; at < number; at += news.part) {
        const part = earlier[place] ?? make("section", "", "part");
        const size = Math.min(news.part, number - at);
        if (part.from !== first + at || part.size !== size) part.isOld = true;
        part.from = first + at;
        part.size = size;
        if (!part.firstChild) part.style.height = `${Math.ceil(size / columns()) * 27}rem`;
        rows.push(part);
        place += 1;
      }
      first += number;
    }
    if (!news.all) rows.push(make("p", translate("What is made here will stand here, the newest first."), "note"));
    else if (!news.chosen && !news.unread) rows.push(make("p", translate("None of them fits what is asked for above.")));
    const focus = keepFocus();
    put(shelf, rows);
    for (const part of rows.filter((row) => row.matches(".part"))) {
      if (!part.isWatched) watcher.observe(part);
      part.isWatched = true;
      if (part.isIn) load(part);
    }
    focus();
  }

  // Makes these the children of a box; those that stand in order already are not touched.
  function put(parent, rows) {
    rows.forEach((row, at) => {
      const old = parent.childNodes[at];
      if (old === row) return;
      if (row.tagName === "H3" && old?.tagName === "H3") old.textContent = row.textContent;
      else parent.insertBefore(row, old ?? null);
    });
    while (parent.childNodes.length > rows.length) {
      const gone = parent.lastChild;
      if (gone.isWatched) watcher.unobserve(gone);
      gone.isWatched = false;
      gone.remove();
    }
  }

  function fillChoices(select, none, rows) {
    const text = JSON.stringify(rows);
    if (select.shown === text) return;
    select.shown = text;
    const value = select.value;
    select.replaceChildren(new Option(none, ""), ...rows.map(([name, label]) => new Option(label, name)));
    select.value = rows.some(([name]) => name === value) ? value : "";
  }

  // as many as the style sheet lays side by side
  const columns = () => {
    const list = shelf.querySelector("ol.plates");
    return list ? getComputedStyle(list).gridTemplateColumns.split(" ").length : 1;
  };

  async function load(part) {
    part.stop?.abort();
    part.stop = new AbortController();
    const text = await fetch(`${address}/part?${query({ from: part.from, count: part.size })}`, { signal: part.stop.signal })
      .then((answer) => answer.ok ? answer.text() : null).catch(() => null); // it left the view, or the server is gone
    if (text === null || !part.isIn) return;
    const page = new DOMParser().parseFromString(text, "text/html");
    const list = part.querySelector("ol") ?? page.querySelector("ol").cloneNode(false);
    const plates = [...page.querySelectorAll(".plate")].map((plate) => {
      const old = document.getElementById(plate.id);
      if (old && old.dataset.mark === plate.dataset.mark) return old;
      const fresh = document.importNode(plate, true);
      fresh.querySelector(".more").open = old?.querySelector(".more").open ?? false;
      return fresh;
    });
    const focus = keepFocus();
    if (plates.some((plate, at) => list.children[at] !== plate) || list.children.length !== plates.length) list.replaceChildren(...plates);
    if (!list.isConnected) part.replaceChildren(list);
    part.style.height = "";
    part.isOld = false;
    focus();
    showChosen();
    watch();
  }

  const PARTS = "a, button, summary"; // of a plate, which can have the focus

  // Remembers which of them has it; returns a function that gives it back.
  function keepFocus() {
    const active = document.activeElement, plate = active?.closest?.("#shelf .plate");
    if (!plate) return () => {};
    const { id } = plate, at = [...plate.querySelectorAll(PARTS)].indexOf(active);
    return () => {
      if (document.activeElement === active && active.isConnected) return;
      const now = document.getElementById(id);
      (active.isConnected ? active : now?.querySelectorAll(PARTS)[at] ?? now?.querySelector("a"))?.focus({ preventScroll: true });
    };
  }

  async function goOn(wait) {
    const turn = ++last;
    setTimeout(async () => {
      if (turn !== last) return;
      const next = document.hidden ? 3000 : await look().catch(() => 8000);
      if (turn === last) goOn(next);
    }, wait);
  }

  form.addEventListener("input", () => goOn(250));
  form.addEventListener("submit", (event) => { event.preventDefault(); goOn(0); });
  document.addEventListener("visibilitychange", () => { if (!document.hidden) goOn(0); });

  // ---- buttons
  const GONE = translate("The server does not answer.");

  async function send(where, fields) {
    const answer = await fetch(where, { method: "POST", body: new URLSearchParams(fields) });
    return answer.text();
  }

  // Puts a picture, or a clip's last frame, into the first field of the form that takes one.
  async function startFrom(id, said) {
    const text = await send(`${address}/${id}/start`, {}).catch(() => GONE);
    let news;
    try { news = JSON.parse(text); } catch { fillBox(said, text); return; }
    const field = ["start", "references", "redraw"].map((name) => document.querySelector(`#make [name=${name}]`)).find((one) => one);
    if (!field) {
      said.textContent = translate("The model that is chosen above takes no image: choose one that does, such as an i2v model, and press again.");
      return;
    }
    for (let outer = field.closest("details"); outer; outer = outer.parentElement.closest("details")) outer.open = true;
    field.value = field.matches("textarea") ? [...field.value.split("\n").filter((line) => line.trim() && line !== news.path), news.path].join("\n") : news.path;
    field.dispatchEvent(new Event("input", { bubbles: true }));
    field.dispatchEvent(new Event("change", { bubbles: true }));
    field.focus();
    said.textContent = translate("%(name)s stands in the form: %(field)s.", { name: news.name, field: field.labels[0]?.textContent.trim() });
  }

  // Puts the page's own answer into a box; the server has escaped its texts.
  function fillBox(target, text) {
    const page = new DOMParser().parseFromString(text, "text/html");
    target.replaceChildren(...[...page.body.childNodes].map((node) => document.importNode(node, true)));
  }

  async function openSheet(plate, what) {
    const answer = await fetch(`${address}/${plate.dataset.id}/${what}`);
    showSheet(answer.ok ? await answer.text() : `<h2 id="sheet-title" tabindex="-1">${translate("Gone")}</h2><p>${translate("This file no longer exists.")}</p><p class="ask"><button type="button" data-close>${translate("Close")}</button></p>`);
    if (!sheet.open) sheet.showModal();
    document.getElementById("sheet-title").focus();
    sheet.scrollTo(0, 0);
  }

  function showSheet(text) {
    fillBox(content, text);
    const place = content.querySelector("[data-show]");
    if (place) show(place.dataset.show, "", place);
    const waiting = content.querySelector("[data-refresh]"); // for something to end
    if (waiting) setTimeout(async () => {
      const text = await fetch(waiting.dataset.refresh).then((answer) => answer.text()).catch(() => null);
      if (!waiting.isConnected || text === null) return;
      showSheet(text);
      content.querySelector("[data-close]")?.focus();
    }, 1500);
  }

  shelf.addEventListener("click", async (event) => {
    const button = event.target.closest("button"), plate = event.target.closest(".plate");
    const link = event.target.closest("a.shown");
    if (link && !event.ctrlKey && !event.metaKey && !event.shiftKey) {
      event.preventDefault();
      openSheet(plate, "settings");
    }
    if (!button) return;
    if (button.dataset.sheet) openSheet(plate, button.dataset.sheet);
    if ("compare" in button.dataset) choose(plate);
    if ("download" in button.dataset) Object.assign(document.createElement("a"), { href: plate.dataset.address, download: plate.dataset.name }).click();
    if (!button.dataset.do) return;
    const answer = plate.querySelector(".answer");
    answer.textContent = "…";
    if (button.dataset.do === "start") startFrom(plate.dataset.id, answer);
    else fillBox(answer, await send(`${address}/${plate.dataset.id}/${button.dataset.do}`, {}).catch(() => GONE));
    goOn(0);
  });

  sheet.addEventListener("click", (event) => {
    if (event.target === sheet || "close" in event.target.dataset) sheet.close();
  });
  // a layer of a picture is shown while its box is checked
  sheet.addEventListener("change", (event) => {
    const layer = event.target.dataset.toggles;
    if (layer) content.querySelector(`[data-layer="${layer}"]`).hidden = !event.target.checked;
  });
  sheet.addEventListener("close", () => content.replaceChildren());
  sheet.addEventListener("submit", async (event) => {
    event.preventDefault();
    const where = event.target.dataset.send;
    const text = await send(where, new FormData(event.target)).catch(() => GONE);
    if (text.includes("sheet-title")) showSheet(text);
    else fillBox(content.querySelector("[role=alert]"), text);
    content.querySelector("[data-close]")?.focus();
    goOn(0);
  });

  // the command that the button under the pointer, or with the focus, stands for
  const KINDS = { again: "again", other: "other", larger: "larger" };
  for (const kind of ["focusin", "pointerover"]) shelf.addEventListener(kind, async ({ target }) => {
    const button = target.closest?.("button"), plate = button?.closest(".plate");
    const name = KINDS[button?.dataset.do ?? button?.dataset.sheet];
    if (!name) return;
    plate.commands ??= fetch(`${address}/${plate.dataset.id}/commands`).then((answer) => answer.json());
    const commands = await plate.commands.catch(() => ({}));
    if (button.matches(":hover, :focus")) showTyped(commands[name] ?? "");
  });
  for (const kind of ["focusout", "pointerout"]) shelf.addEventListener(kind, () => showTyped(""));

  function showTyped(text) {
    const line = document.getElementById("types");
    line.textContent = text;
    line.hidden = !text;
  }

  // ---- arrow keys move between plates
  shelf.addEventListener("keydown", (event) => {
    const plate = event.target.closest(".plate");
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns(), ArrowDown: columns() }[event.key];
    if (!plate || !step || event.altKey || event.ctrlKey || event.metaKey) return;
    const plates = [...shelf.querySelectorAll(".plate")];
    const next = plates[plates.indexOf(plate) + step] ?? (step > 1 ? plates.at(-1) : step < -1 ? plates[0] : null);
    if (!next) return;
    event.preventDefault();
    next.querySelector("a").focus();
  });

  // ---- two or more over each other, with the line to move
  function choose(plate) {
    const { id, name, address: file } = plate.dataset;
    if (chosen.has(id)) chosen.delete(id);
    else chosen.set(id, [`${name}, ${plate.querySelector(".words").textContent}`.slice(0, 90), file]);
    showChosen();
    if (chosen.size > 1 && chosen.has(id)) showTogether();
  }

  // near: id of the result that gets the focus if the button that has it goes away.
  function showChosen(near = "") {
    for (const button of shelf.querySelectorAll("[data-compare]")) button.setAttribute("aria-pressed", chosen.has(button.closest(".plate").dataset.id));
    const bar = document.getElementById("compared"), focused = bar.contains(document.activeElement) ? document.activeElement : null;
    bar.hidden = !chosen.size;
    bar.querySelector("span").textContent = chosen.size === 1 ? translate("1 is chosen: press compare at another one") : translate("%(n)s are chosen", { n: chosen.size });
    document.getElementById("together").hidden = chosen.size < 2;
    if (!focused || focused.checkVisibility()) return;
    const plate = [...shelf.querySelectorAll(".plate")].find(({ dataset }) => dataset.id === near);
    const others = [document.getElementById("apart"), plate?.querySelector("[data-compare]"), form.elements.find];
    others.find((one) => one?.checkVisibility()).focus({ preventScroll: true });
  }

  function showTogether() {
    const files = [...chosen.values()];
    fill($("left"), files, files[0][1]);
    fill($("right"), files, files.at(-1)[1]);
    $("shown_prompt").textContent = "";
    $("beside").showModal();
    showPair(true);
  }

  document.getElementById("together").addEventListener("click", showTogether);
  document.getElementById("apart").addEventListener("click", () => {
    const [first] = chosen.keys();
    chosen.clear();
    showChosen(first);
  });

  document.body.addEventListener("results", () => goOn(0)); // what has just been made is shown at once
  const start = new URLSearchParams(location.search).get("from"); // of a link from another page
  if (start) startFrom(start, document.getElementById("counted"));
  goOn(0);
})();

"use strict";
// What the walker asks a page: what can be pressed or typed into, where the focus is, and what the page says.

globalThis.walker = (() => {
  const CONTROLS = "a[href], button, input:not([type=hidden]), select, textarea, summary";
  const COMMANDS = "code, pre, textarea, input[name=line]";
  const PARTS = "form, .ask, .deed, .command, .next, li";
  const READ = /--(?:lora_weight|network_weights) (?:'([^']+)'|(\/\S+))/g; // LoRAs of a command
  const squeeze = (text) => (text ?? "").replace(/\s+/g, " ").trim();

  function isShown(one) {
    const box = one.getBoundingClientRect();
    return one.checkVisibility({ visibilityProperty: true }) && box.width > 0 && box.height > 0;
  }

  function nameOf(one) {
    const label = one.labels?.[0]?.textContent;
    const text = one.matches("button, a, summary") ? one.textContent : label;
    return squeeze(one.getAttribute("aria-label") || text || one.name || one.id).slice(0, 60);
  }

  const kindOf = (one) => one.matches("nav a") ? "nav" : one.matches("a") ? "link" : one.matches("button") ? "button" : one.matches("summary") ? "summary" : "field";
  const plainKey = (one) => `${kindOf(one)} ${one.id || one.name || ""} "${nameOf(one)}"`;

  // Everything that can be used now: within an open dialog, only what is in it.
  function controls() {
    const top = [...document.querySelectorAll("dialog[open]")].at(-1) ?? document;
    const seen = new Map();
    // a language is that of all tabs: one that another tab has changed is another page when it is loaded again
    return [...top.querySelectorAll(CONTROLS)].filter((one) => isShown(one) && !one.hreflang && !one.disabled && one.ariaDisabled !== "true" && !one.readOnly).map((one) => {
      const plain = plainKey(one), count = seen.get(plain) ?? 0;
      seen.set(plain, count + 1);
      return { one, key: count ? `${plain} ${count}` : plain };
    });
  }

  const find = (key) => controls().find((each) => each.key === key)?.one ?? null;

  const list = () => controls().map(({ one, key }) => ({
    key,
    kind: kindOf(one),
    type: one.type ?? "",
    name: one.name ?? "",
    href: one.href ?? "",
    isDownload: "download" in one.dataset || one.hasAttribute("download"),
    isNumber: ["numeric", "decimal"].includes(one.inputMode),
    options: one.options ? [...one.options].map((option) => option.value) : [],
  }));

  // ---- focus and place
  let held = [], heldScroll = 0; // what the reader looks at, with what it is in, and where all that was

  // Notes where a control is, or what is in the middle of the window.
  function hold(key = "") {
    held = [];
    for (let one = find(key) ?? document.elementFromPoint(innerWidth / 2, innerHeight / 2); one; one = one.parentElement) {
      held.push([one, one.getBoundingClientRect().top]);
    }
    heldScroll = scrollY;
    const pressed = find(key);
    return { ...place(), pressed: pressed ? plainKey(pressed) : "" };
  }

  // How far the page has jumped since: what comes in above without that is no jump, as the browser keeps the place.
  function shift() {
    const moved = Math.abs(scrollY - heldScroll);
    const [one, top] = held.find(([each]) => each.isConnected && each.checkVisibility()) ?? [];
    return one ? Math.min(moved, Math.abs(one.getBoundingClientRect().top - top)) : moved;
  }

  function place() {
    const active = document.activeElement;
    const has = active && active !== document.body;
    return {
      shift: shift(),
      focus: has ? plainKey(active) : "",
      top: scrollY,
      most: Math.max(0, document.documentElement.scrollHeight - innerHeight),
      dialog: !!document.querySelector("dialog[open]"),
      born: performance.timeOrigin,
    };
  }

  // ---- commands
  // What stands beside a button as its command: in its form, or in the nearest part that has one.
  function commandsOf(key) {
    const one = find(key);
    if (!one) return [];
    for (let part = one.closest(PARTS); part; part = part.parentElement?.closest(PARTS)) {
      const texts = [...part.querySelectorAll(COMMANDS)].map((each) => each.value ?? each.textContent);
      if (texts.length) return texts;
    }
    return [...document.querySelectorAll(".next code")].map((each) => each.textContent); // Enter in a field presses its button
  }

  // Texts that a page asks for anew when its fields change, with what the server answers to the fields as they are now.
  async function compareAnswers() {
    const parts = [...document.querySelectorAll("[hx-include][hx-trigger*='from:']")];
    return (await Promise.all(parts.map(compareAnswer))).filter(Boolean);
  }

  async function compareAnswer(one) {
    const target = one.getAttribute("hx-target");
    if (!one.checkVisibility() || (target && target !== `#${one.id}`) || !one.id) return null;
    const fields = new FormData();
    for (const field of document.querySelectorAll(one.getAttribute("hx-include"))) addField(fields, field);
    const post = one.getAttribute("hx-post"), address = post ?? one.getAttribute("hx-get");
    const body = new URLSearchParams(fields);
    const headers = { "HX-Request": "true" };
    const answer = await (post ? fetch(address, { method: "POST", body, headers }) : fetch(`${address}${address.includes("?") ? "&" : "?"}${body}`, { headers }));
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    const own = one.hasAttribute("hx-select") ? page.querySelector(one.getAttribute("hx-select")) : page.body;
    if (!one.isConnected || !own || textOf(own) === textOf(one)) return null;
    return [one.id, textOf(one), textOf(own)];
  }

  // Without the parts that are filled by requests of their own or say what a press has done, and what was measured.
  function textOf(one) {
    const copy = one.cloneNode(true);
    for (const part of copy.querySelectorAll("[hx-trigger], [role=alert], #written, #tag-editor > .good, [data-measured]")) part.remove();
    return squeeze(copy.textContent);
  }

  // As htmx does, which takes of an included form only the fields inside of it.
  function addField(fields, box) {
    if (box.matches("form")) {
      const outside = [...box.elements].filter((one) => !box.contains(one)).map((one) => one.name);
      for (const [name, value] of new FormData(box)) if (!outside.includes(name)) fields.append(name, value);
    } else if (box.name && (!["checkbox", "radio"].includes(box.type) || box.checked)) fields.append(box.name, box.value);
  }

  // ---- what the page says
  const texts = (selector, where = document) => [...where.querySelectorAll(selector)].map((one) => squeeze(one.textContent)).filter(Boolean);

  const says = () => ({
    address: location.pathname + location.search,
    path: location.pathname,
    text: squeeze(document.body.innerText),
    messages: [...document.querySelectorAll("[role=alert], [role=status], .bad, .reason, .answer, .said")].filter(isShown).map((one) => squeeze(one.textContent)).filter(Boolean),
    state: document.getElementById("deeds")?.dataset.state ?? "",
    isActive: document.getElementById("deeds")?.dataset.active ?? "",
    facts: facts(document),
    twice: [...Map.groupBy([...document.querySelectorAll("[id]")], (one) => one.id)].filter(([, ones]) => ones.length > 1).map(([id]) => id),
  });

  // What a page and its reloaded self have in common, once the page has polled.
  const facts = (page) => ({
    states: [...page.querySelectorAll(".state")].filter((one) => !one.closest(".later")).map((one) => squeeze(one.textContent)).map((text) => text.split(/[ ,]/)[0]),
    jobs: [...page.querySelectorAll("li.job")].map((one) => `${one.id} ${one.className}`),
    runs: [...page.querySelectorAll("#runs [id^=r]")].map((one) => `${one.id} ${one.className}`),
    active: page.getElementById("deeds")?.dataset.active ?? "",
    said: texts("#runs > .note, #jobs > .status", page),
    buttons: texts("#deeds button, #jobs button", page),
  });

  async function reloaded() {
    const answer = await fetch(location.href);
    return facts(new DOMParser().parseFromString(await answer.text(), "text/html"));
  }

  // Addresses that the page names: links, pictures, clips.
  function addresses() {
    const named = [];
    for (const one of document.querySelectorAll("a[href], img[src], video[src], iframe[src], [data-src], [data-address]")) {
      const text = one.dataset.src ?? one.getAttribute("href") ?? one.getAttribute("src");
      if (text !== null && text !== "") named.push(new URL(text, location.href).href.split("#")[0]);
    }
    return [...new Set(named)].filter((one) => one.startsWith(location.origin));
  }

  // Files that the page names and that have to be there: LoRAs to choose, and what its command of Generate reads.
  const files = () => [
    ...[...document.querySelectorAll("input[name=lora]")].map((one) => one.value),
    ...[...(document.getElementById("command")?.textContent ?? "").matchAll(READ)].map((match) => match[1] ?? match[2]),
  ].filter((path) => path.startsWith("/"));

  return { find, list, place, hold, commandsOf, compareAnswers, says, reloaded, addresses, files };
})();

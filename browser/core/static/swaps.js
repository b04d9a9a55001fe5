"use strict";
// What every page needs whose parts are replaced: questions before a button acts, the focus, and rest while nobody looks.
{
  document.addEventListener("click", (event) => {
    const said = event.target.closest("[data-confirm]")?.dataset.confirm;
    if (said && !confirm(said)) { event.preventDefault(); event.stopImmediatePropagation(); }
  }, true);

  // ---- who presses a button that goes away stays near it
  const CONTROLS = "a[href], button, input:not([type=hidden]), select, textarea, summary";
  const controlsOf = (part) => [...part.querySelectorAll(CONTROLS)].filter((one) => one.checkVisibility() && !one.disabled);
  let focused = null, near = []; // what has the focus; the parts that it is in, with its place among their controls
  document.addEventListener("htmx:before:swap", () => {
    focused = document.activeElement === document.body ? null : document.activeElement;
    near = [];
    for (let part = focused?.closest("main, main [id]"); part; part = part.parentElement.closest("main, main [id]")) {
      near.push([part.id ? `#${CSS.escape(part.id)}` : "main", controlsOf(part).indexOf(focused)]);
    }
  });
  document.addEventListener("htmx:after:swap", () => {
    if (!focused || document.activeElement !== document.body) return;
    if (focused.isConnected && focused.checkVisibility() && !focused.disabled) { focused.focus({ preventScroll: true }); return; } // it was moved
    for (const [selector, place] of near) {
      const part = document.querySelector(selector), controls = part ? controlsOf(part) : [];
      if (controls.length) { controls[Math.min(Math.max(place, 0), controls.length - 1)].focus({ preventScroll: true }); return; }
    }
  });

  // ---- a button that adds a field leads to it
  let added = ""; // the id of a field that is asked for
  document.addEventListener("htmx:before:request", ({ target }) => { added = target.dataset?.leadsTo ?? added; });
  document.addEventListener("htmx:after:swap", () => {
    const field = document.getElementById(added);
    if (field) { added = ""; field.focus(); }
  });

  // ---- a change that leads to the same page again keeps the place on it
  const PLACE = "place on the page";
  document.addEventListener("htmx:after:request", ({ detail }) => {
    const address = detail.ctx.response?.raw.headers.get("hx-redirect");
    if (!address || new URL(address, location.href).pathname !== location.pathname) return;
    const place = { path: location.pathname, y: scrollY, id: document.activeElement.id };
    try { sessionStorage.setItem(PLACE, JSON.stringify(place)); } catch { /* kept nowhere */ }
  });
  try {
    const place = JSON.parse(sessionStorage.getItem(PLACE) ?? "{}");
    sessionStorage.removeItem(PLACE);
    if (place.path === location.pathname) {
      scrollTo(0, place.y);
      if (place.id) document.getElementById(place.id)?.focus({ preventScroll: true });
    }
  } catch { /* kept nowhere */ }

  // ---- a page that nobody sees asks for nothing again; what was pressed or typed is still sent
  document.addEventListener("htmx:before:request", (event) => {
    const isRepeated = event.detail.ctx.request.method === "GET" && event.target.closest?.("[hx-trigger*='every']");
    if (!document.hidden || !isRepeated) return;
    let isAwaited = false; // the end of a run, see notices.js
    try { isAwaited = event.target.id === "machine" && localStorage.getItem("tell of ends") === "yes"; } catch { /* kept nowhere */ }
    if (!isAwaited) event.preventDefault();
  });
}

"use strict";
// A run's buttons: look how it stands, and keep what was answered until that changes.

(() => {
  const box = () => document.getElementById("deeds");
  const OWN = 4000; // milliseconds after a press in which a change of the state is what it has asked for
  const done = () => [...document.querySelectorAll("#done, #done_further")]; // what was answered, above and below the samples
  let said = 0; // when a button was answered
  let turn = 0; // of looks

  async function look() {
    const now = box();
    if (!now) return;
    const answer = await fetch(`${ROOT}/run/${now.dataset.id}/standing`);
    if (answer.status === 404) {
      document.getElementById("done").textContent = translate("It no longer exists: its folder was renamed, moved or removed.");
      return;
    }
    if (!answer.ok) return;
    const standing = await answer.json();
    if (standing.is_begun && now.dataset.begun !== "yes") { location.reload(); return; } // it has a page of its own now
    if (standing.mark !== now.dataset.standing) {
      htmx.trigger(now, "look");
      htmx.trigger("#machine", "changed"); // so that both lines say the same
      for (const one of done()) if (Date.now() - said > OWN || one.querySelector(".bad")) one.replaceChildren(); // it was about an earlier state
    }
  }

  // Looks soon after a press and before the training, when states last seconds; else as often as the curves grow.
  async function goOn() {
    const ours = ++turn;
    if (!document.hidden) await look().catch(() => {});
    const isSoon = Date.now() - said < 20000 || (box()?.dataset.active === "yes" && box().dataset.begun !== "yes");
    const wait = isSoon ? 1500 : box()?.dataset.active === "yes" ? 5000 : 10000;
    if (ours === turn) setTimeout(() => ours === turn && goOn(), wait);
  }

  document.addEventListener("htmx:after:request", ({ target, detail }) => {
    if (detail.ctx.response?.raw.headers.get("hx-redirect")) return; // to another page
    if (target === document || !target.closest?.("#deeds, #panel, #further, #removal") || target.matches("#deeds")) return;
    said = Date.now();
    goOn();
  });
  document.addEventListener("visibilitychange", () => { if (!document.hidden) goOn(); });
  // A panel that closes takes the focus with its button: it goes back to the button that has opened it.
  let opener = "";
  document.addEventListener("htmx:before:request", ({ target }) => {
    if (target.matches?.("#removal form")) turn += 1; // what is being removed is not asked how it stands
    if (target.matches?.("form:is([hx-target='#panel'], [hx-target='#removal']):not(#panel form, #removal form)")) opener = target.querySelector("button").id;
  });
  document.addEventListener("htmx:after:swap", ({ target }) => {
    if (["panel", "removal"].includes(target.id) && document.activeElement === document.body) document.getElementById(opener)?.focus({ preventScroll: true });
  });
  if (box()) goOn();
})();

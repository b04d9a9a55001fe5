"use strict";
// A run's buttons: look how it stands, and tell when it ends if one wants that.

(() => {
  const box = () => document.getElementById("deeds");
  const tell = document.getElementById("tell");
  const key = `tell ${box()?.dataset.id}`;
  let said = 0; // when a button was answered
  let isOld = false; // the state has changed since
  let wasActive = box()?.dataset.active === "yes";

  function remember(value) {
    try { value ? localStorage.setItem(key, "yes") : localStorage.removeItem(key); } catch { /* private windows keep nothing */ }
  }
  function isWanted() {
    try { return localStorage.getItem(key) === "yes"; } catch { return tell.checked; }
  }

  function explain() {
    const how = document.getElementById("told_how");
    if (!tell.checked) how.textContent = "";
    else if (!("Notification" in window) || !isSecureContext) how.textContent = "by a sound: this browser shows notices of pages from localhost or https alone";
    else if (Notification.permission === "denied") how.textContent = "by a sound: notices of this page are switched off in the browser";
    else if (Notification.permission === "default") how.textContent = "by a sound, and by a notice if the browser may show it";
    else how.textContent = "by a notice and a sound, while this page is open";
  }

  function ring() {
    const sound = new AudioContext(), tone = sound.createOscillator(), level = sound.createGain();
    tone.frequency.value = 660;
    level.gain.setValueAtTime(0.2, sound.currentTime);
    level.gain.exponentialRampToValueAtTime(0.001, sound.currentTime + 1.2);
    tone.connect(level).connect(sound.destination);
    tone.start();
    tone.stop(sound.currentTime + 1.2);
  }

  function announce(name, state) {
    const text = `${name}: ${state}`;
    document.title = text;
    try { ring(); } catch { /* a browser may want a click before a sound */ }
    if ("Notification" in window && Notification.permission === "granted") new Notification(text);
  }

  async function look() {
    const now = box();
    if (!now) return;
    const answer = await fetch(`/run/${now.dataset.id}/standing`);
    if (answer.status === 404) {
      document.getElementById("done").textContent = "It is not there any more: its folder was renamed, moved or removed.";
      return;
    }
    if (!answer.ok) return;
    const standing = await answer.json();
    if (standing.is_begun && now.dataset.begun !== "yes") { location.reload(); return; } // it has a page of its own now
    if (standing.mark !== now.dataset.standing) {
      htmx.trigger(now, "look");
      isOld = true;
    }
    const done = document.getElementById("done");
    if (isOld && (Date.now() - said > 4000 || done.querySelector(".bad"))) done.replaceChildren(); // it was about an earlier state
    if (wasActive && !standing.is_active && tell.checked) announce(now.dataset.name, standing.state);
    wasActive = standing.is_active;
  }

  async function goOn() {
    // also in a hidden window, if somebody waits for the end
    if (!document.hidden || tell.checked) await look().catch(() => {});
    setTimeout(goOn, box()?.dataset.active === "yes" ? 1500 : 5000);
  }

  document.addEventListener("htmx:after:request", ({ target, detail }) => {
    if (detail.ctx.response?.raw.headers.get("hx-redirect")) return; // to another page
    if (target === document || !target.closest?.("#deeds, #panel") || target.matches("#deeds")) return;
    said = Date.now();
    isOld = false;
    look().catch(() => {});
  });
  // Where Stop was, no other button comes: a second press would start something.
  let stopEnd = null; // its lower edge on the page
  const noteStop = () => {
    const stop = document.getElementById("stop");
    if (stop) stopEnd = stop.getBoundingClientRect().bottom + scrollY;
    return stop;
  };
  noteStop();
  document.addEventListener("htmx:before:swap", noteStop);
  document.addEventListener("htmx:after:swap", () => {
    const first = box()?.querySelector(".deed:not(.gap)");
    if (noteStop() || stopEnd === null || !first) return;
    const gap = box().querySelector(".gap") ?? Object.assign(document.createElement("p"), { className: "deed gap" });
    first.before(gap);
    gap.style.height = `${Math.max(stopEnd - gap.getBoundingClientRect().top - scrollY, 0)}px`;
  });

  // A panel that closes takes the focus with its button: it goes back to the button that has opened it.
  let opener = "";
  document.addEventListener("htmx:before:request", ({ target }) => {
    if (target.matches?.("#deeds form[hx-target='#panel']")) opener = target.querySelector("button").id;
  });
  document.addEventListener("htmx:after:swap", ({ target }) => {
    if (target.id === "panel" && document.activeElement === document.body) document.getElementById(opener)?.focus({ preventScroll: true });
  });
  if (!box() || !tell) return;
  tell.checked = isWanted();
  explain();
  tell.addEventListener("change", async () => {
    remember(tell.checked);
    explain(); // some browsers never answer whether notices are wanted
    if (tell.checked && "Notification" in window && isSecureContext && Notification.permission === "default") await Notification.requestPermission();
    explain();
  });
  goOn();
})();

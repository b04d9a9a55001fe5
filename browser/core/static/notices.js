"use strict";
// A notice and a sound when a run ends, if one wants that: from any page that is open, once for all of them.

(() => {
  const WANTED = "tell of ends", TOLD = "ends that were told", MOST_TOLD = 50;
  const read = (name) => { try { return localStorage.getItem(name); } catch { return null; } }; // a private window may keep nothing
  const write = (name, value) => { try { localStorage.setItem(name, value); } catch { /* it counts until the page ends */ } };
  const readTold = () => JSON.parse(read(TOLD) ?? "[]");
  const tell = () => document.getElementById("tell");

  // the ends of the last minutes, as the line of the machine lists them: a key, and what is said
  const listEnds = () => JSON.parse(document.querySelector("#machine [data-ended]")?.dataset.ended ?? "[]");

  function explain() {
    const how = document.getElementById("told_how");
    if (!tell().checked) how.textContent = "";
    else if (!("Notification" in window) || !isSecureContext) how.textContent = translate("by a sound: this browser shows notices of pages from localhost or https alone");
    else if (Notification.permission === "denied") how.textContent = translate("by a sound: notices of this page are switched off in the browser");
    else if (Notification.permission === "default") how.textContent = translate("by a sound, and by a notice if the browser may show it");
    else how.textContent = translate("by a notice and a sound, while a page of this server is open");
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

  function announce(key, text) {
    document.title = text;
    try { ring(); } catch { /* a browser may want a click before a sound */ }
    if ("Notification" in window && Notification.permission === "granted") new Notification(text, { tag: key });
  }

  // isQuiet: what has ended by now is not told later.
  function tellNew(isQuiet) {
    const told = readTold();
    const ends = listEnds().filter(([key]) => !told.includes(key));
    if (!ends.length) return;
    write(TOLD, JSON.stringify([...told, ...ends.map(([key]) => key)].slice(-MOST_TOLD)));
    if (!isQuiet) ends.forEach(([key, text]) => announce(key, text));
  }

  function look() {
    const isQuiet = read(WANTED) !== "yes";
    // one tab at a time: the others find that it was told
    if (navigator.locks) navigator.locks.request(TOLD, () => tellNew(isQuiet));
    else tellNew(isQuiet);
  }

  document.addEventListener("htmx:after:swap", look);
  document.addEventListener("change", async ({ target }) => {
    if (target.id !== "tell") return;
    write(WANTED, target.checked ? "yes" : "");
    explain(); // some browsers never answer whether notices are wanted
    if (target.checked && "Notification" in window && isSecureContext && Notification.permission === "default") await Notification.requestPermission();
    explain();
  });
  if (!tell()) return;
  tell().checked = read(WANTED) === "yes";
  explain();
})();

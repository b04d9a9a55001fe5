"use strict";
// A button copies the command above it, and a click on a clip that plays by itself holds it.
document.addEventListener("click", async ({ target }) => {
  const copy = target.closest(".copy"), clip = target.closest("video[autoplay]");
  if (copy) copy.textContent = await copyText(copy.closest(".command").querySelector("pre").textContent) ? "Copied" : "Select the text above";
  if (clip && !clip.closest("a")) (clip.paused ? clip.play() : clip.pause());
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
  target.dataset.command ??= target.querySelector("[data-command]")?.dataset.command ?? "the command that started it";
  const command = Object.assign(document.createElement("code"), { textContent: target.dataset.command });
  target.replaceChildren("The server of this page does not answer. Start it again with: ", command, " A training goes on without it.");
});

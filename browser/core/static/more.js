"use strict";
// Lists that scroll inside a page say how many of their rows are below what is seen.
{
  const LISTS = ".folders, .said, .loras, .lines[tabindex]";
  function sayMore(list) {
    const note = list.nextElementSibling;
    if (!note?.matches(".below")) return;
    const end = list.getBoundingClientRect().bottom;
    const rows = [...list.children].filter((row) => row.offsetHeight);
    const seen = rows.filter((row) => row.getBoundingClientRect().top < end - 12).length;
    const below = Math.max(0, Number(list.dataset.total ?? rows.length) - seen);
    const text = rows.length && below && list.scrollHeight > list.clientHeight + 4 ? translate("↓ %(n)s more", { n: below }) : "";
    if (note.textContent !== text) note.textContent = text;
  }
  const sayAll = () => document.querySelectorAll(LISTS).forEach(sayMore);
  document.addEventListener("scroll", ({ target }) => { if (target.matches?.(LISTS)) sayMore(target); }, true);
  document.addEventListener("toggle", sayAll, true);
  document.addEventListener("htmx:after:swap", sayAll);
  document.addEventListener("input", () => requestAnimationFrame(sayAll));
  addEventListener("resize", sayAll);
  sayAll();
}

"use strict";
// Long lists in parts that are there while they are near the view; others are empty and as high as they were.

function make(name, text = "", kind = "") {
  const element = document.createElement(name);
  element.textContent = text;
  element.className = kind;
  return element;
}

// Watches parts: one that stays in view for so many milliseconds is loaded.
function watchParts(load, margin, wait) {
  return new IntersectionObserver((entries) => entries.forEach(({ target, isIntersecting }) => {
    target.isIn = isIntersecting;
    clearTimeout(target.waiting);
    if (isIntersecting) target.waiting = setTimeout(() => load(target), wait); // not if it only passes by
    else {
      target.stop?.abort();
      if (target.contains(document.activeElement) || !target.firstChild) return;
      target.style.height = `${target.offsetHeight}px`;
      target.replaceChildren();
    }
  }), { rootMargin: margin });
}

"use strict";
// Leads a browser that was let in before from an address without the root of the pages to the one with it.

let root = null;
try { root = localStorage.getItem("root of pages"); } catch { /* kept nowhere */ }
if (/^\/~[\w-]+$/.test(root ?? "") && !location.pathname.startsWith(`${root}/`)) {
  location.replace(root + location.pathname + location.search + location.hash);
}

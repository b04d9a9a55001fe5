"use strict";
// The path below which the pages of this server lie, "" without a secret word.

const ROOT = location.pathname.match(/^\/~[\w-]+(?=\/)/)?.[0] ?? "";

// for enter.js, which leads from an address without it; storage is kept for each port apart, as cookies are not
try { if (ROOT) localStorage.setItem("root of pages", ROOT); } catch { /* kept nowhere: then only bookmarks lead here */ }

"use strict";
// Clips that play in step, the slider between two samples, curves that grow, and asking for what is new.

const $ = (id) => document.getElementById(id);
const all = (what, where = document) => [...where.querySelectorAll(what)];
const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
let playing = !calm;
let began = performance.now();

// ---- clips: those in view are loaded, and all play at the same place
const seen = new Set();
const watcher = new IntersectionObserver((entries) => entries.forEach(({ target, isIntersecting }) => {
  target.firstChild?.removeAttribute("src"); // ends its loading
  target.firstChild?.remove();
  if (!isIntersecting) return;
  const media = show(target.dataset.src, "", target), grid = target.closest(".grid");
  const shape = () => grid?.style.setProperty("--shape", `${media.videoWidth ?? media.naturalWidth} / ${media.videoHeight ?? media.naturalHeight}`);
  media.addEventListener(media.play ? "loadedmetadata" : "load", () => media.isConnected && shape(), { once: true });
}), { rootMargin: "200px" });

// Puts a sample into its box, or says that this browser cannot show it.
function show(address, text, box) {
  const kind = { mp4: "video", wav: "audio" }[address.split(".").pop()] ?? "img";
  const media = Object.assign(document.createElement(kind), { src: address, muted: true, loop: true, playsInline: true, alt: text });
  media.controls = kind === "audio"; // else there is nothing to see
  media.setAttribute(text ? "aria-label" : "aria-hidden", text || "true"); // its box has a label
  const fail = () => {
    if (!media.isConnected || !media.hasAttribute("src")) return; // it has left the view
    const said = document.createElement("span");
    said.className = "none";
    said.textContent = translate("This browser cannot show %(name)s: it is gone, damaged, or coded otherwise.", { name: decodeURIComponent(address.split("/").pop()) });
    media.replaceWith(said);
  };
  media.addEventListener("error", fail);
  media.addEventListener("loadeddata", () => media.videoWidth === 0 && fail()); // of an unknown picture the sound alone plays
  seen.add(media);
  box.replaceChildren(media);
  return media;
}

function watch() {
  all("[data-src]").filter((clip) => !clip.watched).forEach((clip) => {
    clip.watched = true;
    watcher.observe(clip);
  });
}

function keepStep() {
  const now = (performance.now() - began) / 1000;
  for (const clip of seen) {
    if (!clip.isConnected) seen.delete(clip);
    if (!clip.duration) continue;
    if (clip.mozHasAudio || clip.webkitAudioDecodedByteCount || clip.audioTracks?.length) all(".hearing").forEach((label) => { label.hidden = false; });
    clip.muted = clip !== heard || !all(".sound").some((box) => box.checked);
    if (!playing) { clip.pause(); continue; }
    const place = now % clip.duration;
    if (Math.abs(clip.currentTime - place) > 0.2 && clip.duration - Math.abs(clip.currentTime - place) > 0.2) clip.currentTime = place;
    if (clip.paused) clip.play().catch(() => {});
  }
}

// the one clip that may be heard: under the pointer, or with the focus
let heard = null;
for (const kind of ["pointerover", "focusin"]) document.addEventListener(kind, ({ target }) => {
  const clip = target.closest?.("td, .pair > div")?.querySelector("video, audio");
  if (clip && clip !== heard) { heard = clip; keepStep(); }
});

function setPlaying(value) {
  playing = value;
  began = performance.now();
  const button = $("play");
  if (button) {
    button.textContent = playing ? translate("Pause") : translate("Play");
    button.setAttribute("aria-pressed", playing);
  }
  keepStep();
}

document.addEventListener("input", (event) => {
  if (event.target.id !== "scrub") return;
  setPlaying(false);
  seen.forEach((clip) => { if (clip.duration) clip.currentTime = event.target.value * clip.duration * 0.999; });
});

// ---- a click shows a sample as large as the window; another one can be laid over it
let shownCell = null; // of the grid, whose row has the samples to step through

function fill(select, samples, chosen) {
  select.replaceChildren(...samples.map(([text, address]) => new Option(text, address, false, address === chosen)));
}

// Shows the samples that are chosen in the dialog. isOver: two of them.
function showPair(isOver = $("over").checked) {
  $("over").checked = isOver;
  all("#beside .over").forEach((label) => { label.hidden = !isOver; });
  const boxes = { left: document.querySelector(".pair .a"), right: document.querySelector(".pair .b") };
  boxes.left.replaceChildren();
  for (const side of isOver ? ["left", "right"] : ["right"]) {
    heard = show($(side).value, $(side).selectedOptions[0].text, boxes[side]);
  }
  $("open").href = $("right").value;
  $("shown").textContent = $("right").selectedOptions[0].text;
  // not `disabled`, which would take the focus from who has pressed them
  $("earlier").ariaDisabled = $("right").selectedIndex === 0;
  $("later").ariaDisabled = $("right").selectedIndex === $("right").options.length - 1;
  moveLine();
  keepStep();
}

function moveLine() {
  const place = $("over").checked ? $("line").value : 0, pair = document.querySelector(".pair");
  pair.querySelector(".b").style.clipPath = `inset(0 0 0 ${place}%)`;
  pair.style.setProperty("--line", `${place}%`);
}

function stepBy(number) {
  const place = $("right").selectedIndex + number;
  if (!$("right").options[place]) return;
  $("right").selectedIndex = place;
  showPair();
}

async function showCell(cell) {
  const link = cell.querySelector("a"), row = cell.parentElement;
  const prompt = row.parentElement.querySelector(".prompt").textContent.trim();
  const samples = await samplesOf(row, prompt);
  shownCell = cell;
  const earlier = $("left").selectedIndex;
  fill($("left"), samples, samples[$("beside").open && earlier > 0 ? Math.min(earlier, samples.length - 1) : 0][1]);
  fill($("right"), samples, link.getAttribute("href"));
  $("shown_prompt").textContent = prompt;
  if (!$("beside").open) $("beside").showModal();
  showPair();
}

// Shows the next prompt's sample of the same step.
function stepPrompt(number) {
  const rows = all(".grid tbody tr:last-child"), row = rows[rows.indexOf(shownCell?.parentElement) + number];
  const titles = all(".grid thead th").map((title) => title.firstChild.data.trim());
  const place = titles.indexOf($("right").selectedOptions[0].text);
  const cell = row && (row.cells[place] ?? row.cells[shownCell.cellIndex]);
  if (cell?.querySelector("a")) showCell(cell);
}

$("beside")?.addEventListener("keydown", (event) => {
  if (event.target.matches("select, input") || event.altKey || event.ctrlKey || event.metaKey) return;
  const way = { ArrowLeft: () => stepBy(-1), ArrowRight: () => stepBy(1), ArrowUp: () => stepPrompt(-1), ArrowDown: () => stepPrompt(1) }[event.key];
  if (!way) return;
  event.preventDefault();
  way();
});
// a pointer on the picture draws the line
for (const kind of ["pointerdown", "pointermove"]) document.querySelector(".pair")?.addEventListener(kind, (event) => {
  if (!event.buttons || !$("over")?.checked) return;
  const { left, width } = event.currentTarget.getBoundingClientRect();
  $("line").value = ((event.clientX - left) / width) * 100;
  moveLine();
});

async function samplesOf(row, prompt) {
  const titles = all(".grid thead th").map((title) => title.firstChild.data.trim());
  const ours = [...row.cells].map((cell, at) => [titles[at], cell.querySelector("a")?.getAttribute("href")]);
  const theirs = [];
  for (const [other, name] of others) {
    const page = new DOMParser().parseFromString(await (await fetch(`${ROOT}/run/${other}/`)).text(), "text/html");
    const heads = all(".grid thead th", page).map((title) => title.firstChild.data.trim());
    all(".grid tbody", page).filter((body) => body.querySelector(".prompt").textContent.trim() === prompt).forEach((body) => {
      [...body.rows[1].cells].forEach((cell, at) => {
        const link = cell.querySelector("a");
        if (link) theirs.push([`${name}, ${heads[at]}`, `${ROOT}/run/${other}/${link.getAttribute("href").slice(2)}`]);
      });
    });
  }
  return [...ours.filter(([, address]) => address), ...theirs];
}

document.addEventListener("click", (event) => {
  const link = event.target.closest(".grid td a");
  if (link && $("beside") && !event.ctrlKey && !event.metaKey) {
    event.preventDefault();
    showCell(link.closest("td"));
  }
  if (event.target.id === "earlier") stepBy(-1);
  if (event.target.id === "later") stepBy(1);
  if (event.target.id === "play") setPlaying(!playing);
  if (event.target.id === "close") $("beside").close();
});

document.addEventListener("change", (event) => {
  if (["left", "right", "over"].includes(event.target.id)) showPair();
  if (event.target.matches("select[name=run]")) event.target.form.requestSubmit(); // of Compare
  if (event.target.id === "part") showPart(+event.target.value);
  if (event.target.id !== "with") return;
  const { value, selectedOptions: [{ text }] } = event.target;
  if (value) others.set(value, text);
  else others.clear();
  drawAnew();
});
document.addEventListener("input", (event) => {
  if (event.target.id === "line") moveLine();
  if (["smooth", "log"].includes(event.target.id)) draw();
});
$("beside")?.addEventListener("close", () => all(".pair > div").forEach((box) => box.replaceChildren()));

// ---- boxes whose end is the newest stay there until someone moves them
function showNewest() {
  all(".newest").filter((box) => !box.isMoved).forEach((box) => box.scrollTo(box.scrollWidth, box.scrollHeight));
}

addEventListener("resize", showNewest);
document.addEventListener("scroll", ({ target: box }) => {
  if (!box.matches?.(".newest")) return;
  const rest = [box.scrollWidth - box.clientWidth - box.scrollLeft, box.scrollHeight - box.clientHeight - box.scrollTop];
  box.isMoved = Math.max(...rest) > 40; // pixels
}, true);

// ---- curves
const place = $("plots");
const DASHES = [[], [6, 4], [2, 3], [10, 4, 2, 4]]; // of runs; a colour is of a curve
const INKS = ["--ink-1", "--ink-2", "--ink-3", "--ink-4", "--ink-5", "--ink-6"];
const others = new Map(); // id -> name of runs beside this one
const told = new Map(); // id of a run -> its last news
let plots = [], zoom = null;

function smooth(values, weight) {
  let mean = 0, bias = 0;
  return values.map((value) => {
    if (value === null) return null;
    mean = weight * mean + (1 - weight) * value;
    bias = weight * bias + (1 - weight);
    return mean / bias;
  });
}

function lines(title) {
  const found = [], style = getComputedStyle(document.documentElement), weight = +$("smooth").value;
  const charts = [...told].map(([id, news]) => [id, news, news.charts.filter((one) => one.title === title)]);
  const names = [...new Set(charts.flatMap(([, , own]) => own.flatMap((chart) => chart.curves.map((curve) => curve.name))))];
  charts.forEach(([id, news, own]) => {
    for (const curve of own.flatMap((chart) => chart.curves)) {
      const ink = style.getPropertyValue(INKS[names.indexOf(curve.name) % INKS.length]).trim();
      const label = told.size > 1 ? `${news.name}: ${curve.name}` : curve.name;
      const dash = DASHES[[place.dataset.run, ...others.keys()].indexOf(id) % DASHES.length];
      if (curve.smoothing && weight) {
        found.push({ x: curve.x, y: curve.y, ink: ink + "55", width: 1 });
        found.push({ x: curve.x, y: smooth(curve.y, weight), ink, label, dash, width: 2 });
      } else found.push({ x: curve.x, y: curve.y, ink, label, dash, width: 1.5, dots: curve.has_dots });
    }
  });
  return found;
}

function makePlot(title, label, curves) {
  const style = getComputedStyle(document.documentElement), faint = style.getPropertyValue("--faint").trim();
  const rule = style.getPropertyValue("--rule").trim(), font = "12px system-ui, sans-serif";
  const axis = { stroke: faint, font, grid: { stroke: rule, width: 1 }, ticks: { show: false } };
  const box = document.createElement("figure");
  place.append(box);
  const options = {
    title, width: box.clientWidth, height: 260, cursor: { drag: { x: true, y: false } },
    scales: { x: { time: false }, y: { distr: $("log").checked && title !== translate("Seconds per step") ? 3 : 1 } },
    axes: [axis, { ...axis, size: 64, values: (_, values) => values.map((value) => value === null ? "" : +value.toPrecision(4)) }],
    series: [{ label: translate("step"), value: (_, value) => tellValue(value) }, ...curves.map((curve) => ({
      label: curve.label ?? translate("each step"), stroke: curve.ink, width: curve.width, dash: curve.dash, spanGaps: true,
      points: { show: !!curve.dots, size: 5 }, value: (_, value) => tellValue(value),
    }))],
    hooks: { setSelect: [(plot) => plot.select.width > 4 && setZoom(plot.posToVal(plot.select.left, "x"), plot.posToVal(plot.select.left + plot.select.width, "x"))] },
  };
  const plot = new uPlot(options, [[0]], box);
  plot.over.addEventListener("dblclick", () => setZoom());
  plot.root.setAttribute("role", "img");
  plot.root.setAttribute("aria-label", translate("curve of %(title)s", { title }));
  widths.observe(box);
  return { title, plot, box, shape: shapeOf(curves) };
}

const tellValue = (value) => value === null || value === undefined ? "" : `: ${+value.toPrecision(4)}`;
// a figure's width follows the window, a scroll bar, and charts that come beside it
const widths = new ResizeObserver((entries) => entries.forEach(({ target }) => {
  const one = plots.find((plot) => plot.box === target);
  if (one && target.clientWidth && one.plot.width !== target.clientWidth) one.plot.setSize({ width: target.clientWidth, height: 260 });
}));
const shapeOf = (curves) => JSON.stringify([$("log").checked, curves.map((curve) => [curve.label, curve.ink, curve.width, curve.dash])]);

function draw() {
  if (!place || !told.size) return;
  const titles = [...new Map([...told.values()].flatMap((news) => news.charts.map((chart) => [chart.title, chart.y_label])))];
  const kept = [];
  for (const [title, label] of titles) {
    const curves = lines(title);
    let one = plots.find((known) => known.title === title);
    if (one && one.shape !== shapeOf(curves)) { one.plot.destroy(); one.box.remove(); one = null; }
    one ??= makePlot(title, label, curves);
    const data = uPlot.join(curves.map((curve) => [curve.x, curve.y]));
    one.plot.setData(data);
    kept.push(one);
  }
  plots.filter((one) => !kept.includes(one)).forEach((one) => { one.plot.destroy(); one.box.remove(); });
  plots = kept;
}

// The last part of the steps so far: what fingers can choose.
function showPart(share) {
  const now = Math.max(...[...told.values()].map((news) => news.step));
  if (share < 1) setZoom(Math.floor(now * (1 - share)), now);
  else setZoom();
}

function setZoom(from, to) {
  zoom = from === undefined ? null : [from, to];
  if (!zoom) $("part").value = "1";
  drawAnew();
}

function drawAnew() {
  told.clear();
  ask();
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { plots.forEach((one) => { one.shape = ""; }); draw(); });

// ---- what is new
let page = place?.dataset.mark; // what came between this page and its first question is shown too
async function ask() {
  if (place) {
    const ids = [place.dataset.run, ...others.keys()];
    const answers = await Promise.all(ids.map(async (id) => {
      const query = new URLSearchParams({ have: told.get(id)?.key ?? "", ...(zoom ? { from: zoom[0], to: zoom[1] } : {}) });
      const answer = await fetch(`${ROOT}/run/${id}/news?${query}`);
      return answer.ok ? [id, await answer.json()] : null;
    }));
    const isNew = answers.filter((one) => one?.[1].charts);
    isNew.forEach(([id, news]) => told.set(id, news));
    if (isNew.length) draw();
    const ours = answers[0]?.[1];
    if (!ours) return 15000;
    if (page !== ours.page) htmx.trigger(document.body, "fresh");
    page = ours.page;
    $("remaining").textContent = ours.left;
    document.querySelector("progress").value = ours.step;
    all(".tile").forEach((tile, at) => {
      if (ours.tiles?.[at]?.[0] !== tile.firstChild.data) return;
      tile.querySelector("b").textContent = ours.tiles[at][1];
      tile.querySelector("span").textContent = ours.tiles[at][2];
    });
    return ours.state === "running" ? 3000 : 15000;
  }
  htmx.trigger(document.body, "fresh");
  return Math.min(($("runs") ? 8000 : 5000) * 1.5 ** unchanged, 15000); // milliseconds: longer while nothing changes
}

let unchanged = 0; // answers in a row that were those before
let lastAnswer = "";
document.addEventListener("htmx:after:request", ({ target, detail }) => {
  if (!target.matches?.("[hx-trigger*='fresh']")) return;
  const isSame = detail.ctx.response?.raw.status === 304 || detail.ctx.text === lastAnswer;
  unchanged = isSame ? unchanged + 1 : 0;
  lastAnswer = detail.ctx.text ?? lastAnswer;
});

async function goOn(wait) {
  setTimeout(async () => {
    let next = 15000;
    if (!document.hidden) next = await ask().catch(() => 15000);
    goOn(next);
  }, wait);
}

let wasAdded = false; // a line to the queue, which the swap that follows shows
let wasRefused = false; // a line, and the reason is shown above the jobs
document.addEventListener("htmx:after:swap", () => {
  watch();
  showNewest();
  keepStep();
  if ($("added")) sayAdded();
  if (wasRefused) $("said")?.scrollIntoView({ block: "nearest" });
  wasAdded = wasRefused = false;
});

// What became of the line that was added, as long as that shows above.
function sayAdded() {
  const said = $("added"), isPaused = $("jobs")?.dataset.paused === "yes", begin = $("begin");
  const place = ["waiting", "running"].find((state) => document.querySelector(`#jobs .job.${state}`));
  const words = { waiting: translate("Added: it waits above."), running: translate("Added: it runs above.") }[place] ?? (wasAdded ? translate("Added.") : "");
  if (wasAdded || said.textContent) said.textContent = words && isPaused && place === "waiting" ? `${words} ${translate("The queue is paused.")}` : words;
  const isOver = !isPaused || !said.textContent;
  if (isOver && document.activeElement === begin) $("words").focus({ preventScroll: true }); // the button goes away
  begin.hidden = isOver;
}

document.addEventListener("htmx:after:request", ({ target, detail }) => {
  if (target !== document && target.matches(".add")) {
    $("added").textContent = "";
    wasRefused = !detail.ctx.response?.raw.ok;
  }
  if (!detail.ctx.response?.raw.ok || target === document) return; // what asked may be gone from the page by now
  if (target.matches(".add")) {
    for (const one of target.querySelectorAll(".draft")) one.remove();
    $("words").defaultValue = "";
    target.reset();
    wasAdded = true;
  }
  if (target.matches(".enqueue")) {
    const link = Object.assign(document.createElement("a"), { href: `${ROOT}/queue`, textContent: translate("It is in the queue") });
    target.querySelector("button:not(.copy):not(.begin)").replaceWith(link);
    link.focus({ preventScroll: true }); // it stands where the button was
    for (const one of target.querySelectorAll(".paused")) one.hidden = false;
  }
});
document.addEventListener("visibilitychange", () => { if (!document.hidden) ask().catch(() => {}); });
watch();
showNewest();
setPlaying(playing);
setInterval(keepStep, 250);
goOn(place ? 0 : 5000);

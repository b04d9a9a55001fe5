"use strict";
// Masks over their pictures, one picture at a time: keys decide, a brush corrects. Each key is a request.
{
  const find = (id) => document.getElementById(id);
  const review = find("review"), view = find("mask-view"), said = find("mask-said");
  const { folder, writes } = review.dataset;
  const ADDRESSES = { a: `${ROOT}/masks/accept`, i: `${ROOT}/masks/invert`, x: `${ROOT}/masks/remove`, u: `${ROOT}/masks/undo` };
  const DONE = { a: translate("accepted"), i: translate("inverted"), x: translate("thrown away"), u: translate("undone"), s: translate("saved") };
  const counts = {}; // by key, since the page was opened
  let item = null, drawing = null, isBusy = false;

  // ---- a picture and its mask
  const loadImage = (address) => new Promise((done, fail) => {
    const image = new Image();
    image.onload = () => done(image);
    image.onerror = () => fail(new Error(translate("It cannot be shown.")));
    image.src = address;
  });

  // Draws what a canvas or picture covers, in the colour of masks.
  function colour(canvas, mask) {
    const context = canvas.getContext("2d");
    context.globalCompositeOperation = "copy";
    context.drawImage(mask, 0, 0, canvas.width, canvas.height);
    context.globalCompositeOperation = "source-in";
    context.fillStyle = find("mask-colour").value;
    context.fillRect(0, 0, canvas.width, canvas.height);
  }

  async function makeFigure(shot) {
    const figure = document.createElement("figure"), canvas = document.createElement("canvas");
    const picture = await loadImage(shot.picture);
    picture.alt = translate("image %(name)s", { name: item.name });
    [canvas.width, canvas.height] = item.size ?? [picture.naturalWidth, picture.naturalHeight];
    figure.className = "masked";
    figure.style.setProperty("--shape", canvas.width / canvas.height);
    figure.append(picture, canvas);
    if (item.kind === "video") {
      const caption = document.createElement("figcaption");
      caption.textContent = translate("frame %(number)s", { number: shot.number + 1 });
      figure.append(caption);
    }
    if (shot.mask) {
      canvas.mask = await loadImage(shot.mask);
      colour(canvas, canvas.mask);
    }
    return figure;
  }

  async function show(news) {
    item = news;
    endDrawing();
    history.replaceState(null, "", `${ROOT}/masks?${new URLSearchParams({ folder, at: item.at })}`);
    said.textContent = item.error || item.fault;
    const figures = await Promise.all(item.shots.map(makeFigure)).catch((error) => { said.textContent = error.message; return []; });
    view.replaceChildren(...figures);
    const hasMask = item.shots.some((shot) => shot.mask);
    for (const key of ["a", "i", "x"]) enable(key, hasMask);
    enable("u", item.can_undo);
    enable("b", item.kind === "image" && item.size);
    find("mask-done").textContent = Object.entries(counts).map(([key, count]) => `${DONE[key]} ${count}`).join(", ");
    find("mask-stands").textContent = `${item.at + 1} / ${item.total} · ${item.name} · ${item.state_text}`;
    if (item.at + 1 < item.total) lookAhead(item.at + 1);
  }

  // The browser keeps the pictures of the next one, so that a key shows it at once.
  async function lookAhead(at) {
    const { news } = await ask(addressOf(at)).catch(() => ({ news: { shots: [] } }));
    for (const shot of news.shots) for (const address of [shot.picture, shot.mask]) if (address) new Image().src = address;
  }

  const buttonOf = (key) => review.querySelector(`[data-key=${key}]`);
  const enable = (key, isOn) => { const button = buttonOf(key); if (button) button.ariaDisabled = isOn ? "false" : "true"; };
  const isOn = (key) => buttonOf(key)?.ariaDisabled === "false";

  // Says why a key or button does nothing now. A page that only shows has none of them.
  const IDLE = {
    b: translate("The brush draws on images, not on clips."), u: translate("There is nothing to undo here."),
    ...Object.fromEntries(["a", "i", "x"].map((key) => [key, translate("It has no mask: draw one with the brush (b), or have masks made for the folder.")])),
  };
  const sayIdle = (key) => { if (buttonOf(key)) said.textContent = IDLE[key]; };

  // Sends a request and returns its JSON; a text that is none is said.
  async function ask(address, options) {
    const answer = await fetch(address, options).catch(() => null);
    if (!answer) throw new Error(translate("The server does not answer."));
    if (!answer.headers.get("content-type").includes("json")) throw new Error(await answer.text());
    const news = await answer.json();
    if (news.id === undefined) throw new Error(news.error);
    return { news, isDone: answer.ok };
  }

  async function once(act) {
    if (isBusy) return;
    isBusy = true;
    try { await act(); } catch (error) { said.textContent = error.message; } finally { isBusy = false; }
  }

  const addressOf = (at) => `${ROOT}/masks/item?${new URLSearchParams({ folder, at })}`;
  const go = (at) => once(async () => show((await ask(addressOf(at))).news));
  const step = (way) => {
    if (drawing?.strokes.length && !confirm(translate("The strokes are not saved. Leave this image?"))) return;
    const at = (item?.at ?? 0) + way;
    if (!item || (at >= 0 && at < item.total)) go(at);
  };

  const press = (key) => once(async () => {
    const body = JSON.stringify({ folder, id: item.id, have: item.mark });
    const { news, isDone } = await ask(ADDRESSES[key], { method: "POST", body });
    if (isDone) counts[key] = (counts[key] ?? 0) + 1;
    const leads = isDone && (key === "a" || key === "x") && news.at + 1 < news.total; // on to the next one
    await show(leads ? (await ask(addressOf(news.at + 1))).news : news);
  });

  // ---- the brush: strokes over the mask, which are drawn again to undo one
  const makeCanvas = (width, height) => Object.assign(document.createElement("canvas"), { width, height });

  function beginDrawing() {
    const canvas = view.querySelector("canvas");
    if (!canvas || drawing) return;
    const layer = makeCanvas(canvas.width, canvas.height);
    drawing = { canvas, layer, begun: null, strokes: [], at: [canvas.width / 2, canvas.height / 2], isDown: false };
    find("brush").hidden = false;
    const side = Math.max(canvas.width, canvas.height), size = find("brush-size");
    size.max = Math.ceil(side / 2);
    if (!size.dataset.chosen) size.value = Math.ceil(side / 16);
    canvas.tabIndex = 0;
    canvas.setAttribute("aria-label", translate("mask to draw on"));
    canvas.classList.add("drawn");
    canvas.focus({ preventScroll: true });
    const address = item.shots[0].mask;
    const begun = drawing;
    drawing.ready = (address ? loadImage(`${address}&whole=yes`) : Promise.resolve(null)).then((mask) => { begun.begun = mask; if (drawing === begun) redraw(); });
    drawing.ready.catch((error) => { said.textContent = error.message; endDrawing(); });
  }

  function endDrawing() {
    if (!drawing) return;
    const { canvas } = drawing;
    drawing = null;
    find("brush").hidden = true;
    canvas.classList.remove("drawn");
    canvas.removeAttribute("tabindex");
    if (canvas.mask) colour(canvas, canvas.mask);
    else canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height);
  }

  function paint(context, { erases, size, points }) {
    context.globalCompositeOperation = erases ? "destination-out" : "source-over";
    Object.assign(context, { lineWidth: size, lineCap: "round", lineJoin: "round", strokeStyle: "#fff" });
    context.beginPath();
    context.moveTo(...points[0]);
    for (const [x, y] of points) context.lineTo(x + 0.01, y); // a line without length would not be drawn
    context.stroke();
  }

  function redraw() {
    const { canvas, layer, begun, strokes, at } = drawing, context = layer.getContext("2d");
    context.globalCompositeOperation = "copy";
    if (begun) context.drawImage(begun, 0, 0, layer.width, layer.height);
    else context.clearRect(0, 0, layer.width, layer.height);
    for (const stroke of strokes) paint(context, stroke);
    refresh(canvas, layer, at);
  }

  // Shows the mask in its colour, and where the brush is.
  function refresh(canvas, layer, [x, y]) {
    colour(canvas, layer);
    const context = canvas.getContext("2d");
    context.globalCompositeOperation = "source-over";
    context.strokeStyle = "#000";
    context.lineWidth = Math.max(1, canvas.width / 400);
    context.beginPath();
    context.arc(x, y, Number(find("brush-size").value) / 2, 0, 7);
    context.stroke();
  }

  function beginStroke(point) {
    drawing.at = point;
    drawing.isDown = true;
    drawing.strokes.push({ erases: find("brush-erase").checked, size: Number(find("brush-size").value), points: [point] });
    redraw();
  }

  function moveTo(point) {
    drawing.at = point;
    if (drawing.isDown) {
      const stroke = drawing.strokes.at(-1), last = stroke.points.at(-1);
      stroke.points.push(point);
      paint(drawing.layer.getContext("2d"), { ...stroke, points: [last, point] });
    }
    refresh(drawing.canvas, drawing.layer, point);
  }

  function place(event) {
    const box = drawing.canvas.getBoundingClientRect();
    return [(event.clientX - box.left) * drawing.canvas.width / box.width, (event.clientY - box.top) * drawing.canvas.height / box.height];
  }

  view.addEventListener("pointerdown", (event) => {
    if (!drawing || event.target !== drawing.canvas || event.button) return;
    event.preventDefault();
    drawing.canvas.focus({ preventScroll: true });
    drawing.canvas.setPointerCapture(event.pointerId);
    beginStroke(place(event));
  });
  view.addEventListener("pointermove", (event) => { if (drawing && event.target === drawing.canvas) moveTo(place(event)); });
  for (const name of ["pointerup", "pointercancel"]) view.addEventListener(name, () => { if (drawing) drawing.isDown = false; });

  const save = () => once(async () => {
    const shown = drawing;
    await shown.ready;
    const sent = makeCanvas(shown.layer.width, shown.layer.height), context = sent.getContext("2d");
    context.fillStyle = "#000";
    context.fillRect(0, 0, sent.width, sent.height);
    context.drawImage(shown.layer, 0, 0);
    const body = await new Promise((done) => sent.toBlob(done, "image/png"));
    const query = new URLSearchParams({ folder, id: item.id, have: item.mark });
    const { news, isDone } = await ask(`${ROOT}/masks/drawn?${query}`, { method: "POST", body });
    if (!isDone) { said.textContent = news.error; return; } // the strokes stay
    counts.s = (counts.s ?? 0) + 1;
    await show(news);
    find("mask-brush").focus({ preventScroll: true });
  });

  function undoStroke() {
    drawing.strokes.pop();
    redraw();
  }

  // ---- keys and buttons
  const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

  function drawByKey(event) {
    const arrow = ARROWS[event.key];
    if (event.key === "Escape") endDrawing();
    else if (event.key === "z") undoStroke();
    else if (event.key === "s") save();
    else if (event.target !== drawing.canvas) return false;
    else if (event.key === " " && drawing.isDown) drawing.isDown = false;
    else if (event.key === " ") beginStroke(drawing.at);
    else if (arrow) {
      const far = Math.max(1, Number(find("brush-size").value) / 4), { width, height } = drawing.canvas;
      const limit = (value, most) => Math.min(Math.max(value, 0), most);
      moveTo([limit(drawing.at[0] + arrow[0] * far, width), limit(drawing.at[1] + arrow[1] * far, height)]);
    } else return false;
    return true;
  }

  document.addEventListener("keydown", (event) => {
    if (!item || event.altKey || event.target.matches("input, select, textarea, summary")) return;
    const isWithControl = event.ctrlKey || event.metaKey;
    if (drawing) {
      if (isWithControl && !["s", "z"].includes(event.key)) return;
      if (drawByKey(event)) event.preventDefault();
      return;
    }
    if (isWithControl) return;
    if (event.key === "ArrowLeft") step(-1);
    else if (event.key === "ArrowRight") step(1);
    else if (event.key in IDLE && !isOn(event.key)) sayIdle(event.key);
    else if (event.key === "b") beginDrawing();
    else if (event.key in ADDRESSES) press(event.key);
    else return;
    event.preventDefault();
  });

  find("mask-previous").addEventListener("click", () => step(-1));
  find("mask-next").addEventListener("click", () => step(1));
  review.addEventListener("click", ({ target }) => {
    const { key } = target.dataset;
    if (!key) return;
    if (!isOn(key)) sayIdle(key);
    else if (key === "b") beginDrawing();
    else if (!drawing) press(key);
  });
  if (writes) {
    find("brush-undo").addEventListener("click", undoStroke);
    find("brush-save").addEventListener("click", save);
    find("brush-end").addEventListener("click", () => { endDrawing(); find("mask-brush").focus({ preventScroll: true }); });
    find("brush-size").addEventListener("input", ({ target }) => { target.dataset.chosen = "yes"; if (drawing) refresh(drawing.canvas, drawing.layer, drawing.at); });
  }

  // ---- colour and opacity, which the browser keeps
  const showLook = () => {
    view.style.setProperty("--opacity", find("mask-opacity").value / 100);
    for (const canvas of view.querySelectorAll("canvas")) if (canvas.mask && !drawing) colour(canvas, canvas.mask);
    if (drawing) refresh(drawing.canvas, drawing.layer, drawing.at);
  };
  for (const name of ["colour", "opacity"]) {
    const field = find(`mask-${name}`);
    try { field.value = localStorage.getItem(`mask ${name}`) ?? field.value; } catch { /* kept nowhere */ }
    field.addEventListener("input", () => {
      try { localStorage.setItem(`mask ${name}`, field.value); } catch { /* kept nowhere */ }
      showLook();
    });
  }

  addEventListener("beforeunload", (event) => { if (drawing?.strokes.length) event.preventDefault(); });
  for (const id of ["mask-list", "mask-more"]) find(id)?.remove(); // for browsers without scripts
  review.hidden = false;
  showLook();
  go(new URLSearchParams(location.search).get("at") ?? 0);
}

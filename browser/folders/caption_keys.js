"use strict";
// Captions that are JSON objects: below the text of a card a form of their keys, which agrees with it. What is
// typed into a field changes that value alone in the text: all else stays as it was written, letter by letter.
{
  const formats = JSON.parse(box.dataset.formats || "{}"); // family -> keys of its captions

  // ---- the text: where each value stands
  function readNode(text) { // of valid JSON; members: key -> node with the place of its key, items: nodes
    let at = 0;
    const skip = () => { while (/\s/.test(text[at] ?? "")) at++; };
    const readString = () => {
      const start = at++;
      while (text[at] !== '"') at += text[at] === "\\" ? 2 : 1;
      return text.slice(start, ++at);
    };
    const goOn = (end) => { // to the next part, or behind the end
      skip();
      if (text[at] === ",") at++;
      skip();
      return text[at] !== end;
    };
    function read() {
      skip();
      const node = { start: at };
      if (text[at] === "{") {
        node.members = new Map();
        for (at++; goOn("}");) {
          const from = at, key = JSON.parse(readString());
          skip();
          at++; // the colon
          node.members.set(key, Object.assign(read(), { from }));
        }
        at++;
      } else if (text[at] === "[") {
        node.items = [];
        for (at++; goOn("]");) node.items.push(read());
        at++;
      } else if (text[at] === '"') readString();
      else while (at < text.length && !/[,\]}\s]/.test(text[at])) at++;
      node.end = at;
      return node;
    }
    return read();
  }

  const put = (text, start, end, json) => text.slice(0, start) + json + text.slice(end);

  function putMember(text, object, key, json, order) { // a new one stands where the model was trained with it
    const there = object.members.get(key);
    if (there) return put(text, there.start, there.end, json);
    const next = order.slice(order.indexOf(key) + 1).map((name) => object.members.get(name)).find(Boolean);
    const member = `${JSON.stringify(key)}: ${json}`;
    if (next) return put(text, next.from, next.from, `${member}, `);
    const last = Math.max(...[...object.members.values()].map((node) => node.end));
    return object.members.size ? put(text, last, last, `, ${member}`) : put(text, object.start + 1, object.start + 1, member);
  }

  function putText(text, object, [key, ...rest], value, order) { // rest: the part of an object, or number and part
    const inner = object.members.get(key), [step, part] = rest, parts = order.parts?.[key] ?? [];
    if (inner?.items && inner.items[step]?.members) return putMember(text, inner.items[step], part, JSON.stringify(value), parts);
    if (inner?.members && rest.length === 1) return putMember(text, inner, step, JSON.stringify(value), parts);
    return putMember(text, object, key, JSON.stringify(rest.length ? { [step]: value } : value), order.keys);
  }

  const copy = (text, node) => text.slice(node.start, node.end);

  // ---- a caption
  function readCaption(text) {
    if (!text.trimStart().startsWith("{")) return { isPlain: true };
    try {
      const value = JSON.parse(text), root = readNode(text), inner = "structured_caption";
      const isEdit = root.members.get(inner)?.members; // the caption of an edit's result
      return { value: isEdit ? value[inner] : value, node: isEdit ? root.members.get(inner) : root };
    } catch (error) {
      return { fault: error.message };
    }
  }

  function chooseFormat(read) {
    const isOf = (format) => read.value && format.keys[0].name in read.value;
    return formats[box.dataset.format] ?? Object.values(formats).find(isOf);
  }

  function show(card) {
    const fold = card.querySelector(".keys"), text = card.querySelector(".caption textarea").value;
    const read = readCaption(text), format = chooseFormat(read);
    fold.hidden = !format;
    if (!format || !fold.open || fold.shown === text) return;
    fold.shown = text;
    fold.querySelector(".key-fields").replaceChildren(...drawFields(card, text, read, format));
  }

  function drawFields(card, text, read, format) {
    const canEdit = card.file.caption.can_edit;
    if (read.fault) return [make("p", translate("It is no JSON: %(fault)s", { fault: read.fault }), "bad")];
    if (read.isPlain) {
      const note = make("p", text.trim() ? translate("It is a sentence. %(title)s was trained with JSON objects.", { title: format.title }) : translate("It is empty."), "note");
      const begin = button(translate("Make it an object"), () => change(card, `{${JSON.stringify(format.keys[0].name)}: ${JSON.stringify(text.trim())}}`, true));
      return canEdit ? [note, begin] : [note];
    }
    const known = new Set(format.keys.map((key) => key.name)), others = Object.keys(read.value).filter((name) => !known.has(name));
    const rows = format.keys.map((key) => drawKey(card, key, read.value[key.name], canEdit));
    if (others.length) rows.push(make("p", translate("Other keys stay as they stand in the text: %(names)s", { names: others.join(", ") }), "note"));
    return rows;
  }

  const button = (label, act) => {
    const made = make("button", label);
    made.type = "button";
    made.addEventListener("click", act);
    return made;
  };

  function drawKey(card, key, value, canEdit) {
    const isMissing = value === undefined || value === null;
    const isOfKind = isMissing || (key.kind === "list" ? Array.isArray(value) : key.kind === "dict" ? typeof value === "object" && !Array.isArray(value) : typeof value === "string");
    if (!isOfKind) return make("p", `${key.label}: ${translate("it has another form; correct it in the text")}`, "warn");
    if (key.kind === "str") return drawField(card, key.label, [key.name], value ?? "", canEdit);
    const set = make("fieldset");
    set.append(make("legend", key.label));
    if (key.kind === "dict") set.append(...drawParts(card, key, [key.name], value ?? {}, key.parts.map((part) => part.name), canEdit));
    else {
      (value ?? []).forEach((entry, at) => set.append(drawEntry(card, key, entry, at, canEdit)));
      if (canEdit) set.append(button(translate("Add one"), () => changeList(card, key, (items) => [...items, `{${JSON.stringify(key.parts[0].name)}: ""}`])));
    }
    return set;
  }

  function drawParts(card, key, path, value, names, canEdit) {
    const labels = Object.fromEntries(key.parts.map((part) => [part.name, part.label]));
    return names.filter((name) => value[name] === undefined || typeof value[name] === "string")
      .map((name) => drawField(card, labels[name], [...path, name], value[name] ?? "", canEdit));
  }

  function drawEntry(card, key, entry, at, canEdit) {
    const set = make("fieldset"), names = key.parts.map((part) => part.name);
    set.append(make("legend", `${at + 1}`));
    if (typeof entry !== "object" || entry === null || Array.isArray(entry)) set.append(make("p", translate("it has another form; correct it in the text"), "warn"));
    else {
      const shown = names.filter((name, number) => name in entry || number < 2), rest = key.parts.filter((part) => !shown.includes(part.name));
      set.append(...drawParts(card, key, [key.name, at], entry, shown, canEdit));
      if (canEdit && rest.length) {
        const more = make("select");
        more.setAttribute("aria-label", translate("say more of it"));
        more.append(new Option(translate("say more …"), ""), ...rest.map((part) => new Option(part.label, part.name)));
        more.addEventListener("change", () => type(card, [key.name, at, more.value], "", true));
        set.append(more);
      }
    }
    if (canEdit) set.append(button(translate("Remove"), () => changeList(card, key, (items) => items.filter((_, number) => number !== at))));
    return set;
  }

  function drawField(card, label, path, value, canEdit) {
    const row = make("label", label), field = make(path.length === 1 ? "textarea" : "input");
    Object.assign(field, { value, readOnly: !canEdit });
    if (path.length === 1) field.rows = 1;
    row.append(field);
    field.addEventListener("input", (event) => {
      event.stopPropagation(); // the text below it is the caption
      type(card, path, field.value);
    });
    return row;
  }

  // ---- changes
  const getText = (card) => card.querySelector(".caption textarea").value;
  const getOrder = (card) => {
    const { keys } = chooseFormat(readCaption(getText(card)));
    return { keys: keys.map((key) => key.name), parts: Object.fromEntries(keys.map((key) => [key.name, key.parts.map((part) => part.name)])) };
  };

  function change(card, text, isDrawn) { // isDrawn: the form has other fields then
    const area = card.querySelector(".caption textarea"), fold = card.querySelector(".keys");
    area.value = text;
    fold.shown = isDrawn ? null : area.value;
    area.dispatchEvent(new Event("input", { bubbles: true }));
  }

  function type(card, path, value, isDrawn) {
    const text = getText(card);
    change(card, putText(text, readCaption(text).node, path, value, getOrder(card)), isDrawn);
  }

  function changeList(card, key, act) {
    const text = getText(card), { node } = readCaption(text);
    const items = (node.members.get(key.name)?.items ?? []).map((item) => copy(text, item));
    change(card, putMember(text, node, key.name, `[${act(items).join(", ")}]`, getOrder(card).keys), true);
    card.querySelector(".keys summary").focus({ preventScroll: true }); // what was pressed is gone
  }

  box.addEventListener("filled", (event) => show(event.detail));
  box.addEventListener("input", (event) => { if (event.target.matches(".caption textarea")) show(event.target.closest(".file")); });
  box.addEventListener("toggle", (event) => { if (event.target.matches(".keys")) show(event.target.closest(".file")); }, true);
}

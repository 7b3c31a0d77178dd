// The review page in the browser. It draws what the kernel sends and sends back what was pressed; it stores nothing.
// All text is set as textContent, so nothing that a transcript holds can become markup.

const KEYS = [
  ["e", "reason"], ["z", "undo"], ["←", "back"], ["→", "forward"],
  ["n", "next open"], ["m", "marks"], ["w", "who"], ["↑ ↓", "scroll"],
];
const VERDICTS = { a: "accept", r: "reject", u: "unsure" };
const SCROLL = { ArrowUp: -60, ArrowDown: 60, PageUp: -360, PageDown: 360, Home: -1e9, End: 1e9 };
const PATIENCE = 5000; // milliseconds until the page says that the kernel does not answer
const UNANSWERED = "The kernel does not answer. If it is only busy, it will store the last key when it is free. "
  + "If it has stopped, the last key was not stored: run the cell again.";

function node(tag, name, ...inside) {
  const made = document.createElement(tag);
  made.className = name;
  made.append(...inside.filter((part) => part !== null)); // a string becomes a text node
  return made;
}

function key(name, label, press) {
  const made = node("button", "key", node("kbd", "", name), label);
  made.type = "button";
  made.tabIndex = -1;
  made.onclick = press;
  return made;
}

const plain = (feature) => feature.replaceAll("_", " ");

function transcript(page) {
  const lines = page.lines.map((line) => {
    const text = line.pieces.map(([words, features]) => {
      if (!features.length) return words;
      const mark = node("mark", "", words);
      mark.title = features.map(plain).join(", ");
      return mark;
    });
    const said = node("p", "said", ...text);
    said.dir = "auto";
    return node("li", "", node("span", "number", String(line.line)),
      line.role ? node("span", `role ${line.role}`, line.role) : null, said);
  });
  return node("ol", "transcript", ...(lines.length ? lines : [node("li", "", "This video has no transcript.")]));
}

function marks(page) {
  if (page.features === null)
    return node("p", "marks hidden", "What the model marked stays hidden until you have given a verdict on this video.");
  const found = page.features.map((f) => {
    const chip = node("li", "", plain(f.feature), f.words ? node("q", "", f.words) : null);
    chip.title = f.definition;
    return chip;
  });
  return node("ul", "marks", ...(found.length ? found : [node("li", "", "The model marked nothing.")]));
}

function progress(page) {
  const bar = node("div", "bar");
  for (const verdict of Object.values(VERDICTS)) {
    const part = node("span", verdict);
    part.style.width = `${(100 * page.counts[verdict]) / Math.max(1, page.total)}%`;
    bar.append(part);
  }
  return node("header", "", node("strong", "who", page.reviewer), bar,
    node("span", "count", `${page.done} of ${page.total} read`));
}

function chooser(page, send) {
  const names = page.reviewers.map((name, n) => key(n < 9 ? String(n + 1) : "·", name, () => send({ do: "who", name })));
  return node("section", "chooser", node("h3", "", "Who is reading?"), node("div", "verdicts", ...names));
}

function finished(page) {
  const open = page.total - page.done;
  return node("section", "chooser", node("h3", "", open ? "The end of your list" : "All read. Thank you."),
    node("p", "", open ? `${open} still open: press n.` : "Every verdict is stored. Press ← to look at one again."));
}

function item(page, send, reason) {
  const verdict = page.verdict
    ? node("span", `given ${page.verdict}`, page.verdict) : node("span", "given", "no verdict yet");
  const buttons = Object.entries(VERDICTS).map(([name, v]) => {
    const made = key(name, v, () => send({ do: "verdict", verdict: v, reason: reason.value }));
    made.classList.add(v);
    if (page.verdict === v) made.setAttribute("aria-pressed", "true");
    return made;
  });
  return node("section", "item",
    node("div", "title", node("code", "video", page.video), node("span", "place", `${page.at + 1} / ${page.total}`), verdict),
    transcript(page), marks(page),
    node("div", "verdicts", ...buttons, reason));
}

function reasonField(page, back) {
  const field = node("input", "reason");
  field.placeholder = "Reason, in your words (e; Enter goes back to the keys)";
  field.maxLength = page.longest_reason;
  field.value = page.reason;
  field.setAttribute("aria-label", "Reason");
  field.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    event.stopPropagation();
    if (event.key === "Enter" || event.key === "Escape") back();
  });
  return field;
}

function render({ model, el }) {
  const root = node("div", "deescal-review");
  root.tabIndex = 0;
  el.append(root);
  let busy = false, silent = false, timer = null, reason = null;

  function send(message) {
    if (busy) return; // until the kernel has stored the last one, and said so
    busy = true;
    root.dataset.busy = "true";
    timer = setTimeout(unanswered, PATIENCE);
    try { model.send({ ...message, page: model.get("page").n }); } catch { unanswered(); }
  }

  function unanswered() {
    settle(true);
    draw();
  }

  function settle(unheard) {
    clearTimeout(timer);
    busy = false;
    silent = unheard;
    delete root.dataset.busy;
  }

  function draw() {
    const page = model.get("page"), focused = root.contains(document.activeElement);
    const draft = silent && reason ? reason.value : null;
    reason = reasonField(page, () => root.focus());
    if (draft !== null) reason.value = draft;
    const fault = silent ? UNANSWERED : page.fault;
    const main = !page.reviewer ? chooser(page, send) : page.video === null ? finished(page) : item(page, send, reason);
    const keys = page.reviewer ? node("footer", "", ...KEYS.map(([name, label]) =>
      key(name, label === "marks" ? `marks after a verdict: ${page.pause ? "on" : "off"}` : label, () => press(name))),
      node("span", "hint", "Click on the page to use the keys")) : "";
    root.replaceChildren(...[
      fault ? node("p", "fault", fault) : "", page.notice ? node("p", "notice", page.notice) : "",
      page.reviewer ? progress(page) : "", main, keys,
    ].filter((part) => part !== ""));
    if (!focused) return;
    root.focus({ preventScroll: true });
    root.scrollIntoView({ block: "nearest" });
  }

  function press(name) {
    const page = model.get("page");
    if (!page.reviewer) {
      const chosen = page.reviewers[Number(name) - 1];
      if (chosen) send({ do: "who", name: chosen });
      return Boolean(chosen);
    }
    if (VERDICTS[name] && page.video !== null) send({ do: "verdict", verdict: VERDICTS[name], reason: reason.value });
    else if (name === "e" && page.video !== null) reason.focus();
    else if (name === "z") send({ do: "undo" });
    else if (name === "←" || name === "ArrowLeft") send({ do: "move", step: -1 });
    else if (name === "→" || name === "ArrowRight") send({ do: "move", step: 1 });
    else if (name === "n") send({ do: "next" });
    else if (name === "m") send({ do: "pause" });
    else if (name === "w") send({ do: "who", name: "" });
    else if (SCROLL[name]) root.querySelector(".transcript")?.scrollBy(0, SCROLL[name]);
    else return false;
    return true;
  }

  root.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return; // JupyterLab's: Ctrl+S saves here too
    event.stopPropagation(); // but `a` is no new cell
    if (event.repeat && !SCROLL[event.key]) return;
    if (press(event.key)) event.preventDefault();
  });
  const answered = () => { settle(false); draw(); };
  model.on("change:page", answered);
  draw();
  return () => { clearTimeout(timer); model.off("change:page", answered); };
}

export default { render };

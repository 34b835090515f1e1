// One of the page's answers: its steps as they come (apd/serve/steps.py), and how the row looks after any of them. The player of
// traces (apd/show/player.js) draws decodes that are over; the look of the tokens is its.

const MOST_DRAFTS = 96;  // drawn; the others are counted
const NUM_TINTS = 6;  // .apd-c0 … .apd-c5
const NOTHING = { drafter_forwards: 0, verifier_forwards: 0, canvases: 0, seconds: 0 };
const NAMES = { target: "p_T", drafter: "p_D drafter", verifier: "p_AR verifier" };
const SIGNS = { "\n": "↵\n", "\t": "⇥\t", "\u007f": "␡" };

const byId = (id) => document.getElementById(id);
const number = (count, noun, nouns = noun + "s") => `${count} ${count === 1 ? noun : nouns}`;
const sentence = (text) => text && text[0].toUpperCase() + text.slice(1) + ".";
const visible = (text) =>
  text.replace(/[\u0000-\u001f\u007f]/g, (sign) => SIGNS[sign] ?? String.fromCharCode(0x2400 + sign.charCodeAt(0)));

class Pane {
  static all = [];

  // `setting` gives the body of a request, and `what` it asks for in words.
  constructor(title, setting) {
    this.title = title;
    this.setting = setting;
    this.root = byId("pane").content.firstElementChild.cloneNode(true);
    this.box = this.root.querySelector(".apd-tokens");
    this.bars = this.root.querySelector(".bars");
    const heading = this.root.querySelector("h2");
    heading.textContent = title;
    heading.id = `pane${Pane.all.length}`;
    this.root.setAttribute("aria-labelledby", heading.id);
    byId("answers").appendChild(this.root);
    Pane.all.push(this);
    this.clear();
  }

  say(name, text) { this.root.querySelector(name).textContent = text; }

  clear() {
    this.steps = [];  // shown, or to be shown again
    this.queue = [];  // events that wait for their time
    this.end = null;  // the last event
    this.waits = false;  // for the server
    this.lastShown = 0;
    this.root.classList.remove("failed");
    this.say(".what", this.setting().what);
    this.say(".spoken", "");
    this.say(".more", "");
    this.rewind();
    this.count();
  }

  rewind() {
    this.shown = 0;
    this.cells = [];  // by position
    this.counts = [];  // by step
    this.box.textContent = this.bars.textContent = "";
  }

  get isOver() { return this.end !== null && this.shown === this.steps.length && !this.queue.length; }

  // Shows the next event of the queue.
  next(now) {
    const event = this.queue.shift();
    if (event.done) this.end = event;
    else {
      this.steps.push(event);
      this.lastShown = now;
    }
    this.show(this.steps.length);
  }

  // Shows the row after k steps.
  show(k) {
    k = Math.min(k, this.steps.length);
    if (k < this.shown) this.rewind();
    while (this.shown < k) this.add(this.steps[this.shown++]);
    this.draw();
    this.drawBars();
    this.count();
  }

  add(step) {
    const tint = `apd-c${step.step % NUM_TINTS}`;
    this.cells.forEach((cell, i) => { if (cell?.isDraft) delete this.cells[i]; });
    for (const [position, text] of step.rejected) this.cells[position] = { isDraft: true, text, step: step.step };
    for (const { position, text, draft } of step.tokens) {
      const isReplaced = draft !== undefined;
      this.cells[position] = {
        isDraft: false, text, step: step.step, look: `apd-t ${tint}${isReplaced ? " apd-y" : ""}`,
        tip: `step ${step.step + 1}${isReplaced ? `, in place of the draft “${draft}”` : ""}`,
      };
    }
    if (step.length !== null) this.cells.length = Math.min(this.cells.length, step.length);
    this.bars.appendChild(document.createElement("span")).className = tint;
  }

  draw() {
    const { spans, numLeftOut } = this.spans(), { box } = this, shown = folded(spans);
    if (numLeftOut) shown.push(["apd-m", ` … ${number(numLeftOut, "more draft")}`, ""]);
    while (box.children.length > shown.length) box.lastChild.remove();
    shown.forEach(([look, text, tip], i) => {
      const span = box.children[i] ?? box.appendChild(document.createElement("span"));
      if (span.className !== look) span.className = look;
      if (span.textContent !== text) span.textContent = text;
      if (span.title !== tip) span.title = tip;
    });
    const frontier = box.querySelector(".apd-d, .apd-m") ?? (this.isOver ? null : box.lastChild), frame = box.parentElement;
    if (!frontier) return;
    const below = frontier.getBoundingClientRect().bottom - frame.getBoundingClientRect().bottom;
    if (below > 0) frame.scrollTop += below + 8;  // the frame follows what is written
  }

  // Class, text and tip of every position, and the number of drafts that are left out.
  spans() {
    const texts = this.isOver ? this.end.texts : null, last = this.shown - 1, spans = [];
    let numDrafts = 0;
    for (let i = 0; i < (texts ?? this.cells).length; i++) {
      const cell = this.cells[i], text = visible(texts?.[i] ?? cell?.text ?? "") || "·";
      if (!cell) spans.push(["apd-m", "▢", ""]);
      else if (!cell.isDraft) {
        const isNew = cell.step === last && !this.isOver;
        spans.push([cell.look + (isNew ? " apd-new" : ""), text, [cell.tip, ...this.probabilities(i)].join("\n")]);
      } else if (++numDrafts <= MOST_DRAFTS) {  // two names in turn: a draft that stays fades anew
        spans.push([`apd-d fade${last % 2}`, text, `drafted at step ${last + 1}, not committed`]);
      }
    }
    return { spans, numLeftOut: Math.max(numDrafts - MOST_DRAFTS, 0) };
  }

  probabilities(i) {
    const probs = Object.entries(this.end?.probs ?? {}).filter(([, ofModel]) => i < ofModel.length);
    return probs.map(([model, ofModel]) => `${NAMES[model]} ${ofModel[i].toFixed(3)}`);
  }

  // Per step, the tokens that it committed; equal heights are equal numbers in all panes.
  drawBars() {
    this.counts = Array.from(this.bars.children, () => 0);
    for (const cell of this.cells) if (cell && !cell.isDraft) this.counts[cell.step]++;
    const most = Math.max(4, ...Pane.all.flatMap((pane) => pane.counts));
    for (const pane of Pane.all) {
      [...pane.bars.children].forEach((bar, i) => { bar.style.height = `${(100 * pane.counts[i]) / most}%`; });
    }
  }

  count() {
    const step = this.steps[this.shown - 1] ?? NOTHING, more = [];
    const tokens = this.isOver ? this.end.texts.length : this.cells.filter((cell) => cell && !cell.isDraft).length;
    const forwards = step.drafter_forwards || step.verifier_forwards;
    this.say(".rate dd", forwards ? (tokens / forwards).toFixed(2) : "–");
    this.say(".tokens dd", tokens);
    this.say(".forwards dd", forwards);
    this.say(".seconds dd", step.seconds.toFixed(2));
    if (step.drafter_forwards && step.verifier_forwards) more.push(`${number(step.verifier_forwards, "verifier forward")} besides`);
    if (step.canvases > step.drafter_forwards) more.push(`${number(step.canvases, "canvas", "canvases")} in these forwards`);
    if (this.isOver) more.push(this.end.finish === "stop" ? "ended by a stop token" : "ended at its length");
    if (!this.root.classList.contains("failed")) this.say(".more", sentence(more.join("; ")));
  }

  fail(message) {
    this.root.classList.add("failed");
    this.say(".more", message);
  }

  // The answer and its counts in words, for screen readers, from which the tokens that come and go are hidden.
  summary() {
    const { texts, text, drafter_forwards: drafted, verifier_forwards: verified, seconds } = this.end;
    this.say(".spoken", `Answer: ${text}`);
    return `${this.title}: ${number(texts.length, "token")} in ${number(drafted || verified, "forward")}, ${seconds.toFixed(2)} s.`;
  }
}

// Four or more equal neighbours are told once: <eos> ×20.
function folded(spans) {
  const found = [];
  for (let i = 0, j; i < spans.length; i = j) {
    const [look, text, tip] = spans[i];
    for (j = i + 1; j < spans.length && spans[j][0] === look && spans[j][1] === text && text.trim();) j++;
    if (j - i < 4 || look === "apd-m") found.push(...spans.slice(i, j));
    else found.push([look, `${text} ×${j - i}`, tip]);
  }
  return found;
}

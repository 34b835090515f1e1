// Asks the server for three decodes of one prompt and draws their steps. The pages of traces (apd/show/player.js) draw a decode
// that is over; here steps come one by one (apd/serve/steps.py), wait in a queue for slow motion, and are kept for the slider.
(function () {
  "use strict";
  var byId = function (id) { return document.getElementById(id); };
  var about = JSON.parse(byId("about").textContent);
  var windows = windowsUpTo(about.window_size);
  var MOST_DRAFTS = 96, NUM_TINTS = 6;
  var panes = [], running = null, timer = null;

  // ------------------------------------------------------------ a pane: the steps of one answer, and how they are shown

  function Pane(title, setting) {
    var root = byId("pane").content.firstElementChild.cloneNode(true);
    this.root = root;
    this.setting = setting;  // the body of a request, and a sentence about it
    this.title = title;
    this.box = root.querySelector(".apd-tokens");
    this.bars = root.querySelector(".bars");
    root.querySelector("h2").textContent = title;
    root.querySelector("h2").id = "pane" + panes.length;
    root.setAttribute("aria-labelledby", root.querySelector("h2").id);
    byId("answers").appendChild(root);
    this.describe();
    this.clear();
  }

  Pane.prototype.say = function (name, text) { this.root.querySelector(name).textContent = text; };
  Pane.prototype.describe = function () { this.say(".what", this.setting().what); };

  Pane.prototype.clear = function () {
    this.steps = [];
    this.queue = [];
    this.end = null;
    this.waits = false;
    this.shown = 0;
    this.lastShown = 0;
    this.root.classList.remove("failed");
    this.say(".spoken", "");
    this.say(".more", "");
    this.reset();
    this.count();
  };

  Pane.prototype.reset = function () {
    this.cells = [];
    this.counts = [];
    this.shown = 0;
    this.box.textContent = "";
    this.bars.textContent = "";
  };

  // Shows the row after k steps.
  Pane.prototype.show = function (k) {
    k = Math.min(k, this.steps.length);
    if (k < this.shown) this.reset();
    while (this.shown < k) this.add(this.steps[this.shown++]);
    this.draw();
    this.count();
  };

  Pane.prototype.add = function (step) {
    var cells = this.cells, tint = " apd-c" + (step.step % NUM_TINTS);
    cells.forEach(function (cell, i) { if (cell && cell.isDraft) cells[i] = undefined; });
    step.rejected.forEach(function (draft) { cells[draft[0]] = { isDraft: true, text: draft[1], step: step.step }; });
    step.tokens.forEach(function (token) {
      cells[token.position] = {
        isDraft: false, text: token.text, step: step.step,
        tip: "step " + (step.step + 1) + (token.draft === undefined ? "" : ", in place of the draft “" + token.draft + "”"),
        look: "apd-t" + tint + (token.draft === undefined ? "" : " apd-y")
      };
    });
    if (step.length !== null) cells.length = Math.min(cells.length, step.length);
    this.bars.appendChild(document.createElement("span")).className = tint.trim();
  };

  Pane.prototype.draw = function () {
    var isOver = this.end !== null && this.shown === this.steps.length && !this.queue.length;
    var texts = isOver ? this.end.texts : null, cells = this.cells, num = texts ? texts.length : cells.length;
    var last = this.shown - 1, drafts = 0, spans = [];
    for (var i = 0; i < num; i++) {
      var cell = cells[i];
      if (!cell) { spans.push(["apd-m", "▢", ""]); continue; }
      if (cell.isDraft && (texts || ++drafts > MOST_DRAFTS)) continue;
      var text = visible(texts ? texts[i] : cell.text) || "·";
      var tip = !cell.isDraft && this.end ? [cell.tip].concat(probabilities(this.end.probs, i)).join("\n") : cell.tip;
      if (cell.isDraft) spans.push(["apd-d fade" + last % 2, text, "drafted at step " + (last + 1) + ", not committed"]);
      else spans.push([cell.look + (cell.step === last && !texts ? " apd-new" : ""), text, tip]);
    }
    spans = folded(spans, drafts - MOST_DRAFTS);
    var box = this.box;
    while (box.children.length > spans.length) box.lastChild.remove();
    spans.forEach(function (span, i) {
      var element = box.children[i] || box.appendChild(document.createElement("span"));
      if (element.className !== span[0]) element.className = span[0];
      if (element.textContent !== span[1]) element.textContent = span[1];
      if (element.title !== span[2]) element.title = span[2];
    });
    this.drawBars();
    var newest = box.querySelectorAll(".apd-new"), frame = box.parentElement;  // the frame follows what is written
    if (newest.length) {
      var below = newest[newest.length - 1].getBoundingClientRect().bottom - frame.getBoundingClientRect().bottom;
      if (below > 0) frame.scrollTop += below + 8;
    } else if (!this.shown) frame.scrollTop = 0;
  };

  // Per step, the tokens that it committed; the same height for the same number in all panes.
  Pane.prototype.drawBars = function () {
    var counts = this.counts = Array.from(this.bars.children, function () { return 0; });
    this.cells.forEach(function (cell) { if (cell && !cell.isDraft) counts[cell.step]++; });
    var most = Math.max.apply(null, panes.reduce(function (all, pane) { return all.concat(pane.counts); }, [4]));
    panes.forEach(function (pane) {
      Array.from(pane.bars.children).forEach(function (bar, i) { bar.style.height = 100 * pane.counts[i] / most + "%"; });
    });
  };

  Pane.prototype.count = function () {
    var step = this.shown ? this.steps[this.shown - 1] : { drafter_forwards: 0, verifier_forwards: 0, canvases: 0, seconds: 0 };
    var isOver = this.end !== null && this.shown === this.steps.length && !this.queue.length;
    var tokens = isOver ? this.end.texts.length : this.cells.filter(function (cell) { return cell && !cell.isDraft; }).length;
    var forwards = step.drafter_forwards || step.verifier_forwards, more = [];
    this.tokens = tokens;
    this.rate = forwards ? (tokens / forwards).toFixed(2) : "–";
    this.say(".rate dd", this.rate);
    this.say(".tokens dd", tokens);
    this.say(".forwards dd", forwards);
    this.say(".seconds dd", step.seconds.toFixed(2));
    if (step.drafter_forwards && step.verifier_forwards) more.push(number(step.verifier_forwards, "verifier forward") + " besides");
    if (step.canvases > step.drafter_forwards) more.push(number(step.canvases, "canvas", "canvases") + " in these forwards");
    if (isOver) more.push(this.end.finish === "stop" ? "ended by a stop token" : "ended at its length");
    if (!this.root.classList.contains("failed")) this.say(".more", sentence(more.join("; ")));
  };

  Pane.prototype.fail = function (message) {
    this.root.classList.add("failed");
    this.say(".more", message);
  };

  // What a screen reader is told, once, at the end; tokens that come and go are hidden from it.
  Pane.prototype.finish = function () {
    var seconds = this.end.seconds.toFixed(2);
    this.say(".spoken", "Answer: " + this.end.text);
    return this.title + ": " + number(this.tokens, "token") + " in " +
      number(this.end.drafter_forwards || this.end.verifier_forwards, "forward") + ", " + seconds + " s";
  };

  function probabilities(probs, i) {
    var names = { target: "p_T", drafter: "p_D drafter", verifier: "p_AR verifier" };
    return Object.keys(probs).map(function (model) { return names[model] + " " + probs[model][i].toFixed(3); });
  }

  // A tail of equal tokens is told once: <eos> ×20. What is not drawn is counted.
  function folded(spans, numLeftOut) {
    var found = [];
    for (var i = 0, j; i < spans.length; i = j) {
      var span = spans[i];
      for (j = i + 1; j < spans.length && spans[j][0] === span[0] && spans[j][1] === span[1] && span[1].trim();) j++;
      if (j - i < 4 || span[0] === "apd-m") { found = found.concat(spans.slice(i, j)); continue; }
      found.push([span[0], span[1] + " ×" + (j - i), span[2]]);
    }
    if (numLeftOut > 0) found.push(["apd-m", " … " + number(numLeftOut, "more draft"), ""]);
    return found;
  }

  function visible(text) {
    return text.replace(/[\u0000-\u001f\u007f]/g, function (sign) {
      return sign === "\n" ? "↵\n" : sign === "\t" ? "⇥\t" : sign === "\u007f" ? "␡" : String.fromCharCode(0x2400 + sign.charCodeAt(0));
    });
  }

  // Window sizes to choose from: up to the server's own, which is last and, as `null`, is not sent.
  function windowsUpTo(own) {
    var sizes = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256];
    if (typeof own === "number") sizes = sizes.filter(function (size) { return size < own; });
    else if (own === null) sizes.push("auto");
    return sizes.concat(null);
  }

  function number(count, noun, nouns) { return count + " " + (count === 1 ? noun : nouns || noun + "s"); }
  function sentence(text) { return text && text[0].toUpperCase() + text.slice(1) + "."; }

  // ------------------------------------------------------------ the server

  async function listen(pane, signal) {
    var headers = { "Content-Type": "application/json" };
    if (byId("key").value) headers.Authorization = "Bearer " + byId("key").value;
    var answer = await fetch("watch", {
      method: "POST", headers: headers, body: JSON.stringify(pane.setting().body), signal: signal
    });
    if (!answer.ok) throw new Error(await reason(answer));
    var reader = answer.body.getReader(), decoder = new TextDecoder(), rest = "";
    for (;;) {
      var part = await reader.read();
      rest += decoder.decode(part.value, { stream: !part.done });
      var events = rest.split("\n\n");
      rest = events.pop();
      events.forEach(function (event) {
        var text = event.replace(/^data: /, "");
        if (text === "[DONE]") return;
        var data = JSON.parse(text);
        if (data.error) throw new Error(data.error.message);
        pane.queue.push(data);
      });
      if (part.done) break;
    }
    if (!pane.queue.concat(pane.end || []).some(function (event) { return event.done; }))
      throw new Error("The server closed the connection before the answer was complete.");
  }

  async function reason(answer) {
    var text = await answer.text(), message = text;
    try {
      var data = JSON.parse(text);
      message = data.error ? data.error.message : typeof data.detail === "string" ? data.detail : JSON.stringify(data.detail);
    } catch (_) { message = text.slice(0, 400) || answer.statusText; }
    if (answer.status === 429) {
      var after = Number(answer.headers.get("Retry-After"));
      return "The server is busy" + (after ? "; try again in " + number(after, "second") : "") + ". " + message;
    }
    return message;
  }

  function send() {
    if (running) running.abort();
    var controller = running = new AbortController(), faults = [];
    complain([]);
    byId("replay").hidden = true;
    byId("stop").disabled = false;
    clearInterval(timer);
    timer = null;
    panes.forEach(function (pane) { pane.clear(); pane.describe(); pane.waits = true; });
    byId("status").textContent = "Decoding …";
    if (byId("status").getBoundingClientRect().bottom > 0.7 * innerHeight) byId("status").scrollIntoView();
    requestAnimationFrame(tick);
    panes.forEach(function (pane) {
      listen(pane, controller.signal).catch(function (error) {
        if (running !== controller) return;
        pane.fail(pane.queue.length || pane.steps.length ? "The answer is not complete." : "No answer.");
        var message = error instanceof TypeError ? "The server does not answer. Is it running? (" + error.message + ")" : error.message;
        if (faults.indexOf(message) < 0) faults.push(message);
        complain(faults);
      }).then(function () { if (running === controller) { pane.waits = false; } });
    });
  }

  // The first line of each message; what follows it, such as a list of names, is folded.
  function complain(faults) {
    var box = byId("error");
    box.textContent = "";
    faults.forEach(function (message) {
      var end = message.indexOf("\n"), line = document.createElement("p");
      line.textContent = end < 0 ? message : message.slice(0, end);
      box.appendChild(line);
      if (end < 0) return;
      var more = box.appendChild(document.createElement("details"));
      more.appendChild(document.createElement("summary")).textContent = "More";
      more.appendChild(document.createElement("pre")).textContent = message.slice(end + 1);
    });
    box.hidden = !faults.length;
  }

  function stop() {
    if (!running) return;
    running.abort();
    panes.forEach(function (pane) {
      pane.queue = [];
      if (!pane.end) pane.fail("Stopped.");
    });
    over("Stopped.");
  }

  // Shows what has come, at most a step of each answer per `pace` milliseconds.
  function tick(now) {
    if (!running) return;
    var pace = Number(byId("pace").value), isBusy = false;
    panes.forEach(function (pane) {
      while (pane.queue.length && (pane.queue[0].done || !pace || now - pane.lastShown >= pace)) {
        var event = pane.queue.shift();
        if (event.done) pane.end = event; else { pane.steps.push(event); pane.lastShown = now; }
        pane.show(pane.steps.length);
      }
      isBusy = isBusy || pane.waits || pane.queue.length > 0;
    });
    if (isBusy) requestAnimationFrame(tick);
    else over();
  }

  function over(message) {
    var ended = panes.filter(function (pane) { return pane.end; });
    running = null;
    byId("stop").disabled = true;
    byId("status").textContent = message || ended.map(function (pane) { return pane.finish(); }).join(". ") + (ended.length ? "." : "");
    var last = Math.max.apply(null, panes.map(function (pane) { return pane.steps.length; }));
    byId("replay").hidden = last < 1;
    byId("forward").max = last;
    byId("forward").value = last;
    told(byId("forward"));
  }

  // ------------------------------------------------------------ replay

  function scrub() {
    panes.forEach(function (pane) { pane.show(Number(byId("forward").value)); });
    told(byId("forward"));
  }

  function pause() { clearInterval(timer); timer = null; byId("play").textContent = "Play again"; }

  function play() {
    var forward = byId("forward"), last = Number(forward.max);
    if (timer) return pause();
    if (Number(forward.value) >= last) forward.value = 0;
    byId("play").textContent = "Pause";
    scrub();
    timer = setInterval(function () {
      forward.value = Number(forward.value) + 1;
      scrub();
      if (Number(forward.value) >= last) pause();
    }, Math.max(40, Number(byId("pace").value)));
  }

  // ------------------------------------------------------------ the form

  function settings(strategy) {
    var body = {
      prompt: byId("prompt").value, strategy: strategy || null, window_size: windows[byId("window").value],
      max_tokens: Number(byId("length").value), temperature: Number(byId("temperature").value), seed: 0
    };
    if (byId("chat").checked) body.chat = true;
    return body;
  }

  function yours() {
    var strategy = byId("strategy").value.trim(), body = settings(strategy);
    if (strategy !== "apd") return { body: body, what: strategy || "as the server was started" };
    body.mixture_weight = Number(byId("weight").value);
    body.acceptance_threshold = Number(byId("tau").value);
    return { body: body, what: "apd, R = " + byId("weight").value + ", τ = " + byId("tau").value };
  }

  function against(strategy) { return { body: settings(strategy), what: strategy }; }

  function told(input) {
    var value = input.value, text = {
      window: function () { var size = windows[value]; return size !== null ? size : about.window_size === null ? "all masks" : about.window_size; },
      pace: function () { return Number(value) ? value + " ms" : "off"; },
      temperature: function () { return Number(value) ? value : "greedy"; },
      forward: function () { return value + " of " + input.max; }
    }[input.id];
    var shown = String(text ? text() : value), output = byId(input.id + "-value");
    if (output) output.textContent = shown;
    input.setAttribute("aria-valuetext", shown);
  }

  function knobsOfApd() {
    var isApd = byId("strategy").value.trim() === "apd";
    byId("weight").disabled = byId("tau").disabled = !isApd;
    byId("strategy-note").textContent = isApd ? "" : "R and τ are read by apd alone.";
  }

  function prepare() {
    byId("model").textContent = about.model;
    byId("strategy").value = about.strategy;
    about.strategies.forEach(function (name) { byId("strategies").appendChild(new Option(name, name)); });
    byId("weight").value = about.mixture_weight;
    byId("tau").value = about.acceptance_threshold;
    byId("window").max = windows.length - 1;
    byId("window").value = windows.length - 1;
    byId("gamma").value = 0.9;
    byId("length").value = about.max_tokens;
    if (about.max_length) byId("length").max = about.max_length;
    byId("temperature").value = 0;
    byId("pace").value = 120;
    document.querySelectorAll(".key").forEach(function (part) { part.hidden = !about.needs_key; });
    byId("key").required = about.needs_key;
    byId("chat-box").hidden = !about.chat;
    byId("chat").checked = about.chat;
    byId("examples").hidden = !about.examples.length;
    about.examples.forEach(function (text) { byId("example").appendChild(new Option(text, text)); });
    byId("example").selectedIndex = about.example;
    byId("prompt").value = byId("example").value;
    panes.push(new Pane("Your settings", yours));
    panes.push(new Pane("One token per step", function () { return against("left-to-right:1"); }));
    panes.push(new Pane("By a threshold", function () { return against("threshold:" + byId("gamma").value); }));
    document.querySelectorAll("input[type=range]").forEach(function (input) {
      told(input);
      input.addEventListener("input", function () { told(input); });
    });
    knobsOfApd();
  }

  prepare();
  byId("strategy").addEventListener("input", knobsOfApd);
  byId("example").addEventListener("change", function () { byId("prompt").value = byId("example").value; });
  byId("ask").addEventListener("submit", function (event) { event.preventDefault(); send(); });
  byId("stop").addEventListener("click", stop);
  byId("play").addEventListener("click", play);
  byId("forward").addEventListener("input", function () { pause(); scrub(); });
  document.addEventListener("keydown", function (event) {
    if (event.key === "Escape") stop();
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    byId("ask").requestSubmit();
  });
})();

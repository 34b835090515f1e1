// Plays the rows of one trace. Called with the key of its element and the trace (see html.py). Slider position k is the
// row after k steps: what they committed, and what step k drafted besides.
(function (key, data) {
  "use strict";
  document.querySelectorAll('.apd-trace[data-apd="' + key + '"]:not([data-ready])').forEach(function (root) {
    root.setAttribute("data-ready", "");
    var bar = root.querySelector(".apd-bar"), tip = root.querySelector(".apd-tip"), timer = null;
    var button = bar.querySelector("button"), slider = bar.querySelector("input"), shown = bar.querySelector("output");
    var last = Number(slider.max);

    var rows = data.rows.map(function (row, r) {
      var box = root.querySelectorAll(".apd-tokens")[r], spans = Array.from(box.children), width = spans.length;
      var view = {
        row: row, box: box, spans: spans, numSteps: row.drafts.length,
        head: root.querySelectorAll(".apd-row .apd-head span")[r],
        classes: spans.map(function (span) { return span.className; }),
        texts: spans.map(function (span) { return span.textContent; }),
        tips: spans.map(function (span) { var text = span.title; span.removeAttribute("title"); return text; })
      };
      view.summary = view.head.textContent;
      row.drafts.forEach(function (draft, s) { width = Math.max(width, row.starts[s] + draft.length); });
      while (spans.length < width) spans.push(box.appendChild(document.createElement("span")));
      spans.forEach(function (span, i) { span.apdPlace = [view, i]; });
      return view;
    });

    function drafted(view, step, i) {  // label of the token that a step drafted at a position, or undefined
      var label = view.row.drafts[step][i - view.row.starts[step]];
      return i < view.row.starts[step] ? undefined : label;
    }

    function at(view, i, k) {  // [class, text] of a position after k steps
      var step = view.row.steps[i];
      if (step < k) return [view.classes[i] + (step === k - 1 && k < last ? " apd-new" : ""), view.texts[i]];
      if (k >= view.numSteps) return ["", ""];
      var label = drafted(view, Math.max(k - 1, 0), i);
      if (label === undefined) return ["", ""];
      return k ? ["apd-d", data.labels[label]] : ["apd-m", "▢"];
    }

    function repeats(view, now, i, j) {  // a draft, or a special token, that follows itself
      if (view.spans[j].previousSibling !== view.spans[j - 1]) return false;  // given tokens between two holes
      if (now[j][0] === "apd-d") return now[j].join() === now[i].join();
      var token = view.row.tokens[j];
      return now[i][0].startsWith("apd-t") && now[j][0].startsWith("apd-t")
        && view.row.tokens[i] === token && data.special.includes(token);
    }

    function fold(view, now) {  // a tail of stop tokens is told once: <eos> ×20
      view.folded = {};
      for (var i = 0, j; i < now.length; i = j) {
        for (j = i + 1; j < now.length && repeats(view, now, i, j);) j++;
        if (j - i < 4) continue;
        var fresh = now.slice(i, j).find(function (cell) { return cell[0].endsWith(" apd-new"); });
        now[i] = [(fresh || now[i])[0], now[i][1] + " ×" + (j - i)];
        now.fill(["", ""], i + 1, j);
        view.folded[i] = j - i;
      }
    }

    function breakable(now) {  // a long run without a space may be broken between its tokens, and not before it
      var run = 0;
      now.forEach(function (cell) {
        var parts = cell[1].split(/\s/);
        if (parts.length === 1 && run + cell[1].length > 24) cell[0] += " apd-b";
        run = parts[parts.length - 1].length + (parts.length === 1 ? run : 0);
      });
    }

    function draw() {
      var k = Number(slider.value);
      tip.hidden = true;
      shown.textContent = "step " + k + " of " + last;
      rows.forEach(function (view) {
        var now = view.spans.map(function (_, i) { return at(view, i, k); });
        fold(view, now);
        breakable(now);
        view.spans.forEach(function (span, i) {
          if (span.className !== now[i][0]) span.className = now[i][0];
          if (span.textContent !== now[i][1]) span.textContent = now[i][1];
        });
        var done = view.row.steps.filter(function (step) { return step < k; }).length;
        view.head.textContent = k >= view.numSteps ? view.summary
          : done + " of " + view.row.steps.length + " tokens after " + k + " of " + view.numSteps + " steps";
      });
    }

    function story(view, i) {  // what the tip says
      var k = Math.min(Number(slider.value), view.numSteps), step = view.row.steps[i], lines = [], runs = [];
      var isCommitted = step < k, until = isCommitted ? step : k;
      if (isCommitted) {
        var all = view.row.steps.slice(i, i + (view.folded[i] || 1)).filter(function (each) { return each < k; });
        var first = Math.min.apply(null, all) + 1, end = Math.max.apply(null, all) + 1;
        if (all.length > 1) lines.push(all.length + " of them, step " + first + (end > first ? "–" + end : "") + "; the first:");
        lines.push(view.tips[i]);
        var own = drafted(view, step, i);
        if (own !== view.row.tokens[i] && own !== undefined) lines.push("in place of the draft “" + data.labels[own] + "”");
      } else if (k) lines.push("drafted at step " + k + ", not committed");
      else lines.push("mask");
      for (var s = 0; s < until - (isCommitted ? 0 : 1); s++) {
        var label = drafted(view, s, i), before = runs[runs.length - 1];
        if (label === undefined) continue;
        if (before && before.label === label && before.to === s - 1) before.to = s;
        else runs.push({ label: label, from: s, to: s });
      }
      if (runs.length) lines.push("drafted before, not committed:");
      if (runs.length > 6) lines.push("…");
      runs.slice(-6).forEach(function (run) {
        lines.push("  “" + data.labels[run.label] + "” step " + (run.from + 1) + (run.to > run.from ? "–" + (run.to + 1) : ""));
      });
      return lines.join("\n");
    }

    function tell(event) {
      var place = event.target.apdPlace;
      root.querySelectorAll(".apd-on").forEach(function (span) { span.classList.remove("apd-on"); });
      tip.hidden = !(place && event.target.textContent);
      if (tip.hidden) return;
      if (event.type === "click") event.target.classList.add("apd-on");
      tip.textContent = story(place[0], place[1]);
      var frame = root.getBoundingClientRect(), box = event.target.getClientRects()[0];
      tip.style.left = Math.max(0, Math.min(box.left - frame.left, frame.width - tip.offsetWidth)) + "px";
      var below = box.bottom - frame.top + 4, above = box.top - frame.top - 4 - tip.offsetHeight;
      tip.style.top = (below + tip.offsetHeight > frame.height && above > 0 ? above : below) + "px";
    }

    function stop() { clearInterval(timer); timer = null; button.textContent = "Play"; }
    function play() {
      if (Number(slider.value) >= last) slider.value = 0;
      button.textContent = "Pause";
      draw();
      timer = setInterval(function () {
        slider.value = Number(slider.value) + 1;
        draw();
        if (Number(slider.value) >= last || !root.isConnected) stop();
      }, Math.max(60, Math.min(700, 12000 / last)));
    }
    button.addEventListener("click", function () { if (timer) stop(); else play(); });
    slider.addEventListener("input", function () { stop(); draw(); });
    root.addEventListener("mouseover", tell);
    root.addEventListener("click", tell);
    root.addEventListener("mouseleave", function () { tip.hidden = true; });
    bar.hidden = last < 1;
    draw();
  });
})

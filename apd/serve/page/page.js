// The form, the server, and the time at which steps are shown.

const about = JSON.parse(byId("about").textContent);
const windows = windowsUpTo(about.window_size);
let running = null;  // aborts the requests
let timer = null;  // of the replay

// ------------------------------------------------------------ the form

// Window sizes to choose from: up to the server's own, which is last and, as `null`, is not sent.
function windowsUpTo(own) {
  const sizes = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256];
  if (typeof own === "number") return [...sizes.filter((size) => size < own), null];
  return own === null ? [...sizes, "auto", null] : [...sizes, null];
}

function against(strategy) {
  const body = {
    prompt: byId("prompt").value, strategy: strategy || null, window_size: windows[byId("window").value],
    max_tokens: Number(byId("length").value), temperature: Number(byId("temperature").value), seed: 0,
  };
  if (byId("chat").checked) body.chat = true;
  return { body, what: strategy || "as the server was started" };
}

function yours() {
  const strategy = byId("strategy").value.trim(), setting = against(strategy);
  if (strategy !== "apd") return setting;
  const [weight, tau] = [byId("weight").value, byId("tau").value];
  Object.assign(setting.body, { mixture_weight: Number(weight), acceptance_threshold: Number(tau) });
  return { body: setting.body, what: `apd, R = ${weight}, τ = ${tau}` };
}

// Writes a slider's value beside it, and tells it to screen readers.
function tell(slider) {
  const { value, max } = slider, size = windows[byId("window").value];
  const shown = {
    window: size ?? about.window_size ?? "all masks",
    pace: Number(value) ? `${value} ms` : "off",
    temperature: Number(value) ? value : "greedy",
    forward: `${value} of ${max}`,
  }[slider.id] ?? value;
  byId(`${slider.id}-value`).textContent = shown;
  slider.setAttribute("aria-valuetext", shown);
}

function tellKnobsOfAPD() {
  const isAPD = byId("strategy").value.trim() === "apd";
  byId("weight").disabled = byId("tau").disabled = !isAPD;
  byId("strategy-note").textContent = isAPD ? "" : "R and τ are read by apd alone.";
}

function prepare() {
  const values = {
    strategy: about.strategy, weight: about.mixture_weight, tau: about.acceptance_threshold, gamma: 0.9,
    length: about.max_tokens, temperature: 0, pace: 120,
  };
  for (const [id, value] of Object.entries(values)) byId(id).value = value;
  byId("model").textContent = about.model;
  for (const name of about.strategies) byId("strategies").appendChild(new Option(name, name));
  byId("window").max = byId("window").value = windows.length - 1;
  if (about.max_length) byId("length").max = about.max_length;
  for (const part of document.querySelectorAll(".key")) part.hidden = !about.needs_key;
  byId("key").required = about.needs_key;
  byId("chat-box").hidden = !about.chat;
  byId("chat").checked = about.chat;
  byId("examples").hidden = !about.examples.length;
  for (const text of about.examples) byId("example").appendChild(new Option(text, text));
  byId("example").selectedIndex = about.example;
  byId("prompt").value = byId("example").value;
  for (const slider of document.querySelectorAll("input[type=range]")) {
    tell(slider);
    slider.addEventListener("input", () => tell(slider));
  }
  tellKnobsOfAPD();
}

// ------------------------------------------------------------ the server

async function listen(pane, signal) {
  const headers = { "Content-Type": "application/json" };
  if (byId("key").value) headers.Authorization = `Bearer ${byId("key").value}`;
  const answer = await fetch("watch", { method: "POST", headers, body: JSON.stringify(pane.setting().body), signal });
  if (!answer.ok) throw new Error(await reason(answer));
  const reader = answer.body.getReader(), decoder = new TextDecoder();
  let rest = "", isWhole = false;
  for (let part; !part?.done;) {
    part = await reader.read();
    const events = (rest + decoder.decode(part.value, { stream: !part.done })).split("\n\n");
    rest = events.pop();
    for (const event of events.map((text) => text.replace(/^data: /, "")).filter((text) => text !== "[DONE]")) {
      const data = JSON.parse(event);
      if (data.error) throw new Error(data.error.message);
      isWhole ||= Boolean(data.done);
      pane.queue.push(data);
    }
  }
  if (!isWhole) throw new Error("The server closed the connection before the answer was complete.");
}

async function reason(answer) {
  const text = await answer.text();
  let message = text.slice(0, 400) || answer.statusText;
  try {
    message = JSON.parse(text).error.message;
  } catch { /* not this server's: a proxy's, say */ }
  if (answer.status !== 429) return message;
  const after = Number(answer.headers.get("Retry-After"));
  return `The server is busy${after ? `; try again in ${number(after, "second")}` : ""}. ${message}`;
}

function send() {
  stop();
  pause();
  const controller = running = new AbortController(), faults = new Set();
  complain(faults);
  byId("replay").hidden = true;
  byId("stop").disabled = false;
  byId("status").textContent = "Decoding …";
  if (byId("status").getBoundingClientRect().bottom > 0.7 * innerHeight) byId("status").scrollIntoView();
  for (const pane of Pane.all) {
    pane.clear();
    pane.waits = true;
    listen(pane, controller.signal).catch((error) => {
      if (running !== controller) return;
      pane.fail(pane.queue.length || pane.steps.length ? "The answer is not complete." : "No answer.");
      const isDown = error instanceof TypeError;  // what `fetch` and `read` throw without a connection
      faults.add(isDown ? `The server does not answer. Is it running? (${error.message})` : error.message);
      complain(faults);
    }).finally(() => { if (running === controller) pane.waits = false; });
  }
  requestAnimationFrame(tick);
}

// Shows the first line of each message; what follows it, such as a list of names, is folded.
function complain(faults) {
  const box = byId("error");
  box.textContent = "";
  for (const fault of faults) {
    const [line, ...rest] = fault.split("\n");
    box.appendChild(document.createElement("p")).textContent = line;
    if (!rest.length) continue;
    const more = box.appendChild(document.createElement("details"));
    more.appendChild(document.createElement("summary")).textContent = "More";
    more.appendChild(document.createElement("pre")).textContent = rest.join("\n");
  }
  box.hidden = !faults.size;
}

function stop() {
  if (!running) return;
  running.abort();
  for (const pane of Pane.all) {
    pane.queue = [];
    if (!pane.end) pane.fail("Stopped.");
  }
  finish("Stopped.");
}

// ------------------------------------------------------------ time

// Shows what has come, at most a step of each answer per `pace` milliseconds.
function tick(now) {
  if (!running) return;
  const pace = Number(byId("pace").value);
  for (const pane of Pane.all) {
    while (pane.queue.length && (pane.queue[0].done || !pace || now - pane.lastShown >= pace)) pane.next(now);
  }
  if (Pane.all.some((pane) => pane.waits || pane.queue.length)) requestAnimationFrame(tick);
  else finish();
}

function finish(message) {
  running = null;
  byId("stop").disabled = true;
  byId("status").textContent = message ?? Pane.all.filter((pane) => pane.end).map((pane) => pane.summary()).join(" ");
  const last = Math.max(...Pane.all.map((pane) => pane.steps.length));
  byId("replay").hidden = last < 1;
  byId("forward").max = byId("forward").value = last;
  tell(byId("forward"));
}

function scrub() {
  for (const pane of Pane.all) pane.show(Number(byId("forward").value));
  tell(byId("forward"));
}

function pause() {
  clearInterval(timer);
  timer = null;
  byId("play").textContent = "Play again";
}

function play() {
  const forward = byId("forward"), isAtEnd = () => Number(forward.value) >= Number(forward.max);
  if (timer) return pause();
  if (isAtEnd()) forward.value = 0;
  byId("play").textContent = "Pause";
  scrub();
  timer = setInterval(() => {
    forward.stepUp();
    scrub();
    if (isAtEnd()) pause();
  }, Math.max(40, Number(byId("pace").value)));
}

prepare();
new Pane("Your settings", yours);
new Pane("One token per step", () => against("left-to-right:1"));
new Pane("By a threshold", () => against(`threshold:${byId("gamma").value}`));
byId("strategy").addEventListener("input", tellKnobsOfAPD);
byId("example").addEventListener("change", () => { byId("prompt").value = byId("example").value; });
byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
byId("stop").addEventListener("click", stop);
byId("play").addEventListener("click", play);
byId("forward").addEventListener("input", () => {
  pause();
  scrub();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault();
  byId("ask").requestSubmit();
});

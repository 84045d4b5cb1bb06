"use strict";

// The page of a latentac endpoint. It asks for one prompt's image three times at the same seed: from the base model,
// from the trained one, and from the trained one steered by its weights. Nothing is checked here: what is wrong with a
// request is shown in the server's words, beside the field that it names.

const ARMS = ["base", "trained", "steered"];
const FIELDS = ["prompt", "seed", "num_steps", "guidance_scale", "method", "particles"];
const MAX_TRIES = 8; // of a server that is busy
const MAX_WAIT_SECONDS = 60;
const MAX_HISTORY = 24;
const MAX_KEPT_CHARACTERS = 50_000_000; // of images, in memory
const MAX_STORED_CHARACTERS = 2_000_000; // sessionStorage takes about 5 million of everything
const STORED_HISTORY = "latentac.history";
// A website may open any link, and change the one of a page that it has opened. So a link fills in and draws nothing.
const LINKED = "The link's settings are filled in: press Generate, or Enter in any field.";
const LIMITED = { particles: "Rollouts per image, at most", num_steps: "At most", guidance_scale: "1 is off, at most" };
const REACHES = [5, 10, 20, 50, 100]; // of a weight; a hundredth is one step of it

let options = null; // what the server offers
let running = null; // the AbortController of the draw that is under way
let shown = null; // the draw whose images are on the page
let earlier = []; // finished draws, newest first
let methodShown = ""; // what the weights' reach and defaults are of

const $ = (id) => document.getElementById(id);

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function formatted(value) {
  const digits = Math.abs(value) >= 1000 ? { maximumFractionDigits: 0 } : { maximumSignificantDigits: 3 };
  return new Intl.NumberFormat("en", { useGrouping: false, signDisplay: "negative", ...digits }).format(value);
}

const lastOf = (values) => (values && values.length ? values[values.length - 1] : null);

const offered = () => ARMS.filter((arm) => arm !== "base" || options.policies.includes("base"));

// ---- Settings: always texts, exactly as typed, so that a link and the history give back what a person wrote.

// A field of numbers hides what was typed if it is none; the server shall refuse it all the same.
const typed = (input) => (input.validity.badInput ? "not a number" : input.value);

const weightControls = () => [...document.querySelectorAll(".steering-weight")];

const numberOf = (weightControl) => weightControl.querySelector("input[type=number]");

const rangeOf = (weightControl) => weightControl.querySelector("input[type=range]");

function readSettings() {
  const settings = Object.fromEntries(FIELDS.map((name) => [name, typed($(name))]));
  settings.weights = Object.fromEntries(weightControls().map((weightControl) => [weightControl.dataset.reward, typed(numberOf(weightControl))]));
  return settings;
}

function writeSettings(settings) {
  for (const name of FIELDS) $(name).value = settings[name];
  showMethod();
  for (const weightControl of weightControls()) turn(weightControl, settings.weights[weightControl.dataset.reward] ?? "0");
  settingsChanged();
}

function defaultSettings() {
  const { defaults, examples } = options;
  return {
    prompt: examples[0] ?? "",
    seed: String(defaults.seed),
    num_steps: String(defaults.num_steps),
    guidance_scale: String(defaults.guidance_scale),
    method: defaults.method,
    particles: defaultParticles(defaults.method),
    weights: defaultWeights(defaults.method),
  };
}

// A reward's default weight is the default method's; each method has a strength of its own.
function defaultWeights(method) {
  const { strengths, method: usual } = options.defaults;
  const factor = strengths[usual] > 0 ? (strengths[method] ?? 0) / strengths[usual] : 1;
  const weight = (reward) => String(Number((factor * reward.default_weight).toPrecision(6)));
  return Object.fromEntries(options.rewards.map((reward) => [reward.name, weight(reward)]));
}

const sameSettings = (one, other) => JSON.stringify(one) === JSON.stringify(other);

const methodOf = (name) => options.methods.find((method) => method.name === name);

const schemaOf = (field) => (field.anyOf ?? [field])[0]; // without null
const strongestAllowed = () => Object.values(schemaOf(options.fields.steering).properties).map((weight) => weight.maximum);
const defaultParticles = (method) => String(methodOf(method)?.particles ?? options.defaults.particles);

function showMethod() {
  methodShown = $("method").value;
  const method = methodOf(methodShown);
  $("method-hint").textContent = method?.summary ?? "";
  $("particles-field").hidden = !method?.several;
  const strongest = Math.max(...Object.values(defaultWeights(methodShown)).map(Math.abs), 0);
  const reach = Math.min(REACHES.find((each) => each >= 2 * strongest) ?? Infinity, ...strongestAllowed());
  for (const weightControl of weightControls()) {
    Object.assign(rangeOf(weightControl), { min: -reach, max: reach, step: reach / 100 });
    followNumber(weightControl);
  }
}

// What nobody has changed follows the method.
function methodChosen() {
  const { weights, particles } = readSettings();
  const sameWeights = sameSettings(weights, defaultWeights(methodShown));
  const sameParticles = particles === defaultParticles(methodShown);
  showMethod();
  if (sameWeights) resetWeights();
  if (sameParticles) $("particles").value = defaultParticles(methodShown);
  settingsChanged();
}

function resetWeights() {
  const weights = defaultWeights($("method").value);
  for (const weightControl of weightControls()) turn(weightControl, weights[weightControl.dataset.reward]);
  settingsChanged();
}

function turn(weightControl, text) {
  numberOf(weightControl).value = text;
  followNumber(weightControl);
}

function followNumber(weightControl) {
  const range = rangeOf(weightControl);
  range.value = numberOf(weightControl).value;
  showTurn(weightControl);
}

function showTurn(weightControl) {
  const range = rangeOf(weightControl);
  const share = (range.valueAsNumber - range.min) / (range.max - range.min);
  range.style.setProperty("--low", Math.min(share, 0.5));
  range.style.setProperty("--high", Math.max(share, 0.5));
  range.setAttribute("aria-valuetext", `${numberOf(weightControl).value} standard deviations`);
}

function settingsChanged() {
  const settings = readSettings();
  $("permalink").value = linkTo(settings);
  $("curl").value = curlOf(settings);
  showWhatWasDrawn(settings);
}

function showWhatWasDrawn(settings) {
  const drawn = shown && Object.values(shown.arms).some((record) => record.image);
  $("drawn").textContent = drawn ? `“${shown.settings.prompt}”, seed ${shown.settings.seed}.` : "";
  if (drawn && !sameSettings(shown.settings, settings)) {
    $("drawn").append(" The settings have changed since: generate again to see what they do.");
  }
}

// ---- What is sent. JSON is put together by hand, because a seed has up to 19 digits and a number here only 15.

function jsonNumber(text) {
  const number = text.trim();
  if (number === "") return "null";
  if (/^-?\d+$/.test(number)) return number.replace(/^(-?)0+(?=\d)/, "$1");
  if (/^-?\d*\.?\d+(e[+-]?\d+)?$/i.test(number)) return String(Number(number));
  return JSON.stringify(text);
}

function jsonObject(fields) {
  return `{${Object.entries(fields).map(([name, json]) => `${JSON.stringify(name)}: ${json}`).join(", ")}}`;
}

function requestOf(settings, arm) {
  const fields = {
    prompt: JSON.stringify(settings.prompt),
    seed: jsonNumber(settings.seed),
    num_steps: jsonNumber(settings.num_steps),
    guidance_scale: jsonNumber(settings.guidance_scale),
    policy: JSON.stringify(arm === "base" ? "base" : "trained"),
    method: JSON.stringify(arm === "steered" ? settings.method : "none"),
  };
  if (arm === "steered") {
    const weights = Object.entries(settings.weights).map(([name, text]) => [name, jsonNumber(text)]);
    fields.steering = jsonObject(Object.fromEntries(weights));
    if (methodOf(settings.method)?.several) fields.particles = jsonNumber(settings.particles);
  }
  return jsonObject(fields);
}

const addressOf = (path) => new URL(path, document.baseURI).href;

function curlOf(settings) {
  const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const read = 'import base64, json, sys; answer = json.load(sys.stdin); "error" in answer and sys.exit(answer["error"]); ';
  const write = 'open("image.png", "wb").write(base64.b64decode(answer["predictions"][0]["images"][0]))';
  return [
    `curl -sS ${quoted(addressOf(`v1/models/${encodeURIComponent(options.name)}:predict`))}`,
    "-H 'Content-Type: application/json'",
    `-d ${quoted(`{"instances": [${requestOf(settings, "steered")}]}`)}`,
    `| python3 -c ${quoted(read + write)}`,
  ].join(" \\\n  ");
}

// In the fragment, which a browser keeps to itself: a prompt does not end up in the logs of what lies between.
function linkTo(settings) {
  const parts = new URLSearchParams(FIELDS.map((name) => [name, settings[name]]));
  for (const [name, text] of Object.entries(settings.weights)) parts.set(`steering.${name}`, text);
  parts.set("version", options.version);
  return `${addressOf("")}#${parts}`;
}

// Takes the settings of the address, where it has any, and tells what of them this server has not.
function followLink() {
  const parts = new URLSearchParams(location.hash.slice(1));
  const linked = parts.has("prompt");
  const settings = defaultSettings();
  const missing = [];
  settings.particles = defaultParticles(parts.get("method") ?? settings.method);
  for (const name of FIELDS) settings[name] = parts.get(name) ?? settings[name];
  if (!methodOf(settings.method)) {
    missing.push(`the method ${settings.method}`);
    settings.method = options.defaults.method;
  }
  warn("");
  const turned = [...parts].filter(([name]) => name.startsWith("steering."));
  settings.weights = defaultWeights(settings.method);
  // As in a request: a reward that is not named where others are is left alone.
  if (turned.length) for (const reward of Object.keys(settings.weights)) settings.weights[reward] = "0";
  for (const [name, text] of turned) {
    const reward = name.slice("steering.".length);
    if (Object.hasOwn(settings.weights, reward)) settings.weights[reward] = text;
    else missing.push(`a weight for ${reward}`);
  }
  writeSettings(settings);
  const version = parts.get("version") ?? options.version;
  if (missing.length) warn(`The link has settings that this model does not have: ${missing.join(", ")}.`);
  else if (version !== options.version) {
    warn(`The link was made with version ${version}; this is version ${options.version}. The images may differ.`);
  }
  return linked;
}

// ---- Messages

const say = (text) => { $("status").textContent = text; };

function warn(text) {
  $("alert").textContent = text;
  $("alert").hidden = !text;
}

class Refusal extends Error {
  constructor(message, problems = []) {
    super(message);
    this.problems = problems;
  }
}

// The control that a problem's field belongs to, and the line beside it that tells the problem.
function placeOf(field) {
  const name = field.replace(/^instances\.\d+\./, "");
  if (FIELDS.includes(name)) return { control: $(name), line: $(`${name}-problem`) };
  const weightControl = weightControls().find((each) => name === `steering.${each.dataset.reward}`);
  if (weightControl) return { control: numberOf(weightControl), line: weightControl.querySelector(".problem") };
  if (name === "steering") return { control: weightControls().length ? numberOf(weightControls()[0]) : $("method"), line: $("steering-problem") };
  return null;
}

function tellProblem({ field, value, problem, remedy }) {
  const found = value === null || value === undefined ? "" : ` = ${JSON.stringify(value)}`;
  const text = `${field.replace(/^instances\.\d+\./, "")}${found}: ${problem}. ${remedy}`;
  const place = placeOf(field);
  if (!place) {
    if (!$("alert").textContent.includes(text)) warn(`${$("alert").textContent} ${text}`.trim());
    return;
  }
  place.line.textContent = text;
  place.line.hidden = false;
  place.control.setAttribute("aria-invalid", "true");
}

function tellRefusal(error) {
  const first = !document.querySelector("[aria-invalid=true]");
  if (error instanceof Refusal && error.problems.length) error.problems.forEach(tellProblem);
  else warn(error instanceof Refusal ? error.message : `The connection to the server was lost (${error.message}). Generate again.`);
  // Once a draw: three images refused for one reason shall not take the focus three times.
  const wrong = first ? document.querySelector("[aria-invalid=true]") : null;
  wrong?.focus();
  wrong?.scrollIntoView({ block: "nearest" }); // one that has the focus already may be out of sight
}

function forgetProblem(line) {
  Object.assign(line, { textContent: "", hidden: true });
  for (const control of document.querySelectorAll(`[aria-describedby~="${line.id}"]`)) control.removeAttribute("aria-invalid");
}

const forgetProblems = () => document.querySelectorAll(".problem").forEach(forgetProblem);

function forgetProblemsOf(control) {
  const lines = (control.getAttribute("aria-describedby") ?? "").split(" ").map($);
  lines.filter((line) => line?.matches(".problem")).forEach(forgetProblem);
}

// ---- The server

async function refusalOf(answer) {
  const text = await answer.text();
  try {
    const { error, problems } = JSON.parse(text);
    return new Refusal(error ?? text, problems ?? []);
  } catch {
    return new Refusal(`The server answered ${answer.status} ${answer.statusText}`.trim() + ".");
  }
}

async function reach(address, request = {}) {
  const token = sessionStorage.getItem("token");
  const headers = token ? { ...request.headers, Authorization: `Bearer ${token}` } : request.headers;
  let answer;
  try {
    answer = await fetch(address, { ...request, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("The server cannot be reached. Check that it runs, then try again.");
  }
  if (answer.status !== 401) return answer;
  const given = prompt("This server needs a token:")?.trim();
  if (!given) return answer;
  sessionStorage.setItem("token", given); // for this tab
  return reach(address, request);
}

// Yields {name, data} of a stream of server-sent events. EventSource would do, if it could POST.
async function* eventsOf(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split(/\r\n\r\n|\n\n/);
      rest = blocks.pop();
      for (const block of blocks) {
        const event = eventOf(block);
        if (event) yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // the stream may have failed already, which has been shown then
  }
}

function eventOf(block) {
  const lines = block.split(/\r?\n/);
  const valuesOf = (name) => lines.filter((line) => line.startsWith(`${name}:`)).map((line) => line.slice(name.length + 1).trim());
  const data = valuesOf("data").join("\n");
  return data ? { name: valuesOf("event")[0] ?? "message", data: JSON.parse(data) } : null;
}

function pause(seconds, signal) {
  signal.throwIfAborted();
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, 1000 * seconds);
    signal.addEventListener("abort", () => { clearTimeout(timer); reject(signal.reason); }, { once: true });
  });
}

// The stream of an arm's image, asked for again when a busy server says so.
async function streamOf(draw, arm, signal) {
  const headers = { "Content-Type": "application/json", Accept: "text/event-stream" };
  const request = { method: "POST", headers, body: requestOf(draw.settings, arm), signal };
  for (let tries = 1; ; tries += 1) {
    const answer = await reach("v1/images/stream", request);
    if (answer.ok) return answer;
    const refusal = await refusalOf(answer);
    const asked = Number(answer.headers.get("Retry-After"));
    if (![429, 503].includes(answer.status) || !(asked > 0) || tries === MAX_TRIES) throw refusal;
    say("The server is busy. The page tries again soon.");
    for (let left = Math.min(Math.ceil(asked), MAX_WAIT_SECONDS); left > 0; left -= 1) {
      note(draw, arm, `The server is busy. Trying again in ${left} s.`);
      await pause(1, signal);
    }
  }
}

// ---- Drawing. A draw is a plain record, because the history stores it.

function newDraw(settings) {
  const arms = offered().map((arm) => [arm, { note: "Asking", step: 0, steps: 0, drawing: false, values: {}, image: null }]);
  return { settings, arms: Object.fromEntries(arms) };
}

function note(draw, arm, text, drawing = false) {
  Object.assign(draw.arms[arm], { note: text, drawing });
  if (draw === shown) showArm(arm);
}

const ON_EVENT = {
  queued(draw, arm, { ahead }) {
    note(draw, arm, ahead > 0 ? `Waiting, ${ahead} ahead` : "Starting");
  },
  step(draw, arm, { step, num_steps: steps, values }) {
    const record = draw.arms[arm];
    Object.assign(record, { step: step + 1, steps });
    for (const [reward, numbers] of Object.entries(values)) (record.values[reward] ??= [])[step] = numbers[0];
    note(draw, arm, `Step ${step + 1} of ${steps}`, true);
  },
  image(draw, arm, { images, nfe, values }) {
    // Those of the image that was chosen; the steps showed the best particle of their moment.
    const own = Object.entries(values).map(([reward, each]) => [reward, each[0]]);
    Object.assign(draw.arms[arm], { image: `data:image/png;base64,${images[0]}`, nfe, values: Object.fromEntries(own) });
    note(draw, arm, "");
    if (draw === shown) showWhatWasDrawn(readSettings());
  },
  error(draw, arm, { error, problems }) {
    throw new Refusal(error, problems ?? []);
  },
};

async function drawArm(draw, arm, signal) {
  const record = draw.arms[arm];
  const began = performance.now();
  try {
    for await (const event of eventsOf(await streamOf(draw, arm, signal))) {
      record.seconds = (performance.now() - began) / 1000;
      ON_EVENT[event.name]?.(draw, arm, event.data);
      if (draw === shown) showCurveSoon();
    }
    if (!record.image) throw new Refusal("The connection ended before the image was complete. Generate again.");
  } catch (error) {
    if (!signal.aborted) tellRefusal(error);
    note(draw, arm, signal.aborted ? "Stopped" : "Not generated");
  }
}

async function drawAll() {
  warn("");
  stop();
  forgetProblems();
  if (typed($("seed")).trim() === "") newSeed(); // one for all three; each on its own would have the server's
  const draw = newDraw(readSettings());
  const controller = new AbortController();
  running = controller;
  show(draw);
  history.replaceState(null, "", linkTo(draw.settings));
  showRunning(true);
  say("Generating.");
  const began = performance.now();
  await Promise.all(Object.keys(draw.arms).map((arm) => drawArm(draw, arm, controller.signal)));
  if (controller.signal.aborted) return;
  running = null;
  showRunning(false);
  finish(draw, (performance.now() - began) / 1000);
}

function finish(draw, seconds) {
  const arms = Object.values(draw.arms);
  const drawn = arms.filter((record) => record.image).length;
  if (drawn === arms.length) say(`${drawn} images generated in ${seconds.toFixed(1)} s.`);
  else say(`${drawn || "None"} of ${arms.length} images generated. Problems are marked with ⚠.`);
  if (!drawn) return;
  earlier = newest([draw, ...earlier].slice(0, MAX_HISTORY), MAX_KEPT_CHARACTERS);
  store();
  showHistory();
}

function stop() {
  if (!running) return;
  running.abort();
  running = null;
  showRunning(false);
  say("Stopped.");
}

function showRunning(active) {
  if (!active && document.activeElement === $("stop")) $("draw").focus();
  $("stop").hidden = !active;
}

// ---- Images

function show(draw) {
  shown = draw;
  ARMS.forEach(showArm);
  showCurve();
  showHistory();
  settingsChanged();
}

function showArm(arm) {
  const figure = document.querySelector(`figure[data-arm=${arm}]`);
  const record = shown?.arms[arm];
  figure.querySelector(".state").textContent = record ? record.note : "Not generated yet";
  Object.assign(figure.querySelector("progress"), { hidden: !record?.drawing, max: record?.steps || 1, value: record?.step ?? 0 });
  showImage(figure, arm, record?.image ?? null);
  figure.querySelector(".facts").replaceChildren(...(record?.image ? factsOf(record) : []));
}

function showImage(figure, arm, source) {
  const present = figure.querySelector("img");
  if (present?.src === source) return;
  present?.remove();
  if (source) figure.querySelector(".frame").append(element("img", { src: source, alt: `${arm}: ${shown.settings.prompt}` }));
}

function factsOf(record) {
  const evaluations = element("abbr", { title: "network evaluations", textContent: "NFE" });
  const value = lastOf(record.values[rewardShown()]);
  const facts = [element("span", {}, evaluations, ` ${record.nfe}`)];
  if (value !== null) facts.push(element("span", {}, `value ${formatted(value)}`));
  return [...facts, element("span", {}, `${record.seconds.toFixed(1)} s`)];
}

// ---- The critic's values

const rewardShown = () => $("reward").value;

let curveIsDue = false;

function showCurveSoon() {
  if (curveIsDue) return;
  curveIsDue = true;
  requestAnimationFrame(() => { curveIsDue = false; showCurve(); });
}

function svg(name, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// Arm -> its values so far of the reward that is shown.
function linesShown() {
  const arms = shown ? Object.entries(shown.arms) : [];
  return new Map(arms.map(([arm, record]) => [arm, record.values[rewardShown()] ?? []]).filter(([, line]) => line.length));
}

function showCurve() {
  const reward = options.rewards.find((each) => each.name === rewardShown());
  if (!reward) return;
  const lines = linesShown();
  const steps = Math.max(...Object.values(shown?.arms ?? {}).map((record) => record.steps), 0) || options.defaults.num_steps;
  const width = Math.max(240, $("curve").clientWidth);
  const box = { left: 44, right: width - 104, top: 10, bottom: 180 };
  const scale = scaleOf(box, rangeOfValues(reward, lines), steps);
  const chart = svg("svg", { width, height: 220, role: "img", "aria-label": curveInWords(reward, lines, steps) });
  // The base's dots last: where it is as good as the trained model, they show on its dashes.
  chart.append(...gridOf(box, scale, steps), ...curvesOf(lines, scale).reverse());
  if (!lines.size) chart.append(svg("text", { x: (box.left + box.right) / 2, y: 95, "text-anchor": "middle" }, "The values appear while the images are drawn"));
  $("curve").replaceChildren(chart);
  $("value-axis").textContent = `↑ ${reward.name}: ${reward.unit}`;
  showTable(lines);
}

// At least what the reward is like in general, so that the scale stands still while lines grow.
function rangeOfValues(reward, lines) {
  const values = [...lines.values()].flat().filter(Number.isFinite);
  const usual = Number.isFinite(reward.mean) && reward.std > 0 ? [reward.mean - reward.std, reward.mean + reward.std] : [];
  const all = [...values, ...usual];
  const [low, high] = all.length ? [Math.min(...all), Math.max(...all)] : [0, 1];
  return high > low ? [low, high] : [low - 1, high + 1];
}

function scaleOf(box, [low, high], steps) {
  return {
    low,
    high,
    x: (step) => box.left + (step / (steps - 1)) * (box.right - box.left),
    y: (value) => box.bottom - ((value - low) / (high - low)) * (box.bottom - box.top),
  };
}

// Round numbers, about `count` of them.
function ticksOf(low, high, count) {
  const rough = (high - low) / count;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const every = unit * [1, 2, 5, 10].find((factor) => factor * unit >= rough);
  const ticks = [];
  for (let index = Math.ceil(low / every); index * every <= high; index += 1) ticks.push(index * every);
  return ticks;
}

function gridOf(box, scale, steps) {
  const parts = [];
  for (const value of ticksOf(scale.low, scale.high, 5)) {
    const y = scale.y(value);
    parts.push(svg("line", { class: "grid", x1: box.left, x2: box.right, y1: y, y2: y }));
    parts.push(svg("text", { x: box.left - 8, y: y + 4, "text-anchor": "end" }, formatted(value)));
  }
  const every = Math.max(1, Math.ceil(steps / 10));
  for (let step = 0; step < steps; step += every) {
    parts.push(svg("text", { x: scale.x(step), y: box.bottom + 18, "text-anchor": "middle" }, String(step + 1)));
  }
  const middle = (box.left + box.right) / 2;
  return [...parts, svg("text", { x: middle, y: box.bottom + 36, "text-anchor": "middle" }, "denoising step →")];
}

function curvesOf(lines, scale) {
  const ends = [];
  const curves = [...lines].map(([arm, line]) => {
    const points = line.map((value, step) => [scale.x(step), scale.y(value)]).filter(([, y]) => Number.isFinite(y));
    const curve = svg("g", { "data-arm": arm }, svg("polyline", { class: "arm", points: points.join(" ") }));
    if (!points.length) return curve;
    const [x, y] = lastOf(points);
    const label = svg("text", { class: "end", x: x + 10 }, `${arm} ${formatted(lastOf(line))}`);
    ends.push({ x, y, label });
    curve.append(svg("circle", { cx: x, cy: y, r: 4 }), label);
    return curve;
  });
  spread(ends);
  return curves;
}

// Labels of lines that end together stand below one another.
function spread(ends) {
  ends.sort((one, other) => one.y - other.y);
  ends.forEach((end, index) => {
    const above = ends.slice(0, index).filter((other) => Math.abs(other.x - end.x) < 90);
    end.y = Math.max(end.y, ...above.map((other) => other.y + 14));
    end.label.setAttribute("y", end.y + 4);
  });
}

function curveInWords(reward, lines, steps) {
  const parts = [...lines].map(([arm, line]) => `${arm} from ${formatted(line[0])} to ${formatted(lastOf(line))}`);
  return `The critic's value of ${reward.name} over ${steps} denoising steps: ${parts.join(", ") || "nothing drawn yet"}.`;
}

function showTable(lines) {
  const arms = [...lines.keys()];
  const length = Math.max(0, ...[...lines.values()].map((line) => line.length));
  const head = ["Step", ...arms].map((text) => element("th", { scope: "col", textContent: text }));
  const rows = Array.from({ length }, (_, step) => {
    const cells = arms.map((arm) => element("td", { textContent: step in lines.get(arm) ? formatted(lines.get(arm)[step]) : "" }));
    return element("tr", {}, element("th", { scope: "row", textContent: step + 1 }), ...cells);
  });
  $("value-table").tHead.replaceChildren(element("tr", {}, ...head));
  $("value-table").tBodies[0].replaceChildren(...rows);
}

// ---- Earlier draws

// As many of the newest draws as have no more characters of images than that.
function newest(draws, characters) {
  const kept = [];
  let left = characters;
  for (const draw of draws) {
    for (const record of Object.values(draw.arms)) left -= record.image?.length ?? 0;
    if (left < 0) break;
    kept.push(draw);
  }
  return kept;
}

// The page does without where a browser stores nothing.
function store() {
  try {
    sessionStorage.setItem(STORED_HISTORY, JSON.stringify(newest(earlier, MAX_STORED_CHARACTERS)));
  } catch {
    say("This browser does not keep earlier draws when the page is reloaded.");
  }
}

function stored() {
  try {
    return JSON.parse(sessionStorage.getItem(STORED_HISTORY)) ?? [];
  } catch {
    return [];
  }
}

function showHistory() {
  const items = earlier.map((draw) => {
    const { prompt, seed } = draw.settings;
    const source = ["steered", "trained", "base"].map((arm) => draw.arms[arm]?.image).find(Boolean);
    const words = `${prompt}, seed ${seed}, ${weightsInWords(draw.settings.weights)}`;
    const button = element("button", { type: "button", title: words }, element("img", { src: source, alt: words }));
    if (draw === shown) button.setAttribute("aria-current", "true");
    button.addEventListener("click", () => restore(draw));
    return element("li", {}, button);
  });
  $("history-list").replaceChildren(...items);
  $("no-history").hidden = items.length > 0;
  $("forget").hidden = !items.length;
}

function weightsInWords(weights) {
  return Object.entries(weights).map(([name, text]) => `${name} ${text}`).join(", ");
}

function restore(draw) {
  stop();
  forgetProblems();
  warn("");
  writeSettings(draw.settings);
  const position = earlier.indexOf(draw);
  show(draw);
  $("history-list").children[position].firstChild.focus();
  history.replaceState(null, "", linkTo(draw.settings));
  say("An earlier draw is shown, with its settings.");
}

function forget() {
  earlier = [];
  store();
  showHistory();
  $("prompt").focus();
}

// ---- The start

function makeWeightControl(reward) {
  const weightControl = $("steering-weight").content.firstElementChild.cloneNode(true);
  const id = `steering-weight-${options.rewards.indexOf(reward)}`;
  weightControl.dataset.reward = reward.name;
  const [label, hint, problem] = ["label", ".hint", ".problem"].map((selector) => weightControl.querySelector(selector));
  Object.assign(label, { htmlFor: id, textContent: reward.name });
  Object.assign(hint, { id: `${id}-hint`, textContent: `${reward.unit}; 1\u00a0σ\u00a0is\u00a0${formatted(reward.std)}` });
  problem.id = `${id}-problem`;
  const number = numberOf(weightControl);
  number.id = id;
  rangeOf(weightControl).setAttribute("aria-label", `Weight of ${reward.name}`);
  for (const input of [number, rangeOf(weightControl)]) {
    input.setAttribute("aria-describedby", `${hint.id} ${problem.id} steering-problem`);
  }
  number.addEventListener("input", () => followNumber(weightControl));
  rangeOf(weightControl).addEventListener("input", () => turn(weightControl, rangeOf(weightControl).value));
  return weightControl;
}

function makeExample(prompt) {
  const button = element("button", { type: "button", textContent: prompt });
  button.addEventListener("click", () => {
    $("prompt").value = prompt;
    drawAll();
  });
  return button;
}

function furnish() {
  const { name, version, run, notice, size, fields, methods, rewards, examples } = options;
  const option = (text) => element("option", { value: text, textContent: text });
  document.title = name;
  $("model").textContent = [version, run && `from ${run}`].filter(Boolean).join(", ");
  $("notice").textContent = notice ?? "";
  $("notice").hidden = !notice;
  document.body.classList.toggle("small", Math.max(...size) <= 128);
  for (const frame of document.querySelectorAll(".frame")) frame.style.aspectRatio = `${size[1]} / ${size[0]}`;
  $("how-many").textContent = offered().length === 3 ? "three" : "two";
  document.querySelector("figure[data-arm=base]").hidden = !offered().includes("base");
  $("steering-weight-list").replaceChildren(...rewards.map(makeWeightControl));
  $("method").replaceChildren(...methods.filter((method) => method.name !== "none").map((method) => option(method.name)));
  $("reward").replaceChildren(...rewards.map((reward) => option(reward.name)));
  $("reward-choice").hidden = rewards.length < 2;
  for (const [field, words] of Object.entries(LIMITED)) {
    const { type, minimum, maximum } = schemaOf(fields[field]);
    Object.assign($(field), { min: minimum, max: maximum, step: type === "integer" ? 1 : "any" });
    $(`${field}-hint`).textContent = `${words} ${maximum}.`;
  }
  $("examples").replaceChildren(...examples.map(makeExample));
  $("examples").hidden = !examples.length;
  for (const id of ["draw", "draw-weights", "reset"]) $(id).disabled = false;
}

async function copy(field, button) {
  const words = button.textContent;
  try {
    await navigator.clipboard.writeText(field.value);
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = words; }, 2000);
    say("Copied.");
  } catch { // only a secure origin has a clipboard
    field.focus();
    field.select();
    say("The text is selected. Copy it with the keyboard.");
  }
}

function newSeed() {
  $("seed").value = String(crypto.getRandomValues(new Uint32Array(1))[0]);
  settingsChanged();
}

function listen() {
  $("method").addEventListener("change", methodChosen);
  $("ask").addEventListener("submit", (event) => { event.preventDefault(); drawAll(); });
  $("stop").addEventListener("click", stop);
  $("reset").addEventListener("click", resetWeights);
  $("new-seed").addEventListener("click", newSeed);
  $("forget").addEventListener("click", forget);
  $("reward").addEventListener("change", () => { ARMS.forEach(showArm); showCurve(); });
  for (const name of ["permalink", "curl"]) $(`copy-${name}`).addEventListener("click", () => copy($(name), $(`copy-${name}`)));
  document.addEventListener("input", ({ target }) => {
    forgetProblemsOf(target);
    settingsChanged();
  });
  document.addEventListener("keydown", ({ key }) => { if (key === "Escape") stop(); });
  window.addEventListener("hashchange", () => { if (followLink()) say(LINKED); });
  new ResizeObserver(showCurveSoon).observe($("curve"));
}

async function begin() {
  $("reload").hidden = true;
  warn("");
  try {
    const answer = await reach("v1/images/options", {});
    if (!answer.ok) throw await refusalOf(answer);
    options = await answer.json();
  } catch (error) {
    say("");
    warn(error.message);
    $("reload").hidden = false;
    return;
  }
  furnish();
  earlier = stored();
  const linked = followLink();
  listen();
  show(null);
  say(linked ? LINKED : "Ready: press Generate, or Enter in any field.");
}

$("reload").addEventListener("click", begin);
begin();

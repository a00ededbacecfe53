// Draws strokes or shows a picture, sends it to /v1/classify, and shows what came back.
//
// One request is on its way at a time; what changes meanwhile is sent when it is back.

const PEN_WIDTH = 24; // of 280: about two pixels of the 28 that the network sees
const PEN_STEP = 10; // of one press of an arrow key
const MIN_INTERVAL_MS = 100;
const RETRY_MS = 2000;
const TIMEOUT_MS = 10000;
const UNSURE = 0.37; // a digit_score below it: see docs/images.md
const LARGE_BYTES = 2 ** 20; // a larger file is sent with at most so many pixels a side
const LARGE_SIDE = 1024;

const element = (id) => document.getElementById(id);
const main = document.querySelector("main");
const drawing = element("drawing");
const context = drawing.getContext("2d");
const FORMATS = element("file").accept.split(","); // the server's
const SIZE = drawing.width;

// What is on the paper: strokes, each a list of points, or else a picture that somebody brought.
let strokes = [];
let picture = null; // {name, body, bitmap}: the bitmap is null where this browser can not read it
let reading = null; // the file that is about to be the picture
let changed = false;
let asking = false;
let timer = 0;

// --- the paper ---------------------------------------------------------------------------------

function redraw() {
  context.fillStyle = "#000";
  context.fillRect(0, 0, SIZE, SIZE);
  if (picture?.bitmap) {
    const { width, height } = picture.bitmap;
    const scale = Math.min(SIZE / width, SIZE / height);
    const [w, h] = [width * scale, height * scale];
    context.drawImage(picture.bitmap, (SIZE - w) / 2, (SIZE - h) / 2, w, h);
  }
  context.strokeStyle = "#fff";
  context.lineWidth = PEN_WIDTH;
  context.lineCap = context.lineJoin = "round";
  for (const points of strokes) {
    context.beginPath();
    const [x, y] = points[0];
    context.moveTo(x, y);
    context.lineTo(x + 0.1, y); // a line to where it began would leave no dot
    for (const point of points) context.lineTo(...point);
    context.stroke();
  }
}

function isBlank() {
  return !picture && strokes.length === 0;
}

function update() {
  redraw();
  if (isBlank()) return showNothing();
  changed = true;
  askSoon(0);
}

function clear() {
  strokes = [];
  picture = reading = null;
  liftPen();
  update();
}

function undo() {
  if (strokes.pop() === undefined) picture = null;
  liftPen();
  update();
}

function begin(point) {
  picture = reading = null;
  strokes.push([point]);
  update();
}

function extend(point) {
  strokes[strokes.length - 1].push(point);
  update();
}

// --- mouse, pen, finger ------------------------------------------------------------------------

function position(event) {
  const box = drawing.getBoundingClientRect();
  const x = ((event.clientX - box.left) / box.width) * SIZE;
  const y = ((event.clientY - box.top) / box.height) * SIZE;
  return [x, y];
}

let pointer = null; // the one that draws; a second finger is not another pen

drawing.addEventListener("pointerdown", (event) => {
  if (pointer !== null || event.button !== 0) return;
  pointer = event.pointerId;
  drawing.setPointerCapture(pointer);
  liftPen();
  begin(position(event));
});

drawing.addEventListener("pointermove", (event) => {
  if (event.pointerId !== pointer) return;
  const between = event.getCoalescedEvents?.() ?? [];
  for (const part of between.length ? between : [event]) extend(position(part));
});

for (const end of ["pointerup", "pointercancel"]) {
  drawing.addEventListener(end, (event) => {
    if (event.pointerId === pointer) pointer = null;
  });
}

// --- keyboard ----------------------------------------------------------------------------------

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const held = new Set();
let penAt = [SIZE / 2, SIZE / 4];
let penDown = false;

function showPen() {
  const pen = element("pen");
  pen.hidden = !drawing.matches(":focus-visible");
  pen.classList.toggle("down", penDown);
  pen.style.left = `${(penAt[0] / SIZE) * 100}%`;
  pen.style.top = `${(penAt[1] / SIZE) * 100}%`;
}

function liftPen() {
  penDown = false;
  showPen();
}

function movePen() {
  const inside = (value) => Math.max(0, Math.min(SIZE, value));
  for (const key of held) {
    penAt = penAt.map((value, axis) => inside(value + ARROWS[key][axis] * PEN_STEP));
  }
  if (penDown) extend([...penAt]);
}

function press(key) {
  if (key in ARROWS) {
    held.add(key);
    movePen();
  } else if (key === " ") {
    penDown = !penDown;
    if (penDown) begin([...penAt]);
  } else if (key === "Delete" || key === "Backspace") {
    clear();
  } else if (key === "z" || key === "Z") {
    undo();
  } else {
    return false;
  }
  showPen();
  return true;
}

drawing.addEventListener("keydown", (event) => {
  if (event.altKey || event.metaKey) return;
  if (press(event.key)) event.preventDefault();
});
drawing.addEventListener("keyup", (event) => held.delete(event.key));
drawing.addEventListener("focus", showPen);
drawing.addEventListener("blur", () => {
  held.clear();
  liftPen();
});
element("clear").addEventListener("click", clear);
element("undo").addEventListener("click", undo);

// --- pictures: chosen, dropped, pasted ---------------------------------------------------------

// What is no picture to this browser is sent as well: the server says what is wrong with it.
async function show(file) {
  if (!file) return;
  clear();
  reading = file;
  showNoAnswer("reading the picture");
  const bitmap = await createImageBitmap(file).catch(() => null);
  const large = bitmap && file.size > LARGE_BYTES && FORMATS.includes(file.type);
  const body = large ? await shrunk(bitmap).catch(() => file) : file;
  if (reading !== file) { // something else was begun meanwhile
    bitmap?.close();
    return;
  }
  picture = { name: file.name || "that", body, bitmap };
  update();
}

function shrunk(bitmap) {
  const scale = Math.min(1, LARGE_SIDE / Math.max(bitmap.width, bitmap.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, bitmap.width * scale);
  canvas.height = Math.max(1, bitmap.height * scale);
  const paper = canvas.getContext("2d");
  paper.imageSmoothingQuality = "high";
  paper.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return asPng(canvas);
}

function asPng(canvas) {
  return new Promise((done, failed) => {
    canvas.toBlob((blob) => (blob ? done(blob) : failed(new Error("no PNG was made"))), "image/png");
  });
}

element("file").addEventListener("change", (event) => {
  show(event.target.files[0]);
  event.target.value = ""; // the same file may be chosen again
});

document.addEventListener("paste", (event) => {
  show([...event.clipboardData.files][0]);
});

for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    element("paper").classList.toggle("drop", kind === "dragover");
  });
}
document.addEventListener("drop", (event) => show(event.dataTransfer.files[0]));

// --- asking the server -------------------------------------------------------------------------

function askSoon(delay) {
  if (asking || timer) return;
  timer = setTimeout(ask, delay);
}

async function ask() {
  timer = 0;
  asking = true;
  changed = false;
  let wait = MIN_INTERVAL_MS;
  try {
    const asked = picture;
    const body = asked?.body ?? (await asPng(drawing));
    // The server looks at the content; of a type other than an image's it would look at nothing.
    const type = body.type.startsWith("image/") ? body.type : "image/unknown";
    const began = performance.now();
    const response = await fetch("v1/classify", {
      method: "POST",
      headers: { "Content-Type": type },
      body,
      signal: AbortSignal.timeout(TIMEOUT_MS),
    });
    const answer = await response.json();
    const took = performance.now() - began;
    if (isBlank() || asked !== picture) return; // cleared, or another one, meanwhile
    if (response.ok) {
      showAnswer(answer, took);
    } else {
      wait = showRefusal(response.status, answer.error);
    }
  } catch {
    showNoAnswer("no answer yet");
    showProblem("The server does not answer; trying again.");
    wait = RETRY_MS;
    changed = !isBlank();
  } finally {
    asking = false;
    if (changed) askSoon(wait);
  }
}

// What the server said no with; returns when to ask again.
function showRefusal(status, error) {
  const passes = status === 429 || status === 503 || status === 504;
  if (passes) changed = true;
  if (status === 429) return error.retry_after_s * 1000;
  showNoAnswer(passes ? "no answer yet" : "no answer");
  const name = picture?.name ?? "the drawing";
  const named = error.message.replace(/^(encoded\.files\[0\]|body)/, () => name);
  showProblem(passes ? `The server can not answer now: ${error.message}.` : named);
  return passes ? RETRY_MS : MIN_INTERVAL_MS;
}

// --- what is shown -----------------------------------------------------------------------------

const rows = Array.from({ length: 10 }, (_, digit) => {
  const row = document.createElement("li");
  const [label, track, percent] = ["span", "div", "span"].map((name) => document.createElement(name));
  const bar = document.createElement("div");
  label.textContent = digit;
  track.className = "track";
  bar.className = "bar";
  percent.className = "percent";
  track.append(bar);
  row.append(label, track, percent);
  element("bars").append(row);
  return { row, label, bar, percent };
});

function percentage(value) {
  return `${(value * 100).toFixed(1)} %`;
}

function microseconds(value) {
  return value < 1000 ? `${value} µs` : `${(value / 1000).toFixed(1)} ms`;
}

function showBars(probabilities, best, labels) {
  rows.forEach(({ row, label, bar, percent }, digit) => {
    if (labels) label.textContent = labels[digit];
    row.classList.toggle("best", digit === best);
    bar.style.width = `${probabilities[digit] * 100}%`;
    percent.textContent = percentage(probabilities[digit]);
  });
}

function showAnswer(answer, took) {
  const prediction = answer.predictions[0];
  const { model, timing } = answer;
  const unsure = prediction.digit_score < UNSURE;
  element("problem").hidden = true;
  const sure = percentage(prediction.confidence);
  say(answer.labels[prediction.digit], unsure ? "unsure: it may be no digit" : sure);
  main.classList.toggle("unsure", unsure);
  showBars(prediction.probabilities, prediction.digit, answer.labels);
  showSeen(prediction.pixels);
  element("score").textContent = percentage(prediction.digit_score);
  const sha256 = model.sha256.slice(0, 12);
  element("model").textContent =
    `${model.name} ${model.version}, ${model.precision}, ${sha256}, ${model.execution_provider}`;
  element("queue").textContent = microseconds(timing.queue_us);
  element("inference").textContent =
    `${microseconds(timing.inference_us)}, in a batch of ${timing.batch_images}`;
  element("round-trip").textContent = `${took.toFixed(1)} ms`;
}

// Screen readers speak what changes: not the same digit again at every stroke.
function say(label, confidence) {
  if (element("digit").textContent !== label) element("digit").textContent = label;
  element("confidence").textContent = confidence;
}

function showSeen(base64) {
  const seen = element("seen").getContext("2d");
  const image = seen.createImageData(28, 28);
  const grey = Uint8Array.from(atob(base64 ?? ""), (letter) => letter.charCodeAt(0));
  for (let i = 0; i < 784; i++) image.data.set([grey[i], grey[i], grey[i], 255], 4 * i);
  seen.putImageData(image, 0, 0);
}

function showNothing() {
  changed = false;
  showNoAnswer("nothing drawn yet");
}

function showNoAnswer(why) {
  main.classList.remove("unsure");
  say("–", why);
  showBars(Array(10).fill(0), -1);
  showSeen("");
  element("problem").hidden = true;
  for (const id of ["score", "model", "queue", "inference", "round-trip"]) element(id).textContent = "–";
}

function showProblem(text) {
  element("problem").textContent = text;
  element("problem").hidden = false;
}

redraw();
showNothing();

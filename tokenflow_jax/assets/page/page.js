// The page: pictures to codes and back, with ONNX Runtime Web; MODEL and RUNTIME come from files
// beside it, packed, because a page that is opened from disk may not fetch any.
"use strict";

const at = (id) => document.getElementById(id);
const SIDE = MODEL.image_size;
const STARTS = MODEL.scales.map((_, s) => MODEL.scales.slice(0, s).reduce((n, g) => n + g * g, 0));
const PROPOSALS = 10;
const sessions = {};
const times = {};
// The picture, its codes, the codes with changes, the chosen code's place, numbers of requests.
const state = { picture: null, codes: null, edited: null, chosen: -1, round: 0, opened: 0 };

/** Return the bytes of base64 text of a gzip file. */
async function unpack(text) {
  const packed = await (await fetch(`data:application/octet-stream;base64,${text}`)).blob();
  const stream = packed.stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

async function load() {
  const glue = new Blob([await unpack(RUNTIME.mjs)], { type: "text/javascript" });
  ort.env.wasm.numThreads = 1; // threads share memory, which needs a server's headers
  ort.env.wasm.wasmPaths = { mjs: URL.createObjectURL(glue) };
  ort.env.wasm.wasmBinary = await unpack(RUNTIME.wasm);
  for (const name of ["encode", "decode"]) {
    const options = { executionProviders: ["wasm"], logSeverityLevel: 3 };
    sessions[name] = await ort.InferenceSession.create(await unpack(MODEL[name]), options);
    MODEL[name] = "";
  }
}

let last = Promise.resolve();
/** Run a program after those under way, as the runtime does one at a time. */
function run(name, feeds, output) {
  const mine = last.then(async () => {
    const start = performance.now();
    const found = await sessions[name].run(feeds);
    times[name] = performance.now() - start;
    return found[output].data;
  });
  last = mine.catch(() => {});
  return mine;
}

/** Return the codes of RGB pixels. */
function encode(pixels) {
  const images = new ort.Tensor("uint8", pixels, [1, SIDE, SIDE, 3]);
  return run("encode", { images }, "codes");
}

/** Return pixels in [-1, 1] of codes; -1 adds nothing. */
function decode(codes) {
  return run("decode", { codes: new ort.Tensor("int32", codes, [1, codes.length]) }, "pixels");
}

const toByte = (x) => Math.min(Math.max(Math.trunc(127.5 * x + 128), 0), 255);

function paint(canvas, values) {
  canvas.width = canvas.height = SIDE;
  const image = new ImageData(SIDE, SIDE);
  for (let i = 0, j = 0; i < values.length; i += 3, j += 4) {
    image.data.set([values[i], values[i + 1], values[i + 2], 255], j);
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}

/** Leave out the codes of scales that the slider leaves out. */
function kept(codes) {
  const end = STARTS[at("scales").value] ?? codes.length;
  return codes.map((code, i) => (i < end ? code : -1));
}

async function show() {
  const mine = ++state.round;
  const plain = await decode(kept(state.codes));
  const drawn = await decode(kept(state.edited));
  if (mine !== state.round) return;
  const used = Number(at("scales").value);
  const bytes = Array.from(drawn, toByte);
  const before = Array.from(plain, toByte);
  paint(at("drawn"), bytes);
  const change = bytes.map((x, i) => Math.abs(x - before[i]));
  const places = state.edited.filter((code, i) => code !== state.codes[i]).length;
  const gain = Math.max(1, Math.floor(255 / Math.max(...change, 8)));
  paint(at("change"), change.map((x) => gain * x));
  at("change").style.visibility = places ? "visible" : "hidden";
  const error = bytes.reduce((sum, x, i) => sum + (x - state.picture[i]) ** 2, 0) / bytes.length;
  const end = STARTS[used] ?? state.codes.length;
  at("quality").innerHTML = `<b>Drawn from ${end} codes</b>, PSNR ` +
    `${(10 * Math.log10(255 ** 2 / Math.max(error, 1e-9))).toFixed(1)} dB`;
  const touched = change.filter((x) => x > 2).length / change.length;
  at("changed").innerHTML = places
    ? `<b>What ${places} changed code${places > 1 ? "s" : ""} did</b>, ${gain} times as bright: ` +
      `${(100 * touched).toFixed(0)} % of the values moved by more than 2 of 255`
    : "<b>What a changed code does</b> appears here";
  at("count").textContent = `${used} of ${MODEL.scales.length}`;
  document.querySelectorAll(".map").forEach((map, s) => map.classList.toggle("off", s >= used));
  say(`Encoded in ${times.encode.toFixed(0)} ms, decoded in ${times.decode.toFixed(0)} ms.`);
}

/** Return a color of a code: neighbors in number are far apart in hue. */
function color(code) {
  const hue = (code * 137.508) % 360;
  return `hsl(${hue.toFixed(1)} ${45 + (code % 3) * 15}% ${38 + (code % 5) * 9}%)`;
}

function showMaps() {
  const cells = document.querySelectorAll(".map button");
  state.edited.forEach((code, i) => {
    cells[i].style.background = color(code);
    cells[i].title = `code ${code}`;
    cells[i].classList.toggle("changed", code !== state.codes[i]);
    cells[i].classList.toggle("chosen", i === state.chosen);
  });
}

function makeMaps() {
  MODEL.scales.forEach((side, s) => {
    const box = document.createElement("div");
    const map = document.createElement("div");
    map.className = "map";
    map.style.gridTemplateColumns = `repeat(${side}, 1fr)`;
    for (let i = 0; i < side * side; i++) {
      const cell = document.createElement("button");
      const name = `scale ${s + 1}, row ${Math.floor(i / side) + 1}, column ${(i % side) + 1}`;
      cell.setAttribute("aria-label", name);
      cell.onclick = () => choose(STARTS[s] + i, name);
      map.append(cell);
    }
    const label = document.createElement("div");
    label.textContent = `scale ${s + 1}: ${side} x ${side}`;
    box.append(map, label);
    at("maps").append(box);
  });
}

function choose(place, name) {
  if (!state.codes) return;
  state.chosen = place;
  at("editor").hidden = false;
  at("where").textContent = `Another code at ${name}`;
  at("code").max = MODEL.codebook_size - 1;
  at("code").value = state.edited[place];
  const scale = STARTS.findLastIndex((start) => start <= place) + 1;
  if (scale > at("scales").value) at("scales").value = scale; // or nothing would be seen
  showMaps();
  propose();
  show();
}

function replace(code) {
  const whole = Number.isInteger(code) && code >= 0 && code < MODEL.codebook_size;
  if (!whole) return say(`Codes are 0 to ${MODEL.codebook_size - 1}.`, true);
  at("code").value = state.edited[state.chosen] = code;
  showMaps();
  return show();
}

/** Show pictures that have other codes in the chosen place. */
async function propose() {
  const place = state.chosen;
  const codes = [state.codes[place]];
  while (codes.length < Math.min(PROPOSALS, MODEL.codebook_size)) {
    const code = Math.floor(Math.random() * MODEL.codebook_size);
    if (!codes.includes(code)) codes.push(code);
  }
  const buttons = codes.map((code, i) => {
    const button = document.createElement("button");
    button.append(document.createElement("canvas"), i ? `${code}` : `${code} (its own)`);
    button.onclick = () => replace(code);
    return button;
  });
  at("others").replaceChildren(...buttons);
  for (const [i, code] of codes.entries()) {
    const edited = state.edited.slice();
    edited[place] = code;
    const drawn = await decode(kept(edited));
    if (!buttons[i].isConnected) return; // others were asked for
    paint(buttons[i].firstChild, Array.from(drawn, toByte));
  }
}

function say(text, wrong = false) {
  at("status").textContent = text;
  at("status").classList.toggle("wrong", wrong);
}

async function open(blob, name) {
  const mine = ++state.opened;
  try {
    say(`Reading ${name} ...`);
    const picture = fit(await readPicture(blob), SIDE);
    const codes = await encode(picture);
    if (mine !== state.opened) return; // another one was chosen meanwhile
    Object.assign(state, { picture, codes, edited: codes.slice(), chosen: -1 });
  } catch (error) {
    const known = error.message.startsWith("it has");
    const reason = known ? error.message : "it is no picture that this browser reads";
    return say(`${name} cannot be used: ${reason}.`, true);
  }
  at("editor").hidden = true;
  at("scales").value = MODEL.scales.length;
  paint(at("picture"), state.picture);
  showMaps();
  return show();
}

async function start() {
  at("scales").max = at("scales").value = MODEL.scales.length;
  makeMaps();
  const began = performance.now();
  await load();
  const seconds = ((performance.now() - began) / 1000).toFixed(1);
  const megabytes = (MODEL.page_bytes / 1e6).toFixed(1);
  at("about").textContent = `${SIDE} px, ${MODEL.codes_per_image} codes of ` +
    `${MODEL.codebook_size.toLocaleString("en-US")}, tokenizer ${MODEL.fingerprint}. ` +
    `This page has ${megabytes} MB and started in ${seconds} s.`;
  MODEL.samples.forEach(({ name, png }) => {
    const image = new Image();
    Object.assign(image, { src: `data:image/png;base64,${png}`, alt: name, title: name });
    image.onclick = async () => open(await (await fetch(image.src)).blob(), name);
    at("samples").append(image);
  });
  at("file").onchange = () => {
    const [file] = at("file").files;
    if (file) open(file, file.name);
  };
  at("scales").oninput = () => {
    if (!state.codes) return;
    show();
    if (state.chosen >= 0) propose();
  };
  at("code").onchange = () => replace(at("code").valueAsNumber);
  at("draw").onclick = propose;
  at("undo").onclick = () => {
    state.edited = state.codes.slice();
    at("code").value = state.codes[state.chosen];
    showMaps();
    propose();
    show();
  };
  document.ondragover = (event) => {
    event.preventDefault();
    document.body.classList.add("over");
  };
  document.ondragleave = () => document.body.classList.remove("over");
  document.ondrop = (event) => {
    event.preventDefault();
    document.body.classList.remove("over");
    const file = event.dataTransfer.files[0];
    if (file) open(file, file.name);
  };
  const first = at("samples").querySelector("img");
  if (first) first.click();
  else say("Choose a picture.");
}

const started = start();
started.catch((error) => say(`The page could not start: ${error.message}`, true));

// ---- frames are shown when the server's schedule says, not when the network brings them

let waiting = [], lags = [], lead = null, serial = 0, shownSerial = 0;

function receive(data) {
  const length = new DataView(data).getUint32(0), now = performance.now(), mine = ++serial;
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, length)));
  let at = 4 + length;
  const images = header.pictures.map(picture => {
    at += picture.bytes;
    return decode(picture, new Uint8Array(data, at - picture.bytes, picture.bytes));
  });
  const due = dueOf(header, now);
  turn(header.id);
  Promise.all(images).then(images => {
    if (mine < shownSerial) return;
    waiting.push({header, images, due, serial: mine});
    waiting.sort((a, b) => a.serial - b.serial);
    if (waiting.length > 8) account(waiting.shift());  // a page in the background paints nothing
  });
}

// When to show a frame: as long after the server had it due as nine of ten recent frames took to come, so that frames
// are evenly apart. That delay moves slowly, and is never half a frame longer than the shortest way.
function dueOf(header, now) {
  lags.push(now - header.at);
  if (lags.length > 60) lags.shift();
  const sorted = [...lags].sort((a, b) => a - b), shortest = sorted[0];
  const usual = Math.min(sorted[Math.floor(.9 * (sorted.length - 1))], shortest + Math.min(40, 500 / header.pace));
  lead = lead === null || Math.abs(usual - lead) > 200 ? usual : lead + .1 * (usual - lead);
  return header.paused || header.epoch !== epoch ? now : header.at + lead;
}

function showDue() {
  const now = performance.now();
  let newer = null;
  while (waiting.length && waiting[0].due <= now + 2) account(newer = waiting.shift());
  if (newer) {
    newer.header.pictures.forEach((picture, i) => draw(i ? $('screen2') : $('screen'), picture, newer.images[i]));
    shownSerial = newer.serial;
  }
}

function decode(picture, bytes) {
  if (picture.kind === 'numbers') return null;
  if (picture.kind !== 'raw') return createImageBitmap(new Blob([bytes], {type: 'image/jpeg'}));
  const image = new ImageData(picture.w, picture.h);
  for (let i = 0, j = 0; i < bytes.length; i += 3, j += 4) {
    image.data[j] = bytes[i]; image.data[j + 1] = bytes[i + 1]; image.data[j + 2] = bytes[i + 2]; image.data[j + 3] = 255;
  }
  return image;
}

function draw(canvas, picture, image) {
  if (picture.kind === 'numbers') return bars(canvas, picture.numbers);
  size(canvas, picture.w, picture.h);
  const context = canvas.getContext('2d');
  if (picture.kind === 'raw') context.putImageData(image, 0, 0);
  else { context.drawImage(image, 0, 0); image.close(); }
}

function size(canvas, w, h) {
  if (canvas.width === w && canvas.height === h && canvas.sized) return;
  canvas.width = w; canvas.height = h; canvas.sized = true;
  canvas.parentElement.style.setProperty('--ratio', w / h);
}

let reach = [];
function bars(canvas, numbers) {
  size(canvas, 480, 320);
  const c = canvas.getContext('2d'), wide = 480 / numbers.length;
  c.fillStyle = '#000'; c.fillRect(0, 0, 480, 320);
  c.fillStyle = '#39424f'; c.fillRect(0, 160, 480, 1);
  numbers.forEach((x, i) => {
    reach[i] = Math.max(reach[i] || 1, Math.abs(x));
    c.fillStyle = '#56b4e9';
    c.fillRect(i * wide + wide * .15, 160, wide * .7, -150 * x / reach[i]);
    c.fillStyle = '#e6edf3'; c.font = '13px monospace'; c.textAlign = 'center';
    if (numbers.length < 12) c.fillText(x.toFixed(2), i * wide + wide / 2, 312);
  });
}

function trace(canvas, series, colour, fromZero) {
  const ratio = window.devicePixelRatio || 1, w = Math.round(canvas.clientWidth * ratio), h = Math.round(canvas.clientHeight * ratio);
  if (!w || !h) return;
  if (canvas.width !== w || canvas.height !== h) { canvas.width = w; canvas.height = h; }
  const c = canvas.getContext('2d'), xs = series.filter(x => x !== null);
  c.clearRect(0, 0, w, h);
  if (!xs.length) return;
  let low = Math.min(...xs), high = Math.max(...xs);
  if (fromZero) { low = Math.min(low, 0); high = Math.max(high, 1); }
  if (high - low < 1e-6) { low -= .5; high += .5; }
  const left = 30 * ratio, y = x => h - 4 * ratio - (x - low) / (high - low) * (h - 8 * ratio);
  const x = i => left + i / 239 * (w - left);
  c.strokeStyle = colour; c.lineWidth = 1.5 * ratio; c.beginPath();
  c.lineJoin = 'round';
  series.forEach((v, i) => { if (v !== null) c.lineTo(x(i), y(v)); });
  c.stroke();
  c.fillStyle = '#8b96a5'; c.font = `${10 * ratio}px system-ui`;
  c.fillText(fixed(high, 1), 3 * ratio, 11 * ratio); c.fillText(fixed(low, 1), 3 * ratio, h - 3 * ratio);
}

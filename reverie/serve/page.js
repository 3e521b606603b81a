'use strict';
const $ = id => document.getElementById(id);
const token = new URLSearchParams(location.search).get('token') || '';
const paces = [1, 2, 4, 6, 8, 10, 12, 15, 20, 24, 30, 40, 60];
let socket = null, hello = null, state = {}, newest = null, lost = 0, smooth = null;
let sent = new Map(), delays = [], arrivals = [], rewards = [], values = [], epoch = -1, toastTimer = 0;

function connect() {
  const scheme = location.protocol === 'https:' ? 'wss' : 'ws';
  socket = new WebSocket(`${scheme}://${location.host}/play?token=${encodeURIComponent(token)}`);
  socket.binaryType = 'arraybuffer';
  socket.onmessage = event => typeof event.data === 'string' ? hear(JSON.parse(event.data)) : receive(event.data);
  socket.onclose = event => {
    const full = event.code === 1013, refused = event.code === 1008 || event.code === 1003;
    // the first attempt comes at once and unsaid: a short gap is no news
    if (refused || full) say(refused ? `closed: ${event.reason}` : `${event.reason}; waiting for one …`);
    else if (lost || !hello) say('connection lost; trying again …');
    $('title').textContent = hello ? hello.title : 'not connected';
    if (!refused) setTimeout(connect, full ? 3000 : Math.min(4000, lost ? 500 * 2 ** lost : 200));
    lost += 1;
  };
}

function send(order) { if (socket && socket.readyState === 1) socket.send(JSON.stringify(order)); }
const set = (field, value) => send({type: 'set', field, value});
function say(text) { $('message').textContent = text; $('overlay').hidden = !text; }
function toast(text, link) {
  $('toast').textContent = text + ' ';
  if (link) {
    const a = document.createElement('a');
    a.href = `/saved/${encodeURIComponent(link)}?token=${encodeURIComponent(token)}`;
    a.textContent = 'download'; a.download = link;
    $('toast').append(a);
  }
  $('toast').hidden = false;
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => { $('toast').hidden = true; }, 8000);
}

function hear(message) {
  if (message.type === 'hello') { hello = message; lost = 0; say(''); build(); }
  if (message.type === 'hello' || message.type === 'state') { state = {...state, ...message}; describe(); }
  if (message.type === 'hello') { last = ''; lags = []; lead = null; waiting = []; act(); }
  if (message.type === 'state' && state.paused) turn(number);  // no frames come to end what the mouse began
  if (message.type === 'notice') toast(message.text);
  if (message.type === 'saved') toast(`saved ${message.text}`, message.id);
}

function build() {
  $('title').textContent = hello.title;
  document.title = `Reverie: ${hello.title}`;
  const actions = $('actions');
  actions.textContent = '';
  actions.className = hello.parts.length ? 'parts' : '';
  const values = part => hello.bindings.filter(other => other.part === part).length;
  let lastGroup = null;
  hello.bindings.forEach((binding, i) => {
    // parts of one button stand together, under no name
    const group = values(binding.part) > 1 ? binding.part : -1;
    if (hello.parts.length > 1 && group !== lastGroup) {
      const heading = document.createElement('h3');
      heading.textContent = group < 0 ? '' : hello.parts[group].name.replace(/_/g, ' ');
      actions.append(heading);
      lastGroup = group;
    }
    const button = document.createElement('button');
    const bar = document.createElement('b'), label = document.createElement('span'), share = document.createElement('em');
    label.textContent = binding.label;
    button.append(bar, label, share);
    if (binding.chords.length) {
      const cap = document.createElement('kbd');
      cap.textContent = binding.chords[0].map(keyName).join(' ');
      cap.title = binding.chords.map(c => c.map(keyName).join(' + ')).join(' or ');
      button.append(cap);
    }
    button.dataset.action = i;
    button.onpointerdown = event => { button.setPointerCapture(event.pointerId); pressed.set(event.pointerId, i); act(); };
    const up = event => { pressed.delete(event.pointerId); act(); };
    button.onpointerup = button.onpointercancel = up;
    button.oncontextmenu = event => event.preventDefault();
    actions.append(button);
  });
  $('legend').textContent = '';
  for (const channel of hello.channels) {
    const item = document.createElement('span'), swatch = document.createElement('i');
    swatch.style.background = `rgb(${channel.colour})`;
    item.append(swatch, channel.name.replace(/_/g, ' '));
    $('legend').append(item);
  }
  $('steps-row').hidden = hello.steps_choices.length < 2;
  const command = name => document.querySelector(`[data-do=${name}]`);
  command('view').hidden = command('both').hidden = hello.views.length < 2;
  command('source').hidden = hello.sources.length < 2;
  command('by').hidden = !hello.has_policy;
  document.body.classList.toggle('unjudged', !hello.has_policy);
  $('panel-actions').hidden = !hello.bindings.length;
  $('mouse-row').hidden = !hello.parts.some(part => part.camera);
  setSmooth(smooth === null ? hello.smooth : smooth);
}

function setSmooth(yes) {
  smooth = yes;
  document.body.classList.toggle('smooth', yes);
  document.querySelector('[data-do=smooth]').setAttribute('aria-pressed', yes);
}

const arrows = {ArrowLeft: '←', ArrowRight: '→', ArrowUp: '↑', ArrowDown: '↓', Enter: '⏎'};
const keyName = key => arrows[key] || key.toUpperCase();

function describe() {
  document.body.dataset.view = state.view;
  $('view').textContent = {dream: 'dream', real: 'real game', both: 'side by side'}[state.view];
  const who = [hello.has_policy && (state.by_agent ? 'the agent plays' : 'you play'), state.paused && 'paused'];
  $('who').textContent = who.filter(x => x).join(', ');
  $('steps').textContent = state.steps;
  $('pace').textContent = `${state.pace} fps`;
  $('source').textContent = state.source === 'data' ? 'from recordings' : 'from the game';
  $('real').hidden = $('psnr-cell').hidden = state.view !== 'both';
  $('horizon-name').textContent = state.view === 'real' ? 'frames played' : 'frames dreamed';
  const on = {view: state.view === 'real', both: state.view === 'both', by: state.by_agent, pause: state.paused};
  for (const [what, yes] of Object.entries(on)) document.querySelector(`[data-do=${what}]`).setAttribute('aria-pressed', yes);
  if (state.paused && !$('overlay').hidden) return;
  if (!newest || !newest.over) say('');
}

function account({header}) {
  const now = performance.now();
  newest = header;
  if (header.epoch !== epoch) { epoch = header.epoch; rewards = []; values = []; }
  arrivals.push(now);
  while (arrivals[0] < now - 2000) arrivals.shift();
  for (const [id, then] of sent) if (id <= header.id) { delays.push(now - then); sent.delete(id); }
  if (delays.length > 200) delays = delays.slice(-200);
  rewards.push(header.reward); values.push(header.value);
  if (rewards.length > 240) { rewards.shift(); values.shift(); }
  for (const field of ['view', 'by_agent', 'steps', 'pace', 'source', 'start']) state[field] = header[field];
  say(header.over ? (header.view === 'dream' ? 'the dream says: game over' : 'game over') : '');
  dirty = true;
}

// Whether a button's action led to the newest frame; a number counts on the side of rest where it is.
function isTaken(binding, i) {
  if (hello.kind === 'discrete') return newest.action[i] === 1;
  if (hello.kind !== 'composite') return false;
  const part = hello.parts[binding.part];
  if (part.choices) return newest.action[part.at + binding.action] === 1;
  const value = part.low + (newest.action[part.at] + 1) / 2 * (part.high - part.low);
  return Math.abs(value - part.rest) > .005 * (part.high - part.low) && (value - part.rest) * (binding.action - part.rest) > 0;
}

let dirty = false;
const fixed = (x, digits) => x.toFixed(digits).replace(/^-(0\.?0*)$/, '$1');
function paint() {
  requestAnimationFrame(paint);
  showDue();
  if (!dirty || !newest) return;
  dirty = false;
  const put = (id, x, digits, unit = '') => { $(id).textContent = x === null || x === undefined ? '–' : fixed(x, digits) + unit; };
  const span = (arrivals[arrivals.length - 1] - arrivals[0]) / 1000;
  put('fps', arrivals.length > 1 && span > 0 ? (arrivals.length - 1) / span : null, 1);
  const sorted = [...delays].sort((a, b) => a - b), at = q => sorted[Math.min(sorted.length - 1, Math.floor(q * sorted.length))];
  put('p50', at(.5), 0, ' ms'); put('p95', at(.95), 0, ' ms');
  put('horizon', newest.t, 0); put('score', newest.score, 1); put('reward', newest.reward, 2);
  put('value', newest.value, 2); put('psnr', newest.psnr, 1, ' dB');
  $('cont').textContent = newest.cont === null ? '–' : `${(100 * newest.cont).toFixed(0)}%`;
  $('caption').textContent = `start ${newest.start}, frame ${newest.t}`;
  $('value-section').hidden = newest.value === null;
  $('of-agent').textContent = newest.probs ? '· the agent’s choice' : '';
  document.querySelectorAll('#actions button').forEach((button, i) => {
    const p = newest.probs ? newest.probs[i] : null;
    button.children[0].style.width = p === null ? '0' : `${100 * p}%`;
    button.children[2].textContent = p === null ? '' : `${(100 * p).toFixed(0)}%`;
    button.classList.toggle('taken', newest.t > 0 && isTaken(hello.bindings[i], i));
  });
  trace($('reward-trace'), rewards, '#4ade80', true);
  trace($('value-trace'), values, '#a78bfa', false);
  describe();
}

// ---- what is held down becomes an action

let held = [], pressed = new Map(), number = 0, last = '';  // held: {code, key}, the last pressed at the end

function act() {
  if (!hello) return;
  const chosen = new Set(pressed.values()), keys = held.map(x => x.key);
  const chords = [];
  hello.bindings.forEach((binding, i) => binding.chords.forEach(chord => {
    if (chord.every(key => keys.includes(key))) chords.push([chord.length, Math.max(...chord.map(k => keys.lastIndexOf(k))), i]);
  }));
  chords.sort((a, b) => b[0] - a[0] || b[1] - a[1]);
  const found = [...[...chosen].reverse(), ...chords.map(chord => chord[2])];  // bindings, the one that counts first
  let action = hello.rest, active = i => found.includes(i);
  if (hello.kind === 'discrete') {
    if (found.length) action = hello.bindings[found[0]].action;
  } else if (hello.kind === 'continuous') {
    action = hello.rest.map((_, j) => Math.max(-1, Math.min(1, [...new Set(found)].reduce((a, i) => a + hello.bindings[i].action[j], 0))));
  } else {
    action = hello.parts.map((part, j) => {
      const first = found.find(i => hello.bindings[i].part === j);
      return first === undefined ? turned(part) : hello.bindings[first].action;
    });
    active = i => action[hello.bindings[i].part] === hello.bindings[i].action;
  }
  document.querySelectorAll('#actions button').forEach((button, i) => button.classList.toggle('held', active(i)));
  const text = JSON.stringify(action);
  if (action === null || text === last) return;
  last = text;
  number += 1;
  if (!state.paused && !state.by_agent) sent.set(number, performance.now());
  if (sent.size > 64) sent.clear();
  send({type: 'act', action, id: number});
}

// ---- the mouse turns the parts that are a camera, while no key of theirs is held
//
// x: pixels that it moved over the picture since the last frame, times the sensitivity; right and down are positive.
// A choice is as many places from rest as x passes thresholds, which grow by one factor from 2 to 40 pixels: of seven
// choices 2, 9 and 40 (small, medium, large). A number is at rest + x / 60 of half its range, and ends at its ends.

const SMALL = 2, LARGE = 40, FULL = 60, ON_THE_WAY = 2;
let moved = {x: 0, y: 0}, turning = {x: 0, y: 0}, sensitivity = 1, lastTurn = 0;

function turned(part) {
  const x = part.camera ? sensitivity * turning[part.camera] : 0;
  if (!x) return part.rest;
  const within = (value, low, high) => Math.max(low, Math.min(high, value));
  if (!part.choices) return within(part.rest + x / FULL * (part.high - part.low) / 2, part.low, part.high);
  const levels = Math.max(part.rest, part.choices - 1 - part.rest);
  let places = 0;
  while (places < levels && Math.abs(x) >= SMALL * (LARGE / SMALL) ** (places / Math.max(1, levels - 1)) - 1e-9) places += 1;
  return within(part.rest + Math.sign(x) * places, 0, part.choices - 1);
}

// With every frame that comes; id: the newest order that it obeys. While some are on their way the movement waits,
// or each would wait for the ones before it, and the picture would lag behind the hand.
function turn(id) {
  const still = state.paused || state.by_agent || !document.pointerLockElement, now = performance.now();
  if (!hello || (still && !turning.x && !turning.y)) return;
  if (!still && (number - id > ON_THE_WAY || now - lastTurn < 15)) return;  // the server takes 100 orders per second
  turning = still ? {x: 0, y: 0} : moved;
  moved = {x: 0, y: 0};
  lastTurn = now;
  act();
}

function look(event) { moved.x += event.movementX; moved.y += event.movementY; }
$('screen').onclick = () => {
  if (!hello || !hello.parts.some(part => part.camera) || document.pointerLockElement) return;
  const asked = $('screen').requestPointerLock();
  if (asked) asked.catch(() => toast('the browser keeps the mouse; click again in a moment'));
};
document.addEventListener('pointerlockchange', () => {
  document.onmousemove = document.pointerLockElement ? look : null;
  moved = {x: 0, y: 0}; turning = {x: 0, y: 0};
  act();
});
$('sensitivity').oninput = () => {
  sensitivity = 2 ** Number($('sensitivity').value);
  $('sensitivity-value').textContent = `×${sensitivity.toFixed(1)}`;
};

const toggleBetween = (list, value, by) => list[Math.max(0, Math.min(list.length - 1, list.indexOf(value) + by))];
const nearest = value => paces.reduce((a, b) => Math.abs(b - value) < Math.abs(a - value) ? b : a);
const commands = {
  view: () => hello.views.length > 1 && set('view', state.view === 'real' ? 'dream' : 'real'),
  both: () => hello.views.length > 1 && set('view', state.view === 'both' ? 'dream' : 'both'),
  by: () => hello.has_policy && set('by_agent', !state.by_agent),
  pause: () => set('paused', !state.paused),
  step: () => send({type: 'step'}),
  reset: () => send({type: 'reset'}),
  again: () => send({type: 'again'}),
  source: () => hello.sources.length > 1 && set('source', state.source === 'data' ? 'game' : 'data'),
  fewer: () => hello.steps_choices.length > 1 && set('steps', toggleBetween(hello.steps_choices, state.steps, -1)),
  more: () => hello.steps_choices.length > 1 && set('steps', toggleBetween(hello.steps_choices, state.steps, 1)),
  slower: () => set('pace', toggleBetween(paces, nearest(state.pace), -1)),
  faster: () => set('pace', toggleBetween(paces, nearest(state.pace), 1)),
  smooth: () => setSmooth(!smooth),
  gif: () => send({type: 'gif'}), mp4: () => send({type: 'mp4'}), episode: () => send({type: 'episode'}),
};
const shortcuts = {Tab: 'view', b: 'both', m: 'by', ' ': 'pause', '.': 'step', r: 'reset', R: 'again', g: 'source',
  '[': 'fewer', ']': 'more', '-': 'slower', '=': 'faster', '+': 'faster', ',': 'smooth'};
const plain = key => key.length === 1 ? key.toLowerCase() : key;

window.addEventListener('keydown', event => {
  if (event.ctrlKey || event.metaKey || event.altKey || !hello) return;
  const command = shortcuts[event.key] || (event.key === 'R' ? 'again' : shortcuts[plain(event.key)]);
  const key = plain(event.key), bound = hello.bindings.some(b => b.chords.some(c => c.includes(key)));
  if (!command && !bound) return;
  event.preventDefault();
  if (document.activeElement) document.activeElement.blur();
  if (event.repeat && command !== 'step') return;
  if (command) commands[command]();
  else if (!held.some(x => x.code === event.code)) { held.push({code: event.code, key}); act(); }
}, true);
window.addEventListener('keyup', event => {
  if (held.some(x => x.code === event.code)) { held = held.filter(x => x.code !== event.code); act(); }
}, true);
window.addEventListener('blur', () => { held = []; pressed.clear(); act(); });
document.querySelectorAll('[data-do]').forEach(button => {
  button.onclick = () => { button.blur(); if (hello) commands[button.dataset.do](); };
});
connect();
paint();
